//! Folders of pictures to folders of crops: names, resuming, stopping, errors.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use faceprior_data::Image;
use faceprior_faces::{
    AlignOptions, AlignSettings, CropFormat, Crops, DetectorConfig, FacesError, PictureRecord, Shard,
    Summary, Which, align, read_records,
};

/// A portrait of 112 by 112 pixels with one face.
fn portrait() -> Image {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens/mtcnn/astronaut.png");
    Image::read(path)
        .unwrap()
        .crop(140, 20, 168, 192)
        .resize_bilinear(112, 128)
}

fn blank() -> Image {
    Image::filled(120, 100, [90, 120, 150])
}

/// Two portraits side by side, the right one darker.
fn pair() -> Image {
    let one = portrait();
    let mut pixels = Vec::new();
    for row in one.pixels().chunks_exact(one.width() * 3) {
        pixels.extend_from_slice(row);
        pixels.extend(row.iter().map(|&x| (u16::from(x) * 3 / 4) as u8));
    }
    Image::new(one.width() * 2, one.height(), pixels)
}

fn folder(pictures: &[(&str, Image)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, image) in pictures {
        image.write(folder.path().join(name)).unwrap();
    }
    folder
}

fn one(which: Which, center_fallback: bool) -> AlignOptions {
    AlignOptions {
        settings: AlignSettings {
            crops: Crops::One {
                which,
                center_fallback,
            },
            ..AlignSettings::default()
        },
        ..AlignOptions::default()
    }
}

fn run(input: &Path, out: &Path, options: &AlignOptions) -> Result<Summary, FacesError> {
    align(input, out, options, &|_| {}, &AtomicBool::new(false))
}

fn records(out: &Path) -> Vec<PictureRecord> {
    read_records(&out.join("faces.jsonl"))
        .unwrap()
        .map(Result::unwrap)
        .collect()
}

/// Every file below a folder with its bytes.
fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                files.insert(
                    path.strip_prefix(folder).unwrap().to_owned(),
                    fs::read(&path).unwrap(),
                );
            }
        }
    }
    files
}

fn crops(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let is_crop = |path: &PathBuf| {
        path.extension()
            .is_some_and(|e| e != "json" && e != "jsonl" && e != "txt")
    };
    contents(folder)
        .into_iter()
        .filter(|(path, _)| is_crop(path))
        .collect()
}

#[test]
fn every_face_becomes_a_numbered_crop() {
    let input = folder(&[
        ("v1/frames_0001.jpg", portrait()),
        ("v1/frames_0002.jpg", blank()),
        ("v 2/frames_0001.jpg", pair()),
        ("v 2/frames_0001.png", portrait()),
    ]);
    let out = tempfile::tempdir().unwrap();
    let summary = run(input.path(), out.path(), &AlignOptions::default()).unwrap();
    let counts = summary.counts;
    assert_eq!((summary.listed, summary.before, summary.stopped), (4, 0, false));
    assert_eq!(
        (
            counts.pictures,
            counts.faces,
            counts.crops,
            counts.without_face,
            counts.unreadable
        ),
        (4, 4, 4, 1, 0)
    );
    let names: Vec<_> = crops(out.path()).into_keys().collect();
    let expected = [
        "v 2/frames_0001.png_0.jpg",
        "v 2/frames_0001_0.jpg",
        "v 2/frames_0001_1.jpg",
        "v1/frames_0001_0.jpg",
    ];
    assert_eq!(names, expected.map(PathBuf::from));
    for name in names {
        let crop = Image::read(out.path().join(name)).unwrap();
        assert_eq!((crop.width(), crop.height()), (112, 112));
    }
    assert_eq!(
        fs::read_to_string(out.path().join("no_face.txt")).unwrap(),
        "v1/frames_0002.jpg\n"
    );
    let records = records(out.path());
    let pictures: Vec<_> = records.iter().map(|record| record.picture.as_str()).collect();
    assert_eq!(
        pictures,
        [
            "v 2/frames_0001.jpg",
            "v 2/frames_0001.png",
            "v1/frames_0001.jpg",
            "v1/frames_0002.jpg"
        ]
    );
    assert_eq!((records[0].width, records[0].height), (224, 128));
    assert_eq!(records[0].faces[1].crop.as_deref(), Some("v 2/frames_0001_1.jpg"));
    let stored: Summary =
        serde_json::from_slice(&fs::read(out.path().join("summary.json")).unwrap()).unwrap();
    assert_eq!(stored, summary);
}

