"""IR-SE recogniser (ArcFace's improved ResNet, face.evoLVe's output layer) and its training step."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import inference

UNITS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3), 152: (3, 8, 36, 3)}
IMAGE_SIZE = 112
NUM_CLASSES = 1000


class SqueezeExcitation(nn.Module):
    def __init__(self, channels, reduction=16):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1, bias=False)

    def forward(self, x):
        scale = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(scale))))


class Unit(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        if inputs == outputs:
            self.shortcut_layer = nn.MaxPool2d(1, stride)
        else:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False),
            nn.PReLU(outputs),
            nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            SqueezeExcitation(outputs),
        )

    def forward(self, x):
        return self.res_layer(x) + self.shortcut_layer(x)


class Body(nn.Module):
    """Input layer and all units."""

    def __init__(self, depth, in_channels=6):
        super().__init__()
        self.input_layer = nn.Sequential(
            nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64)
        )
        body, inputs = [], 64
        for outputs, units in zip((64, 128, 256, 512), UNITS[depth]):
            for unit in range(units):
                body.append(Unit(inputs, outputs, 2 if unit == 0 else 1))
                inputs = outputs
        self.body = nn.Sequential(*body)

    def features(self, x):
        return self.body(self.input_layer(x))


class Backbone(Body):
    def __init__(self, depth):
        super().__init__(depth)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(512), nn.Dropout(0.5), nn.Flatten(), nn.Linear(512 * 7 * 7, 512), nn.BatchNorm1d(512)
        )

    def forward(self, x):
        return self.output_layer(self.features(x))


class Recognizer(nn.Module):
    """The recogniser-from-encoder form: keys under `encoder.`, six input channels [image | average image]."""

    def __init__(self, depth):
        super().__init__()
        self.encoder = Backbone(depth)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x):
        return self.encoder(x)


class ArcFace(nn.Module):
    def __init__(self, dim, classes, s=64.0, m=0.5):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, dim))
        nn.init.xavier_uniform_(self.weight)
        self.s, self.m = s, m

    def forward(self, embeddings, labels):
        cosine = F.linear(F.normalize(embeddings), F.normalize(self.weight))
        target = cosine.gather(1, labels[:, None])
        sine = (1 - target * target).clamp(1e-10, 1 - 1e-10).sqrt()
        margin = target * math.cos(self.m) - sine * math.sin(self.m)
        margin = torch.where(
            target > math.cos(math.pi - self.m), margin, target - math.sin(math.pi - self.m) * self.m
        )
        return self.s * cosine.scatter(1, labels[:, None], margin)


def focal(logits, labels, gamma=2.0):
    """face.evoLVe's: on the mean cross-entropy of the batch."""
    ce = F.cross_entropy(logits, labels)
    return (1 - torch.exp(-ce)) ** gamma * ce


def sgd(net, head):
    """Momentum 0.9, decay 2e-3 on everything but BatchNorm's parameters."""
    norms = [m for m in net.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    plain = [p for m in norms for p in m.parameters()]
    known = {id(p) for p in plain}
    decayed = [p for p in [*net.parameters(), *head.parameters()] if id(p) not in known]
    return torch.optim.SGD(
        [{"params": decayed, "weight_decay": 2e-3}, {"params": plain, "weight_decay": 0.0}], lr=0.03, momentum=0.9
    )


def prepare(work, form, folder, threads):
    _, mode, batch = work.split("-")
    batch = int(batch)
    net, images = Recognizer(50), torch.randn(batch, 6, IMAGE_SIZE, IMAGE_SIZE)
    if mode == "infer":
        return inference.prepare(net, images, form, folder, threads), batch

    layout = torch.contiguous_format if form == "contiguous" else torch.channels_last
    net, images = net.to(memory_format=layout), images.to(memory_format=layout)
    head = ArcFace(512, NUM_CLASSES)
    labels = torch.randint(NUM_CLASSES, (batch,))
    optimizer = sgd(net, head)

    def train():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=form == "bf16"):
            embeddings = net(images)
        loss = focal(head(embeddings.float(), labels), labels)
        loss.backward()
        optimizer.step()
        loss.item()

    return train, batch
