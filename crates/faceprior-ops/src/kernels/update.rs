//! Updates of parameters, one value at a time, in a single pass over all operands.

use super::lanes::{Isa, Kernel, Lanes};
use super::{BLOCK, Shared, parallel};

/// What happens to one value of a parameter that has `STATE` running values beside it.
///
/// Products and sums are rounded one by one, as tensor expressions round them, so that every instruction set gives
/// the same bits.
pub(crate) trait Rule<const STATE: usize>: Copy + Sync {
    /// How many neighbouring `other`s have their mean taken from them first.
    fn centred(self) -> Option<usize> {
        None
    }

    /// The new value from the old one and `other` (a gradient, or the source of an average); moves the state.
    ///
    /// # Safety
    /// The processor must have the instructions of `L`.
    unsafe fn apply<L: Lanes>(self, value: L, other: L, state: &mut [L; STATE]) -> L;
}

/// Applies a rule to a whole parameter: `to` becomes the new values, the state moves in place.
pub(crate) fn update<const STATE: usize>(
    isa: Isa,
    rule: impl Rule<STATE>,
    values: &[f32],
    others: &[f32],
    mut state: [&mut [f32]; STATE],
    to: &mut [f32],
) {
    let length = values.len();
    assert!(others.len() == length && to.len() == length);
    assert!(state.iter().all(|state| state.len() == length));
    let (to, state) = (Shared::new(to), state.each_mut().map(|state| Shared::new(state)));
    let row = rule.centred().unwrap_or(TASK_FLOATS).max(1);
    let task_floats = (TASK_FLOATS / row).max(1) * row;
    parallel(length.div_ceil(task_floats), |task| {
        let end = length.min((task + 1) * task_floats);
        for start in (task * task_floats..end).step_by(row) {
            isa.run(Part {
                rule,
                values,
                others,
                state,
                to,
                start,
                end: end.min(start + row),
            });
        }
    });
}

const TASK_FLOATS: usize = 32 << 10;
/// Vectors that are added before they join the sum of a row.
const SUM_VECTORS: usize = 64;

struct Part<'a, R, const STATE: usize> {
    rule: R,
    values: &'a [f32],
    others: &'a [f32],
    state: [Shared; STATE],
    to: Shared,
    start: usize,
    end: usize,
}

impl<R: Rule<STATE>, const STATE: usize> Kernel for Part<'_, R, STATE> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self {
            rule,
            values,
            others,
            state,
            to,
            start,
            end,
        } = self;
        let mean = if rule.centred().is_some() {
            // SAFETY: the caller promises the instructions.
            unsafe { mean::<L>(&others[start..end]) }
        } else {
            0.0
        };
        let (values, others) = (values.as_ptr(), others.as_ptr());
        let whole = start + (end - start) / BLOCK * BLOCK;
        // SAFETY: the caller promises the instructions; `update` has checked the lengths; tasks have parts of their own.
        unsafe {
            let mean = L::splat(mean);
            for at in (start..whole).step_by(BLOCK) {
                let value = L::load(values.wrapping_add(at));
                let other = L::load(others.wrapping_add(at)).sub(mean);
                let mut lanes = [L::zero(); STATE];
                for (lanes, state) in lanes.iter_mut().zip(state) {
                    *lanes = L::load(state.at(at));
                }
                rule.apply(value, other, &mut lanes).store(to.at(at));
                for (lanes, state) in lanes.into_iter().zip(state) {
                    lanes.store(state.at(at));
                }
            }
            if whole < end {
                let rest = end - whole;
                let mut lanes = [L::zero(); STATE];
                for (lanes, state) in lanes.iter_mut().zip(state) {
                    *lanes = load_some(state.at(whole), rest);
                }
                let value = load_some(values.wrapping_add(whole), rest);
                let other = load_some::<L>(others.wrapping_add(whole), rest).sub(mean);
                let value = rule.apply(value, other, &mut lanes);
                store_some(value, to.at(whole), rest);
                for (lanes, state) in lanes.into_iter().zip(state) {
                    store_some(lanes, state.at(whole), rest);
                }
            }
        }
    }
}

/// The mean of some values, summed in one order whatever the instructions.
///
/// # Safety
/// The processor has the instructions of `L`.
#[inline(always)]
unsafe fn mean<L: Lanes>(values: &[f32]) -> f32 {
    let (vectors, rest) = values.as_chunks::<BLOCK>();
    let mut total = [0.0; BLOCK];
    // SAFETY: the caller's promise.
    unsafe {
        let mut sum = L::zero();
        for vectors in vectors.chunks(SUM_VECTORS) {
            let mut some = L::zero();
            for vector in vectors {
                some = some.add(L::load(vector.as_ptr()));
            }
            sum = sum.add(some);
        }
        sum.store(total.as_mut_ptr());
    }
    let sum: f32 = total.iter().chain(rest).sum();
    sum / values.len() as f32
}

/// Fewer than sixteen floats, and zeros.
#[inline(always)]
unsafe fn load_some<L: Lanes>(from: *const f32, count: usize) -> L {
    let mut values = [0.0; BLOCK];
    // SAFETY: the caller promises `count` floats, fewer than sixteen, and the instructions.
    unsafe {
        values.as_mut_ptr().copy_from_nonoverlapping(from, count);
        L::load(values.as_ptr())
    }
}

/// The first floats of sixteen.
#[inline(always)]
unsafe fn store_some<L: Lanes>(lanes: L, to: *mut f32, count: usize) {
    let mut values = [0.0; BLOCK];
    // SAFETY: the caller promises room for `count` floats, fewer than sixteen, and the instructions.
    unsafe {
        lanes.store(values.as_mut_ptr());
        to.copy_from_nonoverlapping(values.as_ptr(), count);
    }
}