#[test]
fn one_face_keeps_the_relative_path() {
    // A narrow strip on the left moves the darker, right face to the centre.
    let wide = pair().crop(60, 0, 164 + 60, 128);
    let input = folder(&[
        ("a/a_0001.jpg", wide.clone()),
        ("b/b_0001.png", wide),
        ("b/none.jpg", blank()),
    ]);
    let chosen = |options: &AlignOptions| {
        let out = tempfile::tempdir().unwrap();
        let counts = run(input.path(), out.path(), options).unwrap().counts;
        let names: Vec<_> = crops(out.path()).into_keys().collect();
        (records(out.path()), counts, names, out)
    };
    let (found, counts, names, _) = chosen(&one(Which::Center, false));
    assert_eq!(names, ["a/a_0001.jpg", "b/b_0001.png"].map(PathBuf::from));
    assert_eq!((counts.crops, counts.without_face), (2, 1));
    let cut: Vec<_> = found[0].faces.iter().filter(|face| face.crop.is_some()).collect();
    assert_eq!(cut.len(), 1);
    let middle = |bounds: [f32; 4]| (bounds[0] + bounds[2]) / 2.0 - 112.0;
    assert!(
        found[0]
            .faces
            .iter()
            .all(|face| middle(face.bounds).abs() >= middle(cut[0].bounds).abs())
    );

    let (found, ..) = chosen(&one(Which::Best, false));
    let best = found[0].faces.iter().map(|face| face.score).fold(0.0, f32::max);
    assert!(
        found[0]
            .faces
            .iter()
            .all(|face| face.crop.is_none() || face.score == best)
    );

    let (found, counts, names, out) = chosen(&one(Which::Largest, true));
    assert_eq!((names.len(), counts.crops, counts.without_face), (3, 3, 1));
    assert_eq!(found[2].center_crop.as_deref(), Some("b/none.jpg"));
    let center = Image::read(out.path().join("b/none.jpg")).unwrap();
    assert!(
        center
            .pixels()
            .chunks_exact(3)
            .all(|p| p[0].abs_diff(90) < 4 && p[2].abs_diff(150) < 4)
    );
}

#[test]
fn sizes_formats_and_padding() {
    let input = folder(&[
        ("x.jpg", portrait()),
        ("x.png", portrait()),
        ("y.jpeg", portrait()),
    ]);
    let settings = AlignSettings {
        crops: Crops::One {
            which: Which::Center,
            center_fallback: false,
        },
        width: 96,
        format: CropFormat::Png,
        pad_to_square: true,
        ..AlignSettings::default()
    };
    let out = tempfile::tempdir().unwrap();
    run(
        input.path(),
        out.path(),
        &AlignOptions {
            settings,
            ..AlignOptions::default()
        },
    )
    .unwrap();
    let crops = crops(out.path());
    let names: Vec<_> = crops.keys().cloned().collect();
    assert_eq!(names, ["x.jpg.png", "x.png", "y.png"].map(PathBuf::from));
    for (name, bytes) in crops {
        assert!(bytes.starts_with(b"\x89PNG"), "{name:?}");
        let crop = Image::decode(&bytes, &name).unwrap();
        assert_eq!((crop.width(), crop.height()), (96, 112));
    }
    // Padding of 8 pixels on the left and right is not part of the picture.
    let face = &records(out.path())[1].faces[0];
    let plain = tempfile::tempdir().unwrap();
    run(input.path(), plain.path(), &one(Which::Center, false)).unwrap();
    let expected = &records(plain.path())[1].faces[0];
    for (a, b) in face
        .landmarks
        .iter()
        .flatten()
        .zip(expected.landmarks.iter().flatten())
    {
        assert!((a - b).abs() < 3.0, "{face:?} {expected:?}");
    }
}

