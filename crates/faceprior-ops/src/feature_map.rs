//! [`FeatureMap`]: an activation whose memory layout is its own secret.

use burn::backend::DispatchDevice;
use burn::tensor::{Device, Tensor};
use burn_flex::FlexTensor;

use crate::backend::{Function, apply1, apply2, dims, tensor, values};
use crate::kept::Kept;
use crate::kernels::{BLOCK, Isa, layout, pointwise};
use crate::pending::Pending;
use crate::reference;

/// An activation `[N, C, H, W]` in the layout that suits its device.
///
/// On the CPU it is a tensor `[N, ⌈C/16⌉, H, W, 16]`: sixteen channels of a pixel lie side by side, so that one vector
/// instruction works on a pixel and a convolution needs no transposition. The lanes above `C` in the last block are
/// padding: finite, and otherwise meaningless. On any other device the block is one channel wide, which is NCHW.
///
/// Also on the CPU, a factor and a summand per channel and a slope below zero may still be pending: whatever reads the
/// values next applies them on the way.
///
/// Maps that meet in one operation must live on the same device.
#[derive(Clone, Debug)]
pub struct FeatureMap {
    blocks: Blocks,
    channels: usize,
    pending: Option<Pending>,
}

/// The values of a map in its layout, and where they wait for the backward pass.
#[derive(Clone, Debug)]
pub(crate) struct Blocks {
    pub(crate) tensor: Tensor<5>,
    pub(crate) kept: Kept,
}

impl From<Tensor<5>> for Blocks {
    fn from(tensor: Tensor<5>) -> Self {
        Self {
            tensor,
            kept: Kept::default(),
        }
    }
}

impl FeatureMap {
    /// Takes an image batch or activation.
    ///
    /// # Shapes
    /// `x`: `[N, C, H, W]`.
    pub fn from_nchw(x: Tensor<4>) -> Self {
        let channels = x.dims()[1];
        let blocks = if is_cpu(&x.device()) {
            apply1(Block, x)
        } else {
            reference::block(x, 1)
        };
        Self::from_blocks(blocks, channels)
    }

    /// Gives the activation back as a plain tensor `[N, C, H, W]`.
    pub fn into_nchw(self) -> Tensor<4> {
        let channels = self.channels;
        if self.is_blocked() {
            apply1(Unblock { channels }, self.into_blocks())
        } else {
            reference::unblock(self.blocks.tensor, channels)
        }
    }

    /// The shape `[N, C, H, W]`.
    pub fn dims(&self) -> [usize; 4] {
        let [n, _, h, w, _] = self.blocks.tensor.dims();
        [n, self.channels, h, w]
    }

    /// The device that holds the activation.
    pub fn device(&self) -> Device {
        self.blocks.tensor.device()
    }

