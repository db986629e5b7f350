"""What the code costs, measured on data that it makes itself: nothing here is a test, and no test waits for it.

    python tests/benchmark.py steps           training steps of ViT-B beside transformers' VideoMAE, and where time goes
    python tests/benchmark.py experts         the expert layer beside a plain loop over experts
    python tests/benchmark.py growth          time and memory by samples, frames, experts, and indexed clips
    python tests/benchmark.py processes       two processes beside one
    python tests/benchmark.py data            reading, sampling and augmenting, beside decord and plain JPEG decoding
    python tests/benchmark.py all             all of these
    python tests/benchmark.py count           kernels and waits that steps would ask of a GPU, counted without one
    python tests/benchmark.py gpu             the steps and the expert layer on a GPU, with and without --compile

Rivals run in turns, several times, and medians are printed: other work on the machine then disturbs all of them. All
end in one table of ratios. CPU seconds are those of this process and its threads. A step is forward, backward and the
same fused AdamW for everybody. Peak memory is a fresh process's largest resident set less that before the model was
made. transformers and decord are measured where they are installed (pip install transformers decord).
"""
import argparse
import contextlib
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: a waiting thread takes no CPU seconds

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402  (needs the path above)
from evaluate import heat_map, markdown, observe  # noqa: E402
from faces import write_faces  # noqa: E402
from finetune import JointLoss  # noqa: E402
from model import MASK_RATIO, S4D, SIZES, MaskedAutoencoder, MoAE, modality, random_mask  # noqa: E402
from pretrain import Process, Rate, ReconstructionLoss, compile_layers, decayed, keep_freed_memory, train  # noqa: E402

decord, transformers = (importlib.import_module(name) if importlib.util.find_spec(name) else None
                        for name in ("decord", "transformers"))


def timed(run, turn: int) -> tuple[float, float]:
    """CPU seconds and seconds of a call."""
    cpu, began = time.process_time(), time.perf_counter()
    run(turn)
    return time.process_time() - cpu, time.perf_counter() - began


def measure(rivals: dict, rounds: int) -> dict[object, tuple[float, float]]:
    """Median (CPU seconds, seconds) of one call of each rival, in turns; the first round does not count."""
    times = {name: [] for name in rivals}
    for turn in range(rounds + 1):
        for name, run in rivals.items():
            times[name].append(timed(run, turn))
    return {name: tuple(np.median(values[1:], axis=0)) for name, values in times.items()}


def ratio(what: str, rival: str, ours: tuple[float, float], theirs: tuple[float, float], target="") -> list[str]:
    """A row of the table of RATIOS. ours, theirs: CPU seconds and seconds."""
    cpu, seconds = np.divide(theirs, ours)
    return [what, rival, f"{ours[1]:.3g} s", f"{theirs[1]:.3g} s", f"{seconds:.2f} ({cpu:.2f})", target]


RATIOS = ["what", "against", "ours", "theirs", "times as fast (by CPU seconds)", "target"]

# ------------------------------------------------------------------------------------------------------------ steps

PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16}
STEPS = {  # what they are, samples, those that a GPU of the paper computes at once, target: times transformers' speed
    "clips": ("pre-training, clips at 95 %", 4, 192, 1.25),
    "images": ("pre-training, images at 90 %", 32, 192, 1.2),
    "finetune": ("fine-tuning, clips", 2, 16, 1.0)}
CLASSES = tuple("0123456")


def random_batch(modality: str, samples: int, size, device="cpu") -> torch.Tensor:
    """uint8, as loading processes deliver it."""
    frames = () if modality == "image" else (size.frames,)
    return torch.randint(256, (samples, *frames, 3, size.pixels, size.pixels), dtype=torch.uint8, device=device)


