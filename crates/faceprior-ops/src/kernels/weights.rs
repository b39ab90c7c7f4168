//! Square tiles of a weight `[O, I, taps]`: sixteen outputs by sixteen inputs.
//!
//! Kernels want neighbouring outputs side by side, which lie I·taps floats apart; with a power of two of inputs, the
//! sixteen addresses fall into one or two sets of the cache and push each other out. A tile is therefore moved as a
//! whole, in squares of sixteen by sixteen floats that are transposed in registers.

use super::lanes::Lanes;
use super::{BLOCK, Shared};

/// Shape of a weight.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WeightShape {
    pub(crate) outputs: usize,
    pub(crate) inputs: usize,
    pub(crate) taps: usize,
}

/// A tile of sixteen inputs by sixteen outputs, `[16 inputs][taps][16 outputs]`; zeros beyond the last channel.
pub(crate) struct WeightTile {
    values: Vec<f32>,
    /// The same as `[16 outputs][taps][16 inputs]`, once turned.
    turned: Vec<f32>,
    shape: WeightShape,
}

impl WeightTile {
    /// A tile of zeros.
    pub(crate) fn new(shape: WeightShape) -> Self {
        Self {
            values: vec![0.0; BLOCK * BLOCK * shape.taps],
            turned: Vec::new(),
            shape,
        }
    }

    /// Where the tile's rows, one per output, lie in a weight: start, outputs, floats per output, distance.
    fn rows(&self, out_block: usize, in_block: usize) -> (usize, usize, usize, usize) {
        let WeightShape {
            outputs,
            inputs,
            taps,
        } = self.shape;
        let start = (out_block * BLOCK * inputs + in_block * BLOCK) * taps;
        let rows = BLOCK.min(outputs - out_block * BLOCK);
        (
            start,
            rows,
            BLOCK.min(inputs - in_block * BLOCK) * taps,
            inputs * taps,
        )
    }

    /// Copies the tile of a block of outputs and a block of inputs out of a weight.
    ///
    /// # Safety
    /// The processor must have the instructions of `L`.
    #[inline(always)]
    pub(crate) unsafe fn read<L: Lanes>(&mut self, weight: &[f32], out_block: usize, in_block: usize) {
        let (start, rows, length, distance) = self.rows(out_block, in_block);
        let full = length / BLOCK * BLOCK;
        if rows < BLOCK || length < BLOCK * self.shape.taps {
            self.values.fill(0.0);
            for row in 0..rows {
                for (at, value) in weight[start + row * distance..][..length].iter().enumerate() {
                    self.values[at * BLOCK + row] = *value;
                }
            }
            return;
        }
        let weight = &weight[start..start + 15 * distance + full];
        for at in (0..full).step_by(BLOCK) {
            // SAFETY: the caller promises the instructions; the last row ends inside the weight and the last square
            // inside the tile.
            unsafe {
                let mut square = [L::zero(); BLOCK];
                for (row, lanes) in square.iter_mut().enumerate() {
                    *lanes = L::load(weight.as_ptr().wrapping_add(row * distance + at));
                }
                let to = self.values.as_mut_ptr().wrapping_add(at * BLOCK);
                for (row, lanes) in L::transpose(square).into_iter().enumerate() {
                    lanes.store(to.wrapping_add(row * BLOCK));
                }
            }
        }
    }

    /// Copies the tile into a weight.
    ///
    /// # Safety
    /// The processor must have the instructions of `L`; `weight` is a weight of the shape, and no other task writes
    /// this tile.
    #[inline(always)]
    pub(crate) unsafe fn write<L: Lanes>(&self, weight: Shared, out_block: usize, in_block: usize) {
        let (start, rows, length, distance) = self.rows(out_block, in_block);
        for at in (0..length).step_by(BLOCK) {
            // SAFETY: the caller's promise; squares lie inside the tile, and no more than `length` floats of each row
            // are written.
            unsafe {
                let mut square = [L::zero(); BLOCK];
                for (row, lanes) in square.iter_mut().enumerate() {
                    *lanes = L::load(self.values.as_ptr().wrapping_add((at + row) * BLOCK));
                }
                for (row, lanes) in L::transpose(square).into_iter().enumerate().take(rows) {
                    let to = weight.at(start + row * distance + at);
                    if at + BLOCK <= length {
                        lanes.store(to);
                    } else {
                        let mut values = [0.0; BLOCK];
                        lanes.store(values.as_mut_ptr());
                        to.copy_from_nonoverlapping(values.as_ptr(), length - at);
                    }
                }
            }
        }
    }

    /// One tap from one input to sixteen outputs: a row of a convolution's columns.
    #[inline(always)]
    pub(crate) fn outputs(&mut self, input: usize, tap: usize) -> &mut [f32; BLOCK] {
        let start = (input * self.shape.taps + tap) * BLOCK;
        (&mut self.values[start..start + BLOCK])
            .try_into()
            .expect("sixteen floats")
    }

    /// Makes ready for [`inputs`](Self::inputs).
    ///
    /// # Safety
    /// The processor must have the instructions of `L`.
    #[inline(always)]
    unsafe fn turn<L: Lanes>(&mut self) {
        self.turned.resize(self.values.len(), 0.0);
        let (from, to) = (self.values.as_ptr(), self.turned.as_mut_ptr());
        for tap in 0..self.shape.taps {
            let at = |channel: usize| (channel * self.shape.taps + tap) * BLOCK;
            // SAFETY: the caller promises the instructions; both tiles have sixteen channels by sixteen.
            unsafe {
                let mut square = [L::zero(); BLOCK];
                for (input, lanes) in square.iter_mut().enumerate() {
                    *lanes = L::load(from.wrapping_add(at(input)));
                }
                for (output, lanes) in L::transpose(square).into_iter().enumerate() {
                    lanes.store(to.wrapping_add(at(output)));
                }
            }
        }
    }

    /// One tap from sixteen inputs to one output: a row of a data gradient's columns.
    #[inline(always)]
    fn inputs(&self, output: usize, tap: usize) -> *const f32 {
        self.turned[(output * self.shape.taps + tap) * BLOCK..][..BLOCK].as_ptr()
    }
}

/// Which channels of a weight become columns of a matrix product.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Columns {
    /// Outputs: a convolution.
    Outputs,
    /// Inputs: its data gradient.
    Inputs,
}

impl Columns {
    /// Channels that become columns, and the others.
    pub(crate) fn sides(self, shape: WeightShape) -> (usize, usize) {
        match self {
            Self::Outputs => (shape.outputs, shape.inputs),
            Self::Inputs => (shape.inputs, shape.outputs),
        }
    }

    /// Reads the tile of a block of columns and a block of rows.
    ///
    /// # Safety
    /// The processor must have the instructions of `L`.
    #[inline(always)]
    pub(crate) unsafe fn read<L: Lanes>(
        self,
        tile: &mut WeightTile,
        weight: &[f32],
        column_block: usize,
        row_block: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::Outputs => tile.read::<L>(weight, column_block, row_block),
                Self::Inputs => {
                    tile.read::<L>(weight, row_block, column_block);
                    tile.turn::<L>();
                }
            }
        }
    }

    /// Where one tap of sixteen columns for one row of the tile that was read starts.
    #[inline(always)]
    pub(crate) fn row(self, tile: &mut WeightTile, row: usize, tap: usize) -> *const f32 {
        match self {
            Self::Outputs => tile.outputs(row, tap).as_ptr(),
            Self::Inputs => tile.inputs(row, tap),
        }
    }
}
