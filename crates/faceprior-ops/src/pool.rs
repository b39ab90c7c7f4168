//! Reused buffers for the results and intermediates of kernels.
//!
//! Fresh memory costs more than the arithmetic of most operations: the system hands out pages one fault at a time and
//! clears each. A training step needs the same sizes again and again, so buffers go back to a pool when the tensor
//! that holds them is dropped. The pool keeps the program within five quarters of the most that was in use at one time,
//! or 384 MiB above it where that is more (rounding of sizes apart); beyond that, kept buffers are given back to the
//! system. The slack is for sizes that take turns: without it, an IR-50 training step gave back and asked anew for
//! 1.4 GB, a tenth of its time, to save 4% of its memory.
//!
//! The pool is behind a lock. Small buffers, which tasks take by the thousand, stay with their thread for its next task
//! and do not meet there.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::mem::MaybeUninit;
use std::ops::RangeInclusive;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use cubecl_environment::bytes::{AccessError, AccessPolicy, AllocationController, AllocationProperty, Bytes};
use memmap2::MmapMut;

/// Alignment of every buffer: a cache line, and a whole AVX-512 register.
const ALIGN: usize = 64;
/// From this size on, memory is mapped from the system. The heap would keep it, in pieces, after it was freed.
const MAPPED: usize = 1 << 20;
/// Size of a huge page. A Winograd transform follows 36 streams through memory at once, for whose small
/// pages the processor's table of addresses is too short.
const HUGE_PAGE: usize = 2 << 20;

/// A buffer of floats that goes back to the pool when dropped. Contents start as whatever was left there.
#[derive(Debug)]
pub(crate) struct Buffer {
    /// Taken out when the buffer is dropped.
    memory: Option<Memory>,
    start: NonNull<f32>,
    /// Floats asked for.
    length: usize,
}

// SAFETY: the buffer owns its memory, as a `Vec<f32>` does.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Takes a buffer of `length` floats with unspecified values.
    pub(crate) fn take(length: usize) -> Self {
        let wanted = size_class(length * size_of::<f32>());
        let spare = SPARES.try_with(|spares| spares.borrow_mut().take(wanted));
        let memory = spare
            .unwrap_or_default()
            .or_else(|| state().take(wanted))
            .unwrap_or_else(|| Memory::new(wanted));
        Self {
            start: memory.start.cast(),
            memory: Some(memory),
            length,
        }
    }

    fn capacity(&self) -> usize {
        self.memory.as_ref().map_or(0, |memory| memory.capacity)
    }

    /// Takes a buffer of `length` zeros.
    pub(crate) fn zeroed(length: usize) -> Self {
        let mut buffer = Self::take(length);
        buffer.fill(0.0);
        buffer
    }

    /// Turns the buffer into the storage of a tensor; it returns to the pool when the last such tensor is dropped.
    pub(crate) fn into_bytes(self) -> Bytes {
        let length = self.length * size_of::<f32>();
        // SAFETY: the controller's memory holds at least `length` initialised bytes.
        unsafe { Bytes::from_controller(Box::new(self), length) }
    }
}

impl std::ops::Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: `start()` is valid for `length` initialised floats, which are owned.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }
}

impl std::ops::DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `deref`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut memory = self.memory.take();
        // A thread at its end keeps none.
        let _ = SPARES.try_with(|spares| {
            memory = memory.take().and_then(|memory| spares.borrow_mut().keep(memory));
        });
        if let Some(memory) = memory {
            // Given back to the system after the pool is unlocked.
            let _surplus = state().give(memory);
        }
    }
}

impl AllocationController for Buffer {
    fn alloc_align(&self) -> usize {
        ALIGN
    }

    fn property(&self) -> AllocationProperty {
        AllocationProperty::Other
    }

    unsafe fn memory_mut(&mut self, _policy: AccessPolicy) -> Result<&mut [MaybeUninit<u8>], AccessError> {
        // SAFETY: the whole memory is valid and owned; the caller writes initialised bytes only.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.capacity()) })
    }

