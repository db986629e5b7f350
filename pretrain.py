"""Stage 1: one encoder-decoder is pre-trained as a masked autoencoder on face images and clips.

    torchrun pretrain.py                          VoxCeleb2 and AffectNet-8, the paper's settings
    python pretrain.py --dataset synthetic        drawn faces and a tiny model, minutes on a CPU

First comes what is stage 1: its settings, `main`, and Eq. (2) as the `objective`. Then `train`, the
loop of both stages, and below the line of '=' what they share, to be skipped at first. One process
or many give the same losses up to the order of summation: an optimiser step is a fixed list of
micro-batches, dealt to the processes (data.py), each with a seed of its own.

x: a micro-batch of B images (B, 3, H, W), or of B clips of T frames (B, 3, T, H, W), normalised
"""
import argparse
import ctypes
import hashlib
import json
import math
import multiprocessing
import os
import platform
import shlex
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (Samples, Source, TrainingData, dataset_name, deal, frame_rate, load_samples,
                  loader, schedule_epoch, short_name, to_float)
from model import (MASK_RATIO, SIZES, Layer, MaskedAutoencoder, UserError, load_weights,
                   masked_tokens, modality, read_checkpoint, whole_file)

# With --size tiny, the default on drawn faces: what learns in minutes on two cores. Its few tokens
# are masked less, so that as many stay visible as the paper's ratios leave: 10 of an image's 36
# tokens (the paper's: 10 of 100), and about 5 in each time slot of a clip.
TINY = dict(epochs=20, batch_size=16, micro_batch=16, lr=0.024, image_mask_ratio=0.73,
            video_mask_ratio=0.862)


def settings() -> argparse.ArgumentParser:
    """Every setting of stage 1. Defaults: the paper's (Section IV-B), else the released code's."""
    p = common_settings(__doc__, TINY)
    add = p.add_argument
    add("--dataset", default="voxceleb2", type=dataset_name, help="videos, or none")
    add("--image-dataset", type=dataset_name,
        help="images, none, or frames: one of each video (affectnet-8, or synthetic-images)")
    add("--epochs", type=count, default=100, help="each draws as many samples as the data have")
    add("--batch-size", type=count, default=384, help="samples of a step, over all processes")
    add("--lr", type=positive, default=1.6e-3, help="base learning rate, for 512 samples a step")
    add("--warmup", type=share, default=0.05, help="share of steps in which the rate rises")
    for m in ("video", "image"):
        add(f"--{m}-mask-ratio", type=share, default=MASK_RATIO[m], help="share of hidden tokens")
    add("--image-share", type=positive, default=1.0, help="share of the images that an epoch sees")
    add("--repeats", type=count, default=4, help="crops of each clip; an epoch reads 1 in so many")
    return p


def main() -> None:
    args = parse(settings(), TINY)
    args.output = args.output or Path("runs") / f"pretrain-{short_name(args.dataset)}"
    drawn = args.dataset.startswith("synthetic")
    if drawn:                               # to stage 1 that is its unlabelled videos
        args.dataset = "synthetic-unlabelled"
    if args.image_dataset is None:
        args.image_dataset = "synthetic-images" if drawn else "affectnet-8"
    process = start(args.size, args.precision)
    sources = draw_from(args)
    samples = {f"train {m}": source.samples for m, source in sources.items()}
    folder = RunFolder(process, args, "pretrain", samples)

    torch.manual_seed(args.seed)
    model = MaskedAutoencoder(args.size).to(process.device)
    ratios = {"image": args.image_mask_ratio, "video": args.video_mask_ratio}
    objective = ReconstructionLoss(model, ratios)
    optimizer, rate = optimisation(args, model, len(schedule_epoch(sources, args.seed, 0)))
    hidden = {m: masked_tokens(model.size.tokens(m), ratios[m]) for m in sources}
    describe(process, args, model, sources, rate, f"masked tokens of a sample: {hidden}")
    data = TrainingData(sources, "pretrain", model.size)
    train(process, args, folder, model, objective, optimizer, rate, data)

    dataset = "synthetic" if drawn else "dfew"
    if "video" in sources and sources["video"].samples.classes:
        dataset = args.dataset
    say_next(process, args, "finetune.py", "--dataset", dataset, "--pretrained", folder.last)


