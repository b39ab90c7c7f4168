"""MobileFaceNet in its public layout, 112 high and 96 wide."""

import torch
from torch import nn

from . import inference

# Expansion, channels in units of the width, repeats, stride of the first.
BLOCKS = ((2, 1, 5, 2), (4, 2, 1, 2), (2, 2, 6, 1), (4, 2, 1, 2), (2, 2, 2, 1))


class ConvBlock(nn.Module):
    def __init__(self, inputs, outputs, kernel, stride=1, padding=0, groups=1, linear=False):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.prelu = None if linear else nn.PReLU(outputs)

    def forward(self, x):
        x = self.bn(self.conv(x))
        return x if self.prelu is None else self.prelu(x)


class InvertedResidual(nn.Module):
    def __init__(self, inputs, outputs, stride, expansion):
        super().__init__()
        hidden = inputs * expansion
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.PReLU(hidden),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.PReLU(hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x):
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileFaceNet(nn.Module):
    def __init__(self, image_size=(112, 96), width=64, embedding_dim=128):
        super().__init__()
        rest = tuple(-(-size // 16) for size in image_size)
        self.conv1 = ConvBlock(3, width, 3, 2, 1)
        self.dw_conv1 = ConvBlock(width, width, 3, 1, 1, width)
        blocks, inputs = [], width
        for expansion, widths, repeats, stride in BLOCKS:
            for repeat in range(repeats):
                blocks.append(InvertedResidual(inputs, widths * width, 1 if repeat else stride, expansion))
                inputs = widths * width
        self.blocks = nn.Sequential(*blocks)
        self.conv2 = ConvBlock(inputs, 8 * width, 1)
        self.linear7 = ConvBlock(8 * width, 8 * width, rest, groups=8 * width, linear=True)
        self.linear1 = ConvBlock(8 * width, embedding_dim, 1, linear=True)

    def forward(self, x):
        x = self.blocks(self.dw_conv1(self.conv1(x)))
        return self.linear1(self.linear7(self.conv2(x))).flatten(1)


def prepare(work, form, folder, threads):
    batch = int(work.rsplit("-", 1)[1])
    return inference.prepare(MobileFaceNet(), torch.randn(batch, 3, 112, 96), form, folder, threads), batch
