//! Bilinear resampling with antialiasing, bit for bit as Pillow does it for 8-bit pictures.
//!
//! Pillow (`src/libImaging/Resample.c`) filters horizontally, rounds to 8 bits, then filters vertically, with
//! weights in 22-bit fixed point. Downscaling widens the triangle filter by the scale, so that every source pixel
//! counts. Pillow 13 began to filter vertically first where the height shrinks more than the width, which changes
//! last bits there; the systems that recognisers are compared with are older, so this is the order of Pillow 3 to 12.
//!
//! `fast_image_resize` chooses its weights' precision per picture (at most 16 bits), so its results differ from
//! Pillow's in the last bit; recognisers are compared to hundredths of a percent, hence this one.

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

use crate::Image;

/// Bits behind the point of a weight: 32 less 8 of the pixel and 2 of headroom.
const PRECISION: u32 = 32 - 8 - 2;
const HALF: i32 = 1 << (PRECISION - 1);

/// A rectangle of the resized picture: `x`, `y`, `width`, `height`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    pub(crate) x: usize,
    pub(crate) y: usize,
    pub(crate) width: usize,
    pub(crate) height: usize,
}

/// Resizes `source` to `width` x `height` and returns the part `window` of the result, without computing the rest.
pub(crate) fn bilinear(source: &Image, width: usize, height: usize, window: Window) -> Image {
    assert!(
        width > 0 && height > 0,
        "a picture is resized to at least 1x1, got {width}x{height}"
    );
    assert!(
        window.x + window.width <= width && window.y + window.height <= height,
        "{window:?} lies outside {width}x{height}"
    );
    let columns = Filter::of(Axis::X, source.width(), width);
    let rows = Filter::of(Axis::Y, source.height(), height);
    let (window_x, window_y) = (
        window.x..window.x + window.width,
        window.y..window.y + window.height,
    );

    // An axis that keeps its length is not filtered, as in Pillow.
    let (first_row, used_rows) = if height == source.height() {
        (window.y, window.height)
    } else {
        let first = rows.starts[window_y.start];
        (first, rows.end(window_y.end - 1) - first)
    };
    let stride = source.width() * 3;
    let source_rows = &source.pixels()[first_row * stride..(first_row + used_rows) * stride];

    let mut narrow = vec![0u8; used_rows * window.width * 3];
    if width == source.width() {
        for (from, to) in source_rows
            .chunks_exact(stride)
            .zip(narrow.chunks_exact_mut(window.width * 3))
        {
            to.copy_from_slice(&from[window.x * 3..(window.x + window.width) * 3]);
        }
    } else {
        filter_rows(source_rows, stride, &columns, window_x, &mut narrow);
    }
    if height == source.height() {
        return Image::new(window.width, window.height, narrow);
    }
    let mut pixels = vec![0u8; window.width * window.height * 3];
    filter_columns(&narrow, window.width * 3, first_row, &rows, window_y, &mut pixels);
    Image::new(window.width, window.height, pixels)
}

#[derive(Clone, Copy)]
enum Axis {
    X,
    Y,
}

/// The weights of one axis: output `i` is the sum of source pixels from `starts[i]` on.
struct Filter {
    input: usize,
    output: usize,
    starts: Vec<usize>,
    counts: Vec<usize>,
    /// `taps` weights an output; those behind `counts[i]` are 0.
    weights: Vec<i32>,
    /// The largest of `counts`, filled up to whole groups of four.
    taps: usize,
}

impl Filter {
    /// The filter from `input` to `output` pixels. A thread keeps its last one of each axis: pictures of one set have
    /// one size, mostly.
    fn of(axis: Axis, input: usize, output: usize) -> Rc<Filter> {
        thread_local! {
            static LAST: RefCell<[Option<Rc<Filter>>; 2]> = const { RefCell::new([None, None]) };
        }
        LAST.with_borrow_mut(|last| match &mut last[axis as usize] {
            Some(filter) if (filter.input, filter.output) == (input, output) => filter.clone(),
            slot => slot.insert(Rc::new(Filter::new(input, output))).clone(),
        })
    }

