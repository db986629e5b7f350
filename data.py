"""Files, sampling and batches: which samples there are, what training draws from them at random,
and how mini-batches of one source each are interleaved.

After `Samples`, a list of samples, it reads from the method to the files: `train_frames` and its
neighbours choose the frames of a clip, `augmentation` is what training does to them,
`schedule_epoch` draws an epoch's steps. Below the line of '=' follows what can be skipped: loading
processes, data sets, lists, readers.

B batch    T frames of a clip    H x W pixels    n samples, or frames of a video    v views of one
"""
import csv
import hashlib
import math
import os
import posixpath
import re
import signal
import struct
import unicodedata
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from glob import iglob
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps
from torchvision.transforms import v2
from tqdm import tqdm

from model import IMAGE_MEAN, IMAGE_STD, Size, UserError, channel_values


@dataclass
class Samples:
    """The samples of one split. Names are bytes in one numpy array, which forked loading processes
    share; in them folders are separated by "/" on every system."""
    name: str                               # of the data set
    modality: str                           # "image" or "video"
    classes: tuple[str, ...]                # in label order; none where there are no labels
    root: Path                              # folder that the names are relative to
    names: np.ndarray                       # (n,) bytes: image files, videos or folders of frames
    labels: np.ndarray                      # (n,) int64, -1 where there are none
    stride: int = 1                         # of the frames of a clip
    rate: float | None = None               # frames a second that stride counts; None: the file's
    people: np.ndarray | None = None        # (n,) bytes: who is seen, where that is known
    fold: int = 1
    title: str = ""                         # of a report
    box: tuple[int, int, int, int] | None = None        # of every frame: left, top, width, height
    notes: list[str] = field(default_factory=list)      # what was recognised, to be printed
    frames_as_images: bool = False          # a random frame stands for an image (Table IV, row 5)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(bytes(self.names[index]))

    def subset(self, index: np.ndarray) -> "Samples":
        people = None if self.people is None else self.people[index]
        return replace(self, names=self.names[index], labels=self.labels[index], people=people)

    def counts(self) -> list[int]:
        return np.bincount(self.labels, minlength=len(self.classes)).tolist()

    def fingerprint(self) -> str:
        """What a checkpoint says of its data: the same names and labels in the same order give the
        same text, whatever they are called and wherever they lie."""
        names = self.names.tolist()
        common = os.path.commonprefix(names).rfind(b"/") + 1
        lines = [b"%s,%d" % (name[common:], label) for name, label in zip(names, self.labels)]
        digest = hashlib.blake2b(b"\n".join(lines), digest_size=8).hexdigest()
        return (f"fold {self.fold}, stride {self.stride}: {len(names)} samples, fingerprint "
                f"{digest}")


# ------------------------------------------------------------------------ which frames of a video

def pretrain_frames(n: int, frames: int, stride: int) -> list[int]:
    """Frame numbers of a stage-1 clip: every stride-th frame from a random start, the last of them
    repeated if n is short."""
    start = int(torch.randint(max(1, n - (frames - 1) * stride), ()))
    return pad(list(range(start, n, stride))[:frames], frames)


