"""Everything about files, sampling and batches: which data sets there are, how a clip or an image is read, what is
random about a sample, and how single-source mini-batches are interleaved.

It reads in the order in which data flows: the catalogue says where files lie, a split file becomes `Samples`, a
reader turns one file into uint8 pixels, augmentation cuts out what the model sees, and `schedule_epoch` deals
micro-batches of one source each. The last part draws the synthetic faces that stand in for the real sets.

    python data.py check --dataset dfew --fold 1      reads every sample; exit status 1 if anything is wrong
    python data.py show --dataset dfew --mask         draws what training gets, here as stage 1 masks it
    python data.py list --dataset voxceleb2           lists the files of a set without split files anew
    python data.py synthetic                          writes the synthetic faces, as training does on first use

B batch    T frames of a clip    H x W pixels    n samples, or frames of a whole video    v views of one sample
"""
import argparse
import csv
import glob
import hashlib
import math
import multiprocessing
import os
import re
import shutil
import signal
import struct
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.transforms import v2
from torchvision.utils import make_grid
from tqdm import tqdm

from model import IMAGE_MEAN, IMAGE_STD, MASK_RATIO, SIZES, Size, random_mask


class DataError(Exception):
    """Data that cannot be used; the message names the file, the value found and what was expected."""


# ------------------------------------------------------------------------------------------------------- catalogue

@dataclass(frozen=True)
class DataSet:
    """Where a data set lies below the data root, and what its labels mean.

    media: folders that may hold the samples, best first, each with the stride that belongs to it. train, test: split
    files, of which the first that is there counts, "{fold}" = 1 to `folds`. None of them: every file below `media`
    that matches `pattern` is a sample. crop: the part of a frame that stage 1 sees, as fractions (top, left, height,
    width).
    """
    modality: str
    classes: tuple[str, ...]
    media: tuple[tuple[str, int], ...]
    train: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    folds: int = 1
    one_based: bool = False                 # labels that start at 1 are known to occur
    left_out: tuple[str, ...] = ()          # what the labels that follow the classes mean in AffectNet's own csv
    one_list: bool = False                  # RAF-DB: one list of train_... and test_..., stored as ..._aligned
    person_folders: bool = False            # the first folder of a name is a person
    pattern: str = ""
    crop: tuple[float, float, float, float] = (0, 0, 1, 1)


DFEW = DataSet(
    "video", ("happy", "sad", "neutral", "angry", "surprise", "disgust", "fear"),
    # clip_224x224_16f holds 16 frames that its authors sampled: at stride 4 only 4 of them would be distinct.
    (("DFEW/clip_jpg_256", 4), ("DFEW/Clip/clip_224x224_16f", 1)),
    ("DFEW/EmoLabel_DataSplit/train(single-labeled)/train_set_{fold}.csv",),
    ("DFEW/EmoLabel_DataSplit/test(single-labeled)/test_set_{fold}.csv",), folds=5, one_based=True)
AFFECTNET_7 = DataSet(
    "image", ("neutral", "happy", "sad", "surprise", "fear", "disgust", "anger"),
    (("AffectNet/Manually_Annotated_Images", 1),),
    ("AffectNet/train_affectnet7.txt", "AffectNet/train_affectnet7_2w.txt", "AffectNet/training.csv"),
    ("AffectNet/test_affectnet7.txt", "AffectNet/test_affectnet7_2w.txt", "AffectNet/validation.csv"),
    left_out=("contempt", "none", "uncertain", "no face"))
AFFECTNET_8 = replace(
    AFFECTNET_7, classes=(*AFFECTNET_7.classes, "contempt"), left_out=("none", "uncertain", "no face"),
    train=tuple(path.replace("affectnet7", "affectnet8") for path in AFFECTNET_7.train),
    test=tuple(path.replace("affectnet7", "affectnet8") for path in AFFECTNET_7.test))
RAF_DB_LIST = ("RAF-DB/basic/EmoLabel/list_patition_label.txt",)
# Rows 0-160 and columns 32-192 of VoxCeleb2's 224 x 224 frames, as the released code and MAE-DFER cut them.
VOXCELEB2 = DataSet("video", (), (("VoxCeleb2/dev/mp4", 4), ("VoxCeleb2", 4)), pattern="id*/*/*.mp4",
                    crop=(0, 1 / 7, 5 / 7, 5 / 7))


def below(folder: str, dataset: DataSet, stride: int) -> DataSet:
    """The same layout in a folder of its own, with another stride."""
    def move(paths):
        return tuple(f"{folder}/{path}" for path in paths)
    return replace(dataset, media=tuple((f"{folder}/{path}", stride) for path, _ in dataset.media),
                   train=move(dataset.train), test=move(dataset.test))


CATALOGUE = {
    "dfew": DFEW,
    "ferv39k": DataSet(
        "video", ("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"),
        (("FERV39K/2_ClipsforFaceCrop", 1),), ("FERV39K/Annotation/train.csv",), ("FERV39K/Annotation/test.csv",)),
    "mafw": DataSet(
        "video", ("anger", "anxiety", "contempt", "disappointment", "disgust", "fear", "happiness", "helplessness",
                  "neutral", "sadness", "surprise"),
        (("MAFW/frames_crop_align_224", 4),), ("MAFW/anno/single/no_caption/set_{fold}/train.csv",),
        ("MAFW/anno/single/no_caption/set_{fold}/test.csv",), folds=5),
    "affectnet-7": AFFECTNET_7,
    "affectnet-8": AFFECTNET_8,
    "rafdb": DataSet(
        "image", ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral"),
        (("RAF-DB/basic/Image/aligned", 1),), RAF_DB_LIST, RAF_DB_LIST, one_based=True, one_list=True),
    "voxceleb2": VOXCELEB2,
    "synthetic": below("synthetic", DFEW, 2),
    "synthetic-images": replace(below("synthetic", AFFECTNET_7, 1), person_folders=True),
    "synthetic-unlabelled": below("synthetic", VOXCELEB2, 2),
}
OWN_DATA_STRIDE = 4                         # of clips: a window of 2.6 seconds at 25 frames per second, as for DFEW
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")


def catalogue(name: str) -> DataSet:
    """The data set of that name, or one's own: "train.csv,test.csv" or "train.csv". DataError if there is none."""
    if name in CATALOGUE:
        return CATALOGUE[name]
    if not name.endswith(".csv"):
        raise DataError(f"unknown data set {name!r}: choose one of {', '.join(CATALOGUE)}, or train.csv,test.csv")
    files = [os.path.abspath(file) for file in name.split(",")]
    rows = {file: read_list(Path(file)) for file in files}
    if len(files) > 2:
        raise DataError(f"{name}: expected train.csv,test.csv or train.csv, not {len(files)} files")
    images, clips = [], []
    for row in (row for listed in rows.values() for row in listed):
        (images if row.name.lower().endswith(IMAGE_SUFFIXES) else clips).append(row.name)
    if images and clips:
        raise DataError(f"{name} lists images ({images[0]}) and clips ({clips[0]}): make two data sets of them")
    return DataSet("image" if images else "video", tuple(sorted({row.label for row in rows[files[0]]} - {""})),
                   ((os.path.commonpath([os.path.dirname(file) for file in files]), OWN_DATA_STRIDE),),
                   (files[0],), tuple(files[1:]))


def is_synthetic(name: str) -> bool:
    return name in CATALOGUE and name.startswith("synthetic")


def short_name(name: str) -> str:
    """A data set's name for folders: of one's own data, the training file's without .csv."""
    return Path(name.split(",")[0]).stem


def dataset_name(modality: str | None = None, labelled: bool = False, others: tuple[str, ...] = ()):
    """A type for argparse: a data set of that modality, with classes if `labelled`, or one of the words in `others`."""
    def check(name: str) -> str:
        fits = [n for n, d in CATALOGUE.items() if modality in (None, d.modality) and (d.classes or not labelled)]
        try:
            dataset = None if name in others else catalogue(name)
        except DataError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        if dataset and (modality not in (None, dataset.modality) or labelled and not dataset.classes):
            raise argparse.ArgumentTypeError(
                f"{name} holds {dataset.modality}s {'with' if dataset.classes else 'without'} labels: expected "
                f"{', '.join([*others, *fits])}, or train.csv,test.csv")
        return name
    return check


@dataclass
class Samples:
    """The samples of one split. Names are bytes in one numpy array: loading processes then share their memory."""
    name: str                               # of the data set
    dataset: DataSet
    root: Path                              # folder that the names are relative to
    names: np.ndarray                       # (n,) bytes: image files, video files or folders of frames
    labels: np.ndarray                      # (n,) int64, -1 where there are none
    stride: int
    notes: tuple[str, ...] = ()             # what was recognised, to be printed
    people: np.ndarray | None = None        # (n,) bytes: who is seen, where the data set tells
    fold: int = 1
    frames_as_images: bool = False          # one random frame of each video stands for an image (Table IV, row 5)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(bytes(self.names[index]))

    def subset(self, index: np.ndarray) -> "Samples":
        return replace(self, names=self.names[index], labels=self.labels[index],
                       people=None if self.people is None else self.people[index])

    def counts(self) -> list[int]:
        return np.bincount(self.labels, minlength=len(self.dataset.classes)).tolist()

    def identity(self, digests: bool = False) -> dict:
        """What a checkpoint says of the data that it was trained or tested on."""
        names = {"digests": torch.from_numpy(self.digests())} if digests else {}
        return dict(name=self.name, fold=self.fold, stride=self.stride, samples=len(self),
                    fingerprint=self.fingerprint(), **names)

    def digests(self) -> np.ndarray:
        """(n,) int64, sorted: a hash of each name, by which a checkpoint remembers what it was trained on."""
        hashes = [hashlib.blake2b(bytes(name), digest_size=8).digest() for name in self.names]
        return np.sort(np.frombuffer(b"".join(hashes), np.int64))

    def fingerprint(self) -> str:
        """16 hexadecimal digits of the stride and all names and labels in their order: the same data give the same."""
        rows = zip(self.names.tolist(), self.labels.tolist())
        text = b"\n".join([b"%d" % self.stride, *(b"%s,%d" % row for row in rows)])
        return hashlib.blake2b(text, digest_size=8).hexdigest()


