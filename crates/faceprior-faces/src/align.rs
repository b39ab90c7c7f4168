//! From pictures to aligned faces on disk: many threads, bounded memory, resumable at any point.
//!
//! Every picture is worked on by one thread from its file to its crops, so that neither the number of threads nor the
//! company of other pictures can change a result. Memory holds the list of names and a few pictures a thread. See
//! [`PictureRecord`] for what is recorded.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use faceprior_data::files::{Durability, has_picture_extension, write_atomically};
use faceprior_data::{DataError, DecodeLimits, Encoding, Image, ImageList};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::FacesError;
use crate::detect::{Detector, DetectorConfig, Face};
use crate::journal::{Counts, FaceRecord, Journal, PictureRecord};
use crate::names::escape;
use crate::similarity::{similarity, template};
use crate::warp::warp;

/// Which face of a picture is taken where one is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Which {
    /// The face whose box is nearest the picture's centre.
    Center,
    /// The face with the largest box.
    Largest,
    /// The face with the highest score.
    Best,
}

/// What becomes of a picture's faces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Crops {
    /// Every face becomes a crop, `<folder>/<picture>_<number>.jpg`, counted from 0, the most certain first.
    ///
    /// `<picture>` is the picture's name without `.jpg`. Any other extension stays (`a.png` becomes `a.png_0.jpg`), so
    /// that no two pictures of a folder ever write to the same file.
    All,
    /// One face a picture, under the picture's own relative path: the layout of labelled and verification sets.
    One {
        /// Which.
        which: Which,
        /// Cut the centre out of a picture without a face, instead of leaving the picture out.
        center_fallback: bool,
    },
}

/// File format of crops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CropFormat {
    /// JPEG. With [`Crops::One`], a picture that is called `.png` keeps its name and is written as PNG.
    Jpeg {
        /// 1 to 100; 95 or more loses nothing that matters.
        quality: u8,
    },
    /// PNG. With [`Crops::One`], `.png` takes the place of another extension.
    Png,
}

/// Everything that a crop depends on; recorded in the output folder, which cannot be gone on with otherwise.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AlignSettings {
    /// Which faces, under which names.
    pub crops: Crops,
    /// How faces are found.
    pub detector: DetectorConfig,
    /// Pad pictures to squares with black before detection, as the published system did.
    pub pad_to_square: bool,
    /// Width of the crops in pixels.
    pub width: usize,
    /// Height of the crops in pixels; see [`template`] for where the face goes.
    pub height: usize,
    /// File format of the crops.
    pub format: CropFormat,
    /// Pictures with more pixels count as unreadable.
    pub max_pixels: usize,
}

impl Default for AlignSettings {
    /// All faces from 40 pixels on, 112×112, JPEG of quality 95.
    fn default() -> Self {
        Self {
            crops: Crops::All,
            detector: DetectorConfig {
                min_face: 40.0,
                ..DetectorConfig::default()
            },
            pad_to_square: false,
            width: 112,
            height: 112,
            format: CropFormat::Jpeg { quality: 95 },
            max_pixels: DecodeLimits::default().max_pixels,
        }
    }
}

impl AlignSettings {
    /// As the published system cut its training faces: [`DetectorConfig::seed`] on pictures padded to squares.
    pub fn seed() -> Self {
        Self {
            detector: DetectorConfig::seed(),
            pad_to_square: true,
            ..Self::default()
        }
    }

    fn check(&self) -> Result<(), FacesError> {
        self.detector.check()?;
        for (name, side) in [("width", self.width), ("height", self.height)] {
            if !(8..=8192).contains(&side) {
                return Err(FacesError::Setting {
                    name,
                    got: side.to_string(),
                    expected: "8 to 8192 pixels",
                });
            }
        }
        match self.format {
            CropFormat::Jpeg { quality } if !(1..=100).contains(&quality) => Err(FacesError::Setting {
                name: "JPEG quality",
                got: quality.to_string(),
                expected: "1 to 100, such as 95",
            }),
            _ => Ok(()),
        }
    }
}

