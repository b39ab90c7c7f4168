//! Decoding, on files made here: no photographs.

use faceprior_data::{DataError, DecodeLimits, Encoding, Image, ImageFolder, ImageList};
use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder};
use proptest::prelude::*;

/// A baseline JPEG of flat 8x8 blocks: `level(block, component)`, no subsampling. `segments` go in front.
fn flat_jpeg(
    width: u16,
    height: u16,
    components: u8,
    segments: &[u8],
    level: impl Fn(usize, usize) -> i32,
) -> Vec<u8> {
    let mut file = vec![0xFF, 0xD8];
    file.extend_from_slice(segments);
    file.extend([0xFF, 0xDB, 0, 67, 0]);
    file.extend([8; 64]); // a DC step of 8 is one level
    file.extend([0xFF, 0xC0, 0, 8 + 3 * components, 8]);
    file.extend(height.to_be_bytes());
    file.extend(width.to_be_bytes());
    file.push(components);
    (1..=components).for_each(|id| file.extend([id, 0x11, 0]));
    // DC: twelve codes of four bits, the code is the category. AC: one code, "0" is the end of the block.
    file.extend([
        0xFF, 0xC4, 0, 31, 0x00, 0, 0, 0, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ]);
    file.extend(0..12);
    file.extend([
        0xFF, 0xC4, 0, 20, 0x10, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ]);
    file.extend([0xFF, 0xDA, 0, 6 + 2 * components, components]);
    (1..=components).for_each(|id| file.extend([id, 0x00]));
    file.extend([0, 63, 0]);

    let mut bits: Vec<bool> = Vec::new();
    let mut push = |value: i32, count: u32| bits.extend((0..count).rev().map(|bit| value >> bit & 1 == 1));
    let blocks = usize::from(width).div_ceil(8) * usize::from(height).div_ceil(8);
    let mut previous = vec![0; usize::from(components)];
    for block in 0..blocks.min(1 << 12) {
        for (component, previous) in previous.iter_mut().enumerate() {
            let value = level(block, component) - 128;
            let difference = value - std::mem::replace(previous, value);
            let category = 32 - difference.unsigned_abs().leading_zeros();
            push(category as i32, 4);
            push(
                if difference < 0 {
                    difference - 1
                } else {
                    difference
                },
                category,
            );
            push(0, 1);
        }
    }
    for byte in bits.chunks(8) {
        let value = (0..8).fold(0u8, |value, i| {
            value << 1 | u8::from(*byte.get(i).unwrap_or(&true))
        });
        file.push(value);
        if value == 0xFF {
            file.push(0);
        }
    }
    file.extend([0xFF, 0xD9]);
    file
}

/// Adobe's segment: 0 is CMYK or RGB, 2 is YCCK.
fn adobe(transform: u8) -> Vec<u8> {
    let mut segment = vec![0xFF, 0xEE, 0, 14];
    segment.extend(b"Adobe");
    segment.extend([0, 100, 0, 0, 0, 0, transform]);
    segment
}

