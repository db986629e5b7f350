"""Everything that the paper shows of a trained model, its Section IV, and the user's own videos.

It reads in the order of a report: one pass over a data set yields predictions, features and the experts' tokens; from
these follow metrics (Tables II, III, VI, Fig. 7), folds, cross-task results (Table IX), class centres (Fig. 4) and
experts (Fig. 5). Then attention (Fig. 6), reconstructions of stage 1, own media, drawing, and the report of it all.

    python evaluate.py --checkpoint runs/dfew/fold1/last.pt                 on the test data of its own fold
    python evaluate.py --dataset dfew --folds runs/dfew/*/last.pt           the five folds' predictions as one
    python evaluate.py --checkpoint runs/dfew/fold1/last.pt --report out    all tables and figures, with an index
    python evaluate.py --checkpoint runs/dfew/fold1/last.pt FILE ...        on videos, images, folders of frames
    torchrun --nproc_per_node 2 evaluate.py --checkpoint ...                the same from two processes

UAR, unweighted average recall, is the mean of the classes' recalls; WAR, weighted average recall, is the accuracy.

n samples    v views of one (two clips or one image)    C classes    d token width    L layers with experts, E in each
"""
import argparse
import csv
import json
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torchvision.transforms import v2
from tqdm import tqdm

from data import (CATALOGUE, FONT, IMAGE_SUFFIXES, OWN_DATA_STRIDE, DataError, DataSet, Samples, TestData, catalogue,
                  contact_sheet, dataset_name, ensure_synthetic, fixed_crop, load_samples, loader, natural,
                  read_clip, read_image, short_name, text_width, to_float)
from model import (IMAGE_MEAN, IMAGE_STD, MASK_RATIO, S4D, CheckpointError, MaskedAutoencoder, Size, at_least_fp32,
                   normalised_target, patchify, read_checkpoint, rebuild, same_classes, unnamed)
from pretrain import Formatter, Run, default_workers, guarded, start

# ------------------------------------------------------------------------------------------- one pass over a data set


@dataclass
class Observed:
    """What a pass over n samples yields, the same in every process."""
    probabilities: dict[str, np.ndarray]    # of each head, (n, C) float64: the samples' own, and the other's (Table IX)
    features: np.ndarray                    # (n, d) float64: the representation before the heads
    activation: np.ndarray                  # (L, E): tokens that each expert received
    paths: Counter                          # of the experts with the largest gate, one per layer (L,): tokens


def forward(model: S4D, x: torch.Tensor, run: Run) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Features (B, d) and every head's probabilities (B, C), float64, of uint8 images or clips on any device."""
    with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
        features = model.features(to_float(x.to(run.device)))
        logits = {name: head(features) for name, head in model.head.items()}
    return features.double(), {name: at_least_fp32(value).double().softmax(-1) for name, value in logits.items()}


@torch.no_grad()
def observe(model: S4D, data: TestData, run: Run, workers: int, batch: int = 16) -> Observed:
    """One pass over all samples, which predictions, features and experts come from.

    Clips of a video: softmax of each, then the mean (Section IV-B), and the mean of their features. Batches are fixed
    by the sample order and dealt to the processes, so that nothing is padded or counted twice and the numbers do not
    depend on how many there are. DataError names a sample that cannot be read: none is left out.
    """
    model.eval()
    n = len(data)
    chunks = [list(range(i, min(i + batch, n))) for i in range(0, n, batch)]
    rows = {name: torch.zeros(n, head.out_features, dtype=torch.float64) for name, head in model.head.items()}
    rows["features"] = torch.zeros(n, model.size.width, dtype=torch.float64)
    routers = [block.moe_layer.router for block in model.blocks if block.moe_layer is not None]
    rows["activation"] = torch.zeros(len(routers), model.architecture["experts"], dtype=torch.float64)
    paths, gates = Counter(), []
    hooks = [router.register_forward_hook(lambda module, inputs, output: gates.append(output)) for router in routers]
    batches = loader(data, workers, batch_sampler=chunks[run.rank::run.world])
    for index, views, _ in tqdm(batches, desc=f"evaluating {data.samples.name}", leave=False, disable=not run.main):
        gates.clear()
        features, probabilities = forward(model, views.flatten(0, 1), run)  # (B v, d), (B v, C) by head
        for name, values in {**probabilities, "features": features}.items():
            rows[name][index] = values.unflatten(0, views.shape[:2]).mean(1).cpu()
        if gates:
            chosen = torch.stack(gates).flatten(1, 2)                       # (L, B v N, E)
            rows["activation"] += (chosen > 0).sum(1).cpu()
            paths.update(zip(*chosen.argmax(-1).tolist()))
    for hook in hooks:
        hook.remove()
    # Every sample's row is zero in all processes but one.
    rows = {name: run.sum(values.to(run.device)).cpu().numpy() for name, values in rows.items()}
    if run.world > 1:
        everyone = [None] * run.world
        dist.all_gather_object(everyone, paths)
        paths = sum(everyone, Counter())
    return Observed({name: rows[name] for name in model.head}, rows["features"], rows["activation"], paths)


# ----------------------------------------------------------------------------------- metrics: Tables II, III and VI

