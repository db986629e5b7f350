"""Is a data set as it was published, and as training needs it? What does a model get of it?

    python tests/check.py --dataset dfew                 reads every sample; exit status 1 if anything is wrong
    python tests/check.py --dataset dfew --show a.png    draws a batch as training with the same options gets it
    python tests/check.py faces --split 0.2              of a folder with a folder for each class (or of one's own list)
                                                         writes train.csv and test.csv, whole people in one of them

People are told by a list's column "person", or by --person, a regular expression: what it finds in a sample's path, or
its first group, is the person, as 'actor(\\d+)' or '^[^/]+/([^_]+)_'.
"""
import argparse
import csv
import hashlib
import os
import re
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms import v2
from torchvision.utils import make_grid
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import (CATALOGUE, Samples, Source, TrainingData, boxed, catalogue, dataset_name, deal,  # noqa: E402
                  hold_out, load_samples, loader, open_clip, overlap, read_clip, read_image, resampled, shortened,
                  test_frames)
from model import MASK_RATIO, SIZES, UserError, random_mask, whole_file  # noqa: E402
from pretrain import TINY, box, guarded, number  # noqa: E402

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
    """Reads samples as evaluation does: data[i] -> (i, frames, height, width, sizes of frames, error or "")."""

    def __init__(self, samples: Samples):
        self.samples = samples

    def __getitem__(self, index: int):
        samples, path, sizes, n = self.samples, self.samples.path(index), [], 1

        def measured(frame: torch.Tensor) -> torch.Tensor:
            sizes.append(tuple(frame.shape[1:]))
            if samples.box:
                frame = boxed(frame, samples.box, path)
            return v2.functional.resize(frame, [8, 8])

        try:
            if samples.modality == "image":
                measured(read_image(path))
            else:
                clip = open_clip(path)
                if clip is None:
                    raise UserError(f"{path} is a picture: expected a clip")
                n = clip.n
                choose = partial(test_frames, frames=SIZES["base"].frames, stride=samples.stride)
                read_clip(clip, resampled(choose, n, clip.rate, samples.rate), measured)
            return index, n, *sizes[0], len(set(sizes)), ""
        except UserError as error:
            return index, 0, 0, 0, 0, str(error)


def inspect(samples: Samples) -> tuple[np.ndarray, list[str]]:
    """Read all samples on all cores. Returns columns frames, height, width, sizes (n, 4); and errors."""
    table, errors = np.zeros((len(samples), 4), np.int64), []
    batches = loader(Inspection(samples), os.cpu_count() or 1, batch_size=None, sampler=range(len(samples)))
    for i, *row, error in tqdm(batches, desc=f"reading {samples.name}"):
        table[i] = row
        if error:
            errors.append(error)
    return table, errors


def published(name: str, split: str, fold: int) -> list[tuple[str, list[int]]]:
    """The published versions of a list: digest and counts. DFEW's 16 frames have the lists of whole clips."""
    found = []
    for line in PUBLISHED.strip().splitlines():
        of, part, number_of_fold, digest, *counts = line.split()
        if (of, part, int(number_of_fold)) == (name.removesuffix("-16f"), split, fold):
            found.append((digest, [int(count) for count in counts]))
    return found


def check_lists(splits: dict[str, Samples], title: str) -> list[str]:
    """Print a fold's labels and counts beside the published ones; returns what is wrong with its lists."""
    wrong, columns = [], [["", *splits["train"].classes, "in all"]]
    for split, samples in splits.items():
        print(f"{title}{split}", *samples.notes, sep="\n  ")
        counts = samples.counts() if samples.classes else []
        versions = published(samples.name, split, samples.fold)
        columns.append([split, *(f"{count:,}" for count in [*counts, len(samples)])])
        for _, theirs in versions:
            columns.append(["published", *(f"{count:,}" for count in [*theirs, sum(theirs)])])
        digest = versions and list_digest([os.fsdecode(name) for name in samples.names.tolist()], samples.labels)
        if digest in [known for known, _ in versions]:
            print("  matches the published split")
        elif ("-", counts) in versions:
            print("  has the published number of samples of each class")
        elif versions:
            what = "samples" if counts in [theirs for _, theirs in versions] else "counts"
            wrong.append(f"{title}{split} is not the published split: other {what}")
        names, times = np.unique(samples.names, return_counts=True)
        if len(names) < len(samples):
            wrong.append(f"{title}{split} lists more than once: {shortened(names[times > 1])}")
    for name, *cells in zip(*columns):
        print(f"  {name:15}" + "".join(f"{cell:>12}" for cell in cells))
    if len(splits) == 2 and (both := overlap(*splits.values())):
        wrong.append(f"{title}{both}")
    return wrong


