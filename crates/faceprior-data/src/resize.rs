//! Bilinear resampling with antialiasing, bit for bit as Pillow does it for 8-bit pictures.
//!
//! Pillow (`src/libImaging/Resample.c`) filters horizontally, rounds to 8 bits, then filters vertically, with
//! weights in 22-bit fixed point. Downscaling widens the triangle filter by the scale, so that every source pixel
//! counts. Pillow 13 began to filter vertically first where the height shrinks more than the width, which changes
//! last bits there; the systems that recognisers are compared with are older, so this is the order of Pillow 3 to 12.
//!
//! `fast_image_resize` chooses its weights' precision per picture (at most 16 bits), so its results differ from
//! Pillow's in the last bit; recognisers are compared to hundredths of a percent, hence this one.

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
    let columns = Filter::new(source.width(), width, window.x, window.width);
    let rows = Filter::new(source.height(), height, window.y, window.height);

    // An axis that keeps its length is not filtered, as in Pillow.
    let (first_row, used_rows) = if height == source.height() {
        (window.y, window.height)
    } else {
        (rows.start(0), rows.end(window.height - 1) - rows.start(0))
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
        filter_rows(source_rows, stride, &columns, &mut narrow);
    }
    if height == source.height() {
        return Image::new(window.width, window.height, narrow);
    }
    let mut pixels = vec![0u8; window.width * window.height * 3];
    filter_columns(&narrow, window.width * 3, first_row, &rows, &mut pixels);
    Image::new(window.width, window.height, pixels)
}

/// The weights of one axis: output `i` is the sum of `taps(i)` source pixels from `start(i)` on.
struct Filter {
    starts: Vec<usize>,
    counts: Vec<usize>,
    /// `max_taps` weights an output, those behind `counts[i]` unused.
    weights: Vec<i32>,
    max_taps: usize,
}

impl Filter {
    /// Weights for outputs `first..first + count` of an axis that goes from `input` to `output` pixels
    /// (`precompute_coeffs` and `normalize_coeffs_8bpc`, in the same double precision and the same order).
    fn new(input: usize, output: usize, first: usize, count: usize) -> Filter {
        let scale = input as f64 / output as f64;
        let support = scale.max(1.0);
        let max_taps = support.ceil() as usize * 2 + 1;
        let mut filter = Filter {
            starts: Vec::with_capacity(count),
            counts: Vec::with_capacity(count),
            weights: vec![0; count * max_taps],
            max_taps,
        };
        let inverse = 1.0 / support;
        let mut exact = vec![0f64; max_taps];
        for i in 0..count {
            let center = ((first + i) as f64 + 0.5) * scale;
            let start = (center - support + 0.5).max(0.0) as usize;
            let end = ((center + support + 0.5) as usize).min(input);
            let taps = end - start;
            let mut total = 0.0;
            for (tap, weight) in exact[..taps].iter_mut().enumerate() {
                let distance = (((tap + start) as f64 - center + 0.5) * inverse).abs();
                *weight = if distance < 1.0 { 1.0 - distance } else { 0.0 };
                total += *weight;
            }
            for (weight, exact) in filter.weights[i * max_taps..].iter_mut().zip(&exact[..taps]) {
                let normalised = if total != 0.0 { exact / total } else { *exact };
                *weight = (0.5 + normalised * f64::from(1 << PRECISION)) as i32;
            }
            filter.starts.push(start);
            filter.counts.push(taps);
        }
        filter
    }

    fn start(&self, i: usize) -> usize {
        self.starts[i]
    }

    fn end(&self, i: usize) -> usize {
        self.starts[i] + self.counts[i]
    }

