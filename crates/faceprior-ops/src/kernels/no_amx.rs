//! Processors that cannot have the matrix unit of `amx.rs`: it is never there, so nothing else here is ever called.

use super::tile::{Row, Runs, Strides};

pub(super) const SQUARE: usize = 32;
pub(super) const CELL: usize = 48;
pub(super) const SQUARE_TILES: usize = SQUARE * CELL;

const ABSENT: &str = "a matrix unit that is not there";

pub(super) fn suits(_: &[Row], _: usize, _: Runs, _: Strides) -> bool {
    false
}

pub(super) unsafe fn multiply(
    _: &[Row],
    _: usize,
    _: Runs,
    _: Strides,
    _: *const f32,
    _: *const f32,
    _: *mut f32,
    _: bool,
) {
    unreachable!("{ABSENT}")
}

pub(super) unsafe fn multiply_cells(_: &[*const f32], _: usize, _: &[usize], _: &[f32], _: &mut [f32]) {
    unreachable!("{ABSENT}")
}

pub(super) unsafe fn split_cells(_: *const f32, _: usize, _: *mut f32) {
    unreachable!("{ABSENT}")
}

pub(super) unsafe fn pack_square(_: *const f32, _: *mut f32) {
    unreachable!("{ABSENT}")
}