    /// `precompute_coeffs` and `normalize_coeffs_8bpc`, in the same double precision and the same order.
    fn new(input: usize, output: usize) -> Filter {
        let scale = input as f64 / output as f64;
        let support = scale.max(1.0);
        let inverse = 1.0 / support;
        let center = |i: usize| (i as f64 + 0.5) * scale;
        let (starts, counts): (Vec<_>, Vec<_>) = (0..output)
            .map(|i| {
                let start = (center(i) - support + 0.5).max(0.0) as usize;
                let end = ((center(i) + support + 0.5) as usize).min(input);
                (start, end - start)
            })
            .unzip();
        let taps = counts.iter().max().map_or(0, |count| count.next_multiple_of(4));
        let mut weights = vec![0; output * taps];
        let mut exact = vec![0f64; taps];
        for (i, weights) in weights.chunks_exact_mut(taps).enumerate() {
            let exact = &mut exact[..counts[i]];
            let mut total = 0.0;
            for (tap, weight) in exact.iter_mut().enumerate() {
                let distance = (((tap + starts[i]) as f64 - center(i) + 0.5) * inverse).abs();
                *weight = if distance < 1.0 { 1.0 - distance } else { 0.0 };
                total += *weight;
            }
            for (weight, exact) in weights.iter_mut().zip(exact) {
                let normalised = if total != 0.0 { *exact / total } else { *exact };
                *weight = (0.5 + normalised * f64::from(1 << PRECISION)) as i32;
            }
        }
        Filter {
            input,
            output,
            starts,
            counts,
            weights,
            taps,
        }
    }

    fn end(&self, i: usize) -> usize {
        self.starts[i] + self.counts[i]
    }

    fn weights(&self, i: usize) -> &[i32] {
        &self.weights[i * self.taps..][..self.counts[i]]
    }
}

/// Rounds a fixed-point sum to a pixel.
#[inline(always)]
fn to_pixel(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}

/// One tap. Weights are positive and add up to one, so the sum stays below 2^31; overflow checks would only keep the
/// loops from being vectorised.
#[inline(always)]
fn add_product(sum: i32, pixel: i32, weight: i32) -> i32 {
    sum.wrapping_add(pixel.wrapping_mul(weight))
}