    fn memory(&self, _policy: AccessPolicy) -> Result<&[MaybeUninit<u8>], AccessError> {
        // SAFETY: the whole memory is valid and owned.
        Ok(unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.capacity()) })
    }
}

/// Memory of a size class, aligned to [`ALIGN`]. It was zeroed when it was new, so that every float is initialised.
#[derive(Debug)]
struct Memory {
    start: NonNull<u8>,
    capacity: usize,
    place: Place,
}

#[derive(Debug)]
enum Place {
    /// An allocation that begins up to [`ALIGN`] bytes before.
    Heap(NonNull<u8>),
    /// A mapping that begins somewhat before.
    Mapped { _map: MmapMut },
}

// SAFETY: the memory is owned.
unsafe impl Send for Memory {}

impl Memory {
    fn new(capacity: usize) -> Self {
        if capacity >= MAPPED {
            Self::mapped(capacity)
        } else {
            Self::on_heap(capacity)
        }
    }

    fn on_heap(capacity: usize) -> Self {
        let layout = layout(capacity);
        // SAFETY: the layout is not empty.
        let allocation = unsafe { alloc_zeroed(layout) };
        let Some(allocation) = NonNull::new(allocation) else {
            handle_alloc_error(layout);
        };
        let before = allocation.as_ptr().align_offset(ALIGN);
        Self {
            // SAFETY: the layout has room for the alignment.
            start: unsafe { allocation.add(before) },
            capacity,
            place: Place::Heap(allocation),
        }
    }

    fn mapped(capacity: usize) -> Self {
        let align = if capacity >= HUGE_PAGE { HUGE_PAGE } else { ALIGN };
        let shift = shift();
        let Ok(mut map) = MmapMut::map_anon(align + shift + capacity) else {
            handle_alloc_error(layout(capacity));
        };
        let before = map.as_ptr().align_offset(align);
        // Whole pages only: what lies behind the buffer is not to become resident. A system without huge pages
        // refuses, which costs speed alone.
        #[cfg(target_os = "linux")]
        let _ = map.advise_range(
            memmap2::Advice::HugePage,
            before,
            (shift + capacity) / HUGE_PAGE * HUGE_PAGE,
        );
        let start = NonNull::from(&mut map[before + shift]);
        Self {
            start,
            capacity,
            place: Place::Mapped { _map: map },
        }
    }
}

/// Where in its first page the next mapped buffer starts. If all started alike, what a kernel reads and what it writes
/// would meet in one set of a cache, and a load would wait for the store whose address looks the same.
fn shift() -> usize {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    COUNT.fetch_add(1, Ordering::Relaxed) * 37 % 1024 * ALIGN
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Place::Heap(allocation) = self.place {
            // SAFETY: allocated by `on_heap` with this layout.
            unsafe { dealloc(allocation.as_ptr(), layout(self.capacity)) }
        }
    }
}

/// Memory of a thread: for the pool it is in use.
#[derive(Default)]
struct Spares(VecDeque<Memory>);

/// Buffers that a thread keeps, at most.
const MAX_SPARES: usize = 8;
/// Bytes of the largest of them: packed operands of the matrix unit take 480 KiB.
const SPARE: usize = 512 << 10;

thread_local! {
    static SPARES: RefCell<Spares> = RefCell::default();
}

impl Spares {
    fn take(&mut self, wanted: usize) -> Option<Memory> {
        let fits = |memory: &Memory| fitting(wanted).contains(&memory.capacity);
        let latest = self.0.iter().rposition(fits)?;
        self.0.remove(latest)
    }

    /// Keeps small memory, for which the longest unused may have to go; returns what goes.
    fn keep(&mut self, memory: Memory) -> Option<Memory> {
        if memory.capacity > SPARE {
            return Some(memory);
        }
        self.0.push_back(memory);
        (self.0.len() > MAX_SPARES).then(|| self.0.pop_front()).flatten()
    }

