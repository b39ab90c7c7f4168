//! A picture in memory, and the way in and out of files.
//!
//! JPEGs are decoded with the pixels of libjpeg-turbo, which Pillow, OpenCV and torchvision give, because detectors and
//! recognisers are trained and compared on them, and MTCNN moves landmarks by pixels for a few levels' difference. Our
//! own decoder does it for the common kinds ([`crate::jpeg`]). The rest (CMYK, colour at a quarter of the resolution) goes
//! to zune-jpeg, whose pixels may differ by a few levels, and so does every broken file, for an error that names what is
//! wrong.

use std::fmt;
use std::io::Cursor;
use std::mem::MaybeUninit;
use std::path::Path;

use ::image::codecs::jpeg::JpegEncoder;
use ::image::codecs::png::{PngDecoder, PngEncoder};
use ::image::metadata::Orientation;
use ::image::{DynamicImage, ExtendedColorType, ImageDecoder, ImageEncoder, Limits};
use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use crate::files::{self, Durability};
use crate::resize::{self, Window};
use crate::{DataError, jpeg, random};

/// A picture: RGB, 8 bits a channel, rows from top to bottom, pixels from left to right, channels interleaved (HWC).
#[derive(Clone, PartialEq, Eq)]
pub struct Image {
    width: usize,
    height: usize,
    pixels: Vec<u8>,
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Image({}x{})", self.width, self.height)
    }
}

/// What a file may ask for before anything is allocated for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodeLimits {
    /// Most pixels (width times height) of a picture.
    pub max_pixels: usize,
}

impl Default for DecodeLimits {
    /// 100 megapixels: twice what cameras make, 300 MB decoded.
    fn default() -> Self {
        DecodeLimits {
            max_pixels: 100_000_000,
        }
    }
}

/// A file format to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// JPEG without chroma subsampling (4:4:4), quality 1 to 100.
    Jpeg {
        /// 95 and more keeps what a recogniser sees.
        quality: u8,
    },
    /// PNG: lossless.
    Png,
}

impl Encoding {
    /// The format by the file's extension: `jpg`, `jpeg` (quality 95) or `png`, in any case.
    ///
    /// # Errors
    /// [`DataError::UnknownFormat`] for any other extension.
    pub fn from_path(path: &Path) -> Result<Encoding, DataError> {
        let extension = path
            .extension()
            .and_then(|e| e.to_str())
            .map(str::to_ascii_lowercase);
        match extension.as_deref() {
            Some("jpg" | "jpeg") => Ok(Encoding::Jpeg { quality: 95 }),
            Some("png") => Ok(Encoding::Png),
            _ => Err(DataError::UnknownFormat {
                path: path.to_owned(),
            }),
        }
    }
}

impl Image {
    /// A picture from its pixels, `width * height * 3` bytes in the layout of [`Image`].
    ///
    /// # Panics
    /// If the number of bytes is another one.
    pub fn new(width: usize, height: usize, pixels: Vec<u8>) -> Image {
        assert_eq!(
            pixels.len(),
            width * height * 3,
            "a {width}x{height} picture has width·height·3 bytes"
        );
        Image {
            width,
            height,
            pixels,
        }
    }

    /// A picture of one colour.
    pub fn filled(width: usize, height: usize, color: [u8; 3]) -> Image {
        Image {
            width,
            height,
            pixels: color.repeat(width * height),
        }
    }

    /// Width in pixels.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Height in pixels.
    pub fn height(&self) -> usize {
        self.height
    }

    /// The bytes, `[height, width, 3]`.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// The bytes, `[height, width, 3]`, to be changed in place.
    pub fn pixels_mut(&mut self) -> &mut [u8] {
        &mut self.pixels
    }

    /// The bytes, `[height, width, 3]`.
    pub fn into_pixels(self) -> Vec<u8> {
        self.pixels
    }

    /// The colour of a pixel.
    ///
    /// # Panics
    /// Outside the picture.
    pub fn pixel(&self, x: usize, y: usize) -> [u8; 3] {
        assert!(
            x < self.width && y < self.height,
            "pixel ({x}, {y}) lies outside {self:?}"
        );
        let at = (y * self.width + x) * 3;
        [self.pixels[at], self.pixels[at + 1], self.pixels[at + 2]]
    }