class Row(NamedTuple):
    """A line of a split file; label and person are "" where it has no such column."""
    line: int
    name: str
    label: str = ""
    person: str = ""


COLUMNS = {"path": "name", "video_name": "name", "subdirectory_filepath": "name", "label": "label", "labels": "label",
           "id": "label", "expression": "label", "person": "person"}  # header words that occur


def read_list(path: Path) -> list[Row]:
    """The lines of a split file: .csv of name,label or with a header line of COLUMNS, or .txt of "name label".

    DataError where the file cannot be read or is empty, and where a line is no such line or leads out of the folder.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        table = list(csv.reader(lines) if path.suffix == ".csv" else (line.rsplit(None, 1) for line in lines))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a list in UTF-8: {error}") from error
    table = [(line, [field.strip() for field in fields]) for line, fields in enumerate(table, 1)]
    table = [(line, fields) for line, fields in table if any(fields)]
    header = [COLUMNS.get(field.lower()) for field in table[0][1]] if table else []
    if any(header):
        width, columns = len(header), {column: i for i, column in enumerate(header) if column}
        if "name" not in columns or len(columns) < len(header) - header.count(None):
            raise DataError(f"{path}, line {table[0][0]}: header {', '.join(table[0][1])}: expected one column of "
                            "names and at most one of labels and of people; the words for them are "
                            + ", ".join(f"{word} ({column})" for word, column in COLUMNS.items()))
        table = table[1:]
    else:
        width, columns = 2, {"name": 0, "label": 1}
    if not table:
        raise DataError(f"{path} holds no samples: expected lines of name{',' if path.suffix == '.csv' else ' '}label")
    rows = []
    for line, fields in table:
        if len(fields) != width or not all(fields[i] for i in columns.values()):
            raise DataError(f"{path}, line {line}: {lines[line - 1].strip()!r}: expected {' and '.join(columns)}"
                            f"{f' in a line of {width} columns' if path.suffix == '.csv' else ''}")
        row = Row(line, **{column: fields[i] for column, i in columns.items()})
        if row.name.startswith("/") or ".." in row.name.split("/") or "\0" in row.name:
            raise DataError(f"{path}, line {line}: {row.name!r} is no path below the data folder")
        rows.append(row)
    return rows


def read_split(path: Path, dataset: DataSet, split: str) -> tuple[list[Row], np.ndarray, list[str]]:
    """The rows of a split, their labels as they are written, and notes on what was left out.

    DataError where a label is no whole number.
    """
    rows, notes = read_list(path), []
    if dataset.one_list:
        rows = [row._replace(name=row.name.replace(".", "_aligned.")) for row in rows
                if row.name.startswith(f"{split}_")]
    for row in rows:
        if not re.fullmatch(r"[+-]?\d+", row.label):
            raise DataError(f"{path}, line {row.line}: {row.name!r} has the label {row.label!r}, no whole number")
    labels, n = np.array([int(row.label) for row in rows]), len(dataset.classes)
    if dataset.left_out and path.suffix == ".csv":
        counts = [int((labels == n + i).sum()) for i in range(len(dataset.left_out))]
        notes = [f"left out: {', '.join(f'{count} {word}' for count, word in zip(counts, dataset.left_out))}"]
        kept = np.flatnonzero((labels < n) | (labels >= n + len(counts)))
        rows, labels = [rows[i] for i in kept], labels[kept]
    if not rows:
        raise DataError(f"{path} holds no samples of the {split} split")
    return rows, labels, notes


def zero_based(labels: np.ndarray, everywhere: np.ndarray, dataset: DataSet, path: Path) -> tuple[np.ndarray, str]:
    """Labels 0 to C - 1 and a note on what was found; DataError for anything else, before any training.

    everywhere: the labels of all split files that are there, which tell whether they count from 1.
    """
    n, found = len(dataset.classes), f"{path}: labels run from {labels.min()} to {labels.max()}"
    low, high = everywhere.min(), everywhere.max()
    if dataset.one_based and low >= 1 and high <= n:
        if high < n:
            raise DataError(f"{found}, and in all split files that are there from {low} to {high}: neither 0 nor {n} "
                            "occurs, so they may count from 0 or from 1; put the data set's other split files there")
        return labels - 1, f"{found}: counted from 1, mapped to 0 to {n - 1}"
    if labels.min() < 0 or labels.max() >= n:
        wrong = int(labels[(labels < 0) | (labels >= n)][0])
        raise DataError(f"{path}: label {wrong} is out of range: {n} classes have labels 0 to {n - 1} "
                        f"({', '.join(f'{i} {c}' for i, c in enumerate(dataset.classes))})"
                        + ("; they seem to be counted from 1: subtract 1" if (low, high) == (1, n) else ""))
    return labels, found


def own_labels(rows: list[Row], dataset: DataSet, path: Path) -> tuple[np.ndarray, str]:
    """Class names -> labels. DataError for a class that the training file does not have."""
    number = {name: i for i, name in enumerate(dataset.classes)}
    for row in rows:
        if row.label not in number and (row.label or dataset.classes):
            raise DataError(f"{path}, line {row.line}: class {row.label!r} does not occur in {dataset.train[0]}, which "
                            f"has {', '.join(dataset.classes) or 'no labels'}")
    found = ", ".join(f"{i} {name}" for i, name in enumerate(dataset.classes)) or "no labels"
    return np.array([number.get(row.label, -1) for row in rows]), f"{path}: {found}"


def locate(root: Path, names: list[str], modality: str) -> tuple[list[str], np.ndarray]:
    """The files or folders that names stand for, and whether they are there (n,) bool; others keep their names.

    Clips: a folder of frames, or .mp4 or .avi in its place; numbers with or without leading zeros. Each folder is
    listed once: asking for hundreds of thousands of files one by one takes minutes on a network disk.
    """
    @cache
    def entries(folder: str) -> frozenset[str]:
        try:
            return frozenset(os.listdir(root / folder))
        except (FileNotFoundError, NotADirectoryError):
            return frozenset()
        except OSError as error:
            raise DataError(f"{root / folder} cannot be listed: {error}") from error

    def find(name: str) -> str | None:
        folder, slash, file = name.rpartition("/")
        spellings, suffixes = [file], [""]
        if modality == "video":
            suffixes = ["", ".mp4", ".avi"]
            spellings += [file.zfill(5), file.lstrip("0") or "0"] if file.isdecimal() else []
        return next((folder + slash + spelling + suffix for spelling in spellings for suffix in suffixes
                     if spelling + suffix in entries(folder)), None)

    found = [find(name) for name in names]
    return [path or name for path, name in zip(found, names)], np.array([path is not None for path in found], bool)


FILE_LIST = "files.txt"                     # beside the samples of a set without split files


def scan(root: Path, pattern: str) -> list[bytes]:
    """The files below `root` that match, sorted."""
    files = glob.iglob(pattern, root_dir=root)
    return sorted(os.fsencode(file) for file in tqdm(files, desc=f"listing {root}", unit=" files"))


def file_list(root: Path, pattern: str, anew: bool = False) -> tuple[np.ndarray, str]:
    """The files below `root` that match (n,) bytes, from the list file, which is written if there is none; a note.

    DataError if there are no such files; then no list is left, which would outlive the error's cause.
    """
    path = root / FILE_LIST
    listed = path.read_bytes().splitlines() if path.is_file() and not anew else []
    if listed:
        return np.array(listed), (f"{path}: {len(listed)} files, as listed then (anew: python data.py list --dataset "
                                  "NAME)")
    names = scan(root, pattern)
    if not names:
        raise DataError(f"{root} holds no file {pattern}")
    temporary = path.with_name(f"{FILE_LIST}.{os.getpid()}.part")
    try:
        temporary.write_bytes(b"\n".join(names))
        os.replace(temporary, path)
    except OSError as error:
        return np.array(names), f"{path} cannot be written, so that every start lists {root} anew: {error.strerror}"
    return np.array(names), f"{path}: {len(names)} files listed now"


def media_folder(name: str, dataset: DataSet, data_root: Path, fold: int = 1) -> tuple[Path, int]:
    """The first of the data set's folders that is there, and its stride. DataError if there is none."""
    for path, stride in dataset.media:
        if (data_root / path).is_dir():
            return data_root / path, stride
    raise DataError(missing_message(name, dataset, data_root, fold, "none of its media folders is there"))


def split_file(name: str, dataset: DataSet, data_root: Path, split: str, fold: int) -> Path:
    """The first of the split's files that is there. DataError if there is none."""
    files = [data_root / path.format(fold=fold) for path in getattr(dataset, split)]
    if not files:
        raise DataError(f"{name} has no {split} file: expected train.csv,test.csv")
    for file in files:
        if file.is_file():
            return file
    raise DataError(missing_message(name, dataset, data_root, fold, f"{files[0]} is not there"))


