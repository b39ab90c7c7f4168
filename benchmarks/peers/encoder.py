"""Stage 2 of the recipe `paper`: the ReStyle-pSp encoder's training step through the frozen generator."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import irse, stylegan2

RESOLUTION = 128
NUM_WS = 14


class EqualLinear(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale = 1 / math.sqrt(inputs)

    def forward(self, x):
        return F.linear(x, self.weight * self.scale, self.bias)


class StyleHead(nn.Module):
    """Halves 7² to one pixel."""

    def __init__(self, channels):
        super().__init__()
        layers = []
        for _ in range(3):
            layers += [nn.Conv2d(channels, channels, 3, 2, 1), nn.LeakyReLU()]
        self.convs = nn.Sequential(*layers)
        self.linear = EqualLinear(channels, channels)

    def forward(self, x):
        return self.linear(self.convs(x).flatten(1))


class Encoder(irse.Body):
    def __init__(self, depth, num_ws):
        super().__init__(depth)
        self.styles = nn.ModuleList([StyleHead(512) for _ in range(num_ws)])

    def forward(self, x):
        x = self.features(x)
        return torch.stack([style(x) for style in self.styles], 1)


def perceptual_distance(d, images, targets):
    """Mean over the frozen discriminator's blocks and pixels of the squared distance of unit feature vectors."""

    def unit(x):
        return x / (x.square().sum(1, keepdim=True) + 1e-10).sqrt()

    with torch.no_grad():
        targets = [unit(x) for x in d.features(targets)]
    features = d.features(images)
    distances = [(unit(x) - y).square().mean() * x.shape[1] for x, y in zip(features, targets)]
    return sum(distances) / len(distances)


class Ranger:
    """Gradient centralisation, RAdam and Lookahead, as the reference's: betas (0.95, 0.999), eps 1e-5, k 6, alpha 0.5."""

    def __init__(self, params, lr, weight_decay=0.0):
        self.params, self.lr, self.weight_decay, self.t = list(params), lr, weight_decay, 0
        self.m = [torch.zeros_like(p) for p in self.params]
        self.v = [torch.zeros_like(p) for p in self.params]
        self.slow = [p.detach().clone() for p in self.params]

    def zero_grad(self):
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def step(self):
        beta1, beta2, eps = 0.95, 0.999, 1e-5
        self.t += 1
        gradients = [p.grad for p in self.params]
        for g in gradients:
            if g.dim() > 1:
                g.sub_(g.mean(tuple(range(1, g.dim())), keepdim=True))
        torch._foreach_lerp_(self.m, gradients, 1 - beta1)
        torch._foreach_mul_(self.v, beta2)
        torch._foreach_addcmul_(self.v, gradients, gradients, 1 - beta2)
        if self.weight_decay:
            torch._foreach_mul_(self.params, 1 - self.lr * self.weight_decay)
        decayed = beta2**self.t
        most = 2 / (1 - beta2) - 1
        n = most - 2 * self.t * decayed / (1 - decayed)
        rate = self.lr / (1 - beta1**self.t)
        if n > 5:
            rate *= math.sqrt((1 - decayed) * (n - 4) / (most - 4) * (n - 2) / n * most / (most - 2))
            root = torch._foreach_sqrt(self.v)
            torch._foreach_add_(root, eps)
            torch._foreach_addcdiv_(self.params, self.m, root, -rate)
        else:
            torch._foreach_add_(self.params, self.m, alpha=-rate)
        if self.t % 6 == 0:
            torch._foreach_lerp_(self.slow, self.params, 0.5)
            torch._foreach_copy_(self.params, self.slow)


def prepare(work):
    batch, size, layout = int(work.rsplit("-", 1)[1]), irse.IMAGE_SIZE, torch.channels_last
    encoder = Encoder(50, NUM_WS).to(memory_format=layout)
    g = stylegan2.Generator(RESOLUTION, 8, "dense").to(memory_format=layout).requires_grad_(False)
    d = stylegan2.Discriminator(RESOLUTION, "dense").to(memory_format=layout).requires_grad_(False)
    images = torch.randn(batch, 3, size, size).clamp(-1, 1).to(memory_format=layout)
    latent_avg = torch.zeros(stylegan2.Z_DIM)
    with torch.no_grad():
        average = g.synthesis(latent_avg.expand(1, g.num_ws, -1), "const")
        average = resize(average, size).expand(batch, -1, -1, -1)
    optimizer = Ranger(encoder.parameters(), 1e-4)

    def step():
        optimizer.zero_grad()
        beside = torch.cat([images, average], 1).contiguous(memory_format=layout)
        codes = latent_avg + encoder(beside)
        decoded = g.synthesis(codes)
        mse = (resize(decoded, size) - images).square().mean()
        perceptual = perceptual_distance(d, decoded, resize(images, RESOLUTION))
        loss = mse + 0.8 * perceptual
        loss.backward()
        optimizer.step()
        loss.item()

    return step, batch


def resize(images, size):
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
