#!/usr/bin/env python3
"""faceprior beside PyTorch and its friends: the same work, alternately, in one call.

Every measurement is a process of its own. A round runs faceprior and then each form of the peer (every second round in
the opposite order, so that a machine that slows down does not favour either side), and the ratio is taken within the
round. Writes a dated Markdown table and the raw numbers as JSON.

    compare.py --data PICTURES                    all works, five rounds
    compare.py --only ir50 --rounds 3             some works
    compare.py --quick                            one round, one timed iteration: does it run, not how fast
    compare.py --check goldens                    prove that the peers are the same networks
    compare.py --peer WORK --form FORM --runs K   one measurement of the peer, JSON on stdout
"""

import argparse
import datetime
import functools
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from peers.conv import CASES as CONVOLUTIONS

HERE = Path(__file__).resolve().parent

# glibc gives every large block back to the kernel at once, and each training step then pays for fresh zeroed pages.
# These keep them, on huge pages, which faceprior asks for too: the strongest form of the peer.
TUNED_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 36)}
TUNED_MALLOC["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
# What a caller's shell must not decide.
CLEARED = ("MALLOC_", "OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "ONEDNN_", "DNNL_", "TORCH_", "RAYON_")
CLEARED += ("LD_PRELOAD", "GLIBC_TUNABLES", "ATEN_", "FACEPRIOR_")
# What holds both sides to AVX2 on a machine that has more.
AVX2 = {"FACEPRIOR_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
AVX2["MKL_ENABLE_INSTRUCTIONS"] = "AVX2"


@dataclass(frozen=True)
class Form:
    name: str
    title: str
    tuned_malloc: bool = False


CONTIGUOUS = Form("contiguous", "PyTorch, contiguous f32 (default)")
CHANNELS_LAST = Form("channels-last", "PyTorch, channels-last f32, malloc tuned", tuned_malloc=True)
JIT = Form("jit", "PyTorch, torch.jit optimised for inference, channels-last f32, malloc tuned", tuned_malloc=True)
ONNX = Form("onnxruntime", "onnxruntime")
BF16 = Form("bf16", "PyTorch, channels-last bf16 autocast, malloc tuned", tuned_malloc=True)
REFERENCE = Form("reference", "PyTorch, reference formulation (grouped convolution, N·C×1 FIR)")
DENSE = Form("dense", "PyTorch, dense formulation, channels-last, malloc tuned", tuned_malloc=True)
PIL = Form("pil", "PIL (antialiased, as ours)")
CV2 = Form("cv2", "OpenCV (not antialiased: other pictures)")
FACENET = Form("facenet-pytorch", "facenet-pytorch, batch 16, + OpenCV warp")


@dataclass(frozen=True)
class Work:
    name: str
    title: str
    unit: str  # "img/s", "s/step" or "ms"
    forms: tuple
    items: int | None = None  # pictures an iteration; None: as many as --data gives
    pictures: int = 0  # how many of --data it takes
    one_core: bool = False
    cases: tuple = ("",)  # what one process times, one after another; "" for the work as a whole
    of: str | None = None  # the work as both programs know it, where this is it under other conditions
    isa: str | None = None  # the instruction set that both are held to
    options: tuple = ()  # what faceprior is told besides


TRAINING = (CONTIGUOUS, CHANNELS_LAST, BF16)
INFERENCE = (CONTIGUOUS, CHANNELS_LAST, JIT, ONNX)
WORKS = (
    Work("ir50-train-16", "IR-50 training step, batch 16", "img/s", TRAINING, 16),
    Work(
        "ir50-train-16-avx2",
        "IR-50 training step, batch 16, AVX2",
        "img/s",
        (CONTIGUOUS, CHANNELS_LAST),
        16,
        of="ir50-train-16",
        isa="avx2",
    ),
    Work(
        "ir50-train-16-bf16",
        "IR-50 training step, batch 16, `--precision bf16`",
        "img/s",
        (CHANNELS_LAST, BF16),
        16,
        of="ir50-train-16",
        options=("--precision", "bf16"),
    ),
    Work(
        "ir50-train-16-recompute",
        "IR-50 training step, batch 16, `--recompute`",
        "img/s",
        (CHANNELS_LAST,),
        16,
        of="ir50-train-16",
        options=("--recompute",),
    ),
    Work("ir50-infer-1", "IR-50 inference, batch 1", "img/s", INFERENCE, 1),
    Work("ir50-infer-32", "IR-50 inference, batch 32", "img/s", INFERENCE, 32),
    Work("mobilefacenet-infer-1", "MobileFaceNet inference, batch 1", "img/s", (CHANNELS_LAST, JIT, ONNX), 1),
    Work("mobilefacenet-infer-32", "MobileFaceNet inference, batch 32", "img/s", (CHANNELS_LAST, JIT, ONNX), 32),
    Work("gan-g-64", "StyleGAN2 64², G step, batch 8", "s/step", (REFERENCE, DENSE), 8),
    Work("gan-d-64", "StyleGAN2 64², D step, batch 8", "s/step", (REFERENCE, DENSE), 8),
    Work("gan-r1-64", "StyleGAN2 64², R1 step, batch 8", "s/step", (REFERENCE, DENSE), 8),
    Work("gan-pl-64", "StyleGAN2 64², path length step, batch 8", "s/step", (REFERENCE, DENSE), 8),
    Work("gan-g-128", "StyleGAN2 128², G step, batch 8", "s/step", (DENSE,), 8),
    Work("gan-d-128", "StyleGAN2 128², D step, batch 8", "s/step", (DENSE,), 8),
    Work("gan-r1-128", "StyleGAN2 128², R1 step, batch 8", "s/step", (DENSE,), 8),
    Work("gan-pl-128", "StyleGAN2 128², path length step, batch 8", "s/step", (DENSE,), 8),
    Work("encoder-step-8", "encoder training step through the prior of 128², batch 8", "s/step", (DENSE,), 8),
    Work("conv", "convolution, batch 16:", "ms", (CHANNELS_LAST,), 16, cases=CONVOLUTIONS),
    Work("loader", "loader: JPEG → 128² → crop 112² → flip → float, one core", "img/s", (PIL, CV2), None, 512, True),
    Work("align", "align: raw pictures → faces 112², min face 40", "img/s", (FACENET,), None, 192),
)


# ---------------------------------------------------------------------------------------------- one peer measurement


def run_peer(args):
    """In a process of its own: build the work, warm up, then `runs` timed iterations."""
    work = next((w for w in WORKS if w.name == args.peer), None)
    if work is None or args.form not in [f.name for f in work.forms]:
        sys.exit(f"no form {args.form!r} of {args.peer!r}; hint: see WORKS in {Path(__file__).name}")
    sys.path.insert(0, str(HERE))
    with tempfile.TemporaryDirectory() as out:
        measure_runs, items = prepare_peer(work.name, args, out)
        start_bytes = peak_bytes(resource.getrusage(resource.RUSAGE_SELF))
        timings = measure_runs(args.runs, args.warmup)
        usage = resource.getrusage(resource.RUSAGE_SELF)
    versions = {"python": platform.python_version()}
    for module in ("torch", "torchvision", "onnxruntime", "facenet_pytorch", "cv2", "PIL", "numpy"):
        if module in sys.modules:
            versions[module] = package_version(module)
    result = {
        "work": work.name,
        "form": args.form,
        **timings,
        "items_per_iteration": items,
        "peak_bytes": peak_bytes(usage),
        "start_bytes": start_bytes,  # libraries, parameters and inputs, before the first iteration
        "device": "cpu",
        "version": versions,
    }
    if torch := sys.modules.get("torch"):
        result["isa"] = torch.backends.cpu.get_cpu_capability().lower()
    print(json.dumps(result))


def prepare_peer(work, args, out):
    """What times the work, given how many runs and how many to warm up, and the pictures of an iteration."""
    if work == "loader":
        from peers import pictures

        iteration, items = pictures.prepare_loader(args.form, args.data)
        return functools.partial(timed, iteration), items
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    torch.set_num_interop_threads(1)
    if work == "conv":
        from peers import conv

        return conv.measure, conv.BATCH
    if work == "align":
        from peers import pictures

        iteration, items = pictures.prepare_align(args.data, out, args.threads)
    elif work.startswith("ir50"):
        from peers import irse

        iteration, items = irse.prepare(work, args.form, out, args.threads)
    elif work.startswith("mobilefacenet"):
        from peers import mobilefacenet

        iteration, items = mobilefacenet.prepare(work, args.form, out, args.threads)
    elif work.startswith("encoder"):
        from peers import encoder

        iteration, items = encoder.prepare(work)
    else:
        from peers import stylegan2

        iteration, items = stylegan2.prepare(work, args.form)
    return functools.partial(timed, iteration), items


def timed(iteration, runs, warmup):
    for _ in range(warmup):
        iteration()
    seconds = []
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(runs):
        start = time.perf_counter()
        iteration()
        seconds.append(time.perf_counter() - start)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return {"runs": seconds, "page_faults_per_iteration": faults / runs}


def package_version(module):
    from importlib import metadata

    names = {"cv2": "opencv-python-headless", "PIL": "pillow", "facenet_pytorch": "facenet-pytorch"}
    try:
        return metadata.version(names.get(module, module))
    except metadata.PackageNotFoundError:
        return getattr(sys.modules[module], "__version__", "unknown")


def peak_bytes(usage):
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ------------------------------------------------------------------------------------------------------- alternation


class Failure(Exception):
    pass


def environment(threads, tuned_malloc=False, isa=None):
    env = {k: v for k, v in os.environ.items() if not k.startswith(CLEARED)}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
        env[name] = str(threads)
    env["OMP_DYNAMIC"] = env["MKL_DYNAMIC"] = "FALSE"
    if tuned_malloc:
        env.update(TUNED_MALLOC)
    if isa == "avx2":
        env.update(AVX2)
    return env


def measure(command, env, cores, timeout):
    """Runs one process on `cores`; its JSON, with the peak the kernel counted for it (both sides by one measure)."""

    def pin():
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            process = subprocess.Popen(command, stdout=out, stderr=err, env=env, preexec_fn=pin)
        except OSError as error:
            raise Failure(f"cannot start {Path(command[0]).name}: {error.strerror}") from None
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        finally:
            timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        text, complaint = out.read().decode(errors="replace"), err.read().decode(errors="replace")
    if process.returncode != 0:
        lines = [l for l in complaint.splitlines() if l.strip() and not l.startswith("hint:")]
        last = lines[-1].strip()[:200] if lines else f"no message (a limit of {timeout} s applies)"
        raise Failure(f"exit code {process.returncode}: {last}")
    try:
        result = json.loads(text)
        cases = result["cases"] if "cases" in result else [{"name": "", "runs": result["runs"]}]
        cases, items = {c["name"]: [float(r) for r in c["runs"]] for c in cases}, int(result["items_per_iteration"])
    except (ValueError, KeyError, TypeError):
        raise Failure(f"expected one JSON object with runs and items_per_iteration, got {text[:80]!r}") from None
    for name, runs in cases.items():
        if not runs or min(runs) <= 0 or items < 1:
            raise Failure(f"expected positive times and items, got {name} runs {runs}, items_per_iteration {items}")
    result["reported_peak_bytes"] = result.get("peak_bytes")
    result["peak_bytes"] = peak_bytes(usage)
    result["seconds_per_item"] = {name: statistics.median(runs) / items for name, runs in cases.items()}
    return result


def check_work(work, result):
    """Another work, or other numbers of pictures, would be a ratio between two different things."""
    if result.get("work") != (work.of or work.name):
        raise Failure(f"expected work {work.of or work.name!r}, got {result.get('work')!r}")
    if tuple(result["seconds_per_item"]) != work.cases:
        raise Failure(f"expected cases {work.cases}, got {tuple(result['seconds_per_item'])}")
    if work.isa is not None and result.get("isa") != work.isa:
        raise Failure(f"expected instruction set {work.isa!r}, got {result.get('isa')!r}")
    if work.items is not None and result["items_per_iteration"] != work.items:
        raise Failure(f"expected {work.items} items an iteration, got {result['items_per_iteration']}")


def compare_work(work, args, pictures):
    """All rounds of one work: per side ("faceprior" or a form's name) its results by round, and what failed."""
    threads = 1 if work.one_core else args.threads
    cores = sorted(os.sched_getaffinity(0))[:threads] if hasattr(os, "sched_getaffinity") else None
    data = ["--data", str(pictures)] if pictures else []
    name = work.of or work.name
    ours = [args.faceprior, "bench", name, "--runs", str(args.runs), "--json", *work.options, *data]
    sides = {"faceprior": (ours, False)}
    for form in work.forms:
        command = [sys.executable, __file__, "--peer", name, "--form", form.name]
        command += ["--runs", str(args.runs), "--warmup", str(args.warmup), "--threads", str(threads), *data]
        sides[form.name] = (command, form.tuned_malloc)
    results, failures = {name: {} for name in sides}, {}
    for round_number in range(args.rounds):
        for name in list(sides) if round_number % 2 == 0 else reversed(sides):
            if name in failures:
                continue
            command, tuned_malloc = sides[name]
            try:
                result = measure(command, environment(threads, tuned_malloc, work.isa), cores, args.timeout)
                check_work(work, result)
            except Failure as failure:
                failures[name] = str(failure)
                say(f"{work.name} round {round_number + 1} {name}: failed: {failure}")
                continue
            results[name][round_number] = result
            speed = ", ".join(f"{case} {show_speed(work, [result], case)}".strip() for case in work.cases)
            say(f"{work.name} round {round_number + 1} {name}: {speed}, {show_bytes([result])}")
    return {"results": results, "failures": failures}


def sample_pictures(source, count, target):
    """Evenly spaced files of a folder tree, copied under their own relative paths: both sides read the same ones."""
    endings = (".jpg", ".jpeg", ".png")
    files = sorted(p for p in source.rglob("*") if p.suffix.lower() in endings and p.is_file())
    if not files:
        raise Failure(f"no pictures in the folder given as --data; expected files ending in {', '.join(endings)}")
    count = min(count, len(files))
    for i in range(count):
        path = files[i * len(files) // count]
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return count


# ------------------------------------------------------------------------------------------------------------ report


def say(text):
    print(text, file=sys.stderr, flush=True)


def show_speed(work, results, case):
    seconds = statistics.median(r["seconds_per_item"][case] for r in results)
    if work.unit == "ms":
        return f"{seconds * work.items * 1e3:.3g} ms"
    if work.unit == "s/step":
        return f"{seconds * work.items:.3g} s/step"
    return f"{1 / seconds:.3g} img/s" if seconds > 1e-3 else f"{1 / seconds:.0f} img/s"


def show_bytes(results):
    size = statistics.median(r["peak_bytes"] for r in results)
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def ratios(ours, theirs, case):
    """Per round in which both ran: how many times as fast we are, and our memory over theirs."""
    rounds = sorted(ours.keys() & theirs.keys())
    speed = [theirs[r]["seconds_per_item"][case] / ours[r]["seconds_per_item"][case] for r in rounds]
    memory = [ours[r]["peak_bytes"] / theirs[r]["peak_bytes"] for r in rounds]
    return speed, memory


def rows(measured):
    for work in WORKS:
        if work.name in measured:
            for case in work.cases:
                yield from case_rows(work, case, **measured[work.name])


def case_rows(work, case, results, failures):
    """A row for each form of the peer. A case has no memory of its own: its process runs all of them."""

    def cell(name):
        if name in failures:
            return "failed"
        found = list(results[name].values())
        if not found:
            return "–"
        return show_speed(work, found, case) + ("" if case else f", {show_bytes(found)}")

    for form in (f for f in work.forms if f.name in results):
        speed, memory = ratios(results["faceprior"], results[form.name], case)
        whole = speed and "faceprior" not in failures and form.name not in failures
        spread = f" ({min(speed):.2f}–{max(speed):.2f})" if whole and len(speed) > 1 else ""
        ratio = f"**{statistics.median(speed):.2f}×**{spread}" if whole else "–"
        memory_ratio = f"{statistics.median(memory):.2f}×" if whole and not case else "–"
        title = f"{work.title} {case}".strip()
        yield (title, cell("faceprior"), f"{form.title}: {cell(form.name)}", ratio, memory_ratio)


def cpu_flag_summary(flags):
    wanted = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")
    return [f for f in wanted if f in flags]


def machine():
    info = {"system": f"{platform.system()} {platform.machine()}", "load_average": [round(v, 2) for v in os.getloadavg()]}
    info["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info["cpu"], info["isa"] = platform.processor() or "unknown", []
    try:
        fields = {}
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
        info["cpu"] = fields.get("model name", info["cpu"])
        if "cpu family" in fields:
            info["cpu"] += f" (family {fields['cpu family']}, model {fields.get('model', '?')})"
        info["isa"] = cpu_flag_summary((fields.get("flags") or fields.get("Features", "")).split())
        memory = next(l for l in Path("/proc/meminfo").read_text().splitlines() if l.startswith("MemTotal"))
        info["memory_bytes"] = int(memory.split()[1]) * 1024
        governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
        info["governor"] = governor.read_text().strip() if governor.exists() else None
    except (OSError, StopIteration):
        pass
    return info


def commit():
    """The commit, and whether code outside this folder differs from it."""

    def git(*command):
        return subprocess.run(["git", "-C", HERE, *command], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks")
        return git("rev-parse", "--short=12", "HEAD") + (" with uncommitted changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def shown_command(args):
    """The command without this machine's paths."""
    words = ["python compare.py"]
    words += [f"--only {o}" for o in args.only]
    words += [f"--without {o}" for o in args.without]
    words += ["--data PICTURES"] if args.data else []
    words += [f"--threads {args.threads} --rounds {args.rounds} --runs {args.runs}"]
    return " ".join(words) + (" --quick" if args.quick else "")


def versions(measured):
    found = {}
    for entry in measured.values():
        for name, by_round in entry["results"].items():
            for result in by_round.values():
                version = result.get("version")
                found.update(version if isinstance(version, dict) else {name: str(version)})
    return found


def markdown(report):
    m, v = report["machine"], report["versions"]
    memory = f", {m['memory_bytes'] / 2**30:.0f} GiB" if "memory_bytes" in m else ""
    lines = [f"# faceprior and its peers, {report['date']}", ""]
    if report["quick"]:
        lines += ["**Quick mode: it shows that everything runs; the figures mean nothing.**", ""]
    lines += [
        f"- Machine: {m['cpu']}, {m['cores']} cores{memory}, {m['system']}; isa: {' '.join(m['isa']) or 'unknown'}; "
        f"load average before {m['load_average'][0]}, after {report['load_average_after'][0]}",
        f"- Threads: {report['threads']} on each side; the loader is held to one core on each side",
        f"- Commit: {report['commit']}; versions: " + ", ".join(f"{k} {v[k]}" for k in sorted(v)),
        f"- Command: `{report['command']}`",
        f"- {report['rounds']} rounds; a figure is the median over rounds of each process's median of {report['runs']} "
        "timed iterations after warm-up",
        "- Ratio: the peer's time over faceprior's in the same round, median (lowest–highest); above 1 faceprior is faster. "
        "Memory ratio: faceprior's peak resident memory over the peer's, whole process with its libraries",
    ]
    if m["load_average"][0] > 0.5:
        lines += ["- **The machine was not idle at the start: neither times nor ratios are worth quoting** (see README.md)"]
    lines += [f"- {note}" for note in report["notes"]]
    lines += ["", "| work | faceprior | peer form | ratio | memory ratio |", "|---|---|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows(report["works"])]
    failed = [(w, n, f) for w, e in report["works"].items() for n, f in e["failures"].items()]
    if failed:
        lines += ["", "Failed:", ""] + [f"- {w}, {n}: {f}" for w, n, f in failed]
    return "\n".join(lines) + "\n"


def write(report, folder):
    """After every work, so that an interrupted run keeps what it measured."""
    report["load_average_after"] = [round(v, 2) for v in os.getloadavg()]
    report["versions"] = versions(report["works"])
    stem = folder / f"{report['date'][:10]}-{'quick' if report['quick'] else 'compare'}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    stem.with_suffix(".md").write_text(markdown(report))
    return stem.with_suffix(".md")


def compare(args):
    known = {f.name for w in WORKS for f in w.forms}
    if unknown := set(args.without) - known:
        sys.exit(f"--without {sorted(unknown)[0]}: no such form; hint: one of {', '.join(sorted(known))}")
    names = [w.name for w in WORKS]
    chosen = [w for w in WORKS if not args.only or any(o == w.name or o not in names and o in w.name for o in args.only)]
    if not chosen:
        sys.exit(f"--only matches no work; hint: one of {', '.join(names)}")
    chosen = [replace(w, forms=tuple(f for f in w.forms if f.name not in args.without)) for w in chosen]
    if left := [w.name for w in chosen if not w.forms]:
        sys.exit(f"--without leaves {left[0]} no peer; hint: name other works with --only")
    if shutil.which(args.faceprior) is None:
        sys.exit("faceprior not found; hint: `cargo build --release` first, or give --faceprior PROGRAM")
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if args.threads > available:
        sys.exit(f"--threads {args.threads}, but this process may use {available} cores")
    report = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "commit": commit(),
        "command": shown_command(args),
        "machine": machine(),
        "threads": args.threads,
        "rounds": args.rounds,
        "runs": args.runs,
        "quick": args.quick,
        "notes": [],
        "works": {},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    table = None
    for work in chosen:
        with tempfile.TemporaryDirectory() as folder:
            pictures = None
            if work.pictures:
                if args.data is None:
                    report["notes"].append(f"{work.name}: left out, no --data")
                    say(report["notes"][-1])
                    continue
                pictures = Path(folder)
                try:
                    count = sample_pictures(args.data, 16 if args.quick else work.pictures, pictures)
                except Failure as failure:
                    sys.exit(str(failure))
                report["notes"].append(f"{work.name}: {count} pictures, evenly spaced in the sorted folder")
            report["works"][work.name] = compare_work(work, args, pictures)
        table = write(report, args.out)
    if table is None:
        sys.exit("nothing was measured; hint: give a folder of pictures with --data")
    print(table.read_text(), end="")
    return 1 if any(entry["failures"] for entry in report["works"].values()) else 0


def default_faceprior():
    built = HERE.parent / "target" / "release" / "faceprior"
    return str(built) if built.exists() else "faceprior"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faceprior", default=default_faceprior(), help="the program (default: the release build)")
    parser.add_argument("--only", action="append", default=[], metavar="PART", help="this work, or those whose name has this part")
    parser.add_argument("--without", action="append", default=[], metavar="FORM", help="a form of the peer to leave out")
    parser.add_argument("--data", type=Path, help="folder tree of raw pictures of one size, for loader and align")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="processes of each side and form")
    parser.add_argument("--runs", type=int, default=2, help="timed iterations a process")
    parser.add_argument("--warmup", type=int, default=2, help="untimed iterations before them, in a peer's process")
    parser.add_argument("--quick", action="store_true", help="one round, one iteration, few pictures")
    parser.add_argument("--timeout", type=int, default=900, help="seconds a process may take")
    parser.add_argument("--out", type=Path, default=HERE, help="where the table and the JSON go")
    parser.add_argument("--check", metavar="GOLDENS", help="compare the peers' networks with these goldens")
    parser.add_argument("--peer", metavar="WORK", help="measure the peer in this process")
    parser.add_argument("--form", help="with --peer")
    args = parser.parse_args()
    if args.quick:
        args.rounds = args.runs = args.warmup = 1
    if min(args.threads, args.rounds, args.runs) < 1:
        parser.error("--threads, --rounds and --runs are at least 1")
    if args.peer:
        return run_peer(args)
    if args.check:
        sys.path.insert(0, str(HERE))
        from peers import check

        return check.main(args.check)
    return compare(args)


if __name__ == "__main__":
    sys.exit(main())