def find_samples(name: str, data_root: Path, split: str, fold: int = 1,
                 stride: int | None = None) -> tuple[Samples, np.ndarray]:
    """What a data set's "train" or "test" split lists, and which of it is there (n,) bool. DataError where the lists
    or the folder are missing or odd."""
    dataset, data_root = catalogue(name), Path(data_root)
    if not 1 <= fold <= dataset.folds:
        raise DataError(f"fold {fold} of {name}: expected 1 to {dataset.folds}")
    if stride is not None and stride < 1:
        raise DataError(f"stride {stride}: expected 1 or more")
    root, usual = media_folder(name, dataset, data_root, fold)
    stride = usual if dataset.modality == "image" else stride or usual
    if not dataset.train:
        names, note = file_list(root, dataset.pattern)
        return Samples(name, dataset, root, names, np.full(len(names), -1), stride, (note,)), np.ones(len(names), bool)

    path = split_file(name, dataset, data_root, split, fold)
    if name not in CATALOGUE:
        folder, rows = os.path.relpath(path.parent, root), read_list(path)
        (labels, note), notes = own_labels(rows, dataset, path), []
        rows = [row._replace(name=os.path.normpath(os.path.join(folder, row.name))) for row in rows]
    else:
        rows, labels, notes = read_split(path, dataset, split)
        everywhere = labels
        if dataset.one_based:               # a fold alone, or a part of one, need not hold the lowest or highest label
            files = {(data_root / file.format(fold=f), part) for f in range(1, dataset.folds + 1)
                     for part in ("train", "test") for file in getattr(dataset, part)}
            everywhere = np.concatenate([read_split(file, dataset, part)[1] for file, part in files
                                         if file.is_file()])
        labels, note = zero_based(labels, everywhere, dataset, path)
    names, there = locate(root, [row.name for row in rows], dataset.modality)
    if usual != dataset.media[0][1]:
        notes = [*notes, f"{root}: 16 frames sampled by the data set's authors, so stride {usual}"
                 + (f", but stride {stride} was given" if stride != usual else "")]
    people = [row.person for row in rows] if rows[0].person else (
        [name.split("/")[0] for name in names] if dataset.person_folders else None)
    return Samples(name, dataset, root, np.array([os.fsencode(n) for n in names]), labels, stride, (note, *notes),
                   people and np.array([person.encode() for person in people]), fold), there


def load_samples(name: str, data_root: Path, split: str, fold: int = 1, stride: int | None = None) -> Samples:
    """All samples of a data set's "train" or "test" split, with its own stride or another. DataError if anything that
    it needs is missing or odd."""
    samples, there = find_samples(name, data_root, split, fold, stride)
    if there.all():
        return samples
    forms = " as a folder of frames, .mp4 or .avi" if samples.dataset.modality == "video" else ""
    raise DataError(f"{split_file(name, samples.dataset, Path(data_root), split, fold)}: of {len(samples)} samples, "
                    f"not in {samples.root}{forms}: {few(samples.names[~there])}")


def few(items) -> str:
    """How many there are, and the first of them."""
    items = [os.fsdecode(item) for item in items]
    return f"{len(items)}: {', '.join(items[:3])}{', ...' if len(items) > 3 else ''}"


def missing_message(name: str, dataset: DataSet, data_root: Path, fold: int, reason: str) -> str:
    wanted = [f"  {data_root / path}/{dataset.pattern}" for path, _ in dataset.media]
    wanted += ["  " + " or ".join(str(data_root / path.format(fold=fold)) for path in files)
               for files in (dataset.train, dataset.test) if files]
    return "\n".join([f"data set {name} not found: {reason}. Looked below --data-root {data_root} for", *wanted,
                      "Synthetic faces need no download: --dataset synthetic"])


# --------------------------------------------------------------------------------------------------------- readers

