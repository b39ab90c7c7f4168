"""Are the peers the same networks? Parameter names and values against the repository's goldens, in float64."""

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open

from . import encoder, inference, irse, mobilefacenet, stylegan2

TOLERANCE = 1e-6
SQRT3 = math.sqrt(3)


def unit(name, n):
    """n numbers in [-1, 1) that depend on the name only: the goldens' fill rule."""
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = ((h ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    with np.errstate(over="ignore"):
        z = np.uint64(h) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(40)).astype(np.float64) / 2**23 - 1


def filled(name, shape, scale=1.0, shift=0.0):
    values = (unit(name, math.prod(shape)) * scale + shift).astype(np.float32)
    return torch.from_numpy(values).reshape(tuple(shape)).double()


def fill(net, prefix, rename=lambda key: key):
    modules = dict(net.named_modules())
    for key, tensor in net.state_dict().items():
        owner, _, last = key.rpartition(".")
        module = modules[owner]
        if last == "num_batches_tracked":
            continue
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            scale, shift = {
                "weight": (0.1, 1), "bias": (0.1, 0), "running_mean": (0.1, 0), "running_var": (0.25, 1)
            }[last]
        elif isinstance(module, torch.nn.PReLU):
            scale, shift = 0.05, 0.25
        elif isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) and last == "weight":
            scale, shift = math.sqrt(3 / math.prod(tensor.shape[1:])), 0
        elif last == "bias":
            scale, shift = 0.1, 0
        elif key.startswith("mapping.layers."):
            scale, shift = 100 * SQRT3, 0
        else:
            scale, shift = SQRT3, 0
        tensor.copy_(filled(prefix + rename(key), tensor.shape, scale, shift))


class Checker:
    def __init__(self, goldens):
        self.goldens, self.failed = Path(goldens), 0
        if not (self.goldens / "nets.json").exists():
            raise SystemExit("no nets.json in the folder of goldens; hint: --check goldens, from the repository's root")
        self.names = json.loads((self.goldens / "nets.json").read_text())

    def tensors(self, file):
        with safe_open(str(self.goldens / file), "pt") as f:
            return {key: f.get_tensor(key).double() for key in f.keys()}

    def same(self, what, got, want, tolerance=TOLERANCE):
        error = float((got.detach() - want).norm() / want.norm().clamp_min(1e-30))
        good = got.shape == want.shape and error <= tolerance
        self.report(what, good, f"relative error {error:.1e}")

    def report(self, what, good, detail):
        self.failed += not good
        print(f"{'ok  ' if good else 'FAIL'} {what}: {detail}")

    def gradients(self, what, net, names, want):
        have = dict(net.named_parameters())
        # FIR kernels are parameters there, with gradient 0, and constants here.
        expected = [n for n in names if not n.endswith(".kernel")]
        self.report(f"{what} names", sorted(have) == sorted(expected), f"{len(have)} parameters")
        norms = [have[n].grad.norm() if n in have and have[n].grad is not None else torch.zeros(()) for n in names]
        # Each parameter on its own, down to a millionth of the largest norm: a norm of norms would hide the small ones.
        got = torch.stack([n.double() for n in norms])
        error = float(((got - want).abs() / (want + 1e-6 * want.max())).max())
        self.report(f"{what} gradient norms", error <= TOLERANCE, f"worst relative error {error:.1e}")
        net.zero_grad(set_to_none=True)


def check_recognizer(check):
    golden = check.tensors("irse.safetensors")
    net = irse.Recognizer(50).double().eval()
    fill(net, "g.")
    average = filled("g.input.avg", (1, 3, 112, 112)).expand(2, -1, -1, -1)
    images = torch.cat([filled("g.input.image", (2, 3, 112, 112)), average], 1).requires_grad_()
    embedding = net(images)
    check.same("IR-SE-50 embedding", embedding, golden["restyle50.embedding"])
    (embedding * filled("g.cotangent", (2, 512))).sum().backward()
    check.gradients("IR-SE-50", net, check.names["restyle50.param_names"], golden["restyle50.grad_norm"])
    check.same("IR-SE-50 input gradient", images.grad[:, :, :8, :8], golden["restyle50.grad_input_corner"])


def golden_name(key):
    """A parameter of the peer's MobileFaceNet under the golden's name."""
    parts = key.split(".")
    if parts[0] == "blocks":
        number, layer = int(parts[1]), int(parts[3])
        starts = {0: "conv_23", 1: "conv_3.model.", 5: "conv_34", 6: "conv_4.model.", 12: "conv_45", 13: "conv_5.model."}
        start = max(n for n in starts if n <= number)
        block = starts[start] + (str(number - start) if starts[start].endswith(".") else "")
        within = ("conv.conv", "conv.bn", "conv.prelu", "conv_dw.conv", "conv_dw.bn", "conv_dw.prelu", "project.conv")
        return ".".join([block, (*within, "project.bn")[layer], parts[4]])
    if parts[0] == "linear1":
        return key.replace("linear1.conv", "linear").replace("linear1.", "")
    names = {"dw_conv1": "conv2_dw", "conv2": "conv_6_sep", "linear7": "conv_6_dw"}
    return ".".join([names.get(parts[0], parts[0]), *parts[1:]])


def check_mobilefacenet(check):
    net = mobilefacenet.MobileFaceNet((112, 112), 64, 512).double().eval()
    fill(net, "g.MobileFaceNet.", golden_name)
    names = {key for key, _ in check.names["MobileFaceNet.keys"]}
    check.report("MobileFaceNet names", {golden_name(key) for key in net.state_dict()} == names, f"{len(names)} tensors")
    with torch.no_grad():
        embedding = net(filled("g.input.image", (2, 3, 112, 112)))
    check.same("MobileFaceNet embedding", embedding, check.tensors("irse.safetensors")["MobileFaceNet.embedding"])


