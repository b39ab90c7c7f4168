//! Damaged and malicious JPEGs: an error or a picture, soon, in little memory.

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use faceprior_data::{DataError, DecodeLimits, Encoding, Image};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

/// Counts the bytes that are allocated, and the most there were at once.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is handed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(NOW.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller's promises are the system's conditions; so below.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(NOW.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Decodes, and answers how many bytes that needed at once.
fn decode(bytes: &[u8], limits: DecodeLimits) -> (Result<Image, DataError>, usize) {
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    let image = Image::decode_within(bytes, "hostile", limits);
    (image, PEAK.load(Relaxed) - before)
}

/// One of the files that the decoder's own tests read, or one made here.
fn picture(which: usize) -> Vec<u8> {
    let names = [
        "420",
        "422",
        "grey",
        "progressive",
        "progressive_422",
        "restart",
        "rgb",
        "tiny",
    ];
    match names.get(which) {
        Some(name) => {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/jpeg");
            std::fs::read(folder.join(format!("{name}.jpg"))).unwrap()
        }
        None => Image::noise(24, 20, which as u64)
            .encode(Encoding::Jpeg { quality: 90 })
            .unwrap(),
    }
}

/// Where a segment of one of these kinds starts.
fn segment(bytes: &[u8], codes: &[u8]) -> usize {
    let found = bytes
        .windows(2)
        .position(|pair| pair[0] == 0xFF && codes.contains(&pair[1]));
    found.unwrap()
}

/// One test, for the count of bytes is the whole process's.
#[test]
fn no_file_takes_more_than_its_share() {
    // Bytes anywhere, with a weight on the headers, where sizes, tables and scans are told.
    let damage = prop::collection::vec(
        (prop_oneof![0usize..700, 0usize..7000], any::<u8>(), 0..4u8),
        1..6,
    );
    let limits = DecodeLimits {
        max_pixels: 100 * 100,
    };
    // Twelve bytes a pixel (samples, coefficients, colours) of sides filled up to whole units, and tables.
    let share = 100 * 100 * 12 * 4 + 300_000;
    let mut runner = TestRunner::new(Config {
        cases: 4000,
        failure_persistence: None,
        ..Config::default()
    });
    runner
        .run(&(0usize..10, damage), |(which, damage)| {
            let mut bytes = picture(which);
            for (at, value, kind) in damage {
                let at = at % bytes.len();
                match kind {
                    0 => bytes[at] = value,
                    1 => bytes[at] ^= 1 << (value & 7),
                    2 => drop(bytes.drain(at..(at + usize::from(value % 16)).min(bytes.len() - 1))),
                    _ => bytes.insert(at, value),
                }
            }
            let (image, memory) = decode(&bytes, limits);
            if let Ok(image) = image {
                prop_assert!(image.width() * image.height() <= limits.max_pixels, "{image:?}");
            }
            prop_assert!(memory < share, "{memory} bytes");
            Ok(())
        })
        .unwrap();

    // A small file that claims to be as large as the limits allow: its few bytes cannot hold that.
    for name in [0, 3] {
        let mut bytes = picture(name);
        let frame = segment(&bytes, &[0xC0, 0xC2]);
        bytes[frame + 5..frame + 9].copy_from_slice(&[0x27, 0x0F, 0x27, 0x0F]);
        let (image, memory) = decode(&bytes, DecodeLimits::default());
        let text = image.unwrap_err().to_string();
        assert!(text.contains("truncated") && memory < 100_000, "{memory}: {text}");
        bytes[frame + 5..frame + 9].fill(0xFF);
        let (image, memory) = decode(&bytes, DecodeLimits::default());
        assert!(
            matches!(image, Err(DataError::TooLarge { width: 65535, .. })) && memory < 100_000,
            "{memory}"
        );
    }
}
