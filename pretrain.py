"""Stage 1: one encoder-decoder is pre-trained as a masked autoencoder on face images and face videos together.

    torchrun pretrain.py                          VoxCeleb2 clips and AffectNet-8 images, the paper's settings
    python pretrain.py --dataset synthetic        the same on synthetic faces and a tiny model, in minutes on a CPU

`main` is the stage; `train` below it is the loop of both stages, and the rest is what they share: processes,
learning rate, checkpoints. One process or many, on one kind of device, give the same losses up to summation order:
an optimiser step is a fixed list of micro-batches, dealt to the processes (data.py), each with a seed of its own.
"""
import argparse
import contextlib
import json
import math
import os
import sys
import textwrap
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (DataError, Schedule, Source, TrainingData, dataset_name, ensure_synthetic, load_samples, loader,
                  short_name, to_float)
from model import (MASK_RATIO, SIZES, CheckpointError, MaskedAutoencoder, SettingError, masked_tokens, modality,
                   read_checkpoint)

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
    p.add_argument("--epochs", type=int, default=100, help="passes over the data")
    p.add_argument("--batch-size", type=int, default=384, help="images or clips of one optimiser step, all processes")
    p.add_argument("--lr", type=float, default=1.6e-3, help="base learning rate, for 512 samples a step")
    p.add_argument("--warmup", type=float, default=0.05, help="share of all steps in which the learning rate rises")
    p.add_argument("--weight-decay", type=float, default=0.05, help="of weight matrices; biases and norms have none")
    p.add_argument("--video-mask-ratio", type=float, default=MASK_RATIO["video"], help="of a clip's tokens")
    p.add_argument("--image-mask-ratio", type=float, default=MASK_RATIO["image"], help="of an image's tokens")
    p.add_argument("--image-share", type=float, default=1.0, help="share of the images that an epoch sees")
    p.add_argument("--repeats", type=int, default=4, help="differently cropped samples of each decoded clip")
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
    p.add_argument("--seed", type=int, default=0, help="of everything random")
    p.add_argument("--workers", type=int, default=default_workers(), help="loading processes per process")
    p.add_argument("--output", type=Path, help="the run's folder (runs/..., named after the data)")
    p.add_argument("--resume", action="store_true", help="continue from last.pt in the run's folder, if there is one")
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
        p.set_defaults(size="tiny" if args.dataset.startswith("synthetic") else "base")
    if (args.size or p.get_default("size")) == "tiny":
        p.set_defaults(**tiny)
    args = p.parse_args(argv)
    for options, fits, expected in (
            (("epochs", "batch_size", "micro_batch", "repeats", "image_batch_size", "experts", "k", "adapter_width"),
             lambda value: value >= 1, "1 or more"),
            (("workers", "lr", "seed", "weight_decay", "warmup_epochs", "layer_decay", "balance", "sigma"),
             lambda value: 0 <= value < math.inf, "0 or more"),
            (("video_mask_ratio", "image_mask_ratio", "validation", "label_smoothing"),
             lambda value: 0 <= value < 1, "0 to below 1"),
            (("mixing", "warmup"), lambda value: 0 <= value <= 1, "0 to 1"),
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
    args.images = args.image_dataset or ("synthetic-images" if args.dataset == "synthetic" else "affectnet-8")
    sources = load_sources(args, run)

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
    train(run, args, "pretrain", model, module, optimizer, rate, schedule,
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

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = to_float(x)
        loss, _, _ = self.model(x, mask_ratio=self.ratios[modality(x)])
        return loss


# ------------------------------------------------------------------------------------------- the loop of both stages

def train(run, args, stage, model, module, optimizer, rate, schedule, data, end_of_epoch=lambda epoch: {}) -> None:
    """Train `model` through `module`, which maps (x uint8, labels) to a scalar loss.

    After every epoch, end_of_epoch(epoch) gives scores; a JSON line goes to log.jsonl and a checkpoint to last.pt.
    """
    progress = resume(run, args, stage, model, optimizer) if args.resume else fresh(run, args)
    schedule.start = progress["epoch"], 0
    batches = iter(loader(data, args.workers, batch_size=None, sampler=schedule))
    wrapped = DistributedDataParallel(module, broadcast_buffers=False) if run.world > 1 else module
    per_epoch = rate.steps // args.epochs
    unreadable = Unreadable(data.sources)
    bar = tqdm(total=rate.steps, initial=progress["epoch"] * per_epoch, disable=not run.main, unit="step",
               desc=f"{stage} epoch {progress['epoch'] + 1}/{args.epochs}")
    for epoch in range(progress["epoch"], args.epochs):
        bar.set_description(f"{stage} epoch {epoch + 1}/{args.epochs}")
        module.train()
        losses, waited, began = [], 0.0, time.perf_counter()
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            for group in optimizer.param_groups:
                group["lr"] = rate(step) * group.get("scale", 1.0)
            source, loss, data_time = optimise(run, wrapped, batches, optimizer, unreadable, step)
            losses.append((source, float(f"{loss:.6g}")))
            waited += data_time
            bar.update()
            bar.set_postfix(refresh=False, loss=f"{loss:.4f}", lr=f"{rate(step):.2e}",
                            data=f"{data_time:.3f}s", step=f"{(time.perf_counter() - began) / len(losses):.3f}s")
        unreadable.share(run)
        record = dict(epoch=epoch + 1, step=(epoch + 1) * per_epoch, lr=rate(step), losses=losses,
                      loss={name: mean([loss for source, loss in losses if source == name]) for name in data.sources},
                      seconds=round(time.perf_counter() - began, 2), data_seconds=round(waited, 2),
                      unreadable=len(unreadable.files), **end_of_epoch(epoch))
        progress = dict(progress, epoch=epoch + 1)
        if run.main:
            save(args, stage, model, optimizer, progress, record)
    bar.close()


def optimise(run, wrapped, batches, optimizer, unreadable, step: int) -> tuple[str, float, float]:
    """One optimiser step over this process's micro-batches. Returns the source, the loss and seconds of waiting."""
    optimizer.zero_grad(set_to_none=True)
    total, waited, last = torch.zeros((), device=run.device), 0.0, False
    while not last:
        began = time.perf_counter()
        micro, x, labels, errors = next(batches)
        waited += time.perf_counter() - began
        unreadable.add(micro.source, errors)
        last = micro.last
        torch.manual_seed(micro.seed)       # masks, mixing and gate noise depend on the micro-batch, not the process
        synchronise = contextlib.nullcontext() if last or run.world == 1 else wrapped.no_sync()
        with synchronise:
            with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
                loss = wrapped(x.to(run.device, non_blocking=True), labels.to(run.device, non_blocking=True))
            loss = loss * micro.weight
            (loss * run.world).backward()   # DDP averages over the processes; the step's loss is a sum of shares
        total += loss.detach()
    if run.world > 1:
        dist.all_reduce(total)
    loss = total.item()
    if not math.isfinite(loss):
        samples = unreadable.sources[micro.source].samples
        raise SystemExit(f"the loss became {loss} at step {step}, epoch {micro.epoch + 1}, a batch of {micro.source}s: "
                         "stopped before the weights change. This process's last files of it: "
                         + ", ".join(str(samples.path(i)) for i in micro.index))
    optimizer.step()
    return micro.source, loss, waited


class Unreadable:
    """Samples that training left out: named once each, and an error beyond 1 % of their data set."""

    def __init__(self, sources: dict[str, Source]):
        self.sources, self.files = sources, {}

    def add(self, source: str, errors: list[str]) -> None:
        for error in errors:
            if error not in self.files:
                tqdm.write(f"left out: {error}", file=sys.stderr)
            self.files[error] = source
        if errors:
            self.check()

    def share(self, run) -> None:
        """At the end of an epoch every process learns what the others left out."""
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


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


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

    @property
    def main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def start(size: str = "base") -> Run:
    """Join the processes that torchrun started, or be the only one."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    elif size == "tiny":
        torch.set_num_threads(1)            # its products are too small to share, and loading needs the other cores
        # On its few tokens, plain products in bf16 take half the fused attention's time; the switch is the CPU's too.
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Run(rank, world, device, precision(device))


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
    except (DataError, CheckpointError, SettingError) as error:
        text = str(error)                   # a loading process wraps it in its traceback, which ends in the message
        sys.exit(f"error: {text.rsplit('Error: ', 1)[-1].strip() if text.startswith('Caught ') else text}")
    if dist.is_initialized():
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------- the run's folder

def fresh(run: Run, args) -> dict:
    """Progress of a new run. Refuses to write over another run's checkpoints."""
    last = args.output / "last.pt"
    if last.exists():
        raise CheckpointError(f"{last} exists: give --resume to continue that run, another --output, or delete it")
    run.barrier()                           # nobody may create it before everybody has looked
    if run.main:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "log.jsonl").write_text("")
    return dict(epoch=0, best=None)


FREE_TO_CHANGE = {"output", "resume", "workers", "data_root"}


def plain(args) -> dict:
    """Settings as text and numbers, for the checkpoint."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def resume(run: Run, args, stage: str, model: nn.Module, optimizer) -> dict:
    """Continue from last.pt; all randomness follows from seed, epoch and step, so nothing else is needed.

    CheckpointError if the settings that change the result are not those of the checkpoint.
    """
    last = args.output / "last.pt"
    if not last.exists():
        return fresh(run, args)
    checkpoint = read_checkpoint(last)
    if checkpoint["stage"] != stage:
        raise CheckpointError(f"{last} is a checkpoint of {checkpoint['stage']}, not of {stage}")
    now = plain(args)
    for name in sorted(now.keys() - FREE_TO_CHANGE):
        if now[name] != checkpoint["settings"].get(name):
            raise CheckpointError(f"{last} was trained with --{name.replace('_', '-')} "
                                  f"{checkpoint['settings'].get(name)}, not {now[name]}: that is another run")
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    if run.main:                            # lines of an epoch that was logged but not saved
        log = args.output / "log.jsonl"
        lines = log.read_text().splitlines(keepends=True)
        log.write_text("".join(lines[:checkpoint["progress"]["epoch"]]))
        print(f"resumed from {last} after epoch {checkpoint['progress']['epoch']}")
    return checkpoint["progress"]


def save(args, stage: str, model: nn.Module, optimizer, progress: dict, record: dict) -> None:
    """The epoch's JSON line; last.pt; and best.pt, where the epoch's `score` is the best so far."""
    with open(args.output / "log.jsonl", "a") as log:
        log.write(json.dumps(record) + "\n")
    contents = dict(stage=stage, architecture=model.architecture, model=model.state_dict(), settings=plain(args),
                    progress=progress, scores={k: v for k, v in record.items() if k != "losses"})
    if "score" in record and (progress["best"] is None or record["score"] > progress["best"]["score"]):
        progress["best"] = contents["scores"]
        write(args.output / "best.pt", contents)
    write(args.output / "last.pt", contents | {"optimizer": optimizer.state_dict()})


def write(path: Path, contents: dict) -> None:
    """A file that is there whole or not at all: written beside its place, flushed to disk, then renamed."""
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        torch.save(contents, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def describe(run: Run, args, model: nn.Module, sources: dict[str, Source], steps: int, lr: float, more: str) -> None:
    """Print what follows from the settings: once, before any work."""
    if not run.main:
        return
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{args.size} model, {parameters / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained; {run.world} "
          f"process{'es' if run.world > 1 else ''} on {run.device.type}, {str(run.dtype).removeprefix('torch.')}")
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