    fn weights(&self, i: usize) -> &[i32] {
        &self.weights[i * self.max_taps..][..self.counts[i]]
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

/// Horizontal pass: every row of `source` (`stride` bytes) becomes one of `target`.
fn filter_rows(source: &[u8], stride: usize, filter: &Filter, target: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the machine has AVX2, as just asked; the function itself is safe code.
        return unsafe { filter_rows_avx2(source, stride, filter, target) };
    }
    filter_rows_body(source, stride, filter, target);
}

/// Four rows at once, four lanes each for three channels: the compiler would vectorise along the taps instead, and lose.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn filter_rows_avx2(source: &[u8], stride: usize, filter: &Filter, target: &mut [u8]) {
    use std::arch::x86_64::*;
    let out_stride = filter.starts.len() * 3;
    // Pixel by pixel the bytes of four rows, so that one load fetches them.
    let mut interleaved = vec![[0u8; 16]; stride / 3];
    for (rows, target) in source.chunks(4 * stride).zip(target.chunks_mut(4 * out_stride)) {
        for (lane, row) in rows.chunks_exact(stride).enumerate() {
            for (pixel, pixels) in row.chunks_exact(3).zip(&mut interleaved) {
                pixels[lane * 4..lane * 4 + 3].copy_from_slice(pixel);
            }
        }
        for i in 0..filter.starts.len() {
            let (mut first, mut second) = (_mm256_set1_epi32(HALF), _mm256_set1_epi32(HALF));
            for (&weight, pixels) in filter.weights(i).iter().zip(&interleaved[filter.start(i)..]) {
                let weight = _mm256_set1_epi32(weight);
                let half = |at: usize| i64::from_le_bytes(pixels[at..at + 8].try_into().unwrap_or_default());
                let wide = |half: i64| _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(half));
                first = _mm256_add_epi32(first, _mm256_mullo_epi32(wide(half(0)), weight));
                second = _mm256_add_epi32(second, _mm256_mullo_epi32(wide(half(8)), weight));
            }
            let shift = |sum| _mm256_srai_epi32::<{ PRECISION as i32 }>(sum);
            let words = _mm256_packs_epi32(shift(first), shift(second)); // rows 0, 2 | 1, 3
            let bytes = _mm256_packus_epi16(words, words);
            let levels = [
                _mm256_extract_epi32::<0>(bytes),
                _mm256_extract_epi32::<4>(bytes),
                _mm256_extract_epi32::<1>(bytes),
                _mm256_extract_epi32::<5>(bytes),
            ];
            for (out, level) in target.chunks_exact_mut(out_stride).zip(levels) {
                out[i * 3..][..3].copy_from_slice(&level.to_le_bytes()[..3]);
            }
        }
    }
}

/// Vertical pass: `source` holds rows of `stride` bytes from `first_row` on.
fn filter_columns(source: &[u8], stride: usize, first_row: usize, filter: &Filter, target: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn wide(source: &[u8], stride: usize, first_row: usize, filter: &Filter, target: &mut [u8]) {
            filter_columns_body(source, stride, first_row, filter, target);
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the machine has AVX2, as just asked; the function itself is safe code.
            return unsafe { wide(source, stride, first_row, filter, target) };
        }
    }
    filter_columns_body(source, stride, first_row, filter, target);
}

#[inline(always)]
fn filter_rows_body(source: &[u8], stride: usize, filter: &Filter, target: &mut [u8]) {
    let outputs = filter.starts.len();
    // Four lanes for three channels: the fourth reads into the next pixel and is dropped. The last row needs the
    // byte behind its last pixel, so each row is widened to four bytes a pixel once.
    let mut padded = vec![[0i32; 4]; stride / 3];
    for (row, target) in source
        .chunks_exact(stride)
        .zip(target.chunks_exact_mut(outputs * 3))
    {
        for (pixel, wide) in row.chunks_exact(3).zip(&mut padded) {
            *wide = [i32::from(pixel[0]), i32::from(pixel[1]), i32::from(pixel[2]), 0];
        }
        for (i, out) in target.chunks_exact_mut(3).enumerate() {
            let mut sum = [HALF; 4];
            for (pixel, &weight) in padded[filter.start(i)..].iter().zip(filter.weights(i)) {
                for lane in 0..4 {
                    sum[lane] = add_product(sum[lane], pixel[lane], weight);
                }
            }
            out.copy_from_slice(&[to_pixel(sum[0]), to_pixel(sum[1]), to_pixel(sum[2])]);
        }
    }
}

#[inline(always)]
fn filter_columns_body(source: &[u8], stride: usize, first_row: usize, filter: &Filter, target: &mut [u8]) {
    const LANES: usize = 32;
    for (i, target) in target.chunks_exact_mut(stride).enumerate() {
        let rows = &source[(filter.start(i) - first_row) * stride..];
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
            let filter = Filter::new(values.len(), output, 0, output);
            (0..output)
                .map(|i| {
                    let taps = values[filter.start(i)..].iter().zip(filter.weights(i));
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
            let filter = Filter::new(source.width(), width, 0, width);
            let (mut fast, mut plain) = (vec![0; width * 3 * source.height()], vec![1; width * 3 * source.height()]);
            filter_rows(source.pixels(), source.width() * 3, &filter, &mut fast);
            filter_rows_body(source.pixels(), source.width() * 3, &filter, &mut plain);
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