def check_sizes(samples: Samples, table: np.ndarray) -> list[str]:
    """Print the sizes and frame counts of the samples that could be read; returns what is wrong with them."""
    table = table[table[:, 0] > 0]
    if not len(table):
        return []
    shapes = Counter(map(tuple, table[:, 1:3].tolist()))
    shown = [f"{h} x {w} ({times:,})" for (h, w), times in shapes.most_common(5)]
    if len(shapes) > 5:
        shown.append(f"{len(shapes) - 5} others")
    print("height x width: " + ", ".join(shown))
    if samples.modality == "image":
        return []
    low, high = table[:, 0].min(), table[:, 0].max()
    print(f"frames of a clip: {low} minimum, {np.median(table[:, 0]):g} median, {high} maximum")
    if samples.stride == 1 or high > SIZES["base"].frames:
        return []
    return [f"no clip has more than {high} frames: they were sampled already, but stride {samples.stride} is meant for "
            f"whole clips: give --stride 1 (DFEW's 16 frames are --dataset dfew-16f)"]


def check(name: str, data_root: Path, fold: int | None = None, stride: int | None = None, box=None) -> list[str]:
    """Read every sample of a data set once, print what it holds, and return what is wrong. Without a fold: all."""
    dataset, wrong = catalogue(name), []
    folds = range(1, dataset.folds + 1) if fold is None else [fold]
    has_test = dataset.classes if name in CATALOGUE else len(dataset.lists) == 2
    found = {(f, split): load_samples(name, data_root, split, f, stride)
             for f in folds for split in (["train", "test"] if has_test else ["train"])}
    paths = {os.fsencode(samples.path(i)): None for samples in found.values() for i in range(len(samples))}
    one = found[folds[0], "train"]
    everything = replace(one, root=Path(), names=np.array(list(paths)), box=box or one.box)
    table, errors = inspect(everything)
    mixed = everything.names[table[:, 3] > 1]
    if len(mixed):
        print(f"clips whose frames have different sizes, which are resized like all: {shortened(mixed)}")
    stride_of = f", stride {one.stride}" if dataset.modality == "video" else ""
    print(f"{name}: {len(paths):,} {dataset.modality}s in {one.root}{stride_of}")
    for f in folds:
        title = f"fold {f}, " if dataset.folds > 1 else ""
        wrong += check_lists({split: samples for (of, split), samples in found.items() if of == f}, title)
    if errors:
        wrong.append(f"unreadable: {shortened(errors)}")
    return wrong + check_sizes(one, table)


# ------------------------------------------------------------------------------------------------------------- show

