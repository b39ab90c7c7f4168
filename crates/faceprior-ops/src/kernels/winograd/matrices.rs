//! The matrices of F(4×4, 3×3), F(3×3, 3×3) and F(2×2, 3×3), applied to the vectors along one axis of a tile.
//!
//! The points are ∞, 0, p, −p, q and −q, of which a tile of T outputs takes the first T + 2. So the kernel's polynomial at
//! the points serves tiles of all sizes; what Lagrange's polynomials of fewer points are divided by less is in the
//! matrices of the input.
//!
//! # Safety
//! Every function requires a processor with the instructions of `L`.

use std::mem::MaybeUninit;

use super::super::lanes::Lanes;
use super::{BLOCK, EDGE};

/// The matrices for T outputs, which take E points along an axis: T + 2 with a kernel of three taps, T + 1 with two.
pub(super) trait Matrices<const T: usize, const E: usize> {
    /// Bᵀ: coefficients of the polynomials that vanish at all points but one.
    unsafe fn input_to_points<L: Lanes>(d: [L; E]) -> [L; E];
    /// Aᵀ: powers of the points.
    unsafe fn points_to_output<L: Lanes>(m: [L; E]) -> [L; T];
}

/// The matrices that weight gradients take besides.
pub(super) trait GradientMatrices<const T: usize, const E: usize>: Matrices<T, E> {
    /// A.
    unsafe fn output_to_points<L: Lanes>(y: [L; T]) -> [L; E];
}

const P: f32 = 0.625;
const Q: f32 = 1.5;
const P2: f32 = P * P;
const Q2: f32 = Q * Q;
/// Derivatives of x(x² − p²)(x² − q²) at 0, ±p and ±q: what Lagrange's polynomials of six points are divided by.
const AT_0: f32 = P2 * Q2;
const AT_P: f32 = 2.0 * P2 * (P2 - Q2);
const AT_Q: f32 = 2.0 * Q2 * (Q2 - P2);

/// What a kernel of three taps along an axis becomes.
pub(super) trait KernelMatrix {
    /// G.
    unsafe fn taps_to_points<L: Lanes>(g: [L; 3]) -> [L; EDGE];
    /// Gᵀ.
    unsafe fn points_to_taps<L: Lanes>(s: [L; EDGE]) -> [L; 3];
}

/// G: the kernel's polynomial at all points, over [`AT_0`], [`AT_P`] and [`AT_Q`].
pub(super) struct ThreeTaps;

impl KernelMatrix for ThreeTaps {
    #[inline(always)]
    unsafe fn taps_to_points<L: Lanes>(g: [L; 3]) -> [L; EDGE] {
        // SAFETY: the caller promises the instructions of `L`.
        unsafe {
            let [g0, g1, g2] = g;
            let even_p = L::splat(1.0 / AT_P).mul(L::splat(P2).mul_add(g2, g0));
            let even_q = L::splat(1.0 / AT_Q).mul(L::splat(Q2).mul_add(g2, g0));
            let (odd_p, odd_q) = (L::splat(P / AT_P).mul(g1), L::splat(Q / AT_Q).mul(g1));
            [
                g2,
                L::splat(1.0 / AT_0).mul(g0),
                even_p.add(odd_p),
                even_p.sub(odd_p),
                even_q.add(odd_q),
                even_q.sub(odd_q),
            ]
        }
    }

    #[inline(always)]
    unsafe fn points_to_taps<L: Lanes>(s: [L; EDGE]) -> [L; 3] {
        // SAFETY: the caller promises the instructions of `L`.
        unsafe {
            let [s_inf, s0, s1, s2, s3, s4] = s;
            let (even_p, odd_p) = (s1.add(s2), s1.sub(s2));
            let (even_q, odd_q) = (s3.add(s4), s3.sub(s4));
            let scaled_p = L::splat(1.0 / AT_P).mul(even_p);
            [
                L::splat(1.0 / AT_0).mul_add(s0, L::splat(1.0 / AT_Q).mul_add(even_q, scaled_p)),
                L::splat(P / AT_P).mul_add(odd_p, L::splat(Q / AT_Q).mul(odd_q)),
                L::splat(P2 / AT_P).mul_add(even_p, L::splat(Q2 / AT_Q).mul_add(even_q, s_inf)),
            ]
        }
    }
}

