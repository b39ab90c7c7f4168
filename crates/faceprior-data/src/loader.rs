//! Batches from a data set: worker threads, a bounded queue, and an order that is a function of (seed, epoch).
//!
//! The caller's thread owns the order. It hands out tickets (picture, epoch, place in the epoch) for at most
//! `queue` batches ahead; workers read, decode, augment and send the ticket back with its picture; [`Loader::next`]
//! puts the pictures of one batch together, in order. Augmentation draws from (seed, epoch, place), so that neither
//! the number of workers nor their pace shows in the result. A ticket brings its picture back as bytes; they become
//! numbers where they join the batch, in one pass.

use std::any::Any;
use std::collections::{BTreeMap, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use serde::{Deserialize, Serialize};

use crate::{DataError, Dataset, Image, Transform, random};

/// How a [`Loader`] goes through its set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoaderConfig {
    /// Pictures a batch.
    pub batch_size: usize,
    /// Seed of the order and of the augmentation.
    pub seed: u64,
    /// Threads that read and decode. Their number does not change the batches.
    pub workers: usize,
    /// Batches that are prepared ahead; memory grows with it.
    pub queue: usize,
    /// Whether each epoch has an order of its own; without, pictures come in the order of the set.
    pub shuffle: bool,
    /// Whether an epoch's last batch is left out when it is not full.
    pub drop_last: bool,
    /// How many different pictures may be unreadable before the loader gives up.
    pub max_unreadable: usize,
}

impl Default for LoaderConfig {
    fn default() -> Self {
        LoaderConfig {
            batch_size: 32,
            seed: 0,
            workers: 2,
            queue: 2,
            shuffle: true,
            drop_last: true,
            max_unreadable: 100,
        }
    }
}

/// A place between batches: `batch` batches of epoch `epoch` are done. Both count from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// Whole passes through the set that are done.
    pub epoch: u64,
    /// Batches of this pass that are done.
    pub batch: u64,
}

/// Pictures ready for a network.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// `[N, 3, size, size]` in `[-1, 1]`, row-major.
    pub images: Vec<f32>,
    /// The four dimensions of `images`; N is below the batch size where pictures were unreadable or an epoch ends.
    pub shape: [usize; 4],
    /// The identity of each picture; empty in an unlabelled set.
    pub labels: Vec<u32>,
    /// The number of each picture in the data set.
    pub indices: Vec<usize>,
    /// Which batch this is. After it, a loader resumes at [`Loader::position`].
    pub position: Position,
    /// How long the caller waited for it.
    pub wait: Duration,
}

impl Batch {
    /// How many pictures there are.
    pub fn len(&self) -> usize {
        self.shape[0]
    }

    /// Whether there are none (a loader gives no such batch).
    pub fn is_empty(&self) -> bool {
        self.shape[0] == 0
    }
}

/// A picture that could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// Its number in the data set.
    pub index: usize,
    /// Its name.
    pub name: String,
    /// The error in full.
    pub reason: String,
}

/// One picture for a worker.
struct Ticket {
    /// Counts tickets from the loader's start.
    number: u64,
    index: usize,
    epoch: u64,
    /// Place in the epoch's order.
    place: u64,
}

/// What a worker made of a ticket.
struct Outcome {
    number: u64,
    index: usize,
    /// The picture cut to its size, and whether it is to be mirrored.
    picture: Result<(Image, bool), DataError>,
}

/// Endless batches of a [`Dataset`], prepared ahead on worker threads.
///
/// The order is a permutation by (seed, epoch), the augmentation a function of (seed, epoch, place in the epoch): the
/// number of workers does not show, and a loader started at any [`Position`] goes on exactly there.
pub struct Loader {
    dataset: Arc<dyn Dataset>,
    config: LoaderConfig,
    size: usize,
    /// The next batch to hand out, and the next to schedule.
    position: Position,
    scheduled: Position,
    /// The order of epoch `scheduled.epoch`.
    order: Vec<u32>,
    next_ticket: u64,
    next_wanted: u64,
    to_workers: Option<Sender<Ticket>>,
    from_workers: Receiver<Outcome>,
    /// What came back before its turn.
    early: HashMap<u64, Outcome>,
    stop: Arc<AtomicBool>,
    workers: Vec<JoinHandle<()>>,
    unreadable: BTreeMap<usize, Unreadable>,
}