def own_loss(step: str, x: torch.Tensor, size: str, experts: int):
    """The model, and a function that gives the loss of a batch as training computes it: from uint8, with its mask."""
    if step == "finetune":
        model = S4D(size, [], CLASSES, experts=experts).to(x.device)
        return model, partial(JointLoss(model), x, torch.zeros(len(x), dtype=torch.long, device=x.device))
    model = MaskedAutoencoder(size).to(x.device)
    return model, partial(ReconstructionLoss(model, MASK_RATIO), x, None)


def peer_loss(step: str, x: torch.Tensor, size: str, experts: int):
    """The same of transformers' VideoMAE, which gets normalised floats, converted before the measurement; images as
    clips of one time slot. Its attention is the one that it takes by default, scaled_dot_product_attention."""
    shape, pixels = SIZES[size], data.to_float(x)
    pixels = pixels.unsqueeze(2).expand(-1, -1, shape.tubelet, -1, -1) if modality(pixels) == "image" else pixels
    pixels = pixels.transpose(1, 2).contiguous()                            # (B, T, 3, H, W)
    config = transformers.VideoMAEConfig(
        image_size=shape.pixels, patch_size=shape.patch, num_frames=pixels.shape[1], tubelet_size=shape.tubelet,
        hidden_size=shape.width, num_hidden_layers=shape.depth, num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width, decoder_hidden_size=shape.decoder_width,
        decoder_num_attention_heads=shape.decoder_heads, decoder_num_hidden_layers=shape.decoder_depth,
        decoder_intermediate_size=4 * shape.decoder_width, layer_norm_eps=1e-6, num_labels=len(CLASSES))
    if step == "finetune":
        model = transformers.VideoMAEForVideoClassification(config).to(x.device).train()
        labels = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return model, lambda: model(pixels, labels=labels).loss
    model = transformers.VideoMAEForPreTraining(config).to(x.device).train()
    tokens, ratio = pixels.shape[1] // shape.tubelet * shape.image_tokens, MASK_RATIO[modality(data.to_float(x))]
    return model, lambda: model(pixels, bool_masked_pos=random_mask(len(x), tokens, ratio, x.device)).loss


RIVALS = {"ours": own_loss} | ({"transformers": peer_loss} if transformers else {})


def make_step(who: str, step: str, precision: str, samples: int, size: str, experts: int = 8, device: str = "cpu",
              compiled: bool = False):
    """A training step, as a function of the turn, which seeds the mask and the noise; and the number of parameters."""
    torch.manual_seed(0)
    x = random_batch("image" if step == "images" else "video", samples, SIZES[size], device)
    model, loss = RIVALS[who](step, x, size, experts)
    if compiled:
        compile_layers(model, "inductor")
    optimizer = torch.optim.AdamW(decayed(model.named_parameters(), 0.05), 1e-5, fused=True)

    def run(turn: int) -> None:
        torch.manual_seed(turn)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            value = loss()
        value.backward()
        optimizer.step()
        torch.get_device_module(device).synchronize()
    return run, sum(p.numel() for p in model.parameters())


