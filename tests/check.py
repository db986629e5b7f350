"""Is a data set as it was published, and as training needs it? What does a model get of it?

    python tests/check.py --dataset dfew                 reads every sample; exit status 1 if anything is wrong
    python tests/check.py --dataset dfew --show a.png    draws a batch of the training loader, here without --mask
"""
import argparse
import hashlib
import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import (CATALOGUE, Samples, Schedule, Source, TrainingData, catalogue, dataset_name, few,  # noqa: E402
                  find_samples, list_videos, load_samples, loader, read_clip, read_image, test_frames)
from evaluate import contact_sheet  # noqa: E402
from model import MASK_RATIO, SIZES, UserError, random_mask, whole_file  # noqa: E402
from pretrain import TINY, guarded, number, path  # noqa: E402

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


# ------------------------------------------------------------------------------------------------------------ check

class Inspection(torch.utils.data.Dataset):
    """Reads samples as evaluation does: data[i] -> (i, frames, height, width, error or "")."""

    def __init__(self, samples: Samples):
        self.samples = samples

    def __getitem__(self, index: int):
        path, counts = self.samples.path(index), []

        def choose(n: int) -> list[int]:
            counts.append(n)
            return test_frames(n, SIZES["base"].frames, self.samples.stride)

        try:
            if self.samples.modality == "image":
                return index, 1, *read_image(path).shape[1:], ""
            pixels = read_clip(path, choose)
            return index, *counts, *pixels.shape[2:], ""
        except UserError as error:
            return index, 0, 0, 0, str(error)


