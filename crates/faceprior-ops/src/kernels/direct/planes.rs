//! Planes copied with what the taps of a convolution need around them.

use super::super::BLOCK;
use super::super::lanes::{Kernel, Lanes};
use super::super::load::{Load, Read, with_read};

/// One plane of a map within a border of zeros, [`Load`] applied, phase by phase: a phase has the pixels whose row and
/// column, counted from the border's first, are its own modulo the stride. With stride 1 there is one.
pub(in crate::kernels) struct CopyPlane<'a> {
    pub(in crate::kernels) x: &'a [f32],
    pub(in crate::kernels) load: Option<Load<'a>>,
    pub(in crate::kernels) plane: usize,
    pub(in crate::kernels) size: [usize; 2],
    pub(in crate::kernels) before: [usize; 2],
    pub(in crate::kernels) stride: usize,
    /// How many phases of rows and of columns are copied.
    pub(in crate::kernels) phases: [usize; 2],
    /// The first row and pixel of a phase that are copied, and how many of each.
    pub(in crate::kernels) first: [usize; 2],
    pub(in crate::kernels) gathered: [usize; 2],
    /// Room for the phases, which nobody else writes.
    pub(in crate::kernels) to: *mut f32,
}

impl CopyPlane<'_> {
    /// The copied rows (axis 0) or pixels (axis 1) of a phase that lie in the map.
    #[inline(always)]
    fn inside(&self, axis: usize, phase: usize) -> [usize; 2] {
        let (first, count) = (self.first[axis], self.gathered[axis]);
        let place = |at: usize| at.saturating_sub(phase).div_ceil(self.stride);
        [self.before[axis], self.before[axis] + self.size[axis]]
            .map(|at| place(at).saturating_sub(first).min(count))
    }

    /// # Safety
    /// The processor has the instructions of `L`.
    #[inline(always)]
    unsafe fn copy<L: Lanes>(&self, values: impl Read<L>) {
        let ([h, w], [top, left], [rows, pixels]) = (self.size, self.before, self.gathered);
        let from = self.x.as_ptr().wrapping_add(self.plane * h * w * BLOCK);
        let mut to = self.to;
        for phase_y in 0..self.phases[0] {
            let [first_row, end_row] = self.inside(0, phase_y);
            for phase_x in 0..self.phases[1] {
                let [first, end] = self.inside(1, phase_x);
                // SAFETY: the caller's promise; what lies inside is a pixel of the map, and it and the zeros between
                // fill the phase.
                unsafe {
                    let mut filled = 0;
                    for row in first_row..end_row {
                        for zero in filled..row * pixels + first {
                            L::zero().store(to.wrapping_add(zero * BLOCK));
                        }
                        let y = (self.first[0] + row) * self.stride + phase_y - top;
                        for pixel in first..end {
                            let x = (self.first[1] + pixel) * self.stride + phase_x - left;
                            let value = values.read(from.wrapping_add((y * w + x) * BLOCK));
                            value.store(to.wrapping_add((row * pixels + pixel) * BLOCK));
                        }
                        filled = row * pixels + end;
                    }
                    for zero in filled..rows * pixels {
                        L::zero().store(to.wrapping_add(zero * BLOCK));
                    }
                }
                to = to.wrapping_add(rows * pixels * BLOCK);
            }
        }
    }
}

impl Kernel for CopyPlane<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        // SAFETY: the caller promises the instructions.
        unsafe { with_read!(self.load, self.plane, |values: L| self.copy::<L>(values)) }
    }
}