def matrix_peak(precision: str, device: str = "cpu") -> float:
    """Floating-point operations per CPU-second (on a GPU, per second) of large matrix products."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=PRECISION[precision]) for _ in range(2))
    cpu, seconds = measure({"": lambda turn: (a @ b, torch.get_device_module(device).synchronize())}, 10)[""]
    return 2 * n ** 3 / (cpu if device == "cpu" else seconds)


def in_turns(rivals: dict, rounds: int) -> dict[object, dict]:
    """Each rival's step in a process of its own, as in training, one at a time and in turns. rivals: settings by name.
    Returns what `one` prints, with median CPU seconds and seconds as "time"; the first two rounds do not count."""
    processes = {name: subprocess.Popen([sys.executable, __file__, "one", json.dumps(settings)], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
                 for name, settings in rivals.items()}
    times, results = {name: [] for name in rivals}, {}
    try:
        for turn in range(rounds + 2):
            for name, process in processes.items():
                print(turn, file=process.stdin, flush=True)
                times[name].append(json.loads(process.stdout.readline() or sys.exit(f"error: {rivals[name]} failed")))
        for name, process in processes.items():
            results[name] = json.loads(process.communicate()[0]) | {"time": tuple(np.median(times[name][2:], axis=0))}
    finally:
        for process in processes.values():
            process.kill()
    return results


def largest_resident_set() -> float:
    """Of this process until now, in MiB (resource.getrusage would count the process that started this one too)."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def one(frames: int | None = None, spent: bool = False, size: str = "base", **settings) -> None:
    """In this fresh process, run a step for every line of standard input and print what it took, as JSON; then its peak
    memory, operations and, if asked, what the time was spent on."""
    cuda = settings.get("device") == "cuda"
    if size == "tiny":
        torch.set_num_threads(1)            # as training does
    SIZES["measured"] = replace(SIZES[size], frames=frames or SIZES[size].frames)
    if not cuda:
        keep_freed_memory()                 # for every rival, as pretrain.start does for ours
    before = largest_resident_set()
    run, parameters = make_step(**settings, size="measured")
    for line in sys.stdin:
        print(json.dumps(timed(run, int(line))), flush=True)
    peak = torch.cuda.max_memory_allocated() / 2 ** 20 if cuda else largest_resident_set() - before
    with FlopCounterMode(display=False) if not settings.get("compiled") else contextlib.nullcontext() as counter:
        run(0)
    print(json.dumps(dict(peak=peak, state=16 * parameters / 2 ** 20,       # with AdamW's moments
                          flops=counter.get_total_flops() if counter else 0,
                          spent=where_time_goes(run) if spent else None)))


GROUPS = {  # operators of torch by what they are for; the first that matches
    "matrix products": r"aten::(mm|addmm|mkldnn_convolution|convolution_backward)$",
    "attention": r"aten::(_scaled_dot_product.*|bmm|baddbmm|_softmax.*)$",
    "layer norm": r"aten::native_layer_norm.*", "GELU": r"aten::gelu.*",
    "optimiser": r"aten::_fused_adamw_|Optimizer",
    "copies, gathers": r"aten::(copy_|cat|stack|gather|index.*|scatter.*|sort)$",
    "rest": ""}


def where_time_goes(run) -> dict[str, float]:
    """CPU seconds of a step by group of operators, on one thread, as their own times then add up; the shortest of 3."""
    torch.set_num_threads(1)
    records = []
    for turn in range(4):
        with profile() as record:
            run(turn)
        spent = dict.fromkeys(GROUPS, 0.0)
        for event in record.key_averages():
            group = next(name for name, pattern in GROUPS.items() if re.match(pattern, event.key))
            spent[group] += event.self_cpu_time_total / 1e6
        records.append(spent)
    return min(records[1:], key=lambda spent: sum(spent.values()))


def benchmark_steps(rounds: int, picture: Path | None) -> list[list]:
    peak = {precision: matrix_peak(precision) for precision in PRECISION}
    print("matrix peak per CPU-second: " + ", ".join(f"{p} {v / 1e9:.0f} GFLOP/s" for p, v in peak.items()))
    rows, profiles, ratios = [], [], []
    for step, (what, samples, _, target) in STEPS.items():
        what = f"{samples} x {what}"
        measured = in_turns({(who, precision): dict(who=who, step=step, precision=precision, samples=samples,
                                                    spent=precision == "bf16")
                             for precision in PRECISION for who in RIVALS}, rounds)
        for (who, precision), m in measured.items():
            rows.append([f"{what}, {who}, {precision}", *(f"{seconds:.2f}" for seconds in m["time"]),
                         f"{m['peak']:.0f}", f"{m['state']:.0f}", f"{m['flops'] / 1e9:.0f}",
                         f"{m['flops'] / m['time'][0] / peak[precision]:.0%}"])
            profiles += [[f"{what}, {who}", *m["spent"].values()]] if m["spent"] else []
        ratios += step_ratios(what, target, measured) if transformers else []
    print(markdown(["a step of ViT-B", "CPU s", "s", "peak MiB", "of them weights, gradients, moments", "GFLOP",
                    "of the matrix peak"], rows))
    title, most = "CPU seconds of a bf16 step of ViT-B, on one thread", max(max(row[1:]) for row in profiles)
    print(f"\n{markdown([title, *GROUPS], profiles)}")
    if picture:
        heat_map(title, ["", *GROUPS], profiles, high=most).save(picture, optimize=True)
    return ratios