/// F(4×4, 3×3).
pub(super) struct Four;

impl Matrices<4, 6> for Four {
    #[inline(always)]
    unsafe fn input_to_points<L: Lanes>(d: [L; 6]) -> [L; 6] {
        // SAFETY: the caller promises the instructions of `L`.
        unsafe {
            let [d0, d1, d2, d3, d4, d5] = d;
            let (p2, q2, sum) = (L::splat(-P2), L::splat(-Q2), L::splat(-(P2 + Q2)));
            let (p, q, product) = (L::splat(P), L::splat(Q), L::splat(P2 * Q2));
            let (even_p, odd_p) = (q2.mul_add(d2, d4), p.mul(q2.mul_add(d1, d3)));
            let (even_q, odd_q) = (p2.mul_add(d2, d4), q.mul(p2.mul_add(d1, d3)));
            [
                product.mul_add(d1, sum.mul_add(d3, d5)),
                product.mul_add(d0, sum.mul_add(d2, d4)),
                even_p.add(odd_p),
                even_p.sub(odd_p),
                even_q.add(odd_q),
                even_q.sub(odd_q),
            ]
        }
    }

    #[inline(always)]
    unsafe fn points_to_output<L: Lanes>(m: [L; 6]) -> [L; 4] {
        // SAFETY: the caller promises the instructions of `L`.
        unsafe {
            let [m_inf, m0, m1, m2, m3, m4] = m;
            let (even_p, odd_p) = (m1.add(m2), m1.sub(m2));
            let (even_q, odd_q) = (m3.add(m4), m3.sub(m4));
            [
                m0.add(even_p).add(even_q),
                L::splat(P).mul_add(odd_p, L::splat(Q).mul(odd_q)),
                L::splat(P2).mul_add(even_p, L::splat(Q2).mul(even_q)),
                L::splat(P2 * P).mul_add(odd_p, L::splat(Q2 * Q).mul_add(odd_q, m_inf)),
            ]
        }
    }
}

impl GradientMatrices<4, 6> for Four {
    #[inline(always)]
    unsafe fn output_to_points<L: Lanes>(y: [L; 4]) -> [L; 6] {
        // SAFETY: the caller promises the instructions of `L`.
        unsafe {
            let [y0, y1, y2, y3] = y;
            let (even_p, odd_p) = (
                L::splat(P2).mul_add(y2, y0),
                L::splat(P2 * P).mul_add(y3, L::splat(P).mul(y1)),
            );
            let (even_q, odd_q) = (
                L::splat(Q2).mul_add(y2, y0),
                L::splat(Q2 * Q).mul_add(y3, L::splat(Q).mul(y1)),
            );
            [
                y3,
                y0,
                even_p.add(odd_p),
                even_p.sub(odd_p),
                even_q.add(odd_q),
                even_q.sub(odd_q),
            ]
        }
    }
}

/// F(3×3, 3×3), without −q.
pub(super) struct Three;

impl Matrices<3, 5> for Three {
    #[inline(always)]
    unsafe fn input_to_points<L: Lanes>(d: [L; 5]) -> [L; 5] {
        // SAFETY: the caller promises the instructions of `L`.
        unsafe {
            let [d0, d1, d2, d3, d4] = d;
            let (p2, q) = (L::splat(-P2), L::splat(-Q));
            // x(x² − p²), and x times that.
            let (at_q, above_q) = (p2.mul_add(d1, d3), p2.mul_add(d2, d4));
            let at_0 = q.mul_add(p2.mul_add(d0, d2), at_q);
            // x² − qx at ±p.
            let (even, odd) = (q.mul_add(d2, d3), L::splat(P).mul(q.mul_add(d1, d2)));
            [
                q.mul_add(at_q, above_q),
                L::splat(Q).mul(at_0),
                L::splat(P + Q).mul(even.add(odd)),
                L::splat(Q - P).mul(even.sub(odd)),
                L::splat(2.0 * Q).mul(at_q),
            ]
        }
    }

