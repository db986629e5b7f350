"""Files, sampling and batches: which samples there are, what training draws from them at random, and how mini-batches
of one source each are interleaved.

It reads from the method to the files: `Samples` are one split of a data set; `train_frames` and its neighbours choose
the frames of a clip; `augmentation` is what training does to them; `schedule_epoch` draws an epoch's steps, each of
images or of clips. Below the line of '=' follows what can be skipped: loading processes, data sets, lists, readers.

B batch    T frames of a clip    H x W pixels    n samples, or frames of a whole video    v views of one sample
"""
import argparse
import csv
import hashlib
import os
import re
import signal
import struct
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain, count, islice
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Callable, NamedTuple

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps
from torchvision.transforms import v2
from tqdm import tqdm

from model import IMAGE_MEAN, IMAGE_STD, Size, UserError, channel_values

WHOLE = (0, 0, 1, 1)                        # a frame's part as fractions (top, left, height, width)


@dataclass
class Samples:
    """The samples of one split. Names are bytes in one numpy array: loading processes then share their memory."""
    name: str                               # of the data set
    modality: str                           # "image" or "video"
    classes: tuple[str, ...]                # in label order; none where there are no labels
    root: Path                              # folder that the names are relative to
    names: np.ndarray                       # (n,) bytes: image files, video files or folders of frames
    labels: np.ndarray                      # (n,) int64, -1 where there are none
    stride: int = 1                         # of the frames of a clip
    notes: tuple[str, ...] = ()             # what was recognised, to be printed
    people: np.ndarray | None = None        # (n,) bytes: who is seen, where the data set tells
    fold: int = 1
    crop: tuple[float, float, float, float] = WHOLE  # what stage 1 sees of a frame
    data_root: Path | None = None           # of a set of the catalogue
    frames_as_images: bool = False          # one random frame of each video stands for an image (Table IV, row 5)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(bytes(self.names[index]))

    def subset(self, index: np.ndarray) -> "Samples":
        return replace(self, names=self.names[index], labels=self.labels[index],
                       people=None if self.people is None else self.people[index])

    def counts(self) -> list[int]:
        return np.bincount(self.labels, minlength=len(self.classes)).tolist()


# ------------------------------------------------------------------------------------------- which frames of a video

def pretrain_frames(n: int, frames: int, stride: int) -> list[int]:
    """Frame numbers of a stage-1 clip: every stride-th frame from a random start, the last repeated if n is short."""
    start = int(torch.randint(max(1, n - (frames - 1) * stride), ()))
    return pad(list(range(start, n, stride))[:frames], frames)