    /// Gives all to the pool; returns its surplus.
    fn leave(&mut self, state: &mut State) -> Vec<Memory> {
        self.0.drain(..).flat_map(|memory| state.give(memory)).collect()
    }
}

impl Drop for Spares {
    fn drop(&mut self) {
        let _surplus = self.leave(&mut state());
    }
}

/// Capacities that serve for `wanted` bytes: at most a quarter is wasted.
fn fitting(wanted: usize) -> RangeInclusive<usize> {
    wanted..=wanted + wanted / 4
}

#[derive(Default)]
struct State {
    kept: BTreeMap<usize, Vec<Memory>>,
    bytes_kept: usize,
    bytes_in_use: usize,
    most_in_use: usize,
    least_slack: usize,
}

static STATE: Mutex<State> = Mutex::new(State {
    kept: BTreeMap::new(),
    bytes_kept: 0,
    bytes_in_use: 0,
    most_in_use: 0,
    least_slack: 384 << 20,
});

fn state() -> MutexGuard<'static, State> {
    // No code panics while it holds the lock with the state half changed.
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    /// The smallest kept memory that fits `wanted` bytes.
    fn take(&mut self, wanted: usize) -> Option<Memory> {
        let kept = self
            .kept
            .range_mut(fitting(wanted))
            .find_map(|(_, class)| class.pop());
        let capacity = kept.as_ref().map_or(wanted, |memory| memory.capacity);
        self.bytes_in_use += capacity;
        self.most_in_use = self.most_in_use.max(self.bytes_in_use);
        match &kept {
            Some(_) => self.bytes_kept -= capacity,
            None => drop(self.surplus()),
        }
        kept
    }

    fn give(&mut self, memory: Memory) -> Vec<Memory> {
        self.bytes_in_use -= memory.capacity;
        self.bytes_kept += memory.capacity;
        self.kept.entry(memory.capacity).or_default().push(memory);
        self.surplus()
    }

    /// Removes kept memory, largest first, until the pool is within its bound.
    fn surplus(&mut self) -> Vec<Memory> {
        let mut surplus = Vec::new();
        let slack = self.least_slack.max(self.most_in_use / 4);
        while self.bytes_in_use + self.bytes_kept > self.most_in_use + slack {
            let Some(mut class) = self.kept.last_entry() else {
                break;
            };
            match class.get_mut().pop() {
                Some(memory) => {
                    self.bytes_kept -= memory.capacity;
                    surplus.push(memory);
                }
                None => {
                    class.remove();
                }
            }
        }
        surplus
    }
}

/// Room to align the buffer by hand: zeroed memory of larger alignment than a word's the system allocator clears by
/// itself, page by page, instead of leaving that to the first touch.
fn layout(capacity: usize) -> Layout {
    Layout::from_size_align(capacity + ALIGN, size_of::<usize>())
        .expect("a size class fits the address space")
}