/// Horizontal pass: every row of `source` (`stride` bytes) becomes one of `target`, which has the outputs `window`.
fn filter_rows(source: &[u8], stride: usize, filter: &Filter, window: Range<usize>, target: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") && stride >= avx2::LOADED {
        // SAFETY: the machine has AVX2, as just asked; the function itself is safe code.
        return unsafe { avx2::filter_rows(source, stride, filter, window, target) };
    }
    filter_rows_body(source, stride, filter, window, target);
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;
    use std::ops::Range;

    use super::{Filter, HALF, PRECISION};

    /// Bytes that are read at once for four pixels of three.
    pub(super) const LOADED: usize = 16;
    /// Products of 16 bits take a weight in two parts: this many bits, and the rest.
    const LOW: i32 = 15;

    /// Four taps of an output. Pixels are picked and multiplied as two pairs of neighbours, all three channels at once.
    #[derive(Clone, Copy)]
    struct Taps {
        /// The first byte to read.
        at: usize,
        /// Where a pair's bytes lie in what was read: for each channel that of the left pixel and of the right one,
        /// each made 16 bits wide.
        picks: [[u8; 16]; 2],
        /// The lower parts of a pair's weights, and the upper ones.
        low: [i32; 2],
        high: [i32; 2],
    }

    impl Taps {
        /// `at` is at least [`LOADED`] from the row's end, at `stride`.
        fn new(start: usize, weights: [i32; 4], stride: usize) -> Taps {
            // Taps behind the end of the row weigh nothing, wherever they point.
            let at = (start * 3).min(stride - LOADED);
            let pick = |pair: usize| {
                std::array::from_fn(|byte| {
                    let (channel, right) = (byte / 4, byte % 4 / 2);
                    let place = (start + 2 * pair + right) * 3 + channel - at;
                    if byte % 2 == 1 || channel == 3 {
                        0x80
                    } else {
                        (place % LOADED) as u8
                    }
                })
            };
            let [a, b, c, d] = weights;
            let pairs =
                |part: fn(i32) -> i32| [[a, b], [c, d]].map(|[left, right]| part(left) | part(right) << 16);
            Taps {
                at,
                picks: [pick(0), pick(1)],
                low: pairs(|weight| weight & ((1 << LOW) - 1)),
                high: pairs(|weight| weight >> LOW),
            }
        }
    }

    /// Two rows at once, each in a half of the registers, and four outputs, which are then stored as whole pixels.
    #[target_feature(enable = "avx2")]
    pub(super) fn filter_rows(
        source: &[u8],
        stride: usize,
        filter: &Filter,
        window: Range<usize>,
        target: &mut [u8],
    ) {
        let out_stride = window.len() * 3;
        let groups = filter.taps / 4;
        let mut taps = Vec::new();
        for four in window.clone().step_by(4) {
            for group in 0..groups {
                taps.push(std::array::from_fn(|i| {
                    let i = (four + i).min(window.end - 1);
                    let weights = &filter.weights[i * filter.taps..].as_chunks().0;
                    Taps::new(filter.starts[i] + 4 * group, weights[group], stride)
                }));
            }
        }
        let mut spare = vec![0; out_stride];
        for (rows, target) in source.chunks(2 * stride).zip(target.chunks_mut(2 * out_stride)) {
            // A last row without another is its own partner.
            let (first, second) = (&rows[..stride], &rows[rows.len() - stride..]);
            let (upper, lower) = target.split_at_mut(out_stride);
            let lower = if lower.is_empty() { &mut spare } else { lower };
            let out = upper.chunks_mut(12).zip(lower.chunks_mut(12));
            for (taps, (upper, lower)) in taps.chunks_exact(groups).zip(out) {
                let pixels = weighted(first, second, taps);
                store(_mm256_castsi256_si128(pixels), upper);
                store(_mm256_extracti128_si256::<1>(pixels), lower);
            }
        }
    }

    /// Four outputs of two rows, twelve bytes in each half.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn weighted(first: &[u8], second: &[u8], taps: &[[Taps; 4]]) -> __m256i {
        let mut sums = [(_mm256_set1_epi32(HALF), _mm256_setzero_si256()); 4];
        for four in taps {
            for ((low, high), taps) in sums.iter_mut().zip(four) {
                // SAFETY: `at` is so far from the row's end, see [`Taps::new`].
                let load = |row: &[u8]| unsafe { _mm_loadu_si128(row.as_ptr().add(taps.at).cast()) };
                let bytes = _mm256_set_m128i(load(second), load(first));
                for pair in 0..2 {
                    // SAFETY: the bytes to be read are there.
                    let picks = unsafe { _mm_loadu_si128(taps.picks[pair].as_ptr().cast()) };
                    let pixels = _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(picks));
                    let times = |weights| _mm256_madd_epi16(pixels, _mm256_set1_epi32(weights));
                    *low = _mm256_add_epi32(*low, times(taps.low[pair]));
                    *high = _mm256_add_epi32(*high, times(taps.high[pair]));
                }
            }
        }
        let [a, b, c, d] = sums.map(|(low, high)| {
            let sum = _mm256_add_epi32(low, _mm256_slli_epi32::<LOW>(high));
            _mm256_srai_epi32::<{ PRECISION as i32 }>(sum)
        });
        let bytes = _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
        // Of four pixels of four bytes, three each.
        let compress = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
        _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(compress))
    }

    /// The first bytes of `pixels`: twelve, or fewer at the end of a row.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn store(pixels: __m128i, out: &mut [u8]) {
        let (eight, four) = (_mm_cvtsi128_si64(pixels), _mm_extract_epi32::<2>(pixels));
        let (eight, four) = (eight.to_le_bytes(), four.to_le_bytes());
        if let Some(out) = out.first_chunk_mut::<12>() {
            out[..8].copy_from_slice(&eight);
            out[8..].copy_from_slice(&four);
        } else {
            let bytes = eight.into_iter().chain(four);
            out.iter_mut().zip(bytes).for_each(|(out, byte)| *out = byte);
        }
    }
}