fn exif(orientation: u8) -> Vec<u8> {
    let mut segment = vec![0xFF, 0xE1, 0, 34];
    segment.extend(b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0");
    segment.extend([orientation, 0, 0, 0, 0, 0, 0, 0]);
    segment
}

fn decode(bytes: &[u8]) -> Image {
    Image::decode(bytes, "test").unwrap()
}

fn refused(bytes: &[u8]) -> String {
    Image::decode(bytes, "a \"b\"\n.jpg").unwrap_err().to_string()
}

#[test]
fn jpeg_colours_of_every_kind_become_rgb() {
    let flat = |components: u8, segments: &[u8], levels: &[i32]| {
        let image = decode(&flat_jpeg(16, 8, components, segments, |_, component| {
            levels[component]
        }));
        assert_eq!((image.width(), image.height()), (16, 8));
        let first = image.pixel(0, 0);
        assert!(image.pixels().chunks_exact(3).all(|pixel| pixel == first));
        first
    };
    assert_eq!(flat(1, &[], &[77]), [77; 3]);
    assert_eq!(flat(3, &[], &[120, 128, 128]), [120; 3]);
    // Pure red by the JFIF matrix: Y 76, Cb 85, Cr 255.
    let red = flat(3, &[], &[76, 85, 255]);
    assert!(red[0] >= 253 && red[1] <= 2 && red[2] <= 2, "{red:?}");
    assert_eq!(flat(3, &adobe(0), &[10, 200, 90]), [10, 200, 90]);
    // Adobe stores CMYK inverted: ink 55, 155, 205 without black is 200, 100, 50.
    assert_eq!(flat(4, &adobe(0), &[200, 100, 50, 255]), [200, 100, 50]);
    assert_eq!(flat(4, &[], &[200, 100, 50, 255]), [200, 100, 50]);
    let half_black = flat(4, &adobe(0), &[200, 100, 50, 128]);
    assert_eq!(half_black, [100, 50, 25]);
    assert_eq!(flat(4, &adobe(2), &[55, 128, 128, 255]), [200; 3]);
}

#[test]
fn exif_orientation_is_applied() {
    // Two blocks: dark left, bright right.
    let turned = |orientation| {
        let file = flat_jpeg(
            16,
            8,
            1,
            &exif(orientation),
            |block, _| if block == 0 { 50 } else { 200 },
        );
        let image = decode(&file);
        let (right, bottom) = (image.width() - 1, image.height() - 1);
        (
            image.width(),
            image.height(),
            image.pixel(0, 0)[0],
            image.pixel(right, bottom)[0],
        )
    };
    assert_eq!(turned(1), (16, 8, 50, 200));
    assert_eq!(turned(2), (16, 8, 200, 50));
    assert_eq!(turned(3), (16, 8, 200, 50));
    assert_eq!(turned(6), (8, 16, 50, 200));
    assert_eq!(turned(8), (8, 16, 200, 50));
    assert_eq!(turned(99), (16, 8, 50, 200));
}

#[test]
fn png_of_every_kind_becomes_rgb() {
    let png = |data: &[u8], color| {
        let mut bytes = Vec::new();
        PngEncoder::new(&mut bytes)
            .write_image(data, 2, 1, color)
            .unwrap();
        decode(&bytes).into_pixels()
    };
    assert_eq!(png(&[7, 200], ExtendedColorType::L8), [7, 7, 7, 200, 200, 200]);
    assert_eq!(
        png(&[7, 0, 200, 255], ExtendedColorType::La8),
        [7, 7, 7, 200, 200, 200]
    );
    assert_eq!(
        png(&[1, 2, 3, 0, 4, 5, 6, 255], ExtendedColorType::Rgba8),
        [1, 2, 3, 4, 5, 6]
    );
    // image's 16 bits are native-endian; 257 is one level of 8 bits.
    let wide: Vec<u8> = [0u16, 257, 65535, 128 * 257, 300, 257 * 9]
        .iter()
        .flat_map(|x| x.to_ne_bytes())
        .collect();
    assert_eq!(png(&wide, ExtendedColorType::Rgb16), [0, 1, 255, 128, 1, 9]);
    assert_eq!(png(&wide[..4], ExtendedColorType::L16), [0, 0, 0, 1, 1, 1]);
}

#[test]
fn the_content_counts_and_not_the_extension() {
    let folder = tempfile::tempdir().unwrap();
    let image = Image::noise(5, 4, 1);
    let path = folder.path().join("png inside.JPG");
    std::fs::write(&path, image.encode(Encoding::Png).unwrap()).unwrap();
    assert_eq!(Image::read(&path).unwrap(), image);
}

#[test]
fn every_cut_through_a_file_is_an_error() {
    let image = Image::noise(40, 30, 2);
    let jpeg = image.encode(Encoding::Jpeg { quality: 95 }).unwrap();
    for length in 0..jpeg.len() {
        assert!(
            Image::decode(&jpeg[..length], "cut").is_err(),
            "{length} of {} bytes",
            jpeg.len()
        );
    }
    let text = refused(&jpeg[..jpeg.len() / 2]);
    assert!(
        text.contains("truncated") && text.contains(r#""a \"b\"\n.jpg""#),
        "{text}"
    );
    // What a PNG has behind its pixels is the 12 bytes of its end mark.
    let png = image.encode(Encoding::Png).unwrap();
    for length in (0..png.len() - 12).step_by(7).chain([png.len() - 13]) {
        assert!(
            Image::decode(&png[..length], "cut").is_err(),
            "{length} of {} bytes",
            png.len()
        );
    }
    let mut longer = jpeg.clone();
    longer.extend(b"trailing bytes");
    assert_eq!(decode(&longer), decode(&jpeg));
}

#[test]
fn a_picture_bomb_is_refused_by_its_header() {
    let bomb = flat_jpeg(60000, 60000, 3, &[], |_, _| 0);
    let text = refused(&bomb);
    assert!(
        text.contains("60000x60000") && text.contains("hint:") && text.contains("a \\\"b"),
        "{text}"
    );
    let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\x0DIHDR\0\0\xEA\x60\0\0\xEA\x60\x08\x02\0\0\0".to_vec();
    png.extend(crc32(&png[12..]).to_be_bytes());
    png.extend(b"\0\0\0\0IDAT\x35\xAF\x06\x1E");
    assert!(refused(&png).contains("60000x60000"), "{}", refused(&png));
    let small = Image::noise(20, 20, 3).encode(Encoding::Png).unwrap();
    let limits = DecodeLimits { max_pixels: 399 };
    assert!(matches!(
        Image::decode_within(&small, "x", limits),
        Err(DataError::TooLarge { width: 20, .. })
    ));
    assert!(Image::decode_within(&small, "x", DecodeLimits { max_pixels: 400 }).is_ok());
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            crc >> 1 ^ (0xEDB8_8320 & (crc & 1).wrapping_neg())
        })
    })
}