def show(args) -> torch.Tensor:
    """A sheet uint8 (3, H, W) of one batch as training gets it: 8 clips as rows of frames, or images, a row for each
    class; prints what the rows are. With --mask as stage 1 gets it, with the hidden patches grey; without classes as
    stage 1 gets it in any case."""
    samples = load_samples(args.dataset, args.data_root, "train", args.fold or 1, args.stride)
    samples.box = args.crop or samples.box
    drawn = args.dataset.startswith("synthetic")
    size = args.size or ("tiny" if drawn else "base")
    strength = args.augment or ("light" if size == "tiny" else "paper")
    size, tiny = SIZES[size], size == "tiny"
    classes, m = samples.classes, samples.modality
    stage = "finetune" if classes and not args.mask else "pretrain"
    batch = 8 if m == "video" else 16 * max(1, len(classes))
    sources = {m: Source(samples, batch, batch, balanced=m == "image" and stage == "finetune")}
    micro = next(deal(sources, args.seed, 1, 0, 1, 0, 0))
    micro, x, labels, errors = TrainingData(sources, stage, size, strength)[micro]
    if errors:
        raise UserError(errors[0])
    x = x.reshape(len(x), -1, 3, size.pixels, size.pixels)                  # (B, T, 3, H, W), T = 1 for images
    if args.mask:
        torch.manual_seed(micro.seed)       # the masks that training draws for this batch on the CPU
        cells = size.pixels // size.patch
        ratio = TINY[f"{m}_mask_ratio"] if tiny else MASK_RATIO[m]
        hidden = random_mask(len(x), size.tokens(m), ratio).unflatten(1, (-1, cells, cells))
        for dim, times in enumerate((size.tubelet, size.patch, size.patch), start=1):
            hidden = hidden.repeat_interleave(times, dim)
        x = x.masked_fill(hidden[:, :x.shape[1], None], 128)
    words, rows = (*classes, "unlabelled"), []                              # label -1: none
    if m == "video":
        for index, label, clip in zip(micro.index, labels, x):
            rows.append((f"{words[label]} {samples.path(index)}", clip))
    else:
        for label in labels.unique():
            rows.append((words[label], x[labels == label][:16, 0]))
    width = max(len(pictures) for _, pictures in rows)
    sheet = torch.full((len(rows), width, 3, size.pixels, size.pixels), 255, dtype=torch.uint8)
    for i, (caption, pictures) in enumerate(rows):
        print(f"row {i + 1}: {caption}")
        sheet[i, :len(pictures)] = pictures
    times = -(-96 // size.pixels)           # what the model sees is shown pixel by pixel
    sheet = sheet.repeat_interleave(times, -1).repeat_interleave(times, -2)
    return make_grid(sheet.flatten(0, 1), nrow=width, pad_value=255)


# ------------------------------------------------------------------------------------------------------------ split

def split(name: str, data_root: Path, share: float, person: str | None, output: Path, seed: int) -> None:
    """Write train.csv and test.csv, with that share of the people, where they are known, or of each class."""
    samples = load_samples(name, data_root, "train")
    classes = samples.classes
    if not classes:
        raise UserError(f"{name} has no labels")
    if person:
        names = [os.fsdecode(name) for name in samples.names.tolist()]
        found = [re.search(person, name) for name in names]
        if None in found:
            raise UserError(f"--person {person!r} finds nobody in {names[found.index(None)]}")
        samples.people = np.array([match[match.lastindex or 0].encode() for match in found])
    files = [output / "train.csv", output / "test.csv"]
    for path in files:
        if path.exists():
            raise UserError(f"{path} is there already: give another --output")
    parts = hold_out(samples, share, seed)
    output.mkdir(parents=True, exist_ok=True)
    for path, part in zip(files, parts):
        counts = ", ".join(f"{count} {word}" for word, count in zip(classes, part.counts()))
        people = "" if part.people is None else f" of {len(np.unique(part.people))} people"
        with whole_file(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["path", "label"] + ["person"] * bool(people))
            for i, label in enumerate(part.labels):
                place = Path(os.path.abspath(part.path(i)))
                if place.is_relative_to(os.path.abspath(output)):
                    place = place.relative_to(os.path.abspath(output))
                writer.writerow([place.as_posix(), classes[label]] + [part.people[i].decode()] * bool(people))
        print(f"{path}: {len(part)} samples{people}: {counts}")
    print(f"now: --dataset {files[0]},{files[1]}")


def settings() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", nargs="?", type=dataset_name, metavar="DATASET", help="the same as --dataset")
    p.add_argument("--dataset", type=dataset_name, help="as in finetune.py and pretrain.py")
    p.add_argument("--data-root", type=Path, default="data", help="folder of all data sets (data)")
    p.add_argument("--fold", type=number(int, 1), help="of cross-validation (all, --show: 1)")
    p.add_argument("--stride", type=number(int, 1), help="of the frames of a clip (the data set's)")
    p.add_argument("--crop", type=box, metavar="X,Y,W,H", help="a fixed part of every frame, in pixels (all of it)")
    p.add_argument("--seed", type=number(int, 0), default=0, help="of everything random")
    p.add_argument("--show", type=Path, metavar="PNG", help="draw a batch as training gets it instead")
    p.add_argument("--size", choices=list(SIZES), help="of --show: of the model (base, or tiny on drawn faces)")
    p.add_argument("--augment", choices=["paper", "light"], help="of --show: (paper; light for size tiny)")
    p.add_argument("--mask", action="store_true", help="of --show: as stage 1 gets it, masked patches grey")
    p.add_argument("--split", type=number(float, 0, 1), metavar="SHARE", help="write train.csv and test.csv instead")
    p.add_argument("--person", metavar="REGEX", help="of --split: what it finds in a path is the person")
    p.add_argument("--output", type=Path, default=Path(), help="of --split: the folder for both (this one)")
    return p


def main() -> None:
    p = settings()
    args = p.parse_args()
    args.dataset = args.dataset or args.folder
    if not args.dataset:
        p.error("--dataset is missing")
    if args.split is not None:
        if args.dataset in CATALOGUE or len(catalogue(args.dataset).lists) > 1:
            p.error(f"--split: {args.dataset} is divided already")
        split(args.dataset, args.data_root, args.split, args.person, args.output, args.seed)
    elif args.show:
        sheet = v2.functional.to_pil_image(show(args))
        with whole_file(args.show) as file:
            sheet.save(file, "PNG")
        print(f"wrote {args.show}")
    elif wrong := check(args.dataset, args.data_root, args.fold, args.stride, args.crop):
        raise UserError("\nerror: ".join(wrong))
    else:
        print("nothing is wrong")


if __name__ == "__main__":
    guarded(main)