/// Vertical pass: `source` holds rows of `stride` bytes from `first_row` on.
fn filter_columns(
    source: &[u8],
    stride: usize,
    first_row: usize,
    filter: &Filter,
    window: Range<usize>,
    target: &mut [u8],
) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn wide(
            source: &[u8],
            stride: usize,
            first_row: usize,
            filter: &Filter,
            window: Range<usize>,
            target: &mut [u8],
        ) {
            filter_columns_body(source, stride, first_row, filter, window, target);
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the machine has AVX2, as just asked; the function itself is safe code.
            return unsafe { wide(source, stride, first_row, filter, window, target) };
        }
    }
    filter_columns_body(source, stride, first_row, filter, window, target);
}

#[inline(always)]
fn filter_rows_body(source: &[u8], stride: usize, filter: &Filter, window: Range<usize>, target: &mut [u8]) {
    // Four lanes for three channels: the fourth reads into the next pixel and is dropped. The last row needs the
    // byte behind its last pixel, so each row is widened to four bytes a pixel once.
    let mut padded = vec![[0i32; 4]; stride / 3];
    for (row, target) in source
        .chunks_exact(stride)
        .zip(target.chunks_exact_mut(window.len() * 3))
    {
        for (pixel, wide) in row.chunks_exact(3).zip(&mut padded) {
            *wide = [i32::from(pixel[0]), i32::from(pixel[1]), i32::from(pixel[2]), 0];
        }
        for (i, out) in window.clone().zip(target.chunks_exact_mut(3)) {
            let mut sum = [HALF; 4];
            for (pixel, &weight) in padded[filter.starts[i]..].iter().zip(filter.weights(i)) {
                for lane in 0..4 {
                    sum[lane] = add_product(sum[lane], pixel[lane], weight);
                }
            }
            out.copy_from_slice(&[to_pixel(sum[0]), to_pixel(sum[1]), to_pixel(sum[2])]);
        }
    }
}