    #[inline(always)]
    unsafe fn points_to_output<L: Lanes>(m: [L; 5]) -> [L; 3] {
        // SAFETY: the caller promises the instructions of `L`.
        unsafe {
            let [m_inf, m0, m1, m2, m3] = m;
            let (even, odd) = (m1.add(m2), m1.sub(m2));
            [
                m0.add(even).add(m3),
                L::splat(P).mul_add(odd, L::splat(Q).mul(m3)),
                L::splat(P2).mul_add(even, L::splat(Q2).mul_add(m3, m_inf)),
            ]
        }
    }
}

impl GradientMatrices<3, 5> for Three {
    #[inline(always)]
    unsafe fn output_to_points<L: Lanes>(y: [L; 3]) -> [L; 5] {
        // SAFETY: the caller promises the instructions of `L`.
        unsafe {
            let [y0, y1, y2] = y;
            let (even, odd) = (L::splat(P2).mul_add(y2, y0), L::splat(P).mul(y1));
            [
                y2,
                y0,
                even.add(odd),
                even.sub(odd),
                L::splat(Q).mul_add(L::splat(Q).mul_add(y2, y1), y0),
            ]
        }
    }
}

/// F(2×2, 3×3), without q and −q.
pub(super) struct Two;

impl Matrices<2, 4> for Two {
    #[inline(always)]
    unsafe fn input_to_points<L: Lanes>(d: [L; 4]) -> [L; 4] {
        // SAFETY: the caller promises the instructions of `L`.
        unsafe {
            let [d0, d1, d2, d3] = d;
            let p2 = L::splat(-P2);
            let (even, odd) = (L::splat(P2 - Q2).mul(d2), L::splat(P * (P2 - Q2)).mul(d1));
            [
                p2.mul_add(d1, d3),
                L::splat(-Q2).mul(p2.mul_add(d0, d2)),
                even.add(odd),
                even.sub(odd),
            ]
        }
    }

    #[inline(always)]
    unsafe fn points_to_output<L: Lanes>(m: [L; 4]) -> [L; 2] {
        // SAFETY: the caller promises the instructions of `L`.
        unsafe {
            let [m_inf, m0, m1, m2] = m;
            [m0.add(m1).add(m2), L::splat(P).mul_add(m1.sub(m2), m_inf)]
        }
    }
}

impl GradientMatrices<2, 4> for Two {
    #[inline(always)]
    unsafe fn output_to_points<L: Lanes>(y: [L; 2]) -> [L; 4] {
        // SAFETY: the caller promises the instructions of `L`.
        unsafe {
            let [y0, y1] = y;
            let odd = L::splat(P).mul(y1);
            [y1, y0, y0.add(odd), y0.sub(odd)]
        }
    }
}

/// Derivatives of x(x² − p²)(x − q) at 0, p, −p and q, for a kernel of two taps: they need a point less.
const TWO_AT_0: f32 = P2 * Q;
const TWO_AT_P: f32 = 2.0 * P2 * (P - Q);
const TWO_AT_MINUS_P: f32 = -2.0 * P2 * (P + Q);
const TWO_AT_Q: f32 = Q * (Q2 - P2);

/// The middle tap, and the outer two as a kernel of their own at ∞, 0, p, −p and q, over these.
pub(super) struct MiddleAndOuterTaps;

