//! MTCNN's three networks on the CPU: direct convolutions on small channel-last maps.
//!
//! The maps are tiny (a few hundred pixels, 3 to 128 channels), so that a general convolution spends its time on
//! rearranging and dispatching. Here a map is `[H, W, C]` with C padded to sixteen; a kernel keeps a tile of output
//! pixels times output channels in registers and walks once over its inputs, and bias and PReLU come with the store.
//! Dense layers are 1×1 convolutions over a row of crops. The definition of the networks is
//! [`faceprior_nets::mtcnn`]; tests hold the two equal.

use std::ops::Range;

use faceprior_data::Image;

#[cfg(target_arch = "x86_64")]
use crate::lanes::{Avx2, Avx512};
use crate::lanes::{Block, Isa, Lanes, Portable, floats};
use crate::networks::{Networks, Output, Proposal, Refinement};
use crate::weights::Tensors;

/// A convolution with padding 0 and stride 1, its bias and its PReLU.
struct Conv {
    kernel_height: usize,
    kernel_width: usize,
    /// Floats from one input pixel to the next.
    pixel_stride: usize,
    /// The taps of one kernel row, as runs of consecutive floats: where each starts, and their common length.
    runs: Vec<usize>,
    run: usize,
    /// Output channels over sixteen, rounded up.
    blocks: usize,
    /// `[blocks, kernel_height, runs, run, 16]`.
    weights: Vec<Block>,
    /// `[blocks, 16]`.
    bias: Vec<Block>,
    /// `[blocks, 16]`; 1 where there is no PReLU.
    slope: Vec<Block>,
}

impl Conv {
    /// From PyTorch's `[O, I, kh, kw]`, for input pixels `pixel_stride` floats apart.
    fn new(
        weight: &[f32],
        shape: [usize; 4],
        bias: &[f32],
        slope: Option<&[f32]>,
        pixel_stride: usize,
    ) -> Self {
        let [outputs, inputs, kernel_height, kernel_width] = shape;
        assert_eq!(
            (weight.len(), bias.len()),
            (outputs * inputs * kernel_height * kernel_width, outputs)
        );
        let blocks = outputs.div_ceil(16);
        let mut packed = vec![Block::default(); blocks * kernel_height * kernel_width * inputs];
        for (i, &value) in weight.iter().enumerate() {
            let (kx, ky) = (i % kernel_width, i / kernel_width % kernel_height);
            let c = i / (kernel_width * kernel_height) % inputs;
            let o = i / (kernel_width * kernel_height * inputs);
            let at = (((o / 16) * kernel_height + ky) * kernel_width + kx) * inputs + c;
            packed[at].0[o % 16] = value;
        }
        // Without padding channels between them, the taps of a kernel row are one run.
        let (runs, run) = if inputs == pixel_stride {
            (vec![0], kernel_width * inputs)
        } else {
            ((0..kernel_width).map(|kx| kx * pixel_stride).collect(), inputs)
        };
        Self {
            kernel_height,
            kernel_width,
            pixel_stride,
            runs,
            run,
            blocks,
            weights: packed,
            bias: blocked(bias, 0.0),
            slope: slope.map_or_else(|| vec![Block([1.0; 16]); blocks], |slope| blocked(slope, 1.0)),
        }
    }

    /// Loads `name.weight` and `name.bias`, and `prelu.weight` if it is named.
    fn load(tensors: &Tensors, name: &str, prelu: Option<&str>, pixel_stride: usize) -> Self {
        let weight = tensors.get(&format!("{name}.weight"));
        let shape = [weight.shape[0], weight.shape[1], weight.shape[2], weight.shape[3]];
        let bias = tensors.get(&format!("{name}.bias"));
        let slope = prelu.map(|prelu| tensors.get(&format!("{prelu}.weight")));
        Self::new(
            &weight.values,
            shape,
            &bias.values,
            slope.map(|slope| slope.values.as_slice()),
            pixel_stride,
        )
    }

