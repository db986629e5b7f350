"""What the code costs, measured on data that it makes itself: nothing here is a test, and no test waits for it.

    python tests/benchmark.py steps        training steps of ViT-B beside transformers' VideoMAE, and where time goes
    python tests/benchmark.py experts      the expert layer beside a loop over experts
    python tests/benchmark.py growth       time and memory by samples, frames, experts and listed clips
    python tests/benchmark.py processes    two processes beside one
    python tests/benchmark.py count        kernels and waits that steps would ask of a GPU, counted without one
    python tests/benchmark.py gpu          the steps and the expert layer on a GPU, with and without --compile

Rivals run in turns, several times, and medians are printed: other work on the machine then disturbs all of them. A step
is forward, backward and the same fused AdamW for everybody. Peak memory is a fresh process's largest resident set less
that before the model was made, as /proc tells it on Linux. transformers is needed for its steps (pip install it).
"""
import argparse
import json
import os
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
from unittest.mock import Mock, patch

os.environ.setdefault("OMP_WAIT_POLICY", "passive")     # before torch is imported: who waits takes no CPU seconds

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402  (needs the path above)
from evaluate import grid, markdown, observe  # noqa: E402
from faces import write_faces  # noqa: E402
from finetune import JointLoss  # noqa: E402
from model import MASK_RATIO, S4D, SIZES, MaskedAutoencoder, MoAE, modality, random_mask  # noqa: E402
from pretrain import Process, Rate, ReconstructionLoss, compile_layers, decayed, start, train  # noqa: E402

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


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


def processor() -> str:
    return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]


def matrix_peak(precision: str, device: str = "cpu") -> float:
    """10^9 floating-point operations per CPU-second (on a GPU, per second) of large matrix products."""
    n = 8192 if device == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=PRECISIONS[precision])
    cpu, seconds = measure({"": lambda turn: (a @ a)[0, 0].item()}, 10)[""]
    return 2e-9 * n ** 3 / (cpu if device == "cpu" else seconds)


# ------------------------------------------------------------------------------------------------------------ steps

CLASSES = tuple("0123456")
RIVALS = ("ours", "transformers")
STEPS = {                                   # name, samples, those that a GPU of the paper computes at once
    "clips": ("pre-training, clips at 95 %", 4, 192),
    "images": ("pre-training, images at 90 %", 32, 192),
    "finetune": ("fine-tuning, clips", 2, 16)}


def random_batch(name: str, samples: int, size, device="cpu") -> torch.Tensor:
    """uint8 images or clips, as loading processes deliver them."""
    frames = () if name == "image" else (size.frames,)
    return torch.randint(256, (samples, *frames, 3, size.pixels, size.pixels), dtype=torch.uint8, device=device)


def own_loss(step: str, x: torch.Tensor, labels: torch.Tensor, size: str, experts: int):
    """The model, and a function that gives the loss of a batch as training computes it: from uint8, with its mask."""
    if step == "finetune":
        model = S4D(size, [], CLASSES, experts=experts).to(x.device)
        objective = JointLoss(model)
    else:
        model = MaskedAutoencoder(size).to(x.device)
        objective = ReconstructionLoss(model, MASK_RATIO)
    return model, lambda: objective(data.to_float(x), labels)