def train_frames(n: int, frames: int, stride: int) -> list[int]:
    """Frame numbers of a stage-2 training clip, as released. If the video is longer than frames *
    stride: `frames` numbers, spread evenly over a random stretch of that length. Else: n // stride
    numbers, spread evenly over all of it, and then the last frame again and again. So 16 at stride
    4, of n = 30 frames: 0 5 10 15 20 25 29 29 29 ..."""
    window = frames * stride
    if n > window:
        end = int(torch.randint(window, n, ()))
        numbers = np.linspace(end - window, end, frames).clip(max=end - 1)
    else:
        numbers = np.linspace(0, n, n // stride)
        numbers = np.append(numbers, [n] * (frames - len(numbers))).clip(max=n - 1)
    return numbers.astype(int).tolist()


def test_frames(n: int, frames: int, stride: int) -> list[int]:
    """Frame numbers of a video's two test clips, uniformly sampled (Section IV-B): the first and
    the last `frames` of every stride-th frame, joined."""
    every = pad(list(range(0, n, stride)), frames)
    return every[:frames] + every[-frames:]


def pad(numbers: list[int], length: int) -> list[int]:
    return numbers + numbers[-1:] * (length - len(numbers))


# ----------------------------------------------------------------------------------- augmentation

def frame_transform(stage: str, modality: str, pixels: int, strength: str = "paper") -> Callable:
    """What every frame goes through as it is read, (3, h, w) -> (3, h', w'). Nothing random: large
    frames become small at once, to save memory. stage, strength: as of `augmentation`."""
    if stage == "pretrain":                 # `augmentation` crops: only large frames shrink here
        return partial(shrink, most=2 * pixels)
    if modality == "image" and strength == "paper":
        pixels = pixels * 6 // 5            # 192 for 160
    return v2.Resize((pixels, pixels), antialias=True)


def augmentation(stage: str, modality: str, pixels: int, strength: str = "paper") -> v2.Transform:
    """uint8 (..., 3, h, w) -> uint8 (..., 3, pixels, pixels); one draw serves all frames of a clip.
    stage: "pretrain" or "finetune". strength, of "finetune": "paper", or "light" (flip only), for
    training that takes minutes instead of days."""
    flip = v2.RandomHorizontalFlip()
    if stage == "pretrain" and modality == "image":
        bicubic = v2.InterpolationMode.BICUBIC
        crop = v2.RandomResizedCrop(pixels, scale=(0.2, 1), interpolation=bicubic)
        return v2.Compose([crop, flip])
    crop = v2.RandomResizedCrop(pixels, scale=(0.08, 1))
    if stage == "pretrain":
        # The released code resizes the short side to 192 before, which moves no crop: left out.
        return crop
    if strength == "light":
        return flip
    if modality == "image":
        erase = v2.RandomErasing(p=0.25, value=0)
        return v2.Compose([v2.RandomCrop(pixels), flip, randaugment(2, 9), erase])
    return v2.Compose([randaugment(4, 7), crop, flip, PixelErasing(p=0.25)])


def randaugment(operations: int, magnitude: int) -> v2.Transform:
    """'rand-m{magnitude}-n{operations}': magnitudes run to 10, each operation is applied with
    probability 1/2, and what a warp brings in from outside is grey. Released warps of clips are
    bicubic: torchvision has none for tensors."""
    one = v2.RandAugment(num_ops=1, magnitude=magnitude, num_magnitude_bins=11, fill=128,
                         interpolation=v2.InterpolationMode.BILINEAR)
    return v2.Compose([v2.RandomApply([one], p=0.5) for _ in range(operations)])


class PixelErasing(v2.RandomErasing):
    """Random erasing that fills in random pixels: normal ones, of ImageNet's mean and deviation,
    new in every frame."""

    def make_params(self, flat_inputs: list) -> dict:
        params = super().make_params(flat_inputs)
        x = flat_inputs[0]                                                  # (..., 3, H, W)
        if params["v"] is not None:
            mean = channel_values(IMAGE_MEAN, x.device).view(3, 1, 1)
            std = channel_values(IMAGE_STD, x.device).view(3, 1, 1)
            noise = torch.randn(*x.shape[:-2], params["h"], params["w"])
            pixels = 255 * (mean + std * noise)
            params["v"] = pixels.clamp(0, 255).to(x.dtype)
        return params


def boxed(x: torch.Tensor, box: tuple[int, int, int, int], path: Path) -> torch.Tensor:
    """The box (left, top, width, height), in pixels, of a frame of the file `path`. UserError if
    the frame does not hold it."""
    h, w = x.shape[-2:]
    left, top, width, height = box
    right = left + width
    bottom = top + height
    if right > w or bottom > h:
        raise UserError(f"{path}, {w} x {h} pixels, does not hold --crop {box} (x,y,width,height)")
    return x[..., top:bottom, left:right]


def shrink(x: torch.Tensor, most: int) -> torch.Tensor:
    """A frame whose short side is at most so many pixels."""
    if min(x.shape[-2:]) <= most:
        return x
    return v2.functional.resize(x, [most], antialias=True)


def to_float(x: torch.Tensor) -> torch.Tensor:
    """uint8 images (B, 3, H, W) or clips (B, T, 3, H, W) -> normalised float, clips as
    (B, 3, T, H, W)."""
    mean = 255 * channel_values(IMAGE_MEAN, x.device).view(3, 1, 1)
    std = 255 * channel_values(IMAGE_STD, x.device).view(3, 1, 1)
    x = x.float().sub_(mean).div_(std)
    return x if x.ndim == 4 else x.transpose(1, 2)


# ---------------------------------------------------- single-source mini-batches, Section III-C

@dataclass
class Source:
    """One data set as training draws from it."""
    samples: Samples
    batch: int                              # samples of an optimiser step, over all processes
    micro: int                              # samples of a micro-batch
    share: float = 1.0                      # of the set that an epoch sees
    repeats: int = 1                        # differently augmented views of each sample read
    balanced: bool = False                  # draw classes equally often, with replacement

    def draw(self, rng: np.random.Generator) -> list[np.ndarray]:
        """The epoch's batches of sample numbers. A set smaller than a batch is one batch; otherwise
        what does not fill a batch is left out."""
        n = len(self.samples)
        reads = max(1, round(self.share * n / self.repeats))
        if self.balanced:
            counts = np.maximum(self.samples.counts(), 1)
            weight = 1 / counts[self.samples.labels]
            order = rng.choice(n, size=reads, p=weight / weight.sum())
        else:
            passes = [rng.permutation(n) for _ in range(math.ceil(reads / n))]
            order = np.concatenate(passes)[:reads]
        size = min(max(1, self.batch // self.repeats), reads)
        return [order[i:i + size] for i in range(0, reads - size + 1, size)]


@dataclass
class MicroBatch:
    """What one process computes at once. Its place in the epoch seeds its draws, so that they do
    not depend on the process that holds it."""
    modality: str                           # "image" or "video"
    index: np.ndarray                       # sample numbers
    weight: float                           # share of the step's samples; 0: nothing to compute
    is_last: bool                           # of the process's micro-batches of this step
    seed: int                               # of frames, crops, masks, mixing and gate noise


def draw_seed(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def schedule_epoch(sources: dict[str, Source], seed: int, epoch: int) -> list[list[MicroBatch]]:
    """An epoch's optimiser steps, each of one source, in random order; the same for any number of
    processes."""
    rng = np.random.default_rng([seed, epoch])
    batches = {modality: source.draw(rng) for modality, source in sources.items()}
    order = []
    for modality, drawn in batches.items():
        order += [modality] * len(drawn)
    steps = []
    for step, modality in enumerate(rng.permutation(order).tolist()):
        index = batches[modality].pop()
        size = max(1, sources[modality].micro // sources[modality].repeats)
        micros = []
        for place, start in enumerate(range(0, len(index), size)):
            part = index[start:start + size]
            micros.append(MicroBatch(modality, part, weight=len(part) / len(index), is_last=False,
                                     seed=draw_seed(seed, epoch, step, place)))
        steps.append(micros)
    return steps


def deal(sources: dict[str, Source], seed: int, epochs: int, rank: int, world: int,
         first_epoch: int, first_step: int) -> Iterator[MicroBatch]:
    """The micro-batches of process `rank` of `world`, from a step of an epoch to the last epoch."""
    for epoch in range(first_epoch, epochs):
        steps = schedule_epoch(sources, seed, epoch)
        if epoch == first_epoch:
            steps = steps[first_step:]
        for step in steps:
            mine = step[rank::world]
            if not mine:                    # DDP waits for every process: compute one for nothing
                mine = [replace(step[0], weight=0.0)]
            yield from mine[:-1]
            yield replace(mine[-1], is_last=True)


class TrainingData(torch.utils.data.Dataset):
    """Whole micro-batches: data[micro_batch] -> (micro_batch, x uint8, labels, errors)."""

    def __init__(self, sources: dict[str, Source], stage: str, size: Size, strength: str = "paper"):
        self.sources = sources
        self.size = size
        self.which_frames = {}              # of a video
        self.transform = {}                 # of a frame, as it is read
        self.augment = {}                   # of an image or a clip
        choose = pretrain_frames if stage == "pretrain" else train_frames
        for m, source in sources.items():
            stride = source.samples.stride
            frames = 1 if source.samples.frames_as_images else size.frames
            self.which_frames[m] = partial(choose, frames=frames, stride=stride)
            self.transform[m] = frame_transform(stage, m, size.pixels, strength)
            self.augment[m] = augmentation(stage, m, size.pixels, strength)

    def __getitem__(self, micro: MicroBatch):
        """x: (B, 3, H, W) or (B, T, 3, H, W) with `repeats` views of each sample in a row. Samples
        that cannot be read are left out and their errors returned; if none is left, a black one of
        weight 0 stands for them."""
        m, source = micro.modality, self.sources[micro.modality]
        views, labels, errors = [], [], []
        for i, index in enumerate(micro.index):
            seed = draw_seed(micro.seed, i)
            torch.default_generator.manual_seed(seed)           # torch.manual_seed, but faster
            try:
                x = self.read(source.samples, m, index)
            except UserError as error:
                errors.append(str(error))
                continue
            for _ in range(source.repeats):
                views.append(self.augment[m](x))
                labels.append(int(source.samples.labels[index]))
        if not views:
            frames = [self.size.frames] if m == "video" else []
            shape = *frames, 3, self.size.pixels, self.size.pixels
            views.append(torch.zeros(shape, dtype=torch.uint8))
            labels.append(0)
            micro = replace(micro, weight=0.0)
        x = torch.empty(len(views), *views[0].shape, dtype=torch.uint8)
        if torch.utils.data.get_worker_info():
            x.share_memory_()               # too little is an error here, later it would be none
        return micro, torch.stack(views, out=x), torch.tensor(labels), errors

    def read(self, samples: Samples, modality: str, index: int) -> torch.Tensor:
        return read_sample(samples, index, self.transform[modality], self.which_frames[modality])


class TestData(torch.utils.data.Dataset):
    """Samples as evaluation sees them: data[i] -> (i, views uint8 (v, ...), label). UserError for a
    sample that cannot be read."""

    def __init__(self, samples: Samples, size: Size):
        self.samples = samples
        self.frames = size.frames
        self.which_frames = partial(test_frames, frames=size.frames, stride=samples.stride)
        self.transform = v2.Resize((size.pixels, size.pixels), antialias=True)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        """views: (1, 3, H, W) of an image, (2, T, 3, H, W) of a video, its two clips."""
        x = read_sample(self.samples, index, self.transform, self.which_frames)
        is_image = self.samples.modality == "image"
        views = x[None] if is_image else x.unflatten(0, (-1, self.frames))
        return index, views, int(self.samples.labels[index])


def read_sample(samples: Samples, index: int, transform: Callable,
                which_frames: Callable) -> torch.Tensor:
    """An image (3, h, w), or frames of a video (T, 3, h, w), uint8, each frame cut to samples.box
    and transformed. which_frames(n): the frames wanted of n, at the samples' frames a second."""
    path = samples.path(index)
    if samples.box:
        transform = v2.Compose([partial(boxed, box=samples.box, path=path), transform])
    if samples.modality == "image" and not samples.frames_as_images:
        return transform(read_image(path))
    clip = open_clip(path)
    if clip is None:
        raise UserError(f"{path} is a picture: expected a clip")
    numbers = resampled(which_frames, clip.n, clip.rate, samples.rate)
    frames = read_clip(clip, numbers, transform)
    return frames[0] if samples.frames_as_images else frames


def resampled(which_frames: Callable, n: int, rate: float | None,
              wanted_rate: float | None) -> list[int]:
    """Frame numbers as `which_frames`, a function of the number of frames alone, chooses them in a
    clip of `wanted_rate` frames a second, mapped to one of n frames at `rate`, if that is known."""
    if None in (rate, wanted_rate) or rate == wanted_rate:
        return which_frames(n)
    step = rate / wanted_rate
    numbers = []
    for number in which_frames(max(1, round(n / step))):
        numbers.append(min(int(number * step + 0.5), n - 1))
    return numbers


def frame_rate(samples: Samples) -> float:
    """Frames a second of training clips: of the first one, or 25 where its file does not tell."""
    if samples.rate:
        return samples.rate
    with suppress(UserError):               # training names what cannot be read
        clip = open_clip(samples.path(0))
        if clip and clip.rate:
            return clip.rate
    return OWN_DATA_RATE


def hold_out(samples: Samples, share: float, seed: int) -> tuple[Samples, Samples]:
    """Split off a share of the people, where they are known, or else of the samples of each class:
    (rest, held out). UserError if one of the two is empty."""
    rng = np.random.default_rng([seed, len(samples)])
    if samples.people is not None:
        people = rng.permutation(np.unique(samples.people))
        held = np.isin(samples.people, people[:round(share * len(people))])
    else:
        held = np.zeros(len(samples), bool)
        for label in np.unique(samples.labels):
            of_class = rng.permutation(np.flatnonzero(samples.labels == label))
            held[of_class[:round(share * len(of_class))]] = True
    if held.all() or not held.any():
        raise UserError(f"{share} of the {len(samples)} samples of {samples.name} leaves none to "
                        "hold out or none to train on")
    return samples.subset(~held), samples.subset(held)


def overlap(train: Samples, test: Samples) -> str:
    """Samples and people that are in both, in words; "" if there are none."""
    found = []
    known = {os.path.abspath(train.path(i)) for i in range(len(train))}
    paths = [os.path.abspath(test.path(i)) for i in range(len(test))]
    paths = [path for path in paths if path in known]
    if paths:
        found.append(f"samples in both train and test of {test.name}: {shortened(paths)}")
    if train.people is not None and test.people is not None:
        people = np.intersect1d(train.people, test.people).tolist()
        if people:
            found.append(f"people in both train and test of {test.name}: {shortened(people)}")
    return "; ".join(found)


# ==================================================================================================
# From here on loading processes and files: data sets, lists, readers. Skip to pretrain.py at first.

def loader(dataset, workers: int, **options) -> torch.utils.data.DataLoader:
    """A DataLoader that ends in an error instead of hanging."""
    return torch.utils.data.DataLoader(dataset, num_workers=workers, worker_init_fn=in_worker,
                                       pin_memory=torch.cuda.is_available(), **options)


def in_worker(worker: int) -> None:
    """Ignore signals, as training still needs this process's batches. If a batch does not fit into
    shared memory, die: torch's own thread would drop it, and training wait for ever."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    Queue._on_queue_feeder_error = lambda queue, error, batch: os._exit(1)


# -------------------------------------------------------------------------------------- data sets

class DataSet(NamedTuple):
    """Where a data set lies below --data-root. In the paths of lists {split} stands for train or
    test, {subset} for training or validation, and {fold} for 1 to `folds`."""
    name: str
    modality: str
    classes: tuple[str, ...]                # in label order; none: unlabelled
    folder: str                             # that the names in the lists are relative to
    lists: tuple[str, ...]                  # of which the first is taken that is there
    folds: int = 1
    stride: int = 1                         # of the frames of a clip
    box: tuple[int, int, int, int] | None = None        # of every frame: left, top, width, height
    labels_from_1: bool = False             # as the set is handed out; from 0 is met, too
    left_out: tuple[str, ...] = ()          # labels of other classes in its own .csv
    part: str = ""                          # what the split's names begin with, in a list of both
    file: str = "{stem}{suffix}"            # a sample's, from its name in the list


DFEW = ("happy", "sad", "neutral", "angry", "surprise", "disgust", "fear")
DFEW_LISTS = ("DFEW/EmoLabel_DataSplit/{split}(single-labeled)/{split}_set_{fold}.csv",)
FERV39K = ("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise")
MAFW = ("anger", "anxiety", "contempt", "disappointment", "disgust", "fear", "happiness",
        "helplessness", "neutral", "sadness", "surprise")
AFFECTNET = ("neutral", "happy", "sad", "surprise", "fear", "disgust", "anger", "contempt")
RAFDB = ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")

CATALOGUE = {dataset.name: dataset for dataset in (
    DataSet("dfew", "video", DFEW, "DFEW/clip_jpg_256", DFEW_LISTS, folds=5, stride=4,
            labels_from_1=True),
    # 16 frames of each clip, sampled by its authors: at stride 4 only 4 of them would be distinct
    DataSet("dfew-16f", "video", DFEW, "DFEW/Clip/clip_224x224_16f", DFEW_LISTS, folds=5,
            labels_from_1=True),
    DataSet("ferv39k", "video", FERV39K, "FERV39K/2_ClipsforFaceCrop",
            ("FERV39K/Annotation/{split}.csv",)),
    DataSet("mafw", "video", MAFW, "MAFW/frames_crop_align_224",
            ("MAFW/anno/single/no_caption/set_{fold}/{split}.csv",), folds=5, stride=4),
    DataSet("affectnet-7", "image", AFFECTNET[:7], "AffectNet/Manually_Annotated_Images",
            ("AffectNet/{split}_affectnet7.txt", "AffectNet/{split}_affectnet7_2w.txt",
             "AffectNet/{subset}.csv"), left_out=("7", "8", "9", "10")),
    DataSet("affectnet-8", "image", AFFECTNET, "AffectNet/Manually_Annotated_Images",
            ("AffectNet/{split}_affectnet8.txt", "AffectNet/{split}_affectnet8_2w.txt",
             "AffectNet/{subset}.csv"), left_out=("8", "9", "10")),  # none, uncertain, no face
    DataSet("rafdb", "image", RAFDB, "RAF-DB/basic/Image/aligned",
            ("RAF-DB/basic/EmoLabel/list_patition_label.txt",), labels_from_1=True,
            part="{split}_", file="{stem}_aligned{suffix}"),
    # Rows 0 to 160, columns 32 to 192 of 224 x 224, as released
    DataSet("voxceleb2", "video", (), "VoxCeleb2/dev/mp4", ("VoxCeleb2/dev/mp4/files.txt",),
            stride=4, box=(32, 0, 160, 160)),
    # Drawn by tests/faces.py, in the same layouts
    DataSet("synthetic", "video", DFEW, "synthetic/DFEW/clip_jpg_256",
            (f"synthetic/{DFEW_LISTS[0]}",), folds=5, stride=2),
    DataSet("synthetic-images", "image", AFFECTNET[:7],
            "synthetic/AffectNet/Manually_Annotated_Images",
            ("synthetic/AffectNet/{split}_affectnet7.txt",)),
    DataSet("synthetic-unlabelled", "video", (), "synthetic/VoxCeleb2",
            ("synthetic/VoxCeleb2/files.txt",), stride=2, box=(12, 0, 60, 60)),
)}
OWN_DATA_RATE = 25.0
NEXT_LIST = r"(?i)(?<=\.csv),\s*"           # another comma is a part of a folder's name
SPLIT_WORDS = ("train", "training", "test", "testing", "val", "valid", "validation", "dev")


def catalogue(name: str) -> DataSet:
    """The data set of that name, or one's own: "train.csv,test.csv", "train.csv", or a folder of
    folders by class. UserError if there is none, or two classes differ in capitals alone."""
    if name in CATALOGUE:
        return CATALOGUE[name]
    files = re.split(NEXT_LIST, name)
    if os.path.isdir(name):
        name = os.path.abspath(name)
        parts = {part.lower(): Path(name) / part for part in os.listdir(name)}
        found = [word for word in SPLIT_WORDS if word in parts]
        if found not in ([], ["train"], ["train", "test"]):
            raise UserError(f"{name} is divided into {', '.join(found)}: expected train and test")
        lists = tuple(parts[word] for word in found) or (Path(name),)
    elif name.lower().endswith(".csv") and len(files) <= 2:
        lists = tuple(Path(os.path.abspath(file)) for file in files)
        name = ",".join(map(str, lists))
    else:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(CATALOGUE)}, or "
                        "train.csv,test.csv, or a folder with train/CLASS/ and test/CLASS/")
    folder, rows = own_rows(lists[0])
    classes = sorted({row.label for row in rows} - {""})
    if len({label.casefold() for label in classes}) < len(classes):
        raise UserError(f"{lists[0]}: two of the classes {', '.join(classes)} differ in capitals")
    # Stride 4: 16 frames span 2.6 seconds, as of DFEW
    return DataSet(name, kind_of(folder / rows[0].name), tuple(classes), "", lists, stride=4)


def short_name(name: str) -> str:
    """Its name for folders: of one's own data, the training list's or folder's."""
    return Path(re.split(NEXT_LIST, name)[0]).name.removesuffix(".csv")


def dataset_name(name: str) -> str:
    """A type for argparse: a data set, one's own with its whole path, or a word for none."""
    return name if name in ("none", "frames") else catalogue(name).name


def load_samples(name: str, data_root: Path, split: str, fold: int = 1, stride: int | None = None,
                 box: tuple | None = None, modality: str | None = None) -> Samples:
    """All samples of a data set's "train" or "test" split, with its own stride and box or others.
    UserError if anything that it needs is missing or odd, or it is of another modality."""
    dataset = catalogue(name)
    if modality not in (None, dataset.modality):
        raise UserError(f"{name} holds {dataset.modality}s: expected {modality}s")
    if not 1 <= fold <= dataset.folds:
        raise UserError(f"fold {fold} of {name}: expected 1 to {dataset.folds}")
    if dataset.modality == "image":
        stride, box = 1, None
    own = dataset.name not in CATALOGUE
    samples = Samples(dataset.name, dataset.modality, dataset.classes, Path(data_root), None, None,
                      stride or dataset.stride, OWN_DATA_RATE if own else None, fold=fold,
                      title=name if dataset.folds == 1 else f"{name}, fold {fold}",
                      box=box or dataset.box)
    if own:
        if split == "test" and len(dataset.lists) == 1:
            raise UserError(f"{name} has no test part: expected train.csv,test.csv, or a folder "
                            "with train and test")
        path = dataset.lists[split == "test"]
        samples.title = "/".join(path.parts[-2:])
        samples.root, rows = own_rows(path)
        number = {label: i for i, label in enumerate(dataset.classes)} or {"": -1}
        samples.notes = [f"{path}: {', '.join(dataset.classes) or 'no labels'}"]
    else:
        samples.root = samples.root / dataset.folder
        if not dataset.classes:
            list_videos(samples, Path(data_root, *dataset.lists))
            return samples
        path, rows, number, samples.notes = catalogue_rows(dataset, Path(data_root), split, fold)
    for row in rows:
        if row.label not in number:
            raise UserError(f"{path}, line {row.line}: {row.name!r} has the label {row.label!r}: "
                            f"expected {', '.join(number)}")
    samples.labels = np.array([number[row.label] for row in rows])
    if rows[0].person:
        samples.people = np.array([row.person.encode() for row in rows])
    names = [row.name for row in rows]
    found = locate(samples.root, names, dataset.modality)
    if own and not any(found):              # the list lies elsewhere than its samples
        samples.notes.append(f"nor in {samples.root}")
        samples.root = Path(data_root)
        found = locate(samples.root, names, dataset.modality)
    missing = [name for name, file in zip(names, found) if not file]
    if missing:
        raise UserError(f"of {len(names)} samples of {name}, {split}, fold {fold}, not there in "
                        f"{samples.root}: {shortened(missing)} ({'; '.join(samples.notes)})")
    samples.names = np.array([os.fsencode(file) for file in found])
    if own:                                 # the first file with each suffix stands for the others
        first = {}
        for file in found:
            first.setdefault(posixpath.splitext(file)[1].lower(), samples.root / file)
        for file in first.values():
            if kind_of(file) != dataset.modality:
                raise UserError(f"{file} is no {dataset.modality} as the first sample: images and "
                                "clips are two data sets")
    return samples


def catalogue_rows(dataset: DataSet, data_root: Path, split: str, fold: int) -> tuple:
    """The split's list and its lines, the numbers of its labels, and what is to be said of these.
    UserError where labels may count from 0 or from 1."""
    subset = "training" if split == "train" else "validation"               # AffectNet's words
    paths = [data_root / name.format(split=split, subset=subset, fold=fold)
             for name in dataset.lists]
    there = [path for path in paths if path.is_file()]
    if not there:
        raise UserError(f"{data_root / dataset.folder} and {' or '.join(map(str, paths))} must be "
                        "there (--dataset synthetic needs no download: python tests/faces.py)")
    path = there[0]
    part = dataset.part.format(split=split)
    left_out = dataset.left_out if path.suffix == ".csv" else ()
    rows = []
    labels = set()
    for row in read_list(path):
        labels.add(row.label)
        if row.name.startswith(part) and row.label not in left_out:
            stem, suffix = posixpath.splitext(row.name)
            rows.append(row._replace(name=dataset.file.format(stem=stem, suffix=suffix)))
    if not rows:
        raise UserError(f"{path} holds no samples of the split")
    first = 0
    highest = str(len(dataset.classes))
    if dataset.labels_from_1 and "0" not in labels:
        first = 1
        if highest not in labels:
            raise UserError(f"{path} has the labels {', '.join(sorted(labels))}: neither 0 nor "
                            f"{highest} occurs, so they may count from 0 or from 1")
    notes = [f"{path}: labels count from {first}"]
    if left_out:
        notes.append(f"left out: labels {', '.join(left_out)}")
    return path, rows, {str(first + i): i for i in range(len(dataset.classes))}, notes


def list_videos(samples: Samples, path: Path) -> None:
    """Name VoxCeleb2's videos, id*/VIDEO/*.mp4. A million are listed once, in the file `path`, if
    one may write there. UserError if there are none."""
    if not path.is_file() or not path.stat().st_size:
        found = iglob("id*/*/*.mp4", root_dir=samples.root)
        names = []
        for name in tqdm(found, f"listing {samples.root}", unit=" videos"):
            names.append(os.fsencode(name.replace(os.sep, "/")))
        if not names:
            raise UserError(f"{samples.root} holds no file id*/*/*.mp4")
        names.sort()
        samples.notes = [f"{samples.root}: {len(names)} files listed now"]
        part = path.with_name(f"files.{os.getpid()}.part")  # several processes may do this at once
        with suppress(OSError):
            part.write_bytes(b"\n".join(names))
            os.replace(part, path)
    else:
        names = path.read_bytes().splitlines()
        samples.notes = [f"{path}: {len(names)} files, as listed then (delete it to list anew)"]
    samples.names = np.array(names)
    samples.labels = np.full(len(names), -1)


# ------------------------------------------------------------------------------------------ lists

class Row(NamedTuple):
    """A line of a list; label and person are "" where it has no such column."""
    line: int
    name: str
    label: str = ""
    person: str = ""


HEADER = {                                  # words of header lines, by what the columns hold
    "name": ("path", "file", "filename", "video", "image", "video_name", "subdirectory_filepath"),
    "label": ("label", "labels", "emotion", "expression", "class"),
    "person": ("person", "subject", "actor", "speaker")}


def read_list(path: Path, own: bool = False) -> list[Row]:
    """The lines of a list: .csv with a header, or .txt of "name label". A line is a sample: a quote
    does not span lines. UserError for what is no list in UTF-8, or no such line. own: one's own."""
    content = path.read_bytes()
    if b"\0" in content[:4]:
        raise UserError(f"{path} is UTF-16: save it as CSV UTF-8")
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is in GBK, Windows-1252 or alike: save it as CSV UTF-8") from error
    is_csv = path.suffix.lower() == ".csv"
    columns = {} if is_csv else {"name": 0, "label": 1}
    width = len(columns)
    rows = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}: {line.strip()!r}"
        try:
            fields = next(csv.reader([line], strict=True), []) if is_csv else line.rsplit(None, 1)
        except csv.Error as error:
            raise UserError(f"{where}: {error}") from error
        fields = [field.strip() for field in fields]
        if not any(fields):
            continue
        if not columns:
            columns = header_columns(fields, where, own)
            width = len(fields)
            continue
        if len(fields) != width or not all(fields[i] for i in columns.values()):
            raise UserError(f"{where}: expected {' and '.join(columns)} in {width} columns")
        values = {column: look(fields[i]) for column, i in columns.items()}
        # As it is spelt, to find it in a folder; Windows separates by backslashes.
        values["name"] = posixpath.normpath(fields[columns["name"]].replace("\\", "/"))
        rows.append(Row(number, **values))
    if not rows:
        raise UserError(f"{path} holds no samples")
    return rows


def own_rows(path: Path) -> tuple[Path, list["Row"]]:
    """Samples with class names of a list, or CLASS/FILE of a folder, and what they are relative to.
    UserError for a file beside the classes."""
    if not path.is_dir():
        return path.parent, read_list(path, own=True)
    rows = []
    for label in visible(path):
        if not (path / label).is_dir():
            raise UserError(f"{path / label} lies beside folders of classes: put it into one, or "
                            "give a list as train.csv")
        for file in visible(path / label):
            rows.append(Row(len(rows) + 1, f"{label}/{file}", look(label)))
    if not rows:
        raise UserError(f"{path} holds no samples: expected {path / 'CLASS' / 'FILE'}")
    return path, rows


def header_columns(fields: list[str], where: str, own: bool) -> dict[str, int]:
    """Where names, labels and people stand below a header. UserError if it is none, or has no names
    or two columns of a kind."""
    found = []
    for i, text in enumerate(fields):
        word = look(text).lower()
        if word == "id" and not own:        # FERV39K's word for labels
            word = "label"
        found += [(column, i) for column, words in HEADER.items() if word in words]
    columns = dict(found)
    if "name" in columns and len(columns) == len(found):
        return columns
    for separator, word in ((";", "semicolons"), ("\t", "tabs")):
        if separator in fields[0]:
            raise UserError(f"{where}: {word} between the columns: export with commas")
    raise UserError(f"{where} is no header: expected path,label or path,label,person or path")


def look(text: str) -> str:
    """A name as it looks: composed letters, single spaces, nothing invisible."""
    letters = unicodedata.normalize("NFC", text)
    visible = [letter for letter in letters if unicodedata.category(letter) != "Cf"]
    return " ".join("".join(visible).split())


def locate(root: Path, names: list[str], modality: str) -> list[str | None]:
    """The files or folders that names stand for, None for what is not there. Names that look the
    same are the same. A clip is a folder of frames, or a video in its place; numbers with or
    without leading zeros."""
    clips = modality == "video"

    def key(name: str) -> str:
        name = look(name)
        return name.lstrip("0") if clips and name.isdecimal() else name

    @cache                                  # asking for 100,000 files takes minutes on a network
    def inside(folder: str) -> dict[str, str]:
        """The paths in a folder by their names, their keys and, of videos, these without suffix."""
        if not os.path.isdir(root / folder):
            folder = find(folder) if folder else None
        paths = {}
        for file in sorted(os.listdir(root / folder)) if folder is not None else ():
            path = posixpath.join(folder, file)
            paths.setdefault(key(file), path)
            stem, suffix = posixpath.splitext(file)
            if clips and suffix in (".mp4", ".avi", ".gif", ".webp"):
                paths.setdefault(key(stem), path)
            paths[file] = path
        return paths

    def find(name: str) -> str | None:
        folder, file = posixpath.split(name)
        paths = inside(folder)
        return paths.get(file) or paths.get(key(file))

    return [find(name) for name in names]


def shortened(items) -> str:
    """How many there are, and the first of them."""
    items = [os.fsdecode(item) for item in items]
    return f"{len(items)}: {', '.join(items[:3])}{', ...' if len(items) > 3 else ''}"


def visible(folder: Path) -> list[str]:
    """The names in a folder, frame 2 before frame 10, but for what systems leave there."""
    def natural(name: str) -> list:
        parts = re.split(r"(\d+)", name)
        return [int(part) if part.isdecimal() else part for part in parts]

    hidden = ("thumbs.db", "desktop.ini", "__macosx")
    names = [name for name in os.listdir(folder) if name.lower() not in hidden]
    return sorted((name for name in names if not name.startswith(".")), key=natural)


# ---------------------------------------------------------------------------------------- readers

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff",
                  ".avif", ".jp2", ".ppm", ".pgm", ".heic", ".heif")
ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")   # the pictures of a TIFF or MPO file are no frames
UNREADABLE = (OSError, ValueError, SyntaxError, LookupError, TypeError, struct.error,
              Image.DecompressionBombError)  # what Pillow raises for damaged files


def read_image(path: Path) -> torch.Tensor:
    """An image as uint8 (3, H, W), upright; of an animation or of several pages the first. Its
    content, not its name, tells the format. UserError names a file that is no image."""
    with open_picture(path) as image:
        if image is None:
            raise UserError(f"{path} cannot be read as an image: it is of no known format")
        return as_tensor(image)


def open_clip(path: Path) -> "Folder | Animation | Video | None":
    """A folder of frames, an animation or a video, whose n frames were counted, not decoded; None
    for a picture, also a damaged one that is named as one. Its content, not its name, tells what a
    file is. rate: frames a second, None where nothing tells. UserError if it cannot be read."""
    if os.path.isdir(path):
        return Folder(path)
    with open_picture(path) as image:
        if image is not None:
            moves = image.format in ANIMATED and getattr(image, "is_animated", False)
            return Animation(path, image) if moves else None
    if not os.fspath(path).lower().endswith(IMAGE_SUFFIXES):
        return Video(path)
    with suppress(UserError):
        video = Video(path)
        if video.n > 1:                     # FFmpeg takes a damaged picture for one frame
            return video
    return None


def kind_of(path: Path) -> str:
    """"image" or "video", by its content or, if it cannot be read, by its suffix."""
    with suppress(UserError):
        return "image" if open_clip(path) is None else "video"
    return "image" if path.suffix.lower() in IMAGE_SUFFIXES else "video"


def read_clip(clip: "Folder | Animation | Video", numbers: list[int],
              transform: Callable = v2.Identity(), title: str = "") -> torch.Tensor:
    """Frames of a clip by their numbers, in any order, repeats allowed: uint8 (T, 3, H, W).

    transform: what every frame (3, h, w) goes through as it is decoded, so that memory follows what
    is kept. title: of a bar that shows progress. UserError names what cannot be decoded."""
    wanted = sorted(set(numbers))
    decoded = clip.decode(wanted)
    if title:                               # loading processes must not share the bar's lock
        decoded = tqdm(decoded, title, len(wanted), leave=False, unit=" frames", disable=None)
    frames = None
    for number, frame in decoded:
        frame = transform(frame)
        if frames is None:
            # Made at once: kept each for itself among the large frames that pass, small ones leave
            # holes in memory, which then grows. Channel last resizes fast.
            frames = torch.empty(len(numbers), *frame.shape[1:], 3, dtype=torch.uint8)
            frames = frames.permute(0, 3, 1, 2)                             # (T, 3, H, W)
        if frame.shape[1:] != frames.shape[2:]:     # a detector's crops, a turned telephone
            frame = v2.functional.resize(frame, frames.shape[2:], antialias=True)
        frames[torch.tensor(numbers) == number] = frame
    return frames


@contextmanager
def open_picture(path: Path) -> Iterator[Image.Image | None]:
    """A context with what Pillow opens, whatever it is called, or None if that is no picture.
    UserError for what is damaged, for HEIC, of which FFmpeg would show one tile, and for what is no
    file: reading a pipe would wait for ever."""
    if not os.path.isfile(path):
        raise UserError(f"{path} is not there, or no file: expected an image or a video")
    image = None
    try:
        with open(path, "rb") as file:
            brand = file.read(12)[4:]
        with suppress(Image.UnidentifiedImageError):
            image = Image.open(path)
        if image is None and brand.startswith((b"ftyphe", b"ftypmif1", b"ftypmsf1")):
            raise UserError(f"{path} is a HEIC picture, which is not read: save it as JPEG or PNG "
                            "(a picture viewer does, or heif-convert IN.heic OUT.jpg)")
        if image is not None and image.format == "MPEG":    # of which Pillow only knows the size
            image = None
        with image or nullcontext():
            yield image
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def as_tensor(image: Image.Image) -> torch.Tensor:
    """A picture as uint8 (3, H, W), upright, in memory channel last, which resizes fast."""
    if image.mode == "F":
        raise ValueError("pixels of floating point have no agreed range: expected 8 or 16 bits")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):          # 16-bit grey, which `convert` would clip, not scale
        image = Image.fromarray((np.array(image) // 257).astype(np.uint8))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


class Folder:
    """A folder whose images, in natural order, are the frames."""

    def __init__(self, path: Path):
        self.path = path
        self.files = [name for name in visible(path) if name.lower().endswith(IMAGE_SUFFIXES)]
        if not self.files:
            raise UserError(f"{path} holds no frames ({', '.join(IMAGE_SUFFIXES)})")
        self.n = len(self.files)
        self.rate = None

    def decode(self, wanted: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
        for number in wanted:
            yield number, read_image(self.path / self.files[number])


class Animation:
    """An animated picture."""

    def __init__(self, path: Path, image: Image.Image):
        self.path = path
        self.n = image.n_frames
        milliseconds = 0
        for number in range(self.n):
            image.seek(number)
            image.load()                    # tells how long the frame is shown
            milliseconds += image.info.get("duration", 0)
        self.rate = 1000 * self.n / milliseconds if milliseconds else None

    def decode(self, wanted: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
        with open_picture(self.path) as image:
            for number in wanted:
                image.seek(number)
                yield number, as_tensor(image)


class Video:
    """A video. Its packets, each a coded frame, are counted first; then those are decoded that
    wanted frames need. Frames are known by the times at which they are shown, or else counted."""

    def __init__(self, path: Path):
        self.path = path
        self.packets = []                   # times at which their frames are shown
        self.keys = {}                      # places of those that need no other, by their times
        times = []                          # of those that do not only serve to predict others
        with open_video(path) as stream:
            container = stream.container.format.name
            rate = stream.average_rate or stream.guessed_rate
            for packet in stream.container.demux(stream):
                if packet.size:
                    if packet.is_keyframe:
                        self.keys.setdefault(packet.pts, len(self.packets))
                    if not packet.is_discard:
                        times.append(packet.pts)
                    self.packets.append(packet.pts)
        self.rate = float(rate) if rate else None
        self.n = len(times)
        begin = 0                           # in a file a first frame that is no key is damaged
        if self.keys and container in ("mpegts", "mpeg", "mpegvideo", "h264", "hevc"):
            begin = min(self.keys.values())
        self.everything = {begin: len(self.packets) - 1}
        self.numbers = {}                   # of frames by their times; empty: these cannot tell
        if begin > 0 or None in self.packets or any(time < self.packets[0] for time in times):
            # Begun between key frames. Players show what can be decoded: only decoding tells.
            self.n = sum(1 for frame in decoded_frames(path, self.everything))
        elif container != "avi":            # which only tells the order of decoding
            if len(set(self.packets)) == len(self.packets) and list(self.keys) == sorted(self.keys):
                self.numbers = {time: number for number, time in enumerate(sorted(times))}
        if self.n == 0:
            raise UserError(f"{path} is truncated: it has no frames")

    def decode(self, wanted: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
        left = set(wanted)
        ways = [(self.everything, None)]    # which finds whatever can be decoded
        if self.numbers:
            # Each frame from the last key frame that is shown no later. (In an open group of
            # pictures, frames shown before a key frame but stored behind it need the frames before
            # it, too.)
            times = {time for time, number in self.numbers.items() if number in left}
            ranges = {}
            start = 0
            for time, place in sorted(zip(self.packets, range(len(self.packets)))):
                if time in self.keys:
                    start = place
                if time in times:
                    ranges[start] = max(ranges.get(start, 0), place)
            ways.insert(0, (ranges, times))
        to_rgb = VideoReformatter()         # one for all frames keeps its tables
        for ranges, times in ways:
            for count, frame in enumerate(decoded_frames(self.path, ranges, times)):
                number = self.numbers.get(frame.pts) if self.numbers else count
                if number in left:
                    rgb = to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()
                    upright = torch.rot90(torch.from_numpy(rgb), round(frame.rotation / 90))
                    yield number, upright.permute(2, 0, 1)
                    left.remove(number)
                if not left:
                    return
        raise UserError(f"{self.path} is truncated: frame {min(left)} of {self.n} is not there")


def decoded_frames(path: Path, ranges: dict[int, int],
                   wanted: set[int] | None = None) -> Iterator[av.VideoFrame]:
    """The frames of a video's packets in `ranges`, {first: last}, which may overlap. wanted: if
    given, frames of other times may be left out, where no others need them: a third of the time."""
    with open_video(path) as stream:
        codec = stream.codec_context
        # Other decoders do not heed the setting at once; and in damaged parts, which transport
        # streams often have, a frame depends on every frame before it.
        may_skip = codec.name in ("h264", "hevc") and stream.container.format.name != "mpegts"
        last = -1
        packets = (packet for packet in stream.container.demux(stream) if packet.size)
        for place, packet in enumerate(packets):
            last = max(last, ranges.get(place, -1))
            if place > last:
                continue
            if wanted is not None and may_skip:
                codec.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            yield from codec.decode(packet)
            if place == last:
                yield from codec.decode(None)       # what the decoder still holds
                codec.flush_buffers()


@contextmanager
def open_video(path: Path) -> Iterator[av.VideoStream]:
    """A context with the first video stream of a file that is not its cover picture. UserError for
    what FFmpeg cannot read."""
    try:
        file = os.path.abspath(path)        # FFmpeg takes a:b.mp4 for a URL
        with av.open(file, metadata_errors="ignore") as container:
            cover = av.stream.Disposition.attached_pic
            streams = [stream for stream in container.streams.video
                       if stream.codec_context is not None and not stream.disposition & cover]
            if not streams:
                raise UserError(f"{path} has no video stream of a known kind")
            stream = streams[0]
            size = os.path.getsize(path)
            if any(entry.pos + entry.size > size for entry in stream.index_entries):
                raise UserError(f"{path} is truncated: its index lists frames beyond its end")
            stream.thread_count = 1         # loading processes run side by side already
            yield stream
    except av.FFmpegError as error:
        raise UserError(f"{path} cannot be read as a clip: {error.strerror}") from error