#[test]
fn what_is_no_picture_says_so() {
    assert!(refused(b"").contains("the file is empty"));
    let html = refused(b"<!DOCTYPE html>");
    assert!(
        html.contains("neither JPEG nor PNG") && html.contains("<!DOCTYP") && html.contains("hint:"),
        "{html}"
    );
    let missing = Image::read("/no/such.jpg").unwrap_err().to_string();
    assert!(missing.contains("cannot read \"/no/such.jpg\""), "{missing}");
    let unknown = Image::noise(2, 2, 0).write("face.webp").unwrap_err().to_string();
    assert!(unknown.contains("must be jpg, jpeg or png"), "{unknown}");
}

#[test]
fn written_pictures_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let smooth: Vec<u8> = (0..50 * 40 * 3)
        .map(|i| ((i / 3 % 50) * 3 + (i / 150) * 2) as u8)
        .collect();
    let image = Image::new(50, 40, smooth);
    let png = folder.path().join("new folder/\"quoted\" name.png");
    image.write(&png).unwrap();
    assert_eq!(Image::read(&png).unwrap(), image);
    let jpeg = folder.path().join("a.jpeg");
    image.write(&jpeg).unwrap();
    let read = Image::read(&jpeg).unwrap();
    let worst = image
        .pixels()
        .iter()
        .zip(read.pixels())
        .map(|(a, b)| a.abs_diff(*b))
        .max();
    assert!(worst <= Some(8), "{worst:?}");
    // Full resolution of colour: one saturated column survives.
    let mut striped = Image::filled(16, 16, [128; 3]);
    (0..16).for_each(|y| striped.pixels_mut()[(y * 16 + 7) * 3..][..3].copy_from_slice(&[230, 20, 40]));
    let [r, g, _] = decode(&striped.encode(Encoding::Jpeg { quality: 97 }).unwrap()).pixel(7, 8);
    assert!(r > 215 && g < 40, "{r} {g}");
}

#[cfg(unix)]
#[test]
fn odd_names_go_all_the_way() {
    use std::os::unix::ffi::OsStrExt;
    let folder = tempfile::tempdir().unwrap();
    let image = Image::noise(6, 6, 4);
    for name in [&b"a b/1.png"[..], b"new\nline/'q' \"q\".png", b"caf\xE9/\xFF.png"] {
        image
            .write(folder.path().join(std::ffi::OsStr::from_bytes(name)))
            .unwrap();
    }
    let set = ImageFolder::open(folder.path()).unwrap();
    assert_eq!(set.identities(), ["a b", "caf\\xE9", "new\nline"]);
    let list = ImageList::open(folder.path()).unwrap();
    for index in 0..3 {
        assert_eq!(Image::read(list.path(index)).unwrap(), image);
        assert_eq!(Image::read(set.path(index)).unwrap(), image);
    }
    std::fs::write(list.path(1), b"broken").unwrap();
    let text = Image::read(list.path(1)).unwrap_err().to_string();
    assert!(text.contains("\\xE9/\\xFF.png"), "{text}");
}

#[test]
fn a_sheet_holds_every_picture_in_its_place() {
    let pictures: Vec<Image> = (0..5).map(|i| Image::filled(4, 3, [i * 10, 1, 2])).collect();
    let sheet = Image::grid(&pictures, 3);
    assert_eq!((sheet.width(), sheet.height()), (3 * 4 + 2 * 2, 2 * 3 + 2));
    assert_eq!(
        (sheet.pixel(6, 0), sheet.pixel(6 + 3, 5 + 2)),
        ([10, 1, 2], [40, 1, 2])
    );
    assert_eq!((sheet.pixel(4, 0), sheet.pixel(12, 5)), ([255; 3], [255; 3]));
    assert_eq!(Image::grid(&pictures[..1], 9).width(), 4);
}

