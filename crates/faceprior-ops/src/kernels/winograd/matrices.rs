//! The matrices of F(4×4, 3×3) and F(2×2, 3×3), applied to the vectors along one axis of a tile.
//!
//! # Safety
//! Every function requires a processor with the instructions of `L`.

use super::super::lanes::Lanes;
use super::{EDGE, TILE};

/// The matrices of F(T×T, 3×3), which takes E = T + 2 points along an axis.
pub(super) trait Matrices<const T: usize, const E: usize> {
    /// Bᵀ: coefficients of the polynomials that vanish at all points but one.
    unsafe fn input_to_points<L: Lanes>(d: [L; E]) -> [L; E];
    /// G: the kernel's polynomial at the points, divided by what [`input_to_points`](Self::input_to_points) leaves out.
    unsafe fn kernel_to_points<L: Lanes>(g: [L; 3]) -> [L; E];
    /// Aᵀ: powers of the points.
    unsafe fn points_to_output<L: Lanes>(m: [L; E]) -> [L; T];
}

/// F(2×2, 3×3), at the points 0, 1, −1 and ∞.
pub(super) struct Two;

impl Matrices<2, 4> for Two {
    #[inline(always)]
    unsafe fn input_to_points<L: Lanes>(d: [L; 4]) -> [L; 4] {
        // SAFETY: the caller promises the instructions of `L`.
        unsafe {
            let [d0, d1, d2, d3] = d;
            [d0.sub(d2), d1.add(d2), d2.sub(d1), d3.sub(d1)]
        }
    }

    #[inline(always)]
    unsafe fn kernel_to_points<L: Lanes>(g: [L; 3]) -> [L; 4] {
        // SAFETY: the caller promises the instructions of `L`.
        unsafe {
            let [g0, g1, g2] = g;
            let half = L::splat(0.5);
            let (even, odd) = (half.mul(g0.add(g2)), half.mul(g1));
            [g0, even.add(odd), even.sub(odd), g2]
        }
    }

    #[inline(always)]
    unsafe fn points_to_output<L: Lanes>(m: [L; 4]) -> [L; 2] {
        // SAFETY: the caller promises the instructions of `L`.
        unsafe {
            let [m0, m1, m2, m3] = m;
            [m0.add(m1).add(m2), m1.sub(m2).add(m3)]
        }
    }
}

/// F(4×4, 3×3), at the points 0, ±p, ±q and ∞.
pub(super) struct Four;

const P: f32 = 0.625;
const Q: f32 = 1.5;
const P2: f32 = P * P;
const Q2: f32 = Q * Q;
/// Derivatives of x(x² − p²)(x² − q²) at 0, ±p and ±q: what Lagrange's polynomials are divided by.
const AT_0: f32 = P2 * Q2;
const AT_P: f32 = 2.0 * P2 * (P2 - Q2);
const AT_Q: f32 = 2.0 * Q2 * (Q2 - P2);

impl Matrices<TILE, EDGE> for Four {
    #[inline(always)]
    unsafe fn input_to_points<L: Lanes>(d: [L; EDGE]) -> [L; EDGE] {
        // SAFETY: the caller promises the instructions of `L`.
        unsafe {
            let [d0, d1, d2, d3, d4, d5] = d;
            let (p2, q2, sum) = (L::splat(-P2), L::splat(-Q2), L::splat(-(P2 + Q2)));
            let (p, q, product) = (L::splat(P), L::splat(Q), L::splat(P2 * Q2));
            let (even_p, odd_p) = (q2.mul_add(d2, d4), p.mul(q2.mul_add(d1, d3)));
            let (even_q, odd_q) = (p2.mul_add(d2, d4), q.mul(p2.mul_add(d1, d3)));
            [
                product.mul_add(d0, sum.mul_add(d2, d4)),
                even_p.add(odd_p),
                even_p.sub(odd_p),
                even_q.add(odd_q),
                even_q.sub(odd_q),
                product.mul_add(d1, sum.mul_add(d3, d5)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn kernel_to_points<L: Lanes>(g: [L; 3]) -> [L; EDGE] {
        // SAFETY: the caller promises the instructions of `L`.
        unsafe {
            let [g0, g1, g2] = g;
            let even_p = L::splat(1.0 / AT_P).mul(L::splat(P2).mul_add(g2, g0));
            let even_q = L::splat(1.0 / AT_Q).mul(L::splat(Q2).mul_add(g2, g0));
            let (odd_p, odd_q) = (L::splat(P / AT_P).mul(g1), L::splat(Q / AT_Q).mul(g1));
            [
                L::splat(1.0 / AT_0).mul(g0),
                even_p.add(odd_p),
                even_p.sub(odd_p),
                even_q.add(odd_q),
                even_q.sub(odd_q),
                g2,
            ]
        }
    }

    #[inline(always)]
    unsafe fn points_to_output<L: Lanes>(m: [L; EDGE]) -> [L; TILE] {
        // SAFETY: the caller promises the instructions of `L`.
        unsafe {
            let [m0, m1, m2, m3, m4, m5] = m;
            let (even_p, odd_p) = (m1.add(m2), m1.sub(m2));
            let (even_q, odd_q) = (m3.add(m4), m3.sub(m4));
            [
                m0.add(even_p).add(even_q),
                L::splat(P).mul_add(odd_p, L::splat(Q).mul(odd_q)),
                L::splat(P2).mul_add(even_p, L::splat(Q2).mul(even_q)),
                L::splat(P2 * P).mul_add(odd_p, L::splat(Q2 * Q).mul_add(odd_q, m5)),
            ]
        }
    }
}

/// Gᵀ of F(4×4, 3×3).
#[inline(always)]
pub(super) unsafe fn points_to_kernel<L: Lanes>(s: [L; EDGE]) -> [L; 3] {
    // SAFETY: the caller promises the instructions of `L`.
    unsafe {
        let [s0, s1, s2, s3, s4, s5] = s;
        let (even_p, odd_p) = (s1.add(s2), s1.sub(s2));
        let (even_q, odd_q) = (s3.add(s4), s3.sub(s4));
        let scaled_p = L::splat(1.0 / AT_P).mul(even_p);
        [
            L::splat(1.0 / AT_0).mul_add(s0, L::splat(1.0 / AT_Q).mul_add(even_q, scaled_p)),
            L::splat(P / AT_P).mul_add(odd_p, L::splat(Q / AT_Q).mul(odd_q)),
            L::splat(P2 / AT_P).mul_add(even_p, L::splat(Q2 / AT_Q).mul_add(even_q, s5)),
        ]
    }
}

/// A of F(4×4, 3×3).
#[inline(always)]
pub(super) unsafe fn output_to_points<L: Lanes>(y: [L; TILE]) -> [L; EDGE] {
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
            y0,
            even_p.add(odd_p),
            even_p.sub(odd_p),
            even_q.add(odd_q),
            even_q.sub(odd_q),
            y3,
        ]
    }
}