def natural(name: str) -> list:
    """Sort key that puts frame 2 before frame 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def read_image(path: Path) -> torch.Tensor:
    """An image as uint8 (3, H, W), upright. Its content, not its name, tells the format; of an animation the first."""
    try:
        with Image.open(path) as image:
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):  # 16-bit grey, which `convert` would clip instead of scale
                image = Image.fromarray((np.array(image) // 257).astype(np.uint8))
            rgb = image if image.mode == "RGB" else image.convert("RGB")  # which would copy
            return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
    except (OSError, ValueError, SyntaxError, LookupError, TypeError, struct.error,
            Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from error


def read_clip(path: Path, choose) -> torch.Tensor:
    """Some frames of a video file or of a folder of frames, uint8 (T, 3, H, W).

    choose: a function from the number of frames n to the T frame numbers wanted, in any order, repeats allowed.
    DataError names a file that cannot be decoded or has fewer frames than it says.
    """
    wanted, frames = (read_folder if os.path.isdir(path) else read_video)(path, choose)
    sizes = {tuple(frame.shape[1:]) for frame in frames.values()}
    if len(sizes) > 1:
        raise DataError(f"{path}: frames of different sizes (height, width): {sorted(sizes)}. A folder of images is "
                        "one clip: photographs are given one by one")
    return torch.stack([frames[i].permute(1, 2, 0) for i in wanted]).permute(0, 3, 1, 2)  # channels last: resizes fast


def read_folder(path: Path, choose) -> tuple[list[int], dict[int, torch.Tensor]]:
    """The frame numbers chosen and those frames, uint8 (3, H, W), of a folder."""
    try:
        files = sorted((f for f in os.listdir(path) if f.lower().endswith(IMAGE_SUFFIXES) and not f.startswith(".")),
                       key=natural)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not files:
        raise DataError(f"{path} holds no frames ({', '.join(IMAGE_SUFFIXES)})")
    wanted = choose(len(files))
    return wanted, {i: read_image(path / files[i]) for i in set(wanted)}


def read_video(path: Path, choose) -> tuple[list[int], dict[int, torch.Tensor]]:
    """The frame numbers chosen and those frames, uint8 (3, H, W), of a video file."""
    try:
        with av.open(os.path.abspath(path), metadata_errors="ignore") as container:  # FFmpeg takes a:b.mp4 for a URL
            if not container.streams.video:
                raise DataError(f"{path} has no video stream")
            stream = container.streams.video[0]
            stream.thread_count = 1         # loading processes run side by side already
            length = path.stat().st_size
            if any(entry.pos + entry.size > length for entry in stream.index_entries):
                raise DataError(f"{path} is truncated: its index lists frames beyond the end of the file")
            packets = [packet for packet in container.demux(stream) if packet.size]
            # Counted, not as declared; trimming without re-encoding leaves packets that are not to be shown.
            times = [packet.pts for packet in packets if not packet.is_discard]
            wanted = choose(len(times)) if times else []
            number = {}                     # of each frame by its time; empty where times cannot tell (AVI has none)
            timed = container.format.name.startswith(("mov,", "matroska")) and None not in times
            if timed and len(set(times)) == len(times):
                number = {time: i for i, time in enumerate(sorted(times))}
            frames, first = {}, min((time for time, i in number.items() if i in wanted), default=None)
            keys = [i for i, p in enumerate(packets) if number and p.is_keyframe and (p.pts or 0) <= first]
            if keys:                        # from the last key frame on, all that is shown later can be decoded
                frames = decode(stream.codec_context, packets[keys[-1]:], set(wanted), number, skipping=True)
            if len(frames) < len(set(wanted)):
                stream.codec_context.flush_buffers()
                frames = decode(stream.codec_context, packets, set(wanted), number)
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"{path} cannot be decoded: {error}") from error
    missing = set(wanted) - frames.keys()
    if missing or not wanted:
        reason = f"frame {min(missing)} of {len(times)} cannot be decoded" if missing else "it has no frames"
        raise DataError(f"{path} is truncated: {reason}")
    return wanted, frames


def decode(codec: av.VideoCodecContext, packets: list[av.Packet], wanted: set[int], number: dict[int, int],
           skipping: bool = False) -> dict[int, torch.Tensor]:
    """Wanted frames by their number, uint8 (3, H, W), upright.

    number: frame numbers by time; where it is empty, frames are counted. skipping: do not decode what is neither
    wanted nor serves to predict other frames.
    """
    frames, counted, to_rgb = {}, count(), VideoReformatter()  # one reformatter keeps its tables
    for packet in [*packets, None]:         # None: what the decoder still holds
        if packet:
            codec.skip_frame = "NONREF" if skipping and number.get(packet.pts) not in wanted else "DEFAULT"
        for frame in codec.decode(packet):
            i = number.get(frame.pts) if number else next(counted)
            if i in wanted:                 # only these become RGB
                rgb = torch.from_numpy(to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray())
                frames[i] = torch.rot90(rgb, round(frame.rotation / 90)).permute(2, 0, 1)
        if len(frames) == len(wanted):
            break
    return frames


# -------------------------------------------------------------------------------------------------- clip sampling

def train_frames(n: int, frames: int, stride: int) -> list[int]:
    """Frame numbers of a training clip out of n: spread evenly over a random window, or all with the last repeated."""
    window = frames * stride
    if n > window:
        start = int(torch.randint(n - window + 1, ()))
        return np.linspace(start, start + window - 1, frames).round().astype(int).tolist()
    return pad(list(range(0, n, stride)), frames)


def pretrain_frames(n: int, frames: int, stride: int) -> list[int]:
    """Frame numbers of a stage-1 clip: every stride-th frame from a random start, the last repeated if n is short."""
    start = int(torch.randint(max(1, n - (frames - 1) * stride), ()))
    return pad(list(range(start, n, stride))[:frames], frames)


def test_frames(n: int, frames: int, stride: int) -> list[int]:
    """Two clips per video, uniformly sampled: the first and the last `frames` of every stride-th frame, joined."""
    every = pad(list(range(0, n, stride)), frames)
    return every[:frames] + every[-frames:]


def pad(numbers: list[int], length: int) -> list[int]:
    return numbers + numbers[-1:] * (length - len(numbers))


# --------------------------------------------------------------------------------------------------- augmentation

def fixed_crop(x: torch.Tensor, box: tuple[float, float, float, float]) -> torch.Tensor:
    """A fixed part of every frame, as fractions (top, left, height, width) of its size."""
    (top, left, height, width), (h, w) = box, x.shape[-2:]
    return v2.functional.crop(x, round(top * h), round(left * w), round(height * h), round(width * w))


def augmentation(stage: str, dataset: DataSet, pixels: int, strength: str = "paper") -> v2.Transform:
    """uint8 (..., 3, h, w) -> uint8 (..., 3, pixels, pixels); one draw serves all frames of a clip.

    stage: "pretrain", "finetune" or "test". strength, for "finetune": "paper", or "light" (flip only), for
    training that takes minutes instead of days.
    """
    bicubic = v2.InterpolationMode.BICUBIC
    if stage == "test":
        return v2.Resize((pixels, pixels), antialias=True)
    if stage == "pretrain" and dataset.modality == "image":
        return v2.Compose([partial(fixed_crop, box=dataset.crop),
                           v2.RandomResizedCrop(pixels, scale=(0.2, 1), interpolation=bicubic),
                           v2.RandomHorizontalFlip()])
    if stage == "pretrain":
        # The released code resizes the short side to 192 in between, which changes no crop's place: left out.
        return v2.Compose([partial(fixed_crop, box=dataset.crop), v2.RandomResizedCrop(pixels, scale=(0.08, 1))])
    if strength == "light":
        return v2.Compose([v2.Resize((pixels, pixels), antialias=True), v2.RandomHorizontalFlip()])
    erase = v2.RandomErasing(p=0.25, value=[round(255 * mean) for mean in IMAGE_MEAN])
    if dataset.modality == "image":
        return v2.Compose([v2.Resize((pixels * 6 // 5,) * 2, antialias=True), v2.RandomCrop(pixels),  # 192 for 160
                           v2.RandomHorizontalFlip(), randaugment(2, 9), erase])
    return v2.Compose([v2.Resize((pixels, pixels), antialias=True), randaugment(4, 7),
                       v2.RandomResizedCrop(pixels, scale=(0.08, 1)), v2.RandomHorizontalFlip(), erase])


def randaugment(operations: int, magnitude: int) -> v2.Transform:
    """'rand-m{magnitude}-n{operations}': magnitudes run to 10, and each operation is applied with probability 1/2."""
    one = v2.RandAugment(num_ops=1, magnitude=magnitude, num_magnitude_bins=11)
    return v2.Compose([v2.RandomApply([one], p=0.5) for _ in range(operations)])


def to_float(x: torch.Tensor) -> torch.Tensor:
    """uint8 images (B, 3, H, W) or clips (B, T, 3, H, W) -> normalised float, clips as (B, 3, T, H, W)."""
    mean, std = (255 * torch.tensor(values, device=x.device).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    x = x.float().sub_(mean).div_(std)
    return x if x.ndim == 4 else x.transpose(1, 2)


# ---------------------------------------------------------------------------------------- single-source mini-batches

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
    source: str                             # "image" or "video"
    epoch: int
    step: int                               # of the epoch
    place: int                              # of the step's micro-batches
    index: np.ndarray                       # sample numbers
    weight: float                           # share of the step's samples; 0 for a process that has none to compute
    last: bool                              # the process's last of this step
    seed: int                               # of masks, mixing and gate noise

    def sample_seed(self, i: int) -> int:
        return draw_seed(self.seed, i)


def draw_seed(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def schedule_epoch(sources: dict[str, Source], seed: int, epoch: int) -> list[list[MicroBatch]]:
    """An epoch's optimiser steps, each of one source, in random order; the same for any number of processes."""
    rng = np.random.default_rng([seed, epoch])
    batches = {name: source.draw(rng) for name, source in sources.items()}
    order = rng.permutation([name for name, drawn in batches.items() for _ in drawn])
    steps = []
    for step, name in enumerate(order.tolist()):
        index = batches[name].pop()
        size = max(1, sources[name].micro // sources[name].repeats)
        parts = [index[i:i + size] for i in range(0, len(index), size)]
        steps.append([MicroBatch(name, epoch, step, place, part, len(part) / len(index), False,
                                 draw_seed(seed, epoch, step, place)) for place, part in enumerate(parts)])
    return steps


class Schedule(torch.utils.data.Sampler):
    """This process's micro-batches from a given (epoch, step) to the end of training."""

    def __init__(self, sources: dict[str, Source], seed: int, epochs: int, rank: int, world: int,
                 epoch: int = 0, step: int = 0):
        self.sources, self.seed, self.epochs, self.start = sources, seed, epochs, (epoch, step)
        self.rank, self.world = rank, world

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
    """Reads and augments whole micro-batches: data[micro_batch] -> (micro_batch, x uint8, labels, unreadable)."""

    def __init__(self, sources: dict[str, Source], stage: str, size: Size, strength: str = "paper"):
        self.sources, self.frames, self.pixels = sources, size.frames, size.pixels
        self.choose = pretrain_frames if stage == "pretrain" else train_frames
        self.augment = {name: augmentation(stage, source.samples.dataset, size.pixels, strength)
                        for name, source in sources.items()}

    def __getitem__(self, micro: MicroBatch):
        """x: (B, 3, H, W) or (B, T, 3, H, W) with `repeats` views of each sample in a row. Samples that cannot be
        read are left out and their errors returned; if none is left, a black one of weight 0 stands for them."""
        source, samples = self.sources[micro.source], self.sources[micro.source].samples
        views, labels, unreadable = [], [], []
        for i, index in enumerate(micro.index):
            torch.manual_seed(micro.sample_seed(i))
            try:
                x = self.read(samples, index)
            except DataError as error:
                unreadable.append(str(error))
                continue
            views += [self.augment[micro.source](x) for _ in range(source.repeats)]
            labels += [int(samples.labels[index])] * source.repeats
        if not views:
            frames = () if micro.source == "image" else (self.frames,)
            views, labels = [torch.zeros(*frames, 3, self.pixels, self.pixels, dtype=torch.uint8)], [0]
            micro = replace(micro, weight=0.0)
        return micro, torch.stack(views), torch.tensor(labels), unreadable

    def read(self, samples: Samples, index: int) -> torch.Tensor:
        path = samples.path(index)
        if not samples.dataset.train and not path.exists():
            raise DataError(f"{path} is listed and not there: python data.py list --dataset {samples.name}")
        if samples.frames_as_images:
            return read_clip(path, lambda n: [int(torch.randint(n, ()))])[0]
        if samples.dataset.modality == "image":
            return read_image(path)
        return read_clip(path, partial(self.choose, frames=self.frames, stride=samples.stride))


class TestData(torch.utils.data.Dataset):
    """Samples as evaluation sees them: data[i] -> (i, views uint8 (v, ...), label); an unreadable one is an error."""

    def __init__(self, samples: Samples, size: Size):
        self.samples, self.frames = samples, size.frames
        self.resize = augmentation("test", samples.dataset, size.pixels)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        """views: (1, 3, H, W) of an image, (2, T, 3, H, W) of a video."""
        path = self.samples.path(index)
        if self.samples.dataset.modality == "image":
            views = self.resize(read_image(path))[None]
        else:
            frames = read_clip(path, partial(test_frames, frames=self.frames, stride=self.samples.stride))
            views = self.resize(frames).unflatten(0, (2, self.frames))
        return index, views, int(self.samples.labels[index])


def loader(dataset, workers: int, **options) -> torch.utils.data.DataLoader:
    """A DataLoader whose workers prefetch, without copies where there is no GPU."""
    return torch.utils.data.DataLoader(dataset, num_workers=workers, pin_memory=torch.cuda.is_available(),
                                       prefetch_factor=4 if workers else None, worker_init_fn=outlast_signals,
                                       **options)


def outlast_signals(worker: int) -> None:
    """A signal to all processes at once is the training process's to handle, which still needs its batches: a loading
    process ends at its parent's SIGTERM only."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):      # not on macOS
        def watch():
            while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
                pass
            os._exit(0)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=watch, daemon=True).start()


def hold_out(samples: Samples, share: float, seed: int) -> tuple[Samples, Samples]:
    """Split off validation samples, the same share of each class: (rest, held out)."""
    rng = np.random.default_rng([seed, len(samples)])
    held = np.zeros(len(samples), bool)
    for label in np.unique(samples.labels):
        of_class = rng.permutation(np.flatnonzero(samples.labels == label))
        held[of_class[:round(share * len(of_class))]] = True
    if held.all() or not held.any():
        raise DataError(f"--validation {share} of the {len(samples)} samples of {samples.name} leaves none to "
                        f"{'train on' if held.all() else 'hold out'}")
    return samples.subset(~held), samples.subset(held)


# -------------------------------------------------------------------------------------------------- contact sheets

FONT = ImageFont.load_default(13)


def text_width(*texts: str) -> int:
    """Of the longest line, in pixels."""
    return max(int(FONT.getlength(line)) for text in texts for line in text.split("\n"))


def contact_sheet(rows: list[tuple[str, torch.Tensor]], least_height: int = 96) -> Image.Image:
    """Rows of pictures with a caption at the left of each.

    rows: (caption, uint8 (n, 3, h, w)), all of one h and w. Small pictures are enlarged by a whole number until they
    are at least `least_height` high, without smoothing: what a model sees is shown pixel by pixel.
    """
    enlarge = -(-least_height // rows[0][1].shape[-2])
    grids = [make_grid(pictures.repeat_interleave(enlarge, -1).repeat_interleave(enlarge, -2), len(pictures),
                       padding=2, pad_value=255) for _, pictures in rows]
    margin = 10 + text_width(*(caption for caption, _ in rows))
    sheet = Image.new("RGB", (margin + max(grid.shape[2] for grid in grids), sum(grid.shape[1] for grid in grids)),
                      "white")
    top = 0
    for (caption, _), grid in zip(rows, grids):
        sheet.paste(Image.fromarray(grid.permute(1, 2, 0).numpy()), (margin, top))
        ImageDraw.Draw(sheet).text((5, top + grid.shape[1] // 2), caption, "black", FONT, anchor="lm")
        top += grid.shape[1]
    return sheet


# -------------------------------------------------------------------------------------------------- check and show

# Data set, split, fold; digest of the list (see list_digest), "-" where it is not public; samples per class.
PUBLISHED = """
dfew train 1 b5e69af01c83a76a 1956 1515 2135 1738 1175 116 721
dfew train 2 4661107af97e644e 1956 1515 2135 1738 1175 116 721
dfew train 3 d7c2cd8081d8bde1 1956 1515 2135 1738 1175 116 722
dfew train 4 e84214471e6128d6 1956 1515 2135 1739 1175 116 722
dfew train 5 a400ea1da6645378 1956 1516 2136 1739 1176 116 722
dfew test 1 e95d65196526742a 489 379 534 435 294 29 181
dfew test 2 817025bc25f0173f 489 379 534 435 294 29 181
dfew test 3 36ee181ee3e4f15c 489 379 534 435 294 29 180
dfew test 4 2f3d7386a800cfe2 489 379 534 434 294 29 180
dfew test 5 3c188ce5e476b3a0 489 378 533 434 293 29 180
ferv39k train 1 6479f525367e41ad 5906 1833 1680 5854 7790 5523 2502
ferv39k test 1 79bff140cce3582b 1487 467 431 1473 1958 1393 638
mafw train 1 afd358bd96cf5b98 1112 732 188 145 511 500 993 209 910 1176 857
mafw train 2 0fa3ad931fb3e6b4 1112 733 189 145 511 500 993 209 910 1176 857
mafw train 3 2a1edb1dceffdb5e 1112 733 189 146 511 500 994 210 910 1176 858
mafw train 4 8c85fa9dcaebc44d 1112 733 189 146 511 500 994 210 911 1176 858
mafw train 5 4dab038ae08fa4a5 1112 733 189 146 512 500 994 210 911 1176 858
mafw test 1 43299d4674cc1ec4 278 184 48 37 128 125 249 53 228 294 215
mafw test 2 8faf27fa9220a0a6 278 183 47 37 128 125 249 53 228 294 215
mafw test 3 b792978b766bf944 278 183 47 36 128 125 248 52 228 294 214
mafw test 4 b3a0860e0b962e92 278 183 47 36 128 125 248 52 227 294 214
mafw test 5 5e433379047a03e2 278 183 47 36 127 125 248 52 227 294 214
affectnet-7 test 1 a4590d7506d24385 471 457 473 458 469 469 470
affectnet-7 test 1 - 500 500 500 500 500 500 500
affectnet-7 train 1 - 74874 134415 25459 14090 6378 3803 24882
affectnet-8 test 1 - 500 500 500 500 500 500 500 500
affectnet-8 train 1 - 74874 134415 25459 14090 6378 3803 24882 3750
rafdb train 1 - 1290 281 717 4772 1982 705 2524
rafdb test 1 - 329 74 160 1185 478 162 680
"""


def list_digest(names: list[str], labels: np.ndarray) -> str:
    """16 hexadecimal digits of names and labels from 0, whatever the order, leading zeros and suffixes of videos."""
    names = [name.removesuffix(".mp4").removesuffix(".avi").zfill(5) for name in names]
    lines = sorted(f"{name},{label}" for name, label in zip(names, labels.tolist()))
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()


class Inspection(torch.utils.data.Dataset):
    """Reads samples as evaluation does: data[i] -> (i, frames, height, width, hash of the pixels, error or "")."""

    def __init__(self, samples: Samples):
        self.samples = samples

    def __getitem__(self, index: int):
        path, counted = self.samples.path(index), []
        try:
            pixels = read_image(path)[None] if self.samples.dataset.modality == "image" else read_clip(
                path, lambda n: counted.append(n) or test_frames(n, SIZES["base"].frames, self.samples.stride))
        except DataError as error:
            return index, 0, 0, 0, 0, str(error)
        content = hashlib.blake2b(repr(pixels.shape).encode() + pixels.numpy().tobytes(), digest_size=8).digest()
        return index, *(counted or [1]), *pixels.shape[-2:], int.from_bytes(content, "big", signed=True), ""


def inspect(samples: Samples, there: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Read the samples that are there on all cores. Returns columns frames, height, width, pixels; and errors."""
    table, errors = np.zeros((len(samples), 4), np.int64), []
    for i, *row, error in tqdm(loader(Inspection(samples), os.cpu_count() or 1, batch_size=None,
                                      sampler=np.flatnonzero(there)), desc=f"reading {samples.name}"):
        table[i] = row
        errors += [error] if error else []
    return table, errors


def same_pixels(pixels: np.ndarray) -> list[np.ndarray]:
    """Groups of positions in the hashes (n,) where they are the same; 0 = not read."""
    order = np.argsort(pixels, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(pixels[order])) + 1)
    return [group for group in groups if len(group) > 1 and pixels[group[0]]]