    /// A dense layer over inputs `[H, W, C]`, whose weight in the file counts its inputs as (W, H, C).
    fn load_first_dense(tensors: &Tensors, name: &str, prelu: &str, side: usize, channels: usize) -> Self {
        let weight = tensors.get(&format!("{name}.weight"));
        let (outputs, inputs) = (weight.shape[0], side * side * channels);
        let mut permuted = Vec::with_capacity(weight.values.len());
        for row in weight.values.chunks_exact(inputs) {
            for pixel in 0..side * side {
                let (y, x) = (pixel / side, pixel % side);
                permuted.extend_from_slice(&row[(x * side + y) * channels..][..channels]);
            }
        }
        let (bias, slope) = (
            tensors.get(&format!("{name}.bias")),
            tensors.get(&format!("{prelu}.weight")),
        );
        Self::new(
            &permuted,
            [outputs, inputs, 1, 1],
            &bias.values,
            Some(&slope.values),
            inputs,
        )
    }

    /// Several layers on the same `inputs` channels as one, their outputs one after another.
    fn load_heads(tensors: &Tensors, names: &[&str], inputs: usize) -> Self {
        let (mut weight, mut bias) = (Vec::new(), Vec::new());
        for name in names {
            weight.extend_from_slice(&tensors.get(&format!("{name}.weight")).values);
            bias.extend_from_slice(&tensors.get(&format!("{name}.bias")).values);
        }
        Self::new(&weight, [bias.len(), inputs, 1, 1], &bias, None, inputs)
    }

    /// Output rows `rows` of the convolution of `input`, whose rows are `width` pixels long; `out` gets them from
    /// its start, `[rows, width − kernel_width + 1, blocks]`.
    fn forward(&self, isa: Isa, input: &[f32], width: usize, rows: Range<usize>, out: &mut [Block]) {
        assert!(input.len() >= (rows.end + self.kernel_height - 1) * width * self.pixel_stride);
        assert!(width >= self.kernel_width);
        assert!(out.len() >= rows.len() * (width + 1 - self.kernel_width) * self.blocks);
        // SAFETY: the sizes were checked, and `isa` is one that the machine has.
        unsafe {
            match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => forward_avx512(self, input, width, rows, out),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => forward_avx2(self, input, width, rows, out),
                Isa::Portable => forward_lanes::<Portable>(self, input, width, rows, out),
            }
        }
    }

    /// The convolution of a whole `[height, width]` map, then the largest of each `pool`×`pool` window at stride 2,
    /// sizes rounded up. Answers the size of `out`.
    fn forward_pooled(
        &self,
        isa: Isa,
        input: &[f32],
        (height, width): (usize, usize),
        pool: usize,
        scratch: &mut Vec<Block>,
        out: &mut Vec<Block>,
    ) -> (usize, usize) {
        let (rows, columns) = (height + 1 - self.kernel_height, width + 1 - self.kernel_width);
        let pooled = (pooled(rows, pool), pooled(columns, pool));
        let row_blocks = columns * self.blocks;
        // The last `pool` rows of the convolution, row y at y mod pool: they are pooled while they are in the cache.
        scratch.resize((pool * row_blocks).max(scratch.len()), Block::default());
        out.resize(
            (pooled.0 * pooled.1 * self.blocks).max(out.len()),
            Block::default(),
        );
        let mut done = 0;
        for y in 0..pooled.0 {
            let window = 2 * y..(2 * y + pool).min(rows);
            while done < window.end {
                let slot = &mut scratch[(done % pool) * row_blocks..][..row_blocks];
                self.forward(isa, input, width, done..done + 1, slot);
                done += 1;
            }
            let out_row = &mut out[y * pooled.1 * self.blocks..][..pooled.1 * self.blocks];
            let row = |row: usize| &scratch[(row % pool) * row_blocks..][..row_blocks];
            let rows = [
                row(window.start),
                row(window.end - 1),
                row((window.start + 1).min(window.end - 1)),
            ];
            // SAFETY: `isa` is one that the machine has.
            unsafe {
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx512 => pool_avx512(&rows, columns, self.blocks, pool, out_row),
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx2 => pool_avx2(&rows, columns, self.blocks, pool, out_row),
                    Isa::Portable => pool_lanes::<Portable>(&rows, columns, self.blocks, pool, out_row),
                }
            }
        }
        pooled
    }
}

/// Size of a pool at stride 2, rounded up.
fn pooled(size: usize, pool: usize) -> usize {
    size.saturating_sub(pool).div_ceil(2) + 1
}

fn blocked(values: &[f32], rest: f32) -> Vec<Block> {
    values
        .chunks(16)
        .map(|chunk| Block(std::array::from_fn(|i| chunk.get(i).copied().unwrap_or(rest))))
        .collect()
}