#[inline(always)]
fn filter_columns_body(
    source: &[u8],
    stride: usize,
    first_row: usize,
    filter: &Filter,
    window: Range<usize>,
    target: &mut [u8],
) {
    const LANES: usize = 32;
    for (i, target) in window.zip(target.chunks_exact_mut(stride)) {
        let rows = &source[(filter.starts[i] - first_row) * stride..];
        let weights = filter.weights(i);
        let mut blocks = target.chunks_exact_mut(LANES);
        let mut at = 0;
        for block in &mut blocks {
            let mut sum = [HALF; LANES];
            for (tap, &weight) in weights.iter().enumerate() {
                let row = &rows[tap * stride + at..][..LANES];
                for lane in 0..LANES {
                    sum[lane] = add_product(sum[lane], i32::from(row[lane]), weight);
                }
            }
            for lane in 0..LANES {
                block[lane] = to_pixel(sum[lane]);
            }
            at += LANES;
        }
        for (offset, out) in blocks.into_remainder().iter_mut().enumerate() {
            let taps = weights.iter().enumerate();
            let sum = taps.fold(HALF, |sum, (tap, &weight)| {
                add_product(sum, i32::from(rows[tap * stride + at + offset]), weight)
            });
            *out = to_pixel(sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::Path;

    fn whole(width: usize, height: usize) -> Window {
        Window {
            x: 0,
            y: 0,
            width,
            height,
        }
    }

    /// The formula, one output at a time, in the plainest form.
    fn plain(source: &Image, width: usize, height: usize) -> Image {
        let axis = |values: &[u8], output: usize| -> Vec<u8> {
            if values.len() == output {
                return values.to_vec();
            }
            let filter = Filter::new(values.len(), output);
            (0..output)
                .map(|i| {
                    let taps = values[filter.starts[i]..].iter().zip(filter.weights(i));
                    let sum = taps.map(|(&v, &w)| i64::from(v) * i64::from(w)).sum::<i64>();
                    ((sum + i64::from(HALF)) >> PRECISION).clamp(0, 255) as u8
                })
                .collect()
        };
        let mut pixels = vec![0; width * height * 3];
        for channel in 0..3 {
            let mut narrow = vec![0; source.height() * width];
            for y in 0..source.height() {
                let row: Vec<u8> = (0..source.width())
                    .map(|x| source.pixels()[(y * source.width() + x) * 3 + channel])
                    .collect();
                narrow[y * width..][..width].copy_from_slice(&axis(&row, width));
            }
            for x in 0..width {
                let column: Vec<u8> = (0..source.height()).map(|y| narrow[y * width + x]).collect();
                for (y, value) in axis(&column, height).into_iter().enumerate() {
                    pixels[(y * width + x) * 3 + channel] = value;
                }
            }
        }
        Image::new(width, height, pixels)
    }

    #[test]
    fn equals_pillow_bit_for_bit() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens/mtcnn/resize.safetensors");
        let bytes = std::fs::read(path).unwrap();
        let golden = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let image = |name: &str| {
            let tensor = golden.tensor(name).unwrap();
            Image::new(tensor.shape()[1], tensor.shape()[0], tensor.data().to_vec())
        };
        let source = image("source");
        let mut compared = 0;
        for name in golden
            .names()
            .into_iter()
            .filter(|name| name.starts_with("bilinear_"))
        {
            let expected = image(name);
            let resized = bilinear(
                &source,
                expected.width(),
                expected.height(),
                whole(expected.width(), expected.height()),
            );
            assert_eq!(resized, expected, "{name}");
            compared += 1;
        }
        assert_eq!(compared, 6);
    }

    fn arbitrary_image() -> impl Strategy<Value = Image> {
        (1usize..40, 1usize..40).prop_flat_map(|(width, height)| {
            prop::collection::vec(any::<u8>(), width * height * 3)
                .prop_map(move |pixels| Image::new(width, height, pixels))
        })
    }

    proptest! {
        #[test]
        fn equals_the_plain_formula(source in arbitrary_image(), width in 1usize..50, height in 1usize..50) {
            let fast = bilinear(&source, width, height, whole(width, height));
            prop_assert_eq!(fast, plain(&source, width, height));
        }

        #[test]
        fn both_horizontal_passes_agree(source in arbitrary_image(), width in 1usize..50) {
            let filter = Filter::new(source.width(), width);
            let (mut fast, mut plain) = (vec![0; width * 3 * source.height()], vec![1; width * 3 * source.height()]);
            filter_rows(source.pixels(), source.width() * 3, &filter, 0..width, &mut fast);
            filter_rows_body(source.pixels(), source.width() * 3, &filter, 0..width, &mut plain);
            prop_assert_eq!(fast, plain);
        }

        #[test]
        fn a_window_is_a_crop_of_the_whole(
            source in arbitrary_image(), width in 2usize..50, height in 2usize..50, x in 0usize..25, y in 0usize..25,
        ) {
            let window = Window { x: x % width, y: y % height, width: width - x % width, height: height - y % height };
            let whole = bilinear(&source, width, height, whole(width, height));
            let part = bilinear(&source, width, height, window);
            prop_assert_eq!(part, whole.crop(window.x as isize, window.y as isize, window.width, window.height));
        }
    }

    #[test]
    fn a_flat_picture_stays_flat() {
        let flat = Image::new(37, 11, vec![201; 37 * 11 * 3]);
        for (width, height) in [(112, 112), (5, 7), (1, 1), (37, 40)] {
            assert!(
                bilinear(&flat, width, height, whole(width, height))
                    .pixels()
                    .iter()
                    .all(|&v| v == 201)
            );
        }
    }
}
