//! Sixteen floats at a time on the instruction set at hand.

use std::sync::OnceLock;

/// How many bfloat16 stand for a float on the matrix unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    not(target_arch = "x86_64"),
    expect(
        dead_code,
        reason = "processors without the unit never name a number of parts"
    )
)]
pub(crate) enum Parts {
    /// 17 of its 24 bits, and half as many products: see `amx.rs`.
    Two,
    /// All of its bits.
    Three,
}

impl Parts {
    pub(crate) const fn count(self) -> usize {
        match self {
            Self::Two => 2,
            Self::Three => 3,
        }
    }
}

/// An instruction set that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Isa {
    /// AVX-512F, and products on the matrix unit AMX, of factors in so many parts.
    #[cfg(target_arch = "x86_64")]
    Amx(Parts),
    /// AVX-512F: one register holds sixteen floats.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX2 with FMA: two registers hold sixteen floats.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// Whatever the compiler makes of arrays of sixteen floats for the target.
    Portable,
}

impl Isa {
    /// The best instruction set of this processor, or the one that `FACEPRIOR_ISA` names.
    ///
    /// # Panics
    /// Where [`chosen`](Self::chosen) is an error: nothing is computed on another set than the one asked for.
    pub(crate) fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::chosen().unwrap_or_else(|problem| panic!("{problem}")))
    }

    /// What [`best`](Self::best) is.
    ///
    /// # Errors
    /// `FACEPRIOR_ISA` names no instruction set, or one that this processor lacks.
    pub(crate) fn chosen() -> Result<Self, String> {
        match std::env::var_os("FACEPRIOR_ISA") {
            Some(name) => Self::named(&name.to_string_lossy()),
            None => Ok(Self::available()[0]),
        }
    }

    fn named(name: &str) -> Result<Self, String> {
        let sets = Self::available();
        sets.iter()
            .copied()
            .find(|set| set.name() == name)
            .ok_or_else(|| {
                let names: Vec<&str> = sets.iter().map(|set| set.name()).collect();
                format!(
                    "FACEPRIOR_ISA is {name:?}, expected one that this processor has: {}\n\
                 hint: leave it unset for the best of them",
                    names.join(", ")
                )
            })
    }

    /// The name that `FACEPRIOR_ISA` knows it by.
    pub(crate) fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx(_) => "amx",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }

    /// Every instruction set of this processor, best first.
    pub(crate) fn available() -> Vec<Self> {
        let mut sets = Vec::new();
        #[cfg(target_arch = "x86_64")]
        if super::amx::available() {
            sets.push(Self::Amx(Parts::Three));
        }
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                sets.push(Self::Avx512);
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                sets.push(Self::Avx2);
            }
        }
        sets.push(Self::Portable);
        sets
    }

    /// Blocks of sixteen columns that one task multiplies by: enough that the left operand, read once for each register
    /// tile, comes from far away only once; more where it is packed first.
    pub(crate) fn group_blocks(self) -> usize {
        if self.matrices().is_some() { 16 } else { 4 }
    }

    /// Where products of matrices go to a unit of their own, the parts of their factors.
    pub(crate) fn matrices(self) -> Option<Parts> {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx(parts) => Some(parts),
            _ => None,
        }
    }

    /// The same for convolutions of maps that will be rounded to bfloat16: what two parts leave out of a float is far less
    /// than that.
    pub(crate) fn for_rounded(self) -> Self {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx(_) => Self::Amx(Parts::Two),
            other => other,
        }
    }

    /// Runs a kernel compiled for this instruction set.
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            // SAFETY: values of `Isa` other than `Portable` come from `available`, which asks the processor.
            #[cfg(target_arch = "x86_64")]
            Self::Amx(_) | Self::Avx512 => unsafe { x86::run_avx512(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { x86::run_avx2(kernel) },
            // SAFETY: portable lanes need no particular instructions.
            Self::Portable => unsafe { kernel.run::<Portable>() },
        }
    }
}

/// A piece of work that is compiled once for each instruction set.
pub(crate) trait Kernel {
    /// What the work returns.
    type Output;