/// One of several parts that machines or jobs share a folder in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// From 1 to `parts`.
    pub part: usize,
    /// How many there are.
    pub parts: usize,
}

impl Shard {
    /// What sets the names of a part's own files apart.
    pub(crate) fn suffix(shard: Option<Self>) -> String {
        shard.map_or_else(String::new, |shard| format!("-{}-of-{}", shard.part, shard.parts))
    }

    /// Whether a picture belongs to this part: by its name alone, so that added pictures move no other.
    fn has(&self, picture: &str) -> bool {
        let fnv = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        let hash = picture.bytes().fold(0xcbf2_9ce4_8422_2325, fnv);
        hash % self.parts as u64 == self.part as u64 - 1
    }
}

/// What to do, and how; only [`AlignOptions::settings`] changes results.
#[derive(Clone, Debug)]
pub struct AlignOptions {
    /// What the crops depend on.
    pub settings: AlignSettings,
    /// Threads; `None` for one a core.
    pub threads: Option<usize>,
    /// Fail when more pictures than this cannot be read.
    pub max_unreadable: usize,
    /// Only this part of the pictures.
    pub shard: Option<Shard>,
}

impl Default for AlignOptions {
    fn default() -> Self {
        Self {
            settings: AlignSettings::default(),
            threads: None,
            max_unreadable: 1000,
            shard: None,
        }
    }
}

/// How far a run is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    /// Pictures to align, over all runs into the folder.
    pub total: usize,
    /// Pictures that earlier runs finished.
    pub before: usize,
    /// Pictures that this run has been through.
    pub now: usize,
    /// Faces that this run has found.
    pub faces: u64,
    /// Pictures that this run cannot read.
    pub unreadable: u64,
}

/// What a run leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Pictures that were to be aligned.
    pub listed: usize,
    /// Pictures that earlier runs had finished.
    pub before: usize,
    /// Everything that is finished in the folder (in this shard's part of it).
    #[serde(flatten)]
    pub counts: Counts,
    /// Wall clock of this run.
    pub seconds: f64,
    /// Whether the run was told to stop before its end.
    pub stopped: bool,
}