def draw_from(args) -> dict[str, Source]:
    """The training data by modality."""
    micro = args.micro_batch or math.ceil(args.batch_size / 2)
    sources = {}
    if args.dataset != "none":
        if args.batch_size % args.repeats or micro % args.repeats:
            raise UserError(f"--repeats {args.repeats} must divide --batch-size {args.batch_size} "
                            f"and the micro-batch {micro}, which holds all crops of a clip")
        videos = load_samples(args.dataset, args.data_root, "train", args.fold, args.stride,
                              args.crop, "video")
        sources["video"] = Source(videos, args.batch_size, micro, repeats=args.repeats)
    if args.image_dataset != "none":
        if args.image_dataset == "frames" and sources:
            images = replace(videos, modality="image", frames_as_images=True)
        else:
            images = load_samples(args.image_dataset, args.data_root, "train", modality="image")
        sources["image"] = Source(images, args.batch_size, micro, share=args.image_share)
    if not sources:
        raise UserError("--dataset none and --image-dataset none leave nothing to train on")
    return sources


def optimisation(args, model: nn.Module, steps_per_epoch: int):
    """Section IV-B: AdamW, and a rate for 512 samples a step, in proportion for others."""
    lr = args.lr * args.batch_size / 512
    steps = args.epochs * steps_per_epoch
    groups = decayed(model.named_parameters(), args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), fused=True)
    return optimizer, Rate(lr, int(args.warmup * steps), steps, first=1e-6, end=0.0)


class ReconstructionLoss(nn.Module):
    """Masks of one modality's ratio and Eq. (2). A module, as DDP (several processes) needs one."""

    def __init__(self, model: MaskedAutoencoder, ratios: dict[str, float]):
        super().__init__()
        self.model = model
        self.ratios = ratios

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # `train` passes labels in both stages; this one needs none
        loss, _, _ = self.model(x, mask_ratio=self.ratios[modality(x)])
        return loss


# ---------------------------------------------------------------------- the loop of both stages

def train(process, args, folder, model, objective, optimizer, rate, data, test=None):
    """Train `model` through `objective`, a module from (x, labels) to the loss. Returns `state`:
    all there is of a run beside weights and moments, as what is random follows from the seed, the
    epoch, the step and the micro-batch. test() gives scores of the model as it is. UserError, with
    the weights as they were, if the loss or its gradient is not finite."""
    new = dict(epoch=0, step=0, losses=[], best=None, left_out={})
    state = folder.load(model, optimizer) or new
    order = deal(data.sources, args.seed, args.epochs, process.rank, process.world,
                 state["epoch"], state["step"])
    micro_batches = iter(loader(data, args.workers, batch_size=None, sampler=order))
    compile_layers(model, args.compile)
    ddp = DistributedDataParallel(objective) if process.world > 1 else objective
    steps = rate.steps // args.epochs

    for epoch in range(state["epoch"], args.epochs):
        process.catch_signals()                                 # they wait for the end of the step
        objective.train()
        began = time.perf_counter()
        bar = tqdm(range(state["step"], steps), f"epoch {epoch + 1}/{args.epochs}", steps,
                   initial=state["step"], leave=False, disable=not process.main, unit="step")
        for step in bar:
            lr = rate(epoch * steps + step)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]

            # Forward and backward: this process's micro-batches, whose weighted losses add up
            total = torch.zeros((), device=process.device)
            for micro, x, labels, errors in micro_batches:
                leave_out(errors, data.sources[micro.modality].samples, state["left_out"])
                torch.manual_seed(micro.seed)                   # of masks, mixing and gate noise
                x = to_float(process.upload(x))
                ddp.require_backward_grad_sync = micro.is_last  # DDP adds gradients up once a step
                with process.autocast():
                    loss = micro.weight * ddp(x, process.upload(labels))
                (loss * process.world).backward()               # DDP averages, weights want a sum
                total += loss.detach()
                if micro.is_last:
                    break

            loss, norm, stop = clip_and_sum(process, model, args.clip_grad, total)
            if not math.isfinite(loss + norm):
                raise not_finite(loss, norm, epoch, step, data.sources[micro.modality], micro)
            optimizer.step()
            optimizer.zero_grad()

            # Log and save
            state["step"] = step + 1
            state["losses"].append((micro.modality, float(f"{loss:.6g}")))
            bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.2e}", norm=f"{norm:.2g}", refresh=False)
            if stop or folder.due():
                folder.save(model, optimizer, state)
            if stop:
                process.leave()
        end_epoch(process, args, folder, model, optimizer, state, began, test)
    return state