impl Loader {
    /// Starts the workers at `start`; preparing begins with the first [`Loader::next`].
    ///
    /// # Errors
    /// [`DataError::Setting`] for a configuration that cannot work: no pictures, a batch of none or larger than the
    /// set with `drop_last`, no workers, no queue, a crop larger than the picture, a start beyond the epoch.
    pub fn new(
        dataset: Arc<dyn Dataset>,
        transform: Transform,
        config: LoaderConfig,
        start: Position,
    ) -> Result<Loader, DataError> {
        check(&*dataset, &transform, &config)?;
        let (to_workers, tickets) = unbounded();
        let (done, from_workers) = unbounded();
        let stop = Arc::new(AtomicBool::new(false));
        let mut loader = Loader {
            size: transform.size(),
            position: start,
            scheduled: start,
            order: Vec::new(),
            next_ticket: 0,
            next_wanted: 0,
            to_workers: Some(to_workers),
            from_workers,
            early: HashMap::new(),
            stop: stop.clone(),
            workers: Vec::new(),
            unreadable: BTreeMap::new(),
            dataset,
            config,
        };
        if start.batch >= loader.batches_per_epoch() {
            return Err(DataError::Setting {
                setting: "start of the loader",
                got: format!("batch {}", start.batch),
                expected: format!(
                    "below {}, the batches of an epoch\nhint: the set or the batch size changed since the checkpoint",
                    loader.batches_per_epoch()
                ),
            });
        }
        loader.order = loader.order_of(start.epoch);
        for worker in 0..loader.config.workers {
            let (tickets, done, stop) = (tickets.clone(), done.clone(), stop.clone());
            let (dataset, seed) = (loader.dataset.clone(), loader.config.seed);
            let handle = std::thread::Builder::new()
                .name(format!("loader-{worker}"))
                .spawn(move || work(&*dataset, &transform, seed, &tickets, &done, &stop))
                .map_err(|source| DataError::Io {
                    action: "start a thread for",
                    path: "loader".into(),
                    source,
                })?;
            loader.workers.push(handle);
        }
        Ok(loader)
    }