/// # Safety
/// On a machine with AVX-512F.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn pool_avx512(rows: &[&[Block]], columns: usize, blocks: usize, pool: usize, out: &mut [Block]) {
    // SAFETY: passed on.
    unsafe { pool_lanes::<Avx512>(rows, columns, blocks, pool, out) }
}

/// # Safety
/// On a machine with AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn pool_avx2(rows: &[&[Block]], columns: usize, blocks: usize, pool: usize, out: &mut [Block]) {
    // SAFETY: passed on.
    unsafe { pool_lanes::<Avx2>(rows, columns, blocks, pool, out) }
}

/// # Safety
/// As [`forward_lanes`], on a machine with AVX-512F.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn forward_avx512(conv: &Conv, input: &[f32], width: usize, rows: Range<usize>, out: &mut [Block]) {
    // SAFETY: passed on.
    unsafe { forward_lanes::<Avx512>(conv, input, width, rows, out) }
}

/// # Safety
/// As [`forward_lanes`], on a machine with AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn forward_avx2(conv: &Conv, input: &[f32], width: usize, rows: Range<usize>, out: &mut [Block]) {
    // SAFETY: passed on.
    unsafe { forward_lanes::<Avx2>(conv, input, width, rows, out) }
}

/// The statement for every number below a constant, at most twelve, without a loop.
macro_rules! unroll {
    ($i:ident < $count:expr, $body:expr) => {
        unroll!(@each $i, $count, $body, 0 1 2 3 4 5 6 7 8 9 10 11)
    };
    (@each $i:ident, $count:expr, $body:expr, $($n:literal)*) => {
        $(if $n < $count {
            let $i: usize = $n;
            $body;
        })*
    };
}

/// Most pixels in a tile.
const TILE: usize = 12;

/// # Safety
/// The sizes are those that [`Conv::forward`] asserts, and the machine has the instructions of `L`.
#[inline(always)]
unsafe fn forward_lanes<L: Lanes>(
    conv: &Conv,
    input: &[f32],
    width: usize,
    rows: Range<usize>,
    out: &mut [Block],
) {
    let out_width = width + 1 - conv.kernel_width;
    let row_stride = width * conv.pixel_stride;
    for (i, y) in rows.enumerate() {
        let out_row = &mut out[i * out_width * conv.blocks..][..out_width * conv.blocks];
        let mut block = 0;
        while block < conv.blocks {
            // As many output channels to a tile as leave room for the row's pixels, or for a full tile of them.
            let left = conv.blocks - block;
            let enough = out_width.min(TILE).min(L::ACCUMULATORS);
            let step = [4, 2]
                .into_iter()
                .find(|&b| b <= left && L::ACCUMULATORS / b >= enough)
                .unwrap_or(1);
            let largest = (L::ACCUMULATORS / step).min(TILE);
            let tiles = out_width.div_ceil(largest);
            for tile in 0..tiles {
                // Tiles of sizes that differ by at most one: none is a small remainder.
                let (from, to) = (tile * out_width / tiles, (tile + 1) * out_width / tiles);
                // SAFETY: pixel `to − 1 + kernel_width − 1` is in the row, row `y + kernel_height − 1` in the input.
                unsafe {
                    let x = input.as_ptr().add(y * row_stride + from * conv.pixel_stride);
                    let out = &mut out_row[from * conv.blocks + block..];
                    match step {
                        4 => tile_of::<L, 4>(to - from, conv, x, row_stride, block, out),
                        2 => tile_of::<L, 2>(to - from, conv, x, row_stride, block, out),
                        _ => tile_of::<L, 1>(to - from, conv, x, row_stride, block, out),
                    }
                }
            }
            block += step;
        }
    }
}

/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn tile_of<L: Lanes, const B: usize>(
    pixels: usize,
    conv: &Conv,
    x: *const f32,
    row_stride: usize,
    block: usize,
    out: &mut [Block],
) {
    macro_rules! dispatch {
        ($($p:literal)*) => {
            match pixels {
                // SAFETY: passed on.
                $($p if $p * B <= L::ACCUMULATORS => unsafe { tile::<L, $p, B>(conv, x, row_stride, block, out) },)*
                _ => unreachable!("a tile of {pixels} pixels"),
            }
        };
    }
    dispatch!(1 2 3 4 5 6 7 8 9 10 11 12)
}