def check_lists(splits: dict[str, Samples], title: str, fold: int) -> list[str]:
    """Print a fold's labels and counts beside the published ones; returns what is wrong with its lists."""
    wrong, columns = [], [["", *next(iter(splits.values())).dataset.classes, "in all"]]
    for split, samples in splits.items():
        print(f"{title}{split}", *samples.notes, sep="\n  ")
        rows = map(str.split, PUBLISHED.strip().splitlines())
        versions = [(row[3], list(map(int, row[4:]))) for row in rows if row[:3] == [samples.name, split, str(fold)]]
        counts = samples.counts() if samples.dataset.classes else []
        for head, each in [(split, counts), *(("published", each) for _, each in versions)]:
            columns.append([head, *(f"{count:,}" for count in [*each, sum(each) or len(samples)])])
        digest = versions and list_digest([os.fsdecode(name) for name in samples.names.tolist()], samples.labels)
        if any(known == digest for known, _ in versions):
            print("  matches the published split")
        elif ("-", counts) in versions:
            print("  has the published number of samples of each class")
        elif versions:
            same = counts in [each for _, each in versions]
            wrong.append(f"{title}{split} is not the published split: {'other samples' if same else 'other counts'}")
        names, times = np.unique(samples.names, return_counts=True)
        if len(names) < len(samples):
            wrong.append(f"{title}{split} lists more than once: {few(names[times > 1])}")
    for name, *cells in zip(*columns):
        print(f"  {name:15}" + "".join(f"{cell:>12}" for cell in cells))
    return wrong


def check_overlap(parts: dict[str, tuple[Samples, np.ndarray]], title: str) -> list[str]:
    """What is wrong between the samples of a fold: the same ones, people or pixels in train and test, or the same
    pixels under two labels. parts: the samples of each split and the hashes of their pixels."""
    wrong, splits = [], [samples for samples, _ in parts.values()]
    names, labels = (np.concatenate([getattr(samples, field) for samples in splits]) for field in ("names", "labels"))
    test = np.repeat([split == "test" for split in parts], [len(samples) for samples in splits])
    leaks, differing, harmless = [], [], []
    for group in same_pixels(np.concatenate([pixels for _, pixels in parts.values()])):
        files = dict.fromkeys(map(os.fsdecode, names[group].tolist()))
        if len(files) > 1:                  # else one sample that is listed twice
            kind = leaks if len(set(test[group])) > 1 else differing if len(set(labels[group])) > 1 else harmless
            kind.append(" = ".join(files))
    if harmless:
        print(f"{title}the same pictures twice, with the same label: {few(harmless)}")
    people = [samples.people for samples in splits if samples.people is not None]
    for what, both in (("samples", np.intersect1d(names[test], names[~test])),
                       ("people", np.intersect1d(*people) if len(people) == 2 else []), ("the same pictures", leaks)):
        if len(both):
            wrong.append(f"{title}{what} in both train and test: {few(both)}")
    if differing:
        wrong.append(f"{title}the same pictures with different labels: {few(differing)}")
    return wrong


def check(name: str, data_root: Path, fold: int | None = None, stride: int | None = None) -> list[str]:
    """Read every sample of a data set once, print what it holds, and return what is wrong. Without a fold: all."""
    dataset, wrong = catalogue(name), []
    folds = range(1, dataset.folds + 1) if fold is None else [fold]
    splits = ["train", "test"] if dataset.test else ["train"]
    found = {(f, split): find_samples(name, data_root, split, f, stride) for f in folds for split in splits}
    one = found[folds[0], "train"][0]
    every = replace(one, names=np.unique(np.concatenate([samples.names for samples, _ in found.values()])))
    place = {key: np.searchsorted(every.names, samples.names) for key, (samples, _) in found.items()}
    there = np.zeros(len(every), bool)
    for key, (_, present) in found.items():
        there[place[key]] = present
    if not dataset.train:
        now = np.array(scan(every.root, dataset.pattern))
        there, unlisted = np.isin(every.names, now), np.setdiff1d(now, every.names)
        if len(unlisted) or not there.all():
            wrong.append(f"{every.root / FILE_LIST} is out of date, {len(unlisted)} files are not in it and "
                         f"{(~there).sum()} of it are gone: python data.py list --dataset {name}")
    table, errors = inspect(every, there)
    stride = f", stride {every.stride}" if dataset.modality == "video" else ""
    print(f"{name}: {len(every):,} {dataset.modality}s in {every.root}{stride}")
    for f in folds:
        title = f"fold {f}, " if dataset.folds > 1 else ""
        wrong += check_lists({split: found[f, split][0] for split in splits}, title, f)
        wrong += check_overlap({split: (found[f, split][0], table[place[f, split], 3]) for split in splits}, title)
    if not there.all():
        wrong.append(f"missing in {every.root}: {few(every.names[~there])}")
    if errors:
        wrong.append(f"unreadable: {few(errors)}")
    counted = table[table[:, 0] > 0]
    if len(counted):
        shapes = Counter(map(tuple, counted[:, 1:3].tolist()))
        print("height x width: " + ", ".join(f"{h} x {w} ({times:,})" for (h, w), times in shapes.most_common(5))
              + (f" and {len(shapes) - 5} others" if len(shapes) > 5 else ""))
    if len(counted) and dataset.modality == "video":
        low, high = counted[:, 0].min(), counted[:, 0].max()
        print(f"frames of a clip: {low} minimum, {np.median(counted[:, 0]):g} median, {high} maximum")
        if every.stride > 1 and high <= SIZES["base"].frames:
            wrong.append(f"no clip has more than {high} frames: they were sampled already, but stride {every.stride} "
                         f"is meant for whole clips: put these into {every.root}, or give --stride 1")
    return wrong