RESAMPLES = 2000


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Counts (C, C): rows are true classes, columns predicted ones."""
    return np.bincount(labels * classes + predictions, minlength=classes ** 2).reshape(classes, classes)


def recalls(confusion: np.ndarray) -> np.ndarray:
    """(..., C, C) -> (..., C), NaN for a class without samples."""
    with np.errstate(invalid="ignore"):
        return np.diagonal(confusion, axis1=-2, axis2=-1) / confusion.sum(-1)


def listed(values: np.ndarray) -> list:
    """The same as lists of numbers, None for NaN, as JSON can hold them."""
    return np.where(np.isnan(values), None, values).tolist()


def metrics(confusion: np.ndarray) -> dict:
    """UAR, WAR, their 95 % intervals, recalls, F1 and the majority-class baseline of a confusion matrix, as fractions.

    A class without samples has no recall (None) and is left out of UAR; one that is not predicted either is left out
    of the macro F1. Intervals are percentiles of bootstrap samples: drawing n samples with replacement is drawing n
    of the matrix's cells. DataError if there are no samples at all.
    """
    support, predicted, total = confusion.sum(1), confusion.sum(0), int(confusion.sum())
    if not total:
        raise DataError("no samples to evaluate: UAR and WAR are undefined")
    recall, occurs = recalls(confusion), support + predicted > 0
    f1 = 2 * np.diagonal(confusion) / np.where(occurs, support + predicted, 1)
    drawn = np.random.default_rng(0).multinomial(total, confusion.ravel() / total, RESAMPLES)
    drawn = drawn.reshape(-1, *confusion.shape)
    interval = {"uar_interval": np.nanmean(recalls(drawn), -1),
                "war_interval": np.trace(drawn, axis1=1, axis2=2) / total}
    return dict(uar=float(np.nanmean(recall)), war=float(np.trace(confusion) / total), recall=listed(recall),
                **{name: listed(np.quantile(values, (0.025, 0.975))) for name, values in interval.items()},
                macro_f1=float(f1[occurs].mean()), weighted_f1=float(f1 @ support / total),
                majority_uar=1 / int((support > 0).sum()), majority_war=float(support.max() / total),
                confusion=confusion.tolist(), by_row=listed(confusion / np.where(support, support, np.nan)[:, None]))


def scores_of(samples: Samples, probabilities: np.ndarray) -> dict:
    """Metrics of the most probable class, the first of several equal ones."""
    return metrics(confusion_matrix(samples.labels, probabilities.argmax(1), len(samples.dataset.classes)))


def evaluate(model: S4D, samples: Samples, run: Run, workers: int, batch: int = 16) -> tuple[dict, Observed]:
    """Metrics of the samples' own head, and the pass that they are from. DataError if its classes are not theirs."""
    source, classes = samples.dataset.modality, list(samples.dataset.classes)
    if source not in model.head:
        raise DataError(f"{samples.name} holds {source}s, but this model was trained without: its heads are "
                        f"{list(model.head)}")
    if not same_classes(model.architecture[f"{source}_classes"], classes):
        raise DataError(f"the checkpoint's {source} head knows {model.architecture[f'{source}_classes']}, but "
                        f"{samples.name} has {classes}")
    observed = observe(model, TestData(samples, model.size), run, workers, batch)
    return scores_of(samples, observed.probabilities[source]), observed


def table(scores: dict, classes: tuple[str, ...]) -> str:
    """Scores as text, with the majority baseline, then the confusion matrix with recalls."""
    confusion, width = scores["confusion"], max(8, *(len(name) + 1 for name in classes))
    lines = ["{:.4f} ({:.4f} to {:.4f})".format(scores[name], *scores[f"{name}_interval"]) for name in ("uar", "war")]
    lines = [f"UAR {lines[0]}  WAR {lines[1]}, with 95 % intervals   macro F1 {scores['macro_f1']:.4f}  weighted F1 "
             f"{scores['weighted_f1']:.4f}",
             f"always the most frequent class: UAR {scores['majority_uar']:.4f}  WAR {scores['majority_war']:.4f}",
             "true \\ predicted".ljust(17) + "".join(name.rjust(width) for name in classes) + "recall".rjust(9)]
    for name, row, recall in zip(classes, confusion, scores["recall"]):
        shown = "-" if recall is None else f"{recall:.4f}"
        lines.append(name.ljust(17) + "".join(str(count).rjust(width) for count in row) + shown.rjust(9))
    never = [name for i, name in enumerate(classes) if not any(row[i] for row in confusion)]
    if never:
        lines.append(f"never predicted: {', '.join(never)}")
    return "\n".join(lines)


# The paper's own figures, in per cent: UAR and WAR on DFEW, FERV39K and MAFW, and recalls on DFEW in its label order.
PAPER_SETS = ("dfew", "ferv39k", "mafw")
TABLE_2 = {"A3lign-DFER": "64.09 74.20 41.87 51.77 42.07 53.24", "SVFAP": "62.83 74.27 42.14 52.29 41.19 54.28",
           "HiCMAE": "63.76 75.01 - - 42.65 56.17", "MAE-DFER": "63.41 74.43 43.12 52.07 41.62 54.31",
           "S2D": "61.82 76.03 41.28 52.56 41.86 57.37", "VideoMAE": "63.60 74.60 43.33 52.39 40.87 53.51",
           "S4D": "66.80 76.68 43.41 53.65 43.72 58.44"}
TABLE_3 = {"SVFAP": "93.13 76.98 72.31 77.54 65.42 15.17 39.25",
           "MAE-DFER": "92.92 77.46 74.56 76.94 60.99 18.62 42.35",
           "S2D": "93.62 80.25 77.14 81.09 64.53 1.38 34.71",
           "VideoMAE": "93.09 78.78 71.75 78.74 63.44 17.93 41.46",
           "S4D": "94.76 79.04 74.60 79.80 67.26 27.59 44.57"}


def compare(name: str, scores: dict, classes: tuple[str, ...], title: str) -> str:
    """Ours below the paper's Tables II and III, in per cent; the latter only for a data set with DFEW's classes."""
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.2f}"

    ours = [percent(scores["uar"]), percent(scores["war"])]
    rows = [("Table II, the paper's own figures", [f"{paper} {key}" for paper in PAPER_SETS for key in ("UAR", "WAR")])]
    rows += [(method, row.split()) for method, row in TABLE_2.items()]
    rows += [(f"ours: {title}", sum([ours if paper == name else ["-", "-"] for paper in PAPER_SETS], [])
              if name in PAPER_SETS else [*ours, f" (UAR, WAR on {name}, which the paper has not)"])]
    recall, columns = dict(zip(classes, scores["recall"])), catalogue("dfew").classes
    if set(columns) == set(classes):
        rows += [("Table III (DFEW), the paper's own figures", columns)]
        rows += [(method, row.split()) for method, row in TABLE_3.items()]
        rows += [(f"ours: {title}", [percent(recall[c]) for c in columns])]
    return "\n".join(f"{label:42}" + "".join(value.rjust(12) for value in values) for label, values in rows)


# ------------------------------------------------------------------------------------------------------------ folds

def trained_on(checkpoint: dict, samples: Samples) -> int:
    """How many of the samples the checkpoint was trained on; 0 for a file that does not say what it was trained on."""
    trained = checkpoint.get("data", {}).get("train", {}).get(samples.dataset.modality, {})
    if trained.get("name") != samples.name:
        return 0
    return int(np.isin(samples.digests(), trained["digests"].numpy()).sum())