def clip_and_sum(process, model, clip_grad: float | None, loss: torch.Tensor) -> list[float]:
    """Clip the gradient, if asked to. Returns the loss, the norm of the gradient, and whether any
    process was told to stop: the step's one sum over the processes, and one wait for the device."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip_grad or math.inf)
    numbers = [loss, norm / process.world, loss.new_full((), process.signal)]
    return process.sum(torch.stack(numbers)).tolist()


def end_epoch(process, args, folder, model, optimizer, state: dict, began: float, test) -> None:
    """Test, log, save and print a line. A test takes long and may be stopped, so it stands between
    two saves."""
    epoch = state["epoch"] + 1
    record = dict(epoch=epoch, losses=state["losses"], loss={}, left_out=len(state["left_out"]))
    for m in ("video", "image"):
        losses = [loss for name, loss in state["losses"] if name == m]
        if losses:
            record["loss"][m] = fmean(losses)
    folder.save(model, optimizer, state)
    if process.signal:                      # one since the last step
        sys.exit(128 + process.signal)
    process.release_signals()
    if test and (epoch == args.epochs or epoch % args.test_every == 0):
        record |= test()
        if state["best"] is None or record["score"] > state["best"]["score"]:
            state["best"] = record
    seconds = time.perf_counter() - began
    record["seconds"] = round(seconds, 2)
    state |= dict(epoch=epoch, step=0, losses=[])
    folder.save(model, optimizer, state, record)

    line = f"epoch {epoch}/{args.epochs}"
    split = "validation" if "validation" in record else "test"
    for m, loss in record["loss"].items():
        line += f"  {m}s: loss {loss:.3f}"
        if split in record:
            line += f", {split} UAR {record[split][m]['uar']:.3f}"
    minutes_left = seconds * (args.epochs - epoch) / 60
    if process.main:
        print(f"{line}  {seconds:.0f} s, {minutes_left:.1f} min left", flush=True)


@dataclass
class Rate:
    """Learning rate: linear from `first` to `peak` in `warmup` steps, then a cosine to `end`."""
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
    """Groups for an optimiser: vectors (biases, norms) do not decay; rates are scaled by name."""
    groups = {}
    for name, parameter in named_parameters:
        decay = weight_decay if parameter.squeeze().ndim > 1 else 0.0
        group = dict(params=[], scale=scale(name), weight_decay=decay)
        groups.setdefault((scale(name), decay), group)["params"].append(parameter)
    return list(groups.values())


# ==================================================================================================
# From here on what both stages share and no equation needs: settings, processes, a run's folder.

def common_settings(description: str, tiny: dict) -> argparse.ArgumentParser:
    """The settings that both stages have under the same names and with the same defaults."""
    changed = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in tiny.items())
    epilog = f"With --size tiny the defaults are {changed}.\nEvery row of the paper: tests/paper.md"
    p = argparse.ArgumentParser(description=description, epilog=epilog, formatter_class=Formatter)
    add = p.add_argument
    add("--data-root", type=Path, default=Path("data"), help="folder of all data sets")
    add("--fold", type=count, default=1, help="cross-validation fold, counted from 1")
    add("--stride", type=count, help="of the frames of a clip (the data set's own)")
    add("--crop", type=box, metavar="X,Y,W,H", help="part of video frames, in pixels (all of it)")
    add("--size", choices=list(SIZES), help="of the model (base, or tiny on drawn faces)")
    add("--micro-batch", type=count, help="samples (in stage 2 clips, and images in proportion) "
        "that one process computes at once; a batch is gathered from several (half a batch)")
    add("--weight-decay", type=positive, default=0.05, help="of weight matrices only")
    add("--seed", type=natural, default=0, help="of everything random (0)")
    add("--workers", type=natural, default=default_workers(), help="loading processes each")
    add("--clip-grad", type=positive, help="clip the gradient to this norm (no clipping)")
    add("--precision", choices=["fp32", "bf16"], help="of matrix products (what is fast here)")
    add("--compile", nargs="?", const="inductor", choices=["inductor", "aot_eager"],
        help="compile the layers: a minute, and a C++ compiler (aot_eager: without one)")
    add("--output", type=Path, help="the run's folder (runs/..., named after the data)")
    add("--resume", action="store_true", help="continue from the run's last.pt, if there is one")
    add("--save-minutes", type=positive, default=10, help="time between checkpoints in an epoch")
    return p


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the description as it was written, and the defaults that no help text tells."""

    def _get_help_string(self, action):
        untold = action.default in (None, False)
        return action.help if untold else super()._get_help_string(action)