def show(name: str, data_root: Path, fold: int = 1, stride: int | None = None, masked: bool = False,
         seed: int = 0) -> Image.Image:
    """A contact sheet of one batch as training gets it: 8 clips as rows of frames, or images, a row for each class.

    masked: as stage 1 gets it, with the masked patches grey. Without classes: as stage 1 gets it in any case.
    """
    samples, synthetic = load_samples(name, data_root, "train", fold, stride), is_synthetic(name)
    classes, kind, size = samples.dataset.classes, samples.dataset.modality, SIZES["tiny" if synthetic else "base"]
    stage = "finetune" if classes and not masked else "pretrain"
    batch = 8 if kind == "video" else 16 * max(1, len(classes))
    sources = {kind: Source(samples, batch, batch, balanced=kind == "image" and stage == "finetune")}
    batches = loader(TrainingData(sources, stage, size, "light" if synthetic else "paper"), 0, batch_size=None,
                     sampler=Schedule(sources, seed, 1, 0, 1))
    micro, x, labels, unreadable = next(iter(batches))
    if unreadable:
        raise DataError(unreadable[0])
    x = x.reshape(len(x), -1, 3, size.pixels, size.pixels)                  # (B, T, 3, H, W), T = 1 for images
    if masked:
        torch.manual_seed(micro.seed)       # the masks that training draws for this batch on the CPU
        cells = size.pixels // size.patch
        mask = random_mask(len(x), getattr(size, f"{kind}_tokens"), MASK_RATIO[kind]).unflatten(1, (-1, cells, cells))
        for dim, times in enumerate((size.tubelet, size.patch, size.patch), start=1):
            mask = mask.repeat_interleave(times, dim)
        x = x.masked_fill(mask[:, :x.shape[1], None], 128)
    if kind == "video":
        captions = [f"{classes[label] if classes else ''}\n{os.fsdecode(bytes(samples.names[i]))[-30:]}"
                    for label, i in zip(labels.tolist(), micro.index)]
        return contact_sheet(list(zip(captions, x)))
    return contact_sheet([(classes[label] if classes else "", x[labels == label][:16, 0])
                          for label in labels.unique().tolist()])


# ------------------------------------------------------------------------------------------------- synthetic faces
# A parametric face painted with numpy, driven by FACS action units (AU), stands in for AffectNet, DFEW and VoxCeleb2.
# Each person has an own face, expressiveness and resting expression. Every file is a function of the seed and of its
# own number only.

ACTION_UNITS = (1, 2, 4, 5, 6, 7, 9, 12, 15, 20, 23, 26, 45)  # the columns of every `action_units` array
EXPRESSIONS = {"neutral": (), "happiness": (6, 12), "sadness": (1, 4, 15), "surprise": (1, 2, 5, 26),
               "fear": (1, 2, 4, 5, 20, 26), "disgust": (9, 15), "anger": (4, 5, 7, 23)}
AFFECTNET_LABELS = tuple(EXPRESSIONS)  # a label is a position in these
DFEW_LABELS = ("happiness", "sadness", "neutral", "anger", "surprise", "disgust", "fear")
TRAIN_IMAGE, TEST_IMAGE, CLIP, UNLABELLED = range(4)  # kinds of files, each with its own pool of people
FRAMES_PER_SECOND, FOLDS, VIDEOS_PER_PERSON = 12, 5, 4
VOXCELEB_SCALE = 5 / 7  # an 84x84 VoxCeleb2 frame holds a face of the size aligned to 60x60


class Person(NamedTuple):
    """What all pictures of a person share: float32 lengths in face units (see Canvas) and RGB colours in 0-1."""
    head: np.ndarray        # half width, chin, hairline, end of the hair
    eyes: np.ndarray        # distance from the nose, half width, brow thickness, brow height
    mouth: np.ndarray       # height, half width, lip thickness
    nose: np.ndarray        # half width at the wings
    skin: np.ndarray
    hair: np.ndarray
    iris: np.ndarray
    beard: float            # opacity
    glasses: float          # opacity
    strength: np.ndarray    # (13,) action units at this person's apex
    resting: np.ndarray     # (13,) action units of the relaxed face, which make a single frame ambiguous


def draw_person(rng: np.random.Generator) -> Person:
    def uniform(low, high) -> np.ndarray:
        return rng.uniform(low, high).astype(np.float32)

    hair_end, resting = rng.choice([0.0, 1.3]), np.zeros(13)
    resting[rng.choice(11, 3, replace=False)] = rng.uniform(0.1, 0.45, 3)  # never 26 and 45: mouth shut, eyes open
    return Person(head=uniform((0.68, 0.86, -0.82, hair_end - 0.1), (0.80, 0.94, -0.66, hair_end + 0.1)),
                  eyes=uniform((0.31, 0.155, 0.035, -0.43), (0.37, 0.185, 0.06, -0.38)),
                  mouth=uniform((0.47, 0.25, 0.06), (0.53, 0.31, 0.09)), nose=uniform((0.13,), (0.18,)),
                  skin=(0.93, 0.76, 0.66) * rng.uniform(0.55, 1.0) ** np.array([0.7, 1.1, 1.4], np.float32),
                  hair=(0.55, 0.40, 0.25) * rng.uniform(0.2, 1.0) ** np.array([0.9, 1.1, 1.2], np.float32),
                  iris=rng.choice([(0.28, 0.16, 0.08), (0.22, 0.38, 0.55), (0.25, 0.40, 0.25)]),
                  beard=rng.uniform(0.25, 0.6) * (rng.random() < 0.2), glasses=0.8 * (rng.random() < 0.15),
                  strength=rng.uniform(0.7, 1.0) * rng.uniform(0.6, 1.0, 13), resting=resting)


class Canvas(NamedTuple):
    """Frames being painted.  Face coordinates move with the head: origin between nose and eyes, x to the right,
    y down, 1 = half the side of an aligned frame."""
    rgb: np.ndarray         # (3, T, H, W) in 0-1
    x: np.ndarray           # (T, H, W) face coordinates of the pixels
    y: np.ndarray
    origin: np.ndarray      # (T,) position of the face's origin, column + 1j * row
    gain: np.ndarray        # (T,) complex; the face point z = x + 1j * y lies at the position origin + gain * z

    def crop(self, half_width: float, top: float, bottom: float) -> "Canvas":
        """A view of the smallest window that shows |x| <= half_width, top <= y <= bottom in every frame."""
        corners = self.origin + self.gain * [[x + 1j * y] for x in (-half_width, half_width) for y in (top, bottom)]
        rows, columns = (slice(max(int(p.min()), 0), int(p.max()) + 2) for p in (corners.imag, corners.real))
        return self._replace(**{name: getattr(self, name)[..., rows, columns] for name in ("rgb", "x", "y")})

    def soften(self, distance: np.ndarray, width: float = 0.0) -> np.ndarray:
        """Opacity of a shape from the signed distance to its edge (inside > 0): a ramp of one pixel plus `width`."""
        opacity = distance / (width + 1 / np.abs(self.gain[:, None, None])).astype(np.float32)
        opacity += 0.5
        return np.clip(opacity, 0, 1, out=opacity)

    def paint(self, opacity: np.ndarray, colour=(0, 0, 0)) -> None:
        """Lay a colour (3,) or (3, T, H, W) over the frames; by default black, which at low opacity is shade."""
        colour = np.asarray(colour, np.float32)
        layer = (colour if colour.ndim == 4 else colour[:, None, None, None]) - self.rgb
        layer *= opacity
        self.rgb[...] += layer


