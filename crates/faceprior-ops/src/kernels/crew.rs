//! Rayon's threads, kept awake from one kernel to the next.
//!
//! The forward pass of one picture is a hundred kernels of ten to some hundred microseconds. A thread that falls asleep
//! after one of them is late for the next: waking it takes as long as a small kernel. So the thread that [`lead`]s a
//! computation has a crew: the other threads of its pool keep watch for its next kernel, and meanwhile do what else rayon
//! has for them, until nothing has come for [`PATIENCE`].

use std::any::Any;
use std::cell::RefCell;
use std::hint::spin_loop;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rayon::prelude::*;

/// How long a thread keeps watch for nothing: longer than the gaps between the kernels of a training step.
const PATIENCE: Duration = Duration::from_millis(2);
/// How long a thread keeps watch before it returns to rayon, which may have called it in the middle of something else, and
/// is called again.
const WATCH: Duration = Duration::from_millis(20);
/// Looks before the processor is offered to other threads.
const SPINS: usize = 64;

/// Runs `work` on a thread of the current rayon pool, whose other threads stay awake between the CPU kernels that `work`
/// calls.
///
/// Without it everything works and has the same bits, but a thread that has fallen asleep is woken for each kernel: one picture
/// through MobileFaceNet takes half as long again. Call it around a whole computation. Threads that wait look for work for
/// two milliseconds before they sleep, and offer the processor to others as they do.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use faceprior_ops::{Conv2dOptions, FeatureMap, conv2d, lead};
///
/// let device = Device::flex();
/// let (x, weight) = (Tensor::ones([1, 16, 8, 8], &device), Tensor::ones([16, 16, 3, 3], &device));
/// let y = lead(|| conv2d(FeatureMap::from_nchw(x), weight, Conv2dOptions::same3x3()));
/// assert_eq!(y.dims(), [1, 16, 8, 8]);
/// ```
pub fn lead<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| {
        let before = match (rayon::current_num_threads(), rayon::current_thread_index()) {
            (threads @ 2.., Some(leader)) => ROLE.replace(Role::Leads(Crew::new(threads, leader))),
            _ => ROLE.take(),
        };
        let _back = Back(before);
        work()
    })
}

/// Runs `task(0)` … `task(count - 1)` on rayon's threads.
pub(crate) fn parallel(count: usize, task: impl Fn(usize) + Send + Sync) {
    if count == 1 {
        return task(0);
    }
    let crew = ROLE.with_borrow(|role| match role {
        Role::Leads(crew) => Some(Arc::clone(crew)),
        _ => None,
    });
    match crew {
        Some(crew) if crew.is_on_watch() => {
            // A task that calls a kernel itself leaves that to rayon.
            let _back = Back(ROLE.replace(Role::Watches));
            crew.run(count, &task);
        }
        _ => (0..count).into_par_iter().for_each(task),
    }
}

/// [`parallel`] for each `size` values, the last may be fewer: `task(index, values)`.
pub(crate) fn parallel_chunks<T: Send>(
    values: &mut [T],
    size: usize,
    task: impl Fn(usize, &mut [T]) + Send + Sync,
) {
    // A lock that nobody waits for lends each task its chunk.
    let chunks: Vec<_> = values.chunks_mut(size).map(Mutex::new).collect();
    parallel(chunks.len(), |index| {
        let mut chunk = chunks[index].lock().unwrap_or_else(PoisonError::into_inner);
        task(index, &mut chunk);
    });
}

/// What a thread is to a crew.
#[derive(Default)]
enum Role {
    #[default]
    None,
    Leads(Arc<Crew>),
    Watches,
}

thread_local! {
    static ROLE: RefCell<Role> = RefCell::default();
}

/// Gives the thread an earlier role back, however the later one ends.
struct Back(Role);

impl Drop for Back {
    fn drop(&mut self) {
        if let Role::Leads(crew) = ROLE.replace(std::mem::take(&mut self.0)) {
            crew.dismissed.store(true, Ordering::Relaxed);
        }
    }
}

