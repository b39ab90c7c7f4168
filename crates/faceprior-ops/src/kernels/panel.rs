//! The right operand of products, packed once for all of them.

use super::BLOCK;

/// A matrix of `runs`·`length` rows and `blocks`·16 columns, packed as `[block][row][16]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Panel {
    /// Runs of the inner dimension, for each of which a row of the left operand has `length` neighbouring terms.
    pub(crate) runs: usize,
    pub(crate) length: usize,
    pub(crate) blocks: usize,
}

impl Panel {
    /// Floats that the panel takes.
    pub(crate) fn size(self) -> usize {
        self.start(self.blocks)
    }

    /// Floats of a block.
    pub(crate) fn block(self) -> usize {
        self.runs * self.length * BLOCK
    }

    /// Where the columns of a block start.
    pub(crate) fn start(self, block: usize) -> usize {
        block * self.block()
    }

    /// The runs of a product with the panel, from where they start in the left operand.
    pub(crate) fn runs(self, left: impl IntoIterator<Item = usize>) -> Vec<(usize, usize)> {
        let runs = left.into_iter().enumerate();
        runs.map(|(run, start)| (start, run * self.length * BLOCK))
            .collect()
    }
}