def check_folds(paths: list[Path], name: str, data_root: Path) -> dict[int, Path]:
    """The checkpoint of each fold. CheckpointError if a fold is missing, given twice or tested on its training data."""
    source, expected, found = catalogue(name).modality, range(1, catalogue(name).folds + 1), {}
    for path in paths:
        checkpoint = read_checkpoint(path)
        trained = checkpoint.get("settings", {})
        if trained.get(f"{source}s") != name:
            raise CheckpointError(f"{path} was trained on {trained.get(f'{source}s', 'unknown data')}, not on {name}")
        fold = trained["fold"] if len(expected) > 1 else 1
        if fold in found:
            raise CheckpointError(f"fold {fold} of {name} is given twice: {found[fold]} and {path}")
        found[fold] = path
        samples = load_samples(name, data_root, "test", fold)
        if known := trained_on(checkpoint, samples):
            raise CheckpointError(f"{path} was trained on {known} of the {len(samples)} test samples of {name}, fold "
                                  f"{fold}")
    missing = [str(fold) for fold in expected if fold not in found]
    if missing:
        raise CheckpointError(f"--folds lacks fold {', '.join(missing)} of {name}: give a checkpoint of each of its "
                              f"{len(expected)} folds")
    return dict(sorted(found.items()))


def join_folds(tested: list[Samples], probabilities: list[np.ndarray], scores: list[dict]) -> dict:
    """Metrics of the folds' predictions concatenated; beside them the mean of the folds' UAR and WAR and the sample
    standard deviation, which one fold has not (None)."""
    classes, labels = len(tested[0].dataset.classes), np.concatenate([samples.labels for samples in tested])
    together = metrics(confusion_matrix(labels, np.concatenate(probabilities).argmax(1), classes))
    for name in ("uar", "war"):
        values = [score[name] for score in scores]
        together[f"{name}_mean"] = float(np.mean(values))
        together[f"{name}_deviation"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return dict(together, samples=len(labels), folds=scores)


# ------------------------------------------------------- both tasks: Table IX, Fig. 4 and Fig. 5 (Section IV-E)

SAME_CLASS = {"happiness": "happy", "sadness": "sad", "anger": "angry"}  # the data sets spell them differently


def shared_classes(ours: list[str], theirs: list[str]) -> tuple[list[int], list[int]]:
    """Label numbers, in `ours` and in `theirs`, of the classes that both have, in our order."""
    ours, theirs = ([SAME_CLASS.get(name, name) for name in names] for names in (ours, theirs))
    both = [name for name in ours if name in theirs]
    return [ours.index(name) for name in both], [theirs.index(name) for name in both]


def cross_task(samples: Samples, probabilities: np.ndarray, classes: list[str]) -> dict | None:
    """Table IX: the other task's head on these samples, among the classes that both have; None if they share none.

    probabilities: (n, C') of the head whose classes are given. The paper does not say how one task's head sees the
    other's data; here a head takes the representation Phi of either: an image's from one tubelet, a video's from clips.
    """
    ours, theirs = shared_classes(samples.dataset.classes, classes)
    kept = np.isin(samples.labels, ours)
    if not kept.any():
        return None
    labels = np.searchsorted(ours, samples.labels[kept])
    scores = metrics(confusion_matrix(labels, probabilities[kept][:, theirs].argmax(1), len(ours)))
    return dict(scores, samples=int(kept.sum()), classes=[samples.dataset.classes[i] for i in ours])


def class_centres(features: np.ndarray, labels: np.ndarray, classes: int) -> torch.Tensor:
    """Mean features (C, d) of each class, NaN for a class without samples."""
    return torch.stack([torch.from_numpy(features[labels == c]).mean(0) for c in range(classes)])


def frequent_paths(paths: Counter, most: int = 10) -> list[tuple[tuple[int, ...], float]]:
    """The most frequent paths and their share of all tokens; equally frequent ones in the experts' order."""
    total = paths.total()
    return [(path, count / total) for path, count in sorted(paths.items(), key=lambda item: (-item[1], item[0]))[:most]]


# ---------------------------------------------------------------------------------------------- attention: Fig. 6

@torch.no_grad()
def attention(model: S4D, x: torch.Tensor, run: Run) -> torch.Tensor:
    """What the mean over the tokens draws on, uint8 images or clips -> (B, time slots, rows, columns); 1 = even spread.

    Attention rollout (Abnar and Zuidema, 2020): from the last layer to the first, a token passes half of what it
    contributes on by attention, mean over the heads, and keeps half, as residuals do. The paper names no method.
    """
    weights = []
    hooks = [block.attn.register_forward_hook(lambda module, inputs, output: weights.append(
        module.weights(inputs[0]).mean(1))) for block in model.blocks]      # (B, N, N) of each layer
    forward(model, x, run)
    for hook in hooks:
        hook.remove()
    share = torch.ones_like(weights[0][:, :1])                              # (B, 1, N)
    for layer in reversed(weights):
        share = (share @ layer + share) / 2
    side = model.size.pixels // model.size.patch
    return share.unflatten(-1, (-1, side, side))[:, 0].float().cpu()


def heat_on(frames: torch.Tensor, received: torch.Tensor) -> torch.Tensor:
    """Attention (T, rows, columns) over frames uint8 (T, 3, H, W): above-average attention in colour on a grey face.

    The paper shows "only positive values" and does not say of what; here they are those above an even spread.
    """
    above = (received - 1).clamp(min=0)
    heat = F.interpolate(above[:, None], frames.shape[-2:], mode="bilinear") / above.max().clamp(min=1e-6)
    colour = torch.from_numpy(colours(heat[:, 0].numpy(), BRIGHT)).float().movedim(-1, 1)
    grey = v2.functional.rgb_to_grayscale(frames, 3).float()
    return grey.lerp(colour, 0.3 + 0.4 * heat).round().to(torch.uint8)


def attention_sheet(models: list[S4D], samples: Samples, run: Run) -> Image.Image:
    """Fig. 6, a row per class: frames of its first clip or its first images, beside them each model's attention."""
    size, clips, blocks = models[0].size, samples.dataset.modality == "video", [[] for _ in range(1 + len(models))]
    data = TestData(samples, size)
    for label, name in enumerate(samples.dataset.classes):
        index = np.flatnonzero(samples.labels == label)[:1 if clips else 3]
        if not len(index):
            continue
        x = torch.stack([data[i][1][0] for i in index])                     # (1, T, 3, H, W) or (3, 3, H, W)
        maps = [attention(model, x, run) for model in models]
        if clips:
            x = x[0, ::2 * size.tubelet]                                    # of every other time slot
            heat = [heat_on(x, m[0, ::2]) for m in maps]
        else:
            heat = [torch.cat([heat_on(x[i:i + 1], m[i]) for i in range(len(x))]) for m in maps]
        for block, pictures in zip(blocks, [x, *heat]):
            block.append((name if block is blocks[0] else "", pictures))
    titles = [f"first {'clip' if clips else 'images'} of each class", *(f"model {i + 1}" for i in range(len(models)))]
    return titled(beside(*(titled(contact_sheet(block), title) for block, title in zip(blocks, titles))),
                  f"Fig. 6, {samples.name}: attention; dark: an even spread over the tokens, or less; bright: the most")


# ---------------------------------------------------------------------------------------- reconstructions of stage 1

def unpatchify(patches: torch.Tensor, size: Size) -> torch.Tensor:
    """The inverse of patchify, as uint8 frames: (B, N, P) -> (B, T, 3, H, W); an image has T = tubelet equal frames."""
    side, p = size.pixels // size.patch, size.patch
    x = patches.unflatten(1, (-1, side, side)).unflatten(-1, (size.tubelet, p, p, 3))
    x = x.permute(0, 1, 4, 7, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(1, 2)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    return (255 * (x * std + mean)).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def reconstruct(model: MaskedAutoencoder, x: torch.Tensor, ratio: float, run: Run) -> tuple[list, float, float]:
    """Original, masked and reconstructed frames, uint8 (B, T, 3, H, W) each; the loss, and that of the mean patch.

    The model predicts patches normalised by their own mean and deviation (Section III-B), which are borrowed from the
    original for display. The mean patch predicts 0 everywhere.
    """
    torch.manual_seed(0)
    with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
        x = to_float(x.to(run.device))
        loss, pred, mask = model(x, mask_ratio=ratio)
    patches, pred, mask = patchify(x, model.size).cpu(), at_least_fp32(pred).cpu(), mask.cpu()
    target, mean, deviation = normalised_target(patches[mask].unflatten(0, (len(x), -1)))
    masked, pasted = patches.clone(), patches.clone()
    masked[mask] = 0
    pasted[mask] = (pred.unflatten(-1, (-1, 3)) * deviation + mean).flatten(2).flatten(0, 1)
    return [unpatchify(p, model.size) for p in (patches, masked, pasted)], loss.item(), target.square().mean().item()


def report_reconstructions(args, run: Run, path: Path, checkpoint: dict, report: "Report") -> None:
    """A stage-1 checkpoint on --dataset, or on what it was trained on: on test samples, where there are some."""
    model, trained = rebuild(checkpoint, path).to(run.device).eval(), checkpoint.get("settings", {})
    datasets = [args.dataset] if args.dataset else [trained[key] for key in ("images", "videos") if key in trained]
    datasets = [name for name in datasets if name not in ("none", "frames")]
    if not datasets:
        raise CheckpointError(f"{path} does not say what it was trained on: give --dataset")
    ensure_synthetic(datasets, args.data_root, run)
    for name in datasets:
        split = "test" if catalogue(name).test else "train"
        samples = load_samples(name, args.data_root, split, fold_of(args, trained, name), stride_for(checkpoint, name))
        source, data = samples.dataset.modality, TestData(samples, model.size)
        data.resize = v2.Compose([partial(fixed_crop, box=samples.dataset.crop), data.resize])  # as stage 1 cuts them
        index = np.unique(np.linspace(0, len(samples) - 1, 32).round().astype(int))
        ratio = trained.get(f"{source}_mask_ratio", MASK_RATIO[source])
        frames, loss, baseline = reconstruct(model, torch.stack([data[i][1][0] for i in index]), ratio, run)
        report.say(f"Reconstructions of stage 1, {name}", f"{path}, {ratio:.0%} masked, {len(index)} samples: loss "
                   f"{loss:.4f}; with each masked patch flat at its mean, {baseline:.4f}")
        report.results.setdefault("reconstruction", {})[name] = dict(loss=loss, mean_patch_loss=baseline)
        frames = [f[:, 0][::4][None] if source == "image" else f[:2, ::model.size.tubelet] for f in frames]
        rows = [(caption, f[i]) for i in range(len(frames[0]))
                for caption, f in zip(("original", "masked", "reconstructed"), frames)]
        report.picture(f"reconstruction-{source}s.png", lambda: titled(
            contact_sheet(rows), f"Stage 1 on {name}, {ratio:.0%} masked: loss {loss:.3f}, of the mean patch "
            f"{baseline:.3f}\nThe predicted patches' mean and deviation are borrowed from the original"))


# ------------------------------------------------------------------------------------------------------ own media

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
WINDOWS = 48                                # most clips that slide over a video


def is_image(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES


def media_files(path: Path) -> list[Path]:
    """The images and clips that a path stands for, in natural order.

    A folder that holds images, but neither videos nor folders, is one clip, as in the data sets; of any other folder,
    everything in it is taken that is an image, a video or a folder. DataError if that is nothing.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"there is no file or folder {path}")
    suffixes = IMAGE_SUFFIXES + VIDEO_SUFFIXES
    inside = [entry for entry in sorted(path.iterdir(), key=lambda entry: natural(entry.name))
              if not entry.name.startswith(".") and (entry.is_dir() or entry.suffix.lower() in suffixes)]
    if not inside:
        raise DataError(f"{path} holds neither images nor videos ({', '.join(suffixes)})")
    if all(map(is_image, inside)):
        return [path]
    return [file for entry in inside for file in media_files(entry)]


def frames_in(path: Path, source: str, crop: tuple[int, ...] | None) -> int:
    """Number of frames. DataError if the first cannot be read or does not hold the crop."""
    total = []
    frame = read_image(path) if source == "image" else read_clip(path, lambda n: total.append(n) or [0])[0]
    height, width = frame.shape[-2:]
    if crop and (crop[0] + crop[2] > width or crop[1] + crop[3] > height):
        raise DataError(f"{path}, {width} x {height} pixels, does not hold --crop {','.join(map(str, crop))} (x,y,w,h)")
    return total[0] if total else 1


def media_data(files: list[Path], source: str, classes: list[str], size: Size, stride: int,
               crop: tuple[int, ...] | None) -> TestData:
    """Files as test samples without labels: read, sampled and resized exactly as those of a data set."""
    samples = Samples("own media", DataSet(source, tuple(classes), ()), Path(),
                      np.array([os.fsencode(file) for file in files]), np.full(len(files), -1), stride)
    data = TestData(samples, size)
    if crop:
        left, top, width, height = crop
        data.resize = v2.Compose([partial(v2.functional.crop, top=top, left=left, height=height, width=width),
                                  data.resize])
    return data


@torch.no_grad()
def over_time(model: S4D, data: TestData, path: Path, total: int, run: Run) -> tuple:
    """W clips that slide over a video of `total` frames: the numbers of their middle frames (W,), these frames, uint8
    (W, 3, h, w), and the probabilities (W, C)."""
    frames, every = data.frames, np.arange(0, total, data.samples.stride)
    starts = np.unique(np.linspace(0, len(every) - frames, WINDOWS).round().astype(int))
    middles, pictures, probabilities = every[starts + frames // 2], [], []
    for group in np.array_split(starts, -(-len(starts) // 8)):              # a few at once: frames are large
        wanted = every[group[:, None] + np.arange(frames)]                  # (8, T)
        clips = data.resize(read_clip(path, lambda n: wanted.ravel().tolist())).unflatten(0, wanted.shape)
        probabilities.append(forward(model, clips, run)[1]["video"].cpu().numpy())
        pictures.append(clips[:, frames // 2])
    return middles, torch.cat(pictures), np.concatenate(probabilities)


def report_media(args, run: Run, model: S4D, checkpoint: dict, paths: list[Path], report: "Report") -> None:
    """Predictions for the user's own files, and their course in videos that are longer than a clip."""
    files = [file for path in paths for file in media_files(path)]
    groups = {"image": [file for file in files if is_image(file)],
              "video": [file for file in files if not is_image(file)]}
    for source, mine in groups.items():
        if mine and source not in model.head:
            raise DataError(f"{mine[0]} is {source} data, but this model was trained without: its heads are "
                            f"{list(model.head)}")
    totals = {file: frames_in(file, source, args.crop) for source, mine in groups.items() for file in mine}
    trained = checkpoint.get("settings", {}).get("videos", "none")
    stride = stride_for(checkpoint, "one's own") or OWN_DATA_STRIDE
    for source, mine in groups.items():
        if not mine:
            continue
        classes = model.architecture[f"{source}_classes"]
        data = media_data(mine, source, classes, model.size, stride, args.crop)
        probabilities = observe(model, data, run, args.workers, args.batch_size).probabilities[source]
        note = f", two clips of {data.frames} frames at stride {stride} each" if source == "video" else ""
        note += f" as in {trained}" if note and trained != "none" else ""
        lines = [f"{file}: " + ", ".join(f"{classes[c]} {row[c]:.4f}" for c in (-row).argsort(kind="stable"))
                 for file, row in zip(mine, probabilities)]
        report.say(f"Own {source}s: {len(mine)}{note}", "\n".join(lines))
        report.predictions(f"{source}s.csv", [data.samples], probabilities)
        results = report.results.setdefault("media", {})
        for number, (file, row) in enumerate(zip(mine, probabilities), start=1):
            results[str(file)] = dict(prediction=classes[row.argmax()], probabilities=dict(zip(classes, listed(row))))
            if run.main and source == "video" and totals[file] > data.frames * stride:
                middles, pictures, course = over_time(model, data, file, totals[file], run)
                results[str(file)]["over_time"] = [dict(frame=int(frame), probabilities=listed(p))
                                                   for frame, p in zip(middles, course)]
                report.picture(f"time-{number}-{file.stem}.png", lambda: curves(
                    f"{file.name}: probability of each class, from 0 to 1, in {data.frames} frames at stride {stride}",
                    middles, pictures, course, classes))


# -------------------------------------------------------------------------------------------------------- drawing

DARK = ((247, 251, 255), (158, 202, 225), (49, 130, 189), (8, 48, 107))  # white to dark blue, for tables
BRIGHT = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis, on grey faces
LINE = 18                                   # pixels from a line of text to the next


def colours(values: np.ndarray, ramp: tuple) -> np.ndarray:
    """Colours (..., 3) of values 0 to 1. Lightness changes in one direction only, so that grey prints read the same."""
    places = np.linspace(0, 1, len(ramp))
    return np.stack([np.interp(values, places, channel) for channel in zip(*ramp)], -1)


def titled(picture: Image.Image, title: str) -> Image.Image:
    """The picture below some lines of text."""
    top = LINE * len(title.split("\n")) + 8
    sheet = Image.new("RGB", (max(picture.width, text_width(title) + 12), picture.height + top + 6), "white")
    ImageDraw.Draw(sheet).multiline_text((6, 4), title, "black", FONT, spacing=LINE - 13)
    sheet.paste(picture, (0, top))
    return sheet


def beside(*pictures: Image.Image) -> Image.Image:
    sheet = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (sum(p.width for p in pictures[:i]), 0))
    return sheet


def heat_map(title: str, values: np.ndarray, rows: list[str], columns: list[str], low: float = 0.0, high: float = 1.0,
             cells: list[list[str]] | None = None) -> Image.Image:
    """A table (R, C) whose cells are coloured by value, with a scale. cells: their texts, by default the values."""
    cells = cells or [[f"{v:.2f}" for v in row] for row in values]
    lines = max(len(text.split("\n")) for row in cells for text in row)
    width, height = max(52, text_width(*columns) + 12), LINE * lines + 12
    left, top = text_width(*rows) + 14, LINE + 8
    right, bottom = left + width * len(columns), top + height * len(rows)
    sheet = Image.new("RGB", (right + 66, bottom + 4), "white")
    draw = ImageDraw.Draw(sheet)
    for j, name in enumerate(columns):
        draw.text((left + (j + 0.5) * width, top - 4), name, "black", FONT, anchor="ms")
    for i, name in enumerate(rows):
        draw.text((left - 6, top + (i + 0.5) * height), name, "black", FONT, anchor="rm")
        for j, text in enumerate(cells[i]):
            share = np.nan_to_num((values[i][j] - low) / (high - low)).clip(0, 1)
            x, y = left + j * width, top + i * height
            colour = colours(share, DARK).astype(int)
            draw.rectangle((x, y, x + width - 2, y + height - 2), tuple(colour.tolist()))
            draw.multiline_text((x + width / 2, y + height / 2), text.replace("nan", "-"), anchor="mm", align="center",
                                fill="white" if colour.sum() < 480 else "black", font=FONT, spacing=LINE - 14)
    scale = colours(np.linspace(1, 0, bottom - top)[:, None], DARK).repeat(14, 1).astype(np.uint8)
    sheet.paste(Image.fromarray(scale), (right + 10, top))
    for value, y in ((high, top + 6), ((low + high) / 2, (top + bottom) // 2), (low, bottom - 8)):
        draw.text((right + 28, y), f"{value:.3g}", "black", FONT, anchor="lm")
    return titled(sheet, title)


def curves(title: str, x: np.ndarray, pictures: torch.Tensor, y: np.ndarray, names: list[str]) -> Image.Image:
    """A strip of frames over time and a curve of each class under it, on one scale from 0 to 1.

    x: frame numbers (W,); pictures: uint8 (W, 3, h, w) at these; y: (W, C). Each curve has a panel of its own: colours
    alone would not tell ten of them apart, least of all in grey.
    """
    left, thumbnail, panel, shown = text_width(*names) + 14, 80, 40, min(len(x), 11)
    width = max(480, shown * thumbnail)
    sheet = Image.new("RGB", (left + width + 56, thumbnail + panel * len(names) + 44), "white")
    draw = ImageDraw.Draw(sheet)
    across = left + width * (np.arange(shown) + 0.5) / shown                # the middles of the thumbnails
    place = np.interp(np.linspace(x[0], x[-1], shown), x, np.arange(len(x))).round().astype(int)
    for middle, i in zip(across, place):
        image = Image.fromarray(pictures[i].permute(1, 2, 0).numpy()).resize((thumbnail - 4,) * 2)
        sheet.paste(image, (int(middle) - thumbnail // 2 + 2, 2))
        draw.text((middle, thumbnail + panel * len(names) + 14), str(x[i]), "black", FONT, anchor="mm")
    at = np.interp(x, x[place], across)
    for c, name in enumerate(names):
        floor = thumbnail + panel * (c + 1)
        heights = floor - y[:, c] * (panel - 8)
        line = list(zip(at.tolist(), heights.tolist()))
        draw.line((left, floor, left + width, floor), "grey")
        draw.line((left, floor - panel + 8, left + width, floor - panel + 8), "#dddddd")
        draw.polygon([(line[0][0], floor), *line, (line[-1][0], floor)], "#9ecae1")
        draw.line(line, "#08306b", 2)
        draw.text((left - 6, floor - panel // 2 + 4), name, "black", FONT, anchor="rm")
        draw.text((left + width + 6, floor - panel // 2 + 4), f"{y[:, c].max():.2f}", "black", FONT, anchor="lm")
    draw.text((left + width / 2, thumbnail + panel * len(names) + 32), "frame", "black", FONT, anchor="mm")
    draw.text((left + width + 6, thumbnail // 2), "highest", "black", FONT, anchor="lm")
    return titled(sheet, title)


def confusion_picture(title: str, scores: dict, classes: list[str]) -> Image.Image:
    """Fig. 7: per cent of the true class, over counts."""
    share = 100 * np.array(scores["by_row"], float)                         # None becomes NaN
    cells = [[f"{p:.1f}\n({count})" for p, count in zip(*row)] for row in zip(share, scores["confusion"])]
    return heat_map(f"Fig. 7, {title}\nUAR {scores['uar']:.4f}, WAR {scores['war']:.4f}; rows: true class, columns: "
                    "predicted; per cent of the row (samples)", share, classes, classes, high=100, cells=cells)


# --------------------------------------------------------------------------------------------------------- report

class Report:
    """Text for the terminal, JSON and CSV for programs, PNG and an index for people; all by the first process."""

    def __init__(self, run: Run, folder: Path, index: bool, title: str):
        self.main, self.folder, self.index, self.lines, self.results = run.main, folder, index, [f"# {title}"], {}

    def file(self, name: str) -> Path:
        """A file in the folder, which is made only now: a command that fails leaves none behind."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / name

    def say(self, title: str, text: str) -> None:
        if self.main:
            print(f"\n{title}\n{text}", flush=True)
            self.lines += [f"## {title}", f"```\n{text}\n```"]

    def warn(self, text: str) -> None:
        if self.main:
            print(f"warning: {text}", file=sys.stderr, flush=True)
            self.lines += [f"**Warning:** {text}"]

    def picture(self, name: str, draw) -> None:
        """Save the picture that draw() returns."""
        if self.main:
            draw().save(self.file(name), optimize=True)
            self.lines += [f"![{name}](<{name}>)"]

    def predictions(self, name: str, folds: list[Samples], probabilities: np.ndarray) -> None:
        """CSV with a line per sample: name, label (empty for own media), prediction, and each class's probability."""
        if not self.main:
            return
        classes = folds[0].dataset.classes
        labelled = [(os.fsdecode(name), classes[label] if label >= 0 else "")
                    for samples in folds for name, label in zip(samples.names.tolist(), samples.labels)]
        with open(self.file(name), "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["sample", "label", "prediction", *classes])
            writer.writerows([*pair, classes[row.argmax()], *(f"{p:.6f}" for p in row)]
                             for pair, row in zip(labelled, probabilities))
        self.lines += [f"[{name}](<{name}>)"]

    def scores(self, args, title: str, folds: list[Samples], probabilities: np.ndarray, scores: dict,
               number: str = "") -> None:
        """A data set's scores in every form."""
        name, dataset = folds[0].name, folds[0].dataset
        # A train.csv of own clips and one of own images have the same short name.
        file = short_name(name) + (f"-{dataset.modality}s" if name not in CATALOGUE else "") + number
        self.results[name + number] = scores
        self.say(title, table(scores, dataset.classes))
        self.predictions(f"predictions-{file}.csv", folds, probabilities)
        if args.report:
            self.picture(f"confusion-{file}.png", lambda: confusion_picture(title, scores, dataset.classes))
        if args.compare and dataset.modality == "video":
            self.say("Beside the paper's", compare(name, scores, dataset.classes, title.split(":")[0]))

    def close(self) -> None:
        if not self.main:
            return
        self.file("evaluation.json").write_text(json.dumps(self.results, indent=1) + "\n")
        if self.index:
            self.lines += ["All numbers: [evaluation.json](evaluation.json)"]
            self.file("README.md").write_text("\n\n".join(self.lines) + "\n", "utf-8", "surrogateescape")
        print(f"\nwritten to {os.path.relpath(self.folder)}")


def fine_tuned(checkpoint: dict, path: Path, run: Run, dataset: str | None) -> S4D:
    """The model of a stage-2 checkpoint; a released file does not name its classes: they are those of --dataset."""
    model = rebuild(checkpoint, path)
    if not isinstance(model, S4D):
        raise CheckpointError(f"{path} is a stage-1 checkpoint of pretrain.py: it reconstructs pixels and has no "
                              "classes; fine-tune it first (finetune.py --pretrained), or give --report alone")
    if dataset:
        source, classes = catalogue(dataset).modality, list(catalogue(dataset).classes)
        if model.architecture[f"{source}_classes"] == unnamed(len(classes)):
            model.architecture[f"{source}_classes"] = classes
    return model.to(run.device).eval()


def fold_of(args, trained: dict, name: str) -> int:
    """The fold of a data set to test on: --fold, or the checkpoint's; of a model's other set, which has none, 1."""
    if args.fold is not None and (args.dataset or catalogue(name).folds > 1):
        return args.fold
    return trained.get("fold", 1) if catalogue(name).folds > 1 else 1


def stride_for(checkpoint: dict, name: str) -> int | None:
    """Stride of a set's test clips: the trained set's as its --stride was, one's own data's as it was in training. None
    for another set of the catalogue, which has its own, and for a file that does not say it."""
    settings, data = checkpoint.get("settings", {}), checkpoint.get("data", {})
    if name in CATALOGUE:
        return settings.get("stride") if name == settings.get("videos") else None
    return data.get("train", {}).get("video", {}).get("stride")


def score_fold(args, run: Run, path: Path, checkpoint: dict, model: S4D, name: str, fold: int,
               report: Report) -> tuple[Samples, Observed, dict]:
    """A pass over a test set and the scores, with warnings where its samples are not those that training recorded, or
    were trained on."""
    settings = checkpoint.get("settings", {})
    samples = load_samples(name, args.data_root, "test", fold, stride_for(checkpoint, name))
    recorded = checkpoint.get("data", {}).get("test", {}).get(samples.dataset.modality, {})
    same = (recorded.get("name"), recorded.get("fold")) == (name, fold)
    # With --validation, what training tested on is a part of its own fold.
    if same and not settings.get("validation") and recorded["fingerprint"] != samples.fingerprint():
        report.warn(f"the {len(samples)} test samples of {name}, stride {samples.stride}, are not the "
                    f"{recorded['samples']}, stride {recorded.get('stride')}, that {path} recorded: fingerprint "
                    f"{samples.fingerprint()}, recorded {recorded['fingerprint']}")
    if known := trained_on(checkpoint, samples):
        report.warn(f"{path} was trained on {known} of the {len(samples)} test samples")
    scores, observed = evaluate(model, samples, run, args.workers, args.batch_size)
    return samples, observed, dict(scores, fold=fold, samples=len(samples), checkpoint=str(path))


def report_folds(args, run: Run, report: Report) -> None:
    """DFEW's and MAFW's protocol (Section IV-A): the predictions of all folds concatenated."""
    ensure_synthetic([args.dataset], args.data_root, run)
    tested, probabilities, scores, lines = [], [], [], []
    for fold, path in check_folds(args.folds, args.dataset, args.data_root).items():
        checkpoint = read_checkpoint(path)
        model = fine_tuned(checkpoint, path, run, args.dataset)
        samples, observed, score = score_fold(args, run, path, checkpoint, model, args.dataset, fold, report)
        tested.append(samples)
        probabilities.append(observed.probabilities[samples.dataset.modality])
        scores.append(score)
        lines.append(f"fold {fold:<14} UAR {score['uar']:.4f}  WAR {score['war']:.4f}   {len(samples)} test samples, "
                     f"{path}")
    together = join_folds(tested, probabilities, scores)
    for what in ("mean", "deviation")[:len(scores)]:
        lines.append(f"{what:19} UAR {together[f'uar_{what}']:.4f}  WAR {together[f'war_{what}']:.4f}")
    report.say(f"{args.dataset}, each of {len(scores)} folds", "\n".join(lines))
    report.scores(args, f"{args.dataset}, {len(scores)} folds concatenated", tested, np.concatenate(probabilities),
                  together)


def report_model(args, run: Run, path: Path, checkpoint: dict, model: S4D, report: Report, number: str) -> dict:
    """Scores of each head on its own data and, for a report, what lies between the two. Returns samples by modality."""
    trained = checkpoint.get("settings", {})
    if not trained and not args.dataset:
        raise CheckpointError(f"{path} does not say what it was trained on: give --dataset, and --fold")
    datasets = [args.dataset] if args.dataset else [
        trained[f"{source}s"] for source in ("video", "image") if source in model.head]
    ensure_synthetic(datasets, args.data_root, run)
    tested, seen = {}, {}
    for name in datasets:
        fold = fold_of(args, trained, name)
        samples, observed, scores = score_fold(args, run, path, checkpoint, model, name, fold, report)
        source = samples.dataset.modality
        tested[source], seen[source] = samples, observed
        epoch = f" after epoch {checkpoint['progress']['epoch']}" if "progress" in checkpoint else ""
        title = name + (f", fold {fold}" if catalogue(name).folds > 1 else "")
        report.scores(args, f"{title}: {len(samples)} test samples, {path}{epoch}", [samples],
                      observed.probabilities[source], scores, number)
    if args.report:
        report_tasks(model, tested, seen, report, number)
    return tested


def report_tasks(model: S4D, tested: dict[str, Samples], seen: dict[str, Observed], report: Report,
                 number: str) -> None:
    """Section IV-E: each head on the other's data, class centres of both data sets, and which experts they use."""
    lines = []
    for source, samples in tested.items():
        other = "image" if source == "video" else "video"
        if other in model.head:
            theirs = tested[other].dataset.classes if other in tested else model.architecture[f"{other}_classes"]
            scores = cross_task(samples, seen[source].probabilities[other], theirs)
            report.results[samples.name + number][f"{other}_head"] = scores
            lines.append(f"{other} head on {samples.name}: " + (
                "no class in common" if scores is None else f"UAR {scores['uar']:.4f}  WAR {scores['war']:.4f}   "
                f"{scores['samples']} samples of the {len(scores['classes'])} classes that both have"))
    if lines:
        report.say("Table IX: each head on the other task's data", "\n".join(lines))
    if len(tested) == 2:
        rows, columns = (list(tested[source].dataset.classes) for source in ("video", "image"))
        clips, images = (class_centres(seen[source].features, samples.labels, len(samples.dataset.classes))
                         for source, samples in sorted(tested.items(), reverse=True))
        order = shared_classes(rows, columns)[1]                            # so that the same classes are a diagonal
        order += [j for j in range(len(columns)) if j not in order]
        columns = [columns[j] for j in order]
        similarity = F.cosine_similarity(clips[:, None], images[None, order], dim=-1).numpy()
        report.results[f"similarity{number}"] = dict(rows=rows, columns=columns, values=listed(similarity))
        title = f"Fig. 4: cosine similarity of class centres, {tested['video'].name} (rows), {tested['image'].name}"
        report.say(title, "\n".join([" " * 16 + "".join(name.rjust(15) for name in columns)] + [
            f"{name:16}" + "".join(f"{value:15.3f}" for value in row) for name, row in zip(rows, similarity)]))
        report.picture(f"centres{number}.png", lambda: heat_map(title, similarity, rows, columns,
                                                                   float(np.nanmin(similarity))))
    if model.architecture["moae_layers"]:
        report_experts(model, tested, seen, report, number)


def report_experts(model: S4D, tested: dict[str, Samples], seen: dict[str, Observed], report: Report,
                   number: str) -> None:
    """Fig. 5, and the most frequent paths; layers and experts are counted from 1."""
    layers = [i + 1 for i in model.architecture["moae_layers"]]
    experts = [f"E{i + 1}" for i in range(model.architecture["experts"])]
    rows, activation, lines = [], [], [" " * 32 + "".join(name.rjust(7) for name in experts)]
    for source, samples in tested.items():
        share = seen[source].activation / seen[source].activation.sum(1, keepdims=True)
        paths = [("-".join(experts[i] for i in path), part) for path, part in frequent_paths(seen[source].paths)]
        report.results[samples.name + number] |= dict(activation=listed(share), paths=paths)
        rows += [f"{samples.name}, layer {layer}" for layer in layers]
        activation += [*share]
        lines += [f"{row:32}" + "".join(f"{value:7.3f}" for value in values)
                  for row, values in zip(rows[-len(layers):], share)]
        lines += [f"most frequent paths: {', '.join(f'{path} {part:.3f}' for path, part in paths)}"]
    title = "Fig. 5: share of a layer's assignments that each expert receives"
    report.say(f"{title}; path: a token's strongest expert in each layer", "\n".join(lines))
    report.picture(f"experts{number}.png", lambda: heat_map(title, np.array(activation), rows, experts,
                                                            high=float(np.max(activation))))


def report_checkpoints(args, run: Run, checkpoints: dict[Path, dict], report: Report) -> None:
    """Fine-tuned checkpoints: own media, or the test data and, for a report, everything else."""
    models = {path: fine_tuned(checkpoint, path, run, args.dataset) for path, checkpoint in checkpoints.items()}
    first, checkpoint = next(iter(checkpoints.items()))
    if len({model.size for model in models.values()}) > 1:
        raise CheckpointError(f"{' and '.join(map(str, models))} are of different sizes: evaluate them one by one")
    if args.media and not args.report:
        return report_media(args, run, models[first], checkpoint, args.media, report)
    tested = [report_model(args, run, path, checkpoints[path], model, report, f"-{i + 1}" if i else "")
              for i, (path, model) in enumerate(models.items())][0]
    if not args.report:
        return
    report.say("Fig. 6: attention", "\n".join(f"model {i + 1}: {path}" for i, path in enumerate(models)))
    for source, samples in tested.items():
        report.picture(f"attention-{source}s.png", lambda: attention_sheet(list(models.values()), samples, run))
    pretrained = checkpoint.get("settings", {}).get("pretrained", "none")
    try:
        stage_1 = read_checkpoint(pretrained)
        if stage_1["stage"] != "pretrain":
            raise CheckpointError(f"{pretrained} is of stage 2")
        report_reconstructions(args, run, Path(pretrained), stage_1, report)
    except (CheckpointError, DataError) as error:
        report.warn(f"left out, reconstructions of stage 1 (trained with --pretrained {pretrained}): {error}")
    if args.media or "video" in tested:
        report_media(args, run, models[first], checkpoint, args.media or [tested["video"].path(0)], report)


def box(text: str) -> tuple[int, ...]:
    """x,y,w,h in pixels. ArgumentTypeError for anything else."""
    if not re.fullmatch(r"\d+,\d+,[1-9]\d*,[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected x,y,w,h, whole numbers of pixels: left,top,width,height")
    return tuple(map(int, text.split(",")))


def settings() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    p.add_argument("media", type=Path, nargs="*", metavar="FILE", help="own image, video, folder of frames or of these")
    p.add_argument("--checkpoint", type=Path, action="append", help="best.pt or last.pt of finetune.py; given twice, "
                   "both are shown side by side; with --report also last.pt of pretrain.py")
    p.add_argument("--folds", type=Path, nargs="+", metavar="CHECKPOINT", help="a checkpoint of each fold of --dataset")
    p.add_argument("--dataset", type=dataset_name(),
                   help="data set to test on (those that the checkpoint was trained on)")
    p.add_argument("--fold", type=int, help="its fold (the checkpoint's)")
    p.add_argument("--report", type=Path, metavar="FOLDER", help="write all tables and figures there, with README.md")
    p.add_argument("--compare", action="store_true", help="print the paper's Tables II and III beside ours")
    p.add_argument("--crop", type=box, metavar="X,Y,W,H", help="the face in FILE, in pixels (the whole picture)")
    p.add_argument("--data-root", type=Path, default=Path("data"), help="folder of all data sets (layouts: README)")
    p.add_argument("--batch-size", type=int, default=16, help="samples that one process computes at once")
    p.add_argument("--workers", type=int, default=default_workers(), help="loading processes per process")
    p.add_argument("--output", type=Path, help="folder of evaluation.json and CSV (the checkpoint's, or media in it)")
    return p


def main() -> None:
    p = settings()
    args = p.parse_args()
    sys.stdout.reconfigure(errors="surrogateescape")  # names of files that are no UTF-8
    if args.batch_size < 1 or args.workers < 0:
        p.error(f"--batch-size {args.batch_size} --workers {args.workers}: expected 1 or more, and 0 or more")
    if bool(args.checkpoint) == bool(args.folds) or len(args.checkpoint or ()) > (1 if args.media else 2):
        p.error("expected --checkpoint, once (or twice without FILE), or --folds")
    if args.folds and (args.media or args.fold or not args.dataset):
        p.error("--folds expects --dataset, and neither FILE nor --fold")
    if args.report and args.output:
        p.error("--report and --output both name the folder of the results: give one")
    if args.crop and not args.media:
        p.error("--crop cuts the face out of FILE, which is missing")
    if args.report and (args.report / "README.md").exists() and not (args.report / "evaluation.json").exists():
        p.error(f"--report {args.report}: the README.md there is not a report's; give another folder")
    paths = args.checkpoint or args.folds
    folder = args.report or args.output or Path(os.path.commonpath([path.parent.absolute() for path in paths]))
    if args.media and not (args.report or args.output):
        folder /= "media"                   # the run's own evaluation.json stays
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        p.error(f"{there} is no folder that results can be written to")
    checkpoint = read_checkpoint(paths[0])
    run = start(checkpoint["architecture"].get("size", "base"))  # a file without one is refused when it is rebuilt
    report = Report(run, folder, bool(args.report), f"What {', '.join(map(str, paths))} can do")
    if args.folds:
        report_folds(args, run, report)
    elif checkpoint["stage"] == "pretrain" and args.report and len(paths) == 1 and not args.media:
        report_reconstructions(args, run, paths[0], checkpoint, report)
    else:
        report_checkpoints(args, run, {paths[0]: checkpoint} | {path: read_checkpoint(path) for path in paths[1:]},
                           report)
    report.close()


if __name__ == "__main__":
    guarded(main)
