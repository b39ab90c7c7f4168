"""StyleGAN2-ADA in the lightning port's variant, in two formulations that give the same numbers.

`reference`: per-sample weights in a grouped convolution, and the 4x4 FIR as a convolution of N*C pictures of one
channel, as the port computes them. `dense`: channels scaled, one shared convolution, channels scaled again, and the
resamplers as separable depthwise convolutions. R1 and path length differentiate twice.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

Z_DIM = 512


def channels(resolution, base=16384, maximum=512):
    return min(base // resolution, maximum)


def fir(x):
    """Replication pad (2, 1, 2, 1) and the 4x4 [1, 3, 3, 1] filter over N*C pictures of one channel."""
    n, c, h, w = x.shape
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype)
    kernel = (taps[:, None] * taps[None, :] / 64)[None, None]
    x = F.pad(x.reshape(n * c, 1, h, w), (2, 1, 2, 1), mode="replicate")
    return F.conv2d(x, kernel).reshape(n, c, h, w)


def depthwise(x, stride=1):
    """The same filter as two passes of a depthwise convolution: in channels-last the fastest form tried in plain PyTorch,
    ahead of sums of shifted slices."""
    c = x.shape[1]
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 8
    x = F.pad(x, (2, 1, 2, 1), mode="replicate")
    x = F.conv2d(x, taps.view(1, 1, 4, 1).expand(c, 1, 4, 1), stride=(stride, 1), groups=c)
    return F.conv2d(x, taps.view(1, 1, 1, 4).expand(c, 1, 1, 4), stride=(1, stride), groups=c)


def upsample(x, form):
    x = F.interpolate(x, scale_factor=2, mode="nearest")
    return fir(x) if form == "reference" else depthwise(x)


def downsample(x, form):
    return fir(x)[:, :, ::2, ::2] if form == "reference" else depthwise(x, 2)


def modulated_conv(x, weight, style, demodulate, form):
    """weight [O, I, k, k], style [N, I]."""
    n, _, h, w = x.shape
    outputs, inputs, k, _ = weight.shape
    if form == "reference":
        weights = weight[None] * style[:, None, :, None, None]
        if demodulate:
            weights = weights * (weights.square().sum([2, 3, 4], keepdim=True) + 1e-8).rsqrt()
        x = x.reshape(1, n * inputs, h, w)
        x = F.conv2d(x, weights.reshape(n * outputs, inputs, k, k), padding=k // 2, groups=n)
        return x.reshape(n, outputs, h, w)
    x = F.conv2d(x * style[:, :, None, None], weight, padding=k // 2)
    if demodulate:
        factor = (style.square() @ weight.square().sum([2, 3]).t() + 1e-8).rsqrt()
        x = x * factor[:, :, None, None]
    return x


def leaky(x, gain=1.0):
    return F.leaky_relu(x, 0.2) * (math.sqrt(2) * gain)


class FullyConnected(nn.Module):
    def __init__(self, inputs, outputs, lrelu=False, lr_mul=1.0, bias_init=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / lr_mul)
        self.bias = nn.Parameter(torch.full((outputs,), bias_init))
        self.weight_gain, self.bias_gain, self.lrelu = lr_mul / math.sqrt(inputs), lr_mul, lrelu

    def forward(self, x):
        x = F.linear(x, self.weight * self.weight_gain, self.bias * self.bias_gain)
        return leaky(x) if self.lrelu else x


class EqualizedConv(nn.Module):
    def __init__(self, inputs, outputs, kernel, form, lrelu=True, bias=True, down=False, gain=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.weight_gain = 1 / math.sqrt(inputs * kernel * kernel)
        self.padding, self.form, self.lrelu, self.down, self.gain = kernel // 2, form, lrelu, down, gain

    def forward(self, x):
        if self.down:
            x = downsample(x, self.form)
        x = F.conv2d(x, self.weight * self.weight_gain, self.bias, padding=self.padding)
        x = leaky(x, self.gain) if self.lrelu else x * self.gain
        return x.clamp(-256 * self.gain, 256 * self.gain)


class Mapping(nn.Module):
    def __init__(self, depth, num_ws):
        super().__init__()
        self.layers = nn.ModuleList([FullyConnected(Z_DIM, Z_DIM, True, 0.01) for _ in range(depth)])
        self.register_buffer("w_avg", torch.zeros(Z_DIM))
        self.num_ws = num_ws

    def forward(self, z, truncation=1.0, track=False):
        x = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        for layer in self.layers:
            x = layer(x)
        if track:
            self.w_avg.copy_(x.detach().mean(0).lerp(self.w_avg, 0.995))
        if truncation != 1:
            x = self.w_avg.lerp(x, truncation)
        return x[:, None].expand(-1, self.num_ws, -1)


class SynthesisLayer(nn.Module):
    def __init__(self, inputs, outputs, resolution, form, up=False):
        super().__init__()
        self.affine = FullyConnected(Z_DIM, inputs, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        self.noise_strength = nn.Parameter(torch.zeros(1))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))
        self.form, self.up = form, up

    def forward(self, x, w, noise):
        x = modulated_conv(x, self.weight, self.affine(w), True, self.form)
        if self.up:
            x = upsample(x, self.form)
        if noise == "random":
            x = x + x.new_empty(x.shape[0], 1, *x.shape[2:]).normal_() * self.noise_strength
        else:
            x = x + self.noise_const * self.noise_strength
        return leaky(x + self.bias[None, :, None, None]).clamp(-256, 256)


class ToRgb(nn.Module):
    def __init__(self, inputs, form):
        super().__init__()
        self.affine = FullyConnected(Z_DIM, inputs, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(3, inputs, 1, 1))
        self.bias = nn.Parameter(torch.zeros(3))
        self.gain, self.form = 1 / math.sqrt(inputs), form

    def forward(self, x, w):
        x = modulated_conv(x, self.weight, self.affine(w) * self.gain, False, self.form)
        return (x + self.bias[None, :, None, None]).clamp(-256, 256)


class FirstBlock(nn.Module):
    def __init__(self, width, form):
        super().__init__()
        self.const = nn.Parameter(torch.randn(width, 4, 4))
        self.conv1 = SynthesisLayer(width, width, 4, form)
        self.torgb = ToRgb(width, form)

    def forward(self, w, noise):
        x = self.const[None].expand(w.shape[0], -1, -1, -1)
        x = self.conv1(x, w[:, 0], noise)
        return x, self.torgb(x, w[:, 1])


class SynthesisBlock(nn.Module):
    def __init__(self, inputs, outputs, resolution, form):
        super().__init__()
        self.conv0 = SynthesisLayer(inputs, outputs, resolution, form, up=True)
        self.conv1 = SynthesisLayer(outputs, outputs, resolution, form)
        self.torgb = ToRgb(outputs, form)
        self.form = form

    def forward(self, x, image, w, noise):
        x = self.conv0(x, w[:, 0], noise)
        x = self.conv1(x, w[:, 1], noise)
        return x, upsample(image, self.form) + self.torgb(x, w[:, 2])


class Synthesis(nn.Module):
    def __init__(self, resolution, form):
        super().__init__()
        self.blocks, inputs = nn.ModuleList(), channels(4)
        for level in range(3, int(math.log2(resolution)) + 1):
            self.blocks.append(SynthesisBlock(inputs, channels(2**level), 2**level, form))
            inputs = channels(2**level)
        self.first_block = FirstBlock(channels(4), form)

    def forward(self, ws, noise="random"):
        x, image = self.first_block(ws, noise)
        for n, block in enumerate(self.blocks, 1):
            x, image = block(x, image, ws[:, 2 * n - 1 : 2 * n + 2], noise)
        return image


class Generator(nn.Module):
    def __init__(self, resolution, depth, form):
        super().__init__()
        self.num_ws = 2 * int(math.log2(resolution))
        self.synthesis = Synthesis(resolution, form)
        self.mapping = Mapping(depth, self.num_ws)


class DiscriminatorBlock(nn.Module):
    def __init__(self, inputs, outputs, form):
        super().__init__()
        self.conv0 = EqualizedConv(inputs, inputs, 3, form)
        self.conv1 = EqualizedConv(inputs, outputs, 3, form, down=True, gain=math.sqrt(0.5))
        self.skip = EqualizedConv(
            inputs, outputs, 1, form, lrelu=False, bias=False, down=True, gain=math.sqrt(0.5)
        )

    def forward(self, x):
        return self.skip(x) + self.conv1(self.conv0(x))


class Epilogue(nn.Module):
    def __init__(self, width, form):
        super().__init__()
        self.conv = EqualizedConv(width + 1, width, 3, form)
        self.fc = FullyConnected(width * 16, width, lrelu=True)
        self.out = FullyConnected(width, 1)

    def forward(self, x):
        n, _, h, w = x.shape
        group = min(4, n)
        deviation = x.reshape(group, n // group, -1)
        deviation = (deviation.var(0, unbiased=False) + 1e-8).sqrt().mean(1)
        deviation = deviation.repeat(group)[:, None, None, None].expand(-1, 1, h, w)
        x = self.conv(torch.cat([x, deviation], 1))
        return self.out(self.fc(x.flatten(1)))


class Discriminator(nn.Module):
    def __init__(self, resolution, form):
        super().__init__()
        sizes = [2**level for level in range(int(math.log2(resolution)), 1, -1)]
        net = [EqualizedConv(3, channels(resolution), 1, form)]
        net += [DiscriminatorBlock(channels(a), channels(b), form) for a, b in zip(sizes, sizes[1:])]
        self.net = nn.Sequential(*net, Epilogue(channels(4), form))

    def forward(self, x):
        return self.net(x)

    def features(self, x):
        """The outputs of the blocks."""
        x, features = self.net[0](x), []
        for block in self.net[1:-1]:
            x = block(x)
            features.append(x)
        return features


def r1_penalty(d, real):
    """1/2 mean |d sum D(x) / dx|^2."""
    real = real.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(d(real).sum(), real, create_graph=True)
    return 0.5 * gradient.square().sum([1, 2, 3]).mean()


def path_length(g, z, noise, mean, noise_mode="random"):
    """Penalty and the new running mean; `noise` [N, 3, H, W] is already divided by sqrt(H W)."""
    ws = g.mapping(z)
    image = g.synthesis(ws, noise_mode)
    (gradient,) = torch.autograd.grad((image * noise).sum(), ws, create_graph=True)
    lengths = gradient.square().sum(2).mean(1).sqrt()
    mean = mean.lerp(lengths.mean(), 0.01)
    return (lengths - mean).square().mean(), mean


def mixed_codes(g, batch):
    """Style mixing with probability 0.9, one coin and one crossover a batch."""
    ws = g.mapping(torch.randn(batch, Z_DIM), track=True)
    if torch.rand(()) < 0.9:
        crossover = int(torch.rand(()) * g.num_ws)
        other = g.mapping(torch.randn(batch, Z_DIM))
        ws = torch.cat([ws[:, :crossover], other[:, crossover:]], 1)
    return ws


def prepare(work, form):
    resolution, batch = int(work.rsplit("-", 1)[1]), 8
    layout = torch.contiguous_format if form == "reference" else torch.channels_last
    g = Generator(resolution, 8, form).to(memory_format=layout)
    d = Discriminator(resolution, form).to(memory_format=layout)
    ema = copy.deepcopy(g).requires_grad_(False)
    real = torch.randn(batch, 3, resolution, resolution).clamp(-1, 1).to(memory_format=layout)
    adam_g = torch.optim.Adam(g.parameters(), 0.002, (0.0, 0.99), 1e-8)
    adam_d = torch.optim.Adam(d.parameters(), 0.00235, (0.0, 0.99), 1e-8)
    mean = torch.zeros(())

    def apply(optimizer, loss):
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def g_step():
        d.requires_grad_(False)
        apply(adam_g, F.softplus(-d(g.synthesis(mixed_codes(g, batch)))).mean())
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(g.parameters()), 0.005)

    def d_step():
        with torch.no_grad():
            fake = g.synthesis(mixed_codes(g, batch))
        apply(adam_d, F.softplus(d(fake)).mean() + F.softplus(-d(real)).mean())

    def r1():
        apply(adam_d, r1_penalty(d, real) * (4.0 * 16))

    def pl():
        nonlocal mean
        noise = torch.randn(batch, 3, resolution, resolution) / resolution
        penalty, new_mean = path_length(g, torch.randn(batch, Z_DIM), noise, mean)
        mean = new_mean.detach()
        apply(adam_g, penalty * (2.0 * 4))

    steps = {"gan-g": g_step, "gan-d": d_step, "gan-r1": r1, "gan-pl": pl}
    return steps[work.rsplit("-", 1)[0]], batch