    /// Does the work. Implementations are `#[inline(always)]`, so that they are compiled with the features of the
    /// function that calls them. They loop where elsewhere one would map: a closure is a function of its own, compiled
    /// without those features, and is not always inlined.
    ///
    /// # Safety
    /// The processor must have the instructions of `L`.
    unsafe fn run<L: Lanes>(self) -> Self::Output;
}

/// Sixteen floats.
///
/// # Safety
/// Every function requires a processor with the instructions of the type: call them from [`Kernel::run`] only.
/// `load` and `store` require an address valid for sixteen floats, aligned as one float is.
pub(crate) trait Lanes: Copy {
    /// Blocks of sixteen columns in a register tile, as many as the registers hold beside six rows.
    const TILE_BLOCKS: usize;
    /// Rows of a register tile of one block: as many sums as the registers hold, and no more than keep two multipliers
    /// busy that answer after four cycles.
    const TILE_ROWS: usize;

    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// [`store`](Self::store) past the caches, to an address aligned to 64 bytes. Other threads may see it late, but for
    /// [`fence`](Self::fence).
    #[inline(always)]
    unsafe fn stream(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { self.store(to) }
    }
    /// Puts what was [streamed](Self::stream) before it ahead of every later store.
    #[inline(always)]
    unsafe fn fence() {}
    unsafe fn splat(value: f32) -> Self;
    /// The float at an address, sixteen times. In debug builds `splat(*from)` would check the address each time.
    unsafe fn broadcast(from: *const f32) -> Self;
    /// Asks for the cache line of an address, which need not be valid, in the second-level cache.
    #[inline(always)]
    unsafe fn prefetch(_: *const f32) {}
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn div(self, other: Self) -> Self;
    unsafe fn sqrt(self) -> Self;
    /// `self · factor + term`.
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self;
    unsafe fn max(self, other: Self) -> Self;
    unsafe fn min(self, other: Self) -> Self;
    /// `above` where `self > bound`, `otherwise` elsewhere.
    unsafe fn select_greater(self, bound: Self, above: Self, otherwise: Self) -> Self;

    /// Runs a kernel from within another as a function of its own, so that what many share is compiled once.
    unsafe fn call<K: Kernel>(kernel: K) -> K::Output;

    /// The transpose of a square of sixteen by sixteen floats: row `r` of the result is column `r` of the argument.
    unsafe fn transpose(rows: [Self; 16]) -> [Self; 16];

    /// Sixteen zeros.
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller's promise.
        unsafe { Self::splat(0.0) }
    }
}

/// Lanes as an array, for processors without a path of their own.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; 16]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|lane| f(self.0[lane], other.0[lane])))
    }
}

impl Lanes for Portable {
    const TILE_BLOCKS: usize = 1;
    // Four registers to a sum: x86-64 without extensions has sixteen, other processors have 32.
    const TILE_ROWS: usize = if cfg!(target_arch = "x86_64") { 3 } else { 6 };