/// `P` neighbouring output pixels times `B` blocks of output channels, in registers.
///
/// # Safety
/// From `x` on, `P − 1` pixels and a kernel of the input can be read, with rows `row_stride` floats apart; `out` holds
/// the tile; the machine has the instructions of `L`.
#[inline(always)]
unsafe fn tile<L: Lanes, const P: usize, const B: usize>(
    conv: &Conv,
    x: *const f32,
    row_stride: usize,
    block: usize,
    out: &mut [Block],
) {
    let block_weights = conv.kernel_height * conv.runs.len() * conv.run;
    assert!(conv.weights.len() >= (block + B) * block_weights);
    assert!(conv.bias.len() >= block + B && conv.slope.len() >= block + B);
    assert!(out.len() >= (P - 1) * conv.blocks + B);
    // SAFETY: by the contract and the assertions. Pointers wrap, and loops are unrolled by hand, so that the sums stay
    // in registers whatever the build's profile checks.
    unsafe {
        let bias = conv.bias.as_ptr().wrapping_add(block);
        let mut sums = [[L::load(bias); P]; B];
        unroll!(b < B, sums[b] = [L::load(bias.wrapping_add(b)); P]);
        let mut weight = conv
            .weights
            .as_ptr()
            .wrapping_add(block.wrapping_mul(block_weights));
        for ky in 0..conv.kernel_height {
            for &start in &conv.runs {
                let mut x = x.wrapping_add(ky.wrapping_mul(row_stride).wrapping_add(start));
                for _ in 0..conv.run {
                    let mut weights = [L::load(weight); B];
                    unroll!(
                        b < B,
                        weights[b] = L::load(weight.wrapping_add(block_weights.wrapping_mul(b)))
                    );
                    unroll!(p < P, {
                        let value = L::splat(x.wrapping_add(conv.pixel_stride.wrapping_mul(p)));
                        unroll!(b < B, sums[b][p] = sums[b][p].plus_product(weights[b], value));
                    });
                    x = x.wrapping_add(1);
                    weight = weight.wrapping_add(1);
                }
            }
        }
        let slopes = conv.slope.as_ptr().wrapping_add(block);
        for b in 0..B {
            let slope = L::load(slopes.wrapping_add(b));
            for p in 0..P {
                sums[b][p].prelu(slope).store(&mut out[p * conv.blocks + b]);
            }
        }
    }
}

/// The largest of each window of up to `pool`×`pool` pixels at stride 2, over one row of windows. `rows` are the rows of
/// the windows, each `columns` pixels of `blocks` blocks.
///
/// # Safety
/// The machine has the instructions of `L`.
#[inline(always)]
unsafe fn pool_lanes<L: Lanes>(
    rows: &[&[Block]],
    columns: usize,
    blocks: usize,
    pool: usize,
    out: &mut [Block],
) {
    for (x, out) in out.chunks_exact_mut(blocks).enumerate() {
        let (from, to) = (2 * x, (2 * x + pool).min(columns));
        for (b, out) in out.iter_mut().enumerate() {
            // SAFETY: references can be read.
            unsafe {
                let mut largest = L::load(&rows[0][from * blocks + b]);
                for row in rows {
                    for column in from..to {
                        largest = largest.max(L::load(&row[column * blocks + b]));
                    }
                }
                largest.store(out);
            }
        }
    }
}

/// Scores of "no face" and "face" to the probability of a face.
fn probability(scores: &Block) -> f32 {
    let largest = scores.0[0].max(scores.0[1]);
    let (none, face) = ((scores.0[0] - largest).exp(), (scores.0[1] - largest).exp());
    face / (none + face)
}

/// Pixels as the networks want them: (x − 127.5)/128.
fn normalise(pixels: &[u8], out: &mut Vec<f32>) {
    out.clear();
    out.extend(pixels.iter().map(|&x| (f32::from(x) - 127.5) * 0.0078125));
}

/// Working memory, reused from one level or crop to the next.
#[derive(Default)]
struct Scratch {
    input: Vec<f32>,
    rows: Vec<Block>,
    first: Vec<Block>,
    second: Vec<Block>,
    third: Vec<Block>,
}

fn grown(buffer: &mut Vec<Block>, len: usize) -> &mut [Block] {
    buffer.resize(len.max(buffer.len()), Block::default());
    &mut buffer[..len]
}