/// Rounds up to one of eight sizes per power of two, at least a cache line.
fn size_class(bytes: usize) -> usize {
    let bytes = bytes.max(ALIGN);
    let step = (bytes.next_power_of_two() / 16).max(ALIGN);
    bytes.next_multiple_of(step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_classes_waste_little_and_are_aligned() {
        for bytes in [1, 64, 65, 1000, 4096, 5000, 1 << 20, (1 << 20) + 1, 123_456_789] {
            let class = size_class(bytes);
            assert!(
                class >= bytes && class.is_multiple_of(ALIGN) && (class - bytes) * 8 <= bytes.max(8 * ALIGN)
            );
            assert_eq!(size_class(class), class);
        }
    }

    #[test]
    fn surplus_goes_back_and_most_in_use_bounds_the_pool() {
        let mut state = State::default();
        assert!(state.take(128).is_none());
        assert!(state.take(64).is_none());
        assert!(state.give(Memory::new(128)).is_empty());
        assert!(state.give(Memory::new(64)).is_empty());
        assert!(state.take(64).is_some_and(|memory| memory.capacity == 64));
        assert_eq!((state.bytes_in_use, state.bytes_kept), (64, 128));
        // Other sizes: 64 in use, 128 kept and 48 new are within 240, five quarters of the 192 once in use.
        state.bytes_in_use += 48;
        assert!(state.surplus().is_empty());
        state.bytes_in_use += 16;
        assert_eq!(
            state
                .surplus()
                .iter()
                .map(|memory| memory.capacity)
                .sum::<usize>(),
            128
        );
        assert_eq!((state.bytes_in_use, state.bytes_kept), (128, 0));
    }

    #[test]
    fn a_somewhat_larger_buffer_serves_too() {
        let mut state = State::default();
        assert!(state.take(1280).is_none());
        assert!(state.give(Memory::new(1280)).is_empty());
        assert!(state.take(64).is_none());
        assert!(state.take(1024).is_some_and(|memory| memory.capacity == 1280));
    }

    #[test]
    fn threads_keep_a_few_small_buffers_and_leave_them_to_the_pool() {
        let (mut state, mut spares) = (State::default(), Spares::default());
        let new = |state: &mut State, capacity| {
            assert!(state.take(capacity).is_none());
            Memory::new(capacity)
        };
        let large = new(&mut state, 2 * SPARE);
        let large = spares.keep(large).expect("too large");
        assert!(state.give(large).is_empty());

        let memory = new(&mut state, 1280);
        assert!(spares.keep(memory).is_none());
        assert!(spares.take(1344).is_none() && spares.take(960).is_none());
        let memory = spares.take(1024).expect("a fitting one");
        assert!(spares.keep(memory).is_none());
        for index in 1..MAX_SPARES {
            let memory = new(&mut state, (1 + index) * 4096);
            assert!(spares.keep(memory).is_none());
        }
        let memory = new(&mut state, 64);
        let oldest = spares.keep(memory).expect("the longest unused");
        assert_eq!(oldest.capacity, 1280);
        assert!(state.give(oldest).is_empty());

        assert!(spares.leave(&mut state).is_empty());
        assert_eq!(state.bytes_in_use, 0);
        assert!(state.take(8192).is_some() && state.take(64).is_some());
    }

    #[test]
    fn a_thread_takes_again_what_it_dropped() {
        let again = || {
            let address = Buffer::take(12_345).as_ptr() as usize;
            assert_eq!(Buffer::take(12_345).as_ptr() as usize, address);
        };
        std::thread::spawn(again).join().expect("a thread");
    }

    #[test]
    fn memory_of_any_size_is_zeroed_aligned_and_all_there() {
        for capacity in [64, MAPPED - 64, MAPPED, HUGE_PAGE, 5 * HUGE_PAGE / 2] {
            let memory = Memory::new(capacity);
            let start = memory.start.as_ptr();
            assert_eq!(start as usize % ALIGN, 0);
            // SAFETY: as many bytes as were asked for, of which this test is the owner.
            let bytes = unsafe { std::slice::from_raw_parts_mut(start, capacity) };
            assert!(bytes.iter().all(|byte| *byte == 0));
            bytes.fill(1);
        }
    }

    #[test]
    fn a_buffer_is_aligned_and_outlives_the_bytes_made_of_it() {
        let mut buffer = Buffer::zeroed(1000);
        assert_eq!(buffer.as_ptr() as usize % ALIGN, 0);
        buffer[999] = 1.0;
        let bytes = buffer.into_bytes();
        assert_eq!(bytes.len(), 4000);
        let floats: &[f32] = bytemuck::cast_slice(&bytes);
        assert_eq!((floats[0], floats[999]), (0.0, 1.0));
    }
}