/// Aligns the pictures of `input`, a folder (searched with its subfolders) or a list with one path a line, into `out`.
///
/// Crops go below `out` under the relative paths of their pictures; see [`Crops`]. Beside them lie `faces.jsonl` (every
/// finished picture with its faces, as [`PictureRecord`]), `no_face.txt`, `unreadable.txt` (name, tab, reason),
/// `align.json` (the settings) and `summary.json`. Run again, it goes on where it was, and tries again what it could
/// not read. `progress` is called after every picture, from any thread; once `stop` is true, the run ends after the
/// pictures at hand.
///
/// # Errors
/// Settings that cannot work; an input that cannot be listed or is empty; an output folder that was made with other
/// settings or is in use; a crop or record that cannot be written; more unreadable pictures than allowed. What was
/// finished before is recorded in each case.
pub fn align(
    input: &Path,
    out: &Path,
    options: &AlignOptions,
    progress: &(dyn Fn(&Progress) + Sync),
    stop: &AtomicBool,
) -> Result<Summary, FacesError> {
    let started = Instant::now();
    options.settings.check()?;
    if let Some(Shard { part, parts }) = options.shard
        && !(1..=parts).contains(&part)
    {
        return Err(FacesError::Setting {
            name: "shard",
            got: format!("{part}/{parts}"),
            expected: "1/n to n/n",
        });
    }
    let worker = Worker {
        detector: Detector::new(options.settings.detector.clone())?,
        settings: &options.settings,
        out,
    };
    let list = ImageList::open(input)?;
    let absolute_input = fs::canonicalize(input).unwrap_or_else(|_| input.to_owned());
    let ours = pictures(&list, input, &absolute_input, out)?;

    let mut journal = Journal::open(out, &escape(&absolute_input), &options.settings, options.shard)?;
    let ours = ours.into_iter().filter(|&index| {
        options
            .shard
            .is_none_or(|shard| shard.has(&escape(list.listed_path(index))))
    });
    let (done, pending): (Vec<usize>, Vec<usize>) =
        ours.partition(|&index| journal.is_done(&escape(list.listed_path(index))));
    let (before, total) = (done.len(), done.len() + pending.len());
    drop(done);

    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(options.threads.unwrap_or(0))
        .thread_name(|i| format!("align-{i}"))
        .build()
        .map_err(|error| FacesError::Output {
            action: "start threads for",
            path: out.to_owned(),
            source: std::io::Error::other(error),
        })?;
    let seen = Mutex::new(Progress {
        total,
        before,
        ..Progress::default()
    });
    let failed = AtomicBool::new(false);
    let ended = || stop.load(Ordering::Relaxed) || failed.load(Ordering::Relaxed);
    let work = |&index: &usize| -> Option<Result<Outcome, FacesError>> {
        if ended() {
            return None;
        }
        let outcome = worker.align(&list, index);
        let now = {
            let mut seen = seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            seen.now += 1;
            match &outcome {
                Ok(Outcome::Finished(record)) => seen.faces += record.faces.len() as u64,
                Ok(Outcome::Unreadable { .. }) => seen.unreadable += 1,
                Err(_) => failed.store(true, Ordering::Relaxed),
            }
            *seen
        };
        progress(&now);
        Some(outcome)
    };

    progress(&Progress {
        total,
        before,
        ..Progress::default()
    });
    let mut failure = None;
    // In stretches, so that records come in the order of the list and what waits for its record is bounded.
    for stretch in pending.chunks(32 * pool.current_num_threads()) {
        let outcomes: Vec<_> = pool.install(|| stretch.par_iter().with_max_len(1).map(work).collect());
        for outcome in outcomes.into_iter().flatten() {
            let kept = match outcome {
                Ok(Outcome::Finished(record)) => journal.finished(&record),
                Ok(Outcome::Unreadable { picture, reason }) => {
                    tracing::warn!("{reason}");
                    journal
                        .unreadable(&picture, &reason)
                        .and_then(|()| too_many(&journal, options, &reason))
                }
                Err(error) => Err(error),
            };
            if let Err(error) = kept {
                failure.get_or_insert(error);
            }
        }
        if let Err(error) = journal.commit_if_due() {
            failure.get_or_insert(error);
        }
        if failure.is_some() || ended() {
            break;
        }
    }
    if let Err(error) = journal.commit() {
        failure.get_or_insert(error);
    }
    if let Some(error) = failure {
        return Err(error);
    }
    let now = seen
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
        .now;
    let summary = Summary {
        listed: total,
        before,
        counts: journal.counts(),
        seconds: started.elapsed().as_secs_f64(),
        stopped: before + now < total,
    };
    let part = Shard::suffix(options.shard);
    let text = serde_json::to_string_pretty(&summary).unwrap_or_default() + "\n";
    write_atomically(
        &out.join(format!("summary{part}.json")),
        text.as_bytes(),
        Durability::Synced,
    )?;
    Ok(summary)
}

fn too_many(journal: &Journal, options: &AlignOptions, last: &str) -> Result<(), FacesError> {
    let count = journal.counts().unreadable as usize;
    if count <= options.max_unreadable {
        return Ok(());
    }
    Err(FacesError::TooManyUnreadable {
        count,
        limit: options.max_unreadable,
        last: last.to_owned(),
        list: journal.unreadable_list().to_owned(),
    })
}