def number(kind: type, low: float, high: float = math.inf):
    """A type for argparse: a number from low to high."""
    def number(text: str):                  # by its name argparse refuses what is no number
        value = kind(text)
        if not low <= value <= high:
            limit = "or more" if high == math.inf else f"to {high:g}"
            raise argparse.ArgumentTypeError(f"{text}: expected {low} {limit}")
        return value
    return number


natural = number(int, 0)
count = number(int, 1)
positive = number(float, 0)
share = number(float, 0, 1)


def box(text: str) -> tuple[int, ...]:
    """A type for argparse: left, top, width and height in pixels, as 10,0,160,160."""
    left, top, width, height = text.split(",")
    return natural(left), natural(top), count(width), count(height)


def default_workers() -> int:
    """Loading processes of one process: the cores that it may use, at most 16."""
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):    # not on macOS and Windows
        cores = len(os.sched_getaffinity(0))
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def parse(p: argparse.ArgumentParser, tiny: dict) -> argparse.Namespace:
    """Read the command line. The size is found first, as tiny brings defaults of its own: where
    --size does not tell, drawn faces, --pretrained or else the paper do."""
    args, _ = p.parse_known_args()
    size = args.size or "base"
    pretrained = Path(vars(args).get("pretrained") or "none")   # stage 1 has no such setting
    if args.size is None and args.dataset.startswith("synthetic"):
        size = "tiny"
    elif args.size is None and pretrained.is_file():
        size = read_checkpoint(pretrained)["architecture"]["size"]
    p.set_defaults(size=size, **(tiny if size == "tiny" else {}))
    return p.parse_args()


def describe(process, args, model, sources: dict[str, Source], rate: Rate, more: str) -> None:
    """Print what follows from the settings: once, before any work."""
    if not process.main:
        return
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{args.size} model, {millions:.2f} M parameters; {process.world} process(es) on "
          f"{process.device.type}, {process.precision}: {process.reason}")
    for m, source in sources.items():
        samples = source.samples
        print(f"{m}s: {len(samples)} of {samples.name} in {samples.root}, stride {samples.stride}; "
              f"a step takes {source.batch} in micro-batches of {source.micro}", *samples.notes,
              sep="\n  ")
    print(f"{args.epochs} epochs of {rate.steps // args.epochs} steps, peak learning rate "
          f"{rate.peak:.3g}\n{more}\nwriting to {args.output}", flush=True)