    /// The sum of two maps of one shape.
    #[allow(
        clippy::should_implement_trait,
        reason = "named like the method of Burn's tensors"
    )]
    pub fn add(self, other: FeatureMap) -> FeatureMap {
        assert_eq!(
            self.dims(),
            other.dims(),
            "feature maps that are added must have one shape"
        );
        if !self.is_blocked() {
            return self.map(|x| x.add(other.blocks.tensor));
        }
        // What is still to be done to one of the two is done in the same pass.
        let (one, other) = if self.is_linear() {
            (self, other)
        } else {
            (other, self)
        };
        let (channels, other) = (one.channels, other.into_blocks());
        let blocks = match one.pending {
            Some(pending) if pending.is_linear() => pending.add(one.blocks, other),
            _ => apply2(Add, one.into_blocks(), other),
        };
        Self::from_blocks(blocks, channels)
    }

    /// The map with every value multiplied by `s`.
    pub fn mul_scalar(self, s: f32) -> FeatureMap {
        if self.is_blocked() {
            self.pend(Pending::is_linear, |pending| pending.times_scalar(s))
        } else {
            self.map(|x| x.mul_scalar(s))
        }
    }

    /// One row per picture, `[N, C·H·W]` in (C, H, W) order, as a linear layer after a network's body expects it.
    pub fn flatten(self) -> Tensor<2> {
        let [n, c, h, w] = self.dims();
        self.into_nchw().reshape([n, c * h * w])
    }

    /// Puts batches of pictures of one shape one after the other.
    ///
    /// # Panics
    /// If `maps` is empty or channels, height or width differ.
    pub fn cat_batch(maps: Vec<FeatureMap>) -> FeatureMap {
        let channels = maps
            .first()
            .expect("at least one feature map to concatenate")
            .channels;
        assert!(
            maps.iter().all(|map| map.channels == channels),
            "feature maps of one batch must agree in channels"
        );
        let blocks = Tensor::cat(maps.into_iter().map(FeatureMap::into_blocks).collect(), 0);
        FeatureMap::from_blocks(blocks, channels)
    }

    /// Splits a batch before picture `at`: the first `at` pictures and the rest.
    ///
    /// # Panics
    /// If either part would be empty.
    pub fn split_batch(self, at: usize) -> (FeatureMap, FeatureMap) {
        let n = self.blocks.tensor.dims()[0];
        assert!(0 < at && at < n, "cannot split a batch of {n} at {at}");
        let channels = self.channels;
        let blocks = self.into_blocks();
        let first = blocks.clone().narrow(0, 0, at);
        let rest = blocks.narrow(0, at, n - at);
        (
            FeatureMap::from_blocks(first, channels),
            FeatureMap::from_blocks(rest, channels),
        )
    }

    /// The same values, cut from the graph of derivatives.
    pub fn detach(self) -> FeatureMap {
        self.map(|x| x.detach())
    }

    pub(crate) fn from_blocks(blocks: impl Into<Blocks>, channels: usize) -> Self {
        let blocks = blocks.into();
        let [_, count, _, _, width] = blocks.tensor.dims();
        debug_assert_eq!(count, channels.div_ceil(width));
        Self {
            blocks,
            channels,
            pending: None,
        }
    }

    /// The blocks with nothing pending.
    pub(crate) fn into_blocks(self) -> Tensor<5> {
        self.settled().tensor
    }

    /// The blocks with nothing pending, and where they wait.
    pub(crate) fn settled(self) -> Blocks {
        match self.pending {
            Some(pending) => pending.settle(self.blocks),
            None => self.blocks,
        }
    }

    /// The blocks as they are, and what is still to be done to them.
    pub(crate) fn into_parts(self) -> (Blocks, Option<Pending>) {
        (self.blocks, self.pending)
    }

    /// The map with something more to be done, a function of what is pending. Where that does not `fit`, it is
    /// settled first; where nothing is pending, the function gets the identity.
    pub(crate) fn pend(self, fit: impl FnOnce(&Pending) -> bool, f: impl FnOnce(Pending) -> Pending) -> Self {
        debug_assert!(self.is_blocked());
        let channels = self.channels;
        let (blocks, pending) = match self.pending {
            Some(pending) if fit(&pending) => (self.blocks, pending),
            pending => {
                let blocks = FeatureMap { pending, ..self }.settled();
                let identity = Pending::identity(channels, &blocks.tensor);
                (blocks, identity)
            }
        };
        Self {
            blocks,
            channels,
            pending: Some(f(pending)),
        }
    }

    /// Applies a filter along height and width that keeps constants, before what is pending if that may wait.
    pub(crate) fn filter(self, f: impl FnOnce(Tensor<5>) -> Tensor<5>) -> Self {
        match self.pending {
            Some(pending) if pending.commutes_with_filters() => Self {
                blocks: f(self.blocks.tensor).into(),
                channels: self.channels,
                pending: Some(pending.moved()),
            },
            _ => self.map(f),
        }
    }

    /// Whether more factors and summands can join what is pending, if anything is.
    fn is_linear(&self) -> bool {
        self.pending.as_ref().is_some_and(Pending::is_linear)
    }

    pub(crate) fn channels(&self) -> usize {
        self.channels
    }

    /// Whether the layout is the CPU's, which kernels work on.
    pub(crate) fn is_blocked(&self) -> bool {
        self.blocks.tensor.dims()[4] == BLOCK
    }

    /// Applies a function of the blocks that keeps the channels.
    pub(crate) fn map(self, f: impl FnOnce(Tensor<5>) -> Tensor<5>) -> FeatureMap {
        let channels = self.channels;
        FeatureMap::from_blocks(f(self.into_blocks()), channels)
    }
}