    /// The next batch, for ever: after an epoch's last batch comes the next epoch's first. A batch in which nothing
    /// could be read is passed over.
    ///
    /// # Errors
    /// [`DataError::TooManyUnreadable`] above the limit, or after a whole epoch without a readable picture; [`DataError::WorkerPanicked`] if the data set panicked.
    #[expect(
        clippy::should_implement_trait,
        reason = "an iterator cannot be asked for its position"
    )]
    pub fn next(&mut self) -> Result<Batch, DataError> {
        let begun = Instant::now();
        // An epoch without a single readable picture would be followed by others for ever. Wherever they begin, this
        // many batches hold a whole epoch; fewer may be the unreadable end of one and the unreadable start of the next.
        for _ in 1..2 * self.batches_per_epoch() {
            self.schedule();
            let mut batch = self.assemble()?;
            if !batch.is_empty() {
                batch.wait = begun.elapsed();
                return Ok(batch);
            }
        }
        let last = self
            .unreadable
            .last_key_value()
            .map(|(_, picture)| picture.reason.clone());
        Err(self.too_many_unreadable(last.unwrap_or_default()))
    }

    /// Where the next batch stands: a loader started here goes on with it.
    pub fn position(&self) -> Position {
        self.position
    }

    /// How many batches an epoch has.
    pub fn batches_per_epoch(&self) -> u64 {
        let (pictures, size) = (self.dataset.len(), self.config.batch_size);
        (if self.config.drop_last {
            pictures / size
        } else {
            pictures.div_ceil(size)
        }) as u64
    }

    /// The set that is read.
    pub fn dataset(&self) -> &Arc<dyn Dataset> {
        &self.dataset
    }

    /// The pictures that could not be read since this loader started, by number.
    pub fn unreadable(&self) -> impl ExactSizeIterator<Item = &Unreadable> {
        self.unreadable.values()
    }

    fn order_of(&self, epoch: u64) -> Vec<u32> {
        if self.config.shuffle {
            let mut rng = random::stream(self.config.seed, b"order   ", [epoch, 0]);
            random::permutation(&mut rng, self.dataset.len())
        } else {
            (0..self.dataset.len() as u32).collect()
        }
    }

    fn after(&self, position: Position) -> Position {
        if position.batch + 1 < self.batches_per_epoch() {
            Position {
                batch: position.batch + 1,
                ..position
            }
        } else {
            Position {
                epoch: position.epoch + 1,
                batch: 0,
            }
        }
    }

    /// The places of a batch in its epoch's order.
    fn places(&self, position: Position) -> std::ops::Range<usize> {
        let start = position.batch as usize * self.config.batch_size;
        start..(start + self.config.batch_size).min(self.dataset.len())
    }

    /// Hands out the tickets of the wanted batch and of `queue` more.
    fn schedule(&mut self) {
        let ahead = (self.config.queue as u64 + 1) * self.config.batch_size as u64;
        while self.next_ticket < self.next_wanted + ahead {
            let epoch = self.scheduled.epoch;
            for place in self.places(self.scheduled) {
                let ticket = Ticket {
                    number: self.next_ticket,
                    index: self.order[place] as usize,
                    epoch,
                    place: place as u64,
                };
                self.next_ticket += 1;
                self.to_workers.as_ref().and_then(|queue| queue.send(ticket).ok());
            }
            self.scheduled = self.after(self.scheduled);
            if self.scheduled.epoch != epoch && self.config.shuffle {
                self.order = self.order_of(self.scheduled.epoch);
            }
        }
    }

    /// Collects the batch at `position`, in the order of its tickets, and moves on.
    fn assemble(&mut self) -> Result<Batch, DataError> {
        let position = self.position;
        let places = self.places(position);
        let mut batch = Batch {
            images: Vec::with_capacity(places.len() * 3 * self.size * self.size),
            shape: [0, 3, self.size, self.size],
            labels: Vec::with_capacity(if self.dataset.num_classes() > 0 {
                places.len()
            } else {
                0
            }),
            indices: Vec::with_capacity(places.len()),
            position,
            wait: Duration::ZERO,
        };
        for _ in places {
            let Outcome { index, picture, .. } = self.wanted()?;
            self.next_wanted += 1;
            match picture {
                Ok((picture, mirror)) => {
                    picture.append_chw(&mut batch.images, mirror);
                    batch.labels.extend(self.dataset.label(index));
                    batch.indices.push(index);
                }
                Err(error) => self.count_unreadable(index, error)?,
            }
        }
        batch.shape[0] = batch.indices.len();
        self.position = self.after(position);
        Ok(batch)
    }

    /// The outcome whose turn it is.
    fn wanted(&mut self) -> Result<Outcome, DataError> {
        loop {
            if let Some(outcome) = self.early.remove(&self.next_wanted) {
                return Ok(outcome);
            }
            match self.from_workers.recv() {
                Ok(outcome) => self.early.insert(outcome.number, outcome),
                // Workers live as long as the loader and catch panics: this takes a thread killed from outside.
                Err(_) => {
                    let (name, message) = (self.position.batch.to_string(), "all workers are gone".into());
                    return Err(DataError::WorkerPanicked { name, message });
                }
            };
        }
    }

    fn count_unreadable(&mut self, index: usize, error: DataError) -> Result<(), DataError> {
        if matches!(error, DataError::WorkerPanicked { .. }) {
            return Err(error);
        }
        let known = self.unreadable.contains_key(&index);
        if !known {
            let picture = Unreadable {
                index,
                name: self.dataset.name(index),
                reason: error.to_string(),
            };
            tracing::warn!("picture {:?} is left out: {}", picture.name, picture.reason);
            self.unreadable.insert(index, picture);
        }
        if self.unreadable.len() > self.config.max_unreadable {
            return Err(self.too_many_unreadable(error.to_string()));
        }
        Ok(())
    }

    fn too_many_unreadable(&self, last: String) -> DataError {
        DataError::TooManyUnreadable {
            count: self.unreadable.len(),
            len: self.dataset.len(),
            limit: self.config.max_unreadable,
            last,
        }
    }
}

