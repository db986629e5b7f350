"""How often a model is right, and what else the paper shows of a trained model (Section IV).

`metrics` makes UAR and WAR of a confusion matrix; `observe` is one pass over a test set, which
predictions, features and experts come from; then comes the command. The rest may be skipped on a
first reading: one's own videos, and what --report shows: analyses, and figures as text.

    python evaluate.py --checkpoint runs/dfew/fold1/last.pt           on the test data of its fold
    python evaluate.py --dataset dfew --folds runs/dfew/*/last.pt     five folds' predictions as one
    python evaluate.py --checkpoint runs/dfew/fold1/last.pt --report out        out/report.html
    python evaluate.py --checkpoint runs/dfew/fold1/last.pt FILE ...  one's own videos and images

n samples    v views of one (two clips or one image)    C classes    d token width    N tokens
L layers with experts, E experts in each, k of them for a token
"""
import argparse
import base64
import csv
import html
import io
import json
import math
import os
import re
import shlex
import sys
import tempfile
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms import v2
from tqdm import tqdm

from data import (CATALOGUE, Samples, TestData, boxed, catalogue, dataset_name, load_samples,
                  loader, open_clip, read_clip, read_image, resampled, to_float)
from model import (IMAGE_MEAN, IMAGE_STD, MASK_RATIO, S4D, MaskedAutoencoder, Size, UserError,
                   at_least_fp32, channel_values, has_names, normalised_target, patchify,
                   read_checkpoint, rebuild, whole_file)
from pretrain import Formatter, Parser, Process, box, default_workers, guarded, number, path, start

# ------------------------------------------------------------------------ counting: Tables II to IX

def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Counts (C, C): rows are true classes, columns predicted ones."""
    cells = np.bincount(labels * classes + predictions, minlength=classes ** 2)
    return cells.reshape(classes, classes)


def recalls(confusion: np.ndarray) -> np.ndarray:
    """Share of each class that is found, (..., C, C) -> (..., C); NaN for one without samples."""
    with np.errstate(invalid="ignore"):
        return np.diagonal(confusion, axis1=-2, axis2=-1) / confusion.sum(-1)


def metrics(confusion: np.ndarray) -> dict:
    """UAR, WAR, their 95 % intervals, recalls, F1 and the majority-class baseline, as fractions.

    A class without samples has no recall (None) and is left out of UAR; one that is not predicted
    either is left out of the macro F1. Intervals are percentiles of 2,000 bootstrap samples."""
    total = int(confusion.sum())
    if not total:
        raise UserError("no samples to evaluate: UAR and WAR are undefined")
    uar = np.nanmean(recalls(confusion))    # unweighted: every class counts the same, however small
    war = np.trace(confusion) / total       # weighted by the classes' sizes: the accuracy
    support = confusion.sum(1)
    predicted = confusion.sum(0)
    occurs = support + predicted > 0
    f1 = 2 * np.diagonal(confusion) / np.where(occurs, support + predicted, 1)
    # To draw n samples with replacement is to draw n of the matrix's cells
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(total, confusion.ravel() / total, 2000).reshape(-1, *confusion.shape)
    uars = np.nanmean(recalls(drawn), axis=1)
    wars = np.trace(drawn, axis1=1, axis2=2) / total
    return dict(
        uar=float(uar), uar_interval=np.quantile(uars, (0.025, 0.975)).tolist(),
        war=float(war), war_interval=np.quantile(wars, (0.025, 0.975)).tolist(),
        macro_f1=float(f1[occurs].mean()), weighted_f1=float(f1 @ support / total),
        majority_uar=1 / int((support > 0).sum()), majority_war=float(support.max() / total),
        recall=listed(recalls(confusion)), confusion=confusion.tolist(),
        by_row=listed(confusion / np.where(support, support, np.nan)[:, None]))


def listed(values: np.ndarray) -> list:
    """An array as lists of numbers with None for NaN, which JSON does not have."""
    return np.where(np.isnan(values), None, values).tolist()


def join_folds(scores: list[dict]) -> dict:
    """Metrics of all folds' predictions as one: DFEW's and MAFW's protocol (Section IV-A). Beside
    them stand the mean of the folds' UAR and WAR and the sample standard deviation."""
    together = metrics(sum(np.array(score["confusion"]) for score in scores))
    for name in ("uar", "war"):
        values = [score[name] for score in scores]
        together[f"{name}_mean"] = float(np.mean(values))
        together[f"{name}_deviation"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return dict(together, folds=scores)


def shown(cell) -> str:
    """A table's cell as text; of (number, text) the text."""
    if isinstance(cell, tuple):
        return cell[1]
    if isinstance(cell, float):
        return f"{cell:.4f}"
    return "-" if cell is None else str(cell)


def markdown(columns: list[str], rows: list[list]) -> str:
    """A table that is Markdown and reads well in a terminal. A row begins with its name."""
    cells = []                              # what Markdown would take for something else is escaped
    for row in [columns, *rows]:
        cells.append([shown(cell).replace("|", "\\|").replace("\n", " ") for cell in row])
    first, *others = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * first, *("-" * (width - 1) + ":" for width in others)])
    lines = []
    for name, *numbers in cells:
        lines.append(f"| {name:{first}} | " + " | ".join(map(str.rjust, numbers, others)) + " |")
    return "\n".join(lines)


def table(scores: dict, classes: tuple[str, ...]) -> str:
    """Scores as text, with the majority baseline, then the confusion matrix with recalls."""
    rows = []
    for name, row, recall in zip(classes, scores["confusion"], scores["recall"]):
        rows.append([name, *row, recall])
    lines = [
        "UAR {uar:.4f} ({uar_interval[0]:.4f} to {uar_interval[1]:.4f})  "
        "WAR {war:.4f} ({war_interval[0]:.4f} to {war_interval[1]:.4f}), with 95 % intervals   "
        "macro F1 {macro_f1:.4f}  weighted F1 {weighted_f1:.4f}\nalways the most frequent class: "
        "UAR {majority_uar:.4f}  WAR {majority_war:.4f}\n".format(**scores),
        markdown(["true \\ predicted", *classes, "recall"], rows)]
    predicted = np.sum(scores["confusion"], 0)
    never = [name for name, count in zip(classes, predicted) if count == 0]
    if never:
        lines.append(f"\nnever predicted: {', '.join(never)}")
    return "\n".join(lines)


# ------------------------------------------------------------------------- one pass over a test set

@dataclass
class Observed:
    """What a pass over n samples yields, the same in every process."""
    probabilities: dict[str, np.ndarray]    # (n, C) float64 of each head, also the other's
    features: np.ndarray                    # (n, d) float64: the representation before the heads
    activation: np.ndarray                  # (L, E): tokens that each expert received
    paths: list[tuple[list[int], float]]    # the ten most frequent, with their shares of all tokens