/// Whether the device is Burn's Flex backend, with or without autodiff.
pub fn is_cpu(device: &Device) -> bool {
    match device.as_dispatch() {
        DispatchDevice::Flex(_) => true,
        DispatchDevice::Autodiff(inner) => matches!(**inner, DispatchDevice::Flex(_)),
        #[allow(unreachable_patterns)]
        _ => false,
    }
}

/// From plain to blocked layout.
#[derive(Clone, Debug)]
struct Block;

impl Function<1> for Block {
    type Saved = usize;

    fn forward(&self, [x]: [FlexTensor; 1]) -> (FlexTensor, usize) {
        let [n, c, h, w] = dims(&x);
        let y = layout::block(values(&x), c, h * w);
        (tensor(y, [n, c.div_ceil(BLOCK), h, w, BLOCK]), c)
    }

    fn backward(&self, channels: usize, dy: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        [Some(unblock(&dy, channels))]
    }
}

/// From blocked to plain layout.
#[derive(Clone, Debug)]
struct Unblock {
    channels: usize,
}

impl Function<1> for Unblock {
    type Saved = ();

    fn forward(&self, [x]: [FlexTensor; 1]) -> (FlexTensor, ()) {
        (unblock(&x, self.channels), ())
    }

    fn backward(&self, (): (), dy: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        [Some(Block.forward([dy]).0)]
    }
}

fn unblock(x: &FlexTensor, channels: usize) -> FlexTensor {
    let [n, _, h, w, _] = dims(x);
    tensor(layout::unblock(values(x), channels, h * w), [n, channels, h, w])
}

/// The sum of two maps.
#[derive(Clone, Debug)]
struct Add;

impl Function<2> for Add {
    type Saved = ();

    fn forward(&self, [x, y]: [FlexTensor; 2]) -> (FlexTensor, ()) {
        let [n, blocks, ..] = dims::<5>(&x);
        let inputs = [values(&x), values(&y)];
        let (sum, []) = pointwise::pointwise(Isa::best(), pointwise::Add {}, n * blocks, inputs, []);
        (tensor(sum, dims::<5>(&x)), ())
    }

    fn backward(&self, (): (), dy: FlexTensor, _: [bool; 2]) -> [Option<FlexTensor>; 2] {
        [Some(dy.clone()), Some(dy)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, assert_twins, random};

    #[test]
    fn layout_round_trips_for_any_number_of_channels() {
        for c in [1, 3, 16, 17, 32, 40] {
            let x = random([2, c, 3, 5], c as u64);
            let map = FeatureMap::from_nchw(x.clone());
            assert_eq!(map.dims(), [2, c, 3, 5]);
            assert!(map.is_blocked());
            assert_close(map.into_nchw(), x, 0.0);
        }
    }

    #[test]
    fn flatten_is_in_channel_row_column_order() {
        let x = random([2, 20, 3, 4], 1);
        let flat = FeatureMap::from_nchw(x.clone()).flatten();
        assert_close(flat, x.reshape([2, 240]), 0.0);
    }

    #[test]
    fn batches_concatenate_and_split() {
        let (a, b) = (random([1, 5, 2, 2], 1), random([3, 5, 2, 2], 2));
        let both = FeatureMap::cat_batch(vec![
            FeatureMap::from_nchw(a.clone()),
            FeatureMap::from_nchw(b.clone()),
        ]);
        let (first, rest) = both.split_batch(1);
        assert_close(first.into_nchw(), a, 0.0);
        assert_close(rest.into_nchw(), b, 0.0);
    }

    #[test]
    fn layout_and_arithmetic_agree_with_their_reference() {
        assert_twins(
            |[x]| FeatureMap::from_nchw(x).mul_scalar(0.3).into_nchw(),
            |[x]| reference::unblock(reference::block(x, BLOCK).mul_scalar(0.3), 20),
            [[2, 20, 5, 7]],
            0.0,
        );
        assert_twins(
            |[x, y]| FeatureMap::from_nchw(x).add(FeatureMap::from_nchw(y)).into_nchw(),
            |[x, y]| x.add(y),
            [[2, 35, 5, 7]; 2],
            0.0,
        );
    }
}
