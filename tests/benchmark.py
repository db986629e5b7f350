"""What the code costs, measured on data that it makes itself: nothing here is a test, and no test waits for it.

    python tests/benchmark.py steps           training steps of ViT-B beside transformers' VideoMAE, and where time goes
    python tests/benchmark.py experts         the expert layer beside a plain loop over experts
    python tests/benchmark.py growth          time and memory by samples, frames, experts, and indexed clips
    python tests/benchmark.py processes       two processes beside one
    python tests/benchmark.py data            reading, sampling and augmenting, beside decord and plain JPEG decoding
    python tests/benchmark.py all             all of these
    python tests/benchmark.py gpu             the steps on a GPU, with and without --compile

Rivals run in turns, several times, and medians are printed: other work on the machine then disturbs all of them. All
end in one table of ratios. CPU seconds are those of this process and its threads. A step is forward, backward and the
same fused AdamW for everybody. Peak memory is a fresh process's largest resident set less that before the model was
made. transformers and decord are measured where they are installed (pip install transformers decord).
"""
import argparse
import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: a waiting thread takes no CPU seconds

import av
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402  (needs the path above)
from evaluate import FONT, LINE, text_width, titled  # noqa: E402
from finetune import JointLoss  # noqa: E402
from model import MASK_RATIO, S4D, SIZES, Adapter, MaskedAutoencoder, MoE, modality, random_mask  # noqa: E402
from pretrain import ReconstructionLoss, compile_layers, decayed, keep_freed_memory  # noqa: E402

try:
    import decord
except ImportError:
    decord = None
try:
    import transformers
except ImportError:
    transformers = None


def timed(run, turn: int) -> tuple[float, float]:
    """CPU seconds and seconds of a call."""
    cpu, began = time.process_time(), time.perf_counter()
    run(turn)
    return time.process_time() - cpu, time.perf_counter() - began


def measure(rivals: dict, rounds: int) -> dict[str, tuple[float, float]]:
    """Median (CPU seconds, seconds) of one call of each rival, in turns; the first round does not count."""
    times = {name: [] for name in rivals}
    for turn in range(rounds + 1):
        for name, run in rivals.items():
            times[name].append(timed(run, turn))
    return {name: tuple(np.median(values[1:], axis=0)) for name, values in times.items()}


class Ratio(NamedTuple):
    """A line of the table: seconds (or what `unit` says) of ours and of the rival, and how many times that is ours."""
    what: str
    rival: str
    ours: tuple[float, float]               # CPU seconds and seconds, or a number twice
    theirs: tuple[float, float]
    target: str = ""
    unit: str = "s"


def print_table(ratios: list[Ratio]) -> None:
    print("\n| what | against | ours | theirs | times as fast (by CPU seconds) | target |\n|---|---|---|---|---|---|")
    for row in ratios:
        cpu, seconds = np.divide(row.theirs, row.ours)
        if row.unit == "s":
            ours, theirs, ratio = (f"{row.ours[1]:.3g} s", f"{row.theirs[1]:.3g} s", f"{seconds:.2f} ({cpu:.2f})")
        else:
            ours, theirs, ratio = (f"{row.ours[0]:.0f} {row.unit}", f"{row.theirs[0]:.0f} {row.unit}",
                                   f"{1 / cpu:.2f} of theirs")
        print(f"| {row.what} | {row.rival} | {ours} | {theirs} | {ratio} | {row.target} |")


# ------------------------------------------------------------------------------------------------------------ steps

PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16}
STEPS = {"clips": ("pre-training, clips at 95 %", 4), "images": ("pre-training, images at 90 %", 32),
         "finetune": ("fine-tuning, clips", 2)}  # what they are, samples
TARGETS = {"clips": 1.25, "images": 1.2, "finetune": 1.0}  # times transformers' speed at equal precision
CLASSES = [str(i) for i in range(7)]