def check_encoder(check):
    golden = check.tensors("encoders.safetensors")
    net = encoder.Encoder(34, 14).double().eval()
    fill(net, "g.")
    codes = net(filled("g.input.six", (2, 6, 112, 112)))
    check.same("encoder codes", codes, golden["psp34.codes"])
    (codes * filled("g.cotangent.codes", codes.shape)).sum().backward()
    check.gradients("encoder", net, check.names["psp34.param_names"], golden["psp34.grad_norm"])


def check_ranger(check):
    golden = check.tensors("optimizers.safetensors")
    shapes = {"conv": (4, 3, 3, 3), "linear": (5, 7), "bias": (6,)}
    for decay in (0.0, 0.01):
        params = {name: torch.nn.Parameter(filled(f"g.ranger.{name}", shape)) for name, shape in shapes.items()}
        optimizer = encoder.Ranger(params.values(), 1e-2, decay)
        for t in range(14):
            for name, p in params.items():
                p.grad = filled(f"g.ranger.{name}.grad{t}", p.shape)
            optimizer.step()
        for name, p in params.items():
            check.same(f"Ranger, decay {decay}, {name} after 14 steps", p, golden[f"wd{decay}.{name}.step14"])


def check_inference_forms(check):
    """Every form of inference gives the same embeddings as the network that was checked, in float32."""
    for what, net, shape in (
        ("IR-SE-50", irse.Recognizer(50), (2, 6, 112, 112)),
        ("MobileFaceNet", mobilefacenet.MobileFaceNet(), (2, 3, 112, 96)),
    ):
        fill(net, "g.")
        images = filled("g.input.forms", shape).float()
        with torch.no_grad():
            want = net.eval()(images)
        for form in ("contiguous", "channels-last", "jit", "onnxruntime"):
            with tempfile.TemporaryDirectory() as folder:
                got = inference.prepare(net, images, form, folder, 1)()
            check.same(f"{what}, {form}", got, want, 1e-4)


def check_arcface(check):
    golden = check.tensors("heads.safetensors")
    features, labels = golden["ArcFace.features"], golden["labels"].long()
    head = irse.ArcFace(64, 20).double()
    head.weight.data.copy_(filled("g.head.ArcFace.weight", (20, 64)))
    logits = head(features, labels)
    check.same("ArcFace logits", logits, golden["ArcFace.logits"])
    check.same("ArcFace focal", irse.focal(logits, labels).reshape(1), golden["ArcFace.focal"])


def check_gan(check, form):
    golden = check.tensors("stylegan2.safetensors")
    g_names, d_names = check.names["gan32.G_names"], check.names["gan32.D_names"]
    z, z2 = filled("g.z", (4, 512), SQRT3), filled("g.z2", (4, 512), SQRT3)
    for resolution, depth in ((32, 2), (128, 8)):
        what, key = f"{form} gan{resolution}", f"gan{resolution}"
        g = stylegan2.Generator(resolution, depth, form).double()
        d = stylegan2.Discriminator(resolution, form).double()
        fill(g, "g.G.")
        fill(d, "g.D.")
        real = filled(f"g.real{resolution}", (4, 3, resolution, resolution))
        with torch.no_grad():
            ws = g.mapping(z)
            mixed = torch.cat([ws[:, :3], g.mapping(z2)[:, 3:]], 1)
            check.same(f"{what} w", ws[:, 0], golden[f"{key}.w"])
            check.same(f"{what} image", g.synthesis(ws, "const"), golden[f"{key}.image"])  # stored in float32
            check.same(f"{what} image_mixed", g.synthesis(mixed, "const"), golden[f"{key}.image_mixed"])
            check.same(f"{what} logits", d(real), golden[f"{key}.logits"])
        if resolution != 32:
            continue
        loss = F.softplus(-d(g.synthesis(g.mapping(z), "const"))).mean()
        check.same(f"{what} g_loss", loss.reshape(1), golden["gan32.g_loss"])
        loss.backward()
        check.gradients(f"{what} g_loss", g, g_names, golden["gan32.g_grad_norm"])
        d.zero_grad(set_to_none=True)
        with torch.no_grad():
            fake = g.synthesis(g.mapping(z), "const")
        loss = F.softplus(d(fake)).mean() + F.softplus(-d(real)).mean()
        check.same(f"{what} d_loss", loss.reshape(1), golden["gan32.d_loss"])
        loss.backward()
        check.gradients(f"{what} d_loss", d, d_names, golden["gan32.d_grad_norm"])
        penalty = stylegan2.r1_penalty(d, real)
        check.same(f"{what} R1", penalty.reshape(1), golden["gan32.r1"])
        penalty.backward()
        check.gradients(f"{what} R1", d, d_names, golden["gan32.r1_grad_norm"])
        noise = filled("g.plnoise32", (4, 3, 32, 32), SQRT3) / 32
        penalty, mean = stylegan2.path_length(g, z, noise, torch.tensor(0.7, dtype=torch.float64), "const")
        check.same(f"{what} path length", penalty.reshape(1), golden["gan32.pl"])
        check.same(f"{what} path length mean", mean.reshape(1), golden["gan32.pl_mean"])
        penalty.backward()
        check.gradients(f"{what} path length", g, g_names, golden["gan32.pl_grad_norm"])


def main(goldens):
    check = Checker(goldens)
    check_recognizer(check)
    check_arcface(check)
    check_mobilefacenet(check)
    check_encoder(check)
    check_ranger(check)
    check_inference_forms(check)
    for form in ("reference", "dense"):
        check_gan(check, form)
    print(f"{check.failed} failed" if check.failed else "the peers are the same networks")
    return 1 if check.failed else 0