#[test]
fn threads_do_not_change_a_byte() {
    let pictures: Vec<(String, Image)> = (0..7)
        .map(|i| {
            (
                format!("{i}.jpg"),
                if i % 3 == 2 {
                    blank()
                } else {
                    pair().crop(i * 9, 0, 200, 120)
                },
            )
        })
        .collect();
    let pictures: Vec<(&str, Image)> = pictures
        .iter()
        .map(|(name, image)| (name.as_str(), image.clone()))
        .collect();
    let input = folder(&pictures);
    let with = |threads| {
        let out = tempfile::tempdir().unwrap();
        run(
            input.path(),
            out.path(),
            &AlignOptions {
                threads: Some(threads),
                ..AlignOptions::default()
            },
        )
        .unwrap();
        let mut contents = contents(out.path());
        contents.remove(Path::new("summary.json"));
        contents
    };
    let alone = with(1);
    assert!(alone.len() > 6);
    assert!(with(2) == alone && with(3) == alone);
}

#[test]
fn an_interrupted_run_goes_on_and_ends_the_same() {
    let pictures: Vec<(String, Image)> = (0..6).map(|i| (format!("p{i}.jpg"), portrait())).collect();
    let pictures: Vec<(&str, Image)> = pictures
        .iter()
        .map(|(name, image)| (name.as_str(), image.clone()))
        .collect();
    let input = folder(&pictures);
    let options = AlignOptions {
        threads: Some(1),
        ..AlignOptions::default()
    };
    let whole = tempfile::tempdir().unwrap();
    run(input.path(), whole.path(), &options).unwrap();

    let out = tempfile::tempdir().unwrap();
    let (stop, seen) = (AtomicBool::new(false), AtomicUsize::new(0));
    let progress = |progress: &faceprior_faces::Progress| {
        seen.store(progress.now, Ordering::Relaxed);
        stop.store(progress.now == 2, Ordering::Relaxed);
    };
    let summary = align(input.path(), out.path(), &options, &progress, &stop).unwrap();
    assert!(summary.stopped);
    assert_eq!(
        (
            summary.listed,
            summary.counts.pictures,
            seen.load(Ordering::Relaxed)
        ),
        (6, 2, 2)
    );

    // Killed in the middle of a line, with a crop whose picture was not recorded.
    let journal = out.path().join("faces.jsonl");
    let mut text = fs::read(&journal).unwrap();
    text.extend_from_slice(b"{\"picture\":\"p2.jp");
    fs::write(&journal, text).unwrap();
    fs::write(out.path().join("p2_0.jpg"), b"half a crop").unwrap();

    let summary = run(input.path(), out.path(), &options).unwrap();
    assert_eq!(
        (summary.before, summary.counts.pictures, summary.stopped),
        (2, 6, false)
    );
    let clean = |folder: &Path| {
        let mut contents = contents(folder);
        contents.remove(Path::new("summary.json"));
        contents
    };
    let (found, expected) = (clean(out.path()), clean(whole.path()));
    assert!(found == expected, "{:?} {:?}", found.keys(), expected.keys());

    // Nothing left to do, then one picture more.
    let summary = run(input.path(), out.path(), &options).unwrap();
    assert_eq!((summary.before, summary.listed), (6, 6));
    blank().write(input.path().join("a.jpg")).unwrap();
    let summary = run(input.path(), out.path(), &options).unwrap();
    assert_eq!(
        (
            summary.before,
            summary.counts.pictures,
            summary.counts.without_face
        ),
        (6, 7, 1)
    );
}

#[test]
fn other_settings_and_other_pictures_are_refused() {
    let input = folder(&[("p.jpg", blank())]);
    let out = tempfile::tempdir().unwrap();
    run(input.path(), out.path(), &AlignOptions::default()).unwrap();
    let mut options = AlignOptions::default();
    options.settings.detector.min_face = 60.0;
    options.settings.height = 128;
    let error = run(input.path(), out.path(), &options).unwrap_err().to_string();
    assert!(error.contains("min_face is 40.0 there and 60.0 here"), "{error}");
    assert!(
        error.contains("height is 112 there and 128 here") && error.contains("hint:"),
        "{error}"
    );
    let other = folder(&[("p.jpg", portrait())]);
    let error = run(other.path(), out.path(), &AlignOptions::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains("input is"), "{error}");
}