impl Drop for Loader {
    /// Waits for the pictures in the workers' hands (one each), not for the queue.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.to_workers = None;
        for worker in self.workers.drain(..) {
            // A worker catches its panics; were one to escape, there is nobody left to tell.
            let _ = worker.join();
        }
    }
}

/// A worker's life: until the loader stops or hangs up.
fn work(
    dataset: &dyn Dataset,
    transform: &Transform,
    seed: u64,
    tickets: &Receiver<Ticket>,
    done: &Sender<Outcome>,
    stop: &AtomicBool,
) {
    for ticket in tickets {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let Ticket {
            number,
            index,
            epoch,
            place,
        } = ticket;
        // A panic in a data set must reach the caller: swallowed, it would leave them waiting for ever.
        let picture = catch_unwind(AssertUnwindSafe(|| {
            let mut rng = random::stream(seed, b"augment ", [epoch, place]);
            Ok(transform.pixels(dataset.read(index)?, &mut rng))
        }))
        .unwrap_or_else(|panic| Err(panicked(dataset, index, &*panic)));
        let outcome = Outcome {
            number,
            index,
            picture,
        };
        if done.send(outcome).is_err() {
            return;
        }
    }
}

fn panicked(dataset: &dyn Dataset, index: usize, panic: &(dyn Any + Send)) -> DataError {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    let message = text
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".into());
    let name = catch_unwind(AssertUnwindSafe(|| format!("{:?}", dataset.name(index))));
    DataError::WorkerPanicked {
        name: name.unwrap_or_else(|_| index.to_string()),
        message,
    }
}

