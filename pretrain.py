"""Stage 1: one encoder-decoder is pre-trained as a masked autoencoder on face images and face videos together.

    torchrun pretrain.py                          VoxCeleb2 clips and AffectNet-8 images, the paper's settings
    python pretrain.py --dataset synthetic        the same on drawn faces and a tiny model, in minutes on a CPU

First comes what is stage 1: its settings, `main`, and Eq. (2) as the `objective`. Then `train`, the loop of both
stages, and below the line of '=' what they share: settings, processes, a run's folder, to be skipped at first.
One process or many, on one kind of device, give the same losses up to summation order: an optimiser step is a fixed
list of micro-batches, dealt to the processes (data.py), each with a seed of its own.

x: a micro-batch of B images uint8 (B, 3, H, W), or of B clips of T frames uint8 (B, T, 3, H, W)
"""
import argparse
import ctypes
import fcntl
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import signal
import sys
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (Samples, Schedule, Source, TrainingData, dataset_name, digests_of, identity_of, load_samples, loader,
                  short_name, to_float)
from model import (MASK_RATIO, SIZES, Layer, MaskedAutoencoder, UserError, load_weights, masked_tokens, modality,
                   read_checkpoint, whole_file)

# With --size tiny, the default on drawn faces: what learns in minutes on two cores. Its few tokens are masked less, so
# that as many stay visible as the paper's ratios leave: 10 of an image's 36 tokens (the paper's: 10 of 100), and 5 in
# each time slot of a clip.
TINY = dict(epochs=20, batch_size=16, micro_batch=16, lr=0.024, image_mask_ratio=0.73, video_mask_ratio=0.862)


def settings() -> argparse.ArgumentParser:
    """Every setting of stage 1; the defaults are the paper's (Section IV-B), where it has none the released code's."""
    p = common_settings(__doc__, TINY)
    p.add_argument("--dataset", default="voxceleb2", type=dataset_name("video", others=("none",)),
                   help="videos, or none")
    p.add_argument("--image-dataset", type=dataset_name("image", others=("none", "frames")),
                   help="images; frames = one of each video; or none (affectnet-8, or synthetic-images)")
    p.add_argument("--epochs", type=number(int, 1), default=100, help="each draws as many samples as the data have")
    p.add_argument("--batch-size", type=number(int, 1), default=384, help="samples of a step, over all processes")
    p.add_argument("--lr", type=number(float, 0), default=1.6e-3, help="base learning rate, for 512 samples a step")
    p.add_argument("--warmup", type=number(float, 0, 1), default=0.05, help="share of steps in which the rate rises")
    for m in ("video", "image"):
        p.add_argument(f"--{m}-mask-ratio", type=number(float, 0, 1), default=MASK_RATIO[m],
                       help=f"share of the tokens of {m}s that is hidden")
    p.add_argument("--image-share", type=number(float, 1e-6, 1e3), default=1.0,
                   help="share of the images that an epoch sees")
    p.add_argument("--repeats", type=number(int, 1), default=4, help="crops of each clip that is read, so that an "
                   "epoch reads one clip in so many")
    return p


def main() -> None:
    args = parse(settings(), TINY)
    if args.dataset == "synthetic":         # to stage 1 that is its unlabelled videos
        args.dataset = "synthetic-unlabelled"
    if args.image_dataset is None:
        args.image_dataset = "synthetic-images" if args.dataset == "synthetic-unlabelled" else "affectnet-8"
    args.output = args.output or Path("runs") / f"pretrain-{short_name(args.dataset).removesuffix('-unlabelled')}"
    process = start(args.size)
    sources = draw_from(args)
    folder = RunFolder(process, args, "pretrain", {m: source.samples for m, source in sources.items()})

    torch.manual_seed(args.seed)
    model = MaskedAutoencoder(args.size).to(process.device)
    objective = ReconstructionLoss(model, {"image": args.image_mask_ratio, "video": args.video_mask_ratio})
    schedule = Schedule(sources, args.seed, args.epochs, process.rank, process.world)
    optimizer, rate = optimisation(args, model, schedule.steps_per_epoch())
    hidden = {m: masked_tokens(getattr(model.size, f"{m}_tokens"), objective.ratios[m]) for m in sources}
    describe(process, args, model, sources, rate, f"masked tokens of a sample: {hidden}")
    train(process, args, folder, model, objective, optimizer, rate, schedule,
          data=TrainingData(sources, "pretrain", model.size))