def peer_loss(step: str, x: torch.Tensor, labels: torch.Tensor, size: str, experts: int):
    """The same of transformers' VideoMAE without experts, which gets normalised floats, converted before the
    measurement; images as clips of one time slot. Its attention is its default, scaled_dot_product_attention."""
    import transformers
    shape = SIZES[size]
    pixels = data.to_float(x)
    name = modality(pixels)
    if name == "image":
        pixels = pixels.unsqueeze(2).expand(-1, -1, shape.tubelet, -1, -1)
    pixels = pixels.transpose(1, 2).contiguous()                            # (B, T, 3, H, W)
    frames = pixels.shape[1]
    config = transformers.VideoMAEConfig(
        image_size=shape.pixels, patch_size=shape.patch, num_frames=frames, tubelet_size=shape.tubelet,
        hidden_size=shape.width, num_hidden_layers=shape.depth, num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width, decoder_hidden_size=shape.decoder_width,
        decoder_num_attention_heads=shape.decoder_heads, decoder_num_hidden_layers=shape.decoder_depth,
        decoder_intermediate_size=4 * shape.decoder_width, layer_norm_eps=1e-6, num_labels=len(CLASSES))
    if step == "finetune":
        model = transformers.VideoMAEForVideoClassification(config).to(x.device).train()
        return model, lambda: model(pixels, labels=labels).loss
    model = transformers.VideoMAEForPreTraining(config).to(x.device).train()
    tokens = frames // shape.tubelet * shape.tokens("image")
    mask = partial(random_mask, len(x), tokens, MASK_RATIO[name], x.device)
    return model, lambda: model(pixels, bool_masked_pos=mask()).loss


