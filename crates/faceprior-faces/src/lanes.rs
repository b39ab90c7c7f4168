//! Sixteen floats at a time, on whatever vector registers the machine has.
//!
//! The kernels of this crate are written once over [`Lanes`] and compiled for AVX-512, for AVX2 with FMA and for the
//! build's own target; [`Isa::detect`] picks at run time. Both x86 paths round the same way, so their results are
//! equal bit for bit; the portable path rounds after each product where the target has no fused multiply-add.

/// Sixteen floats on their own cache line.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C, align(64))]
pub(crate) struct Block(pub(crate) [f32; 16]);

/// The floats of `blocks`, in order.
pub(crate) fn floats(blocks: &[Block]) -> &[f32] {
    // SAFETY: Block is 16 floats, 64 bytes long, so that an array of them has no padding.
    unsafe { std::slice::from_raw_parts(blocks.as_ptr().cast(), blocks.len() * 16) }
}

/// The vector instructions that a kernel is run with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Isa {
    /// One 512-bit register.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// Two 256-bit registers.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// What the compiler makes of an array of sixteen.
    Portable,
}

impl Isa {
    /// The widest that this machine can run.
    pub(crate) fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if std::arch::is_x86_feature_detected!("avx512f") {
                return Isa::Avx512;
            }
            if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
                return Isa::Avx2;
            }
        }
        Isa::Portable
    }

    /// Every one that this machine can run, the widest first.
    #[cfg(test)]
    pub(crate) fn available() -> Vec<Self> {
        let widest = Self::detect();
        #[cfg(target_arch = "x86_64")]
        {
            let all = [Isa::Avx512, Isa::Avx2, Isa::Portable];
            let first = all.iter().position(|&isa| isa == widest).unwrap_or(2);
            all[first..].to_vec()
        }
        #[cfg(not(target_arch = "x86_64"))]
        vec![widest]
    }
}

/// Sixteen floats in registers.
///
/// # Safety
/// The methods of an implementation may be called only on a machine that has its instructions, and from a function
/// compiled for them (through `#[inline(always)]`), or else they are slow.
pub(crate) trait Lanes: Copy {
    /// Sums that a kernel can hold in registers beside its operands.
    const ACCUMULATORS: usize;

    /// All sixteen equal to the one that is read.
    unsafe fn splat(from: *const f32) -> Self;
    /// Reads sixteen floats.
    unsafe fn load(from: *const Block) -> Self;
    /// Writes sixteen floats.
    unsafe fn store(self, to: &mut Block);
    /// self + a·b.
    unsafe fn plus_product(self, a: Self, b: Self) -> Self;
    /// max(self, 0) + slope·min(self, 0).
    unsafe fn prelu(self, slope: Self) -> Self;
    /// The larger of each two.
    unsafe fn max(self, other: Self) -> Self;
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Block, Lanes};

    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(__m512);

    impl Lanes for Avx512 {
        const ACCUMULATORS: usize = 24;

        #[inline(always)]
        unsafe fn splat(from: *const f32) -> Self {
            // SAFETY: the caller has the instructions, and pointers that can be read; so for every method below.
            Self(unsafe { _mm512_set1_ps(from.read_unaligned()) })
        }

        #[inline(always)]
        unsafe fn load(from: *const Block) -> Self {
            // SAFETY: as above; a Block is 64 bytes, 64-byte aligned.
            Self(unsafe { _mm512_load_ps(from.cast()) })
        }

        #[inline(always)]
        unsafe fn store(self, to: &mut Block) {
            // SAFETY: as above.
            unsafe { _mm512_store_ps(to.0.as_mut_ptr(), self.0) }
        }

        #[inline(always)]
        unsafe fn plus_product(self, a: Self, b: Self) -> Self {
            // SAFETY: as above.
            Self(unsafe { _mm512_fmadd_ps(a.0, b.0, self.0) })
        }

        #[inline(always)]
        unsafe fn prelu(self, slope: Self) -> Self {
            // SAFETY: as above.
            unsafe {
                let zero = _mm512_setzero_ps();
                let (above, below) = (_mm512_max_ps(self.0, zero), _mm512_min_ps(self.0, zero));
                Self(_mm512_fmadd_ps(slope.0, below, above))
            }
        }

        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            // SAFETY: as above.
            Self(unsafe { _mm512_max_ps(self.0, other.0) })
        }
    }

    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(__m256, __m256);

    impl Lanes for Avx2 {
        const ACCUMULATORS: usize = 6;

        #[inline(always)]
        unsafe fn splat(from: *const f32) -> Self {
            // SAFETY: as above.
            let value = unsafe { _mm256_set1_ps(from.read_unaligned()) };
            Self(value, value)
        }

        #[inline(always)]
        unsafe fn load(from: *const Block) -> Self {
            let from: *const f32 = from.cast();
            // SAFETY: as above.
            unsafe { Self(_mm256_load_ps(from), _mm256_load_ps(from.wrapping_add(8))) }
        }

        #[inline(always)]
        unsafe fn store(self, to: &mut Block) {
            // SAFETY: as above.
            unsafe {
                _mm256_store_ps(to.0.as_mut_ptr(), self.0);
                _mm256_store_ps(to.0.as_mut_ptr().add(8), self.1);
            }
        }

        #[inline(always)]
        unsafe fn plus_product(self, a: Self, b: Self) -> Self {
            // SAFETY: as above.
            unsafe {
                Self(
                    _mm256_fmadd_ps(a.0, b.0, self.0),
                    _mm256_fmadd_ps(a.1, b.1, self.1),
                )
            }
        }

        #[inline(always)]
        unsafe fn prelu(self, slope: Self) -> Self {
            // SAFETY: as above.
            unsafe {
                let zero = _mm256_setzero_ps();
                let half = |x, slope| {
                    let (above, below) = (_mm256_max_ps(x, zero), _mm256_min_ps(x, zero));
                    _mm256_fmadd_ps(slope, below, above)
                };
                Self(half(self.0, slope.0), half(self.1, slope.1))
            }
        }

        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            // SAFETY: as above.
            unsafe { Self(_mm256_max_ps(self.0, other.0), _mm256_max_ps(self.1, other.1)) }
        }
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; 16]);

impl Lanes for Portable {
    const ACCUMULATORS: usize = 3;

    #[inline(always)]
    unsafe fn splat(from: *const f32) -> Self {
        // SAFETY: by the contract.
        Self([unsafe { from.read_unaligned() }; 16])
    }

    #[inline(always)]
    unsafe fn load(from: *const Block) -> Self {
        // SAFETY: by the contract.
        Self(unsafe { from.read() }.0)
    }

    #[inline(always)]
    unsafe fn store(self, to: &mut Block) {
        to.0 = self.0;
    }

    #[inline(always)]
    unsafe fn plus_product(self, a: Self, b: Self) -> Self {
        // A fused product where the target has one in hardware: elsewhere it would be a call into the C library.
        let fused = cfg!(any(target_arch = "aarch64", target_feature = "fma"));
        let one = |i: usize| {
            if fused {
                a.0[i].mul_add(b.0[i], self.0[i])
            } else {
                self.0[i] + a.0[i] * b.0[i]
            }
        };
        Self(std::array::from_fn(one))
    }

    #[inline(always)]
    unsafe fn prelu(self, slope: Self) -> Self {
        Self(std::array::from_fn(|i| {
            if self.0[i] > 0.0 {
                self.0[i]
            } else {
                slope.0[i] * self.0[i]
            }
        }))
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| {
            if self.0[i] > other.0[i] {
                self.0[i]
            } else {
                other.0[i]
            }
        }))
    }
}