def train_frames(n: int, frames: int, stride: int) -> list[int]:
    """Frame numbers of a stage-2 training clip, as released. Of a long video a random window of frames * stride, spread
    evenly; of a shorter one n // stride numbers spread over all of it, then the last frame again and again. 16 at
    stride 4: of n = 30 frames 0 5 10 15 20 25 29 29 29 ..., of 20 frames 0 5 10 15 19 19 ..."""
    window = frames * stride
    if n > window:
        end = int(torch.randint(window, n, ()))
        numbers = np.linspace(end - window, end, frames).clip(max=end - 1)
    else:
        numbers = np.linspace(0, n, n // stride)
        numbers = np.append(numbers, [n] * (frames - len(numbers))).clip(max=n - 1)
    return numbers.astype(int).tolist()


def test_frames(n: int, frames: int, stride: int) -> list[int]:
    """Two clips per video, uniformly sampled (Section IV-B): the first and the last `frames` of every stride-th frame,
    joined."""
    every = pad(list(range(0, n, stride)), frames)
    return every[:frames] + every[-frames:]


def pad(numbers: list[int], length: int) -> list[int]:
    return numbers + numbers[-1:] * (length - len(numbers))


# ------------------------------------------------------------------------------------------------------ augmentation

def fit(stage: str, samples: Samples, pixels: int, strength: str = "paper") -> v2.Transform:
    """What every frame goes through as it is read, (3, h, w) -> (3, h', w'): nothing random, and from there on memory
    follows the model's frames, not the file's. stage, strength: as of `augmentation`."""
    if stage == "pretrain":                 # `augmentation` cuts a random part out, so only large frames shrink here
        return v2.Compose([partial(fixed_crop, box=samples.crop), partial(shrink, most=2 * pixels)])
    if stage == "finetune" and samples.modality == "image" and strength == "paper":
        pixels = pixels * 6 // 5            # 192 for 160
    return v2.Resize((pixels, pixels), antialias=True)


def augmentation(stage: str, modality: str, pixels: int, strength: str = "paper") -> v2.Transform:
    """uint8 (..., 3, h, w) -> uint8 (..., 3, pixels, pixels); one draw serves all frames of a clip.

    stage: "pretrain" or "finetune"; a test has none. strength, for "finetune": "paper", or "light" (flip only), for
    training that takes minutes instead of days.
    """
    if stage == "pretrain" and modality == "image":
        crop = v2.RandomResizedCrop(pixels, scale=(0.2, 1), interpolation=v2.InterpolationMode.BICUBIC)
        return v2.Compose([crop, v2.RandomHorizontalFlip()])
    if stage == "pretrain":
        # The released code resizes the short side to 192 before, which changes no crop's place: left out.
        return v2.RandomResizedCrop(pixels, scale=(0.08, 1))
    if strength == "light":
        return v2.RandomHorizontalFlip()
    if modality == "image":
        return v2.Compose([v2.RandomCrop(pixels), v2.RandomHorizontalFlip(), randaugment(2, 9),
                           v2.RandomErasing(p=0.25, value=0)])
    return v2.Compose([randaugment(4, 7), v2.RandomResizedCrop(pixels, scale=(0.08, 1)), v2.RandomHorizontalFlip(),
                       PixelErasing(p=0.25)])


def randaugment(operations: int, magnitude: int) -> v2.Transform:
    """'rand-m{magnitude}-n{operations}': magnitudes run to 10, each operation is applied with probability 1/2, and what
    a warp brings in from outside is grey. Released warps of clips are bicubic: torchvision has none for tensors."""
    one = v2.RandAugment(num_ops=1, magnitude=magnitude, num_magnitude_bins=11, fill=128,
                         interpolation=v2.InterpolationMode.BILINEAR)
    return v2.Compose([v2.RandomApply([one], p=0.5) for _ in range(operations)])


class PixelErasing(v2.RandomErasing):
    """Random erasing that fills in random pixels: normal ones, of ImageNet's mean and deviation, new in every frame."""

    def make_params(self, flat_inputs: list) -> dict:
        params, x = super().make_params(flat_inputs), flat_inputs[0]
        if params["v"] is not None:
            mean, std = (channel_values(values, x.device).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
            noise = torch.randn(*x.shape[:-2], params["h"], params["w"])
            params["v"] = (255 * (mean + std * noise)).clamp(0, 255).to(x.dtype)
        return params


def fixed_crop(x: torch.Tensor, box: tuple[float, float, float, float]) -> torch.Tensor:
    """A fixed part of a frame, as fractions (top, left, height, width) of its size."""
    (top, left, height, width), (h, w) = box, x.shape[-2:]
    return v2.functional.crop(x, round(top * h), round(left * w), round(height * h), round(width * w))


def shrink(x: torch.Tensor, most: int) -> torch.Tensor:
    """A frame whose short side is at most so many pixels."""
    return x if min(x.shape[-2:]) <= most else v2.functional.resize(x, [most], antialias=True)


def to_float(x: torch.Tensor) -> torch.Tensor:
    """uint8 images (B, 3, H, W) or clips (B, T, 3, H, W) -> normalised float, clips as (B, 3, T, H, W)."""
    mean, std = (255 * channel_values(values, x.device).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    x = x.float().sub_(mean).div_(std)
    return x if x.ndim == 4 else x.transpose(1, 2)


# ---------------------------------------------------------------------- single-source mini-batches, Section III-C

@dataclass
class Source:
    """One data set as training draws from it."""
    samples: Samples
    batch: int                              # samples of an optimiser step, over all processes
    micro: int                              # samples of a micro-batch
    share: float = 1.0                      # of the set that an epoch sees
    repeats: int = 1                        # differently augmented views of each sample that is read
    balanced: bool = False                  # draw classes equally often, with replacement

    def draw(self, rng: np.random.Generator) -> list[np.ndarray]:
        """The epoch's batches of sample numbers; a set smaller than a batch is one batch, other remainders are left."""
        n = len(self.samples)
        reads = max(1, round(self.share * n / self.repeats))
        if self.balanced:
            weight = 1 / np.maximum(self.samples.counts(), 1)[self.samples.labels]
            order = rng.choice(n, size=reads, p=weight / weight.sum())
        else:
            order = np.concatenate([rng.permutation(n) for _ in range(-(-reads // n))])[:reads]
        size = min(max(1, self.batch // self.repeats), reads)
        return [order[i * size:(i + 1) * size] for i in range(reads // size)]


@dataclass
class MicroBatch:
    """What one process computes at once. Its place in the epoch, not the process that holds it, seeds its draws."""
    modality: str                           # "image" or "video"
    epoch: int
    step: int                               # of the epoch
    place: int                              # of the step's micro-batches
    index: np.ndarray                       # sample numbers
    weight: float                           # share of the step's samples; 0 for a process that has none to compute
    last: bool                              # the process's last of this step
    seed: int                               # of frames, crops, masks, mixing and gate noise


def draw_seed(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def schedule_epoch(sources: dict[str, Source], seed: int, epoch: int) -> list[list[MicroBatch]]:
    """An epoch's optimiser steps, each of one source, in random order; the same for any number of processes."""
    rng = np.random.default_rng([seed, epoch])
    batches = {modality: source.draw(rng) for modality, source in sources.items()}
    order = rng.permutation([modality for modality, drawn in batches.items() for _ in drawn])
    steps = []
    for step, modality in enumerate(order.tolist()):
        index = batches[modality].pop()
        size = max(1, sources[modality].micro // sources[modality].repeats)
        parts = [index[i:i + size] for i in range(0, len(index), size)]
        steps.append([MicroBatch(modality, epoch, step, place, part, weight=len(part) / len(index), last=False,
                                 seed=draw_seed(seed, epoch, step, place)) for place, part in enumerate(parts)])
    return steps


class Schedule(torch.utils.data.Sampler):
    """This process's micro-batches from a given (epoch, step), `start`, to the end of training."""

    def __init__(self, sources: dict[str, Source], seed: int, epochs: int, rank: int, world: int,
                 start: tuple[int, int] = (0, 0)):
        self.sources, self.seed, self.epochs, self.rank, self.world, self.start = (
            sources, seed, epochs, rank, world, start)

    def steps_per_epoch(self) -> int:
        return len(schedule_epoch(self.sources, self.seed, 0))

    def __iter__(self):
        for epoch in range(self.start[0], self.epochs):
            steps = schedule_epoch(self.sources, self.seed, epoch)
            for step in steps[self.start[1] if epoch == self.start[0] else 0:]:
                # A process without a micro-batch repeats the first with weight 0: DDP waits for every process.
                mine = step[self.rank::self.world] or [replace(step[0], weight=0.0)]
                yield from mine[:-1]
                yield replace(mine[-1], last=True)


class TrainingData(torch.utils.data.Dataset):
    """Reads and augments whole micro-batches: data[micro_batch] -> (micro_batch, x uint8, labels, errors)."""

    def __init__(self, sources: dict[str, Source], stage: str, size: Size, strength: str = "paper"):
        self.sources, self.frames, self.pixels = sources, size.frames, size.pixels
        self.choose = pretrain_frames if stage == "pretrain" else train_frames
        self.fit = {m: fit(stage, source.samples, size.pixels, strength) for m, source in sources.items()}
        self.augment = {m: augmentation(stage, m, size.pixels, strength) for m in sources}

    def __getitem__(self, micro: MicroBatch):
        """x: (B, 3, H, W) or (B, T, 3, H, W) with `repeats` views of each sample in a row. Samples that cannot be
        read are left out and their errors returned; if none is left, a black one of weight 0 stands for them."""
        source = self.sources[micro.modality]
        views, labels, errors = [], [], []
        for i, index in enumerate(micro.index):
            torch.default_generator.manual_seed(draw_seed(micro.seed, i))   # torch.manual_seed, but faster
            try:
                x = self.read(source.samples, micro.modality, index)
            except UserError as error:
                errors.append(str(error))
                continue
            views += [self.augment[micro.modality](x) for _ in range(source.repeats)]
            labels += [int(source.samples.labels[index])] * source.repeats
        if not views:
            frames = () if micro.modality == "image" else (self.frames,)
            views, labels = [torch.zeros(*frames, 3, self.pixels, self.pixels, dtype=torch.uint8)], [0]
            micro = replace(micro, weight=0.0)
        x = torch.empty(len(views), *views[0].shape, dtype=torch.uint8)
        if torch.utils.data.get_worker_info():
            x.share_memory_()               # now: too little of it is an error here, later it would be none
        return micro, torch.stack(views, out=x), torch.tensor(labels), errors

    def read(self, samples: Samples, modality: str, index: int) -> torch.Tensor:
        path, fitted = samples.path(index), self.fit[modality]
        if samples.frames_as_images:
            return read_clip(path, lambda n: [int(torch.randint(n, ()))], fitted)[0]
        if modality == "image":
            return fitted(read_image(path))
        return read_clip(path, partial(self.choose, frames=self.frames, stride=samples.stride), fitted)


class TestData(torch.utils.data.Dataset):
    """Samples as evaluation sees them: data[i] -> (i, views uint8 (v, ...), label); an unreadable one is an error.

    fit: what every frame goes through as it is read, by default the resize to the model's size.
    """

    def __init__(self, samples: Samples, size: Size, fit: Callable | None = None):
        self.samples, self.frames = samples, size.frames
        self.fit = fit or v2.Resize((size.pixels, size.pixels), antialias=True)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        """views: (1, 3, H, W) of an image, (2, T, 3, H, W) of a video."""
        path = self.samples.path(index)
        if self.samples.modality == "image":
            views = self.fit(read_image(path))[None]
        else:
            choose = partial(test_frames, frames=self.frames, stride=self.samples.stride)
            views = read_clip(path, choose, self.fit).unflatten(0, (2, self.frames))
        return index, views, int(self.samples.labels[index])


def hold_out(samples: Samples, share: float, seed: int) -> tuple[Samples, Samples]:
    """Split off validation samples, the same share of each class: (rest, held out). UserError if one has none."""
    rng = np.random.default_rng([seed, len(samples)])
    held = np.zeros(len(samples), bool)
    for label in np.unique(samples.labels):
        of_class = rng.permutation(np.flatnonzero(samples.labels == label))
        held[of_class[:round(share * len(of_class))]] = True
    if held.all() or not held.any():
        raise UserError(f"--validation {share} of the {len(samples)} samples of {samples.name} leaves none to "
                        f"{'train on' if held.all() else 'hold out'}")
    return samples.subset(~held), samples.subset(held)


# ==================================================================================================================
# From here on loading processes and files: where data sets lie, lists, readers. On a first reading skip to pretrain.py.
# ==================================================================================================================

# ------------------------------------------------------------------------------------------------- loading processes

def loader(dataset, workers: int, **options) -> torch.utils.data.DataLoader:
    """A DataLoader whose batches come, or an error does."""
    return torch.utils.data.DataLoader(dataset, num_workers=workers, pin_memory=torch.cuda.is_available(),
                                       worker_init_fn=in_worker, **options)


def in_worker(worker: int) -> None:
    """Leave signals to the training process, which still needs its workers' batches, and die of a batch that cannot be
    handed over: the queue's thread would lose it, and everyone wait for ever."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    Queue._on_queue_feeder_error = lambda queue, error, batch: os._exit(1)


# ------------------------------------------------------------------------------------------------------- data sets

class Found(NamedTuple):
    """What a split holds. rows: of its list, labels as class names; or the names (n,) bytes of unlabelled files."""
    root: Path                              # folder that the names are relative to
    rows: "list[Row] | np.ndarray"
    notes: list[str]
    stride: int = 1


class DataSet(NamedTuple):
    """A data set. find(data_root, split, fold) -> Found is a function whose code is the layout of its files."""
    name: str
    modality: str
    classes: tuple[str, ...]                # in label order; none: unlabelled
    find: Callable
    folds: int = 1
    crop: tuple[float, float, float, float] = WHOLE  # what stage 1 sees of a frame


DFEW = ("happy", "sad", "neutral", "angry", "surprise", "disgust", "fear")
FERV39K = ("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise")
MAFW = ("anger", "anxiety", "contempt", "disappointment", "disgust", "fear", "happiness", "helplessness", "neutral",
        "sadness", "surprise")
AFFECTNET = ("neutral", "happy", "sad", "surprise", "fear", "disgust", "anger", "contempt")
VOXCELEB2_CROP = (0, 1 / 7, 5 / 7, 5 / 7)  # rows 0-160, columns 32-192 of 224 x 224, as released and in MAE-DFER
RAFDB = ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")


def dfew(root: Path, split: str, fold: int, stride: int = 4) -> Found:
    lists = {(s, f): f"DFEW/EmoLabel_DataSplit/{s}(single-labeled)/{s}_set_{f}.csv"
             for s in ("train", "test") for f in range(1, 6)}
    media, path = need(root, ["DFEW/clip_jpg_256", "DFEW/Clip/clip_224x224_16f"], [lists[split, fold]])
    # As its authors hand it out, labels count from 1, which the other lists help to tell.
    rows, notes = numbered(path, read_list(path), DFEW, [root / file for file in lists.values()])
    if media.name == "clip_224x224_16f":    # at stride 4 only 4 of them would be distinct
        stride, notes = 1, [*notes, f"{media}: 16 frames sampled by the data set's authors, so stride 1"]
    return Found(media, rows, notes, stride)


def ferv39k(root: Path, split: str, fold: int) -> Found:
    media, path = need(root, ["FERV39K/2_ClipsforFaceCrop"], [f"FERV39K/Annotation/{split}.csv"])
    return Found(media, *numbered(path, read_list(path), FERV39K), stride=1)


def mafw(root: Path, split: str, fold: int) -> Found:
    media, path = need(root, ["MAFW/frames_crop_align_224"], [f"MAFW/anno/single/no_caption/set_{fold}/{split}.csv"])
    return Found(media, *numbered(path, read_list(path), MAFW), stride=4)


def affectnet(root: Path, split: str, fold: int, classes: int) -> Found:
    """Its own csv also holds images of no class, which are left out."""
    own = {"train": "AffectNet/training.csv", "test": "AffectNet/validation.csv"}[split]
    media, path = need(root, ["AffectNet/Manually_Annotated_Images"], [
        f"AffectNet/{split}_affectnet{classes}.txt", f"AffectNet/{split}_affectnet{classes}_2w.txt", own])
    rows, notes = read_list(path), []
    if path.suffix == ".csv":
        others = dict(enumerate((*AFFECTNET, "none", "uncertain", "no face")[classes:], classes))
        count_of = {word: sum(row.label == str(label) for row in rows) for label, word in others.items()}
        notes = ["left out: " + ", ".join(f"{number} {word}" for word, number in count_of.items())]
        rows = [row for row in rows if row.label not in map(str, others)]
    rows, found = numbered(path, rows, AFFECTNET[:classes])
    return Found(media, rows, found + notes)


def synthetic_images(root: Path, split: str, fold: int) -> Found:
    found = affectnet(root / "synthetic", split, fold, classes=7)
    return found._replace(rows=[row._replace(person=row.name.split("/")[0]) for row in found.rows])


def rafdb(root: Path, split: str, fold: int) -> Found:
    """One list of train_... and test_..., whose images are stored as ..._aligned."""
    media, path = need(root, ["RAF-DB/basic/Image/aligned"], ["RAF-DB/basic/EmoLabel/list_patition_label.txt"])
    rows = [row._replace(name=row.name.replace(".", "_aligned.")) for row in read_list(path)
            if row.name.startswith(f"{split}_")]
    return Found(media, *numbered(path, rows, RAFDB, [path]))


def voxceleb2(root: Path, split: str, fold: int, stride: int = 4) -> Found:
    """Every video is a sample; a million are listed once, in files.txt beside them."""
    media, = need(root, ["VoxCeleb2/dev/mp4", "VoxCeleb2"])
    path = media / "files.txt"
    if path.is_file() and (names := path.read_bytes().splitlines()):
        return Found(media, np.array(names), [f"{path}: {len(names)} files, as listed then (delete it to list anew)"],
                     stride)
    names = list_videos(media)
    part = path.with_name(f"files.{os.getpid()}.part")  # several processes may do this at once
    try:
        part.write_bytes(b"\n".join(names))
        os.replace(part, path)
        note = f"{path}: {len(names)} files listed now"
    except OSError as error:
        note = f"{path} cannot be written, so that every start lists {media} anew: {error.strerror}"
        with suppress(OSError):
            part.unlink()
    return Found(media, np.array(names), [note], stride)


def list_videos(media: Path) -> list[bytes]:
    """VoxCeleb2's videos, id*/VIDEO/*.mp4, sorted. UserError if there are none, OSError for an unreadable folder."""
    def folders(path: Path) -> list[str]:
        return [entry.name for entry in os.scandir(path) if entry.is_dir()]

    files = (f"{person}/{video}/{file}" for person in folders(media) if person.startswith("id")
             for video in folders(media / person) for file in os.listdir(media / person / video)
             if file.endswith(".mp4"))
    names = sorted(map(os.fsencode, tqdm(files, f"listing {media}", unit=" videos")))
    if not names:
        raise UserError(f"{media} holds no file id*/*/*.mp4")
    return names


def own_data(root: Path, split: str, fold: int, files: tuple[Path, ...]) -> Found:
    """Lists with class names and with paths from the list's own folder."""
    if split == "test" and len(files) < 2:
        raise UserError(f"{files[0]} has no test file beside it: expected train.csv,test.csv")
    path, media = files[split == "test"], Path(os.path.commonpath([file.parent for file in files]))
    rows, classes = read_list(path, header=True), own_classes(files)
    for row in rows:
        if row.label not in classes and (row.label or classes):
            raise UserError(f"{path}, line {row.line}: class {row.label!r} does not occur in {files[0]}, which has "
                            f"{', '.join(classes) or 'no labels'}")
    folder = os.path.relpath(path.parent, media)
    rows = [row._replace(name=os.path.normpath(os.path.join(folder, row.name))) for row in rows]
    note = ", ".join(f"{i} {name}" for i, name in enumerate(classes)) or "no labels"
    return Found(media, rows, [f"{path}: {note}"], OWN_DATA_STRIDE)


def own_classes(files: tuple[Path, ...]) -> tuple[str, ...]:
    return tuple(sorted({row.label for row in read_list(files[0], header=True)} - {""}))


CATALOGUE = {dataset.name: dataset for dataset in (
    DataSet("dfew", "video", DFEW, dfew, folds=5),
    DataSet("ferv39k", "video", FERV39K, ferv39k),
    DataSet("mafw", "video", MAFW, mafw, folds=5),
    DataSet("affectnet-7", "image", AFFECTNET[:7], partial(affectnet, classes=7)),
    DataSet("affectnet-8", "image", AFFECTNET, partial(affectnet, classes=8)),
    DataSet("rafdb", "image", RAFDB, rafdb),
    DataSet("voxceleb2", "video", (), voxceleb2, crop=VOXCELEB2_CROP),
    # Drawn by tests/faces.py, in the same layouts
    DataSet("synthetic", "video", DFEW, lambda root, *split: dfew(root / "synthetic", *split, stride=2), folds=5),
    DataSet("synthetic-images", "image", AFFECTNET[:7], synthetic_images),
    DataSet("synthetic-unlabelled", "video", (), lambda root, *split: voxceleb2(root / "synthetic", *split, stride=2),
            crop=VOXCELEB2_CROP),
)}
OWN_DATA_STRIDE = 4                         # of clips: a window of 2.6 seconds at 25 frames per second, as for DFEW
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts")


def catalogue(name: str) -> DataSet:
    """The data set of that name, or one's own: "train.csv,test.csv" or "train.csv". UserError if there is none."""
    if name in CATALOGUE:
        return CATALOGUE[name]
    if not name.lower().endswith(".csv"):
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(CATALOGUE)}, or train.csv,test.csv")
    files = tuple(Path(os.path.abspath(file)) for file in name.split(","))
    if len(files) > 2:
        raise UserError(f"{name}: expected train.csv,test.csv or train.csv, not {len(files)} files")
    shown = {}                              # whether it is a clip: an example
    for file in files:
        shown |= {shows_clip(file.parent / row.name): row.name for row in read_list(file, header=True)}
    if len(shown) > 1:
        raise UserError(f"{name} lists images ({shown[False]}) and clips ({shown[True]}): make two data sets of them")
    return DataSet(",".join(map(str, files)), "video" if True in shown else "image", own_classes(files),
                   partial(own_data, files=files))


def short_name(name: str) -> str:
    """A data set's name for folders: of one's own data, the training file's without .csv."""
    return Path(name.split(",")[0]).stem


def dataset_name(modality: str | None = None, labelled: bool = False, others: tuple[str, ...] = ()):
    """A type for argparse: a data set of that modality, with classes if `labelled`, or one of the words in `others`."""
    def check(name: str) -> str:
        try:
            dataset = None if name in others else catalogue(name)
        except (UserError, OSError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        if dataset and (modality not in (None, dataset.modality) or labelled and not dataset.classes):
            raise argparse.ArgumentTypeError(
                f"{name} holds {dataset.modality}s {'with' if dataset.classes else 'without'} labels: expected "
                f"{modality}s{' with labels' if labelled else ''}, or {' or '.join(others)}")
        return dataset.name if dataset else name
    return check


def find_samples(name: str, data_root: Path, split: str, fold: int = 1,
                 stride: int | None = None) -> tuple[Samples, np.ndarray]:
    """What a data set's "train" or "test" split lists, and which of it is there (n,) bool. UserError where the lists
    or the folder are missing or odd."""
    dataset = catalogue(name)
    if not 1 <= fold <= dataset.folds:
        raise UserError(f"fold {fold} of {name}: expected 1 to {dataset.folds}")
    found = dataset.find(Path(data_root), split, fold)
    notes = found.notes
    if dataset.modality == "video" and stride not in (None, found.stride):
        notes = [*notes, f"stride {stride} as given; the set's own is {found.stride}"]
    own_stride = 1 if dataset.modality == "image" else stride or found.stride
    if isinstance(found.rows, np.ndarray):
        names, there, labels, people = found.rows, np.ones(len(found.rows), bool), np.full(len(found.rows), -1), None
    else:
        located, there = locate(found.root, [row.name for row in found.rows], dataset.modality)
        names, number = np.array([os.fsencode(n) for n in located]), {c: i for i, c in enumerate(dataset.classes)}
        labels = np.array([number.get(row.label, -1) for row in found.rows])
        people = np.array([row.person.encode() for row in found.rows]) if found.rows[0].person else None
    return Samples(dataset.name, dataset.modality, dataset.classes, found.root, names, labels, own_stride,
                   tuple(notes), people, fold, dataset.crop, Path(data_root) if name in CATALOGUE else None), there


def load_samples(name: str, data_root: Path, split: str, fold: int = 1, stride: int | None = None) -> Samples:
    """All samples of a data set's "train" or "test" split, with its own stride or another. UserError if anything that
    it needs is missing or odd."""
    samples, there = find_samples(name, data_root, split, fold, stride)
    if not there.all():
        forms = " as a folder of frames, .mp4, .avi, .gif or .webp" if samples.modality == "video" else ""
        raise UserError(f"of {len(samples)} samples of {name}, {split}, fold {fold}, not in {samples.root}{forms}: "
                        f"{few(samples.names[~there])} ({'; '.join(samples.notes)})")
    return samples


def digests_of(samples: Samples) -> np.ndarray:
    """(n,) int64, sorted: a hash of each sample, by which a checkpoint remembers what it was trained on. It is of the
    path below the data root, or of the absolute one of one's own data, whatever their list is called."""
    root, data_root = samples.root, samples.data_root
    place = os.path.realpath(root) if data_root is None else os.path.relpath(root, data_root)
    hashes = [hashlib.blake2b(os.fsencode(f"{place}/") + name, digest_size=8).digest()
              for name in samples.names.tolist()]
    return np.sort(np.frombuffer(b"".join(hashes), np.int64))


def identity_of(samples: Samples) -> str:
    """What a checkpoint says of its data: the same names and labels in the same order give the same text."""
    rows = b"\n".join(b"%s,%d" % row for row in zip(samples.names.tolist(), samples.labels.tolist()))
    return (f"{samples.name}, fold {samples.fold}, stride {samples.stride}: {len(samples)} samples, fingerprint "
            f"{hashlib.blake2b(rows, digest_size=8).hexdigest()}")


def few(items) -> str:
    """How many there are, and the first of them."""
    items = [os.fsdecode(item) for item in items]
    return f"{len(items)}: {', '.join(items[:3])}{', ...' if len(items) > 3 else ''}"


def need(root: Path, *wanted: list[str]) -> list[Path]:
    """Of each list of paths the first that is there. UserError names all of them if one has none."""
    found = [next((root / path for path in paths if (root / path).exists()), None) for paths in wanted]
    if None in found:
        lacking = " and ".join(" or ".join(str(root / path) for path in paths) for paths in wanted)
        raise UserError(f"below --data-root there must be {lacking}: not all are there. The drawn faces (--dataset "
                        "synthetic) need no download: python tests/faces.py")
    return found


# ----------------------------------------------------------------------------------------------------------- lists

class Row(NamedTuple):
    """A line of a list; label and person are "" where it has no such column."""
    line: int
    name: str
    label: str = ""
    person: str = ""


COLUMNS = {"path": "name", "video_name": "name", "subdirectory_filepath": "name", "label": "label", "labels": "label",
           "id": "label", "expression": "label", "person": "person"}  # header words that occur


def read_list(path: Path, header: bool = False) -> list[Row]:
    """The lines of a list: .csv of name,label or with a header line of COLUMNS, or .txt of "name label".

    header: one is required. UserError where the file cannot be read or is empty, and where a line is no such line or
    leads out of the folder. A line of csv is a sample: a quote does not span lines.
    """
    comma, table = path.suffix.lower() == ".csv", []
    if not path.is_file():
        raise UserError(f"{path} is {'no file' if path.exists() else 'not there'}: expected a list of samples")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        for number, line in enumerate(lines, 1):
            fields = next(csv.reader([line], strict=True), []) if comma else line.rsplit(None, 1)
            if any(fields := [field.strip() for field in fields]):
                table.append((number, fields))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no list in UTF-8: {error}") from error
    except csv.Error as error:
        raise UserError(f"{path}, line {number}: {line.strip()!r}: {error}") from error
    named = [COLUMNS.get(field.lower()) for field in table[0][1]] if table else []
    columns, width = {column: i for i, column in enumerate(named) if column}, len(named)
    if columns and ("name" not in columns or len(columns) < width - named.count(None)) or header and not columns:
        raise UserError(f"{path}, line {table[0][0] if table else 1}: expected a header with one column of names and "
                        "at most one of labels and of people; the words for them are "
                        + ", ".join(f"{word} ({column})" for word, column in COLUMNS.items())
                        + (f"; found {', '.join(table[0][1])}" if table else ""))
    if columns:
        table = table[1:]
    else:
        columns, width = {"name": 0, "label": 1}, 2
    if not table:
        raise UserError(f"{path} holds no samples: expected lines of name{',' if comma else ' '}label")
    for number, fields in table:
        if len(fields) != width or not all(fields[i] for i in columns.values()):
            raise UserError(f"{path}, line {number}: {lines[number - 1].strip()!r}: expected {' and '.join(columns)}"
                            f"{f' in a line of {width} columns' if comma else ''}")
        name = fields[columns["name"]]
        if name.startswith("/") or ".." in name.split("/") or "\0" in name:
            raise UserError(f"{path}, line {number}: {name!r} is no path below the data folder")
    return [Row(number, **{column: fields[i] for column, i in columns.items()}) for number, fields in table]


def numbered(path: Path, rows: list[Row], classes: tuple[str, ...],
             counted: list[Path] = ()) -> tuple[list[Row], list[str]]:
    """Rows whose labels are numbers -> rows whose labels are class names, and a note on what was found.

    counted: all lists of a set that occurs with labels from 0 and from 1, which they tell together: one fold need not
    hold the lowest or the highest label. UserError for a label that is no number or out of range.
    """
    def number(row: Row, path: Path) -> int:
        if not re.fullmatch(r"[+-]?\d{1,9}", row.label):
            raise UserError(f"{path}, line {row.line}: {row.name!r} has the label {row.label!r}, no whole number")
        return int(row.label)

    if not rows:
        raise UserError(f"{path} holds no samples of the split")
    n, labels = len(classes), [number(row, path) for row in rows]
    everywhere = labels + [number(row, other) for other in counted if other.is_file() for row in read_list(other)]
    low, high, first = min(everywhere), max(everywhere), 0
    note = f"{path}: labels run from {min(labels)} to {max(labels)}"
    if counted and 1 <= low and high <= n:
        if high < n:
            raise UserError(f"{note}, and in all lists that are there from {low} to {high}: neither 0 nor {n} occurs, "
                            "so they may count from 0 or from 1; put the data set's other lists there")
        first, note = 1, f"{note}: counted from 1, mapped to 0 to {n - 1}"
    for label in labels:
        if not 0 <= label - first < n:
            raise UserError(f"{path}: label {label} is out of range: {n} classes have labels 0 to {n - 1} "
                            f"({', '.join(f'{i} {c}' for i, c in enumerate(classes))})"
                            + ("; they seem to be counted from 1: subtract 1" if (low, high) == (1, n) else ""))
    return [row._replace(label=classes[label - first]) for row, label in zip(rows, labels)], [note]


def locate(root: Path, names: list[str], modality: str) -> tuple[list[str], np.ndarray]:
    """The files or folders that names stand for, and whether they are there (n,) bool; others keep their names.

    Clips: a folder of frames, or a video in its place; numbers with or without leading zeros. Each folder is listed
    once: asking for hundreds of thousands of files one by one takes minutes on a network disk.
    """
    @cache
    def entries(folder: str) -> frozenset[str]:
        try:
            return frozenset(os.listdir(root / folder))
        except (FileNotFoundError, NotADirectoryError):
            return frozenset()

    def find(name: str) -> str | None:
        folder, slash, file = name.rpartition("/")
        spellings, suffixes = [file], [""]
        if modality == "video":
            suffixes = ["", ".mp4", ".avi", ".gif", ".webp"]
            spellings += [file.zfill(5), file.lstrip("0") or "0"] if file.isdecimal() else []
        return next((folder + slash + spelling + suffix for spelling in spellings for suffix in suffixes
                     if spelling + suffix in entries(folder)), None)

    found = [find(name) for name in names]
    return [path or name for path, name in zip(found, names)], np.array([path is not None for path in found], bool)


def natural(name: str) -> list:
    """Sort key that puts frame 2 before frame 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


# --------------------------------------------------------------------------------------------------------- readers

UNREADABLE = (OSError, ValueError, SyntaxError, LookupError, TypeError, struct.error, Image.DecompressionBombError)


def read_image(path: Path) -> torch.Tensor:
    """An image as uint8 (3, H, W), upright. Its content, not its name, tells the format; of an animation the first.
    UserError names a file that cannot be read."""
    need_file(path)
    try:
        with Image.open(path) as image:
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode == "F":
                raise ValueError("pixels of floating point have no agreed range: expected 8 or 16 bits")
            if image.mode.startswith("I"):  # 16-bit grey, which `convert` would clip instead of scale
                image = Image.fromarray((np.array(image) // 257).astype(np.uint8))
            return as_tensor(image)
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error


def as_tensor(image: Image.Image) -> torch.Tensor:
    """uint8 (3, H, W), in memory channel last, which resizes fast."""
    rgb = image if image.mode == "RGB" else image.convert("RGB")  # which would copy
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def need_file(path: Path) -> None:
    """UserError for what is no regular file: reading a pipe would wait for ever."""
    if not os.path.isfile(path):
        raise UserError(f"{path} is {'no file' if os.path.exists(path) else 'not there'}: expected an image or a video")


def is_animated(path: Path) -> bool:
    """Whether a file is a GIF or WebP of several frames."""
    if path.suffix.lower() not in (".gif", ".webp") or not os.path.isfile(path):
        return False
    try:
        with Image.open(path) as image:
            return getattr(image, "n_frames", 1) > 1
    except UNREADABLE:                      # whoever reads it will say so
        return False


def shows_clip(path: Path) -> bool:
    """Whether a path stands for a clip (a video, an animation, or else a folder of frames), not for an image."""
    return path.suffix.lower() not in IMAGE_SUFFIXES or is_animated(path)


def read_clip(path: Path, choose: Callable, each: Callable = lambda frame: frame) -> torch.Tensor:
    """Some frames of a video file, an animated GIF or WebP or a folder of frames, uint8 (T, 3, H, W).

    choose: a function from the number of frames n to the T frame numbers wanted, in any order, repeats allowed. each:
    what every frame, (3, h, w), goes through as it is decoded. UserError names a file that cannot be decoded or has
    fewer frames than it says.
    """
    sizes = set()

    def fitted(frame: torch.Tensor) -> torch.Tensor:
        sizes.add(tuple(frame.shape[1:]))
        return each(frame)

    if os.path.isdir(path):
        wanted, frames = read_folder(path, choose, fitted)
    else:
        need_file(path)
        wanted, frames = (read_animation if is_animated(path) else read_video)(path, choose, fitted)
    if len(sizes) > 1:
        raise UserError(f"{path}: frames of different sizes (height, width): {sorted(sizes)}. A folder of images is "
                        "one clip: photographs are given one by one")
    return torch.stack([frames[i].permute(1, 2, 0) for i in wanted]).permute(0, 3, 1, 2)  # channels last: resizes fast


def read_folder(path: Path, choose: Callable, each: Callable) -> tuple[list[int], dict[int, torch.Tensor]]:
    """The frame numbers chosen, and those frames, uint8 (3, h, w), of a folder."""
    try:
        files = sorted((f for f in os.listdir(path) if f.lower().endswith(IMAGE_SUFFIXES) and not f.startswith(".")),
                       key=natural)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not files:
        raise UserError(f"{path} holds no frames ({', '.join(IMAGE_SUFFIXES)})")
    wanted = choose(len(files))
    return wanted, {i: each(read_image(path / files[i])) for i in set(wanted)}


def read_animation(path: Path, choose: Callable, each: Callable) -> tuple[list[int], dict[int, torch.Tensor]]:
    """The same of an animated GIF or WebP."""
    try:
        with Image.open(path) as image:
            wanted, frames = choose(image.n_frames), {}
            for i in sorted(set(wanted)):
                image.seek(i)
                frames[i] = each(as_tensor(image))
            return wanted, frames
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read as an animation: {error}") from error


def read_video(path: Path, choose: Callable, each: Callable) -> tuple[list[int], dict[int, torch.Tensor]]:
    """The same of a video file. Its packets are read twice, first for their times: held, they would fill memory."""
    try:
        with open_video(path) as container:
            stream = container.streams.video[0]
            length = path.stat().st_size
            if any(entry.pos + entry.size > length for entry in stream.index_entries):
                raise UserError(f"{path} is truncated: its index lists frames beyond the end of the file")
            packets = [(p.pts, p.is_keyframe, p.is_discard) for p in container.demux(stream) if p.size]
            timed = container.format.name.startswith(("mov,", "matroska"))
        # Counted, not as declared; trimming without re-encoding leaves packets that are not to be shown.
        times = [time for time, _, discarded in packets if not discarded]
        wanted = choose(len(times)) if times else []
        number = {}                         # of each frame by its time; empty where times cannot tell (AVI has none)
        if timed and None not in times and len(set(times)) == len(times):
            number = {time: i for i, time in enumerate(sorted(times))}
        first, frames = min((time for time, i in number.items() if i in wanted), default=None), {}
        keys = [i for i, (time, key, _) in enumerate(packets) if number and key and (time or 0) <= first]
        if keys:                            # from the last key frame on, all that is shown later can be decoded
            frames = decode(path, keys[-1], set(wanted), number, each)
        if len(frames) < len(set(wanted)):
            frames = decode(path, None, set(wanted), number, each)
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"{path} cannot be decoded: {error}") from error
    missing = set(wanted) - frames.keys()
    if missing or not wanted:
        reason = f"frame {min(missing)} of {len(times)} cannot be decoded" if missing else "it has no frames"
        raise UserError(f"{path} is truncated: {reason}")
    return wanted, frames


def open_video(path: Path) -> av.container.InputContainer:
    container = av.open(os.path.abspath(path), metadata_errors="ignore")  # FFmpeg takes a:b.mp4 for a URL
    if not container.streams.video or container.streams.video[0].codec_context is None:
        raise UserError(f"{path} has no video stream of a known kind")
    container.streams.video[0].thread_count = 1  # loading processes run side by side already
    return container


def decode(path: Path, start: int | None, wanted: set[int], number: dict[int, int],
           each: Callable) -> dict[int, torch.Tensor]:
    """Wanted frames by their number, uint8 (3, h, w), upright.

    start: the packet to begin with, and then what is neither wanted nor serves to predict other frames is not decoded;
    None: everything is. number: frame numbers by time; where it is empty, frames are counted.
    """
    frames, counted, to_rgb = {}, count(), VideoReformatter()  # one reformatter keeps its tables
    with open_video(path) as container:
        codec = container.streams.video[0].codec_context
        packets = (packet for packet in container.demux(video=0) if packet.size)
        for packet in chain(islice(packets, start or 0, None), [None]):  # None: what the decoder still holds
            if packet:
                skipped = start is not None and number.get(packet.pts) not in wanted
                codec.skip_frame = "NONREF" if skipped else "DEFAULT"
            for frame in codec.decode(packet):
                i = number.get(frame.pts) if number else next(counted)
                if i in wanted:             # only these become RGB
                    rgb = torch.from_numpy(to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray())
                    frames[i] = each(torch.rot90(rgb, round(frame.rotation / 90)).permute(2, 0, 1))
            if len(frames) == len(wanted):
                break
    return frames