#[test]
fn a_second_process_is_refused() {
    let input = folder(&[("p.jpg", blank())]);
    let out = tempfile::tempdir().unwrap();
    let first = fs::File::create(out.path().join("faces.jsonl")).unwrap();
    first.lock().unwrap();
    let error = run(input.path(), out.path(), &AlignOptions::default()).unwrap_err();
    assert!(matches!(error, FacesError::InUse { .. }), "{error}");
    drop(first);
    run(input.path(), out.path(), &AlignOptions::default()).unwrap();
}

#[test]
fn unreadable_pictures_are_listed_and_tried_again() {
    let input = folder(&[("good.jpg", portrait())]);
    let whole = fs::read(input.path().join("good.jpg")).unwrap();
    fs::write(input.path().join("cut\nshort.jpg"), &whole[..whole.len() / 2]).unwrap();
    fs::write(input.path().join("text.png"), b"this is no picture").unwrap();
    let out = tempfile::tempdir().unwrap();
    let summary = run(input.path(), out.path(), &AlignOptions::default()).unwrap();
    assert_eq!(
        (
            summary.counts.pictures,
            summary.counts.unreadable,
            summary.stopped
        ),
        (1, 2, false)
    );
    let list = fs::read_to_string(out.path().join("unreadable.txt")).unwrap();
    let lines: Vec<_> = list.lines().map(|line| line.split_once('\t').unwrap()).collect();
    assert_eq!([lines[0].0, lines[1].0], ["cut\\nshort.jpg", "text.png"]);
    assert!(lines[1].1.contains("neither JPEG nor PNG"), "{list}");

    let options = AlignOptions {
        max_unreadable: 1,
        ..AlignOptions::default()
    };
    let error = run(input.path(), out.path(), &options).unwrap_err().to_string();
    assert!(
        error.contains("2 pictures cannot be read, 1 are allowed") && error.contains("unreadable.txt"),
        "{error}"
    );

    fs::write(input.path().join("cut\nshort.jpg"), &whole).unwrap();
    let summary = run(input.path(), out.path(), &AlignOptions::default()).unwrap();
    assert_eq!(
        (summary.before, summary.counts.pictures, summary.counts.unreadable),
        (1, 2, 1)
    );
    assert!(out.path().join("cut\nshort_0.jpg").exists());
}

#[cfg(unix)]
#[test]
fn names_of_any_bytes_survive() {
    use std::os::unix::ffi::OsStrExt;
    let odd = Path::new(std::ffi::OsStr::from_bytes(b"d\xe9j\xe0 \"vu\".jpg"));
    let input = folder(&[("x.jpg", portrait())]);
    fs::rename(input.path().join("x.jpg"), input.path().join(odd)).unwrap();
    let out = tempfile::tempdir().unwrap();
    run(input.path(), out.path(), &AlignOptions::default()).unwrap();
    let crop = std::ffi::OsStr::from_bytes(b"d\xe9j\xe0 \"vu\"_0.jpg");
    assert!(out.path().join(crop).exists());
    let record = &records(out.path())[0];
    assert_eq!(
        faceprior_faces::names::unescape(&record.picture).as_deref(),
        Some(odd)
    );
    assert_eq!(
        faceprior_faces::names::unescape(record.faces[0].crop.as_ref().unwrap()).unwrap(),
        crop
    );
    assert_eq!(
        run(input.path(), out.path(), &AlignOptions::default())
            .unwrap()
            .before,
        1
    );
}