def step_ratios(what: str, target: float, measured: dict) -> list[list]:
    """Ours against transformers at equal precision, and in memory; for masked clips also each one's default."""
    pairs = [("bf16", "bf16", target), ("fp32", "fp32", target)] + [("bf16", "fp32", 2.5)] * ("clips at" in what)
    ratios = [ratio(f"{what}, {own}", f"transformers, {peer}", measured["ours", own]["time"],
                    measured["transformers", peer]["time"], f"{at_least}") for own, peer, at_least in pairs]
    ours, theirs = (measured[who, "bf16"]["peak"] for who in RIVALS)
    return [*ratios, [f"{what}, peak memory", "transformers, bf16", f"{ours:.0f} MiB", f"{theirs:.0f} MiB",
                      f"{ours / theirs:.2f} of theirs", "at most 0.8"]]


# ---------------------------------------------------------------------------------------------------------- experts

def plain_experts(module: MoAE, x: torch.Tensor) -> torch.Tensor:
    """The same layer as the released one computes it, a loop over experts with a gather and a scatter each, but that
    there an expert has room for N k / n tokens and loses the others."""
    weights, chosen = (part.flatten(0, 1) for part in module.router(x))     # (B N, k) each
    tokens = x.flatten(0, 1)
    mixed = tokens.clone()                                                  # the residual
    for i, expert in enumerate(module.experts):
        row, place = (chosen == i).nonzero(as_tuple=True)
        mixed = mixed.index_add(0, row, (expert(tokens[row]) * weights[row, place, None]).to(mixed.dtype))
    return mixed.view_as(x)


