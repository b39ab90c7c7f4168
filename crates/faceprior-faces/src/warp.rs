//! Affine warps of pictures, bit for bit as OpenCV 5 computes `warpAffine` with bilinear interpolation and a black
//! border.
//!
//! OpenCV up to 4.10 rounded source coordinates to 1/32 pixel and weights to 15 bits; since then linear warps of 8-bit
//! pictures are computed in single precision, by default. The crops that this project is measured against come from
//! the latter, which is also the more exact; the two differ by 5/255 at the most and 0.1/255 on average.

use faceprior_data::Image;

use crate::similarity::Affine;

/// The picture `width`×`height` whose pixel `transform(p)` is the pixel p of `image`, black where that is outside.
pub fn warp(image: &Image, transform: &Affine, width: usize, height: usize) -> Image {
    let inverse = transform.inverse();
    let mut pixels = vec![0; width * height * 3];
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("fma") {
        // SAFETY: the machine has the instructions.
        unsafe { fill_with_fma(image, &inverse, width, &mut pixels) };
        return Image::new(width, height, pixels);
    }
    fill(image, &inverse, width, &mut pixels);
    Image::new(width, height, pixels)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "fma")]
fn fill_with_fma(image: &Image, inverse: &Affine, width: usize, pixels: &mut [u8]) {
    fill(image, inverse, width, pixels);
}

/// Every product that OpenCV fuses with a sum is `mul_add` here: a call into the C library where the machine has no
/// such instruction, slower and equal.
#[inline(always)]
fn fill(image: &Image, inverse: &Affine, width: usize, pixels: &mut [u8]) {
    let [[m00, m01, m02], [m10, m11, m12]] = inverse.0.map(|row| row.map(|m| m as f32));
    let (columns, rows) = (image.width() as isize, image.height() as isize);
    let source = image.pixels();
    for (y, row) in pixels.chunks_exact_mut(width * 3).enumerate() {
        let y = y as f32;
        let (start_x, start_y) = (y * m01 + m02, y * m11 + m12);
        for (x, pixel) in row.chunks_exact_mut(3).enumerate() {
            let x = x as f32;
            let (source_x, source_y) = (x.mul_add(m00, start_x), x.mul_add(m10, start_y));
            let (left, top) = (source_x.floor(), source_y.floor());
            let (right_share, lower_share) = (source_x - left, source_y - top);
            // Casts saturate: a coordinate far outside stays outside.
            let (left, top) = (left as isize, top as isize);
            if left >= 0 && top >= 0 && left < columns - 1 && top < rows - 1 {
                let upper = &source[((top * columns + left) * 3) as usize..][..6];
                let lower = &source[(((top + 1) * columns + left) * 3) as usize..][..6];
                for c in 0..3 {
                    pixel[c] = blend(
                        [upper[c], upper[c + 3], lower[c], lower[c + 3]],
                        right_share,
                        lower_share,
                    );
                }
            } else if left >= -1 && top >= -1 && left < columns && top < rows {
                let at = |x: isize, y: isize, c: usize| {
                    let inside = x >= 0 && y >= 0 && x < columns && y < rows;
                    if inside {
                        source[((y * columns + x) * 3) as usize + c]
                    } else {
                        0
                    }
                };
                for (c, value) in pixel.iter_mut().enumerate() {
                    let corners = [(0, 0), (1, 0), (0, 1), (1, 1)].map(|(dx, dy)| at(left + dx, top + dy, c));
                    *value = blend(corners, right_share, lower_share);
                }
            }
        }
    }
}

/// Left upper, right upper, left lower and right lower pixel, the right ones and the lower ones by their shares.
#[inline(always)]
fn blend(corners: [u8; 4], right_share: f32, lower_share: f32) -> u8 {
    let [left_upper, right_upper, left_lower, right_lower] = corners.map(f32::from);
    let left = lower_share.mul_add(left_lower - left_upper, left_upper);
    let right = lower_share.mul_add(right_lower - right_upper, right_upper);
    right_share.mul_add(right - left, left).round_ties_even() as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(width: usize, height: usize) -> Image {
        Image::new(
            width,
            height,
            (0..width * height * 3)
                .map(|i| ((i * 7919 + i / 13) % 256) as u8)
                .collect(),
        )
    }

    #[test]
    fn whole_translations_move_pixels_and_leave_black() {
        let image = picture(9, 7);
        let moved = warp(&image, &Affine([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]]), 9, 7);
        assert_eq!(moved, image.crop(-2, 1, 9, 7));
    }

    #[test]
    fn halves_are_means() {
        let image = picture(4, 3);
        let moved = warp(&image, &Affine([[1.0, 0.0, -0.5], [0.0, 1.0, 0.0]]), 3, 3);
        for (i, &value) in moved.pixels().iter().enumerate() {
            let (x, y, c) = (i / 3 % 3, i / 9, i % 3);
            let at = |x: usize| f32::from(image.pixels()[(y * 4 + x) * 3 + c]);
            assert_eq!(value, ((at(x) + at(x + 1)) / 2.0).round_ties_even() as u8);
        }
    }

    #[test]
    fn far_and_degenerate_maps_give_black() {
        let image = picture(5, 5);
        for m in [
            [[1.0, 0.0, 1e30], [0.0, 1.0, 0.0]],
            [[1e-30, 0.0, 0.0], [0.0, 1e-30, 9.0]],
        ] {
            assert!(warp(&image, &Affine(m), 4, 4).pixels().iter().all(|&v| v == 0));
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn with_and_without_the_fma_instruction() {
        let (image, affine) = (picture(40, 30), Affine([[0.9, 0.2, -3.3], [-0.2, 0.9, 4.7]]));
        let mut pixels = vec![0; 32 * 32 * 3];
        fill(&image, &affine.inverse(), 32, &mut pixels);
        assert_eq!(warp(&image, &affine, 32, 32).pixels(), pixels);
    }
}