def largest_resident_set() -> float:
    """Of this process until now, in MiB (resource.getrusage would count the process that started this one too)."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def one(who: str, step: str, precision: str, samples: int, size: str = "base", frames: int | None = None,
        experts: int = 8, compiled: bool = False, profiled: bool = False) -> None:
    """In this fresh process, do a step for every line of standard input, which seeds mask and noise, and print what it
    took, as JSON; then its peak memory, operations and, if asked, what the time was spent on."""
    process = start(size, precision)        # threads and freed memory as in training, for every rival
    device = process.device.type
    SIZES["measured"] = replace(SIZES[size], frames=frames or SIZES[size].frames)
    if who == "transformers":
        import transformers.models.videomae.modeling_videomae  # noqa: F401  (its code is no memory of the step)
    before = largest_resident_set()
    torch.manual_seed(0)
    x = random_batch("image" if step == "images" else "video", samples, SIZES["measured"], device)
    labels = torch.zeros(samples, dtype=torch.long, device=device)
    model, loss = (own_loss if who == "ours" else peer_loss)(step, x, labels, "measured", experts)
    compile_layers(model, "inductor" if compiled else None)
    optimizer = torch.optim.AdamW(decayed(model.named_parameters(), 0.05), 1e-5, fused=True)

    def run(turn: int) -> None:
        torch.manual_seed(turn)
        optimizer.zero_grad(set_to_none=True)
        with process.autocast():
            value = loss()
        value.backward()
        optimizer.step()
        torch.get_device_module(device).synchronize()

    for line in sys.stdin:
        print(json.dumps(timed(run, int(line))), flush=True)
    result = {"peak": largest_resident_set() - before}
    if device == "cuda":
        result["peak"] = torch.cuda.max_memory_allocated() / 2 ** 20
    if not compiled:
        # In plain products, as older versions of the counter do not know the fused attention of a CPU.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            run(0)
        result["gflop"] = counter.get_total_flops() / 1e9
    if profiled:
        result["spent"] = where_time_goes(run)
    print(json.dumps(result))


def in_turns(rivals: dict, rounds: int) -> dict[object, dict]:
    """Each rival's step in a process of its own, as in training, one at a time. rivals: arguments of `one` by name.
    Returns what it prints last, with the medians "cpu" and "seconds"; the first two rounds do not count."""
    processes, times, results = {}, {}, {}
    for name, settings in rivals.items():
        command = [sys.executable, __file__, "one", json.dumps(settings)]
        processes[name] = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        times[name] = []
    for turn in range(rounds + 2):
        for name, process in processes.items():
            print(turn, file=process.stdin, flush=True)
            times[name].append(json.loads(process.stdout.readline()))
    for name, process in processes.items():
        last, _ = process.communicate()
        cpu, seconds = np.median(times[name][2:], axis=0)
        results[name] = json.loads(last) | dict(cpu=cpu, seconds=seconds)
    return results


GROUPS = {                                  # operators of torch by what they are for; the first that matches
    "matrix products": r"aten::(mm|addmm|mkldnn_convolution|convolution_backward)$",
    "attention": r"aten::(_scaled_dot_product.*|bmm|baddbmm|_softmax.*)$",
    "layer norm": r"aten::native_layer_norm.*",
    "GELU": r"aten::gelu.*",
    "optimiser": r"aten::_fused_adamw_|Optimizer",
    "copies, gathers": r"aten::(copy_|cat|stack|gather|index.*|scatter.*|sort)$",
    "rest": ""}


def where_time_goes(run) -> dict[str, float]:
    """CPU seconds of a step by group of operators, on one thread, as their own times then add up."""
    torch.set_num_threads(1)
    for turn in range(2):                   # the first one warms up
        with profile() as record:
            run(turn)
    spent = dict.fromkeys(GROUPS, 0.0)
    for event in record.key_averages():
        group = next(name for name, pattern in GROUPS.items() if re.match(pattern, event.key))
        spent[group] += event.self_cpu_time_total / 1e6
    return spent


def benchmark_steps(rounds: int, picture: Path | None) -> None:
    """Both precisions of both, in turns. "as their better" compares with transformers in its faster precision."""
    chosen = start("base")
    print(f"pretrain.py chooses {chosen.precision}: {chosen.reason}")
    peak = {precision: matrix_peak(precision) for precision in PRECISIONS}
    print("GFLOP/s of a core, large products: " + ", ".join(f"{p} {value:.0f}" for p, value in peak.items()))
    rows, spent = [], []
    for step, (name, samples, _) in STEPS.items():
        rivals = {}
        for who, precision in product(RIVALS, PRECISIONS):
            rivals[who, precision] = dict(who=who, step=step, precision=precision, samples=samples,
                                          profiled=precision == chosen.precision)
        measured = in_turns(rivals, rounds)
        for precision in PRECISIONS:
            row = [f"{samples} x {name}, {precision}{', chosen' * (precision == chosen.precision)}", processor()]
            ours, same = (measured[who, precision] for who in RIVALS)
            for m in (ours, same):
                share = m["gflop"] / m["cpu"] / peak[precision]
                row += [f"{m['seconds']:.2f} ({m['cpu']:.2f})", f"{share:.0%}", f"{m['peak']:.0f}"]
            better = min((measured["transformers", p] for p in PRECISIONS), key=lambda m: m["cpu"])
            for theirs in (same, better):
                row.append(f"{theirs['seconds'] / ours['seconds']:.2f} ({theirs['cpu'] / ours['cpu']:.2f})")
            rows.append([*row, f"{ours['peak'] / same['peak']:.2f}"])
        for who in RIVALS:
            spent.append([f"{samples} x {name}, {who}", *measured[who, chosen.precision]["spent"].values()])
    columns = ["a step of ViT-B", "processor", "ours, s (CPU s)", "of the peak", "MiB", "theirs, s (CPU s)",
               "of the peak", "MiB", "times as fast", "as their better", "MiB / theirs"]
    print("\n" + markdown(columns, rows))
    spent.insert(0, [f"CPU s of a {chosen.precision} step on one thread", *GROUPS])
    print("\n" + markdown(spent[0], spent[1:]))
    if picture:
        most = max(max(row[1:]) for row in spent[1:])
        picture.write_text(grid(spent, high=most), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------- experts

def loop_over_experts(module: MoAE, x: torch.Tensor) -> torch.Tensor:
    """The same layer as the released one computes it, with a gather and a scatter for each expert, but that there an
    expert has room for N k / n tokens and loses the others."""
    weights, chosen = (part.flatten(0, 1) for part in module.router(x))     # (B N, k) each
    tokens = x.flatten(0, 1)
    mixed = tokens.clone()                                                  # the residual
    for i, expert in enumerate(module.experts):
        row, place = torch.where(chosen == i)
        weighted = expert(tokens[row]) * weights[row, place, None]
        mixed = mixed.index_add(0, row, weighted.to(mixed.dtype))
    return mixed.view_as(x)


def benchmark_experts(rounds: int) -> None:
    rows = []
    for batch, tokens, size in ((4, 800, "base"), (16, 144, "tiny")):
        device = start(size, "fp32").device.type    # with this size's number of threads
        width = SIZES[size].width
        module = MoAE(width, width // 4).to(device)
        x = torch.randn(batch, tokens, width, device=device, requires_grad=True)

        def run(layer, dtype: torch.dtype, turn: int) -> None:
            torch.manual_seed(turn)         # tokens choose anew in every turn
            with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
                out = layer(x)
            out.sum().backward()
            module.zero_grad()
            torch.get_device_module(device).synchronize()
        rivals = {}
        for precision, dtype in PRECISIONS.items():
            rivals["ours", precision] = partial(run, module, dtype)
            rivals["loop", precision] = partial(run, partial(loop_over_experts, module), dtype)
        measured = measure(rivals, rounds)
        for precision in PRECISIONS:
            ours, loop = measured["ours", precision][1], measured["loop", precision][1]
            name = f"{batch * tokens} tokens of width {width}, {precision}"
            rows.append([name, f"{ours:.4f}", f"{loop:.4f}", f"{loop / ours:.2f}"])
    print("\n" + markdown(["the expert layer", "ours, s", "loop over experts, s", "times as fast"], rows))


# ----------------------------------------------------------------------------------------------- growth, processes

def benchmark_growth(rounds: int) -> None:
    cases = [("finetune", dict(samples=2, experts=2)), ("finetune", dict(samples=2, experts=32))]
    for step in ("clips", "finetune"):
        cases += [(step, dict(samples=samples)) for samples in (1, 2, 4, 8)]
        cases += [(step, dict(samples=2, frames=frames)) for frames in (8, 32)]
    chosen = start("base").precision
    columns = ["clips", "folders listed, s", "list read, s", "labels read, files checked, s", "fingerprint, s",
               "epoch scheduled, s", "peak MiB"]
    print("\n" + markdown(columns, [list_clips(10 ** digits) for digits in (1, 3, 5, 6)]))
    rows = []
    for step, settings in cases:
        m = in_turns({"": dict(who="ours", step=step, precision=chosen, **settings)}, rounds)[""]
        case = ", ".join(f"{value} {name}" for name, value in settings.items())
        rows.append([f"{STEPS[step][0]}: {case}", f"{m['seconds']:.2f}", f"{m['cpu']:.2f}", f"{m['peak']:.0f}"])
    print("\n" + markdown([f"a step of ViT-B in {chosen}", "s", "CPU s", "peak MiB"], rows))


def list_clips(clips: int) -> list[str]:
    """Lay so many empty files out as VoxCeleb2 does, list them with labels too, and start on them."""
    with tempfile.TemporaryDirectory() as folder:
        lines = ["path,label"]
        for i in range(clips):
            video = f"VoxCeleb2/dev/mp4/id{i // 800:05d}/{i // 8:011d}"     # 8 clips each
            if i % 8 == 0:
                os.makedirs(f"{folder}/{video}")
            Path(f"{folder}/{video}/{i % 8:05d}.mp4").touch()
            lines.append(f"{video}/{i % 8:05d}.mp4,{i % 7}")
        Path(folder, "train.csv").write_text("\n".join(lines), encoding="utf-8")
        *seconds, peak = json.loads(subprocess.check_output([sys.executable, __file__, "listing", folder]))
    return [f"{clips:,}", *(f"{value:.3f}" for value in seconds), f"{peak:.0f}"]


def listing(folder: str) -> None:
    """In this fresh process: what a start on the files of `list_clips` takes, as JSON. None can be decoded."""
    before = largest_resident_set()
    videos = partial(data.load_samples, "voxceleb2", Path(folder), "train")
    samples = data.load_samples(f"{folder}/train.csv", Path(folder), "train")
    sources = {"video": data.Source(samples, 384, 192, repeats=4)}
    labelled = partial(data.load_samples, samples.name, Path(folder), "train")
    schedule = partial(data.schedule_epoch, sources, 0, 0)
    found = []
    for run in (videos, videos, labelled, samples.fingerprint, schedule):   # the first one writes a list
        found.append(timed(lambda turn: run(), 0)[1])
    print(json.dumps([*found, largest_resident_set() - before]))


def benchmark_processes() -> None:
    """The real command at one batch of two micro-batches; the second epoch, in which nothing starts up."""
    with tempfile.TemporaryDirectory() as folder:
        write_faces(Path(folder, "data/synthetic"), scale=0.1)
        for processes in (1, 2):
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            options = ["--dataset", "synthetic", "--epochs", "2", "--micro-batch", "8", "--output", f"{processes}"]
            subprocess.run([*launcher, ROOT / "pretrain.py", *options], cwd=folder, check=True, capture_output=True)
            _, epoch = Path(folder, f"{processes}/log.jsonl").read_text(encoding="utf-8").splitlines()
            print(f"an epoch of pretrain.py, size tiny, {processes} processes: {json.loads(epoch)['seconds']} s")


# -------------------------------------------------------------------------------------------------------------- GPU

def benchmark_gpu(size: str, rounds: int) -> None:
    """bf16 steps at the paper's batch, with and without compiled layers, then the expert layer."""
    device = start(size, "bf16").device.type
    if device == "cpu" and size != "tiny":
        sys.exit("error: there is no GPU here (--size tiny tries the command itself)")
    peak = matrix_peak("bf16", device)
    print(f"matrix peak: {peak:.0f} bf16 GFLOP/s")
    rows, gflop = [], None
    for step, (name, _, samples) in STEPS.items():
        for who, compiled in (("ours", False), ("ours", True), ("transformers", False)):
            settings = dict(who=who, step=step, precision="bf16", size=size, samples=samples, compiled=compiled)
            m = in_turns({"": settings}, rounds)[""]
            gflop = m.get("gflop", gflop)   # a compiled step's cannot be counted: as before
            rows.append([f"{name}, {who}{', compiled' * compiled}", samples, f"{samples / m['seconds']:.1f}",
                         f"{gflop / m['seconds'] / peak:.0%}", f"{m['peak']:.0f}"])
    print("\n" + markdown(["a step in bf16", "samples at once", "per second", "of the peak", "peak MiB"], rows))
    benchmark_experts(4 * rounds)


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
        kwargs = kwargs or {}
        name = operator._overloadpacket.__name__
        there = {id(x.host): x for x in tree_leaves((args, kwargs)) if isinstance(x, OnGpu)}
        device = kwargs.get("device")
        if not there and device != GPU:
            return operator(*args, **kwargs)
        up = name == "_to_copy" and not there
        down = device not in (None, GPU) or name == "_local_scalar_dense"
        sized_by_data = torch.Tag.dynamic_output_shape in operator.tags and name != "index"  # that only by a mask
        if down or sized_by_data or up and not kwargs.get("non_blocking"):
            files = [frame for frame in traceback.extract_stack() if Path(frame.filename).parent == ROOT]
            self.waits[f"{Path(files[-1].filename).name}:{files[-1].lineno}"] += 1
        is_view = any(r.alias_info and not r.alias_info.is_write for r in operator._schema.returns)
        self.kernels += not (up or down or is_view or name in NO_KERNEL)

        def to_gpu(x):
            if not isinstance(x, torch.Tensor):
                return x
            return there[id(x)] if id(x) in there else OnGpu(x)

        args, kwargs = tree_map(lambda x: x.host if isinstance(x, OnGpu) else x, (args, kwargs))
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        out = operator(*args, **kwargs)
        return out if down else tree_map(to_gpu, out)