def random_batch(step: str, samples: int, size, device) -> torch.Tensor:
    """uint8, as loading processes deliver it."""
    frames = () if step == "images" else (size.frames,)
    return torch.randint(256, (samples, *frames, 3, size.pixels, size.pixels), dtype=torch.uint8, device=device)


def own_loss(step: str, x: torch.Tensor, size: str, experts: int):
    """The model, and a function that gives the loss of a batch as training computes it: from uint8, with its mask."""
    if step == "finetune":
        model = S4D(size, [], CLASSES, experts=experts).to(x.device)
        module, labels = JointLoss(model), torch.zeros(len(x), dtype=torch.long, device=x.device)
        return model, partial(module, x, labels)
    model = MaskedAutoencoder(size).to(x.device)
    return model, partial(ReconstructionLoss(model, MASK_RATIO), x, None)


def peer_loss(step: str, x: torch.Tensor, size: str, experts: int):
    """The same of transformers' VideoMAE, which gets normalised floats, converted before the measurement; images as
    clips of one time slot. Its attention is the one that it takes by default, scaled_dot_product_attention."""
    shape = SIZES[size]
    pixels = data.to_float(x)
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
    tokens = pixels.shape[1] // shape.tubelet * shape.image_tokens
    ratio = MASK_RATIO["image" if step == "images" else "video"]
    return model, lambda: model(pixels, bool_masked_pos=random_mask(len(x), tokens, ratio, x.device)).loss


def make_step(losses, step: str, precision: str, samples: int, size: str = "base", experts: int = 8,
              device: str = "cpu", compiled: bool = False):
    """A training step, as a function of the turn, which seeds the mask and the noise; and the number of parameters."""
    torch.manual_seed(0)
    model, loss = losses(step, random_batch(step, samples, SIZES[size], device), size, experts)
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
        if device == "cuda":
            torch.cuda.synchronize()
    return run, sum(p.numel() for p in model.parameters())


def rivals_of_steps() -> dict:
    return {"ours": own_loss} | ({"transformers": peer_loss} if transformers else {})


def matrix_peak(precision: str, device: str = "cpu", n: int = 2048) -> float:
    """Floating-point operations per CPU-second (on a GPU, per second) of large matrix products."""
    n = 8192 if device == "cuda" else n
    a, b = (torch.randn(n, n, device=device, dtype=PRECISION[precision]) for _ in range(2))

    def run(turn: int) -> None:
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
    return 2 * n ** 3 / measure({"": run}, 10)[""][0 if device == "cpu" else 1]


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
            rest = process.communicate()[0]
            results[name] = json.loads(rest) | {"time": tuple(np.median(times[name][2:], axis=0))}
    finally:
        for process in processes.values():
            process.kill()
    return results