    /// Reads a JPEG or PNG file as [`Image::decode`] does, within the default limits.
    ///
    /// # Errors
    /// [`DataError::Io`], [`DataError::Decode`], [`DataError::TooLarge`]; each names the file.
    pub fn read(path: impl AsRef<Path>) -> Result<Image, DataError> {
        Image::read_within(path, DecodeLimits::default())
    }

    /// [`Image::read`] with other limits.
    ///
    /// # Errors
    /// Those of [`Image::read`].
    pub fn read_within(path: impl AsRef<Path>, limits: DecodeLimits) -> Result<Image, DataError> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|error| DataError::io("read", path, error))?;
        Image::decode_within(&bytes, path, limits)
    }

    /// Decodes a JPEG or PNG, known by its content. `name` is for error messages only.
    ///
    /// A JPEG gets the pixels that libjpeg-turbo (Pillow, OpenCV, torchvision) gives it, if it is of one of the common kinds:
    /// baseline or progressive, grey, YCbCr or RGB, colour at full or half resolution.
    ///
    /// The EXIF orientation is applied, grey is replicated, alpha is dropped, CMYK and YCCK follow Adobe's
    /// convention (stored inverted), 16 bits are scaled to 8, and an animation gives its first picture.
    /// A picture that ends early is an error, never half a picture.
    ///
    /// # Errors
    /// [`DataError::Decode`], [`DataError::TooLarge`].
    pub fn decode(bytes: &[u8], name: impl AsRef<Path>) -> Result<Image, DataError> {
        Image::decode_within(bytes, name, DecodeLimits::default())
    }

    /// [`Image::decode`] with other limits.
    ///
    /// # Errors
    /// [`DataError::Decode`], [`DataError::TooLarge`].
    pub fn decode_within(
        bytes: &[u8],
        name: impl AsRef<Path>,
        limits: DecodeLimits,
    ) -> Result<Image, DataError> {
        let decoded = match bytes {
            [0xFF, 0xD8, 0xFF, ..] => decode_jpeg(bytes, limits),
            [0x89, b'P', b'N', b'G', ..] => decode_png(bytes, limits),
            [] => Err(Refusal::Broken("the file is empty".into())),
            _ => Err(Refusal::Broken(format!(
                "it is neither JPEG nor PNG, its first bytes are \"{}\"\nhint: convert it first, for example with ffmpeg",
                bytes[..bytes.len().min(8)].escape_ascii()
            ))),
        };
        decoded.map_err(|refusal| {
            let name = format!("{:?}", name.as_ref());
            match refusal {
                Refusal::Broken(reason) => DataError::Decode { name, reason },
                Refusal::TooLarge { width, height } => DataError::TooLarge {
                    name,
                    width,
                    height,
                    max_pixels: limits.max_pixels,
                },
            }
        })
    }

    /// The picture as a file's bytes.
    ///
    /// # Errors
    /// [`DataError::Decode`] (naming the size) if the format cannot hold it: JPEG ends at 65535 pixels a side.
    pub fn encode(&self, encoding: Encoding) -> Result<Vec<u8>, DataError> {
        let mut bytes = Vec::with_capacity(self.pixels.len() / 2);
        let (width, height) = (self.width as u32, self.height as u32);
        let result = match encoding {
            Encoding::Jpeg { quality } => JpegEncoder::new_with_quality(&mut bytes, quality).write_image(
                &self.pixels,
                width,
                height,
                ExtendedColorType::Rgb8,
            ),
            Encoding::Png => {
                PngEncoder::new(&mut bytes).write_image(&self.pixels, width, height, ExtendedColorType::Rgb8)
            }
        };
        match result {
            Ok(()) => Ok(bytes),
            Err(error) => Err(DataError::Setting {
                setting: "picture size",
                got: format!("{}x{}", self.width, self.height),
                expected: format!("a size that the format can hold ({error})"),
            }),
        }
    }

    /// Writes the picture in the format of the path's extension (JPEG quality 95): aside, to the disk, then renamed,
    /// so that a reader sees the old file or the whole new one, after a power cut too. Folders are made as needed.
    ///
    /// # Errors
    /// [`DataError::UnknownFormat`], [`DataError::Io`].
    pub fn write(&self, path: impl AsRef<Path>) -> Result<(), DataError> {
        self.write_with(path, Durability::Synced)
    }

    /// [`Image::write`] with a choice of durability: [`Durability::Renamed`] is far faster for many small crops that
    /// can be made again.
    ///
    /// # Errors
    /// [`DataError::UnknownFormat`], [`DataError::Io`].
    pub fn write_with(&self, path: impl AsRef<Path>, durability: Durability) -> Result<(), DataError> {
        let path = path.as_ref();
        files::write_atomically(path, &self.encode(Encoding::from_path(path)?)?, durability)
    }

    /// Resizes with bilinear interpolation and antialiasing, bit for bit as Pillow's `resize(..., BILINEAR)`
    /// (versions 3 to 12).
    ///
    /// # Panics
    /// If a side is 0.
    pub fn resize_bilinear(&self, width: usize, height: usize) -> Image {
        if (width, height) == (self.width, self.height) {
            return self.clone();
        }
        resize::bilinear(
            self,
            width,
            height,
            Window {
                x: 0,
                y: 0,
                width,
                height,
            },
        )
    }

    /// The part of size `width` x `height` whose upper left corner is `(x, y)`; what lies outside is black.
    pub fn crop(&self, x: isize, y: isize, width: usize, height: usize) -> Image {
        let mut pixels = vec![0u8; width * height * 3];
        // Columns of the crop that lie inside the picture.
        let left = x.min(0).unsigned_abs().min(width);
        let right = (self.width as isize - x).clamp(left as isize, width as isize) as usize;
        if right > left {
            for row in 0..height {
                let Ok(source_row) = usize::try_from(y + row as isize) else {
                    continue;
                };
                if source_row >= self.height {
                    break;
                }
                let from = (source_row * self.width + (x + left as isize) as usize) * 3;
                let length = (right - left) * 3;
                pixels[(row * width + left) * 3..][..length]
                    .copy_from_slice(&self.pixels[from..from + length]);
            }
        }
        Image {
            width,
            height,
            pixels,
        }
    }

    /// Mirrors left and right.
    pub fn flip_horizontal(&self) -> Image {
        let mut pixels = Vec::with_capacity(self.pixels.len());
        for row in self.pixels.chunks_exact((self.width * 3).max(1)) {
            pixels.extend(row.chunks_exact(3).rev().flatten());
        }
        Image {
            width: self.width,
            height: self.height,
            pixels,
        }
    }

    /// Pads the shorter side with black to a square, the picture centred; an odd pixel goes right or below.
    pub fn pad_to_square(&self) -> Image {
        let side = self.width.max(self.height);
        if self.width == self.height {
            return self.clone();
        }
        let (left, top) = ((side - self.width) / 2, (side - self.height) / 2);
        self.crop(-(left as isize), -(top as isize), side, side)
    }

    /// Writes the picture as `[3, height, width]` in `[-1, 1]`: `(v / 255 - 0.5) / 0.5`.
    ///
    /// # Panics
    /// If `out` does not hold `3 * height * width` numbers.
    pub fn to_chw_f32(&self, out: &mut [f32]) {
        self.write_chw(out, false);
    }

    /// [`Image::to_chw_f32`], mirrored on the way if `mirror`.
    pub(crate) fn write_chw(&self, out: &mut [f32], mirror: bool) {
        let out = std::ptr::from_mut(out) as *mut [MaybeUninit<f32>];
        // SAFETY: the slice is borrowed for as long, and only numbers are written.
        self.fill_chw(unsafe { &mut *out }, mirror);
    }

    /// [`Image::write_chw`] behind what `out` holds.
    pub(crate) fn append_chw(&self, out: &mut Vec<f32>, mirror: bool) {
        let length = self.pixels.len();
        out.reserve(length);
        self.fill_chw(&mut out.spare_capacity_mut()[..length], mirror);
        // SAFETY: so many numbers were just written.
        unsafe { out.set_len(out.len() + length) };
    }

    /// Writes every number of `out`.
    fn fill_chw(&self, out: &mut [MaybeUninit<f32>], mirror: bool) {
        assert_eq!(
            out.len(),
            self.pixels.len(),
            "{self:?} needs 3·height·width numbers"
        );
        if out.is_empty() {
            return;
        }
        let (red, rest) = out.split_at_mut(self.width * self.height);
        let (green, blue) = rest.split_at_mut(self.width * self.height);
        let [red, green, blue] = [red, green, blue].map(|plane| plane.chunks_exact_mut(self.width));
        let rows = self.pixels.chunks_exact(self.width * 3);
        for (((row, red), green), blue) in rows.zip(red).zip(green).zip(blue) {
            normalise(row, [red, green, blue], mirror);
        }
    }

    /// The picture of `values`, `[3, height, width]` in `[-1, 1]`: rounded to the nearest level, clipped at the ends.
    ///
    /// # Panics
    /// If `values` does not hold `3 * height * width` numbers.
    pub fn from_chw_f32(values: &[f32], width: usize, height: usize) -> Image {
        Image::from_planes(values, width, height, |value| (value * 127.5 + 127.5).round())
    }

    /// The picture of `[3, height, width]` numbers through `level`, which gives 0 to 255 (clipped; NaN becomes 0).
    pub(crate) fn from_planes(
        values: &[f32],
        width: usize,
        height: usize,
        level: impl Fn(f32) -> f32,
    ) -> Image {
        assert_eq!(
            values.len(),
            3 * width * height,
            "a {width}x{height} picture has 3·height·width numbers"
        );
        let mut pixels = vec![0u8; values.len()];
        for (channel, plane) in values.chunks_exact((width * height).max(1)).enumerate() {
            for (pixel, &value) in pixels.chunks_exact_mut(3).zip(plane) {
                pixel[channel] = level(value) as u8;
            }
        }
        Image {
            width,
            height,
            pixels,
        }
    }

    /// A sheet of pictures, row by row in `columns` columns, two white pixels between them. Pictures smaller than the
    /// largest one stand in the upper left of their cell.
    ///
    /// # Panics
    /// If `columns` is 0.
    pub fn grid(images: &[Image], columns: usize) -> Image {
        const GAP: usize = 2;
        assert!(columns > 0, "a sheet needs at least one column");
        let columns = columns.min(images.len().max(1));
        let rows = images.len().div_ceil(columns).max(1);
        let cell_width = images.iter().map(Image::width).max().unwrap_or(1);
        let cell_height = images.iter().map(Image::height).max().unwrap_or(1);
        let width = columns * (cell_width + GAP) - GAP;
        let mut sheet = Image::filled(width, rows * (cell_height + GAP) - GAP, [255; 3]);
        for (i, image) in images.iter().enumerate() {
            let (x, y) = (
                i % columns * (cell_width + GAP),
                i / columns * (cell_height + GAP),
            );
            for row in 0..image.height {
                let to = ((y + row) * width + x) * 3;
                sheet.pixels[to..to + image.width * 3]
                    .copy_from_slice(&image.pixels[row * image.width * 3..][..image.width * 3]);
            }
        }
        sheet
    }

    /// A picture of uniform noise: for tests and timings of everything that does not care what it sees.
    pub fn noise(width: usize, height: usize, seed: u64) -> Image {
        use rand::Rng;
        let mut pixels = vec![0u8; width * height * 3];
        random::stream(seed, b"noise   ", [width as u64, height as u64]).fill_bytes(&mut pixels);
        Image {
            width,
            height,
            pixels,
        }
    }
}