def draw_from(args) -> dict[str, Source]:
    """The training data by modality."""
    micro, sources = args.micro_batch or -(-args.batch_size // 2), {}
    if args.dataset != "none":
        if args.batch_size % args.repeats or micro % args.repeats:
            raise UserError(f"--repeats {args.repeats} must divide --batch-size {args.batch_size} and the micro-batch "
                            f"{micro}: a micro-batch holds all samples of a decoded clip")
        sources["video"] = Source(load_samples(args.dataset, args.data_root, "train", args.fold, args.stride),
                                  args.batch_size, micro, repeats=args.repeats)
    if args.image_dataset == "frames" and sources:
        frames = replace(sources["video"].samples, modality="image", frames_as_images=True)
        sources["image"] = Source(frames, args.batch_size, micro, share=args.image_share)
    elif args.image_dataset != "none":
        images = load_samples(args.image_dataset, args.data_root, "train")
        sources["image"] = Source(images, args.batch_size, micro, share=args.image_share)
    if not sources:
        raise UserError("--dataset none and --image-dataset none leave nothing to train on")
    return sources


def optimisation(args, model: nn.Module, steps_per_epoch: int) -> tuple[torch.optim.AdamW, "Rate"]:
    """Section IV-B: AdamW, and a rate for 512 samples a step, in proportion for others."""
    lr, steps = args.lr * args.batch_size / 512, args.epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(decayed(model.named_parameters(), args.weight_decay), lr, betas=(0.9, 0.95),
                                  fused=True)
    return optimizer, Rate(lr, int(args.warmup * steps), steps, first=1e-6, end=0.0)


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

def train(process, args, folder, model, objective, optimizer, rate, schedule, data, end_of_epoch=lambda: {}) -> None:
    """Train `model` through `objective`, which maps (x uint8, labels, weight) to a scalar loss times the weight.

    `state` is all there is of a run beside weights and moments: nothing random is kept, as all of it follows from the
    seed, the epoch, the step and the micro-batch. After every epoch end_of_epoch() gives scores. UserError, with the
    weights as they were, if the loss or its gradient is not finite, or if too many samples cannot be read.
    """
    state = folder.load(model, optimizer) or dict(epoch=0, step=0, losses=[], best=None, left_out={})
    per_epoch = rate.steps // args.epochs
    schedule.start = state["epoch"], state["step"]
    batches = Batches(loader(data, args.workers, batch_size=None, sampler=schedule))  # data[micro] for its micros
    if args.compile:
        compile_layers(model, args.compile)
    ddp = DistributedDataParallel(objective) if process.world > 1 else objective
    for epoch in range(state["epoch"], args.epochs):
        process.catch_signals()                                             # a signal waits for the end of the step
        objective.train()
        batches.start_clock()
        bar = tqdm(range(state["step"], per_epoch), f"{folder.stage} epoch {epoch + 1}/{args.epochs}", per_epoch,
                   initial=state["step"], disable=not process.main, unit="step")
        for step in bar:
            lr = rate(epoch * per_epoch + step)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("scale", 1.0)

            # Forward and backward: this process's micro-batches, whose weighted losses add up to the step's
            total, problem, micro = torch.zeros((), device=process.device), "", None
            while micro is None or not micro.last:
                micro, x, labels, errors = next(batches)
                problem = problem or leave_out(errors, micro.modality, state["left_out"], data.sources)
                ddp.require_backward_grad_sync = micro.last                 # DDP adds gradients up in the last one
                torch.manual_seed(micro.seed)                               # of masks, mixing and gate noise
                with process.autocast():
                    loss = ddp(process.upload(x), process.upload(labels), micro.weight)
                (loss * process.world).backward()                           # DDP averages over the processes
                total += loss.detach()
            # The step, which changes no weight if something is not finite; flags of all processes travel with the loss
            norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
            numbers = process.sum(total, norm / process.world, folder.due(), process.signal > 0, problem != "")
            optimizer.found_inf = (~numbers.isfinite().all()).float()       # where it is 1, fused AdamW changes nothing
            optimizer.step()
            optimizer.zero_grad()
            loss, norm, due, stop, failed = numbers.tolist()                # the one wait for the device
            check(loss, norm, failed, problem, f"epoch {epoch + 1}, step {step}", data.sources[micro.modality], micro)
            state["step"] = step + 1
            state["losses"].append((micro.modality, float(f"{loss:.6g}")))
            bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.2e}", norm=f"{norm:.2g}", refresh=False)
            if due or stop:
                folder.save(model, optimizer, state)
            if stop:
                sys.exit(128 + (process.signal or signal.SIGTERM))

        folder.save(model, optimizer, state)                                # evaluation takes long and may be stopped
        process.release_signals()
        record = dict(epoch=epoch + 1, **batches.seconds(), **means(state), **end_of_epoch())
        if better := "score" in record and record["score"] > (state["best"] or {"score": -1})["score"]:
            state["best"] = {key: value for key, value in record.items() if key != "losses"}
        state |= dict(epoch=epoch + 1, step=0, losses=[])
        folder.save(model, optimizer, state, record, better)


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


