//! bfloat16: the upper half of an f32, for what has to wait in memory.

use super::lanes::{Isa, Kernel, Lanes};
use super::parallel_chunks;

/// Values of one task.
const TASK_VALUES: usize = 64 << 10;

/// Rounds to the nearest bfloat16, ties to even; what is not a number stays none.
pub(crate) fn round(isa: Isa, values: &[f32], halves: &mut [u16]) {
    assert_eq!(values.len(), halves.len());
    parallel_chunks(halves, TASK_VALUES, |task, to| {
        let values = &values[task * TASK_VALUES..][..to.len()];
        isa.run(Round { values, to });
    });
}

/// The values of bfloat16s, which is exact.
pub(crate) fn widen(isa: Isa, halves: &[u16], values: &mut [f32]) {
    assert_eq!(values.len(), halves.len());
    parallel_chunks(values, TASK_VALUES, |task, to| {
        let halves = &halves[task * TASK_VALUES..][..to.len()];
        isa.run(Widen { halves, to });
    });
}

struct Round<'a> {
    values: &'a [f32],
    to: &'a mut [u16],
}

impl Kernel for Round<'_> {
    type Output = ();

    // Integers need no lanes of their own: the compiler makes vectors of the loop.
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        for (to, value) in self.to.iter_mut().zip(self.values) {
            let bits = value.to_bits();
            let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1));
            let quiet = bits | 0x0040_0000;
            *to = (if value.is_nan() { quiet } else { rounded } >> 16) as u16;
        }
    }
}

struct Widen<'a> {
    halves: &'a [u16],
    to: &'a mut [f32],
}

impl Kernel for Widen<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        for (to, half) in self.to.iter_mut().zip(self.halves) {
            *to = f32::from_bits(u32::from(*half) << 16);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::normal;

    #[test]
    fn rounding_is_to_the_nearest_and_ties_go_to_even() {
        let ulp = 2.0f32.powi(-7);
        let cases = [
            (1.0, 1.0),
            (1.0 + 0.5 * ulp, 1.0),
            (1.0 + 0.5 * ulp + f32::EPSILON, 1.0 + ulp),
            (1.0 + 1.5 * ulp, 1.0 + 2.0 * ulp),
            (-1.0 - 1.5 * ulp, -1.0 - 2.0 * ulp),
            (0.0, 0.0),
            (-0.0, -0.0),
            (f32::MAX, f32::INFINITY),
            (f32::NEG_INFINITY, f32::NEG_INFINITY),
            (f32::from_bits(1), 0.0),
        ];
        // More than one task, and a remainder of every vector.
        let mut values: Vec<f32> = cases.iter().map(|case| case.0).collect();
        values.extend(normal(TASK_VALUES + 13, 1));
        values.push(f32::from_bits(0x7F80_0001));
        values.push(-f32::NAN);
        for isa in Isa::available() {
            let (mut halves, mut back) = (vec![0; values.len()], vec![f32::NAN; values.len()]);
            round(isa, &values, &mut halves);
            widen(isa, &halves, &mut back);
            for ((value, expected), got) in cases.iter().zip(&back) {
                assert_eq!(got.to_bits(), expected.to_bits(), "{isa:?} {value}");
            }
            let (numbers, rest) = back.split_at(values.len() - 2);
            for (value, got) in values.iter().zip(numbers).skip(cases.len()) {
                assert!(
                    (value - got).abs() <= value.abs() / 256.0,
                    "{isa:?} {value} {got}"
                );
            }
            assert!(rest.iter().all(|value| value.is_nan()), "{isa:?} {rest:?}");
        }
    }
}