def largest_resident_set() -> float:
    """Of this process until now, in MiB (resource.getrusage would count the process that started this one too)."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def one(who: str, frames: int | None = None, spent: bool = False, **settings) -> None:
    """In this fresh process, run a step for every line of standard input and print what it took, as JSON; then its peak
    memory, operations and, if asked, what the time was spent on."""
    device, size = settings.get("device", "cpu"), settings.get("size", "base")
    torch.set_num_threads(1 if size == "tiny" else torch.get_num_threads())
    SIZES["measured"] = replace(SIZES[size], frames=frames or SIZES[size].frames)
    if device == "cpu":
        keep_freed_memory()                 # for every rival, as pretrain.start does for ours
    before = largest_resident_set()
    run, parameters = make_step(rivals_of_steps()[who], **settings | {"size": "measured"})
    for line in sys.stdin:
        print(json.dumps(timed(run, int(line))), flush=True)
    peak = largest_resident_set() - before
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2 ** 20
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
    "copies, gathers": r"aten::(copy_|cat|gather|index.*|scatter.*|sort)$",
    "rest": ""}


def where_time_goes(run) -> dict[str, float]:
    """CPU seconds of a step by group of operators, on one thread, as their own times then add up; the shortest of 3."""
    threads, records = torch.get_num_threads(), []
    torch.set_num_threads(1)
    for turn in range(4):
        with profile() as record:
            run(turn)
        spent = dict.fromkeys(GROUPS, 0.0)
        for event in record.key_averages():
            spent[next(name for name, pattern in GROUPS.items() if re.match(pattern, event.key))] += \
                event.self_cpu_time_total / 1e6
        records.append(spent)
    torch.set_num_threads(threads)
    return min(records[1:], key=lambda spent: sum(spent.values()))


def benchmark_steps(rounds: int, picture: Path | None) -> list[Ratio]:
    peak = {precision: matrix_peak(precision) for precision in PRECISION}
    print("matrix peak per CPU-second: " + ", ".join(f"{p} {v / 1e9:.0f} GFLOP/s" for p, v in peak.items()))
    profiles, ratios = {}, []
    for step, (what, samples) in STEPS.items():
        measured = in_turns({(who, precision): dict(who=who, step=step, precision=precision, samples=samples,
                                                    spent=precision == "bf16")
                             for precision in PRECISION for who in rivals_of_steps()}, rounds)
        print(f"\n{samples} x {what}")
        for (who, precision), m in measured.items():
            print(f"  {who:14}{precision}{m['time'][0]:8.2f} CPU s{m['time'][1]:8.2f} s{m['peak']:8.0f} MiB, of them "
                  f"{m['state']:.0f} weights, gradients, moments; {m['flops'] / 1e9:.0f} GFLOP, "
                  f"{m['flops'] / m['time'][0] / peak[precision]:.0%} of the matrix peak")
        profiles |= {f"{what}, {who}": m["spent"] for (who, precision), m in measured.items() if m["spent"]}
        ratios += step_ratios(step, measured) if transformers else []
    print("\nCPU seconds of a bf16 step on one thread\n" + " " * 44 + "".join(f"{name:>17}" for name in GROUPS))
    for name, spent in profiles.items():
        print(f"  {name:42}" + "".join(f"{seconds:17.3f}" for seconds in spent.values()))
    if picture:
        time_picture(profiles).save(picture, optimize=True)
    return ratios


def step_ratios(step: str, measured: dict) -> list[Ratio]:
    """Ours against transformers, at equal precision and at each one's default."""
    what = f"{STEPS[step][1]} x {STEPS[step][0]}"
    pairs = [("bf16", "bf16", TARGETS[step]), ("fp32", "fp32", TARGETS[step])]
    pairs += [("bf16", "fp32", 2.5)] if step == "clips" else []  # our default against theirs
    ratios = [Ratio(f"{what}, {own}", f"transformers, {peer}", measured["ours", own]["time"],
                    measured["transformers", peer]["time"], f"{target}") for own, peer, target in pairs]
    peaks = [(measured[who, "bf16"]["peak"],) * 2 for who in ("ours", "transformers")]
    return [*ratios, Ratio(f"{what}, peak memory", "transformers, bf16", *peaks, "at most 0.8", "MiB")]


def time_picture(profiles: dict) -> Image.Image:
    """Stacked bars of CPU seconds, from dark to light in the order of GROUPS."""
    left, width, bar = text_width(*profiles) + 14, 620, 26
    scale = width / max(sum(spent.values()) for spent in profiles.values())
    shades = [tuple(int(v) for v in np.array((8, 48, 107)) + i / (len(GROUPS) - 1) * np.array((230, 190, 140)))
              for i in range(len(GROUPS))]
    sheet = Image.new("RGB", (left + width + 70, (bar + 8) * len(profiles) + 2 * LINE + 12), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, spent) in enumerate(profiles.items()):
        x, y = left, row * (bar + 8) + 4
        draw.text((left - 6, y + bar / 2), name, "black", FONT, anchor="rm")
        for shade, seconds in zip(shades, spent.values()):
            draw.rectangle((x, y, x + scale * seconds, y + bar), shade, "white")
            x += scale * seconds
        draw.text((x + 6, y + bar / 2), f"{sum(spent.values()):.2f} s", "black", FONT, anchor="lm")
    x = 10
    for shade, name in zip(shades, GROUPS):
        draw.rectangle((x, sheet.height - LINE - 6, x + 14, sheet.height - LINE + 8), shade, "grey")
        draw.text((x + 20, sheet.height - LINE + 1), name, "black", FONT, anchor="lm")
        x += 34 + text_width(name)
    return titled(sheet, "CPU seconds of a training step of ViT-B in bf16, on one thread")


