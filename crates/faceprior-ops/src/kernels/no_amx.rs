//! Processors that cannot have the matrix unit of `amx.rs`: it is never there, so nothing else here is ever called.

use super::lanes::Parts;
use super::tile::{Row, Runs, Strides};

pub(super) const SQUARE: usize = 32;

pub(super) const fn cell(parts: Parts) -> usize {
    parts.count() * 16
}

pub(super) const fn square_tiles(parts: Parts) -> usize {
    SQUARE * cell(parts)
}

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

pub(super) struct Unit;

impl Unit {
    pub(super) unsafe fn new() -> Self {
        unreachable!("{ABSENT}")
    }

    pub(super) unsafe fn multiply_cells(
        &self,
        _: Parts,
        _: *const f32,
        _: usize,
        _: &[usize],
        _: &[f32],
        _: Next,
        _: &mut [f32; SQUARE * SQUARE],
        _: bool,
    ) {
    }
}

pub(super) struct Next;

impl Next {
    pub(super) fn tiles(_: Parts, _: *const f32, _: usize, _: [usize; 2]) -> Self {
        Self
    }
}

pub(super) unsafe fn split_cells(_: Parts, _: *const f32, _: usize, _: *mut f32, _: usize) {
    unreachable!("{ABSENT}")
}

pub(super) unsafe fn pack_square(_: Parts, _: *const f32, _: *mut f32) {
    unreachable!("{ABSENT}")
}