impl KernelMatrix for MiddleAndOuterTaps {
    #[inline(always)]
    unsafe fn taps_to_points<L: Lanes>(g: [L; 3]) -> [L; EDGE] {
        // SAFETY: the caller promises the instructions of `L`.
        unsafe {
            let [g0, g1, g2] = g;
            [
                g1,
                g2,
                L::splat(1.0 / TWO_AT_0).mul(g0),
                L::splat(1.0 / TWO_AT_P).mul(L::splat(P).mul_add(g2, g0)),
                L::splat(1.0 / TWO_AT_MINUS_P).mul(L::splat(-P).mul_add(g2, g0)),
                L::splat(1.0 / TWO_AT_Q).mul(L::splat(Q).mul_add(g2, g0)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn points_to_taps<L: Lanes>(s: [L; EDGE]) -> [L; 3] {
        // SAFETY: the caller promises the instructions of `L`.
        unsafe {
            let [middle, s_inf, s0, s1, s2, s3] = s;
            let p = L::splat(1.0 / TWO_AT_P).mul(s1);
            let minus_p = L::splat(1.0 / TWO_AT_MINUS_P).mul(s2);
            let q = L::splat(1.0 / TWO_AT_Q).mul(s3);
            [
                L::splat(1.0 / TWO_AT_0).mul_add(s0, p.add(minus_p).add(q)),
                middle,
                L::splat(P).mul_add(p.sub(minus_p), L::splat(Q).mul_add(q, s_inf)),
            ]
        }
    }
}

/// F(4, 2).
pub(super) struct FourOfTwo;

impl Matrices<4, 5> for FourOfTwo {
    #[inline(always)]
    unsafe fn input_to_points<L: Lanes>(d: [L; 5]) -> [L; 5] {
        // SAFETY: the caller promises the instructions of `L`.
        unsafe {
            let [d0, d1, d2, d3, d4] = d;
            let (p2, q) = (L::splat(-P2), L::splat(-Q));
            let (at_q, above_q) = (p2.mul_add(d1, d3), p2.mul_add(d2, d4));
            let (even, odd) = (q.mul_add(d2, d3), L::splat(P).mul(q.mul_add(d1, d2)));
            [
                q.mul_add(at_q, above_q),
                q.mul_add(p2.mul_add(d0, d2), at_q),
                even.add(odd),
                even.sub(odd),
                at_q,
            ]
        }
    }

    #[inline(always)]
    unsafe fn points_to_output<L: Lanes>(m: [L; 5]) -> [L; 4] {
        // SAFETY: the caller promises the instructions of `L`.
        unsafe {
            let [m_inf, m0, m1, m2, m3] = m;
            let (even, odd) = (m1.add(m2), m1.sub(m2));
            [
                m0.add(even).add(m3),
                L::splat(P).mul_add(odd, L::splat(Q).mul(m3)),
                L::splat(P2).mul_add(even, L::splat(Q2).mul(m3)),
                L::splat(P2 * P).mul_add(odd, L::splat(Q2 * Q).mul_add(m3, m_inf)),
            ]
        }
    }
}

impl GradientMatrices<4, 5> for FourOfTwo {
    #[inline(always)]
    unsafe fn output_to_points<L: Lanes>(y: [L; 4]) -> [L; 5] {
        // SAFETY: the caller promises the instructions of `L`.
        unsafe {
            let [y0, y1, y2, y3] = y;
            let (even, odd) = (
                L::splat(P2).mul_add(y2, y0),
                L::splat(P2 * P).mul_add(y3, L::splat(P).mul(y1)),
            );
            let q = L::splat(Q);
            [
                y3,
                y0,
                even.add(odd),
                even.sub(odd),
                q.mul_add(q.mul_add(q.mul_add(y3, y2), y1), y0),
            ]
        }
    }
}

/// F(3, 2), without q.
pub(super) struct ThreeOfTwo;

impl Matrices<3, 4> for ThreeOfTwo {
    #[inline(always)]
    unsafe fn input_to_points<L: Lanes>(d: [L; 4]) -> [L; 4] {
        // SAFETY: the caller promises the instructions of `L`.
        unsafe {
            let [d0, d1, d2, d3] = d;
            let (p, p2) = (L::splat(P), L::splat(-P2));
            [
                p2.mul_add(d1, d3),
                L::splat(-Q).mul(p2.mul_add(d0, d2)),
                L::splat(P - Q).mul(p.mul_add(d1, d2)),
                L::splat(P + Q).mul(p.mul(d1).sub(d2)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn points_to_output<L: Lanes>(m: [L; 4]) -> [L; 3] {
        // SAFETY: the caller promises the instructions of `L`.
        unsafe {
            let [m_inf, m0, m1, m2] = m;
            let even = m1.add(m2);
            [
                m0.add(even),
                L::splat(P).mul(m1.sub(m2)),
                L::splat(P2).mul_add(even, m_inf),
            ]
        }
    }
}

impl GradientMatrices<3, 4> for ThreeOfTwo {
    #[inline(always)]
    unsafe fn output_to_points<L: Lanes>(y: [L; 3]) -> [L; 4] {
        // SAFETY: the caller promises the instructions of `L`.
        unsafe {
            let [y0, y1, y2] = y;
            let (even, odd) = (L::splat(P2).mul_add(y2, y0), L::splat(P).mul(y1));
            [y2, y0, even.add(odd), even.sub(odd)]
        }
    }
}

/// F(2, 2), without −p and q.
pub(super) struct TwoOfTwo;

impl Matrices<2, 3> for TwoOfTwo {
    #[inline(always)]
    unsafe fn input_to_points<L: Lanes>(d: [L; 3]) -> [L; 3] {
        // SAFETY: the caller promises the instructions of `L`.
        unsafe {
            let [d0, d1, d2] = d;
            let p = L::splat(-P);
            [
                p.mul_add(d1, d2),
                L::splat(-P * Q).mul(p.mul_add(d0, d1)),
                L::splat(2.0 * P * (P - Q)).mul(d1),
            ]
        }
    }

    #[inline(always)]
    unsafe fn points_to_output<L: Lanes>(m: [L; 3]) -> [L; 2] {
        // SAFETY: the caller promises the instructions of `L`.
        unsafe {
            let [m_inf, m0, m1] = m;
            [m0.add(m1), L::splat(P).mul_add(m1, m_inf)]
        }
    }
}

impl GradientMatrices<2, 3> for TwoOfTwo {
    #[inline(always)]
    unsafe fn output_to_points<L: Lanes>(y: [L; 2]) -> [L; 3] {
        // SAFETY: the caller promises the instructions of `L`.
        unsafe {
            let [y0, y1] = y;
            [y1, y0, L::splat(P).mul_add(y1, y0)]
        }
    }
}

/// Calls a function that is generic over [`Matrices`] for tiles of so many outputs along an axis.
macro_rules! with_matrices {
    ($outputs:expr, $function:ident::<$lanes:ident>($($argument:expr),* $(,)?)) => {
        match $outputs {
            4 => $function::<$lanes, Four, 4, 6>($($argument),*),
            3 => $function::<$lanes, Three, 3, 5>($($argument),*),
            _ => $function::<$lanes, Two, 2, 4>($($argument),*),
        }
    };
}
pub(super) use with_matrices;

/// A tile between the transform along its columns and the one along its rows.
///
/// In memory, since there are not registers enough. Of an array of vectors the compiler, where these take two registers
/// each, makes one that it clears first and copies as a whole: a sixth of a convolution's time by a profile.
#[repr(align(64))]
pub(super) struct Half<const SIDE: usize = EDGE>(MaybeUninit<[[[f32; BLOCK]; SIDE]; SIDE]>);

impl<const SIDE: usize> Half<SIDE> {
    #[inline(always)]
    pub(super) fn new() -> Self {
        Self(MaybeUninit::uninit())
    }

    /// Where a vector lies.
    #[inline(always)]
    pub(super) fn at(&mut self, row: usize, column: usize) -> *mut f32 {
        let first = self.0.as_mut_ptr().cast::<f32>();
        first.wrapping_add((row * SIDE + column) * BLOCK)
    }

    /// Writes a column from the first row on.
    #[inline(always)]
    pub(super) unsafe fn write_column<L: Lanes, const R: usize>(&mut self, column: usize, values: [L; R]) {
        for (row, value) in values.into_iter().enumerate() {
            // SAFETY: the caller promises the instructions of `L` and a column of the tile.
            unsafe { value.store(self.at(row, column)) };
        }
    }

    /// The first columns of a row, which must have been written.
    #[inline(always)]
    pub(super) unsafe fn row<L: Lanes, const C: usize>(&self, row: usize) -> [L; C] {
        let from = self.0.as_ptr().cast::<f32>();
        // SAFETY: the caller promises the instructions of `L`, a row of the tile and that it is there.
        unsafe {
            let mut values = [L::zero(); C];
            for (column, value) in values.iter_mut().enumerate() {
                *value = L::load(from.wrapping_add((row * SIDE + column) * BLOCK));
            }
            values
        }
    }
}
