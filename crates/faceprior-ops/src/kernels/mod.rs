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

pub(crate) use lanes::Isa;
use rayon::prelude::*;

/// Channels of one block of the layout.
pub(crate) const BLOCK: usize = 16;

/// Runs `task(0)` … `task(count - 1)` on rayon's threads.
pub(crate) fn parallel(count: usize, task: impl Fn(usize) + Send + Sync) {
    match count {
        1 => task(0),
        _ => (0..count).into_par_iter().for_each(task),
    }
}

/// A pointer into a buffer of which every task writes its own part.
#[derive(Clone, Copy)]
pub(crate) struct Shared(*mut f32);

// SAFETY: `Shared` only carries the address to the tasks; whoever dereferences it says why the parts are disjoint.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    pub(crate) fn new(slice: &mut [f32]) -> Self {
        Self(slice.as_mut_ptr())
    }

    /// The address `offset` floats into the buffer, which must be inside it.
    ///
    /// Wrapping arithmetic, here and in the kernels, because debug builds check `pointer::add` at run time, which in
    /// an inner loop costs more than the arithmetic.
    pub(crate) fn at(self, offset: usize) -> *mut f32 {
        self.0.wrapping_add(offset)
    }
}