    #[inline(never)]
    unsafe fn call<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: the caller's promise.
        unsafe { kernel.run::<Self>() }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller promises sixteen floats.
        Self(unsafe { *from.cast::<[f32; 16]>() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller promises sixteen floats.
        unsafe { *to.cast::<[f32; 16]>() = self.0 }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; 16])
    }

    #[inline(always)]
    unsafe fn broadcast(from: *const f32) -> Self {
        // SAFETY: the caller promises a float.
        Self([unsafe { *from }; 16])
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }

    #[inline(always)]
    unsafe fn sqrt(self) -> Self {
        Self(self.0.map(f32::sqrt))
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
        // Without the instruction, `f32::mul_add` is a call into the C library.
        const FUSED: bool = cfg!(any(target_feature = "fma", target_arch = "aarch64"));
        Self(std::array::from_fn(|lane| {
            let (a, b, c) = (self.0[lane], factor.0[lane], term.0[lane]);
            if FUSED { a.mul_add(b, c) } else { a * b + c }
        }))
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    unsafe fn select_greater(self, bound: Self, above: Self, otherwise: Self) -> Self {
        Self(std::array::from_fn(|lane| {
            if self.0[lane] > bound.0[lane] {
                above.0[lane]
            } else {
                otherwise.0[lane]
            }
        }))
    }

    #[inline(always)]
    unsafe fn transpose(rows: [Self; 16]) -> [Self; 16] {
        let mut columns = rows;
        for (row, Self(values)) in rows.iter().enumerate() {
            for (column, value) in values.iter().enumerate() {
                columns[column].0[row] = *value;
            }
        }
        columns
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::Avx512;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Kernel, Lanes};

    /// # Safety
    /// The processor must have AVX-512F.
    #[target_feature(enable = "avx512f")]
    #[inline(never)]
    pub(super) unsafe fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: the caller's promise.
        unsafe { kernel.run::<Avx512>() }
    }

    /// # Safety
    /// The processor must have AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    #[inline(never)]
    pub(super) unsafe fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: the caller's promise.
        unsafe { kernel.run::<Avx2>() }
    }

    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(pub(crate) __m512);

    #[derive(Clone, Copy)]
    pub(super) struct Avx2(__m256, __m256);

    /// A mask of all lanes. Masked loads and stores with a constant mask compile to plain ones; the functions of plain
    /// ones contain checks of their address that debug builds run each time, at twice the cost of an inner loop.
    const ALL: __mmask16 = !0;

    // SAFETY of all blocks below: the trait demands of its callers the instructions and valid addresses.

    impl Lanes for Avx512 {
        const TILE_BLOCKS: usize = 4;
        const TILE_ROWS: usize = 8;

        #[inline(always)]
        unsafe fn call<K: Kernel>(kernel: K) -> K::Output {
            unsafe { run_avx512(kernel) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { Self(_mm512_maskz_loadu_ps(ALL, from)) }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm512_mask_storeu_ps(to, ALL, self.0) }
        }

        #[inline(always)]
        unsafe fn stream(self, to: *mut f32) {
            unsafe { _mm512_stream_ps(to, self.0) }
        }

        #[inline(always)]
        unsafe fn fence() {
            unsafe { _mm_sfence() }
        }

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { Self(_mm512_set1_ps(value)) }
        }

        #[inline(always)]
        unsafe fn broadcast(from: *const f32) -> Self {
            unsafe { Self(_mm512_broadcastss_ps(_mm_load_ss(from))) }
        }

        #[inline(always)]
        unsafe fn prefetch(from: *const f32) {
            unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) }
        }

        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            unsafe { Self(_mm512_add_ps(self.0, other.0)) }
        }

        #[inline(always)]
        unsafe fn sub(self, other: Self) -> Self {
            unsafe { Self(_mm512_sub_ps(self.0, other.0)) }
        }

        #[inline(always)]
        unsafe fn mul(self, other: Self) -> Self {
            unsafe { Self(_mm512_mul_ps(self.0, other.0)) }
        }

        #[inline(always)]
        unsafe fn div(self, other: Self) -> Self {
            unsafe { Self(_mm512_div_ps(self.0, other.0)) }
        }

        #[inline(always)]
        unsafe fn sqrt(self) -> Self {
            unsafe { Self(_mm512_sqrt_ps(self.0)) }
        }

        #[inline(always)]
        unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
            unsafe { Self(_mm512_fmadd_ps(self.0, factor.0, term.0)) }
        }

        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            unsafe { Self(_mm512_max_ps(self.0, other.0)) }
        }

        #[inline(always)]
        unsafe fn min(self, other: Self) -> Self {
            unsafe { Self(_mm512_min_ps(self.0, other.0)) }
        }

        #[inline(always)]
        unsafe fn select_greater(self, bound: Self, above: Self, otherwise: Self) -> Self {
            unsafe {
                let mask = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(self.0, bound.0);
                Self(_mm512_mask_blend_ps(mask, otherwise.0, above.0))
            }
        }

        #[inline(always)]
        unsafe fn transpose(rows: [Self; 16]) -> [Self; 16] {
            unsafe {
                // Within groups of four rows: element 4·l + k of each row comes to lane l of register k.
                let mut quads = rows;
                for group in 0..4 {
                    let [Self(a), Self(b), Self(c), Self(d)] = [
                        rows[4 * group],
                        rows[4 * group + 1],
                        rows[4 * group + 2],
                        rows[4 * group + 3],
                    ];
                    let pairs = [
                        (_mm512_unpacklo_ps(a, b), _mm512_unpacklo_ps(c, d)),
                        (_mm512_unpackhi_ps(a, b), _mm512_unpackhi_ps(c, d)),
                    ];
                    for (half, (ab, cd)) in pairs.into_iter().enumerate() {
                        let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
                        let first = 4 * group + 2 * half;
                        quads[first] = Self(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)));
                        quads[first + 1] = Self(_mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
                    }
                }
                // Between groups: lane l of register k of all groups makes row 4·l + k.
                let mut columns = rows;
                for k in 0..4 {
                    let [a, b, c, d] = [quads[k].0, quads[4 + k].0, quads[8 + k].0, quads[12 + k].0];
                    let (even_ab, even_cd) = (
                        _mm512_shuffle_f32x4::<0x88>(a, b),
                        _mm512_shuffle_f32x4::<0x88>(c, d),
                    );
                    let (odd_ab, odd_cd) = (
                        _mm512_shuffle_f32x4::<0xdd>(a, b),
                        _mm512_shuffle_f32x4::<0xdd>(c, d),
                    );
                    columns[k] = Self(_mm512_shuffle_f32x4::<0x88>(even_ab, even_cd));
                    columns[4 + k] = Self(_mm512_shuffle_f32x4::<0x88>(odd_ab, odd_cd));
                    columns[8 + k] = Self(_mm512_shuffle_f32x4::<0xdd>(even_ab, even_cd));
                    columns[12 + k] = Self(_mm512_shuffle_f32x4::<0xdd>(odd_ab, odd_cd));
                }
                columns
            }
        }
    }

    impl Lanes for Avx2 {
        const TILE_BLOCKS: usize = 1;
        const TILE_ROWS: usize = 6;

        #[inline(always)]
        unsafe fn call<K: Kernel>(kernel: K) -> K::Output {
            unsafe { run_avx2(kernel) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe {
                let all = _mm256_set1_epi32(-1);
                Self(
                    _mm256_maskload_ps(from, all),
                    _mm256_maskload_ps(from.wrapping_add(8), all),
                )
            }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe {
                let all = _mm256_set1_epi32(-1);
                _mm256_maskstore_ps(to, all, self.0);
                _mm256_maskstore_ps(to.wrapping_add(8), all, self.1);
            }
        }

        #[inline(always)]
        unsafe fn stream(self, to: *mut f32) {
            unsafe {
                _mm256_stream_ps(to, self.0);
                _mm256_stream_ps(to.wrapping_add(8), self.1);
            }
        }

        #[inline(always)]
        unsafe fn fence() {
            unsafe { _mm_sfence() }
        }

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { Self(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
        }

        #[inline(always)]
        unsafe fn broadcast(from: *const f32) -> Self {
            unsafe {
                let value = _mm256_broadcastss_ps(_mm_load_ss(from));
                Self(value, value)
            }
        }

        #[inline(always)]
        unsafe fn prefetch(from: *const f32) {
            unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) }
        }

        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            unsafe { Self(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)) }
        }

        #[inline(always)]
        unsafe fn sub(self, other: Self) -> Self {
            unsafe { Self(_mm256_sub_ps(self.0, other.0), _mm256_sub_ps(self.1, other.1)) }
        }

        #[inline(always)]
        unsafe fn mul(self, other: Self) -> Self {
            unsafe { Self(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1)) }
        }

        #[inline(always)]
        unsafe fn div(self, other: Self) -> Self {
            unsafe { Self(_mm256_div_ps(self.0, other.0), _mm256_div_ps(self.1, other.1)) }
        }

        #[inline(always)]
        unsafe fn sqrt(self) -> Self {
            unsafe { Self(_mm256_sqrt_ps(self.0), _mm256_sqrt_ps(self.1)) }
        }

        #[inline(always)]
        unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
            unsafe {
                Self(
                    _mm256_fmadd_ps(self.0, factor.0, term.0),
                    _mm256_fmadd_ps(self.1, factor.1, term.1),
                )
            }
        }

        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            unsafe { Self(_mm256_max_ps(self.0, other.0), _mm256_max_ps(self.1, other.1)) }
        }

        #[inline(always)]
        unsafe fn min(self, other: Self) -> Self {
            unsafe { Self(_mm256_min_ps(self.0, other.0), _mm256_min_ps(self.1, other.1)) }
        }

        #[inline(always)]
        unsafe fn select_greater(self, bound: Self, above: Self, otherwise: Self) -> Self {
            unsafe {
                let low = _mm256_cmp_ps::<_CMP_GT_OQ>(self.0, bound.0);
                let high = _mm256_cmp_ps::<_CMP_GT_OQ>(self.1, bound.1);
                Self(
                    _mm256_blendv_ps(otherwise.0, above.0, low),
                    _mm256_blendv_ps(otherwise.1, above.1, high),
                )
            }
        }

        #[inline(always)]
        unsafe fn transpose(rows: [Self; 16]) -> [Self; 16] {
            unsafe {
                // Four squares of eight by eight.
                let mut columns = rows;
                for half in 0..2 {
                    let mut low = [rows[0].0; 8];
                    let mut high = low;
                    for row in 0..8 {
                        (low[row], high[row]) = (rows[8 * half + row].0, rows[8 * half + row].1);
                    }
                    let (low, high) = (transpose8(low), transpose8(high));
                    for column in 0..8 {
                        if half == 0 {
                            (columns[column].0, columns[8 + column].0) = (low[column], high[column]);
                        } else {
                            (columns[column].1, columns[8 + column].1) = (low[column], high[column]);
                        }
                    }
                }
                columns
            }
        }
    }

    #[inline(always)]
    unsafe fn transpose8(rows: [__m256; 8]) -> [__m256; 8] {
        unsafe {
            let mut quads = rows;
            for group in 0..2 {
                let [a, b, c, d] = [
                    rows[4 * group],
                    rows[4 * group + 1],
                    rows[4 * group + 2],
                    rows[4 * group + 3],
                ];
                let pairs = [
                    (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d)),
                    (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d)),
                ];
                for (half, (ab, cd)) in pairs.into_iter().enumerate() {
                    let (ab, cd) = (_mm256_castps_pd(ab), _mm256_castps_pd(cd));
                    let first = 4 * group + 2 * half;
                    quads[first] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd));
                    quads[first + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
                }
            }
            let mut columns = rows;
            for k in 0..4 {
                columns[k] = _mm256_permute2f128_ps::<0x20>(quads[k], quads[4 + k]);
                columns[4 + k] = _mm256_permute2f128_ps::<0x31>(quads[k], quads[4 + k]);
            }
            columns
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Transpose([[f32; 16]; 16]);

    impl Kernel for Transpose {
        type Output = [[f32; 16]; 16];

        #[inline(always)]
        unsafe fn run<L: Lanes>(self) -> [[f32; 16]; 16] {
            // SAFETY: arrays of sixteen floats.
            unsafe {
                let rows = self.0.map(|row| L::load(row.as_ptr()));
                L::transpose(rows).map(|column| {
                    let mut values = [0.0; 16];
                    column.store(values.as_mut_ptr());
                    values
                })
            }
        }
    }

    #[test]
    fn instruction_sets_go_by_their_names_only() {
        for isa in Isa::available() {
            assert_eq!(Isa::named(isa.name()), Ok(isa));
        }
        for name in ["", "AVX2", "sse2"] {
            let error = Isa::named(name).unwrap_err();
            assert!(
                error.contains(&format!("{name:?}")) && error.contains("portable"),
                "{error}"
            );
        }
    }

    #[test]
    fn transposes_on_every_instruction_set() {
        let square = std::array::from_fn(|row| std::array::from_fn(|column| (row * 16 + column) as f32));
        let expected = std::array::from_fn(|row| std::array::from_fn(|column| (column * 16 + row) as f32));
        for isa in Isa::available() {
            assert_eq!(isa.run(Transpose(square)), expected, "{isa:?}");
        }
    }
}
