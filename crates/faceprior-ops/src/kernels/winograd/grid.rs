//! The tiles of a batch.

use std::ops::Range;

use super::{Shape, TILE};

/// Tiles that cover every picture of a batch.
///
/// Where a picture's size is no multiple of a tile's side, the last tiles of rows and columns have fewer outputs, and fewer
/// points. The order of tiles is such that those that have a point follow each other: with tiles whose rows alone are fewer
/// first, then whole ones, then those of fewer columns alone, then those of fewer rows and columns.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grid {
    pub(super) shape: Shape,
    side: usize,
    axes: [Axis; 2],
}

/// Tiles of a picture along an axis.
#[derive(Clone, Copy, Debug)]
struct Axis {
    /// Those of as many outputs as a side has.
    whole: usize,
    /// Outputs of one more after them.
    last: Option<usize>,
}

/// Where a tile lies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Place {
    pub(super) picture: usize,
    /// Row and column of the first output.
    pub(super) first: [usize; 2],
    /// Rows and columns of outputs; some may lie outside the picture.
    pub(super) outputs: [usize; 2],
}

impl Grid {
    /// Tiles of 4×4, and at the ends of rows and columns of 3 or 2.
    pub(super) fn new(shape: Shape) -> Self {
        let axes = [shape.h, shape.w].map(|size| match size % TILE {
            0 => Axis {
                whole: size / TILE,
                last: None,
            },
            rest => Axis {
                whole: size / TILE,
                last: Some(rest.max(2)),
            },
        });
        Self {
            shape,
            side: TILE,
            axes,
        }
    }

    /// Tiles that are all of `side`×`side`.
    pub(super) fn of_equal(shape: Shape, side: usize) -> Self {
        let axes = [shape.h, shape.w].map(|size| Axis {
            whole: size.div_ceil(side),
            last: None,
        });
        Self { shape, side, axes }
    }

    /// Points of a whole tile along an axis.
    pub(super) fn edge(self) -> usize {
        self.side + 2
    }

    /// Points of a whole tile.
    pub(super) fn points(self) -> usize {
        self.edge() * self.edge()
    }

    pub(super) fn tiles(self) -> usize {
        self.shape.n * self.axes.map(Axis::tiles).iter().product::<usize>()
    }

    /// Rows and columns of a picture's tiles, by the four kinds in their order.
    fn kinds(self) -> [[Range<usize>; 2]; 4] {
        let [rows, columns] = self.axes;
        [
            [rows.short(), columns.long()],
            [rows.long(), columns.long()],
            [rows.long(), columns.short()],
            [rows.short(), columns.short()],
        ]
    }

    /// Where a tile lies.
    pub(super) fn place(self, tile: usize) -> Place {
        let mut index = tile;
        for [rows, columns] in self.kinds() {
            let in_picture = rows.len() * columns.len();
            if index < self.shape.n * in_picture {
                let at = [
                    rows.start + index % in_picture / columns.len(),
                    columns.start + index % columns.len(),
                ];
                return Place {
                    picture: index / in_picture,
                    first: at.map(|at| at * self.side),
                    outputs: std::array::from_fn(|axis| self.axes[axis].outputs(at[axis], self.side)),
                };
            }
            index -= self.shape.n * in_picture;
        }
        unreachable!("tile {tile} of {}", self.tiles())
    }

    /// Those of some tiles that have a point, counted from the first of them.
    pub(super) fn having(self, point: usize, tiles: &Range<usize>) -> Range<usize> {
        let all = [point / self.edge(), point % self.edge()];
        // Whether the last tiles of an axis have it.
        let [rows, columns] =
            std::array::from_fn(|axis| self.axes[axis].last.is_none_or(|last| all[axis] < last + 2));
        let mut ends = [0; 5];
        for (index, [rows, columns]) in self.kinds().into_iter().enumerate() {
            ends[index + 1] = ends[index] + self.shape.n * rows.len() * columns.len();
        }
        let (first, last) = match (rows, columns) {
            (true, true) => (ends[0], ends[4]),
            (true, false) => (ends[0], ends[2]),
            (false, true) => (ends[1], ends[3]),
            (false, false) => (ends[1], ends[2]),
        };
        let within = |tile: usize| tile.clamp(tiles.start, tiles.end) - tiles.start;
        within(first)..within(last)
    }
}

impl Axis {
    fn tiles(self) -> usize {
        self.whole + usize::from(self.last.is_some())
    }

    fn long(self) -> Range<usize> {
        0..self.whole
    }

    fn short(self) -> Range<usize> {
        self.whole..self.tiles()
    }

    fn outputs(self, tile: usize, side: usize) -> usize {
        match self.last {
            Some(last) if tile == self.whole => last,
            _ => side,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_every_pixel_once_and_those_of_a_point_follow_each_other() {
        for (n, h, w) in [
            (1, 1, 1),
            (2, 7, 8),
            (3, 14, 13),
            (2, 12, 6),
            (2, 3, 9),
            (1, 16, 16),
        ] {
            let shape = Shape { n, i: 1, o: 1, h, w };
            for grid in [
                Grid::new(shape),
                Grid::of_equal(shape, 2),
                Grid::of_equal(shape, 4),
            ] {
                let places: Vec<_> = (0..grid.tiles()).map(|tile| grid.place(tile)).collect();
                let mut covered = vec![0; n * h * w];
                for place in &places {
                    for row in place.first[0]..h.min(place.first[0] + place.outputs[0]) {
                        for column in place.first[1]..w.min(place.first[1] + place.outputs[1]) {
                            covered[(place.picture * h + row) * w + column] += 1;
                        }
                    }
                }
                assert!(covered.iter().all(|times| *times == 1), "{grid:?}");
                for point in 0..grid.points() {
                    let edge = grid.edge();
                    let has = |place: &Place| {
                        point / edge < place.outputs[0] + 2 && point % edge < place.outputs[1] + 2
                    };
                    for tiles in [0..places.len(), places.len() / 3..places.len() * 2 / 3] {
                        let having = grid.having(point, &tiles);
                        for (at, place) in places[tiles].iter().enumerate() {
                            assert_eq!(having.contains(&at), has(place), "{grid:?} {place:?} {point}");
                        }
                    }
                }
            }
        }
    }
}
