//! What Winograd's forms differ in: how a tile becomes entries, which weight each entry meets, and how the products become
//! a tile again.

use std::ops::Range;

use super::super::Shared;
use super::super::lanes::Lanes;
use super::super::load::Load;
use super::grid::{Grid, Place};
use super::matrices::KernelMatrix;

/// A form, for a convolution or its data gradient.
///
/// A tile becomes [`side`](Self::side)² entries, fewer if it is one of the smaller last ones, numbered row by row as those of a whole
/// one. Each is multiplied by the weight at a point: one entry of a tile may be all that meets it, or several.
pub(super) trait Form: Copy + Send + Sync {
    /// What makes a kernel's taps into its points.
    type Taps: KernelMatrix;

    /// The tiles, of the map that is written or of that whose gradient is read.
    fn grid(self) -> Grid;

    /// Floats of a plane that is read, and of one that is written.
    fn planes(self) -> [usize; 2];

    /// Entries of a whole tile along an axis.
    fn side(self) -> usize;

    /// The entries along an axis that meet the weight at a point.
    fn along_axis(self, point: usize) -> Range<usize>;

    /// A point along an axis which those tiles have that have an entry.
    fn shared_with(self, entry: usize) -> usize;

    /// The entries of a tile of a plane, each `entry` floats from the last.
    ///
    /// # Safety
    /// The processor has the instructions of `L`; plane and place are of the maps; `to` has room for the entries.
    unsafe fn read_tile<L: Lanes>(self, maps: Maps, plane: usize, place: Place, to: *mut f32, entry: usize);

    /// The tile of a plane from the products of its entries, written where it lies inside the picture. The task ends
    /// with [`Shared::written`].
    ///
    /// # Safety
    /// The processor has the instructions of `L`; plane and place are of `y`, and the task's own.
    unsafe fn write_tile<L: Lanes>(
        self,
        from: *const f32,
        entry: usize,
        y: Shared,
        plane: usize,
        place: Place,
    );

    /// Entries of a whole tile.
    fn entries(self) -> usize {
        self.side().pow(2)
    }

    /// The entries that meet the weight at a point, each with those of some tiles that have it, counted from the first
    /// of them.
    fn meeting(self, point: usize, tiles: &Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> {
        let (grid, edge) = (self.grid(), self.grid().edge());
        let [rows, columns] = [point / edge, point % edge].map(|point| self.along_axis(point));
        let both = rows.flat_map(move |row| columns.clone().map(move |column| [row, column]));
        both.map(move |entry @ [row, column]| {
            let [row_point, column_point] = entry.map(|entry| self.shared_with(entry));
            let having = grid.having(row_point * edge + column_point, tiles);
            (row * self.side() + column, having)
        })
    }
}

/// A form whose weight gradient can be had as well.
pub(super) trait GradientForm: Form {
    /// The entries of a tile of a plane of output gradients, zero outside the picture.
    ///
    /// # Safety
    /// As for [`Form::read_tile`].
    unsafe fn read_gradient_tile<L: Lanes>(
        self,
        dy: &[f32],
        plane: usize,
        place: Place,
        to: *mut f32,
        entry: usize,
    );
}

/// What is read, and how.
#[derive(Clone, Copy)]
pub(super) struct Maps<'a> {
    pub(super) x: &'a [f32],
    pub(super) load: Option<Load<'a>>,
}