def forward(model: S4D, x: torch.Tensor, process: Process) -> dict[str, torch.Tensor]:
    """Of uint8 images or clips "features" (B, d) and, by head, probabilities (B, C), in float64."""
    with process.autocast():
        features = model.features(to_float(process.upload(x)))
        logits = {name: head(features) for name, head in model.head.items()}
    found = {"features": features.double()}
    for name, value in logits.items():
        found[name] = at_least_fp32(value).double().softmax(-1)
    return found


@torch.no_grad()
def observe(model: S4D, data: TestData, process: Process, workers: int,
            batch: int = 16) -> Observed:
    """One pass over all samples, of which none is left out.

    Clips of a video: softmax of each, then the mean (Section IV-B), and the mean of their features.
    A token's path is its expert of the largest weight in each layer; where more than 2^24 paths are
    possible, in the last layers. Batches are fixed by the sample order and dealt to the processes:
    nothing is padded or counted twice, and the numbers do not depend on how many there are.
    """
    model.eval()
    n, experts, layers = len(data), model.architecture["experts"], model.architecture["moae_layers"]
    widths = [model.size.width, *(head.out_features for head in model.head.values())]
    rows = torch.zeros(n, sum(widths), dtype=torch.float64)
    activation = torch.zeros(len(layers), experts, dtype=torch.float64, device=process.device)
    last = min(len(layers), int(24 / math.log2(max(2, experts))))           # layers of a path
    digits = experts ** torch.arange(last, device=process.device)           # of a path's number
    paths = torch.zeros(experts ** last, dtype=torch.float64, device=process.device)
    gates, hooks = [], []
    for i in layers:
        hooks.append(model.blocks[i].moe_layer.router.register_forward_hook(
            lambda module, inputs, output: gates.append(output[1].flatten(0, -2))))
    chunks = [list(range(i, min(i + batch, n))) for i in range(0, n, batch)]
    batches = loader(data, workers, batch_sampler=chunks[process.rank::process.world])
    title = f"evaluating {data.samples.name}"
    for index, views, _ in tqdm(batches, title, leave=False, disable=not process.main):
        gates.clear()
        found = forward(model, views.flatten(0, 1), process)
        row = torch.cat(list(found.values()), 1)                            # (B v, d + C ...)
        rows[index] = row.unflatten(0, views.shape[:2]).mean(1).cpu()  # here a GPU is waited for
        if gates:
            chosen = torch.stack(gates)                                     # (L, B v N, k) best first
            ones = torch.ones_like(chosen, dtype=torch.float64)
            activation.scatter_add_(1, chosen.flatten(1), ones.flatten(1))
            path = (digits[:, None] * chosen[len(layers) - last:, :, 0]).sum(0)
            paths.scatter_add_(0, path, ones[0, :, 0])
    for hook in hooks:
        hook.remove()
    if process.world > 1:                   # every sample's row is zero in all processes but one
        rows = process.sum(process.upload(rows)).cpu()
        activation = process.sum(activation)
        paths = process.sum(paths)
    features, *heads = np.split(rows.numpy(), np.cumsum(widths)[:-1], axis=1)
    shares, numbers = (paths / paths.sum()).topk(min(10, len(paths)))
    frequent = []
    for share, number in zip(shares.tolist(), numbers.tolist()):
        if share > 0:
            frequent.append(([number // experts ** i % experts for i in range(last)], share))
    return Observed(dict(zip(model.head, heads)), features, activation.cpu().numpy(), frequent)


SAME_CLASS = {"happiness": "happy", "sadness": "sad", "anger": "angry"}  # as data sets spell them


def class_numbers(classes: list[str], theirs: list[str]) -> list[int | None]:
    """The place in `theirs` of each of the classes, by name; None where there is none."""
    places = {SAME_CLASS.get(name, name): i for i, name in enumerate(theirs)}
    places |= {name: i for i, name in enumerate(theirs)}
    found = []
    for name in classes:
        other = SAME_CLASS.get(name, name)
        found.append(places.get(name, places.get(other)))
    return found


def labels_of(samples: Samples, model: S4D) -> np.ndarray:
    """The samples' labels as numbers of the model's classes (n,). UserError names what it lacks."""
    m = samples.modality
    classes = model.architecture[f"{m}_classes"]
    numbers = class_numbers(samples.classes, classes)
    missing = [name for name, place in zip(samples.classes, numbers) if place is None]
    if missing or not numbers:
        theirs = f"Its classes: {', '.join(classes)}" if classes else f"It was trained without {m}s"
        raise UserError(f"{samples.name} has the {m} classes {missing}, which the model has not. "
                        f"{theirs}")
    return np.array(numbers)[samples.labels]


def evaluate(model: S4D, samples: Samples, process: Process, workers: int,
             batch: int = 16) -> tuple[dict, Observed]:
    """Metrics of the samples' own head, and the pass that they are from. Classes are matched by
    name; the model may have more, and may predict these too. Of equally probable classes the first
    is predicted."""
    labels = labels_of(samples, model)
    observed = observe(model, TestData(samples, model.size), process, workers, batch)
    probabilities = observed.probabilities[samples.modality]
    confusion = confusion_matrix(labels, probabilities.argmax(1), probabilities.shape[1])
    return metrics(confusion), observed


def gate_statistics(model: S4D, activation: np.ndarray) -> dict[int, dict]:
    """By layer, numbered as in the checkpoint: each expert's share of the layer's assignments, and
    the coefficient of variation of these shares (0 = even). activation: (L, E), as observed."""
    statistics = {}
    for layer, counts in zip(model.architecture["moae_layers"], activation):
        share = counts / counts.sum()
        cv = float(share.std() / share.mean())
        statistics[layer] = dict(share=share.round(4).tolist(), cv=round(cv, 4))
    return statistics


# ------------------------------------------------------------------------------------- the command

@dataclass
class Run:
    """What a command was given, and what it has found so far."""
    args: argparse.Namespace
    process: Process
    warnings: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)          # to be printed
    numbers: dict = field(default_factory=dict)             # evaluation.json
    predictions: dict = field(default_factory=dict)         # by modality, predictions-*.csv
    sections: list[str] = field(default_factory=list)       # of report.html
    drawings: dict[str, str] = field(default_factory=dict)  # *.svg


def main() -> None:
    p = settings()
    args = p.parse_args()
    if args.folds and (args.media or args.fold or not args.dataset):
        p.error("--folds expects --dataset, and neither FILE nor --fold")
    if args.crop and not (args.media or args.dataset):
        p.error("--crop cuts the face out of FILE or of --dataset's clips: both are missing")
    # Results of last.pt and best.pt, of folds and of own media stay apart
    file = args.checkpoint or args.folds[0]
    part = "folds" if args.folds else "media" if args.media else ""
    folder = args.report or file.with_suffix("") / part
    try:                                    # before any work
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{folder} cannot be written to, give --report: {error}") from error
    checkpoint = read_checkpoint(file)
    checkpoint.pop("optimizer", None)       # its moments are twice as large as the weights
    size = checkpoint["architecture"].get("size", "base")
    run = Run(args, start(size, checkpoint.get("made_by", {}).get("precision")))
    if args.folds:
        evaluate_folds(run)
    elif args.media:
        show_media(run, file, checkpoint)
    elif checkpoint["stage"] == "pretrain" and args.report:
        show_training(run, file)
        show_reconstructions(run, file, checkpoint)
    else:
        evaluate_sets(run, file, checkpoint)
    if run.process.main:
        rows = [["", ""], ["this command", shlex.join(sys.argv)], ["torch", torch.__version__]]
        for part in ("architecture", "identity", "made_by"):
            rows += [[name, str(value)] for name, value in checkpoint.get(part, {}).items()]
        show(run, "settings", rows)
        write(run, folder, f"Evaluation of {args.checkpoint or args.dataset}")


def settings() -> argparse.ArgumentParser:
    p = Parser(description=__doc__, formatter_class=Formatter)
    models = p.add_mutually_exclusive_group(required=True)
    models.add_argument("--checkpoint", type=path,
                        help="of finetune.py; with --report also of pretrain.py")
    models.add_argument("--folds", type=path, nargs="+", metavar="CHECKPOINT",
                        help="one of each fold of --dataset")
    add = p.add_argument
    add("media", type=path, nargs="*", metavar="FILE",
        help="own image or video, or folder of one clip's frames")
    add("--report", type=path, metavar="FOLDER", help="for report.html, figures and scores")
    add("--dataset", type=dataset_name(), help="data set to test on (those of training)")
    add("--fold", type=number(int, 1), help="its fold (the checkpoint's)")
    add("--crop", type=box, metavar="X,Y,W,H", help="the face in FILE or in clips of --dataset, in "
        "pixels (all of it; of a run's own test clips what training had)")
    add("--baseline", type=path, metavar="CHECKPOINT", help="its attention is shown beside (Fig. 6)")
    add("--data-root", type=path, default=Path("data"), help="folder of all data sets")
    add("--workers", type=number(int, 0), default=default_workers(), help="loading processes each")
    return p


def write(run: Run, folder: Path, title: str) -> None:
    """Write every file whole, and only then print, so that results are there whoever reads."""
    texts = {"evaluation.json": json.dumps(run.numbers, indent=1)}
    for name, drawing in run.drawings.items():
        texts[f"{name}.svg"] = stand_alone(drawing)
    if run.sections:
        texts["report.html"] = page(title, run.warnings, run.sections)
    for name, text in texts.items():
        with whole_file(folder / name, "w", encoding="utf-8") as file:
            file.write(text)
    as_csv = dict(encoding="utf-8", errors="surrogateescape", newline="")
    for m, rows in run.predictions.items():
        with whole_file(folder / f"predictions-{m}s.csv", "w", **as_csv) as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
    for warning in run.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    where = os.path.relpath(folder / ("report.html" if run.sections else ""))
    print(*run.lines, f"\nwritten to {where}", sep="\n")


def load_model(run: Run, file: Path, checkpoint: dict) -> S4D:
    """The model of a stage-2 checkpoint. Classes of a file that does not name them are those of
    --dataset, a set of the catalogue, in its order, and never those of one's own list."""
    model = rebuild(checkpoint, file)
    if not isinstance(model, S4D):
        raise UserError(f"{file} is a stage-1 checkpoint of pretrain.py: it has no classes; "
                        "fine-tune it first (finetune.py --pretrained), or give --report alone")
    if run.args.dataset:
        dataset = catalogue(run.args.dataset)
        head = f"{dataset.modality}_classes"
        classes = model.architecture[head]
        if classes and not has_names(classes):
            if dataset.name not in CATALOGUE or len(classes) != len(dataset.classes):
                raise UserError(f"{file} does not name its {len(classes)} {dataset.modality} "
                                "classes: --dataset must be a set of the catalogue with as many, "
                                f"not {dataset.name}")
            model.architecture[head] = list(dataset.classes)
            run.lines.append(f"{file} does not name its classes: taken as those of {dataset.name}, "
                             f"in its order: {', '.join(dataset.classes)}")
    return model.to(run.process.device).eval()


def load_tests(run: Run, file: Path, checkpoint: dict) -> list[Samples]:
    """The test samples of --dataset or else of what a checkpoint was trained on, videos first. Warns
    if training recorded others, as the model may have seen these; a UserError with --folds."""
    identity = checkpoint.get("identity", {})
    trained_on = [identity.get("dataset"), identity.get("image_dataset")]
    tests = []
    for name in [run.args.dataset] if run.args.dataset else trained_on:
        if name in (None, "none", "frames"):
            continue
        fold = 1
        if catalogue(name).folds > 1:
            fold = run.args.fold or identity.get("fold", 1)
        # Another set of the catalogue has a stride of its own, and is not what training recorded
        same = run.args.folds or name in trained_on or name not in CATALOGUE
        stride = identity.get("video stride") if same else None
        # One's own single list has no test part
        split = "test" if name in CATALOGUE or len(catalogue(name).lists) > 1 else "train"
        samples = load_samples(name, run.args.data_root, split, fold, stride)
        found = samples.fingerprint()
        recorded = identity.get(f"test {samples.modality}", found)
        if samples.modality == "video":
            trained = name in trained_on or identity.get("test video") == found
            crop = run.args.crop or (identity.get("crop") if trained else None)
            # One's own clips are sampled at the step in time that the training clips had
            rate = samples.rate and identity.get("video rate", samples.rate)
            samples = replace(samples, box=crop or samples.box, rate=rate)
        if same and recorded != found:
            text = (f"not the test samples of training, {file} may have seen them: {found}; "
                    f"recorded: {recorded}")
            if run.args.folds:
                raise UserError(text)
            run.warnings.append(text)
        tests.append(samples)
    if not tests:
        raise UserError(f"{file} does not say what it was trained on: give --dataset, and --fold")
    return tests


def evaluate_set(run: Run, file: Path, model: S4D, samples: Samples) -> tuple:
    """Scores, the pass that they are from, and a row of each sample's name, class, predicted class
    and probabilities."""
    scores, seen = evaluate(model, samples, run.process, run.args.workers)
    classes = model.architecture[f"{samples.modality}_classes"]
    scores |= dict(classes=classes, fold=samples.fold, samples=len(samples), checkpoint=str(file))
    rows = []
    names = samples.names.tolist()
    labels = labels_of(samples, model)
    for i, probabilities in enumerate(seen.probabilities[samples.modality]):
        predicted = classes[probabilities.argmax()]
        row = [os.fsdecode(names[i]), classes[labels[i]], predicted]
        rows.append(row + probabilities.round(6).tolist())
    return scores, seen, rows


def evaluate_folds(run: Run) -> None:
    """DFEW's and MAFW's protocol (Section IV-A): one checkpoint of each fold, their predictions as
    one. UserError before anything is computed if they do not belong together."""
    name, files = run.args.dataset, run.args.folds
    tests = {}
    for file in files:
        samples, = load_tests(run, file, read_checkpoint(file))
        tests[samples.fold] = file, samples
    folds = catalogue(name).folds
    if not len(files) == len(tests) == folds:
        raise UserError(f"--folds expects one checkpoint of each of the {folds} folds of {name}: "
                        f"these {len(files)} are of folds {sorted(tests)}")
    scores, predicted = [], []
    by_fold = [["", "UAR", "WAR"]]
    for fold, (file, samples) in sorted(tests.items()):
        model = load_model(run, file, read_checkpoint(file))            # one at a time in memory
        score, _, rows = evaluate_set(run, file, model, samples)
        scores.append(score)
        predicted += rows
        by_fold.append([f"fold {fold}", score["uar"], score["war"]])
    together = join_folds(scores)
    by_fold.append(["mean", together["uar_mean"], together["war_mean"]])
    by_fold.append(["deviation", together["uar_deviation"], together["war_deviation"]])
    together |= dict(classes=score["classes"], checkpoint="all folds as one")
    run.lines.append(f"\n{name}, each fold by itself\n{markdown(by_fold[0], by_fold[1:])}")
    show_scores(run, f"{name}, {folds} folds", samples, together, predicted)
    show(run, "folds", by_fold)


def evaluate_sets(run: Run, file: Path, checkpoint: dict) -> None:
    """A fine-tuned checkpoint on its test data and, for a report, everything else."""
    model = load_model(run, file, checkpoint)
    report = run.args.report and run.process.main
    tested = {}
    for samples in load_tests(run, file, checkpoint):
        scores, seen, rows = evaluate_set(run, file, model, samples)
        if "state" in checkpoint:
            scores["checkpoint"] += f" after epoch {checkpoint['state']['epoch']}"
        show_scores(run, data_name(samples), samples, scores, rows)
        tested[samples.modality] = samples, seen
        if report:
            show_mistakes(run, model, samples, rows)
    if report:
        show_training(run, file)
        show_paths(run, model, tested)
        show_tasks(run, model, tested)
        if len(tested) == 2:
            show_similarity(run, *tested["video"], *tested["image"])
        show_attention(run, model, tested)
        pretrained = checkpoint.get("identity", {}).get("pretrained", "none")
        try:
            if pretrained != "none":
                show_reconstructions(run, pretrained, read_checkpoint(pretrained))
        except UserError as error:          # the file or its data may be on another machine
            run.warnings.append(f"no reconstructions of stage 1 ({pretrained}): {error}")


# --------------------------------------------------------------------------- own images and videos

def covering_frames(n: int, frames: int, stride: int, most: int = 64) -> list[int]:
    """Frame numbers of clips that cover a video of n frames, joined: each overlaps half of the next,
    or there are `most`, spread evenly."""
    every = np.arange(0, n, stride)
    every = np.pad(every, (0, max(0, frames - len(every))), "edge")
    last = len(every) - frames
    clips = min(most, 1 + math.ceil(last / (frames // 2)))
    starts = np.linspace(0, last, clips).round().astype(int)
    numbers = starts[:, None] + np.arange(frames)                           # (clips, frames)
    return every[numbers].ravel().tolist()


@torch.no_grad()
def show_media(run: Run, checkpoint_file: Path, checkpoint: dict) -> None:
    """Predictions for one's own images, and for videos the mean over clips that cover them. What
    cannot be used is named before any work."""
    model = load_model(run, checkpoint_file, checkpoint)
    clips = {}
    for file in run.args.media:
        clips[file] = open_clip(file)       # counted, not decoded: a broken file is found in time
        m = "video" if clips[file] else "image"
        if m not in model.head:
            raise UserError(f"{file} is {m} data, which this model was trained without")
    transform = resize = v2.Resize((model.size.pixels, model.size.pixels), antialias=True)
    for file, clip in clips.items():
        m = "video" if clip else "image"
        if run.args.crop:
            transform = v2.Compose([partial(boxed, box=run.args.crop, path=file), resize])
        if m == "video":
            views, seconds, note = read_whole(model.size, checkpoint, clip, transform)
        else:
            views, note = transform(read_image(file))[None], ""             # (1, 3, H, W)
        # In parts, as 64 clips of size base do not fit into a small GPU at once
        found = [forward(model, part, run.process)[m] for part in views.split(8)]
        course = torch.cat(found).cpu()                                     # (W, C) of W clips
        mean = course.mean(0).numpy()
        classes = model.architecture[f"{m}_classes"]
        best = classes[mean.argmax()]
        rows = run.predictions.setdefault(m, [["sample", "label", "prediction", *classes]])
        rows.append([str(file), "", best, *mean.round(6).tolist()])
        if m == "video":
            numbers = [["seconds", *classes], *np.column_stack([seconds, course]).tolist()]
            frames = views[:, model.size.frames // 2]
            drawing = line_chart(numbers, "probability", pictures=frames)
        else:
            numbers = [["", *classes], [file.name, *mean.tolist()]]
            drawing = grid([["", "", *classes], [file.name, views[0], *mean.tolist()]])
        note = f"{best} {mean.max():.2f}{note}."
        show(run, m, numbers, drawing, f"{len(rows) - 1}. {file.name}", note)
        run.lines.append(f"{file}: {note}")
    for m, (columns, *rows) in run.predictions.items():
        run.lines.append(f"\nOwn {m}s: {len(rows)}\n{markdown(columns, rows)}")


def read_whole(size: Size, checkpoint: dict, clip, transform) -> tuple:
    """Clips that cover a video, opened, at the training clips' step in time, uint8 (W, T, 3, H, W);
    the seconds of their middles; and a note."""
    identity = checkpoint.get("identity", {})
    stride = identity.get("video stride") or 4
    rate = identity.get("video rate") or 25.0
    choose = partial(covering_frames, frames=size.frames, stride=stride)
    frames = resampled(choose, clip.n, clip.rate or 25.0, rate)
    views = read_clip(clip, frames, transform, f"decoding {clip.path.name}")
    views = views.unflatten(0, (-1, size.frames))
    seconds = clip.n / (clip.rate or 25.0)
    middles = np.reshape(frames, (-1, size.frames))[:, size.frames // 2] * seconds / clip.n
    note = (f", the mean over {len(views)} clips of {size.frames * stride / rate:.1f} seconds, "
            f"spread over its {seconds:.1f} seconds")
    if clip.rate is None:
        note += ", if it has 25 frames a second, which nothing says"
    return views, middles.round(2), note


# --------------------------------------------------------- what the paper shows of a trained model

def data_name(samples: Samples) -> str:
    """A test set, called what it is."""
    name = samples.name
    if name not in CATALOGUE:
        name = "/".join(catalogue(name).lists[-1].parts[-2:])
    elif catalogue(name).folds > 1:
        name += f", fold {samples.fold}"
    return name


def show_scores(run: Run, name: str, samples: Samples, scores: dict, rows: list[list]) -> None:
    """Scores, the confusion matrix (Fig. 7) and recalls (Table III). rows: of `evaluate_set`."""
    classes = scores["classes"]
    title = f"{name}: {len(rows)} test samples, {scores['checkpoint']}"
    run.lines.append(f"\n{title}\n{table(scores, classes)}")
    run.numbers[samples.name] = scores
    run.predictions[samples.modality] = [["sample", "label", "prediction", *classes], *rows]
    values = [["", "value", "95 % interval from", "to", "always the most frequent class"]]
    for score in ("uar", "war"):
        interval = scores[f"{score}_interval"]
        values.append([score.upper(), scores[score], *interval, scores[f"majority_{score}"]])
    # Shares make classes of different sizes comparable, numbers say how much a share means
    confusion = [["true ↓ predicted →", *classes]]
    for true, counts, shares in zip(classes, scores["confusion"], scores["by_row"]):
        row = [f"{true} ({sum(counts)})"]
        for share, count in zip(shares, counts):
            row.append((share, f"{count} ({share:.0%})") if sum(counts) else None)
        confusion.append(row)
    recall = [["", *classes, "UAR", "WAR"], ["", *scores["recall"], scores["uar"], scores["war"]]]
    of = f"test {samples.modality}s of {name}"
    show(run, "scores", values, of=of, note=f"{title}.")
    show(run, "confusion", confusion, grid(confusion), of)
    show(run, "recall", recall, of=of)


def show_training(run: Run, file: Path) -> None:
    """The curves of the log.jsonl beside a checkpoint; none where it is not there."""
    log = file.with_name("log.jsonl")
    if not log.is_file():
        return
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    sources = list(records[0]["loss"])
    losses = [["epoch", *(f"{m}s" for m in sources)]]
    scores = [["epoch"]]
    for m in sources:
        scores[0] += [f"UAR, {m}s", f"WAR, {m}s"]
    chosen_by = []
    for record in records:
        losses.append([record["epoch"], *(record["loss"].get(m) for m in sources)])
        tested = record.get("validation", record.get("test"))  # not after every epoch of size tiny
        if tested:
            scores.append([record["epoch"]])
            for m in sources:
                scores[-1] += [tested[m]["uar"], tested[m]["war"]]
            chosen_by.append(record["score"])
    show(run, "training-loss", losses, line_chart(losses, "loss"))
    if chosen_by:
        best = int(np.argmax(chosen_by))
        held_out = "validation" in records[-1]
        data = "samples held out of the training fold" if held_out else "the test samples"
        note = f"Of {data}. Dashed: the best epoch, {scores[best + 1][0]}, chosen by WAR on them."
        drawing = line_chart(scores, "share", mark=best)
        show(run, "training-scores", scores, drawing, note=note)


def show_mistakes(run: Run, model: S4D, samples: Samples, rows: list[list]) -> None:
    """The ten most confident mistakes, with their frames. rows: of `evaluate_set`."""
    wrong = []
    for i, (file, true, predicted, *probabilities) in enumerate(rows):
        if true != predicted:
            wrong.append((max(probabilities), i, true, predicted, file))
    wrong.sort(reverse=True)
    data = TestData(samples, model.size)
    numbers = [["", "true", "predicted", "probability", "file"]]
    pictures = [[""] * 5]
    for place, (confidence, i, true, predicted, file) in enumerate(wrong[:10], 1):
        numbers.append([place, true, predicted, confidence, file])
        name = f"{place}. {true}, taken for {predicted} {confidence:.2f}"
        views = data[i][1].flatten(0, -4)                                   # (v T, 3, H, W)
        pictures.append([name, *views[::model.size.frames // 2]])           # four of two clips
    if wrong:
        show(run, "mistakes", numbers, grid(pictures), samples)


def show_paths(run: Run, model: S4D, tested: dict) -> None:
    """The ten most frequent paths of tokens through the experts, the first two in colour."""
    for samples, seen in tested.values():
        if seen.paths:
            paths, shares = zip(*seen.paths)
            layers = model.architecture["moae_layers"][-len(paths[0]):]
            rows = [["layer"], *zip(layers, *paths)]
            for path, share in seen.paths:
                rows[0].append(f"{'-'.join(map(str, path))}: {share:.1%}")
            widths = [12 * share / shares[0] for share in shares]
            top = max(1, model.architecture["experts"] - 1)
            drawing = line_chart(rows, "expert", top, widths=widths)
            show(run, "paths", rows, drawing, samples)


def cross_task(samples: Samples, probabilities: np.ndarray, classes: list[str]) -> dict | None:
    """Table IX: the other task's head, whose classes and probabilities (n, C') are given, on these
    samples, among the classes that both have; None if they share none. The paper does not say how
    a head sees the other's data; here it takes the representation of either."""
    places = class_numbers(samples.classes, classes)
    ours = [i for i, place in enumerate(places) if place is not None]
    kept = np.isin(samples.labels, ours)
    if not kept.any():
        return None
    # Only these classes are a choice, so that chance is the same for both heads
    labels = np.searchsorted(ours, samples.labels[kept])
    predictions = probabilities[kept][:, [places[i] for i in ours]].argmax(1)
    scores = metrics(confusion_matrix(labels, predictions, len(ours)))
    return dict(scores, samples=int(kept.sum()), classes=[samples.classes[i] for i in ours])


def class_centres(features: np.ndarray, labels: np.ndarray, classes: int) -> torch.Tensor:
    """Mean features (C, d) of each class, NaN for a class without samples."""
    features = torch.from_numpy(features)
    return torch.stack([features[labels == c].mean(0) for c in range(classes)])


def show_tasks(run: Run, model: S4D, tested: dict) -> None:
    """The experts of each task (Fig. 5) and each head on the other's data (Table IX)."""
    experts = [["layer ↓ expert →", *range(model.architecture["experts"])]]
    heads = [["", "UAR", "WAR", "samples"]]
    for m, (samples, seen) in tested.items():
        for layer, gate in gate_statistics(model, seen.activation).items():
            experts.append([f"{m}s, layer {layer}", *gate["share"]])
        other = "image" if m == "video" else "video"
        theirs = model.architecture[f"{other}_classes"]
        scores = cross_task(samples, seen.probabilities.get(other), theirs)
        if scores:
            name = f"{other} head on {data_name(samples)}"
            heads.append([name, scores["uar"], scores["war"], scores["samples"]])
    if len(experts) > 1:
        drawing = grid(experts, high=1 / model.architecture["k"])
        show(run, "experts", experts, drawing)
    if len(heads) > 1:
        show(run, "heads", heads)


def show_similarity(run: Run, clips: Samples, of_clips: Observed, images: Samples,
                    of_images: Observed) -> None:
    """How similar the classes of both data sets are (Fig. 4)."""
    # Columns in the rows' order, so that the same classes are the diagonal
    order = [i for i in class_numbers(clips.classes, images.classes) if i is not None]
    order += [i for i in range(len(images.classes)) if i not in order]
    centres = class_centres(of_clips.features, clips.labels, len(clips.classes))
    others = class_centres(of_images.features, images.labels, len(images.classes))[order]
    similarity = F.cosine_similarity(centres[:, None], others[None], dim=-1).numpy()
    rows = [["clips ↓ images →", *(images.classes[i] for i in order)]]
    for name, row in zip(clips.classes, listed(similarity)):
        rows.append([name, *row])
    show(run, "similarity", rows, grid(rows))


@torch.no_grad()
def attention(model: S4D, x: torch.Tensor, process: Process) -> torch.Tensor:
    """What the mean over the tokens draws on, uint8 images or clips -> (B, time slots, rows,
    columns); 1 = even spread. Attention rollout (Abnar and Zuidema, 2020): from the last layer to
    the first, a token passes half of what it contributes on by attention, mean over the heads, and
    keeps half, as residuals do. The paper names no method."""
    weights, hooks = [], []                 # weights: (B, N, N) of each layer
    for block in model.blocks:
        hooks.append(block.attn.register_forward_hook(
            lambda module, inputs, output: weights.append(module.weights(inputs[0]).mean(1))))
    forward(model, x, process)
    for hook in hooks:
        hook.remove()
    share = torch.ones_like(weights[0][:, :1])                              # (B, 1, N)
    for layer in reversed(weights):
        share = (share @ layer + share) / 2
    side = model.size.pixels // model.size.patch
    return share.unflatten(-1, (-1, side, side))[:, 0].float().cpu()


def heat_on(frames: torch.Tensor, received: torch.Tensor) -> torch.Tensor:
    """Attention (T, rows, columns) on frames uint8 (T, 3, H, W), grey, and orange where it is above
    an even spread. The paper shows "only positive values" and does not say of what."""
    above = (received - 1).clamp(min=0)
    heat = F.interpolate(above[:, None], frames.shape[-2:], mode="bilinear")
    heat /= above.max().clamp(min=1e-6)                                     # (T, 1, H, W), 0 to 1
    orange = torch.tensor([255.0, 140.0, 0.0]).view(3, 1, 1)
    grey = v2.functional.rgb_to_grayscale(frames, 3).float()
    return grey.lerp(orange, 0.8 * heat).round().to(torch.uint8)


def show_attention(run: Run, model: S4D, tested: dict) -> None:
    """Fig. 6: the first sample of each class, and what the model and --baseline attend to."""
    models = [model]
    if run.args.baseline:
        checkpoint = read_checkpoint(run.args.baseline)
        models.append(load_model(run, run.args.baseline, checkpoint))
    for m, (samples, _) in tested.items():
        data = TestData(samples, model.size)
        rows = []
        for label in np.unique(samples.labels):
            x = data[int(np.argmax(samples.labels == label))][1][:1]        # (1, T, 3, H, W)
            frames = x[0, ::model.size.tubelet] if m == "video" else x      # (time slots, 3, H, W)
            row = [samples.classes[label], *frames[::2]]
            for one in models:
                row += heat_on(frames, attention(one, x, run.process)[0])[::2]
            rows.append(row)
        columns = [""]
        for name in ("frame", "attention", "baseline")[:1 + len(models)]:
            for i in range(0, len(frames), 2):
                columns.append(f"{name} {i * model.size.tubelet * samples.stride}")
        drawing = grid([columns, *rows])
        show(run, "attention", [], drawing, samples)


def unpatchify(patches: torch.Tensor, size: Size) -> torch.Tensor:
    """The inverse of patchify: (B, N, P) -> uint8 (B, T, 3, H, W); an image has T = tubelet."""
    side, p = size.pixels // size.patch, size.patch
    x = patches.unflatten(1, (-1, side, side)).unflatten(-1, (size.tubelet, p, p, 3))
    x = x.permute(0, 1, 4, 7, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(1, 2)
    mean = channel_values(IMAGE_MEAN, x.device).view(3, 1, 1)
    std = channel_values(IMAGE_STD, x.device).view(3, 1, 1)
    return (255 * (x * std + mean)).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def reconstruct(model: MaskedAutoencoder, x: torch.Tensor, ratio: float,
                process: Process) -> list[torch.Tensor]:
    """Original, masked and reconstructed frames, uint8 (B, T, 3, H, W) each. The model predicts
    patches normalised by their own mean and deviation, which are borrowed from the original."""
    torch.manual_seed(0)
    with process.autocast():
        x = to_float(process.upload(x))
        _, pred, hidden = model(x, mask_ratio=ratio)
    patches = patchify(x, model.size).cpu()
    hidden = hidden.cpu()
    _, mean, deviation = normalised_target(patches[hidden].unflatten(0, (len(x), -1)))
    pixels = at_least_fp32(pred).cpu().unflatten(-1, (-1, 3)) * deviation + mean
    masked = patches.masked_fill(hidden[..., None], 0)
    pasted = patches.masked_scatter(hidden[..., None], pixels)
    return [unpatchify(part, model.size) for part in (patches, masked, pasted)]


def show_reconstructions(run: Run, file: Path, checkpoint: dict) -> None:
    """A stage-1 checkpoint on --dataset, or on test samples of what it was trained on."""
    model = rebuild(checkpoint, file).to(run.process.device).eval()
    for samples in load_tests(run, file, checkpoint):
        m = samples.modality
        data = TestData(samples, model.size)
        index = np.linspace(0, len(samples) - 1, 8 if m == "image" else 1).astype(int)
        x = torch.stack([data[i][1][0] for i in index])
        ratio = checkpoint.get("identity", {}).get(f"{m}_mask_ratio", MASK_RATIO[m])
        rows = [[""] * 9]
        parts = reconstruct(model, x, ratio, run.process)
        for name, frames in zip(("original", "masked", "reconstructed"), parts):
            # Eight images, or eight frames of a video
            rows.append([name, *frames[:, ::model.size.tubelet].flatten(0, 1)[:8]])
        note = f"{ratio:.0%} of the patches are hidden."
        show(run, "reconstructions", [], grid(rows), samples, note)


# ------------------------------------------------------------------- figures: SVG and HTML as text

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b08800", "#56b4e9", "#8c564b", "#777",
           "#9467bd", "#17becf", "#bcbd22")


def escape(value) -> str:
    """Text for HTML and SVG, in one line, without what no XML file may hold."""
    words = " ".join(str(value).split())
    return html.escape(re.sub("[\0-\x1f\x7f\ud800-\udfff\ufffe\uffff]", "\ufffd", words))


def tag(name: str, inside: str = "", **attributes) -> str:
    """An element of SVG. inside: SVG."""
    words = name
    for key, value in attributes.items():
        value = round(value, 2) if isinstance(value, float) else value
        words += f' {key.replace("_", "-")}="{escape(value)}"'
    return f"<{words}>{inside}</{name}>"


def text(x: float, y: float, words, anchor: str = "middle", **attributes) -> str:
    return tag("text", escape(words), x=x, y=y, text_anchor=anchor, **attributes)


def text_width(words) -> float:
    """About the width in pixels; Chinese, Japanese and Korean letters are the widest."""
    return sum(13 if letter > "\u2e80" else 7 for letter in str(words))


def picture(frame: torch.Tensor, x: float, y: float, side: int) -> str:
    """uint8 (3, h, w) in an SVG, pixel by pixel."""
    file = io.BytesIO()
    v2.functional.to_pil_image(frame).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return tag("image", x=x, y=y, width=side, height=side, style="image-rendering:pixelated",
               href=f"data:image/png;base64,{data}")


def svg(width: float, height: float, parts: list[str]) -> str:
    """A drawing in the page's colours, which does not shrink beyond what can be read."""
    return tag("svg", "".join(parts), xmlns="http://www.w3.org/2000/svg",
               viewBox=f"0 0 {width:.0f} {height:.0f}",
               width=width,
               style=f"min-width:{0.7 * width:.0f}px",
               font_family="sans-serif", font_size=13, fill="currentColor")


def stand_alone(drawing: str) -> str:
    """A drawing on white, for a file of its own."""
    return drawing.replace(">", '><rect width="100%" height="100%" fill="white"/>', 1)


def grid(rows: list[list], high: float = 1.0) -> str:
    """A table as SVG, whose first row and column are names. Cells: a number, whose colour is the
    stronger the nearer it is to `high`, and another one below 0; (number, text), which shows the
    text; a text; None, shown as -; a picture, uint8 (3, h, w), first in the row."""
    (corner, *columns), *rows = rows
    width = 84
    height = 84 if isinstance(rows[0][1], torch.Tensor) else 34
    left = 16 + max(text_width(name) for name in [corner, *(row[0] for row in rows)])
    # Names of columns that are wider than these are turned, and need room above
    longest = max(map(text_width, columns))
    angle = 0
    anchor = "middle"
    top = 24
    if longest > width:
        angle = -40
        anchor = "start"
        top += 0.65 * longest
    parts = [text(left - 8, top - 8, corner, "end")]
    for j, name in enumerate(columns):
        x = left + width * (j + 0.5)
        turn = f"rotate({angle} {x} {top - 8})"
        parts.append(text(x, top - 8, name, anchor, transform=turn))
    for i, (name, *cells) in enumerate(rows):
        y = top + height * i
        parts.append(text(left - 8, y + height / 2 + 5, name, "end"))
        for j, cell in enumerate(cells):
            parts.append(grid_cell(cell, left + width * j, y, width - 2, height - 2, high))
    return svg(left + width * len(columns) + 0.8 * longest, top + height * len(rows) + 8, parts)


def grid_cell(cell, x: float, y: float, width: int, height: int, high: float) -> str:
    if isinstance(cell, torch.Tensor):
        return picture(cell, x, y, width)
    box = ""
    value = cell[0] if isinstance(cell, tuple) else cell
    if isinstance(value, float):
        # Neither black text on white nor white on black is lost in these colours
        colour = "#d95f0e" if value < 0 else "#1f77b4"
        strength = 0.7 * min(abs(value) / high, 1)
        box = tag("rect", x=x, y=y, width=width, height=height, fill=colour, opacity=strength)
    words = f"{cell:.2f}" if isinstance(cell, float) else shown(cell)
    return box + text(x + width / 2, y + height / 2 + 5, words)


def line_chart(rows: list[list], y_name: str, top: int | None = None, mark: int | None = None,
               widths=None, pictures=None) -> str:
    """A table as SVG: a line for each column over the first one, y from 0 to `top`; None is a gap.

    mark: the row at which a dashed line stands. widths: of the lines, of which then only two are
    in colour. pictures: of the rows, uint8 (n, 3, h, w); at most eight are put below the axis.
    """
    (x_name, *names), *rows = rows
    xs, *lines = np.array(rows, float).T
    low = math.floor(xs[0])
    high = max(low + 1, math.ceil(xs[-1]))
    top = top or max(1, math.ceil(np.nanmax(lines)))
    left, right = 52, 372                   # pixels
    upper, lower = 16, 216
    across = np.interp(xs, (low, high), (left, right))
    heights = np.interp(lines, (0, top), (lower, upper))
    # The axes
    parts = [text(212, lower + 38, x_name)]
    parts.append(text(14, 116, y_name, transform="rotate(-90 14 116)"))
    ticks = range(0, top + 1, math.ceil(top / 8))
    if top == 1:
        ticks = (0, 0.25, 0.5, 0.75, 1)
    for tick, y in zip(ticks, np.interp(ticks, (0, top), (lower, upper))):
        parts.append(tag("path", d=f"M{left} {y}H{right}", stroke="currentColor", opacity=0.2))
        parts.append(text(left - 8, y + 4, tick, "end"))
    ticks = range(low, high + 1, math.ceil((high - low) / 8))
    for tick, x in zip(ticks, np.interp(ticks, (low, high), (left, right))):
        parts.append(text(x, lower + 18, tick))
    if mark is not None:
        dashed = dict(stroke="currentColor", stroke_dasharray="4 4")
        parts.append(tag("path", d=f"M{across[mark]} {upper}V{lower}", **dashed))
    # The first line is drawn last, on top of the others
    for i in reversed(range(len(names))):
        points = []
        for x, y in zip(across, heights[i]):
            if not np.isnan(y):
                points.append(f"{x:.1f} {y:.1f}")
        style = dict(stroke=COLOURS[i % len(COLOURS)], stroke_width=2)
        if widths:
            style = dict(stroke=COLOURS[i] if i < 2 else "#999", stroke_width=widths[i])
        # h0 and round ends make a dot of a single point
        line = f"M{'L'.join(points)}h0"
        parts.append(tag("path", d=line, fill="none", stroke_linecap="round", **style))
        y = 26 + 19 * i
        parts.append(tag("path", d=f"M{right + 16} {y}h18", **style))
        parts.append(text(right + 42, y + 5, names[i], "start"))
    bottom = lower + 48
    if pictures is not None:
        for i in range(0, len(xs), math.ceil(len(xs) / 8)):
            parts.append(picture(pictures[i], across[i] - 20, bottom, 40))
        bottom += 48
    width = right + 50 + max(map(text_width, names))
    return svg(width, max(bottom, 36 + 19 * len(names)), parts)


def html_table(rows: list[list], caption: str) -> str:
    """A table whose first row and column are names. caption: HTML."""
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in rows[0])
    body = ""
    for name, *cells in rows[1:]:
        body += f"<tr><th scope=row>{escape(name)}</th>"
        for cell in cells:
            body += f"<td>{escape(shown(cell))}</td>"
        body += "</tr>\n"
    return f"<table><caption>{caption}</caption>\n<tr>{head}</tr>\n{body}</table>"


def show(run: Run, kind: str, rows: list[list], drawing: str = "", of: Samples | str = "",
         note: str = "") -> None:
    """Add a section to the page: a drawing and numbers, whose first row and column are names."""
    if not (run.args.report or run.args.media):
        return
    if isinstance(of, Samples):
        of = f"test {of.modality}s of {data_name(of)}"
    title, how_to_read, paper = TEXTS[kind]
    title = escape(f"{title}: {of}" if of else title)
    name = re.sub(r"\W+", "-", f"{kind} {of}"[:80]).strip("-")
    body = f"<h2>{title}</h2><p>{escape(note)} {escape(how_to_read)}"
    if paper:
        body += f" <small>In the paper: {paper}.</small>"
    body += "</p>"
    # A box that scrolls must be reached by the keyboard and be named
    scroll = f'<div class=scroll role=region tabindex=0 aria-label="{title}">'
    if drawing:
        run.drawings[name] = drawing
        named = drawing.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
        body += f"{scroll}{named}</div>"
    if rows:
        run.numbers[name] = rows
        state = "" if drawing else "open"
        table = html_table(rows, title)
        body += f"<details {state}><summary>In numbers</summary>{scroll}{table}</div></details>"
    run.sections.append(f'<section id="{name}">{body}</section>\n')


def page(title: str, warnings: list[str], sections: list[str]) -> str:
    """One file that needs nothing else. Each section's drawing also lies beside it, as an SVG."""
    said = "".join(f"<p>Warning: {escape(warning)}</p>" for warning in warnings)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body><main><h1>{escape(title)}</h1>{said}
{"".join(sections)}</main></body></html>
"""


TEXTS = {  # of each kind of figure: what it shows, how to read it, what the paper has of the kind
    "scores": ("How often it is right", "UAR is the mean of the classes' recalls, however small a "
               "class; WAR is the share of all that are right.",
               "UAR and WAR of DFEW 0.6680, 0.7668 (one fold 0.7058, 0.7937), FERV39K 0.4341, "
               "0.5365, MAFW 0.4372, 0.5844, AffectNet-7 0.6545, 0.6550: Tables II, V, VI"),
    "confusion": ("What is taken for what", "Of the samples of each true class (rows) the number "
                  "and share taken for each class (columns).", "Fig. 7"),
    "recall": ("How much of each class is found", "", "Table III, DFEW: happy 0.9476, sad 0.7904, "
               "neutral 0.7460, angry 0.7980, surprise 0.6726, disgust 0.2759, fear 0.4457"),
    "folds": ("Each fold by itself", "", "Section IV-A joins them"),
    "training-loss": ("Loss in training", "Mean of each epoch: it falls, then levels off.", ""),
    "training-scores": ("Scores in training", "", ""),
    "mistakes": ("Where it is most wrong", "The mistakes of the highest probability: doubtful "
                 "labels and badly cut faces show here first.", ""),
    "paths": ("Paths through the experts", "A token's path is its expert of the largest weight in "
              "each layer: the ten most frequent, as wide as their shares.", "Fig. 5, latest version"),
    "experts": ("Which experts are used", "The share of a layer's tokens that each expert "
                "receives. Layers and experts are counted from 0.", "Fig. 5"),
    "heads": ("Each head on the other's data", "Among the classes that both have.",
              "UAR and WAR of AffectNet-7's head on DFEW 0.4336, 0.4713, on FERV39K 0.3234, 0.3510; "
              "on AffectNet-7 of DFEW's 0.4520, 0.4504, of FERV39K's 0.5146, 0.5138: Table IX"),
    "similarity": ("Do the two tasks mean the same by a class?", "Cosine of the mean features of a "
                   "class of clips and one of images: 1 the same, 0 nothing in common.", "Fig. 4"),
    "attention": ("Where it looks", "The first of each class. Orange: what the prediction draws on "
                  "more than evenly (attention rollout).", "Fig. 6"),
    "reconstructions": ("What stage 1 fills in", "Grey patches are hidden from the model. Mean and "
                        "deviation of the predicted ones are the original's.", ""),
    "video": ("Video", "Below: frames as the model sees them.", ""),
    "image": ("Image", "As the model sees it, with the probability of each class.", ""),
    "settings": ("Settings, data and versions", "As the checkpoint records them.", "")}
STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 sans-serif; max-width: 62rem; margin: auto; padding: 1rem }
main { display: flex; flex-wrap: wrap; gap: 0 2rem; overflow-wrap: anywhere }
main > * { flex: 1 1 100%; min-width: 0 }
[id^=training], [id^=paths] { flex-basis: 26rem !important }
.scroll { overflow-x: auto }
svg { display: block; height: auto; max-width: 100% }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #8886; text-align: right }
th:first-child, caption { text-align: left }
@media print { @page { size: A4; margin: 15mm } main { display: block }
  section { break-inside: avoid } svg { max-height: 22cm } .scroll { overflow: visible }
  details:not([open]) { display: none } }
"""


if __name__ == "__main__":
    guarded(main)