/// The three networks, packed for these kernels.
pub(crate) struct Cascade {
    isa: Isa,
    pnet: [Conv; 4],
    rnet: [Conv; 5],
    onet: [Conv; 6],
}

impl Cascade {
    /// The networks with the weights that ship with the crate.
    pub(crate) fn new(isa: Isa) -> Self {
        let (p, r, o) = (Tensors::pnet(), Tensors::rnet(), Tensors::onet());
        Self {
            isa,
            pnet: [
                Conv::load(&p, "conv1", Some("prelu1"), 3),
                Conv::load(&p, "conv2", Some("prelu2"), 16),
                Conv::load(&p, "conv3", Some("prelu3"), 16),
                Conv::load_heads(&p, &["conv4_1", "conv4_2"], 32),
            ],
            rnet: [
                Conv::load(&r, "conv1", Some("prelu1"), 3),
                Conv::load(&r, "conv2", Some("prelu2"), 32),
                Conv::load(&r, "conv3", Some("prelu3"), 48),
                Conv::load_first_dense(&r, "dense4", "prelu4", 3, 64),
                Conv::load_heads(&r, &["dense5_1", "dense5_2"], 128),
            ],
            onet: [
                Conv::load(&o, "conv1", Some("prelu1"), 3),
                Conv::load(&o, "conv2", Some("prelu2"), 32),
                Conv::load(&o, "conv3", Some("prelu3"), 64),
                Conv::load(&o, "conv4", Some("prelu4"), 64),
                Conv::load_first_dense(&o, "dense5", "prelu5", 3, 128),
                Conv::load_heads(&o, &["dense6_1", "dense6_2", "dense6_3"], 256),
            ],
        }
    }

    /// The two dense layers at the end of R-Net and O-Net, over all crops at once.
    fn dense(&self, dense: &Conv, heads: &Conv, features: &[Block], crops: usize) -> Vec<Block> {
        let mut hidden = vec![Block::default(); crops * dense.blocks];
        dense.forward(self.isa, floats(features), crops, 0..1, &mut hidden);
        let mut out = vec![Block::default(); crops * heads.blocks];
        heads.forward(self.isa, floats(&hidden), crops, 0..1, &mut out);
        out
    }
}

/// Crops that go through R-Net or O-Net at once: bounds the memory of a picture full of candidates.
const CROPS: usize = 64;

impl Networks for Cascade {
    fn propose(&self, level: &Image, threshold: f32) -> Vec<Proposal> {
        let [conv1, conv2, conv3, heads] = &self.pnet;
        let (height, width) = (level.height(), level.width());
        let (rows, columns) = (pooled(height - 2, 2) - 4, pooled(width - 2, 2) - 4);
        // Strips of rows whose maps fit the second-level cache; a strip shares four pooled rows with the next.
        let strip = (512 * 1024 / (64 * 2 * (columns + 4))).max(16);
        let mut scratch = Scratch::default();
        let mut proposals = Vec::new();
        for top in (0..rows).step_by(strip) {
            let strip = strip.min(rows - top);
            let input_rows = 2 * top..(2 * (top + strip + 4) + 2).min(height);
            normalise(
                &level.pixels()[input_rows.start * width * 3..input_rows.end * width * 3],
                &mut scratch.input,
            );
            let size = (input_rows.len(), width);
            let (h, w) = conv1.forward_pooled(
                self.isa,
                &scratch.input,
                size,
                2,
                &mut scratch.rows,
                &mut scratch.first,
            );
            let second = grown(&mut scratch.second, (h - 2) * (w - 2));
            conv2.forward(self.isa, floats(&scratch.first[..h * w]), w, 0..h - 2, second);
            let third = grown(&mut scratch.third, columns * 3);
            let (third, out) = third.split_at_mut(columns * 2);
            for row in 0..strip {
                conv3.forward(self.isa, floats(second), w - 2, row..row + 1, third);
                heads.forward(self.isa, floats(third), columns, 0..1, out);
                for (column, scores) in out.iter().enumerate() {
                    let probability = probability(scores);
                    if probability > threshold {
                        let [_, _, offsets @ ..] = scores.0;
                        let offsets = [offsets[0], offsets[1], offsets[2], offsets[3]];
                        proposals.push(Proposal {
                            row: top + row,
                            column,
                            probability,
                            offsets,
                        });
                    }
                }
            }
        }
        proposals
    }