# ==================================================================================================================
# From here on what both stages share and no equation needs: bookkeeping, settings, processes, a run's folder. Skip it.
# ==================================================================================================================

def check(loss: float, norm: float, failed: float, problem: str, where: str, source: Source, micro) -> None:
    """End all processes together: UserError where the cause is, exit status 1 elsewhere."""
    if failed and not problem:
        time.sleep(1)                       # the process with the message speaks first
        sys.exit(1)
    if not math.isfinite(loss + norm):
        files = ", ".join(str(source.samples.path(i)) for i in micro.index)
        problem = (f"the loss became {loss} and its gradient's norm {norm:.6g} at {where}, a batch of "
                   f"{micro.modality}s: stopped before the weights change. This process's last files: {files}")
    if problem:
        raise UserError(problem)


def leave_out(errors: list[str], m: str, left_out: dict[str, str], sources: dict[str, Source]) -> str:
    """Name what cannot be read, once each; what to say if it is more than 1 % of its data set."""
    for error in errors:
        if error not in left_out:
            tqdm.write(f"left out: {error}", file=sys.stderr)
        left_out[error] = m
    count, n = list(left_out.values()).count(m), len(sources[m].samples)
    if not errors or count <= 0.01 * n:
        return ""
    return f"{count} of {n} {m}s cannot be read, more than 1 %; the last: {errors[-1]}"


def means(state: dict) -> dict:
    """What the log says of an epoch's steps."""
    by_modality = {}
    for m, loss in state["losses"]:
        by_modality.setdefault(m, []).append(loss)
    return dict(losses=state["losses"], loss={m: sum(values) / len(values) for m, values in by_modality.items()},
                left_out=len(state["left_out"]))


class Batches:
    """Iterates over a loader and takes the time that one waits for it."""

    def __init__(self, loader):
        self.iterator = iter(loader)

    def start_clock(self) -> None:
        self.began, self.waited = time.perf_counter(), 0.0

    def __next__(self):
        asked = time.perf_counter()
        batch = next(self.iterator)
        self.waited += time.perf_counter() - asked
        return batch

    def seconds(self) -> dict[str, float]:
        return dict(seconds=round(time.perf_counter() - self.began, 2), data_seconds=round(self.waited, 2))


def compile_layers(model: nn.Module, backend: str) -> None:
    """torch.compile each layer by itself: together they are most of the work, and of few shapes."""
    torch._dynamo.config.optimize_ddp = False  # would cut layers where DDP's buckets end: they are pieces enough
    for layer in (part for part in model.modules() if isinstance(part, Layer)):
        layer.compile(backend=backend)


# ---------------------------------------------------------------------------------------------------------- settings

def number(kind: type, low: float, high: float = 1e9):
    """A type for argparse: a number from low to high."""
    def check(text: str):
        value = kind(text)
        if not low <= value <= high:
            limit = "or more" if value < low and high == 1e9 else f"to {high:g}"
            raise argparse.ArgumentTypeError(f"{text}: expected {low} {limit}")
        return value
    check.__name__ = kind.__name__          # by which argparse refuses what is no number
    return check