/// The pictures of the list that are to be aligned: each once, and none of an output folder inside the input folder.
fn pictures(
    list: &ImageList,
    input: &Path,
    absolute_input: &Path,
    out: &Path,
) -> Result<Vec<usize>, FacesError> {
    use faceprior_data::Dataset;
    let all = 0..list.len();
    if absolute_input.is_dir() {
        let absolute_out =
            fs::canonicalize(out).unwrap_or_else(|_| std::path::absolute(out).unwrap_or_default());
        if absolute_out == absolute_input {
            return Err(FacesError::SameFolder { path: out.to_owned() });
        }
        let Ok(inside) = absolute_out.strip_prefix(absolute_input) else {
            return Ok(all.collect());
        };
        let pictures: Vec<usize> = all
            .filter(|&index| !list.listed_path(index).starts_with(inside))
            .collect();
        if pictures.is_empty() {
            let expected = "pictures outside the output folder";
            return Err(DataError::Empty {
                path: input.to_owned(),
                expected,
            }
            .into());
        }
        return Ok(pictures);
    }
    let mut outputs = HashMap::with_capacity(list.len());
    let mut pictures = Vec::with_capacity(list.len());
    for index in all {
        let output = list.output_path(index);
        match outputs.get(&output) {
            None => {
                outputs.insert(output, index);
                pictures.push(index);
            }
            Some(&first) if list.listed_path(first) == list.listed_path(index) => {}
            Some(&first) => {
                return Err(FacesError::Collision {
                    list: input.to_owned(),
                    first: list.listed_path(first).to_owned(),
                    second: list.listed_path(index).to_owned(),
                    output,
                });
            }
        }
    }
    Ok(pictures)
}

enum Outcome {
    Finished(PictureRecord),
    Unreadable { picture: String, reason: String },
}

struct Worker<'a> {
    detector: Detector,
    settings: &'a AlignSettings,
    out: &'a Path,
}