def paint_background(canvas: Canvas, rng: np.random.Generator) -> None:
    """Smooth random colours, still while the head moves, with a few spots and posts as distractors."""
    size = canvas.rgb.shape[-1]
    blobs = rng.uniform(0.2, 0.7, 3) + rng.uniform(-0.2, 0.2, (6, 6, 1)) + rng.uniform(-0.07, 0.07, (6, 6, 3))
    image = Image.fromarray((255 * blobs.clip(0, 1)).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    scene = np.asarray(image, np.float32) / 255
    rows, columns = np.mgrid[:size, :size].astype(np.float32) / size
    for column, row, radius, roundness in rng.uniform((0, 0, 0.04, 0), (1, 1, 0.15, 1), (4, 4)):
        distance = radius - np.hypot(columns - column, roundness * (rows - row))
        scene += 0.6 * np.clip(size * distance + 0.5, 0, 1)[..., None] * (rng.uniform(0.1, 0.9, 3) - scene)
    canvas.rgb[...] = scene.transpose(2, 0, 1)[:, None]


def paint_head(canvas: Canvas, person: Person, au: dict, shirt: np.ndarray) -> None:
    half_width, chin, hairline, hair_end = person.head
    x, y, x2 = canvas.x, canvas.y, np.square(canvas.x)
    canvas.paint(canvas.soften(y - 1.12 - 0.25 * x2), shirt)
    hair = (0.85 + 0.15 * np.sin(22 * x + 4 * y)) * person.hair[:, None, None, None].astype(np.float32)
    radius = np.hypot(x / (half_width + 0.14), np.minimum(y + 0.1, 0) / 0.95)
    canvas.paint(canvas.soften(0.9 - 0.9 * radius) * canvas.soften(hair_end - y, 0.2), hair)
    canvas.paint(canvas.soften(np.minimum(0.36 - np.abs(x), y - 0.5)), 0.75 * person.skin)  # the neck
    radius = np.hypot(x / half_width, y / np.where(y > 0, chin + 0.12 * au[26], np.float32(0.92)))
    tint = 1.06 - 0.3 * np.square(radius) + 0.03 * np.sin(5 * x + 2 * y + 60 * person.nose)
    face = canvas.soften(0.8 * (1 - radius))
    canvas.paint(face, tint * person.skin[:, None, None, None].astype(np.float32))
    canvas.paint(person.beard * face * canvas.soften(y - 0.62 + 0.6 * x2, 0.25), person.hair)
    fringe = canvas.soften(1.06 - radius) * canvas.soften(hairline + 0.35 * x2 - y, 0.06)
    canvas.paint(fringe, hair)  # a little beyond the face, to leave no seam


def paint_folds(canvas: Canvas, person: Person, au: dict) -> None:
    """The nose, the cheeks and the wrinkles that action units make in the skin."""
    brows = canvas.crop(0.5, -0.75, -0.2)
    across = np.abs(brows.x)
    waves = np.maximum(np.sin(45 * (brows.y + 0.1 * np.square(across))), 0)
    forehead = brows.soften(0.42 - across, 0.2) * brows.soften(-0.58 - brows.y, 0.05)
    brows.paint(waves * forehead * (0.25 * np.maximum(0.6 * au[1], au[2])))
    frown = brows.soften(0.022 - np.abs(across - 0.055)) * brows.soften(0.11 - np.abs(brows.y + 0.36), 0.06)
    brows.paint(frown * (0.5 * au[4] * (1 - 0.5 * au[1])))

    nose = canvas.crop(0.62, -0.2, 0.62)
    x, y, across = nose.x, nose.y + 0.07 * au[9], np.abs(nose.x)  # AU 9 lifts the nose
    wings = person.nose + 0.03 * au[9]
    bridge = nose.soften(0.2 - np.abs(y), 0.1)
    nose.paint(0.22 * bridge * nose.soften(0.05 - np.abs(x - 0.08 - 0.12 * np.maximum(y, 0)), 0.08))
    nose.paint(0.25 * bridge * nose.soften(0.035 - np.abs(x + 0.02), 0.06), (1, 1, 0.95))
    tip = nose.soften(0.03 - np.abs(y - 0.24 + 1.5 * np.square(across)), 0.03) * nose.soften(wings - across, 0.04)
    nose.paint(0.35 * tip)
    nose.paint(0.6 * nose.soften(0.04 - np.hypot(across - 0.6 * wings, 1.4 * (y - 0.215))))  # nostrils
    waves = np.maximum(np.sin(50 * nose.y + 12 * across), 0)
    nose.paint(waves * nose.soften(0.16 - across, 0.06) * nose.soften(0.09 - nose.y, 0.05) * (0.5 * au[9]))
    furrow = nose.soften(0.018 - np.abs(across - wings - 0.06 - 0.55 * np.maximum(y - 0.15, 0)), 0.02)
    nose.paint(furrow * nose.soften(0.17 - np.abs(y - 0.3), 0.05) * np.maximum(0.35 * au[12], 0.45 * au[9]))
    cheek = nose.soften(1 - np.hypot((across - 0.42) / 0.17, (nose.y - 0.16) / 0.1), 0.8)
    nose.paint(cheek * (0.35 * au[6]), np.minimum(person.skin * (1.25, 1.0, 0.95), 1))
    bag = nose.soften(0.02 - np.abs(nose.y - 0.01 - 1.5 * np.square(across - 0.38)), 0.02)  # pushed up by the cheek
    nose.paint(bag * nose.soften(0.2 - np.abs(across - 0.38), 0.05) * (0.4 * au[6]))


def paint_eyes(canvas: Canvas, person: Person, au: dict) -> None:
    """Eyes, glasses and brows; left and right at once, as functions of |x|."""
    distance, half_width, thickness, brow_height = person.eyes
    canvas = canvas.crop(0.66, -0.72, 0.06)
    across, y = np.abs(canvas.x), canvas.y + 0.16
    along = (across - distance) / half_width  # -1 at the inner, 1 at the outer corner of the eye
    arc = 1 - np.square(along)
    lower = 0.065 * (1 - 0.55 * au[7] - 0.55 * au[6] * (1 - 0.5 * au[7]))
    upper = 0.1 * (1 + 0.75 * au[5] - 0.3 * au[7] - 0.15 * au[6] - 0.15 * au[9])
    upper = upper - (0.8 * lower + upper) * au[45]  # a blink brings the upper lid to the lower one
    below_lid = y + upper * arc
    canvas.paint(0.25 * canvas.soften(1 - np.hypot(along / 1.25, y / 0.2), 0.6))  # the socket
    opening = canvas.soften(np.minimum(below_lid, lower * arc - y)) * canvas.soften(arc, 0.1)
    radius = np.hypot(across - distance, y + 0.02)
    canvas.paint(opening, (0.95, 0.94, 0.92))
    canvas.paint(opening * canvas.soften(0.085 - radius), person.iris)
    canvas.paint(opening * canvas.soften(0.04 - radius), (0.03, 0.03, 0.03))
    canvas.paint(0.85 * canvas.soften(0.02 - np.abs(below_lid)) * canvas.soften(arc), (0.1, 0.07, 0.06))  # lashes
    ring = 0.02 - 0.2 * np.abs(np.hypot(along / 1.35, (y - 0.01) / 0.22) - 1)
    canvas.paint(person.glasses * canvas.soften(ring), (0.1, 0.1, 0.12))

    inner = 0.17 * au[1] - 0.15 * au[4] * (1 - 0.75 * au[1]) - 0.05 * au[9]  # how far the brow's two ends rise
    outer = 0.17 * au[2] - 0.05 * au[4] - 0.02 * au[9] - 0.02 * au[1]
    along = (across - distance + 0.06 * au[4]) / (1.3 * half_width)
    rise = 0.05 * (1 - np.square(along)) + 0.5 * (inner + outer) + 0.5 * (outer - inner) * along
    edge = thickness * (1 - 0.35 * along) - np.abs(canvas.y - brow_height + rise)
    canvas.paint(0.9 * canvas.soften(np.minimum(edge, 0.25 * (1 - np.abs(along)))), 0.6 * person.hair)


def paint_mouth(canvas: Canvas, person: Person, au: dict) -> None:
    height, half_width, thickness = person.mouth
    canvas = canvas.crop(0.56, 0.2, 1.02)
    half_width = half_width * (1 + 0.38 * au[12] + 0.4 * au[20] - 0.22 * au[23] - 0.18 * au[26] * (1 - au[20]))
    jaw = au[26] * (1 - 0.45 * au[20])
    opening = 0.02 + 0.34 * jaw + 0.11 * np.square(au[12]) + 0.04 * au[20]
    thickness = thickness * (1 - 0.65 * au[23] - 0.25 * au[12])
    across2 = np.square(canvas.x / half_width)
    arc = np.maximum(1 - across2, 0)
    bow = np.sqrt(arc)
    corners = 0.15 * au[15] - 0.17 * au[12] + 0.05 * au[20]  # how far they drop
    middle = height + corners * across2 - (0.08 * au[9] + 0.03 * au[15]) * arc
    above = canvas.y - middle + 0.25 * opening * bow  # signed distances to the cavity's edges
    below = middle + 0.75 * opening * bow - canvas.y
    inside = half_width - np.abs(canvas.x)
    shadow = canvas.soften(0.03 - np.abs(below + 1.2 * thickness + 0.03), 0.05) * canvas.soften(inside - 0.1, 0.1)
    canvas.paint(0.3 * shadow)
    lips = np.minimum(above + thickness * arc, below + 1.2 * thickness * arc)
    canvas.paint(canvas.soften(np.minimum(lips, inside)), person.skin * (0.82, 0.52, 0.52))
    cavity = canvas.soften(np.minimum(np.minimum(above, below), inside))
    canvas.paint(cavity, (0.2, 0.05, 0.06))
    canvas.paint(cavity * canvas.soften(0.13 - below, 0.05) * jaw, (0.62, 0.27, 0.27))  # the tongue
    teeth = canvas.soften(0.01 + 0.1 * au[12] + 0.06 * au[20] + 0.03 * jaw - above)
    canvas.paint(cavity * teeth * np.minimum(8 * opening - 0.16, 1), (0.95, 0.93, 0.88))


def render_faces(person: Person, action_units: np.ndarray, pose: np.ndarray, size: int,
                 rng: np.random.Generator) -> np.ndarray:
    """Render a clip.

    action_units: (T, 13) float32 in 0-1, ordered as ACTION_UNITS.
    pose: (T, 4) rotation in radians, shift right and down as fractions of the frame, log scale.
    Returns (T, size, size, 3) uint8 RGB.
    """
    rotation, right, down, log_scale = pose.T
    origin = size * (0.5 + right + 1j * (0.5 + down)) - (0.5 + 0.5j)  # pixel centres have whole numbers
    gain = 0.5 * size * np.exp(log_scale + 1j * rotation)
    rows, columns = np.mgrid[:size, :size]
    face = (columns + 1j * rows).astype(np.complex64) - origin.astype(np.complex64)[:, None, None]
    face /= gain.astype(np.complex64)[:, None, None]
    x, y = face.real.copy(), face.imag.copy()
    canvas = Canvas(np.empty((3, *x.shape), np.float32), x, y, origin, gain)
    au = dict(zip(ACTION_UNITS, action_units.T[..., None, None]))
    paint_background(canvas, rng)
    paint_head(canvas, person, au, shirt=rng.uniform(0.1, 0.8, 3))
    for paint in (paint_folds, paint_mouth, paint_eyes):
        paint(canvas, person, au)
    level, sideways, downward = rng.uniform((0.85, -0.22, -0.15), (1.1, 0.22, 0.05)).astype(np.float32)
    rgb = canvas.rgb * (255 * (level + sideways * x + downward * y))  # soft light from a direction
    rgb += 5 * rng.random(x.shape, np.float32) - 2  # weak sensor noise
    return np.ascontiguousarray(rgb.clip(0, 255).astype(np.uint8).transpose(1, 2, 3, 0))


def move_head(frames: int, rng: np.random.Generator) -> np.ndarray:
    """Poses (T, 4) of an aligned face that sways slowly: within 0.06 rad, 3 % right and down, 4 % in size."""
    seconds = np.arange(frames)[:, None] / FRAMES_PER_SECOND
    sway = np.sin(2 * np.pi * (rng.uniform(0.1, 0.6, 4) * seconds + rng.random(4)))
    return (0.06, 0.03, 0.03, 0.04) * (0.6 * rng.uniform(-1, 1, 4) + 0.4 * sway)


def pulse(frames: int, least_gap: float, most_gap: float, half_width: float, rng: np.random.Generator) -> np.ndarray:
    """A curve (T,) at 0 with brief bumps of height 0.6-1 at random gaps; gaps and widths in frames."""
    centres = np.cumsum(rng.uniform(least_gap, most_gap, frames)) - rng.uniform(0, most_gap)
    distance = np.abs(np.arange(frames)[:, None] - centres)
    return (rng.uniform(0.6, 1, frames) * np.clip(1.4 - 1.4 * distance / half_width, 0, 1)).max(1)


def perform(person: Person, expression: str, frames: int, rng: np.random.Generator) -> np.ndarray:
    """Action units (T, 13) of a clip: neutral, rise to an apex, perhaps decay; with blinks and perhaps speech."""
    start, rise, hold, fall, rest = rng.uniform((0, 3, 4, 3, 0), (frames / 3, 10, frames, 12, 0.6))
    time = np.arange(frames)[:, None] - start - rng.uniform(0, 2, 13)  # the action units do not start quite together
    onset, offset = (t * t * (3 - 2 * t) for t in (np.clip(time / rise, 0, 1),
                                                   np.clip((time - rise - hold) / fall, 0, 1)))
    apex = rng.uniform(0.8, 1.0) * person.strength * np.isin(ACTION_UNITS, EXPRESSIONS[expression])
    units = dict(zip(ACTION_UNITS, np.maximum(apex * onset * (1 - (1 - rest) * offset), person.resting).T))
    neutral = expression == "neutral"
    if rng.random() < (0.7 if neutral else 0.35):  # speech: a single frame of it can look like surprise
        loudness = rng.uniform(0.4, 1.0) if neutral else rng.uniform(0.1, 0.35)
        units[26] = np.maximum(units[26], loudness * pulse(frames, 3, 8, 2.5, rng))
    if neutral and rng.random() < 0.5:  # a flash of the brows, as in surprise and fear
        flash = rng.uniform(0.5, 1.0) * pulse(frames, 12, 40, 4, rng)
        units[1], units[2] = np.maximum(units[1], flash), np.maximum(units[2], flash)
    units[45] = pulse(frames, 15, 45, 2, rng)
    return np.stack(list(units.values()), 1).astype(np.float32)


class FaceFile(NamedTuple):
    """A file to write; `index` counts the files and `person` the people of its kind."""
    path: Path
    seed: int
    kind: int
    index: int
    person: int
    expression: str


def plan_files(root: Path, seed: int, scale: float) -> list[FaceFile]:
    """All images and videos.  A person of a labelled pool shows each expression once."""
    train, test, clip, unlabelled = (max(1, round(scale * people)) for people in (300, 50, 16, 400))
    image, files = "AffectNet/Manually_Annotated_Images/{folder}/{index:06d}.jpg", []
    for kind, people, each, name, first in (
            (TRAIN_IMAGE, train, 7, image, 1), (TEST_IMAGE, test, 7, image, train + 1),
            (CLIP, FOLDS * clip, 7, "DFEW/clip_jpg_256/{number:05d}.mp4", 1),
            (UNLABELLED, unlabelled, VIDEOS_PER_PERSON, "VoxCeleb2/id{folder:05d}/synth{index:06d}/00001.mp4", 1)):
        for index in range(people * each):
            path = root / name.format(folder=first + index // each, index=index, number=index + 1)
            files.append(FaceFile(path, seed, kind, index, index // each, DFEW_LABELS[index % 7]))
    return files


def write_video(path: Path, frames: np.ndarray) -> None:
    """Encode (T, H, W, 3) uint8 RGB as H.264.

    Equal frames give equal bytes only with one thread and without x264's lookahead, which "zerolatency" turns off:
    with it, equal small frames were seen to give other bytes from run to run.
    """
    options = {"crf": "18", "preset": "veryfast", "tune": "zerolatency"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())


def write_file(file: FaceFile) -> None:
    """Draw the person from (seed, pool, number) and the rest from (seed, kind, index), whichever process runs this."""
    person = draw_person(np.random.default_rng([file.seed, 4 + file.kind, file.person]))  # 0-3 are kinds
    rng = np.random.default_rng([file.seed, file.kind, file.index])
    if file.kind in (TRAIN_IMAGE, TEST_IMAGE):
        apex = person.strength * np.isin(ACTION_UNITS, EXPRESSIONS[file.expression])
        units = np.maximum(rng.uniform(0.6, 1.0) * apex, person.resting)[None].astype(np.float32)
        Image.fromarray(render_faces(person, units, move_head(1, rng), 64, rng)[0]).save(file.path, quality=92)
        return
    frames = int(rng.integers(36, 49)) if file.kind == CLIP else 40
    units, pose, size = perform(person, file.expression, frames, rng), move_head(frames, rng), 64
    if file.kind == UNLABELLED:  # a wider frame, with the face in its upper middle
        pose = pose * (1, VOXCELEB_SCALE, VOXCELEB_SCALE, 1) + (0, 0, -1 / 7, np.log(VOXCELEB_SCALE))
        size = 84
    write_video(file.path, render_faces(person, units, pose, size, rng))


def write_labels(root: Path, files: list[FaceFile]) -> None:
    """AffectNet's two lists and DFEW's five folds; a person's clips are in the test set of one fold only."""
    for split, kind in (("train", TRAIN_IMAGE), ("test", TEST_IMAGE)):
        lines = [f"{file.path.parent.name}/{file.path.name} {AFFECTNET_LABELS.index(file.expression)}"
                 for file in files if file.kind == kind]
        (root / "AffectNet" / f"{split}_affectnet7.txt").write_text("\n".join(lines) + "\n")
        folder = root / "DFEW" / "EmoLabel_DataSplit" / f"{split}(single-labeled)"
        folder.mkdir(parents=True)
        for fold in range(FOLDS):
            lines = [f"{file.path.stem},{DFEW_LABELS.index(file.expression)}" for file in files
                     if file.kind == CLIP and (file.person % FOLDS == fold) == (kind == TEST_IMAGE)]
            (folder / f"{split}_set_{fold + 1}.csv").write_text("\n".join(["video_name,label", *lines]) + "\n")


def ensure_synthetic(names: list[str], data_root: Path, run=None) -> None:
    """Make the synthetic faces on first use, if one of the data sets is synthetic: by the first process only."""
    root = Path(data_root) / "synthetic"
    if any(map(is_synthetic, names)) and not root.exists() and (run is None or run.main):
        write_synthetic(root)
    if run is not None:
        run.barrier()


def write_synthetic(root: Path, seed: int = 0, scale: float = 1.0) -> None:
    """Write synthetic AffectNet, DFEW and VoxCeleb2 into a temporary folder, renamed to `root` when complete.

    Scale 1 means 2,100 + 350 labelled images, 560 labelled clips in five folds and 1,600 unlabelled videos. DataError
    if `root` is there already.
    """
    if root.exists():
        raise DataError(f"{root} exists: delete it to write it anew")
    temporary = root.with_name(f"{root.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    files = plan_files(temporary, seed, scale)
    for folder in {file.path.parent for file in files}:
        folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")  # "spawn" would import torch once more in every worker
    with ProcessPoolExecutor(mp_context=context) as pool:
        list(tqdm(pool.map(write_file, files, chunksize=8), total=len(files), desc="synthetic faces"))
    write_labels(temporary, files)
    temporary.rename(root)


def settings() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Write the synthetic faces; list, check or show a data set.")
    commands = p.add_subparsers(dest="command", required=True)
    for name, text in (("synthetic", "write the synthetic faces"), ("list", "list the files of an unlabelled set anew"),
                       ("check", "read every sample; exit status 1 if anything is wrong"),
                       ("show", "draw what training gets as one PNG")):
        c = commands.add_parser(name, help=text, description=text)
        c.add_argument("--data-root", type=Path, default=Path("data"), help="folder of all data sets")
        if name == "synthetic":
            c.add_argument("--scale", type=float, default=1.0,
                           help="1 = 2,100 images, 560 labelled clips, 1,600 videos")
        else:
            c.add_argument("--dataset", required=True, type=dataset_name(), help="as in finetune.py and pretrain.py")
        if name in ("check", "show"):
            c.add_argument("--fold", type=int, default=1 if name == "show" else None,
                           help="of cross-validation (check: all, show: 1)")
            c.add_argument("--stride", type=int, help="of the frames of a clip (the data set's)")
        if name in ("synthetic", "show"):
            c.add_argument("--seed", type=int, default=0, help="of everything random")
        if name == "show":
            c.add_argument("--mask", action="store_true", help="as stage 1 gets it, masked patches grey")
            c.add_argument("--output", type=Path, default=Path("sheet.png"), help="the PNG file")
    return p


def main() -> None:
    p = settings()
    args = p.parse_args()
    if getattr(args, "seed", 0) < 0 or not 0 < getattr(args, "scale", 1) < math.inf:
        p.error("expected --seed 0 or more and --scale above 0")
    try:
        if args.command == "synthetic":
            return write_synthetic(args.data_root / "synthetic", args.seed, args.scale)
        ensure_synthetic([args.dataset], args.data_root)
        if args.command == "list":
            dataset = catalogue(args.dataset)
            if dataset.train:
                raise DataError(f"{args.dataset} has split files: there is nothing to list")
            root, _ = media_folder(args.dataset, dataset, args.data_root)
            print(file_list(root, dataset.pattern, anew=True)[1])
        elif args.command == "show":
            sheet = show(args.dataset, args.data_root, args.fold, args.stride, args.mask, args.seed)
            sheet.save(args.output, "PNG")
            print(f"wrote {args.output}")
        elif wrong := check(args.dataset, args.data_root, args.fold, args.stride):
            raise DataError("\nerror: ".join(wrong))
        else:
            print("nothing is wrong")
    except (DataError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