def common_settings(description: str, tiny: dict) -> argparse.ArgumentParser:
    """The settings that both stages have under the same names and with the same defaults."""
    changed = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in tiny.items())
    p = argparse.ArgumentParser(description=description, formatter_class=Formatter, epilog=(
        f"With --size tiny the defaults are {changed}.\nEvery row of the paper: tests/paper.md"))
    p.add_argument("--data-root", type=path, default=Path("data"), help="folder of all data sets (layouts: README)")
    p.add_argument("--fold", type=number(int, 1), default=1, help="cross-validation fold, counted from 1")
    p.add_argument("--stride", type=number(int, 1), help="of the frames of a clip (the data set's own)")
    p.add_argument("--size", choices=list(SIZES), help="of the model (base, or tiny on drawn faces)")
    p.add_argument("--micro-batch", type=number(int, 1), help="samples (in stage 2 clips, and images in proportion) "
                   "that one process computes at once; a batch is gathered from as many as it takes (half a batch)")
    p.add_argument("--weight-decay", type=number(float, 0), default=0.05, help="of weight matrices only")
    p.add_argument("--seed", type=number(int, 0), default=0, help="of everything random (0)")
    p.add_argument("--workers", type=number(int, 0, 256), default=default_workers(), help="loading processes each")
    p.add_argument("--clip-grad", type=number(float, 1e-9), help="clip the gradient to this norm (no clipping)")
    p.add_argument("--compile", nargs="?", const="inductor", choices=["inductor", "aot_eager"],
                   help="compile the layers by torch.compile: a minute, and a C++ compiler (aot_eager: without one)")
    p.add_argument("--output", type=path, help="the run's folder (runs/..., named after the data)")
    p.add_argument("--resume", action="store_true", help="continue from last.pt in the run's folder; if there is no "
                   "run yet, begin, so that the same command can simply be started again")
    p.add_argument("--save-minutes", type=number(float, 0), default=10, help="time between checkpoints in an epoch")
    return p


def path(text: str) -> Path:
    """A type for argparse: an empty string is no path."""
    if not text:
        raise argparse.ArgumentTypeError("an empty string is no path")
    return Path(text)


