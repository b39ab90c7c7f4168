"""IR-50's convolutions one by one, each pass on its own: oneDNN through PyTorch, channels-last f32."""

import math
import time

BATCH = 16
# What a run of one case takes at least: calls are repeated until then, as `faceprior bench conv` does.
SECONDS = 0.1
# Side of the kernel, channels in and out, side of the input, stride.
SHAPES = (
    (3, 64, 64, 112, 1),
    (3, 64, 64, 56, 1),
    (3, 64, 128, 56, 1),
    (3, 128, 128, 28, 1),
    (3, 128, 256, 28, 1),
    (3, 256, 256, 14, 1),
    (3, 256, 512, 14, 1),
    (3, 512, 512, 7, 1),
    (3, 64, 64, 112, 2),
    (3, 128, 128, 56, 2),
    (3, 256, 256, 28, 2),
    (3, 512, 512, 14, 2),
    (1, 64, 128, 56, 2),
    (1, 128, 256, 28, 2),
    (1, 256, 512, 14, 2),
)
PASSES = ("forward", "data-gradient", "weight-gradient")


def name(shape, which):
    kernel, inputs, outputs, size, stride = shape
    return f"{kernel}x{kernel}-{inputs}x{outputs}-{size}-s{stride}-{which}"


CASES = tuple(name(shape, which) for shape in SHAPES for which in PASSES)


def passes(kernel, inputs, outputs, size, stride):
    """What computes each of PASSES once."""
    import torch

    def operand(*shape):
        return torch.randn(shape).to(memory_format=torch.channels_last)

    padding = kernel // 2
    x, weight = operand(BATCH, inputs, size, size), operand(outputs, inputs, kernel, kernel)
    side = (size + 2 * padding - kernel) // stride + 1
    dy = operand(BATCH, outputs, side, side)

    def forward():
        return torch.nn.functional.conv2d(x, weight, None, stride, padding)

    def backward(data):
        return torch.ops.aten.convolution_backward(
            dy, x, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, [data, not data, False]
        )

    return {"forward": forward, "data-gradient": lambda: backward(True), "weight-gradient": lambda: backward(False)}


def measure(runs, warmup):
    """Each case's seconds of a call, in each of `runs` runs."""
    import torch

    def seconds(call, calls):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    cases = []
    with torch.inference_mode():
        for shape in SHAPES:
            for which, call in passes(*shape).items():
                once = [seconds(call, 1) for _ in range(max(warmup, 2))][-1]
                calls = max(math.ceil(SECONDS / once), 1)
                cases.append({"name": name(shape, which), "runs": [seconds(call, calls) for _ in range(runs)]})
    return {"cases": cases}