# ---------------------------------------------------------------------------------------------------------- experts

def plain_experts(module: MoE, x: torch.Tensor) -> torch.Tensor:
    """The same layer as the released one computes it, a loop over experts with a gather and a scatter each, but that
    there an expert has room for N k / n tokens and loses the others."""
    gates, tokens = module.router(x).flatten(0, 1), x.flatten(0, 1)
    mixed = torch.zeros_like(tokens)
    for i, expert in enumerate(module.experts):
        chosen = gates[:, i].nonzero().squeeze(-1)
        mixed = mixed.index_add(0, chosen, (expert(tokens[chosen]) * gates[chosen, i, None]).to(mixed.dtype))
    return mixed.view_as(x)


def benchmark_experts(rounds: int, device: str = "cpu") -> list[Ratio]:
    threads, ratios = torch.get_num_threads(), []
    if device == "cpu":
        keep_freed_memory()
    for batch, tokens, width, target in ((4, 800, 768, 1.5), (16, 288, 128, 4)):
        torch.set_num_threads(threads if width == 768 else 1)  # as training does
        module = MoE(width, [Adapter(width, width // 4) for _ in range(8)]).to(device)
        x = torch.randn(batch, tokens, width, device=device, requires_grad=True)

        def run(layer, precision: str, seed: int, turn: int) -> None:
            # Tokens choose anew in every turn and for everybody: the first to meet a shape makes the kernels for all.
            torch.manual_seed(seed + turn)
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                out = layer(x)
            out.sum().backward()
            module.zero_grad()
            if device == "cuda":
                torch.cuda.synchronize()
        with torch.no_grad():
            assert torch.allclose(module.eval()(x), plain_experts(module, x), atol=1e-4), "the forms differ"
        module.train()
        layers = {"ours": module, "loop over experts": partial(plain_experts, module)}
        measured = measure({(name, precision): partial(run, layer, precision, 1000 * (2 * i + j))
                            for i, (name, layer) in enumerate(layers.items())
                            for j, precision in enumerate(PRECISION)}, rounds)
        ratios += [Ratio(f"expert layer, {batch * tokens} tokens of width {width}, {precision}",
                         f"loop over experts, {precision}", measured["ours", precision],
                         measured["loop over experts", precision], f"{target} in one of them")
                   for precision in reversed(PRECISION)]
    torch.set_num_threads(threads)
    return ratios


# ----------------------------------------------------------------------------------------------- growth, processes

def benchmark_growth() -> None:
    def row(label: str, **settings) -> None:
        m = in_turns({"": dict(who="ours", precision="bf16", **settings)}, 3)[""]
        print(f"| {label} | {m['time'][1]:.2f} s | {m['time'][0]:.2f} s | {m['peak']:.0f} MiB |")
    print("\n| a bf16 step of ViT-B | time | CPU time | peak memory |\n|---|---|---|---|")
    for step in ("clips", "finetune"):
        for samples in (1, 2, 4, 8):
            row(f"{STEPS[step][0]}, {samples}", step=step, samples=samples)
    for step in ("clips", "finetune"):
        for frames in (8, 16, 32):
            row(f"{STEPS[step][0]}, 2 of {frames} frames", step=step, samples=2, frames=frames)
    for experts in (2, 4, 8, 16, 32):
        row(f"{STEPS['finetune'][0]}, 2, {experts} experts", step="finetune", samples=2, experts=experts)
    print("\n| clips listed | list loaded | 40 micro-batches by 4 loading processes | memory of each, PSS | USS |\n"
          "|---|---|---|---|---|")
    for lines in (10_000, 100_000, 1_000_000):
        benchmark_index(lines)


def benchmark_processes() -> list[Ratio]:
    """The real command at one effective batch; the time of the second epoch, in which nothing starts up."""
    with tempfile.TemporaryDirectory() as folder:
        data.write_synthetic(Path(folder, "data", "synthetic"), seed=0, scale=0.1)
        seconds = {}
        for count in (1, 2):
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
            subprocess.run([sys.executable, *launcher, str(ROOT / "pretrain.py"), "--dataset", "synthetic", "--epochs",
                            "2", "--output", str(count)], cwd=folder, check=True, capture_output=True)
            seconds[count] = json.loads(Path(folder, str(count), "log.jsonl").read_text().splitlines()[1])["seconds"]
    return [Ratio("an epoch of pretrain.py, size tiny, two processes", "one process", *((seconds[count],) * 2
                                                                                      for count in (2, 1)))]


# -------------------------------------------------------------------------------------------------------------- GPU

PAPERS = {"clips": 192, "images": 192, "finetune": 16}  # samples that a GPU of the paper computes at once


def benchmark_gpu(device: str, size: str, largest: int) -> None:
    """bf16 steps at the paper's batch and at the largest that fits, with and without compiled layers; the expert layer;
    and how many cores would load what the fastest step takes."""
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: there is no GPU here (--device cpu --size tiny --largest 2 tries the command itself)")
    peak = matrix_peak("bf16", device)
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else platform.processor()}, torch {torch.__version__}: "
          f"{peak / 1e12:.2f} bf16 TFLOP/s\n\n"
          "| step, bf16 | of | samples at once | per second | of the peak | memory |\n|---|---|---|---|---|---|")
    fastest = 0
    for step, (what, _) in STEPS.items():
        for who, compiled in [("ours", False), ("ours", True)] + [("transformers", False)] * bool(transformers):
            settings = dict(who=who, step=step, precision="bf16", size=size, device=device)
            flops = in_turns({"": settings | {"samples": 1}}, 1)[""]["flops"]
            settings |= {"compiled": compiled}
            for samples in sorted({min(PAPERS[step], largest), fitting(settings, largest)}):
                m = in_turns({"": settings | {"samples": samples}}, 10)[""]
                rate = samples / m["time"][1]
                fastest = max(fastest, rate) if (who, step) == ("ours", "clips") else fastest
                print(f"| {what} | {who}{', compiled' if compiled else ''} | {samples} | {rate:.1f} | "
                      f"{flops * rate / peak:.0%} | {m['peak']:.0f} MiB |")
    print_table(benchmark_experts(20, device))
    rates = benchmark_reading(3, 8)[1]
    print(f"loading {fastest:.0f} clips of stage 1 a second takes {fastest / rates['pretrain', 'videos']:.1f} cores")


def fitting(settings: dict, largest: int) -> int:
    """The largest power of two, up to `largest`, whose step fits the memory."""
    samples = 1
    while samples < largest:
        with contextlib.suppress(SystemExit):
            in_turns({"": settings | {"samples": 2 * samples}}, 1)
            samples *= 2
            continue
        break
    return samples


# ------------------------------------------------------------------------------------------------------------- data

def moving_picture(rng: np.random.Generator, frames: int):
    """Frames (224, 224, 3) of a smooth picture that sways behind a little noise: about VoxCeleb2's bits per second."""
    picture = Image.fromarray(rng.integers(0, 256, (24, 24, 3)).astype(np.uint8)).resize((384, 384), Image.BICUBIC)
    wide, speeds = np.asarray(picture).astype(np.int16), rng.uniform(0.03, 0.12, 2)
    for i in range(frames):
        down, right = (80 + 60 * np.sin(speeds * i)).astype(int)
        noisy = wide[down:down + 224, right:right + 224] + rng.integers(-8, 9, (224, 224, 1))
        yield noisy.clip(0, 255).astype(np.uint8)


def write_files(root: Path, count: int) -> tuple[data.Samples, data.Samples]:
    """Videos as VoxCeleb2 has them (8 s, 25 fps, H.264, a key frame every 250 frames) and folders of 60 JPEGs."""
    rng, options = np.random.default_rng(0), {"g": "250"}
    for i in range(count):
        (root / "folders" / f"{i}").mkdir(parents=True)
        with av.open(str(root / f"{i}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=25, options=options)
            stream.width = stream.height = 224
            for n, frame in enumerate(moving_picture(rng, 200)):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
                if n < 60:
                    Image.fromarray(frame).save(root / "folders" / f"{i}" / f"{n + 1:05d}.jpg", quality=92)
            container.mux(stream.encode())

    def samples(folder: Path, suffix: str) -> data.Samples:
        names = np.array([f"{i}{suffix}".encode() for i in range(count)])
        return data.Samples("", data.VOXCELEB2, folder, names, np.zeros(count, np.int64), stride=4)
    return samples(root, ".mp4"), samples(root / "folders", "")


def decord_clip(path: Path, choose) -> torch.Tensor:
    """data.read_clip, by decord."""
    reader = decord.VideoReader(str(path), num_threads=1)
    return torch.from_numpy(reader.get_batch(choose(len(reader))).asnumpy()).permute(0, 3, 1, 2)


def plain_jpegs(path: Path, choose) -> torch.Tensor:
    """data.read_clip of a folder without any of its care: nothing but Pillow's decoding."""
    files = sorted(os.listdir(path))
    frames = [torch.from_numpy(np.array(Image.open(path / files[i]))) for i in choose(len(files))]
    return torch.stack(frames).permute(0, 3, 1, 2)


def draw(training: data.TrainingData, source: data.Source, reader, turn: int) -> torch.Tensor:
    """One micro-batch of every sample through the whole path, with another reader in place of data.read_clip."""
    own, data.read_clip = data.read_clip, reader
    try:
        micro = data.schedule_epoch({"video": source}, 0, turn)[0][0]
        _, x, _, unreadable = training[micro]
    finally:
        data.read_clip = own
    assert not unreadable and len(x) == source.batch, unreadable
    return x


def benchmark_reading(rounds: int, clips: int) -> tuple[list[Ratio], dict[tuple[str, str], float]]:
    """Ratios, and samples per CPU-second of each stage and kind of file."""
    threads, own, ratios, rates = torch.get_num_threads(), data.read_clip, [], {}
    torch.set_num_threads(1)                # as in a loading process
    with tempfile.TemporaryDirectory() as folder:
        videos, folders = write_files(Path(folder), clips)
        size = sum(videos.path(i).stat().st_size for i in range(clips)) / clips
        print(f"\n{clips} videos, 224 x 224, 200 frames, a key frame every 250, {size / 1024:.0f} KiB on average; and "
              "their first 60 frames as JPEG")
        for stage, repeats in (("pretrain", 4), ("finetune", 1)):
            for kind, samples, rival, reader in (("videos", videos, "decord", decord and decord_clip),
                                                 ("folders", folders, "plain JPEGs", plain_jpegs)):
                source = data.Source(samples, clips * repeats, clips * repeats, share=repeats, repeats=repeats)
                training = data.TrainingData({"video": source}, stage, SIZES["base"])
                readers = {"data.py": own} | ({rival: reader} if reader else {})
                drawn = [draw(training, source, reader, 0) for reader in readers.values()]
                assert all(torch.equal(x, drawn[0]) for x in drawn), "the readers differ"
                measured = measure({name: partial(draw, training, source, reader) for name, reader in readers.items()},
                                   rounds)
                rates[stage, kind] = clips * repeats / measured["data.py"][0]
                print(f"  {stage}, {kind}: {rates[stage, kind]:.0f} samples per CPU-second")
                ratios += [Ratio(f"read and augment {clips * repeats} samples of {clips} {kind}, {stage}", rival,
                                 measured["data.py"], measured[rival])] if rival in measured else []
    torch.set_num_threads(threads)
    return ratios, rates


def memory(pid: int) -> tuple[float, float]:
    """A process's proportional and own memory, PSS and USS, in MiB."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    kib = {name: int(lines[name].split()[0]) for name in ("Pss", "Private_Clean", "Private_Dirty")}
    return kib["Pss"] / 1024, (kib["Private_Clean"] + kib["Private_Dirty"]) / 1024


def benchmark_index(lines: int, workers: int = 4) -> None:
    """Time to load a list file of that many clips, and what the loading processes then hold. No clip is there."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "VoxCeleb2"
        root.mkdir()
        names = (f"id{i // 182:05d}/{i // 8:011d}/{i % 8:05d}.mp4" for i in range(lines))
        (root / data.FILE_LIST).write_text("\n".join(names))
        began = time.perf_counter()
        samples = data.load_samples("voxceleb2", Path(folder), "train")
        seconds = time.perf_counter() - began
        source = data.Source(samples, 16, 16, repeats=4)
        began = time.perf_counter()
        loading = iter(data.loader(data.TrainingData({"video": source}, "pretrain", SIZES["base"]), workers,
                                   batch_size=None, sampler=data.Schedule({"video": source}, 0, 1, 0, 1)))
        for _ in range(10 * workers):
            next(loading)
        first = time.perf_counter() - began
        held = [memory(worker.pid) for worker in loading._workers]
        pss, uss = np.mean(held, axis=0)
        print(f"| {len(samples):,} | {seconds:.2f} s | {first:.2f} s | {pss:.0f} MiB | {uss:.0f} MiB |")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    for name, text in (("steps", "training steps beside transformers'"), ("experts", "the expert layer"),
                       ("growth", "by samples, frames, experts, clips"), ("processes", "two beside one"),
                       ("data", "reading, sampling, augmenting"), ("all", "all of these")):
        c = commands.add_parser(name, help=text)
        c.add_argument("--rounds", type=int, default=5, help="measured turns of each rival")
        c.add_argument("--clips", type=int, default=8, help="videos and folders to write (data)")
        c.add_argument("--picture", type=Path, help="where to draw the steps' times")
    c = commands.add_parser("gpu", help="training steps on a GPU")
    c.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    c.add_argument("--size", default="base", choices=list(SIZES))
    c.add_argument("--largest", type=int, default=1024, help="samples at once to try at most")
    c = commands.add_parser("one")
    c.add_argument("settings", type=json.loads)
    args = p.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    if args.command == "one":
        return one(**args.settings)
    if args.command == "gpu":
        return benchmark_gpu(args.device, args.size, args.largest)
    print(f"torch {torch.__version__}, transformers {getattr(transformers, '__version__', 'not installed')}, "
          f"{torch.get_num_threads()} threads")
    parts = {"steps": partial(benchmark_steps, args.rounds, args.picture),
             "experts": partial(benchmark_experts, 4 * args.rounds), "growth": benchmark_growth,
             "processes": benchmark_processes, "data": lambda: benchmark_reading(args.rounds, args.clips)[0]}
    names = parts if args.command == "all" else [args.command]
    print_table([ratio for name in names for ratio in parts[name]() or []])


if __name__ == "__main__":
    main()