def say_next(process, args, *command) -> None:
    """Print the command that follows, ready to paste."""
    launcher = "python"
    if process.world > 1:
        launcher = f"torchrun --nproc_per_node {os.environ['LOCAL_WORLD_SIZE']}"
    words = map(str, [*command, "--data-root", args.data_root])
    if process.main:
        print(f"\nNext: {launcher} {shlex.join(words)}", flush=True)


def not_finite(loss: float, norm: float, epoch: int, step: int, source: Source, micro) -> UserError:
    files = ", ".join(str(source.samples.path(i)) for i in micro.index)
    return UserError(f"epoch {epoch + 1}, step {step}: the loss became {loss}, the norm of its "
                     f"gradient {norm}: stopped before the weights change. The last "
                     f"{micro.modality}s of this process: {files}")


def leave_out(errors: list[str], samples: Samples, left_out: dict[str, str]) -> None:
    """Name samples that cannot be read, once each. UserError if they are more than 1 % of all."""
    m = samples.modality
    for error in errors:
        if error not in left_out:
            tqdm.write(f"left out: {error}", file=sys.stderr)
        left_out[error] = m
        number = list(left_out.values()).count(m)
        if number > 0.01 * len(samples):
            raise UserError(f"{number} of {len(samples)} {m}s cannot be read, more than 1 %; "
                            f"the last: {error}")


def compile_layers(model: nn.Module, backend: str | None) -> None:
    """torch.compile each layer by itself: together they are most of the work, and of few shapes."""
    if backend is None:
        return
    torch._dynamo.config.optimize_ddp = False  # would cut layers where DDP's buckets end
    for layer in model.modules():
        if isinstance(layer, Layer):
            layer.compile(backend=backend)


# ------------------------------------------------------------------------ processes and devices

@dataclass
class Process:
    """This process among the others, and its device."""
    rank: int
    world: int
    device: torch.device
    precision: str                          # of matrix products: "fp32" or "bf16"
    reason: str = "as --precision says"     # why this precision
    signal: int = 0                         # SIGTERM or SIGINT, once it was received

    @property
    def main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> torch.autocast:
        mixed = self.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=mixed)

    def upload(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.device, non_blocking=True)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def catch_signals(self) -> None:
        """From now on the first SIGTERM or SIGINT only sets `signal`; a second one ends at once."""
        def receive(number: int, frame) -> None:
            self.signal = number
            self.release_signals()

        signal.signal(signal.SIGTERM, receive)
        signal.signal(signal.SIGINT, receive)

    def release_signals(self) -> None:
        """From now on they end the process at once."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def leave(self) -> None:
        """End because of a signal to this process or to another one, when all have come here."""
        if self.world > 1:
            dist.barrier()                  # the first one has saved
        sys.exit(128 + (self.signal or signal.SIGTERM))


def start(size: str = "base", precision: str | None = None) -> Process:
    """Join the processes that torchrun started, or be the only one. precision: "fp32", "bf16", or
    None: on a GPU bf16 where it has that, on a CPU what the first process measures."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    elif size == "tiny":
        torch.set_num_threads(1)            # its products are too small to share
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        # Keep what is freed: to get it back page by page took 17 to 40 % of a tiny step
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, -1)                # M_TRIM_THRESHOLD: never shrink the heap
        libc.mallopt(-4, 0)                 # M_MMAP_MAX: no mapping of its own for a large block
    if world > 1:
        # After a restart torchrun's store still holds the addresses of those who died: a prefix
        store, _, _ = next(dist.rendezvous("env://", rank, world))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        two_hours = timedelta(hours=2)      # the first listing of a million videos is slow
        dist.init_process_group(backend, store=store, rank=rank, world_size=world,
                                timeout=two_hours)
    process = Process(rank, world, device, precision or "fp32")
    if precision is None and device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            process.precision = "bf16"
        process.reason = "what this GPU is fast in"
    elif precision is None:
        seconds = torch.tensor(product_seconds(SIZES[size].width))
        fp32, bf16 = process.sum(seconds * process.main).tolist()
        process.reason = f"products in fp32 take {fp32 / bf16:.2f} of their time in bf16 here"
        if bf16 < fp32:
            process.precision = "bf16"
    return process


