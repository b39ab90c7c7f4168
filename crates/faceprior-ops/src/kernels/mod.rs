//! CPU kernels on plain slices; nothing here knows Burn.
//!
//! Activations are in the blocked layout `[N, C/16, H, W, 16]`. Each kernel is written once over [`lanes::Lanes`], sixteen
//! floats, and compiled for AVX-512, for AVX2 with FMA and for any other processor; [`Isa`] picks one at run time. Where
//! there is a matrix unit besides ([`amx`]), some products go to it.
//!
//! Work is split between rayon's threads so that no sum depends on how many there are: each output is computed by one
//! task in a fixed order, and sums over pictures are added up from partial sums whose bounds depend on shapes only.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(not(target_arch = "x86_64"))]
#[path = "no_amx.rs"]
mod amx;
mod cells;
pub(crate) mod crew;
pub(crate) mod dense;
pub(crate) mod depthwise;
pub(crate) mod direct;
pub(crate) mod half;
pub(crate) mod lanes;
pub(crate) mod layout;
pub(crate) mod load;
pub(crate) mod panel;
pub(crate) mod pointwise;
pub(crate) mod resample;
pub(crate) mod small;
#[cfg(test)]
pub(crate) mod testing;
pub(crate) mod tile;
pub(crate) mod update;
pub(crate) mod weights;
pub(crate) mod winograd;

pub(crate) use crew::{parallel, parallel_chunks};
pub(crate) use lanes::Isa;
use lanes::Lanes;

/// Channels of one block of the layout.
pub(crate) const BLOCK: usize = 16;

/// A pointer into a buffer of which every task writes its own part.
#[derive(Clone, Copy)]
pub(crate) struct Shared {
    start: *mut f32,
    streamed: bool,
}

// SAFETY: `Shared` only carries the address to the tasks; whoever dereferences it says why the parts are disjoint.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// Floats from which on a buffer does not outlast its own writing in the caches: 16 MiB.
const STREAMED: usize = 4 << 20;

impl Shared {
    pub(crate) fn new(slice: &mut [f32]) -> Self {
        let start = slice.as_mut_ptr();
        let streamed = slice.len() >= STREAMED && start.addr().is_multiple_of(BLOCK * size_of::<f32>());
        Self { start, streamed }
    }

    /// The address `offset` floats into the buffer, which must be inside it.
    ///
    /// Wrapping arithmetic, here and in the kernels, because debug builds check `pointer::add` at run time, which in
    /// an inner loop costs more than the arithmetic.
    pub(crate) fn at(self, offset: usize) -> *mut f32 {
        self.start.wrapping_add(offset)
    }

    /// Writes sixteen floats that nobody reads soon, `offset` floats into the buffer, a multiple of sixteen. Into a large
    /// buffer they go past the caches, which would read each line from memory before it is overwritten.
    ///
    /// # Safety
    /// The processor has the instructions of `L`; the place is inside the buffer, and the task's own. The task ends with
    /// [`written`](Self::written).
    #[inline(always)]
    pub(crate) unsafe fn write<L: Lanes>(self, offset: usize, value: L) {
        // SAFETY: the caller's promise; with the buffer, multiples of sixteen floats are aligned.
        unsafe {
            if self.streamed {
                value.stream(self.at(offset));
            } else {
                value.store(self.at(offset));
            }
        }
    }

    /// Lets other threads see what [`write`](Self::write) wrote.
    ///
    /// # Safety
    /// The processor has the instructions of `L`.
    #[inline(always)]
    pub(crate) unsafe fn written<L: Lanes>(self) {
        if self.streamed {
            // SAFETY: the caller's promise.
            unsafe { L::fence() };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::lanes::Kernel;
    use super::*;
    use crate::pool::Buffer;

    struct Fill {
        to: Shared,
        at: usize,
    }

    impl Kernel for Fill {
        type Output = ();

        #[inline(always)]
        unsafe fn run<L: Lanes>(self) {
            // SAFETY: the caller promises the instructions; each task has sixteen floats of its own.
            unsafe {
                self.to.write(self.at, L::splat(self.at as f32));
                self.to.written::<L>();
            }
        }
    }

    #[test]
    fn large_buffers_are_written_past_the_caches_and_all_of_them() {
        for isa in Isa::available() {
            for (length, start, streamed) in [
                (STREAMED, 0, true),
                (STREAMED, 1, false),
                (STREAMED - BLOCK, 0, false),
            ] {
                let mut buffer = Buffer::take(start + length);
                let to = Shared::new(&mut buffer[start..]);
                assert_eq!(to.streamed, streamed);
                parallel(length / BLOCK, |task| isa.run(Fill { to, at: task * BLOCK }));
                let right = |(at, value): (usize, &f32)| *value == (at / BLOCK * BLOCK) as f32;
                assert!(buffer[start..].iter().enumerate().all(right), "{isa:?}");
            }
        }
    }
}