#[test]
fn lists_shards_and_folders_inside() {
    let input = folder(&[
        ("a.jpg", blank()),
        ("b.jpg", blank()),
        ("c/d.jpg", portrait()),
        ("e.jpg", blank()),
    ]);
    // An output folder inside the input is not aligned again.
    let out = input.path().join("aligned");
    assert_eq!(
        run(input.path(), &out, &AlignOptions::default()).unwrap().listed,
        4
    );
    assert_eq!(
        run(input.path(), &out, &AlignOptions::default()).unwrap().listed,
        4
    );
    assert!(matches!(
        run(input.path(), input.path(), &AlignOptions::default()),
        Err(FacesError::SameFolder { .. })
    ));

    let list = input.path().join("list.txt");
    fs::write(
        &list,
        format!("c/d.jpg\n{}\nc/d.jpg\n", input.path().join("a.jpg").display()),
    )
    .unwrap();
    let out = tempfile::tempdir().unwrap();
    assert_eq!(
        run(&list, out.path(), &AlignOptions::default()).unwrap().listed,
        2
    );
    assert!(out.path().join("c/d_0.jpg").exists());

    let out = tempfile::tempdir().unwrap();
    let part = |part| AlignOptions {
        shard: Some(Shard { part, parts: 3 }),
        ..AlignOptions::default()
    };
    let listed: usize = (1..=3)
        .map(|i| run(input.path(), out.path(), &part(i)).unwrap().listed)
        .sum();
    assert!(out.path().join("faces-2-of-3.jsonl").exists());
    // Without shards, all is done already.
    let summary = run(input.path(), out.path(), &AlignOptions::default()).unwrap();
    assert_eq!((summary.listed, summary.before), (listed, listed));
    assert!(
        run(input.path(), out.path(), &part(4))
            .unwrap_err()
            .to_string()
            .starts_with("shard is 4/3")
    );
}

#[test]
fn missing_and_empty_folders_are_named() {
    let empty = tempfile::tempdir().unwrap();
    let out = tempfile::tempdir().unwrap();
    let error = run(empty.path(), out.path(), &AlignOptions::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains("holds no pictures"), "{error}");
    let error = run(
        &empty.path().join("nowhere"),
        out.path(),
        &AlignOptions::default(),
    )
    .unwrap_err()
    .to_string();
    assert!(error.contains("nowhere"), "{error}");
}

#[cfg(unix)]
#[test]
fn a_crop_that_cannot_be_written_stops_and_loses_nothing() {
    let input = folder(&[("a.jpg", portrait()), ("b.jpg", portrait())]);
    let out = tempfile::tempdir().unwrap();
    // A folder where the second crop should go: as on a full disk, the write fails.
    fs::create_dir_all(out.path().join("b_0.jpg/x")).unwrap();
    let options = AlignOptions {
        threads: Some(1),
        ..AlignOptions::default()
    };
    let error = run(input.path(), out.path(), &options).unwrap_err().to_string();
    assert!(
        error.contains("cannot write") && error.contains("b_0.jpg"),
        "{error}"
    );
    assert_eq!(records(out.path()).len(), 1);
    fs::remove_dir_all(out.path().join("b_0.jpg")).unwrap();
    let summary = run(input.path(), out.path(), &options).unwrap();
    assert_eq!((summary.before, summary.counts.crops), (1, 2));
}

#[test]
#[ignore = "needs ../shared; run by cargo xtask check --full"]
fn batches_and_threads_on_lfw() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/lfw/images");
    let all = faceprior_data::files::list_images(&root).unwrap();
    let names: Vec<PathBuf> = all.iter().step_by(77).map(|path| root.join(path)).collect();
    let images: Vec<Image> = names.iter().map(|path| Image::read(path).unwrap()).collect();
    let config = DetectorConfig {
        min_face: 40.0,
        ..DetectorConfig::default()
    };
    let detector = faceprior_faces::Detector::new(config).unwrap();
    let one_by_one: Vec<_> = images.iter().map(|image| detector.detect(image)).collect();
    assert!(one_by_one.iter().filter(|faces| !faces.is_empty()).count() >= 99);
    for threads in 1..=3 {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        for batch in [1, 16, 100] {
            let found: Vec<_> = pool.install(|| {
                images
                    .chunks(batch)
                    .flat_map(|images| detector.detect_batch(images))
                    .collect()
            });
            assert_eq!(found, one_by_one, "{threads} threads, batches of {batch}");
        }
    }
}