def inspect(samples: Samples, there: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Read the samples that are there on all cores. Returns columns frames, height, width (n, 3); and errors."""
    table, errors = np.zeros((len(samples), 3), np.int64), []
    for i, *row, error in tqdm(loader(Inspection(samples), os.cpu_count() or 1, batch_size=None,
                                      sampler=np.flatnonzero(there)), desc=f"reading {samples.name}"):
        table[i] = row
        errors += [error] if error else []
    return table, errors


def check_lists(splits: dict[str, Samples], title: str) -> list[str]:
    """Print a fold's labels and counts beside the published ones; returns what is wrong with its lists."""
    wrong, columns = [], [["", *splits["train"].classes, "in all"]]
    for split, samples in splits.items():
        print(f"{title}{split}", *samples.notes, sep="\n  ")
        rows = map(str.split, PUBLISHED.strip().splitlines())
        versions = [(digest, list(map(int, counts))) for name, part, fold, digest, *counts in rows
                    if (name, part, int(fold)) == (samples.name, split, samples.fold)]
        counts = samples.counts() if samples.classes else []
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
    for what in ("names", "people"):
        lists = [getattr(samples, what) for samples in splits.values()]
        both = np.intersect1d(*lists) if len(lists) == 2 and all(each is not None for each in lists) else []
        if len(both):
            wrong.append(f"{title}{'samples' if what == 'names' else what} in both train and test: {few(both)}")
    return wrong


def check_sizes(samples: Samples, table: np.ndarray) -> list[str]:
    """Print the sizes and frame counts of the samples that could be read; returns what is wrong with them."""
    table = table[table[:, 0] > 0]
    if not len(table):
        return []
    shapes = Counter(map(tuple, table[:, 1:].tolist()))
    print("height x width: " + ", ".join(f"{h} x {w} ({times:,})" for (h, w), times in shapes.most_common(5))
          + (f" and {len(shapes) - 5} others" if len(shapes) > 5 else ""))
    if samples.modality == "image":
        return []
    low, high = table[:, 0].min(), table[:, 0].max()
    print(f"frames of a clip: {low} minimum, {np.median(table[:, 0]):g} median, {high} maximum")
    if samples.stride == 1 or high > SIZES["base"].frames:
        return []
    return [f"no clip has more than {high} frames: they were sampled already, but stride {samples.stride} is meant for "
            f"whole clips: put these into {samples.root}, or give --stride 1"]


def check(name: str, data_root: Path, fold: int | None = None, stride: int | None = None) -> list[str]:
    """Read every sample of a data set once, print what it holds, and return what is wrong. Without a fold: all."""
    dataset, wrong = catalogue(name), []
    folds = range(1, dataset.folds + 1) if fold is None else [fold]
    both = dataset.classes if name in CATALOGUE else "," in name
    found = {(f, split): find_samples(name, data_root, split, f, stride)
             for f in folds for split in (["train", "test"] if both else ["train"])}
    one = found[folds[0], "train"][0]
    every = replace(one, names=np.unique(np.concatenate([samples.names for samples, _ in found.values()])))
    there = np.zeros(len(every), bool)
    for samples, present in found.values():
        there[np.searchsorted(every.names, samples.names)] = present
    if name in CATALOGUE and not dataset.classes:
        now, path = np.array(list_videos(every.root)), every.root / "files.txt"
        there, unlisted = np.isin(every.names, now), np.setdiff1d(now, every.names)
        if len(unlisted) or not there.all():
            wrong.append(f"{path} is out of date, {len(unlisted)} files are not in it and {(~there).sum()} of it are "
                         f"gone: delete {path} to list anew")
    table, errors = inspect(every, there)
    print(f"{name}: {len(every):,} {dataset.modality}s in {every.root}"
          + (f", stride {every.stride}" if dataset.modality == "video" else ""))
    for f in folds:
        wrong += check_lists({split: samples for (of, split), (samples, _) in found.items() if of == f},
                             f"fold {f}, " if dataset.folds > 1 else "")
    if not there.all():
        wrong.append(f"missing in {every.root}: {few(every.names[~there])}")
    if errors:
        wrong.append(f"unreadable: {few(errors)}")
    return wrong + check_sizes(every, table)


# ------------------------------------------------------------------------------------------------------------- show

def show(name: str, data_root: Path, fold: int = 1, stride: int | None = None, masked: bool = False,
         seed: int = 0) -> Image.Image:
    """A contact sheet of one batch as training gets it: 8 clips as rows of frames, or images, a row for each class.

    masked: as stage 1 gets it, with the hidden patches grey. Without classes: as stage 1 gets it in any case.
    """
    samples, synthetic = load_samples(name, data_root, "train", fold, stride), name.startswith("synthetic")
    classes, modality, size = samples.classes, samples.modality, SIZES["tiny" if synthetic else "base"]
    stage = "finetune" if classes and not masked else "pretrain"
    batch = 8 if modality == "video" else 16 * max(1, len(classes))
    sources = {modality: Source(samples, batch, batch, balanced=modality == "image" and stage == "finetune")}
    batches = loader(TrainingData(sources, stage, size, "light" if synthetic else "paper"), 0, batch_size=None,
                     sampler=Schedule(sources, seed, 1, 0, 1))
    micro, x, labels, errors = next(iter(batches))
    if errors:
        raise UserError(errors[0])
    x = x.reshape(len(x), -1, 3, size.pixels, size.pixels)                  # (B, T, 3, H, W), T = 1 for images
    if masked:
        torch.manual_seed(micro.seed)       # the masks that training draws for this batch on the CPU
        cells = size.pixels // size.patch
        ratio = TINY[f"{modality}_mask_ratio"] if synthetic else MASK_RATIO[modality]
        hidden = random_mask(len(x), getattr(size, f"{modality}_tokens"), ratio)
        hidden = hidden.unflatten(1, (-1, cells, cells))
        for dim, times in enumerate((size.tubelet, size.patch, size.patch), start=1):
            hidden = hidden.repeat_interleave(times, dim)
        x = x.masked_fill(hidden[:, :x.shape[1], None], 128)
    words = (*classes, "")                  # label -1: none
    if modality == "video":
        files = [os.fsdecode(bytes(samples.names[i]))[-30:] for i in micro.index]
        return contact_sheet([(f"{words[label]}\n{file}", clip) for label, file, clip in zip(labels, files, x)])
    return contact_sheet([(words[label], x[labels == label][:16, 0]) for label in labels.unique()])


def settings() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", required=True, type=dataset_name(), help="as in finetune.py and pretrain.py")
    p.add_argument("--data-root", type=path, default="data", help="folder of all data sets (data)")
    p.add_argument("--fold", type=number(int, 1), help="of cross-validation (all, --show: 1)")
    p.add_argument("--stride", type=number(int, 1), help="of the frames of a clip (the data set's)")
    p.add_argument("--show", type=path, metavar="PNG", help="draw a batch of the training loader instead")
    p.add_argument("--mask", action="store_true", help="of --show: as stage 1 gets it, masked patches grey")
    p.add_argument("--seed", type=number(int, 0), default=0, help="of --show: of everything random")
    return p


def main() -> None:
    args = settings().parse_args()
    if args.show:
        sheet = show(args.dataset, args.data_root, args.fold or 1, args.stride, args.mask, args.seed)
        with whole_file(args.show) as file:
            sheet.save(file, "PNG")
        print(f"wrote {args.show}")
    elif wrong := check(args.dataset, args.data_root, args.fold, args.stride):
        raise UserError("\nerror: ".join(wrong))
    else:
        print("nothing is wrong")


if __name__ == "__main__":
    guarded(main)