impl Worker<'_> {
    /// One picture from its file to its crops. An error is one of writing.
    fn align(&self, list: &ImageList, index: usize) -> Result<Outcome, FacesError> {
        let picture = escape(list.listed_path(index));
        let image = match self.read(&list.path(index)) {
            Ok(image) => image,
            Err(error) => {
                return Ok(Outcome::Unreadable {
                    picture,
                    reason: error.to_string(),
                });
            }
        };
        let (width, height) = (image.width(), image.height());
        let image = if self.settings.pad_to_square {
            image.pad_to_square()
        } else {
            image
        };
        let (left, top) = ((image.width() - width) / 2, (image.height() - height) / 2);

        let faces = self.detector.detect(&image);
        let mut record = PictureRecord {
            picture,
            width,
            height,
            faces: faces
                .iter()
                .map(|face| face.moved(left as f32, top as f32))
                .map(
                    |Face {
                         bounds,
                         score,
                         landmarks,
                     }| FaceRecord {
                        bounds,
                        score,
                        landmarks,
                        crop: None,
                    },
                )
                .collect(),
            center_crop: None,
        };
        let path = list.output_path(index);
        match self.settings.crops {
            Crops::All => {
                for (number, face) in faces.iter().enumerate() {
                    if let Some(crop) = self.cut(&image, face) {
                        record.faces[number].crop = Some(self.write(&crop, &self.numbered(&path, number))?);
                    }
                }
            }
            Crops::One {
                which,
                center_fallback,
            } => {
                let path = self.renamed(list, &path);
                let crop = choose(which, &image, &faces)
                    .and_then(|number| Some((number, self.cut(&image, &faces[number])?)));
                if let Some((number, crop)) = crop {
                    record.faces[number].crop = Some(self.write(&crop, &path)?);
                } else if center_fallback {
                    record.center_crop = Some(self.write(&self.center(&image), &path)?);
                }
            }
        }
        Ok(Outcome::Finished(record))
    }

    fn read(&self, path: &Path) -> Result<Image, DataError> {
        let limits = DecodeLimits {
            max_pixels: self.settings.max_pixels,
        };
        let image = Image::read_within(path, limits)?;
        let side = image.width().max(image.height());
        if self.settings.pad_to_square && side.saturating_mul(side) > limits.max_pixels {
            let (name, max_pixels) = (format!("{path:?} (padded to a square)"), limits.max_pixels);
            return Err(DataError::TooLarge {
                name,
                width: side,
                height: side,
                max_pixels,
            });
        }
        Ok(image)
    }

    /// The aligned face, unless its points are no face's (all in one place).
    fn cut(&self, image: &Image, face: &Face) -> Option<Image> {
        let (width, height) = (self.settings.width, self.settings.height);
        let transform = similarity(&face.landmarks, &template(width, height))?;
        Some(warp(image, &transform, width, height))
    }

    /// The largest part of the crops' shape around the centre, resized.
    fn center(&self, image: &Image) -> Image {
        let (width, height) = (self.settings.width, self.settings.height);
        let scale = (image.width() as f64 / width as f64).min(image.height() as f64 / height as f64);
        let side = |length: usize| ((length as f64 * scale) as usize).max(1);
        let (w, h) = (side(width), side(height));
        let (x, y) = ((image.width() - w) / 2, (image.height() - h) / 2);
        image
            .crop(x as isize, y as isize, w, h)
            .resize_bilinear(width, height)
    }

    /// Writes a crop and answers its escaped name.
    fn write(&self, crop: &Image, path: &Path) -> Result<String, FacesError> {
        let encoding = match (self.settings.format, Encoding::from_path(path)?) {
            (CropFormat::Jpeg { quality }, Encoding::Jpeg { .. }) => Encoding::Jpeg { quality },
            (_, by_name) => by_name,
        };
        let bytes = crop.encode(encoding)?;
        write_atomically(&self.out.join(path), &bytes, Durability::Renamed).map_err(|error| match error {
            DataError::Io { action, path, source } => FacesError::Output { action, path, source },
            other => other.into(),
        })?;
        Ok(escape(path))
    }

    /// Name of a numbered crop; see [`Crops::All`].
    fn numbered(&self, path: &Path, number: usize) -> PathBuf {
        let stem = path.file_stem().unwrap_or_default();
        // A stem that looks like another picture's full name (`a.png.jpg` beside `a.png`) stays apart from it.
        let shortened =
            path.extension().is_some_and(|e| e == "jpg") && !has_picture_extension(Path::new(stem));
        let mut name: OsString = if shortened {
            stem
        } else {
            path.file_name().unwrap_or_default()
        }
        .to_owned();
        name.push(match self.settings.format {
            CropFormat::Jpeg { .. } => format!("_{number}.jpg"),
            CropFormat::Png => format!("_{number}.png"),
        });
        path.with_file_name(name)
    }

    /// Name of the only crop of a picture: its own, with an extension that is the format's.
    fn renamed(&self, list: &ImageList, path: &Path) -> PathBuf {
        match (self.settings.format, Encoding::from_path(path)) {
            (CropFormat::Png, Ok(Encoding::Jpeg { .. })) => {
                let replaced = path.with_extension("png");
                if !list.root().join(&replaced).exists() {
                    return replaced;
                }
                // The picture of that name has the first claim on it.
                let mut appended = path.as_os_str().to_owned();
                appended.push(".png");
                appended.into()
            }
            (_, Ok(_)) => path.to_owned(),
            // A list may name pictures that have no known extension.
            (format, Err(_)) => {
                let mut appended = path.as_os_str().to_owned();
                appended.push(if format == CropFormat::Png { ".png" } else { ".jpg" });
                appended.into()
            }
        }
    }
}

/// The number of the face that is wanted; of equals the more certain.
fn choose(which: Which, image: &Image, faces: &[Face]) -> Option<usize> {
    let (x, y) = (image.width() as f32 / 2.0, image.height() as f32 / 2.0);
    let rank = |face: &Face| match which {
        Which::Center => {
            let [face_x, face_y] = face.center();
            (face_x - x).hypot(face_y - y)
        }
        Which::Largest => -face.area(),
        Which::Best => -face.score,
    };
    (0..faces.len()).min_by(|&a, &b| rank(&faces[a]).total_cmp(&rank(&faces[b])))
}