def benchmark_experts(rounds: int, device: str = "cpu") -> list[list]:
    threads, ratios = torch.get_num_threads(), []
    if device == "cpu":
        keep_freed_memory()
    for batch, tokens, width, target in ((4, 800, 768, 1.5), (16, 144, 128, 4)):
        torch.set_num_threads(threads if width == 768 else 1)  # as training does
        module = MoAE(width, width // 4).to(device)
        x = torch.randn(batch, tokens, width, device=device, requires_grad=True)

        def run(layer, precision: str, turn: int) -> None:
            torch.manual_seed(turn)         # tokens choose anew in every turn
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                out = layer(x)
            out.sum().backward()
            module.zero_grad()
            torch.get_device_module(device).synchronize()
        layers = {"ours": module, "loop over experts": partial(plain_experts, module)}
        with torch.no_grad():
            assert torch.allclose(module.eval()(x), plain_experts(module, x), atol=1e-4), "the forms differ"
        module.train()
        measured = measure({(name, precision): partial(run, layer, precision) for name, layer in layers.items()
                            for precision in PRECISION}, rounds)
        ratios += [ratio(f"expert layer, {batch * tokens} tokens of width {width}, {precision}",
                         f"loop over experts, {precision}", measured["ours", precision],
                         measured["loop over experts", precision], f"{target} in one of them")
                   for precision in reversed(PRECISION)]
    torch.set_num_threads(threads)
    return ratios


# ----------------------------------------------------------------------------------------------- growth, processes

def benchmark_growth(rounds: int) -> None:
    rows = [(step, dict(samples=samples)) for step in ("clips", "finetune") for samples in (1, 2, 4, 8)]
    rows += [(step, dict(samples=2, frames=frames)) for step in ("clips", "finetune") for frames in (8, 16, 32)]
    rows += [("finetune", dict(samples=2, experts=experts)) for experts in (2, 4, 8, 16, 32)]
    print("\n| a bf16 step of ViT-B | time | CPU time | peak memory |\n|---|---|---|---|")
    for step, settings in rows:
        m = in_turns({"": dict(who="ours", step=step, precision="bf16", **settings)}, rounds)[""]
        print(f"| {STEPS[step][0]}, {', '.join(f'{value} {name}' for name, value in settings.items())} | "
              f"{m['time'][1]:.2f} s | {m['time'][0]:.2f} s | {m['peak']:.0f} MiB |")
    print("\n| clips listed | list loaded | 40 micro-batches by 4 loading processes | memory of each, PSS | USS |\n"
          "|---|---|---|---|---|")
    for lines in (10_000, 100_000, 1_000_000):
        benchmark_index(lines)


def benchmark_index(lines: int, workers: int = 4) -> None:
    """Time to load a list file of that many clips, and what the loading processes then hold. No clip is there."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "VoxCeleb2")
        root.mkdir()
        names = (f"id{i // 182:05d}/{i // 8:011d}/{i % 8:05d}.mp4" for i in range(lines))
        (root / "files.txt").write_text("\n".join(names))
        began = time.perf_counter()
        samples = data.load_samples("voxceleb2", Path(folder), "train")
        listed, sources = time.perf_counter(), {"video": data.Source(samples, 16, 16, repeats=4)}
        loading = iter(data.loader(data.TrainingData(sources, "pretrain", SIZES["base"]), workers, batch_size=None,
                                   sampler=data.Schedule(sources, 0, 1, 0, 1)))
        for _ in range(10 * workers):
            next(loading)
        loaded, held = time.perf_counter(), Counter()
        for worker in loading._workers:
            for name, kib in re.findall(r"(\w+): +(\d+) kB", Path(f"/proc/{worker.pid}/smaps_rollup").read_text()):
                held[name] += int(kib) / 1024 / workers
        print(f"| {lines:,} | {listed - began:.2f} s | {loaded - listed:.2f} s | {held['Pss']:.0f} MiB | "
              f"{held['Private_Clean'] + held['Private_Dirty']:.0f} MiB |")


def benchmark_processes() -> list[list]:
    """The real command at one effective batch; the time of the second epoch, in which nothing starts up."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        write_faces(Path(folder, "data", "synthetic"), scale=0.1)
        for count in (2, 1):
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
            subprocess.run([sys.executable, *launcher, str(ROOT / "pretrain.py"), "--dataset", "synthetic", "--epochs",
                            "2", "--output", str(count)], cwd=folder, check=True, capture_output=True)
            seconds += [json.loads(Path(folder, str(count), "log.jsonl").read_text().splitlines()[1])["seconds"]]
    return [ratio("an epoch of pretrain.py, size tiny, two processes", "one process", *((s, s) for s in seconds))]


# ------------------------------------------------------------------------------------------------------------- data

def moving_picture(rng: np.random.Generator, frames: int):
    """Frames (224, 224, 3) of a smooth picture that sways behind a little noise: about VoxCeleb2's bits per second."""
    picture = Image.fromarray(rng.integers(0, 256, (24, 24, 3)).astype(np.uint8)).resize((384, 384), Image.BICUBIC)
    wide, speeds = np.asarray(picture).astype(np.int16), rng.uniform(0.03, 0.12, 2)
    for i in range(frames):
        down, right = (80 + 60 * np.sin(speeds * i)).astype(int)
        noisy = wide[down:down + 224, right:right + 224] + rng.integers(-8, 9, (224, 224, 1))
        yield noisy.clip(0, 255).astype(np.uint8)


def write_files(root: Path, count: int) -> list[data.Samples]:
    """Videos as VoxCeleb2 has them (8 s, 25 fps, H.264, a key frame every 250 frames) and folders of 60 JPEGs."""
    rng = np.random.default_rng(0)
    for i in range(count):
        (root / f"{i}").mkdir()
        with av.open(str(root / f"{i}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=25, options={"g": "250"})
            stream.width = stream.height = 224
            for n, frame in enumerate(moving_picture(rng, 200)):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
                if n < 60:
                    Image.fromarray(frame).save(root / f"{i}" / f"{n + 1:05d}.jpg", quality=92)
            container.mux(stream.encode())
    return [data.Samples("", "video", (), root, np.array([f"{i}{suffix}".encode() for i in range(count)]),
                         np.zeros(count, np.int64), stride=4, crop=data.CATALOGUE["voxceleb2"].crop)
            for suffix in (".mp4", "")]


def decord_clip(path: Path, choose, each) -> torch.Tensor:
    """data.read_clip, by decord."""
    reader = decord.VideoReader(str(path), num_threads=1)
    frames = torch.from_numpy(reader.get_batch(choose(len(reader))).asnumpy()).permute(0, 3, 1, 2)
    return torch.stack([each(frame) for frame in frames])


def plain_jpegs(path: Path, choose, each) -> torch.Tensor:
    """data.read_clip of a folder without any of its care: nothing but Pillow's decoding."""
    files = sorted(os.listdir(path))
    frames = (torch.from_numpy(np.array(Image.open(path / files[i]))) for i in choose(len(files)))
    return torch.stack([each(frame.permute(2, 0, 1)) for frame in frames])


def draw(training: data.TrainingData, reader, turn: int) -> torch.Tensor:
    """One micro-batch of every sample through the whole path, with another reader in place of data.read_clip."""
    with patch("data.read_clip", reader):
        _, x, _, errors = training[data.schedule_epoch(training.sources, 0, turn)[0][0]]
    assert not errors and len(x) == training.sources["video"].batch, errors
    return x


def benchmark_reading(rounds: int, clips: int) -> list[list]:
    threads, ratios = torch.get_num_threads(), []
    torch.set_num_threads(1)                # as in a loading process
    with tempfile.TemporaryDirectory() as folder:
        videos, folders = write_files(Path(folder), clips)
        size = sum(videos.path(i).stat().st_size for i in range(clips)) / clips
        print(f"\n{clips} videos, 224 x 224, 200 frames, a key frame every 250, {size / 1024:.0f} KiB on average; and "
              "their first 60 frames as JPEG")
        files = (("videos", videos, "decord", decord_clip if decord else None),
                 ("folders", folders, "plain JPEGs", plain_jpegs))
        for (stage, repeats), (kind, samples, rival, reader) in product((("pretrain", 4), ("finetune", 1)), files):
            n = clips * repeats
            training = data.TrainingData({"video": data.Source(samples, n, n, repeats, repeats)}, stage, SIZES["base"])
            readers = {"data.py": data.read_clip} | ({rival: reader} if reader else {})
            drawn = [draw(training, reader, 0) for reader in readers.values()]
            assert torch.equal(drawn[0], drawn[-1]), "the readers differ"
            measured = measure({name: partial(draw, training, reader) for name, reader in readers.items()}, rounds)
            print(f"  {stage}, {kind}: {n / measured['data.py'][0]:.0f} samples per CPU-second")
            ratios += [ratio(f"read and augment {n} samples of {clips} {kind}, {stage}", rival, measured["data.py"],
                             measured[rival])] if reader else []
    torch.set_num_threads(threads)
    return ratios


# -------------------------------------------------------------------------------------------------------------- GPU

def benchmark_gpu(device: str, size: str, largest: int) -> None:
    """bf16 steps at the paper's batch and at its doubles that fit, with and without compiled layers; the expert layer;
    and how many samples a core loads."""
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: there is no GPU here (--device cpu --size tiny --largest 2 tries the command itself)")
    peak = matrix_peak("bf16", device)
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else platform.processor()}, torch {torch.__version__}: "
          f"{peak / 1e12:.2f} bf16 TFLOP/s\n\n"
          "| step, bf16 | of | samples at once | per second | of the peak | memory |\n|---|---|---|---|---|---|")
    for (step, (what, _, papers, _)), (who, compiled) in product(STEPS.items(), [
            ("ours", False), ("ours", True)] + [("transformers", False)] * bool(transformers)):
        settings = dict(who=who, step=step, precision="bf16", size=size, device=device)
        flops, samples = in_turns({"": settings | {"samples": 1}}, 1)[""]["flops"], min(papers, largest)
        with contextlib.suppress(SystemExit):                               # a step that does not fit
            while samples <= largest:
                m = in_turns({"": settings | {"samples": samples, "compiled": compiled}}, 10)[""]
                rate = samples / m["time"][1]
                print(f"| {what} | {who}{', compiled' if compiled else ''} | {samples} | {rate:.1f} | "
                      f"{flops * rate / peak:.0%} | {m['peak']:.0f} MiB |")
                samples *= 2
    print(f"\n{markdown(RATIOS, benchmark_experts(20, device))}")
    benchmark_reading(3, 8)


# ---------------------------------------------------------------------------- what a GPU is asked, counted without one

GPU = torch.device("cpu", 1)                # stands for one: autocast knows its type, and no other tensor is there
NO_KERNEL = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_unsafe_view", "_reshape_alias"}


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on GPU; within Asked operators take it."""
    __torch_function__ = torch._C._disabled_torch_function_impl
    __torch_dispatch__ = classmethod(lambda cls, operator, *_: NotImplemented)

    def __new__(cls, host: torch.Tensor):
        self = torch.Tensor._make_wrapper_subclass(cls, host.shape, host.stride(), host.storage_offset(),
                                                   dtype=host.dtype, device=GPU)
        self.host = host
        return self

    def as_subclass(self, cls):
        return self

    def tolist(self):
        return self.cpu().tolist()


class Asked(TorchDispatchMode):
    """Counts the operators that launch kernels on a GPU, and the lines that wait for it."""
    kernels, waits = 0, Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, operator._overloadpacket.__name__
        there = {id(x.host): x for x in tree_leaves((args, kwargs)) if isinstance(x, OnGpu)}
        device = kwargs.get("device")
        if not there and device != GPU:
            return operator(*args, **kwargs)
        up, down = name == "_to_copy" and not there, device not in (None, GPU) or name == "_local_scalar_dense"
        sized_by_data = torch.Tag.dynamic_output_shape in operator.tags and name != "index"  # that only by a mask
        if down or sized_by_data or up and not kwargs.get("non_blocking"):
            lines = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_stack()
                     if Path(f.filename).parent == ROOT]
            self.waits[lines[-1]] += 1
        view = any(r.alias_info and not r.alias_info.is_write for r in operator._schema.returns)
        self.kernels += not (up or down or view or name in NO_KERNEL)
        args, kwargs = tree_map(lambda x: x.host if isinstance(x, OnGpu) else x, (args, kwargs))
        out = operator(*args, **kwargs | ({"device": torch.device("cpu")} if "device" in kwargs else {}))
        return out if down else tree_map(
            lambda x: x if not isinstance(x, torch.Tensor) else there[id(x)] if id(x) in there else OnGpu(x), out)


def training_step(process: Process, objective, m: str):
    """A function that lets `train` do a step of two micro-batches of modality m."""
    optimizer = torch.optim.AdamW(decayed(objective.model.named_parameters(), 0.05), fused=True)
    samples = data.Samples("", m, CLASSES, ROOT, np.full(4, b""), np.zeros(4, np.int64))
    drawn = SimpleNamespace(sources={m: data.Source(samples, batch=4, micro=2)},
                            batch=[random_batch(m, 2, objective.model.size), torch.zeros(2, dtype=torch.long), []])
    return partial(train, process, SimpleNamespace(epochs=1, workers=0, compile=None, clip_grad=None),
                   Mock(stage="counting", **{"load.return_value": None, "due.return_value": False}), objective.model,
                   objective, optimizer, Rate(1e-4, 0, 1, 0, 0), data.Schedule(drawn.sources, 0, 1, 0, 1), drawn)


def evaluate_batch(process: Process, model: S4D) -> None:
    samples = data.Samples("counting", "image", CLASSES, ROOT, np.full(2, b""), np.zeros(2, np.int64))
    views = random_batch("image", 2, model.size)[:, None]
    with patch("evaluate.loader", lambda *_, batch_sampler: ([index, views, None] for index in batch_sampler)):
        observe(model, data.TestData(samples, model.size), process, 0)


def benchmark_count(size: str) -> None:
    """Each is done twice, in bf16, and counted the second time, when no constant and no moment is new."""
    process, make_tensor, rows = Process(0, 1, GPU, torch.bfloat16), torch.tensor, []
    with Asked() as asked, patch("model.attend", F.scaled_dot_product_attention), \
            patch("torch.nn.utils.clip_grad._has_foreach_support", lambda *_: True), \
            patch("torch.tensor", lambda *x, device="cpu", **options: make_tensor(*x, **options).to(device)), \
            patch("pretrain.loader", lambda drawn, *_, sampler, **options: ([m, *drawn.batch] for m in sampler)):
        with GPU:
            autoencoder, model = MaskedAutoencoder(size), S4D(size, CLASSES, CLASSES)
        for what, run in {
                "stage 1, a step of two micro-batches": training_step(
                    process, ReconstructionLoss(autoencoder, MASK_RATIO), "video"),
                "stage 2, a step of two micro-batches": training_step(process, JointLoss(model, mixing=1.0), "image"),
                "evaluation of a batch": partial(evaluate_batch, process, model)}.items():
            run()
            asked.kernels, asked.waits = 0, Counter()
            run()
            rows.append([what, asked.waits.total(), asked.kernels, ", ".join(asked.waits.elements())])
    print(f"\n{markdown([f'size {size}', 'waits', 'kernels', 'where the host waits'], rows)}")


def main() -> None:
    if sys.argv[1:2] == ["one"]:
        return one(**json.loads(sys.argv[2]))
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("part", choices=["steps", "experts", "growth", "processes", "data", "all", "count", "gpu"])
    p.add_argument("--rounds", type=int, default=5, help="measured turns of each rival")
    p.add_argument("--clips", type=int, default=8, help="videos and folders to write (data)")
    p.add_argument("--picture", type=Path, help="where to draw the steps' times")
    p.add_argument("--size", default="base", choices=list(SIZES), help="of the model (count, gpu)")
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu tries the command itself (gpu)")
    p.add_argument("--largest", type=int, default=1024, help="samples at once to try at most (gpu)")
    args = p.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    if args.part == "count":
        return benchmark_count(args.size)
    if args.part == "gpu":
        return benchmark_gpu(args.device, args.size, args.largest)
    print(f"torch {torch.__version__}, transformers {getattr(transformers, '__version__', 'not installed')}, "
          f"{torch.get_num_threads()} threads")
    parts = {"steps": partial(benchmark_steps, args.rounds, args.picture),
             "experts": partial(benchmark_experts, 4 * args.rounds), "growth": partial(benchmark_growth, args.rounds),
             "processes": benchmark_processes, "data": partial(benchmark_reading, args.rounds, args.clips)}
    rows = [row for name in (parts if args.part == "all" else [args.part]) for row in parts[name]() or []]
    if rows:
        print(f"\n{markdown(RATIOS, rows)}")


if __name__ == "__main__":
    main()