    fn refine(&self, crops: &mut dyn Iterator<Item = Image>) -> Vec<Refinement> {
        let [conv1, conv2, conv3, dense, heads] = &self.rnet;
        let mut scratch = Scratch::default();
        let mut features = Vec::new();
        let mut refinements = Vec::new();
        loop {
            let mut count = 0;
            for crop in (&mut *crops).take(CROPS) {
                let s = &mut scratch;
                normalise(crop.pixels(), &mut s.input);
                let size = conv1.forward_pooled(self.isa, &s.input, (24, 24), 3, &mut s.rows, &mut s.first);
                let size =
                    conv2.forward_pooled(self.isa, floats(&s.first), size, 3, &mut s.rows, &mut s.second);
                features.resize((count + 1) * 36, Block::default()); // [N, 3, 3, 64]
                conv3.forward(
                    self.isa,
                    floats(&s.second),
                    size.1,
                    0..3,
                    &mut features[count * 36..],
                );
                count += 1;
            }
            if count == 0 {
                return refinements;
            }
            refinements.extend(self.dense(dense, heads, &features, count).iter().map(|out| {
                let [_, _, x1, y1, x2, y2, ..] = out.0;
                Refinement {
                    probability: probability(out),
                    offsets: [x1, y1, x2, y2],
                }
            }));
        }
    }

