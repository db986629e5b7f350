"""Stage 1: one encoder-decoder is pre-trained as a masked autoencoder on face images and face videos together.

    torchrun pretrain.py                          VoxCeleb2 clips and AffectNet-8 images, the paper's settings
    python pretrain.py --dataset synthetic        the same on synthetic faces and a tiny model, in minutes on a CPU

`main` is the stage; `train` below it is the loop of both stages, and the rest is what they share: processes,
learning rate, checkpoints. One process or many, on one kind of device, give the same losses up to summation order:
an optimiser step is a fixed list of micro-batches, dealt to the processes (data.py), each with a seed of its own.

x: a micro-batch of B images uint8 (B, 3, H, W), or of B clips of T frames uint8 (B, T, 3, H, W)
"""
import argparse
import contextlib
import ctypes
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import textwrap
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (DataError, Samples, Schedule, Source, TrainingData, dataset_name, ensure_synthetic, is_synthetic,
                  load_samples, loader, short_name, to_float)
from model import (MASK_RATIO, SIZES, CheckpointError, DamagedError, Layer, MaskedAutoencoder, SettingError,
                   load_weights, masked_tokens, modality, read_checkpoint)

# With --size tiny, the default on synthetic faces: what learns in minutes on two cores.
TINY = dict(epochs=20, batch_size=16, lr=0.024)


def settings() -> argparse.ArgumentParser:
    """Every setting of stage 1; the defaults are the paper's (Section IV-B)."""
    p = common_settings(__doc__, TINY, "Table IV: images only --dataset none --image-mask-ratio 0.75; videos only "
                        "--image-dataset none --video-mask-ratio 0.9; both (the default); videos and their frames "
                        "--image-dataset frames --image-share 0.263. Fig. 3c: --image-share.")
    p.add_argument("--dataset", default="voxceleb2", type=dataset_name("video", others=("none",)),
                   help="videos, or none")
    p.add_argument("--image-dataset", type=dataset_name("image", others=("none", "frames")),
                   help="images; frames = one of each video; or none (affectnet-8, or synthetic-images)")
    p.add_argument("--epochs", type=int, default=100, help="each draws as many samples as the data have")
    p.add_argument("--batch-size", type=int, default=384, help="images or clips of one optimiser step, all processes")
    p.add_argument("--lr", type=float, default=1.6e-3, help="base learning rate, for 512 samples a step")
    p.add_argument("--warmup", type=float, default=0.05, help="share of all steps in which the learning rate rises")
    p.add_argument("--weight-decay", type=float, default=0.05, help="of weight matrices; biases and norms have none")
    p.add_argument("--video-mask-ratio", type=float, default=MASK_RATIO["video"], help="of a clip's tokens")
    p.add_argument("--image-mask-ratio", type=float, default=MASK_RATIO["image"], help="of an image's tokens")
    p.add_argument("--image-share", type=float, default=1.0, help="share of the images that an epoch sees")
    p.add_argument("--repeats", type=int, default=4, help="crops of each clip that is read, so that an epoch reads "
                   "one clip in so many")
    return p


def common_settings(description: str, tiny: dict, systems: str) -> argparse.ArgumentParser:
    """The settings that both stages have under the same names and with the same defaults."""
    changed = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in tiny.items())
    p = argparse.ArgumentParser(description=description, formatter_class=Formatter,
                                epilog="\n".join(textwrap.wrap(f"Systems of the paper: {systems}", 110)
                                                 + [f"With --size tiny the defaults are {changed}"]))
    p.add_argument("--data-root", type=Path, default=Path("data"), help="folder of all data sets (layouts: README)")
    p.add_argument("--fold", type=int, default=1, help="cross-validation fold, counted from 1")
    p.add_argument("--stride", type=int, help="of the frames of a clip (the data set's, in the README's table)")
    p.add_argument("--size", choices=list(SIZES), help="of the model (base, or tiny on synthetic faces)")
    p.add_argument("--micro-batch", type=int, help="samples (in stage 2 clips, and images in proportion) that one "
                   "process computes at once; a batch is gathered from as many as it takes (half a batch)")
    p.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    p.add_argument("--workers", type=int, default=default_workers(), help="loading processes per process")
    p.add_argument("--clip-grad", type=float, help="clip the gradient to this norm (no clipping)")
    p.add_argument("--compile", nargs="?", const="inductor", choices=["inductor", "aot_eager"],
                   help="compile the layers by torch.compile: a minute, and a C++ compiler (aot_eager: without one)")
    p.add_argument("--output", type=Path, help="the run's folder (runs/..., named after the data)")
    p.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in the run's "
                   "folder; if there is none yet, begin, so that the same command can simply be started again")
    p.add_argument("--save-minutes", type=float, default=10, help="time between checkpoints within an epoch")
    return p