/// One leader's.
struct Crew {
    /// The kernel that is at work, or null. What it points to lives until nobody is [`inside`](Self::inside).
    kernel: AtomicPtr<Kernel<'static>>,
    /// Threads other than the leader that may be looking at the kernel.
    inside: AtomicUsize,
    /// The tasks of each thread, which others take when theirs are done.
    parts: Box<[Part]>,
    leader: usize,
    /// Threads that keep watch or have been called to.
    called: AtomicUsize,
    /// Threads that keep watch.
    watching: AtomicUsize,
    dismissed: AtomicBool,
}

/// The tasks from `next` to `end`, on a cache line of their own.
#[repr(align(128))]
#[derive(Default)]
struct Part {
    next: AtomicUsize,
    end: AtomicUsize,
}

struct Kernel<'a> {
    task: &'a (dyn Fn(usize) + Sync),
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Crew {
    fn new(threads: usize, leader: usize) -> Arc<Self> {
        Arc::new(Self {
            kernel: AtomicPtr::new(null_mut()),
            inside: AtomicUsize::new(0),
            parts: (0..threads).map(|_| Part::default()).collect(),
            leader,
            called: AtomicUsize::new(0),
            watching: AtomicUsize::new(0),
            dismissed: AtomicBool::new(false),
        })
    }

    /// Calls those who do not keep watch. Whether any does.
    fn is_on_watch(self: &Arc<Self>) -> bool {
        for _ in self.called.load(Ordering::Relaxed)..self.parts.len() - 1 {
            self.called.fetch_add(1, Ordering::Relaxed);
            self.call();
        }
        self.watching.load(Ordering::Relaxed) > 0
    }

    fn call(self: &Arc<Self>) {
        let crew = Arc::clone(self);
        rayon::spawn(move || crew.keep_watch());
    }

    /// Takes part in the leader's kernels and in whatever else rayon has to do.
    fn keep_watch(self: Arc<Self>) {
        let me = rayon::current_thread_index().unwrap_or(self.leader);
        let free = ROLE.with_borrow(|role| matches!(role, Role::None));
        if me == self.leader || !free {
            self.called.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        let back = Back(ROLE.replace(Role::Watches));
        self.watching.fetch_add(1, Ordering::Relaxed);
        let start = Instant::now();
        let mut last = start;
        let mut spins = 0;
        let again = loop {
            let worked = self.take_part(me) || rayon::yield_now() == Some(rayon::Yield::Executed);
            let now = Instant::now();
            if worked {
                last = now;
            }
            if now - last > PATIENCE || self.dismissed.load(Ordering::Relaxed) {
                break false;
            }
            if now - start > WATCH {
                break true;
            }
            wait(&mut spins);
        };
        self.watching.fetch_sub(1, Ordering::Relaxed);
        drop(back);
        if again {
            self.call();
        } else {
            self.called.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Runs tasks of the kernel that is at work. Whether there were any.
    fn take_part(&self, me: usize) -> bool {
        if self.kernel.load(Ordering::Relaxed).is_null() {
            return false;
        }
        // Whoever is counted before the leader has taken the kernel away is waited for; whoever comes later finds none.
        self.inside.fetch_add(1, Ordering::SeqCst);
        // SAFETY: not null, it lives until the leader has seen that nobody is inside.
        let kernel = unsafe { self.kernel.load(Ordering::SeqCst).as_ref() };
        let worked = kernel.is_some_and(|kernel| self.work(kernel, me));
        self.inside.fetch_sub(1, Ordering::Release);
        worked
    }

    /// Runs tasks until all are taken. Whether any was left.
    fn work(&self, kernel: &Kernel, me: usize) -> bool {
        let threads = self.parts.len();
        let mut worked = false;
        let tasks = || {
            for part in (me..me + threads).map(|part| &self.parts[part % threads]) {
                let end = part.end.load(Ordering::Relaxed);
                loop {
                    let task = part.next.fetch_add(1, Ordering::Relaxed);
                    if task >= end {
                        break;
                    }
                    worked = true;
                    (kernel.task)(task);
                }
            }
        };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(tasks)) {
            *kernel.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
        worked
    }

    /// Runs all tasks; the leader's.
    fn run(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        let threads = self.parts.len();
        for (index, part) in self.parts.iter().enumerate() {
            part.next.store(count * index / threads, Ordering::Relaxed);
            part.end.store(count * (index + 1) / threads, Ordering::Relaxed);
        }
        let kernel = Kernel {
            task,
            panic: Mutex::default(),
        };
        self.kernel
            .store(std::ptr::from_ref(&kernel).cast_mut().cast(), Ordering::SeqCst);
        self.work(&kernel, self.leader);
        self.kernel.store(null_mut(), Ordering::SeqCst);
        let mut spins = 0;
        while self.inside.load(Ordering::SeqCst) > 0 {
            wait(&mut spins);
        }
        if let Some(panic) = kernel.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
            resume_unwind(panic);
        }
    }
}

fn wait(spins: &mut usize) {
    *spins += 1;
    if spins.is_multiple_of(SPINS) {
        thread::yield_now();
    } else {
        spin_loop();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn in_pool<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.unwrap().install(|| lead(work))
    }

    /// How often each task ran.
    fn counts(count: usize) -> Vec<usize> {
        let counts: Vec<_> = (0..count).map(|_| AtomicUsize::new(0)).collect();
        parallel(count, |task| {
            counts[task].fetch_add(1, Ordering::Relaxed);
        });
        counts.into_iter().map(AtomicUsize::into_inner).collect()
    }

    /// Leads until others have joined in.
    fn wait_for_watch() {
        let mut threads = HashSet::new();
        while threads.len() < rayon::current_num_threads() {
            let seen = Mutex::new(HashSet::new());
            parallel(100, |_| {
                seen.lock().unwrap().insert(rayon::current_thread_index());
                thread::sleep(Duration::from_micros(10));
            });
            let crew = ROLE.with_borrow(|role| matches!(role, Role::Leads(crew) if crew.is_on_watch()));
            if crew {
                threads = seen.into_inner().unwrap();
            }
        }
    }

    #[test]
    fn every_task_runs_once() {
        for threads in 1..=4 {
            in_pool(threads, || {
                for count in (0..200).chain([3000]) {
                    assert_eq!(counts(count), vec![1; count], "{threads} threads");
                }
            });
        }
    }

    #[test]
    fn all_threads_take_part_and_come_back_after_a_pause() {
        in_pool(3, || {
            for pause in [Duration::ZERO, WATCH, 3 * PATIENCE] {
                thread::sleep(pause);
                wait_for_watch();
            }
        });
    }

    #[test]
    fn rayon_has_its_threads_while_they_keep_watch() {
        in_pool(2, || {
            wait_for_watch();
            let (one, other) = (AtomicBool::new(false), AtomicBool::new(false));
            let meet = |mine: &AtomicBool, theirs: &AtomicBool| {
                mine.store(true, Ordering::SeqCst);
                while !theirs.load(Ordering::SeqCst) {
                    thread::yield_now();
                }
            };
            // Each side ends only once the other has begun.
            rayon::join(|| meet(&one, &other), || meet(&other, &one));
        });
    }

    #[test]
    fn tasks_may_have_tasks() {
        in_pool(3, || {
            wait_for_watch();
            let sums: Vec<_> = (0..20).map(|_| AtomicUsize::new(0)).collect();
            parallel(20, |task| {
                sums[task].store(counts(50).iter().sum(), Ordering::Relaxed);
            });
            assert!(sums.into_iter().all(|sum| sum.into_inner() == 50));
        });
    }

    #[test]
    fn several_may_lead_at_once() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    pool.install(|| {
                        lead(|| {
                            for count in 0..500 {
                                assert_eq!(counts(count), vec![1; count]);
                            }
                        });
                    });
                });
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_leader_and_the_crew_serves_on() {
        in_pool(3, || {
            wait_for_watch();
            for bad in [0, 57, 99] {
                let panic = catch_unwind(|| parallel(100, |task| assert_ne!(task, bad, "a bad task")));
                assert!(panic.is_err());
                assert_eq!(counts(100), vec![1; 100]);
            }
        });
    }

    #[test]
    fn chunks_are_all_of_the_values() {
        in_pool(2, || {
            let mut values = vec![0; 1003];
            parallel_chunks(&mut values, 10, |index, values| {
                for (at, value) in values.iter_mut().enumerate() {
                    *value += index * 10 + at;
                }
            });
            assert!(values.into_iter().enumerate().all(|(at, value)| at == value));
        });
    }
}