def product_seconds(width: int) -> list[float]:
    """Seconds of a layer's product in fp32 and in bf16, with the casts of training. A processor's
    flags do not tell: some that have bf16 multiply it at half the speed of fp32."""
    x = torch.ones(200_000 // width, width)
    weight = torch.ones(4 * width, width)
    seconds = [math.inf, math.inf]
    for _ in range(4):                      # in turns; the first ones also prepare the kernels
        for i, mixed in enumerate((False, True)):
            began = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                nn.functional.linear(x, weight)
            seconds[i] = min(seconds[i], time.perf_counter() - began)
    return seconds


# What torch says where a machine lacks something, and what helps
ADVICE = {
    "out of memory": "a smaller --micro-batch needs less",
    "shared memory": "fewer --workers need less /dev/shm",
    "DataLoader worker (": "fewer --workers need less memory",
    "C++ compiler": "--compile aot_eager needs none",
}


def guarded(main) -> None:
    """Run a script's main: what a user can put right ends in a line, all else in a traceback."""
    for name in ("stdout", "stderr"):       # one that was closed is None
        stream = getattr(sys, name) or open(os.devnull, "w")
        setattr(sys, name, stream)
        if hasattr(stream, "reconfigure"):  # not a notebook's, which shows all letters
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (UserError, OSError) as error:
        fail(str(error))
    except RuntimeError as error:
        for words, advice in ADVICE.items():
            if words in str(error):
                fail(f"{error}\n{advice}")
        raise
    finally:
        if hasattr(signal, "SIGCHLD"):      # torch's handler would make each death an error
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for child in multiprocessing.active_children():
            child.kill()                    # a loading process leaves other signals to us
    if dist.is_initialized():
        dist.destroy_process_group()


def fail(message: str) -> None:
    """End with a line and exit status 1."""
    if message.startswith("Caught "):       # in a loading process, whose traceback it ends
        message = message.rsplit("Error: ", 1)[-1]
    message = "; ".join(line for line in message.splitlines() if line)
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        # What torchrun prints last: of several processes' reasons the one with the earliest second,
        # which is to be this one, and not what it causes
        reason = dict(message=message, extraInfo=dict(timestamp=int(time.time()) - 1))
        Path(file).write_text(json.dumps(dict(message=reason)), encoding="utf-8")
    sys.exit(f"error: {message}")


# ------------------------------------------------------------------------------ the run's folder

# Settings that change no number, and those of which fingerprints tell more: a run may be moved
NOT_COMPARED = {"output", "resume", "workers", "save_minutes", "compile", "data_root", "dataset",
                "image_dataset", "pretrained", "stride"}


class RunFolder:
    """log.jsonl, last.pt and best.pt of a run, wherever it lies. samples: its data, by "train
    video" and so on. UserError if the folder holds another run."""

    def __init__(self, process: Process, args, stage: str, samples: dict[str, Samples]):
        self.process = process
        self.stage = stage
        self.path = args.output
        self.last = self.path / "last.pt"
        self.save_seconds = 60 * args.save_minutes
        self.saved_at = time.monotonic()
        self.saved = None                   # the checkpoint to go on from
        self.identity = identity(args, samples) | {"precision": process.precision}
        if process.main:
            self.path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path).close()   # an error now, where none may write
        self.stamp = stamp(self.last)
        for name in ("last.pt", "best.pt", "log.jsonl"):
            if (self.path / name).exists() and not (args.resume and self.stamp):
                raise UserError(f"{self.path / name} exists: give --resume to continue that run "
                                "from last.pt, another --output, or delete it")
        if not self.stamp:
            return
        self.saved = read_checkpoint(self.last)
        if "optimizer" not in self.saved:
            raise UserError(f"{self.last} is no last.pt of a run: it has no optimizer")
        then, now = self.saved["identity"], self.identity
        if args.precision is None:          # and not what is faster here
            process.precision = then.get("precision", process.precision)
            now["precision"] = process.precision
            process.reason = "as the run began"
        if "pretrained fingerprint" in then:    # that file may be gone
            now.setdefault("pretrained fingerprint", then["pretrained fingerprint"])
        changes = []
        for name in sorted(then.keys() | now.keys()):
            if name not in NOT_COMPARED and then.get(name) != now.get(name):
                changes.append(f"{name} was {then.get(name)}, now {now.get(name)}")
        if changes:
            raise UserError(f"{self.last} is of another run: {'; '.join(changes)}")

    def load(self, model: nn.Module, optimizer) -> dict | None:
        """The state to go on from, its weights and moments restored; None for a new run."""
        if self.saved is None:
            return None
        saved, self.saved = self.saved, None
        load_weights(model, saved["model"], self.last)
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
        if self.process.main:
            print(f"resumed from {self.last}: {state['epoch']} epochs, {state['step']} steps")
        return state

    def due(self) -> bool:
        """Whether the first process, which alone writes, last did so long enough ago."""
        return self.process.main and time.monotonic() - self.saved_at >= self.save_seconds

    def save(self, model, optimizer, state: dict, record: dict | None = None) -> None:
        """Write last.pt; after an epoch also its record to log.jsonl, and best.pt if it is the best
        one. UserError, with the files as they are, if another run has written last.pt."""
        self.saved_at = time.monotonic()
        if not self.process.main:
            return
        if stamp(self.last) not in (None, self.stamp):
            raise UserError(f"another run writes here: {self.last} is not the file that this run "
                            "wrote or loaded; give another --output")
        weights = model.state_dict()
        for name, value in weights.items():
            if not value.isfinite().all():
                raise UserError(f"{name} is not finite any more: not written to {self.last}")
        # What the numbers may depend on beside settings and data
        made_by = dict(command=shlex.join(sys.argv), python=platform.python_version(),
                       torch=str(torch.__version__), torchvision=version("torchvision"),
                       av=version("av"), numpy=version("numpy"), processes=self.process.world,
                       machine=platform.platform(), device="cpu")
        if torch.cuda.is_available():
            made_by["device"] = torch.cuda.get_device_name()
        contents = dict(stage=self.stage, architecture=model.architecture, made_by=made_by,
                        identity=self.identity, state=state, model=weights)
        if record and record is state["best"]:
            write(self.path / "best.pt", contents)
        if record:                          # without lines of an epoch that was logged, not saved
            log = self.path / "log.jsonl"
            lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
            lines[record["epoch"] - 1:] = [json.dumps(record)]
            with whole_file(log, "w", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
        write(self.last, contents | {"optimizer": optimizer.state_dict()})
        self.stamp = stamp(self.last)


def identity(args, samples: dict[str, Samples]) -> dict:
    """What a run is: all its settings, and the fingerprints of its data and first weights."""
    found = {}
    for name, value in vars(args).items():
        found[name] = str(value) if isinstance(value, Path) else value
    for name, part in samples.items():
        found[name] = part.fingerprint()
    if "train video" in samples:
        found["video stride"] = samples["train video"].stride
        found["video rate"] = frame_rate(samples["train video"])
    pretrained = Path(vars(args).get("pretrained", "none"))     # stage 1 has no such setting
    if pretrained.is_file():
        digest = hashlib.blake2b(pretrained.read_bytes(), digest_size=8)
        found["pretrained fingerprint"] = digest.hexdigest()
    return found


def stamp(file: Path) -> tuple[int, int] | None:
    """Size and time of a file, which tell whether somebody else wrote it; None without one."""
    return (file.stat().st_size, file.stat().st_mtime_ns) if file.exists() else None


def write(path: Path, contents: dict) -> None:
    with whole_file(path) as file:
        torch.save(contents, file)


if __name__ == "__main__":
    guarded(main)