#[test]
fn padding_centres_and_puts_the_odd_pixel_right_and_below() {
    let wide = Image::filled(5, 2, [9; 3]).pad_to_square();
    let rows: Vec<u8> = (0..5).map(|y| wide.pixel(0, y)[0]).collect();
    assert_eq!(rows, [0, 9, 9, 0, 0]);
    let tall = Image::filled(2, 5, [9; 3]).pad_to_square();
    let columns: Vec<u8> = (0..5).map(|x| tall.pixel(x, 4)[0]).collect();
    assert_eq!(columns, [0, 9, 9, 0, 0]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn a_crop_shows_the_picture_or_black(
        width in 1usize..9, height in 1usize..9, x in -12isize..12, y in -12isize..12, w in 0usize..12, h in 0usize..12,
    ) {
        let image = Image::noise(width, height, 5);
        let crop = image.crop(x, y, w, h);
        for row in 0..h {
            for column in 0..w {
                let (sx, sy) = (x + column as isize, y + row as isize);
                let inside = (0..width as isize).contains(&sx) && (0..height as isize).contains(&sy);
                let expected = if inside { image.pixel(sx as usize, sy as usize) } else { [0; 3] };
                prop_assert_eq!(crop.pixel(column, row), expected);
            }
        }
    }

    #[test]
    fn numbers_and_mirrors_go_back(width in 1usize..9, height in 1usize..9, seed: u64) {
        let image = Image::noise(width, height, seed);
        let mut numbers = vec![0.0; 3 * width * height];
        image.to_chw_f32(&mut numbers);
        prop_assert!(numbers.iter().all(|x| (-1.0..=1.0).contains(x)));
        prop_assert_eq!(numbers[width * height], (f32::from(image.pixel(0, 0)[1]) / 255.0 - 0.5) / 0.5);
        prop_assert_eq!(Image::from_chw_f32(&numbers, width, height), image.clone());
        let mirrored = image.flip_horizontal();
        prop_assert_eq!(mirrored.pixel(0, height - 1), image.pixel(width - 1, height - 1));
        prop_assert_eq!(mirrored.flip_horizontal(), image);
    }

    #[test]
    fn damaged_files_never_panic(seed: u64, at in 0usize..4000, value: u8, png: bool) {
        let encoding = if png { Encoding::Png } else { Encoding::Jpeg { quality: 90 } };
        let mut bytes = Image::noise(24, 20, seed % 4).encode(encoding).unwrap();
        let at = at % bytes.len();
        bytes[at] = value;
        let _ = Image::decode(&bytes, "damaged");
    }
}

/// The folders of real data that the project does not carry.
fn shared(path: &str) -> std::path::PathBuf {
    std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared")).join(path)
}

#[test]
#[ignore = "needs ../shared; run by cargo xtask check --full"]
fn every_real_picture_decodes() {
    for (folder, count) in [
        ("data/lfw/images", 7701),
        ("data/celeba", 3134),
        ("data/utkface/images", 7000),
    ] {
        let list = ImageList::from_folder(shared(folder)).unwrap();
        let broken: Vec<String> = (0..faceprior_data::Dataset::len(&list))
            .filter_map(|index| Image::read(list.path(index)).err().map(|error| error.to_string()))
            .collect();
        assert!(broken.is_empty(), "{folder}: {broken:?}");
        assert_eq!(faceprior_data::Dataset::len(&list), count, "{folder}");
    }
}

#[test]
#[ignore = "needs ../shared; run by cargo xtask check --full"]
fn the_pairs_of_lfw_read_as_published() {
    use faceprior_data::pairs;
    let pictures = pairs::Pictures::in_folder(shared("data/lfw/images")).unwrap();
    let pairs = pairs::read(shared("data/lfw/pairs.txt"), &pictures).unwrap();
    assert_eq!(pairs.len(), 6000);
    assert_eq!(pairs[0].left, "Abel_Pacheco/Abel_Pacheco_0001.jpg");
    for (i, pair) in pairs.iter().enumerate() {
        assert_eq!((pair.fold, pair.same), (i / 600, i % 600 < 300));
    }
}
