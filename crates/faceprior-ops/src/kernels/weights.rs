//! Square tiles of a weight `[O, I, taps]`: sixteen outputs by sixteen inputs.
//!
//! Kernels want neighbouring outputs side by side, which lie I·taps floats apart; with a power of two of inputs, the
//! sixteen addresses fall into one or two sets of the cache and push each other out. A tile is therefore copied as a
//! whole, in runs of sixteen inputs, and rearranged in a buffer of its own.

use super::{BLOCK, Shared};

/// Shape of a weight.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WeightShape {
    pub(crate) outputs: usize,
    pub(crate) inputs: usize,
    pub(crate) taps: usize,
}

/// A tile `[16 outputs][16 inputs][taps]`; zeros beyond the last channel.
pub(crate) struct WeightTile {
    values: Vec<f32>,
    shape: WeightShape,
}

impl WeightTile {
    /// A tile of zeros.
    pub(crate) fn new(shape: WeightShape) -> Self {
        Self {
            values: vec![0.0; BLOCK * BLOCK * shape.taps],
            shape,
        }
    }

    /// Copies the tile of a block of outputs and a block of inputs out of a weight.
    pub(crate) fn read(&mut self, weight: &[f32], out_block: usize, in_block: usize) {
        let WeightShape {
            outputs,
            inputs,
            taps,
        } = self.shape;
        self.values.fill(0.0);
        let run = BLOCK.min(inputs - in_block * BLOCK) * taps;
        let rows = self
            .values
            .chunks_exact_mut(BLOCK * taps)
            .take(outputs - out_block * BLOCK);
        for (row, values) in rows.enumerate() {
            let start = ((out_block * BLOCK + row) * inputs + in_block * BLOCK) * taps;
            values[..run].copy_from_slice(&weight[start..start + run]);
        }
    }

    /// Copies the tile into a weight.
    ///
    /// # Safety
    /// `weight` is a weight of the shape, and no other task writes this tile.
    pub(crate) unsafe fn write(&self, weight: Shared, out_block: usize, in_block: usize) {
        let WeightShape {
            outputs,
            inputs,
            taps,
        } = self.shape;
        let run = BLOCK.min(inputs - in_block * BLOCK) * taps;
        let rows = self
            .values
            .chunks_exact(BLOCK * taps)
            .take(outputs - out_block * BLOCK);
        for (row, values) in rows.enumerate() {
            let start = ((out_block * BLOCK + row) * inputs + in_block * BLOCK) * taps;
            // SAFETY: the caller's promise.
            unsafe { weight.at(start).copy_from_nonoverlapping(values.as_ptr(), run) };
        }
    }

    /// One tap from sixteen outputs to one input: a row of a convolution's columns.
    #[inline(always)]
    pub(crate) fn outputs(&self, input: usize, tap: usize) -> [f32; BLOCK] {
        self.lanes(input * self.shape.taps + tap, BLOCK * self.shape.taps)
    }

    /// One tap from one output to sixteen inputs: a row of a data gradient's columns.
    #[inline(always)]
    pub(crate) fn inputs(&self, output: usize, tap: usize) -> [f32; BLOCK] {
        self.lanes(output * BLOCK * self.shape.taps + tap, self.shape.taps)
    }

    #[inline(always)]
    fn lanes(&self, first: usize, stride: usize) -> [f32; BLOCK] {
        let mut lanes = [0.0; BLOCK];
        for (lane, value) in lanes.iter_mut().zip(self.values[first..].iter().step_by(stride)) {
            *lane = *value;
        }
        lanes
    }

    /// Sets one tap from one input to sixteen outputs.
    #[inline(always)]
    pub(crate) fn set_outputs(&mut self, input: usize, tap: usize, values: [f32; BLOCK]) {
        let taps = self.shape.taps;
        for (output, value) in values.into_iter().enumerate() {
            self.values[(output * BLOCK + input) * taps + tap] = value;
        }
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
    pub(crate) fn read(self, tile: &mut WeightTile, weight: &[f32], column_block: usize, row_block: usize) {
        match self {
            Self::Outputs => tile.read(weight, column_block, row_block),
            Self::Inputs => tile.read(weight, row_block, column_block),
        }
    }

    /// One tap of sixteen columns for one row of the tile.
    #[inline(always)]
    pub(crate) fn row(self, tile: &WeightTile, row: usize, tap: usize) -> [f32; BLOCK] {
        match self {
            Self::Outputs => tile.outputs(row, tap),
            Self::Inputs => tile.inputs(row, tap),
        }
    }
}