def training_step(process: Process, objective, name: str):
    """A function that lets `train` do a step of two micro-batches of a modality."""
    model = objective.model
    samples = data.Samples("", name, CLASSES, ROOT, np.full(4, b""), np.zeros(4, np.int64))
    sources = {name: data.Source(samples, batch=4, micro=2)}
    drawn = Mock(sources=sources, batch=[random_batch(name, 2, model.size), torch.zeros(2).long(), []])
    args = Mock(seed=0, epochs=1, workers=0, compile=None, clip_grad=None)
    folder = Mock(**{"load.return_value": None, "due.return_value": False})
    optimizer = torch.optim.AdamW(decayed(model.named_parameters(), 0.05), fused=True)
    return partial(train, process, args, folder, model, objective, optimizer, Rate(1e-4, 0, 1, 0, 0), drawn)


def evaluate_batch(process: Process, model: S4D) -> None:
    samples = data.Samples("counting", "image", CLASSES, ROOT, np.full(2, b""), np.zeros(2, np.int64))
    views = random_batch("image", 2, model.size)[:, None]
    with patch("evaluate.loader", lambda *_, batch_sampler: ([index, views, None] for index in batch_sampler)):
        observe(model, data.TestData(samples, model.size), process, 0)


def benchmark_count(size: str) -> None:
    """Each is done twice, in bf16, and counted the second time, when no constant and no moment is new."""
    make_tensor = torch.tensor
    tensor = lambda *values, device="cpu", **options: make_tensor(*values, **options).to(device)  # noqa: E731
    loader = lambda drawn, *_, sampler, **options: ([micro, *drawn.batch] for micro in sampler)  # noqa: E731
    process = Process(0, 1, GPU, "bf16")
    rows = []
    with (Asked() as asked, patch("torch.tensor", tensor), patch("pretrain.loader", loader),
          patch("model.attend", torch.nn.functional.scaled_dot_product_attention),
          patch("torch.nn.utils.clip_grad._has_foreach_support", lambda *_: True)):
        with GPU:
            autoencoder, model = MaskedAutoencoder(size), S4D(size, CLASSES, CLASSES)
        runs = {
            "stage 1, two micro-batches": training_step(process, ReconstructionLoss(autoencoder, MASK_RATIO), "video"),
            "stage 2, two micro-batches": training_step(process, JointLoss(model, mixing=1.0), "image"),
            "evaluation of a batch": partial(evaluate_batch, process, model)}
        for what, run in runs.items():
            run()
            asked.kernels = 0
            asked.waits.clear()
            run()
            rows.append([what, asked.waits.total(), asked.kernels, ", ".join(asked.waits.elements())])
    print("\n" + markdown([f"size {size}", "waits", "kernels", "where the host waits"], rows))


def main() -> None:
    if sys.argv[1:2] == ["one"]:
        return one(**json.loads(sys.argv[2]))
    if sys.argv[1:2] == ["listing"]:
        return listing(sys.argv[2])
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("part", choices=["steps", "experts", "growth", "processes", "count", "gpu"])
    p.add_argument("--rounds", type=int, default=5, help="measured turns of each rival")
    p.add_argument("--picture", type=Path, help="an .svg of where the time goes (steps)")
    p.add_argument("--size", default="base", choices=list(SIZES), help="of the model (count, gpu)")
    args = p.parse_args()
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    parts = dict(steps=partial(benchmark_steps, args.rounds, args.picture), processes=benchmark_processes,
                 experts=partial(benchmark_experts, 4 * args.rounds), growth=partial(benchmark_growth, args.rounds),
                 count=partial(benchmark_count, args.size), gpu=partial(benchmark_gpu, args.size, args.rounds))
    parts[args.part]()


if __name__ == "__main__":
    main()