fn check(dataset: &dyn Dataset, transform: &Transform, config: &LoaderConfig) -> Result<(), DataError> {
    let refuse = |setting, got: usize, expected: &str| {
        Err(DataError::Setting {
            setting,
            got: got.to_string(),
            expected: expected.into(),
        })
    };
    if config.batch_size == 0 {
        return refuse("batch size", 0, "at least 1");
    }
    if config.workers == 0 {
        return refuse("number of loader workers", 0, "at least 1");
    }
    if config.queue == 0 {
        return refuse("loader queue", 0, "at least 1 batch ahead");
    }
    if dataset.is_empty() {
        return refuse("number of pictures", 0, "at least 1");
    }
    if config.drop_last && dataset.len() < config.batch_size {
        let expected = format!(
            "at most {}, the pictures of the set\nhint: make batches smaller or keep the last one (drop_last = false)",
            dataset.len()
        );
        return refuse("batch size", config.batch_size, &expected);
    }
    if transform.size() == 0 || transform.size() > transform.resized() {
        let expected = format!("from 1 to {}, the size after resizing", transform.resized());
        return refuse("size of the crop", transform.size(), &expected);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Image;
    use proptest::prelude::*;
    use std::sync::atomic::AtomicUsize;

    /// Pictures whose pixels say who they are; some are broken, some slow.
    struct Numbered {
        len: usize,
        broken: Vec<usize>,
        reads: AtomicUsize,
        pause: Duration,
    }

    impl Numbered {
        fn new(len: usize) -> Numbered {
            Numbered {
                len,
                broken: Vec::new(),
                reads: AtomicUsize::new(0),
                pause: Duration::ZERO,
            }
        }
    }

    impl Dataset for Numbered {
        fn len(&self) -> usize {
            self.len
        }
        fn read(&self, index: usize) -> Result<Image, DataError> {
            self.reads.fetch_add(1, Ordering::Relaxed);
            if !self.pause.is_zero() {
                std::thread::sleep(self.pause * (index % 3) as u32);
            }
            assert!(index != 77, "seventy-seven");
            if self.broken.contains(&index) {
                return Err(DataError::Decode {
                    name: self.name(index),
                    reason: "broken on purpose".into(),
                });
            }
            Ok(Image::noise(10, 9, index as u64))
        }
        fn label(&self, index: usize) -> Option<u32> {
            Some(index as u32 / 2)
        }
        fn num_classes(&self) -> usize {
            self.len.div_ceil(2)
        }
        fn name(&self, index: usize) -> String {
            format!("{index}.png")
        }
    }

    const AUGMENT: Transform = Transform::ResizeCropFlip {
        resize: 9,
        crop: 8,
        flip: true,
    };

    fn config(batch_size: usize) -> LoaderConfig {
        LoaderConfig {
            batch_size,
            seed: 3,
            max_unreadable: 0,
            ..LoaderConfig::default()
        }
    }

    fn loader(set: Numbered, config: LoaderConfig, start: Position) -> Loader {
        Loader::new(Arc::new(set), AUGMENT, config, start).unwrap()
    }

    /// Batches without their wait, which alone may differ.
    fn take(loader: &mut Loader, count: usize) -> Vec<Batch> {
        (0..count)
            .map(|_| Batch {
                wait: Duration::ZERO,
                ..loader.next().unwrap()
            })
            .collect()
    }

    #[test]
    fn an_epoch_holds_every_picture_once_in_an_order_of_its_own() {
        let mut loader = loader(
            Numbered::new(23),
            LoaderConfig {
                drop_last: false,
                ..config(5)
            },
            Position::default(),
        );
        assert_eq!(loader.batches_per_epoch(), 5);
        let mut epochs = Vec::new();
        for epoch in 0..3 {
            let batches = take(&mut loader, 5);
            assert_eq!(
                batches.iter().map(Batch::len).collect::<Vec<_>>(),
                [5, 5, 5, 5, 3]
            );
            assert!(batches.iter().all(|batch| batch.position.epoch == epoch));
            assert!(
                batches
                    .iter()
                    .all(|b| b.images.len() == b.shape.iter().product::<usize>())
            );
            for batch in &batches {
                let labels: Vec<u32> = batch.indices.iter().map(|&index| index as u32 / 2).collect();
                assert_eq!(batch.labels, labels);
            }
            let order: Vec<usize> = batches.into_iter().flat_map(|batch| batch.indices).collect();
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..23).collect::<Vec<_>>());
            epochs.push(order);
        }
        assert!(epochs[0] != epochs[1] && epochs[1] != epochs[2] && epochs[0] != epochs[2]);
        assert_eq!(loader.position(), Position { epoch: 3, batch: 0 });
    }

    #[test]
    fn without_shuffling_pictures_come_in_the_order_of_the_set() {
        let config = LoaderConfig {
            shuffle: false,
            ..config(4)
        };
        let mut loader = loader(Numbered::new(10), config, Position::default());
        let indices: Vec<_> = take(&mut loader, 3)
            .into_iter()
            .map(|batch| batch.indices)
            .collect();
        assert_eq!(indices, [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]);
    }

    #[test]
    fn workers_and_their_pace_do_not_show() {
        let run = |workers, queue, pause| {
            let set = Numbered {
                pause: Duration::from_micros(pause),
                ..Numbered::new(20)
            };
            take(
                &mut loader(
                    set,
                    LoaderConfig {
                        workers,
                        queue,
                        ..config(6)
                    },
                    Position::default(),
                ),
                7,
            )
        };
        let alone = run(1, 1, 0);
        assert_eq!(alone, run(4, 3, 300));
        assert_eq!(alone, run(3, 1, 50));
        // The same picture is augmented differently in another epoch.
        let views = |batches: &[Batch], index| -> Vec<Vec<f32>> {
            let of = |batch: &Batch| {
                let at = batch.indices.iter().position(|&i| i == index)?;
                Some(batch.images[at * 192..][..192].to_vec())
            };
            batches.iter().filter_map(of).collect()
        };
        let differ = (0..20)
            .filter(|&i| views(&alone, i).windows(2).any(|pair| pair[0] != pair[1]))
            .count();
        assert!(differ > 5, "{differ} pictures were seen in two ways");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn a_resumed_loader_goes_on_as_the_uninterrupted_one(
            len in 1usize..30, size in 1usize..9, drop_last: bool, shuffle: bool, at in 0usize..12, broken in 0usize..30,
        ) {
            let make = |start| {
                let set = Numbered { broken: vec![broken], ..Numbered::new(len) };
                let config = LoaderConfig {
                    drop_last: drop_last && len >= size, shuffle, max_unreadable: 1, ..config(size)
                };
                loader(set, config, start)
            };
            // A set of one broken picture has no batches at all.
            prop_assume!(!(len == 1 && broken == 0));
            let mut whole = make(Position::default());
            take(&mut whole, at);
            let mut resumed = make(whole.position());
            prop_assert_eq!(take(&mut whole, 5), take(&mut resumed, 5));
            prop_assert_eq!(whole.position(), resumed.position());
        }
    }

    #[test]
    fn unreadable_pictures_are_skipped_counted_once_and_named() {
        let set = Numbered {
            broken: vec![2, 5],
            ..Numbered::new(12)
        };
        let mut loader = loader(
            set,
            LoaderConfig {
                max_unreadable: 2,
                ..config(4)
            },
            Position::default(),
        );
        let batches = take(&mut loader, 9);
        assert_eq!(batches.iter().map(Batch::len).sum::<usize>(), 3 * 10);
        assert!(
            batches
                .iter()
                .all(|batch| !batch.indices.contains(&2) && batch.labels.len() == batch.len())
        );
        let names: Vec<_> = loader.unreadable().map(|picture| picture.name.as_str()).collect();
        assert_eq!(names, ["2.png", "5.png"]);
        assert!(
            loader
                .unreadable()
                .all(|picture| picture.reason.contains("broken on purpose"))
        );
    }

    #[test]
    fn unreadable_batches_on_both_sides_of_an_epochs_end_are_passed_over() {
        let set = Numbered {
            broken: vec![0],
            ..Numbered::new(2)
        };
        let config = LoaderConfig {
            max_unreadable: 1,
            ..config(1)
        };
        // Among so many shuffled epochs the broken picture is last of one and first of the next.
        let batches = take(&mut loader(set, config, Position::default()), 40);
        assert!(batches.iter().all(|batch| batch.indices == [1]));
        let adjacent = batches
            .windows(2)
            .any(|pair| pair[0].position.batch == 0 && pair[1].position.batch == 1);
        assert!(adjacent);
    }

    #[test]
    fn too_many_unreadable_pictures_fail_with_the_last_one_named() {
        let set = Numbered {
            broken: vec![2, 5],
            ..Numbered::new(12)
        };
        let mut loader = loader(
            set,
            LoaderConfig {
                max_unreadable: 1,
                ..config(4)
            },
            Position::default(),
        );
        let error = (0..3)
            .find_map(|_| loader.next().err())
            .expect("the second broken picture is one too many");
        let text = error.to_string();
        assert!(
            text.contains("2 pictures of 12") && text.contains(".png") && text.contains("hint:"),
            "{text}"
        );
    }

    #[test]
    fn a_batch_without_a_readable_picture_is_passed_over() {
        let set = Numbered {
            broken: vec![0, 1],
            ..Numbered::new(6)
        };
        let config = LoaderConfig {
            shuffle: false,
            max_unreadable: 2,
            ..config(2)
        };
        let mut loader = loader(set, config, Position::default());
        let batches = take(&mut loader, 3);
        assert_eq!(
            batches
                .iter()
                .map(|batch| batch.position.batch)
                .collect::<Vec<_>>(),
            [1, 2, 1]
        );
        let set = Numbered {
            broken: (0..6).collect(),
            ..Numbered::new(6)
        };
        let config = LoaderConfig {
            max_unreadable: 100,
            batch_size: 2,
            ..LoaderConfig::default()
        };
        let error = super::Loader::new(Arc::new(set), AUGMENT, config, Position::default())
            .unwrap()
            .next();
        assert!(matches!(
            error,
            Err(DataError::TooManyUnreadable { count: 6, .. })
        ));
    }

    #[test]
    fn a_panic_in_the_data_set_is_an_error_and_not_a_hang() {
        let config = LoaderConfig {
            shuffle: false,
            max_unreadable: 99,
            ..config(80)
        };
        let mut loader = loader(Numbered::new(80), config, Position::default());
        let text = loader.next().unwrap_err().to_string();
        assert!(
            text.contains("77.png") && text.contains("seventy-seven"),
            "{text}"
        );
    }

    #[test]
    fn what_is_prepared_ahead_is_bounded() {
        let set = Arc::new(Numbered::new(1000));
        let config = LoaderConfig {
            queue: 2,
            ..config(10)
        };
        let mut loader = Loader::new(set.clone(), AUGMENT, config, Position::default()).unwrap();
        loader.next().unwrap();
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(set.reads.load(Ordering::Relaxed), 30);
        assert!(loader.early.len() <= 30);
    }

    #[test]
    fn a_dropped_loader_does_not_wait_for_its_queue() {
        let set = Numbered {
            pause: Duration::from_millis(10),
            ..Numbered::new(4000)
        };
        let config = LoaderConfig {
            queue: 100,
            workers: 2,
            ..config(40)
        };
        let mut loader = loader(set, config, Position::default());
        loader.schedule();
        let begun = Instant::now();
        drop(loader);
        // The queue holds 4,000 pictures: 20 s of work.
        assert!(begun.elapsed() < Duration::from_secs(2));
    }

    #[test]
    fn what_cannot_work_is_refused_before_a_thread_starts() {
        let refused = |len, transform, config, start| {
            let result = Loader::new(Arc::new(Numbered::new(len)), transform, config, start);
            result.map(|_| ()).unwrap_err().to_string()
        };
        let start = Position::default();
        assert!(refused(3, AUGMENT, config(4), start).contains("drop_last"));
        assert!(refused(0, AUGMENT, config(4), start).contains("number of pictures"));
        assert!(refused(9, AUGMENT, config(0), start).contains("batch size"));
        assert!(
            refused(
                9,
                AUGMENT,
                LoaderConfig {
                    workers: 0,
                    ..config(4)
                },
                start
            )
            .contains("workers")
        );
        assert!(
            refused(
                9,
                AUGMENT,
                LoaderConfig {
                    queue: 0,
                    ..config(4)
                },
                start
            )
            .contains("queue")
        );
        let crop = Transform::ResizeCenterCrop { resize: 8, crop: 9 };
        assert!(refused(9, crop, config(4), start).contains("crop"));
        assert!(refused(9, AUGMENT, config(4), Position { epoch: 0, batch: 2 }).contains("checkpoint"));
    }
}