/// `(v / 255 - 0.5) / 0.5` for every level, in single precision as torchvision computes it.
static LEVELS: [f32; 256] = {
    let mut levels = [0f32; 256];
    let mut v = 0;
    while v < 256 {
        levels[v] = (v as f32 / 255.0 - 0.5) / 0.5;
        v += 1;
    }
    levels
};

/// A row of red, of green and of blue, to be written from end to end.
type Planes<'a> = [&'a mut [MaybeUninit<f32>]; 3];

/// A row of pixels as numbers.
fn normalise(row: &[u8], planes: Planes, mirror: bool) {
    #[cfg(target_arch = "x86_64")]
    if row.len() >= 8 * 3 && std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the machine has AVX2, and there are eight pixels.
        return unsafe { avx2::normalise(row, planes, mirror) };
    }
    normalise_one_by_one(row, planes, mirror);
}

fn normalise_one_by_one(row: &[u8], planes: Planes, mirror: bool) {
    for (channel, plane) in planes.into_iter().enumerate() {
        let levels = row.as_chunks::<3>().0.iter();
        let levels = levels.map(|pixel| LEVELS[usize::from(pixel[channel])]);
        let write = |(out, level): (&mut MaybeUninit<f32>, f32)| {
            out.write(level);
        };
        if mirror {
            plane.iter_mut().zip(levels.rev()).for_each(write);
        } else {
            plane.iter_mut().zip(levels).for_each(write);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::Planes;

    /// For each channel where the levels of eight pixels lie, each four times: of pixels 0 to 3 in the first 16 of 24
    /// bytes, of pixels 4 to 7 in the last 16.
    const PICKS: [[[u8; 16]; 2]; 3] = picks(false);
    /// The same from the right, pixels 7 to 4 first.
    const MIRRORED: [[[u8; 16]; 2]; 3] = picks(true);

    const fn picks(mirror: bool) -> [[[u8; 16]; 2]; 3] {
        let mut picks = [[[0; 16]; 2]; 3];
        let mut at = 0;
        while at < 3 * 2 * 16 {
            let (channel, half, byte) = (at / 32, at / 16 % 2, at % 16);
            let pixel = half * 4 + byte / 4;
            let pixel = if mirror { 7 - pixel } else { pixel };
            let start = if pixel < 4 { 0 } else { 8 };
            picks[channel][half][byte] = (pixel * 3 + channel - start) as u8;
            at += 1;
        }
        picks
    }

    /// [`super::normalise`] for eight pixels or more. The last eight may overlap those before.
    ///
    /// A level four times is 2³²·level/255 but for a fraction. Half of that, with the last bit set for the fraction,
    /// rounds to single precision as level/255 does.
    #[target_feature(enable = "avx2")]
    pub(super) fn normalise(row: &[u8], planes: Planes, mirror: bool) {
        let width = row.len() / 3;
        let picks = if mirror { &MIRRORED } else { &PICKS };
        let [red, green, blue] = planes.map(|plane| &mut plane[..width]);
        for at in (0..width).step_by(8).map(|at| at.min(width - 8)) {
            let pixels = &row[at * 3..][..8 * 3];
            // SAFETY: sixteen bytes can be read at both places, thrice.
            let (first, last) = unsafe {
                (
                    _mm_loadu_si128(pixels.as_ptr().cast()),
                    _mm_loadu_si128(pixels[8..].as_ptr().cast()),
                )
            };
            let (first, last, to) = if mirror {
                (last, first, width - 8 - at)
            } else {
                (first, last, at)
            };
            let bytes = _mm256_set_m128i(last, first);
            for (plane, picks) in [&mut *red, &mut *green, &mut *blue].into_iter().zip(picks) {
                // SAFETY: the places are 32 bytes.
                let picks = unsafe { _mm256_loadu_si256(picks.as_ptr().cast()) };
                let levels = _mm256_srli_epi32::<1>(_mm256_shuffle_epi8(bytes, picks));
                let levels = _mm256_cvtepi32_ps(_mm256_or_si256(levels, _mm256_set1_epi32(1)));
                let numbers = _mm256_mul_ps(levels, _mm256_set1_ps(1.0 / (1 << 30) as f32));
                let numbers = _mm256_sub_ps(numbers, _mm256_set1_ps(1.0));
                let out = &mut plane[to..][..8];
                // SAFETY: eight numbers can be written.
                unsafe { _mm256_storeu_ps(out.as_mut_ptr().cast(), numbers) };
            }
        }
    }
}

/// Why a picture is not decoded, before it has a name.
enum Refusal {
    Broken(String),
    TooLarge { width: usize, height: usize },
}

fn check_size(width: usize, height: usize, limits: DecodeLimits) -> Result<(), Refusal> {
    match width.checked_mul(height) {
        Some(pixels) if pixels <= limits.max_pixels => Ok(()),
        _ => Err(Refusal::TooLarge { width, height }),
    }
}

fn decode_jpeg(bytes: &[u8], limits: DecodeLimits) -> Result<Image, Refusal> {
    match jpeg::decode(bytes, limits) {
        Ok((image, orientation)) => Ok(turned(image, orientation)),
        // The general decoder would fill what is missing with grey.
        Err(jpeg::Refusal::EndsEarly) => Err(Refusal::Broken(
            "JPEG: the file is truncated or damaged, its data end before the picture does".into(),
        )),
        Err(jpeg::Refusal::NotCovered) => decode_any_jpeg(bytes, limits),
    }
}

/// JPEG of any kind, or what is wrong with it.
fn decode_any_jpeg(bytes: &[u8], limits: DecodeLimits) -> Result<Image, Refusal> {
    // Strict: corrupt entropy data is an error; the lenient mode fills the rest with grey and says nothing.
    let options = DecoderOptions::default()
        .set_strict_mode(true)
        .set_max_width(usize::MAX)
        .set_max_height(usize::MAX)
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    let broken = |error: zune_jpeg::errors::DecodeErrors| Refusal::Broken(format!("JPEG: {error}"));
    decoder.decode_headers().map_err(broken)?;
    let (width, height) = decoder
        .dimensions()
        .ok_or_else(|| Refusal::Broken("JPEG: no frame header".into()))?;
    check_size(width, height, limits)?;
    if !reaches_end_marker(bytes) {
        return Err(Refusal::Broken(
            "JPEG: the file is truncated, it has no end marker".into(),
        ));
    }
    let orientation = decoder.exif().and_then(|exif| Orientation::from_exif_chunk(exif));
    let mut pixels = vec![0u8; width * height * 3];
    decoder.decode_into(&mut pixels).map_err(broken)?;
    Ok(turned(
        Image {
            width,
            height,
            pixels,
        },
        orientation.unwrap_or(Orientation::NoTransforms),
    ))
}

/// Whether the chain of JPEG segments reaches the end-of-image marker. The decoder notices a missing row of blocks,
/// not a missing part of the last row.
fn reaches_end_marker(bytes: &[u8]) -> bool {
    let mut at = 2; // behind the start marker
    while let Some(offset) = bytes
        .get(at..)
        .and_then(|rest| rest.iter().position(|&byte| byte == 0xFF))
    {
        at += offset + 1;
        match bytes.get(at) {
            None => return false,
            Some(0xD9) => return true,
            // Fill byte: the marker's code may follow.
            Some(0xFF) => {}
            // A stuffed 0xFF of entropy data, or a marker without a body.
            Some(0x00 | 0x01 | 0xD0..=0xD8) => at += 1,
            Some(_) => {
                let Some(&[high, low]) = bytes.get(at + 1..at + 3) else {
                    return false;
                };
                at += 1 + usize::from(u16::from_be_bytes([high, low]));
            }
        }
    }
    false
}

fn decode_png(bytes: &[u8], limits: DecodeLimits) -> Result<Image, Refusal> {
    let broken = |error: ::image::ImageError| Refusal::Broken(format!("PNG: {error}"));
    // The limit of memory also holds for what comes before the pixels: text chunks, profiles.
    let mut memory = Limits::no_limits();
    memory.max_alloc = Some(limits.max_pixels.saturating_mul(8).max(1 << 20) as u64);
    let mut decoder = PngDecoder::with_limits(Cursor::new(bytes), memory).map_err(broken)?;
    let (width, height) = decoder.dimensions();
    check_size(width as usize, height as usize, limits)?;
    // A broken EXIF block is no reason to refuse the pixels.
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let pixels = DynamicImage::from_decoder(decoder)
        .map_err(broken)?
        .into_rgb8()
        .into_raw();
    Ok(turned(
        Image {
            width: width as usize,
            height: height as usize,
            pixels,
        },
        orientation,
    ))
}

/// The picture the right way up.
fn turned(image: Image, orientation: Orientation) -> Image {
    if orientation == Orientation::NoTransforms {
        return image;
    }
    let (width, height) = (image.width as u32, image.height as u32);
    let buffer = ::image::RgbImage::from_raw(width, height, image.pixels).expect("the buffer has this size");
    let mut picture = DynamicImage::ImageRgb8(buffer);
    picture.apply_orientation(orientation);
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    Image {
        width,
        height,
        pixels: picture.into_rgb8().into_raw(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_agree() {
        for width in [8, 9, 16, 256] {
            for (shift, mirror) in [(0, false), (1, true), (2, false), (3, true)] {
                let row: Vec<u8> = (0..width * 3)
                    .map(|i| (i / 3 + i % 3 * shift * 85) as u8)
                    .collect();
                let numbers = |normalise: fn(&[u8], Planes, bool)| {
                    let mut numbers = vec![MaybeUninit::new(2.0); width * 3];
                    let (red, rest) = numbers.split_at_mut(width);
                    let (green, blue) = rest.split_at_mut(width);
                    normalise(&row, [red, green, blue], mirror);
                    // SAFETY: they were numbers from the beginning.
                    let bits = |number: MaybeUninit<f32>| unsafe { number.assume_init() }.to_bits();
                    numbers.into_iter().map(bits).collect::<Vec<_>>()
                };
                assert_eq!(numbers(normalise), numbers(normalise_one_by_one));
            }
        }
    }
}