    fn output(&self, crops: &mut dyn Iterator<Item = Image>) -> Vec<Output> {
        let [conv1, conv2, conv3, conv4, dense, heads] = &self.onet;
        let mut scratch = Scratch::default();
        let mut features = Vec::new();
        let mut outputs = Vec::new();
        loop {
            let mut count = 0;
            for crop in (&mut *crops).take(CROPS) {
                let s = &mut scratch;
                normalise(crop.pixels(), &mut s.input);
                let size = conv1.forward_pooled(self.isa, &s.input, (48, 48), 3, &mut s.rows, &mut s.first);
                let size =
                    conv2.forward_pooled(self.isa, floats(&s.first), size, 3, &mut s.rows, &mut s.second);
                let size =
                    conv3.forward_pooled(self.isa, floats(&s.second), size, 2, &mut s.rows, &mut s.third);
                features.resize((count + 1) * 72, Block::default()); // [N, 3, 3, 128]
                conv4.forward(
                    self.isa,
                    floats(&s.third),
                    size.1,
                    0..3,
                    &mut features[count * 72..],
                );
                count += 1;
            }
            if count == 0 {
                return outputs;
            }
            outputs.extend(self.dense(dense, heads, &features, count).iter().map(|out| {
                let [_, _, x1, y1, x2, y2, landmarks @ ..] = out.0;
                Output {
                    probability: probability(out),
                    offsets: [x1, y1, x2, y2],
                    landmarks,
                }
            }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::networks::OnDevice;
    use burn::tensor::Device;

    /// Numbers in [-1, 1) without a pattern.
    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    /// Smooth enough that the networks find something to say about it.
    fn picture(width: usize, height: usize, seed: u32) -> Image {
        let pixels = numbers((width / 4 + 1) * (height / 4 + 1) * 3, seed);
        let coarse = pixels.iter().map(|x| ((x + 1.0) * 127.0) as u8).collect();
        Image::new(width / 4 + 1, height / 4 + 1, coarse).resize_bilinear(width, height)
    }

    #[test]
    fn convolutions_equal_the_plain_sum() {
        // Widths around every tile size, channels with and without padding, one to eight blocks of outputs.
        for (case, &(inputs, pixel_stride, outputs, kh, kw)) in [
            (3, 3, 10, 3, 3),
            (10, 16, 16, 3, 3),
            (28, 32, 48, 3, 3),
            (64, 64, 128, 2, 2),
            (40, 40, 33, 1, 1),
        ]
        .iter()
        .enumerate()
        {
            for width in [kw, kw + 1, kw + 2, kw + 5, kw + 8, kw + 11, kw + 12, kw + 24] {
                let height = kh + 1;
                let weight = numbers(outputs * inputs * kh * kw, case as u32);
                let (bias, slope) = (numbers(outputs, 7), numbers(outputs, 8));
                let input = numbers(height * width * pixel_stride, 9);
                let conv = Conv::new(
                    &weight,
                    [outputs, inputs, kh, kw],
                    &bias,
                    Some(&slope),
                    pixel_stride,
                );
                let out_width = width + 1 - kw;
                let mut results = Vec::new();
                for isa in Isa::available() {
                    let mut out = vec![Block::default(); 2 * out_width * conv.blocks];
                    conv.forward(isa, &input, width, 0..2, &mut out);
                    for y in 0..2 {
                        for x in 0..out_width {
                            for o in 0..outputs {
                                let mut sum = f64::from(bias[o]);
                                for (i, w) in weight[o * inputs * kh * kw..][..inputs * kh * kw]
                                    .iter()
                                    .enumerate()
                                {
                                    let (c, ky, kx) = (i / (kh * kw), i / kw % kh, i % kw);
                                    let at = ((y + ky) * width + x + kx) * pixel_stride + c;
                                    sum += f64::from(*w) * f64::from(input[at]);
                                }
                                let expected = if sum > 0.0 { sum } else { f64::from(slope[o]) * sum };
                                let found = out[(y * out_width + x) * conv.blocks + o / 16].0[o % 16];
                                assert!(
                                    (f64::from(found) - expected).abs() < 1e-4,
                                    "{isa:?} {width}: {found} {expected}"
                                );
                            }
                        }
                    }
                    if isa != Isa::Portable {
                        results.push(out);
                    }
                }
                assert!(
                    results.windows(2).all(|pair| pair[0] == pair[1]),
                    "vector paths differ"
                );
            }
        }
    }

    fn close(a: &[f32], b: &[f32]) -> bool {
        a.len() == b.len()
            && a.iter()
                .zip(b)
                .all(|(a, b)| (a - b).abs() <= 1e-4 * b.abs().max(1.0))
    }

    #[test]
    fn equal_the_networks_as_they_are_defined() {
        let reference = OnDevice::new(&Device::flex());
        for isa in Isa::available() {
            let cascade = Cascade::new(isa);
            // Heights that need several strips, odd and even sizes, the smallest.
            for (width, height) in [(12, 12), (13, 14), (60, 41), (37, 120)] {
                let level = picture(width, height, 1);
                let (fast, slow) = (cascade.propose(&level, 1e-6), reference.propose(&level, 1e-6));
                let cell = |proposal: &Proposal| (proposal.row, proposal.column);
                assert_eq!(
                    fast.iter().map(cell).collect::<Vec<_>>(),
                    slow.iter().map(cell).collect::<Vec<_>>(),
                    "{isa:?} {width}x{height}"
                );
                for (a, b) in fast.iter().zip(&slow) {
                    assert!(
                        close(&[a.probability], &[b.probability]) && close(&a.offsets, &b.offsets),
                        "{a:?} {b:?}"
                    );
                }
            }
            // More crops than one batch.
            let crops = |side| (0..70).map(move |seed| picture(side, side, seed));
            let (fast, slow) = (cascade.refine(&mut crops(24)), reference.refine(&mut crops(24)));
            assert_eq!((fast.len(), slow.len()), (70, 70));
            for (a, b) in fast.iter().zip(&slow) {
                assert!(
                    close(&[a.probability], &[b.probability]) && close(&a.offsets, &b.offsets),
                    "{a:?} {b:?}"
                );
            }
            let (fast, slow) = (cascade.output(&mut crops(48)), reference.output(&mut crops(48)));
            assert_eq!((fast.len(), slow.len()), (70, 70));
            for (a, b) in fast.iter().zip(&slow) {
                assert!(
                    close(&[a.probability], &[b.probability]) && close(&a.offsets, &b.offsets),
                    "{a:?} {b:?}"
                );
                assert!(close(&a.landmarks, &b.landmarks), "{a:?} {b:?}");
            }
        }
    }

    #[test]
    fn strips_do_not_show() {
        // Wide enough for strips of 16 rows: the map is the same as that of the whole.
        let (cascade, level) = (Cascade::new(Isa::detect()), picture(700, 90, 3));
        let whole = cascade.propose(&level, 1e-6);
        assert!(whole.len() > 1000);
        let top = level.crop(0, 0, 700, 60);
        let part = cascade.propose(&top, 1e-6);
        let rows = 60 / 2 - 5 - 1;
        let bits = |proposals: &[Proposal]| -> Vec<(usize, usize, u32)> {
            let inside = proposals.iter().filter(|proposal| proposal.row < rows);
            inside
                .map(|p| (p.row, p.column, p.probability.to_bits()))
                .collect()
        };
        assert_eq!(bits(&part), bits(&whole));
    }
}