def default_workers() -> int:
    return min(8, max(1, (os.cpu_count() or 1) // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the description as it was written, and the defaults that the help text does not tell in words."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def parse(p: argparse.ArgumentParser, tiny: dict, argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; the tiny size, which is the default on synthetic faces, brings defaults of its own."""
    args, _ = p.parse_known_args(argv)
    if args.size is None:
        p.set_defaults(size="tiny" if is_synthetic(args.dataset) else "base")
    if (args.size or p.get_default("size")) == "tiny":
        p.set_defaults(**tiny)
    args = p.parse_args(argv)
    for options, fits, expected in (
            (("epochs", "batch_size", "micro_batch", "repeats", "image_batch_size", "experts", "k", "adapter_width"),
             lambda value: value >= 1, "1 or more"),
            (("workers", "lr", "seed", "weight_decay", "warmup_epochs", "layer_decay", "balance", "sigma",
              "save_minutes"), lambda value: 0 <= value < math.inf, "0 or more"),
            (("video_mask_ratio", "image_mask_ratio", "validation", "label_smoothing"),
             lambda value: 0 <= value < 1, "0 to below 1"),
            (("mixing", "warmup"), lambda value: 0 <= value <= 1, "0 to 1"),
            (("clip_grad",), lambda value: value > 0, "more than 0"),
            (("image_share",), lambda value: value > 0, "more than 0 (--image-dataset none leaves images out)")):
        for name in options:
            value = getattr(args, name, None)
            if value is not None and not fits(value):
                p.error(f"--{name.replace('_', '-')} {value}: expected {expected}")
    return args


def main() -> None:
    args = parse(settings(), TINY)
    run = start(args.size)
    args.output = args.output or Path("runs") / f"pretrain-{short_name(args.dataset)}"
    args.videos = {"synthetic": "synthetic-unlabelled"}.get(args.dataset, args.dataset)
    args.images = args.image_dataset or ("synthetic-images" if is_synthetic(args.dataset) else "affectnet-8")
    sources = load_sources(args, run)
    folder = RunFolder(args, "pretrain", sources)

    torch.manual_seed(args.seed)
    model = MaskedAutoencoder(args.size).to(run.device)
    module = ReconstructionLoss(model, {"image": args.image_mask_ratio, "video": args.video_mask_ratio})
    lr = args.lr * args.batch_size / 512
    optimizer = torch.optim.AdamW(decayed(model.named_parameters(), args.weight_decay), lr, betas=(0.9, 0.95),
                                  fused=True)
    schedule = Schedule(sources, args.seed, args.epochs, run.rank, run.world)
    steps = args.epochs * schedule.steps_per_epoch()
    masked = {name: masked_tokens(getattr(model.size, f"{name}_tokens"), module.ratios[name]) for name in sources}
    describe(run, args, model, sources, steps, lr, f"masked tokens of a sample: {masked}")
    rate = Rate(lr, int(args.warmup * steps), steps, first=1e-6, end=0.0)
    train(run, args, folder, model, module, optimizer, rate, schedule,
          TrainingData(sources, "pretrain", model.size))


def load_sources(args, run) -> dict[str, Source]:
    """The training data by modality."""
    if args.videos == args.images == "none":
        raise DataError("--dataset none and --image-dataset none leave nothing to train on")
    if args.videos == "none" and args.images == "frames":
        raise DataError("--image-dataset frames takes frames of --dataset, which is none")
    ensure_synthetic([args.videos, args.images], args.data_root, run)
    micro, sources = args.micro_batch or -(-args.batch_size // 2), {}
    if args.videos != "none":
        if args.batch_size % args.repeats or micro % args.repeats:
            raise DataError(f"--repeats {args.repeats} must divide --batch-size {args.batch_size} and the micro-batch "
                            f"{micro}: a micro-batch holds all samples of a decoded clip")
        sources["video"] = Source(load_samples(args.videos, args.data_root, "train", args.fold, args.stride),
                                  args.batch_size, micro, repeats=args.repeats)
    if args.images != "none":
        name, fold = (args.videos, args.fold) if args.images == "frames" else (args.images, 1)
        samples = load_samples(name, args.data_root, "train", fold)
        if args.images == "frames":
            samples = replace(samples, dataset=replace(samples.dataset, modality="image"), frames_as_images=True)
        sources["image"] = Source(samples, args.batch_size, micro, share=args.image_share)
    return sources


class ReconstructionLoss(nn.Module):
    """Masks of one modality's ratio and Eq. (2), as the module that DDP wraps."""

    def __init__(self, model: MaskedAutoencoder, ratios: dict[str, float]):
        super().__init__()
        self.model, self.ratios = model, ratios

    def forward(self, x: torch.Tensor, labels: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
        x = to_float(x)
        loss, _, _ = self.model(x, mask_ratio=self.ratios[modality(x)])
        return weight * loss


# ------------------------------------------------------------------------------------------- the loop of both stages

def train(run, args, folder, model, module, optimizer, rate, schedule, data, end_of_epoch=dict, tallies=None) -> None:
    """Train `model` through `module`, which maps (x uint8, labels, weight) to a scalar loss times the weight.

    After every epoch, end_of_epoch() gives scores; a JSON line goes to log.jsonl and a checkpoint to last.pt.
    tallies: tensors that the module adds up during an epoch, which a run that is continued must not lose.
    """
    tallies = tallies or {}
    progress = folder.begin(run, model, optimizer, tallies)
    per_epoch = rate.steps // args.epochs
    schedule.start = progress["epoch"], progress["step"]
    batches = iter(loader(data, args.workers, batch_size=None, sampler=schedule))
    if args.compile:
        compile_layers(model, args.compile)
    # The buffers are tables of positions, which never change.
    wrapped = DistributedDataParallel(module, broadcast_buffers=False) if run.world > 1 else module
    unreadable = Unreadable(data.sources, progress["unreadable"])

    def save(record: dict | None = None) -> None:
        unreadable.share(run)
        run.to_first(tallies)
        if run.main:
            folder.save(model, optimizer, progress | {"unreadable": unreadable.files, "tallies": tallies}, record)

    bar = tqdm(total=rate.steps, initial=progress["epoch"] * per_epoch + progress["step"], disable=not run.main,
               unit="step")
    for epoch in range(progress["epoch"], args.epochs):
        bar.set_description(f"{folder.stage} epoch {epoch + 1}/{args.epochs}")
        module.train()
        with run.finishing_first():         # a signal waits for the end of the step and the checkpoint
            while progress["step"] < per_epoch:
                step = epoch * per_epoch + progress["step"]
                for group in optimizer.param_groups:
                    group["lr"] = rate(step) * group.get("scale", 1.0)
                done = optimise(run, wrapped, batches, optimizer, unreadable, step, args.clip_grad,
                                run.main and folder.overdue())  # the first process writes, so its clock counts
                progress["step"] += 1
                progress["losses"].append((done.source, float(f"{done.loss:.6g}")))
                progress["seconds"] += done.seconds
                progress["data_seconds"] += done.data_seconds
                bar.update()
                bar.set_postfix(refresh=False, loss=f"{done.loss:.4f}", lr=f"{rate(step):.2e}", norm=f"{done.norm:.2g}",
                                data=f"{done.data_seconds:.3f}s", step=f"{done.seconds:.3f}s")
                if done.stop:
                    break
                if done.save:
                    save()
            save()                          # at a signal; and before evaluation, which takes long and may fail
        record = dict(epoch=epoch + 1, step=(epoch + 1) * per_epoch, lr=rate((epoch + 1) * per_epoch - 1),
                      **summary(progress, data.sources), unreadable=len(unreadable.files), **end_of_epoch())
        progress |= dict(new_epoch(), epoch=epoch + 1)
        if "score" in record and (progress["best"] is None or record["score"] > progress["best"]["score"]):
            progress["best"] = {k: v for k, v in record.items() if k != "losses"}
        with run.finishing_first():
            save(record)
    bar.close()


def summary(progress: dict, sources: dict[str, Source]) -> dict:
    """What the log says of an epoch's steps."""
    losses = {name: [loss for source, loss in progress["losses"] if source == name] for name in sources}
    return dict(losses=progress["losses"], loss={name: sum(values) / len(values) if values else None
                                                 for name, values in losses.items()},
                seconds=round(progress["seconds"], 2), data_seconds=round(progress["data_seconds"], 2))


class Done(NamedTuple):
    """An optimiser step that was made."""
    source: str
    loss: float
    norm: float                             # of the gradient, before clipping
    seconds: float
    data_seconds: float                     # of it, waiting for data
    save: bool                              # whether a checkpoint is due
    stop: bool                              # whether any process has received a signal to end


def optimise(run, wrapped, batches, optimizer, unreadable, step: int, clip: float | None, save: bool) -> Done:
    """One optimiser step over this process's micro-batches. Exits, with the weights as they were, if the loss or the
    gradient is not finite."""
    began = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    total, waited, last, files = torch.zeros((), device=run.device), 0.0, False, []
    while not last:
        asked = time.perf_counter()
        micro, x, labels, errors = next(batches)
        waited += time.perf_counter() - asked
        unreadable.add(micro.source, errors)
        last = micro.last
        files += [str(unreadable.sources[micro.source].samples.path(i)) for i in micro.index]
        torch.manual_seed(micro.seed)       # masks, mixing and gate noise depend on the micro-batch, not the process
        synchronise = contextlib.nullcontext() if last or run.world == 1 else wrapped.no_sync()
        with synchronise:
            with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
                loss = wrapped(x.to(run.device, non_blocking=True), labels.to(run.device, non_blocking=True),
                               micro.weight)
            (loss * run.world).backward()   # DDP averages over the processes; the step's loss is a sum of shares
        total += loss.detach()
    # Beside the loss, what all processes must agree on.
    loss, save, stop = run.sum(torch.stack([total, total.new_tensor(save), total.new_tensor(run.signal > 0)])).tolist()
    if stop:
        run.signal = run.signal or signal.SIGTERM
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise NotFinite(f"the loss became {loss} and its gradient's norm {norm:.6g} at step {step}, epoch "
                        f"{micro.epoch + 1}, a batch of {micro.source}s: stopped before the weights change; the last "
                        f"checkpoint is from before. This process's files of the batch: {', '.join(files)}")
    if clip:
        nn.utils.clip_grads_with_norm_([p for group in optimizer.param_groups for p in group["params"]], clip, norm)
    optimizer.step()
    return Done(micro.source, loss, norm.item(), time.perf_counter() - began, waited, save > 0, stop > 0)


class NotFinite(Exception):
    """A loss or a gradient that is not finite; the message names the step, the batch and its files."""


class Unreadable:
    """Samples that training left out: named once each, and an error beyond 1 % of their data set."""

    def __init__(self, sources: dict[str, Source], files: dict[str, str]):
        self.sources, self.files = sources, dict(files)  # error: source

    def add(self, source: str, errors: list[str]) -> None:
        for error in errors:
            if error not in self.files:
                tqdm.write(f"left out: {error}", file=sys.stderr)
            self.files[error] = source
        if errors:
            self.check()

    def share(self, run) -> None:
        """Before a checkpoint every process learns what the others left out."""
        if run.world > 1:
            everyone = [None] * run.world
            dist.all_gather_object(everyone, self.files)
            self.files = {error: source for files in everyone for error, source in files.items()}
        self.check()

    def check(self) -> None:
        for source, drawn in self.sources.items():
            errors = [error for error, name in self.files.items() if name == source]
            if len(errors) > 0.01 * len(drawn.samples):
                raise DataError(f"{len(errors)} of {len(drawn.samples)} {source}s cannot be read, more than 1 %; the "
                                f"last: {errors[-1]}")


@dataclass
class Rate:
    """Learning rate of a step: linear from `first` to `peak` in `warmup` steps, then a cosine to `end`."""
    peak: float
    warmup: int
    steps: int
    first: float
    end: float

    def __call__(self, step: int) -> float:
        if step < self.warmup:                                              # 1) linear warm-up
            return self.first + (self.peak - self.first) * step / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)      # 2) cosine decay
        return self.end + (self.peak - self.end) * 0.5 * (1 + math.cos(math.pi * done))


def decayed(named_parameters, weight_decay: float, scale=lambda name: 1.0) -> list[dict]:
    """Optimiser groups: no weight decay on vectors (biases, norms); scale(name) multiplies the learning rate."""
    groups = {}
    for name, parameter in named_parameters:
        key = (scale(name), weight_decay if parameter.squeeze().ndim > 1 else 0.0)
        groups.setdefault(key, []).append(parameter)
    return [dict(params=parameters, scale=s, weight_decay=decay) for (s, decay), parameters in groups.items()]


# --------------------------------------------------------------------------------------------- processes and devices

@dataclass
class Run:
    """This process among the others, its device, and the precision that its matrix units are fast in."""
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype
    signal: int = 0                         # SIGTERM or SIGINT, once it was received
    patient: bool = False                   # whether a signal waits

    @property
    def main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def to_first(self, tensors: dict[str, torch.Tensor]) -> None:
        """Move everybody's share of each sum to the first process."""
        for name in sorted(tensors):
            self.sum(tensors[name])
            if not self.main:
                tensors[name].zero_()

    def receive(self, signal_number: int, frame) -> None:
        """Leave with the signal's own exit status, at once or at the end of finishing_first()."""
        self.signal = signal_number
        if not self.patient:
            sys.exit(128 + signal_number)

    @contextlib.contextmanager
    def finishing_first(self):
        """A signal waits for the end of this block."""
        self.patient = True
        yield
        self.patient = False
        if self.signal:
            sys.exit(128 + self.signal)


def start(size: str = "base") -> Run:
    """Join the processes that torchrun started, or be the only one."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
        if size == "tiny":
            torch.set_num_threads(1)        # its products are too small to share, and loading needs the other cores
    if world > 1:
        # A prefix of its own for every restart: torchrun's store still holds the addresses of those who died.
        store, _, _ = next(dist.rendezvous("env://", rank, world))
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world,
                                device_id=device if device.type == "cuda" else None)
    run = Run(rank, world, device, precision(device))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, run.receive)
    return run


def compile_layers(model: nn.Module, backend: str) -> None:
    """torch.compile each layer by itself: together they are most of the work, and of few shapes."""
    torch._dynamo.config.optimize_ddp = False  # would cut layers where DDP's buckets end: they are pieces enough
    for layer in (part for part in model.modules() if isinstance(part, Layer)):
        layer.compile(backend=backend)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: getting it back from the system, page by page, took up to a third of a CPU step."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, -1)                # M_TRIM_THRESHOLD: never shrink the heap
        libc.mallopt(-4, 0)                 # M_MMAP_MAX: no mapping of its own for a large block


def precision(device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies matrices in it (CPU units included), else fp32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        units = getattr(torch.cpu, "get_capabilities", dict)()
        fast = units.get("amx_bf16", False) or units.get("avx512_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def guarded(main) -> None:
    """Run a script's main: an expected error becomes its message and exit status 1, without a traceback."""
    try:
        main()
    except (DataError, CheckpointError, SettingError, NotFinite) as error:
        text = str(error)                   # a loading process wraps it in its traceback, which ends in the message
        sys.exit(f"error: {text.rsplit('Error: ', 1)[-1].strip() if text.startswith('Caught ') else text}")
    except RuntimeError as error:           # what gloo and nccl say when another process is gone
        if not dist.is_initialized() or not re.search("by peer|NCCL|Connection|Broken pipe", str(error)):
            raise
        time.sleep(1)                       # let that process speak first
        sys.exit(f"error: process {dist.get_rank()} has lost the others: {str(error).splitlines()[0]}")
    if dist.is_initialized():
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------- the run's folder

FREE_TO_CHANGE = {"output", "resume", "workers", "data_root", "save_minutes", "compile"}


def new_epoch() -> dict:
    """What an epoch adds up while it runs, and a checkpoint within it keeps."""
    return dict(step=0, losses=[], seconds=0.0, data_seconds=0.0, tallies={})


class RunFolder:
    """What a run leaves in --output: log.jsonl, last.pt, previous.pt (the checkpoint before it) and best.pt.

    saved: with --resume the newest checkpoint that can be read, None if there is none yet. CheckpointError if it is of
    a run with other settings or other data, or if a new run would write over another one's.
    """

    def __init__(self, args, stage: str, sources: dict[str, Source], test: dict[str, Samples] | None = None):
        self.path, self.stage = args.output, stage
        self.settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        self.data = dict(train={name: source.samples.identity(digests=stage == "finetune")
                                for name, source in sources.items()},
                         test={name: samples.identity() for name, samples in (test or {}).items()})
        self.save_seconds, self.last_save = 60 * args.save_minutes, time.monotonic()
        files = [self.path / name for name in ("last.pt", "previous.pt") if (self.path / name).exists()]
        if files and not args.resume:
            raise CheckpointError(f"{files[0]} exists: give --resume to continue that run, another --output, or "
                                  "delete it")
        self.saved = self.newest(files)

    def newest(self, files: list[Path]) -> dict | None:
        """The first of the files that is whole; DamagedError of the last if none is."""
        for file in files:
            try:
                saved = read_checkpoint(file)
                self.check(saved, file)
                return saved
            except DamagedError as error:
                if file == files[-1]:
                    raise
                print(f"{error}\nso the checkpoint before it is taken", file=sys.stderr)
        return None

    def check(self, saved: dict, file: Path) -> None:
        """CheckpointError unless continuing this checkpoint gives what the run would have given."""
        lacking = {"optimizer", "settings", "progress", "data"} - saved.keys()
        if saved["stage"] != self.stage or lacking:
            raise CheckpointError(f"{file} is no checkpoint of {self.stage} to continue from: it is of {saved['stage']}"
                                  f"{' and lacks ' + ', '.join(sorted(lacking)) if lacking else ''}")
        old, new = saved["settings"], self.settings
        for name in sorted(new.keys() - FREE_TO_CHANGE):
            if new[name] != old.get(name):
                raise CheckpointError(f"{file} was trained with --{name.replace('_', '-')} {old.get(name)}, not "
                                      f"{new[name]}: that is another run")
        for part, name in [(part, name) for part in self.data for name in self.data[part]]:
            old, new = saved["data"][part].get(name, {}), self.data[part][name]
            if old.get("fingerprint") != new["fingerprint"]:
                raise CheckpointError(
                    f"{file} belongs to other data: its {name} {part} data were {old.get('samples')} samples, stride "
                    f"{old.get('stride')}, fingerprint {old.get('fingerprint')}; now they are {new['samples']}, stride "
                    f"{new['stride']}, {new['fingerprint']}")

    def begin(self, run: Run, model: nn.Module, optimizer, tallies: dict) -> dict:
        """Progress to start from: that of `saved`, whose weights and sums are restored, or of a new run.

        No random state is kept: all of it follows from the seed, the epoch, the step and the micro-batch's place.
        """
        log = self.path / "log.jsonl"
        if self.saved is None:
            run.barrier()                   # nobody may create files before everybody has looked for them
            if run.main:
                try:
                    self.path.mkdir(parents=True, exist_ok=True)
                    log.write_text("")
                except OSError as error:
                    raise CheckpointError(f"the run's folder {self.path} cannot be written: {error}") from error
            return dict(new_epoch(), epoch=0, best=None, unreadable={})
        saved, self.saved = self.saved, None
        progress = saved["progress"]
        load_weights(model, saved["model"], self.path)
        optimizer.load_state_dict(saved["optimizer"])
        if run.main:
            for name, value in progress["tallies"].items():
                tallies[name].copy_(value)
            lines = log.read_text().splitlines(keepends=True) if log.exists() else []
            log.write_text("".join(lines[:progress["epoch"]]))  # without an epoch that was logged but not saved
            print(f"resumed from {self.path} after epoch {progress['epoch']}, step {progress['step']} of the next")
            if len(lines) < progress["epoch"]:
                print(f"{log} holds {len(lines)} of {progress['epoch']} epochs; the others are lost")
            if saved["made_by"]["processes"] != run.world:
                print(f"{saved['made_by']['processes']} processes then, {run.world} now: the samples of every step, "
                      "their crops, masks and noise stay the same; sums are taken in another order, so last digits "
                      "may differ")
        return progress

    def overdue(self) -> bool:
        """Whether the last checkpoint was written so many minutes ago."""
        return time.monotonic() - self.last_save >= self.save_seconds

    def save(self, model: nn.Module, optimizer, progress: dict, record: dict | None) -> None:
        """last.pt; at the end of an epoch, `record`, also its line of the log, and best.pt if it is the best."""
        contents = dict(stage=self.stage, architecture=model.architecture, model=model.state_dict(),
                        settings=self.settings, data=self.data, progress=progress, made_by=made_by(),
                        scores={k: v for k, v in (record or {}).items() if k != "losses"})
        if record:
            with writing(self.path / "log.jsonl"), open(self.path / "log.jsonl", "a") as log:
                log.write(json.dumps(record) + "\n")
            if progress["best"] == contents["scores"]:
                write(self.path / "best.pt", contents)
        write(self.path / "last.pt", contents | {"optimizer": optimizer.state_dict()}, keep="previous.pt")
        self.last_save = time.monotonic()


def made_by() -> dict:
    """What a checkpoint's numbers may depend on beside settings and data."""
    return dict(command=shlex.join(sys.argv), python=platform.python_version(), torch=str(torch.__version__),
                torchvision=torchvision.__version__, av=av.__version__, numpy=np.__version__,
                processes=dist.get_world_size() if dist.is_initialized() else 1, machine=platform.platform(),
                device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def writing(path: Path):
    """CheckpointError that says why a file cannot be written."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch reports a full disk as either
        free = shutil.disk_usage(path.parent).free / 1e6
        raise CheckpointError(f"{path} cannot be written: {error} ({free:.0f} MB are free on its disk). Checkpoints "
                              "written before are as they were: make room and go on with --resume") from error


def write(path: Path, contents: dict, keep: str | None = None) -> None:
    """A file that is there whole or not at all: written beside its place, flushed to disk, then renamed. The file that
    was in its place stays under the name `keep`."""
    temporary = path.with_name(path.name + ".part")
    try:
        with writing(path), open(temporary, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
    except CheckpointError:
        temporary.unlink(missing_ok=True)
        raise
    if keep and path.exists():
        os.replace(path, path.with_name(keep))  # killed between the two, the run goes on from `keep`
    os.replace(temporary, path)


def describe(run: Run, args, model: nn.Module, sources: dict[str, Source], steps: int, lr: float, more: str) -> None:
    """Print what follows from the settings: once, before any work."""
    if not run.main:
        return
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.size} model, {parameters / 1e6:.2f} M parameters; {run.world} process{'es' if run.world > 1 else ''} "
          f"on {run.device.type}, {str(run.dtype).removeprefix('torch.')}")
    for name, source in sources.items():
        samples = source.samples
        print(f"{name}s: {len(samples)} of {samples.name} in {samples.root}, stride {samples.stride}; a step takes "
              f"{source.batch} in micro-batches of {source.micro}")
        for note in samples.notes:
            print(f"  {note}")
        micros = -(-source.batch // source.micro)
        if micros < run.world:
            fit = args.batch_size // run.world // source.repeats * source.repeats
            print(f"  {run.world} processes share {micros} micro-batches: some idle; give --micro-batch "
                  f"{max(source.repeats, fit)} or less")
    print(f"{args.epochs} epochs of {steps // args.epochs} steps, peak learning rate {lr:.3g}\n{more}\n"
          f"writing to {args.output}", flush=True)


if __name__ == "__main__":
    guarded(main)