def default_workers() -> int:
    return max(1, min(16, len(os.sched_getaffinity(0)) // max(1, launched("LOCAL_WORLD_SIZE", 1))))


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the description as it was written, and the defaults that the help text does not tell in words."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def parse(p: argparse.ArgumentParser, tiny: dict) -> argparse.Namespace:
    """Read the command line; the tiny size, which is the default on drawn faces, brings defaults of its own."""
    args, _ = p.parse_known_args()
    size = args.size or ("tiny" if args.dataset.startswith("synthetic") else "base")
    p.set_defaults(size=size, **(tiny if size == "tiny" else {}))
    return p.parse_args()


def describe(process, args, model: nn.Module, sources: dict[str, Source], rate: Rate, more: str) -> None:
    """Print what follows from the settings: once, before any work."""
    if not process.main:
        return
    print(f"{args.size} model, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; {process.world} "
          f"process{'es' if process.world > 1 else ''} on {process.device.type}, "
          f"{str(process.dtype).removeprefix('torch.')}")
    for m, source in sources.items():
        samples, micros = source.samples, -(-source.batch // source.micro)
        print(f"{m}s: {len(samples)} of {samples.name} in {samples.root}, stride {samples.stride}; a step takes "
              f"{source.batch} in micro-batches of {source.micro}", *samples.notes, sep="\n  ")
        if micros < process.world:
            print(f"  {process.world} processes share {micros} micro-batches: some idle; give a smaller --micro-batch")
    print(f"{args.epochs} epochs of {rate.steps // args.epochs} steps, peak learning rate {rate.peak:.3g}\n{more}\n"
          f"writing to {args.output}", flush=True)


# --------------------------------------------------------------------------------------------- processes and devices

@dataclass
class Process:
    """This process among the others, its device, and the precision that its matrix units are fast in."""
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype
    signal: int = 0                         # SIGTERM or SIGINT, once it was received

    @property
    def main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def upload(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.device, non_blocking=True)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def sum(self, first: torch.Tensor, *more) -> torch.Tensor:
        """The sum over the processes, in place; of several scalars, tensors or flags, as one tensor."""
        if more:                            # a fill is a kernel, not a copy that the host waits for
            first = torch.stack([first, *(x if torch.is_tensor(x) else first.new_full((), x) for x in more)])
        if self.world > 1:
            dist.all_reduce(first)
        return first

    def gather(self, mine) -> list:
        """Everybody's picklable object, in the order of the ranks."""
        everyone = [mine] * self.world
        if self.world > 1:
            dist.all_gather_object(everyone, mine)
        return everyone

    def catch_signals(self) -> None:
        """From now on the first SIGTERM or SIGINT only sets `signal`, which the loop looks at; a second one kills."""
        def receive(number: int, frame) -> None:
            self.signal = number
            for each in (signal.SIGTERM, signal.SIGINT):
                signal.signal(each, signal.SIG_DFL)

        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, receive)

    def release_signals(self) -> None:
        """Leave if there was one; from now on they end the process at once."""
        if self.signal:
            sys.exit(128 + self.signal)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def start(size: str = "base") -> Process:
    """Join the processes that torchrun started, or be the only one. UserError for more processes than GPUs."""
    rank, world, local = launched("RANK", 0), launched("WORLD_SIZE", 1), launched("LOCAL_RANK", 0)
    if rank >= world:
        raise UserError(f"RANK is {rank} and WORLD_SIZE {world}: torchrun sets both; for one process unset them")
    device, gpus = torch.device("cpu"), torch.cuda.device_count()
    if gpus:
        if local >= gpus:
            raise UserError(f"process {local} of this machine has no GPU: it has {gpus}; give --nproc_per_node {gpus}")
        if world == 1 < gpus:
            print(f"one process takes one GPU of {gpus}: torchrun --nproc_per_node {gpus} takes all", flush=True)
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
        if size == "tiny":
            torch.set_num_threads(1)        # its products are too small to share, and loading needs the other cores
    if world > 1:
        # A prefix of its own for every restart: torchrun's store still holds the addresses of those who died.
        try:
            store, _, _ = next(dist.rendezvous("env://", rank, world))
        except (ValueError, dist.DistError) as error:
            raise UserError(f"process {rank} of {world} cannot meet the others (see torchrun): {error}") from error
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if gpus else "gloo", store=store, rank=rank, world_size=world,
                                timeout=timedelta(hours=2),  # the first listing of a million videos is slow
                                device_id=device if gpus else None)
    return Process(rank, world, device, precision(device))


def launched(name: str, default: int) -> int:
    """What torchrun says of this process in the environment. UserError if that is no number."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r}: expected a number, as torchrun sets it; for one process unset it")
    return int(text)


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
    """Run a script's main: what can go wrong outside of the code becomes a line and exit status 1."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {without_traceback(error)}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: {str(error).splitlines()[0]} Give a smaller --micro-batch: a step's samples stay the same")
    except OSError as error:                # permission, space, a pipe that was closed: in the system's own words
        sys.exit(f"error: {': '.join(str(part) for part in (error.filename, error.strerror or error) if part)}")
    except RuntimeError as error:
        if "DataLoader worker" in str(error) or "shared memory" in str(error):  # one that died, or its last words
            sys.exit(f"error: loading data: {without_traceback(error)}; fewer --workers need less of /dev/shm")
        if not dist.is_initialized() or not re.search("by peer|NCCL|Connection|Broken pipe", str(error)):
            raise
        time.sleep(1)                       # let the process that failed speak first
        sys.exit(f"error: process {dist.get_rank()} has lost the others: {str(error).splitlines()[0]}")
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's own would raise an error at the death of each of
        for child in multiprocessing.active_children():  # the loading processes, which outlast other signals
            child.kill()
    if dist.is_initialized():
        dist.destroy_process_group()


def without_traceback(error: Exception) -> str:
    """An error's message, of which a loading process's traceback, which ends in it, is cut off."""
    text = str(error)
    return text.rsplit("Error: ", 1)[-1].strip() if text.startswith("Caught ") else text


# --------------------------------------------------------------------------------------------------- the run's folder

FREE_TO_CHANGE = {"output", "resume", "workers", "data_root", "save_minutes", "compile"}


class RunFolder:
    """log.jsonl, last.pt and best.pt of a run. identity: what the run is, settings and data, which must not change.

    UserError if the folder is another run's, or if another run writes to it.
    """

    def __init__(self, process: Process, args, stage: str, train: dict[str, Samples], test: dict[str, Samples] = {}):
        self.process, self.path, self.stage, self.last = process, args.output, stage, args.output / "last.pt"
        self.save_seconds, self.saved_at = 60 * args.save_minutes, time.monotonic()
        self.identity = {name: value for name, value in vars(args).items() if name not in FREE_TO_CHANGE}
        self.identity |= {f"{m} stride": samples.stride for m, samples in train.items() if m == "video"}
        for split, parts in (("train", train), ("test", test)):
            self.identity |= {f"{split} {m}": identity_of(samples) for m, samples in parts.items()}
        self.digests = {m: torch.from_numpy(digests_of(samples)) for m, samples in train.items() if test}
        if process.main:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / "lock", "a+")  # what may stand in it stays
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"another run is writing to {self.path}: give another --output") from error
        process.barrier()
        there = [name for name in ("last.pt", "best.pt", "log.jsonl") if (self.path / name).exists()]
        if there and not (args.resume and there[0] == "last.pt"):
            raise UserError(f"{self.path / there[0]} exists: give --resume to continue that run from last.pt, another "
                            "--output, or delete it")
        self.saved = read_checkpoint(self.last) if there else None
        if self.saved and not {"identity", "state", "optimizer"} <= self.saved.keys():
            raise UserError(f"{self.last} is no checkpoint to continue from: it lacks identity, state or optimizer")
        for name, now in self.identity.items() if self.saved else ():
            if (then := self.saved["identity"].get(name)) != now:
                raise UserError(f"{self.last} was trained with {name} {then}, not {now}: that is another run")

    def load(self, model: nn.Module, optimizer) -> dict | None:
        """The state to go on from, its weights and moments restored; None for a new run."""
        if self.saved is None:
            return None
        saved, self.saved = self.saved, None
        load_weights(model, saved["model"], self.last)
        try:
            optimizer.load_state_dict(saved["optimizer"])
            state, then, now = saved["state"], saved["made_by"]["processes"], self.process.world
            said = f"resumed from {self.last} after epoch {state['epoch']}, step {state['step']} of the next"
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.last} cannot be continued: {error!r}") from error
        if then != now:
            said += (f"\n{then} processes then, {now} now: the samples of every step, their crops, masks and noise "
                     "stay the same; sums are taken in another order, so last digits may differ")
        if self.process.main:
            print(said)
        return state

    def due(self) -> bool:
        """Whether the last checkpoint was written so many minutes ago, by the first process's clock."""
        return self.process.main and time.monotonic() - self.saved_at >= self.save_seconds

    def save(self, model: nn.Module, optimizer, state: dict, record: dict | None = None, best: bool = False) -> None:
        """last.pt; at the end of an epoch, `record`, also its line of the log, and best.pt if it is the best."""
        for errors in self.process.gather(state["left_out"]):
            state["left_out"] |= errors
        self.saved_at = time.monotonic()
        if not self.process.main:
            return
        weights = model.state_dict()
        if broken := [name for name, value in weights.items() if not value.isfinite().all()]:
            raise UserError(f"the weights {broken[0]} are not finite any more: not written to {self.last}")
        contents = dict(stage=self.stage, architecture=model.architecture, model=weights, identity=self.identity,
                        digests=self.digests, state=state, made_by=made_by(self.process))
        if best:
            write(self.path / "best.pt", contents)
        if record:                          # without lines of an epoch that was logged but not saved
            log = self.path / "log.jsonl"
            lines = log.read_text().splitlines()[:record["epoch"] - 1] if log.exists() else []
            with whole_file(log, "w") as file:
                file.write("\n".join([*lines, json.dumps(record)]) + "\n")
        write(self.last, contents | {"optimizer": optimizer.state_dict()})


def write(path: Path, contents: dict) -> None:
    with whole_file(path) as file:
        torch.save(contents, file)


def made_by(process: Process) -> dict:
    """What a checkpoint's numbers may depend on beside settings and data."""
    return dict(command=shlex.join(sys.argv), python=platform.python_version(), torch=str(torch.__version__),
                **{name: version(name) for name in ("torchvision", "av", "numpy")}, processes=process.world,
                machine=platform.platform(),
                device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    guarded(main)
