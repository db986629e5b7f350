"""How often a model is right, and what else the paper shows of a trained model (Section IV).

It reads from the method to the page. `metrics` makes UAR and WAR of a confusion matrix; `observe` is
one pass over a test set, which predictions, features and experts come from; then comes the command.
Below the line of '=' are one's own videos and what --report shows: analyses, and figures as text.

    python evaluate.py --checkpoint runs/dfew/fold1/last.pt               on the test data of its fold
    python evaluate.py --dataset dfew --folds runs/dfew/*/last.pt         five folds' predictions as one
    python evaluate.py --checkpoint runs/dfew/fold1/last.pt --report out  all figures: out/report.html
    python evaluate.py --checkpoint runs/dfew/fold1/last.pt FILE ...      one's own videos and images

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
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2
from tqdm import tqdm

from data import (CATALOGUE, Samples, TestData, boxed, catalogue, dataset_name, fixed_crop,
                  is_clip, load_samples, loader, own_lists, read_clip, read_image, resampled, short_name,
                  to_float, video_length)
from model import (IMAGE_MEAN, IMAGE_STD, MASK_RATIO, S4D, MaskedAutoencoder, Size, UserError,
                   at_least_fp32, channel_values, has_names, normalised_target, patchify,
                   read_checkpoint, rebuild, whole_file)
from pretrain import Formatter, Process, box, default_workers, guarded, number, path, start

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
    either is left out of the macro F1. Intervals are percentiles of 2,000 bootstrap samples.
    UserError if there are no samples at all.
    """
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
    """Metrics of all folds' predictions as one: DFEW's and MAFW's protocol (Section IV-A).

    Beside them stand the mean of the folds' UAR and WAR and the sample standard deviation, which a
    single fold has not (None).
    """
    together = metrics(sum(np.array(score["confusion"]) for score in scores))
    for name in ("uar", "war"):
        values = [score[name] for score in scores]
        together[f"{name}_mean"] = float(np.mean(values))
        together[f"{name}_deviation"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return dict(together, folds=scores)


def shown(cell) -> str:
    """A table's cell as text."""
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
    with_interval = {}
    for name in ("uar", "war"):
        low, high = scores[f"{name}_interval"]
        with_interval[name] = f"{scores[name]:.4f} ({low:.4f} to {high:.4f})"
    rows = []
    for name, row, recall in zip(classes, scores["confusion"], scores["recall"]):
        rows.append([name, *row, recall])
    lines = [
        "UAR {uar}  WAR {war}, with 95 % intervals".format(**with_interval)
        + "   macro F1 {macro_f1:.4f}  weighted F1 {weighted_f1:.4f}".format(**scores),
        "always the most frequent class: UAR {majority_uar:.4f}  WAR {majority_war:.4f}\n".format(**scores),
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
    """One pass over all samples, which predictions, features and experts come from.

    Clips of a video: softmax of each, then the mean (Section IV-B), and the mean of their features.
    A token's path is its expert of the largest weight in each layer; where more than 2^24 paths are
    possible, in the last layers. Batches are fixed by the sample order and dealt to the processes:
    nothing is padded or counted twice, and the numbers do not depend on how many there are.
    UserError names a sample that cannot be read: none is left out.
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
    return [places.get(name, places.get(SAME_CLASS.get(name, name))) for name in classes]


def labels_of(samples: Samples, model: S4D) -> np.ndarray:
    """The samples' labels as numbers of the model's classes (n,). UserError names what it lacks."""
    m = samples.modality
    classes = model.architecture[f"{m}_classes"]
    numbers = class_numbers(samples.classes, classes)
    missing = [name for name, place in zip(samples.classes, numbers) if place is None]
    if missing or not numbers:
        theirs = ", ".join(classes) or f"it was trained without {m}s"
        raise UserError(f"{samples.name} has the {m} classes {missing}, the model has not: {theirs}")
    return np.array(numbers)[samples.labels]


def evaluate(model: S4D, samples: Samples, process: Process, workers: int,
             batch: int = 16) -> tuple[dict, Observed]:
    """Metrics of the samples' own head, and the pass that they are from.

    Classes are matched by name; the model may have more, and may predict these too. Of equally
    probable classes the first is predicted. UserError for a class that the model does not have.
    """
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

class Figure(NamedTuple):
    """A section of the page, an SVG for papers and an entry of evaluation.json."""
    kind: str                               # which TEXTS has the words for
    rows: list[list]                        # the numbers; the first row and column are names
    drawing: str = ""                       # SVG
    of: str = ""                            # what is shown of this kind
    note: str = ""

    @property
    def name(self) -> str:
        words = f"{self.kind} {self.of.split(':')[0]}".strip()
        return re.sub(r"\W+", "-", words)[:80]


@dataclass
class Run:
    """What a command was given, and what it has found so far."""
    args: argparse.Namespace
    process: Process
    lines: list[str] = field(default_factory=list)          # to be printed
    warnings: list[str] = field(default_factory=list)
    numbers: dict = field(default_factory=dict)             # evaluation.json
    files: dict[str, str] = field(default_factory=dict)     # other files' texts
    figures: list[Figure] = field(default_factory=list)     # report.html


def main() -> None:
    p = settings()
    args = p.parse_args()
    if args.folds and (args.media or args.fold or not args.dataset):
        p.error("--folds expects --dataset, and neither FILE nor --fold")
    if args.crop and not args.media:
        p.error("--crop cuts the face out of FILE, which is missing")
    files = args.folds or [args.checkpoint]
    # Results of last.pt and best.pt, of folds and of own media stay apart
    shared = os.path.commonpath([file.parent.absolute() for file in files])
    names = "-".join(dict.fromkeys(file.stem for file in files))
    beside = Path(shared, "folds" if args.folds else "", names, "media" if args.media else "")
    folder = args.report or args.output or beside
    folder.mkdir(parents=True, exist_ok=True)   # where that cannot be is said before any work
    checkpoint = read_checkpoint(files[0])
    checkpoint.pop("optimizer", None)       # its moments are twice as large as the weights
    size = checkpoint["architecture"].get("size", "base")
    run = Run(args, start(size, checkpoint.get("made_by", {}).get("precision")))
    if args.folds:
        evaluate_folds(run)
    elif args.media:
        show_media(run, files[0], checkpoint)
    elif checkpoint["stage"] == "pretrain" and args.report:
        run.figures += show_training(files[0].parent / "log.jsonl")
        show_reconstructions(run, files[0], checkpoint)
    else:
        evaluate_sets(run, files[0], checkpoint)
    if run.process.main:
        run.figures.append(show_settings(checkpoint))
        what = f"{args.dataset}, {len(files)} folds" if args.folds else files[0]
        write(run, folder, f"Evaluation of {what}")


def settings() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    models = p.add_mutually_exclusive_group(required=True)
    models.add_argument("--checkpoint", type=path,
                        help="of finetune.py; with --report also of pretrain.py")
    models.add_argument("--folds", type=path, nargs="+", metavar="CHECKPOINT",
                        help="one of each fold of --dataset")
    results = p.add_mutually_exclusive_group()
    results.add_argument("--report", type=path, metavar="FOLDER", help="for report.html, figures")
    results.add_argument("--output", type=path, metavar="FOLDER",
                         help="for scores and predictions (the checkpoint's name, beside it)")
    add = p.add_argument
    add("media", type=path, nargs="*", metavar="FILE",
        help="own image or video, or folder of one clip's frames")
    add("--dataset", type=dataset_name(), help="data set to test on (those of training)")
    add("--fold", type=number(int, 1), help="its fold (the checkpoint's)")
    add("--crop", type=box, metavar="X,Y,W,H", help="the face in FILE, in pixels (all of it)")
    add("--baseline", type=path, metavar="CHECKPOINT", help="its attention is shown beside (Fig. 6)")
    add("--data-root", type=path, default=Path("data"), help="folder of all data sets")
    add("--batch-size", type=number(int, 1), default=16, help="samples that are computed at once")
    add("--workers", type=number(int, 0), default=default_workers(), help="loading processes each")
    return p


def write(run: Run, folder: Path, title: str) -> None:
    """Write every file whole, and only then print, so that results are there whoever reads."""
    if run.args.report or run.args.media:
        run.files["report.html"] = page(title, run.warnings, run.figures)
        for figure in run.figures:
            if figure.rows:
                run.numbers[figure.name] = dict(columns=figure.rows[0], rows=figure.rows[1:])
            if figure.drawing:
                run.files[f"{figure.name}.svg"] = stand_alone(figure.drawing)
    run.files["evaluation.json"] = json.dumps(run.numbers, indent=1)
    for name, text in run.files.items():
        with whole_file(folder / name) as file:
            file.write(text.encode("utf-8", "surrogateescape"))
    for warning in run.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    where = folder / "report.html" if "report.html" in run.files else folder
    print(*run.lines, f"\nwritten to {os.path.relpath(where)}", sep="\n")


def load_model(run: Run, file: Path, checkpoint: dict) -> S4D:
    """The model of a stage-2 checkpoint.

    Classes of a file that does not name them are those of --dataset, a set of the catalogue, in its
    order; never those of one's own list, whose order is only that of the alphabet.
    """
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


def tested_sets(run: Run, file: Path, identity: dict) -> list[str]:
    """--dataset, or what a checkpoint was trained on, videos first."""
    names = [identity.get("dataset"), identity.get("image_dataset")]
    if run.args.dataset:
        names = [run.args.dataset]
    names = [name for name in names if name not in (None, "none", "frames")]
    if not names:
        raise UserError(f"{file} does not say what it was trained on: give --dataset, and --fold")
    return names


def load_test(run: Run, file: Path, checkpoint: dict, name: str) -> Samples:
    """A data set's test samples, of --fold or else of the fold of training, at its stride.

    Warns if they are not those that training recorded: the model may have seen them. With --folds,
    where all must belong together, that is a UserError, as is another set than that of training.
    """
    identity = checkpoint.get("identity", {})
    trained_on = [identity.get("dataset"), identity.get("image_dataset")]
    if run.args.folds and name not in trained_on:
        raise UserError(f"{file} was trained on {trained_on[0]} and {trained_on[1]}, not on {name}")
    has_folds = catalogue(name).folds > 1
    fold = identity.get("fold", 1) if has_folds else 1
    if run.args.fold and (run.args.dataset or has_folds):
        fold = run.args.fold
    # Another set of the catalogue has a stride of its own; one's own single list has no test part
    same = name in trained_on or name not in CATALOGUE
    stride = identity.get("video stride") if same else None
    split = "test" if name in CATALOGUE or len(own_lists(name)) > 1 else "train"
    samples = load_samples(name, run.args.data_root, split, fold, stride)
    recorded = identity.get(f"test {samples.modality}", samples.fingerprint())
    if same and recorded != samples.fingerprint():
        text = (f"not the test samples of training, {file} may have seen them: "
                f"{samples.fingerprint()}; recorded: {recorded}")
        if run.args.folds:
            raise UserError(text)
        run.warnings.append(text)
    return samples


def brief(samples: Samples) -> str:
    """A data set's name in files; lists of own clips and of own images may both be train.csv."""
    own = f"{samples.modality}s-{short_name(samples.name)[:40]}"
    return samples.name if samples.name in CATALOGUE else own


def evaluate_set(run: Run, file: Path, model: S4D, samples: Samples) -> tuple:
    """Scores, the pass that they are from, and a row of each sample's name, class, predicted class
    and probabilities."""
    scores, seen = evaluate(model, samples, run.process, run.args.workers, run.args.batch_size)
    classes = model.architecture[f"{samples.modality}_classes"]
    scores |= dict(classes=classes, fold=samples.fold, samples=len(samples), checkpoint=str(file))
    rows = []
    for i, probabilities in enumerate(seen.probabilities[samples.modality]):
        true = samples.classes[samples.labels[i]]
        predicted = classes[probabilities.argmax()]
        rows.append([name_of(samples, i), true, predicted, *probabilities.round(6).tolist()])
    return scores, seen, rows


def name_of(samples: Samples, i: int) -> str:
    return os.fsdecode(bytes(samples.names[i]))


def add_scores(run: Run, title: str, samples: Samples, scores: dict, rows: list[list]) -> None:
    run.lines.append(f"\n{title}\n{table(scores, scores['classes'])}")
    run.numbers[samples.name] = scores
    run.files[f"predictions-{brief(samples)}.csv"] = csv_text(scores["classes"], rows)
    run.figures += show_scores(samples, scores)


def csv_text(classes: list[str], rows: list[list]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([["sample", "label", "prediction", *classes], *rows])
    return text.getvalue()


def evaluate_folds(run: Run) -> None:
    """DFEW's and MAFW's protocol (Section IV-A): one checkpoint of each fold, their predictions as
    one. UserError before anything is computed if they do not belong together."""
    name = run.args.dataset
    tests = {}
    for file in run.args.folds:
        samples = load_test(run, file, read_checkpoint(file), name)
        tests[samples.fold] = file, samples
    folds = list(range(1, catalogue(name).folds + 1))
    if sorted(tests) != folds or len(run.args.folds) != len(folds):
        raise UserError(f"--folds expects one checkpoint of each fold of {name}, {folds}: these "
                        f"{len(run.args.folds)} are of folds {sorted(tests)}")
    scores, predicted = [], []
    columns, shown = ["", "UAR", "WAR", "samples", "checkpoint"], []
    for fold in folds:
        file, samples = tests[fold]
        model = load_model(run, file, read_checkpoint(file))                # one at a time in memory
        score, _, rows = evaluate_set(run, file, model, samples)
        scores.append(score)
        predicted += rows
        shown.append([f"fold {fold}", *(score[column.lower()] for column in columns[1:])])
    together = dict(join_folds(scores), classes=score["classes"], samples=len(predicted))
    for what in ("mean", "deviation"):
        shown.append([what, together[f"uar_{what}"], together[f"war_{what}"], None, None])
    title = f"{brief(samples)}, {len(folds)} folds"
    run.lines.append(f"\n{title}, each by itself\n{markdown(columns, shown)}")
    add_scores(run, f"{title} concatenated", replace(samples, fold=0), together, predicted)
    run.figures.append(Figure("folds", [columns, *shown]))


def evaluate_sets(run: Run, file: Path, checkpoint: dict) -> None:
    """A fine-tuned checkpoint on its test data and, for a report, everything else."""
    model = load_model(run, file, checkpoint)
    identity = checkpoint.get("identity", {})
    epoch = f" after epoch {checkpoint['state']['epoch']}" if "state" in checkpoint else ""
    tested = {}
    for name in tested_sets(run, file, identity):
        samples = load_test(run, file, checkpoint, name)
        scores, seen, rows = evaluate_set(run, file, model, samples)
        tested[samples.modality] = samples, seen
        fold = f", fold {samples.fold}" if catalogue(name).folds > 1 else ""
        title = f"{brief(samples)}{fold}: {len(samples)} test samples, {file}{epoch}"
        add_scores(run, title, samples, scores, rows)
    if run.args.report and run.process.main:
        run.figures += show_training(file.parent / "log.jsonl")
        for show in (show_mistakes, show_paths):
            for samples, seen in tested.values():
                run.figures += show(model, samples, seen)
        run.figures += show_tasks(run, model, tested)
        run.figures += show_attention(run, model, tested)
        pretrained = identity.get("pretrained", "none")
        if pretrained != "none":
            try:
                show_reconstructions(run, pretrained, read_checkpoint(pretrained))
            except UserError as error:      # the file or its data may be on another machine
                run.warnings.append(f"no reconstructions of stage 1 ({pretrained}): {error}")


# ==================================================================================================
# From here on own media, the report's analyses and its figures. On a first reading skip them.
# ==================================================================================================

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
    """Predictions for one's own images, and for videos the mean over clips that cover them, sampled
    at the step in time of the training clips. What cannot be used is named before any work."""
    model = load_model(run, checkpoint_file, checkpoint)
    lengths = {}                            # counted, not decoded: a broken file is found in time
    for file in run.args.media:
        m = "video" if is_clip(file) else "image"
        if m not in model.head:
            raise UserError(f"{file} is {m} data, which this model was trained without")
        lengths[file] = video_length(file) if m == "video" else None
    resize = v2.Resize((model.size.pixels, model.size.pixels), antialias=True)
    rows = {"image": [], "video": []}
    pictures = [["", "", *model.architecture["image_classes"]]]
    for file, length in lengths.items():
        transform = resize
        if run.args.crop:
            transform = v2.Compose([partial(boxed, box=run.args.crop, path=file), resize])
        m = "video" if length else "image"
        if length:
            views, seconds, note = read_whole(run, model.size, checkpoint, file, length, transform)
        else:
            views = transform(read_image(file))[None]                       # (1, 3, H, W)
        # In parts, as 64 clips of size base do not fit into a small GPU at once
        found = [forward(model, part, run.process)[m] for part in views.split(8)]
        course = torch.cat(found).cpu()                                     # (W, C) of W clips
        mean = course.mean(0)
        classes = model.architecture[f"{m}_classes"]
        best = classes[mean.argmax()]
        rows[m].append([str(file), "", best, *mean.numpy().round(6).tolist()])
        if length:
            values = [["seconds", *classes]]
            for second, probabilities in zip(seconds, course.tolist()):
                values.append([second, *probabilities])
            middles = views[:, model.size.frames // 2]
            drawing = line_chart(values, "probability", 1, pictures=middles)
            of = f"{len(rows[m])}. {file.name}: {best} {mean.max():.2f}"
            run.figures.append(Figure("video", values, drawing, of, note))
            run.lines.append(note)
        else:
            pictures.append([file.name, views[0], *mean.tolist()])
    for m, found in rows.items():
        if found:
            columns = ["sample", "label", "prediction", *model.architecture[f"{m}_classes"]]
            drawing = grid(pictures) if m == "image" else ""
            run.figures.append(Figure(f"own {m}s", [columns, *found], drawing))
            run.lines.append(f"\nOwn {m}s: {len(found)}\n{markdown(columns, found)}")
            run.files[f"{m}s.csv"] = csv_text(columns[3:], found)


def read_whole(run: Run, size: Size, checkpoint: dict, file: Path, length: tuple, transform) -> tuple:
    """Clips that cover a video, uint8 (W, T, 3, H, W), the seconds of their middles, and a note."""
    identity = checkpoint.get("identity", {})
    stride = identity.get("video stride") or 4
    rate = identity.get("video rate") or 25.0
    n, own_rate = length[0], length[1] or 25.0
    choose = partial(covering_frames, frames=size.frames, stride=stride)
    frames = resampled(choose, n, own_rate, rate)
    with tqdm(total=n, desc=file.name, leave=False, disable=not run.process.main) as bar:
        def progress(done: int) -> None:
            bar.update(done - bar.n)
        views = read_clip(file, lambda *_: frames, transform, progress)
    views = views.unflatten(0, (-1, size.frames))
    middles = np.reshape(frames, (-1, size.frames))[:, size.frames // 2] / own_rate
    kind = "a clip" if file.is_dir() else "a video"
    over = "spread evenly over" if len(views) == 64 else "that cover"
    note = (f"{file}, {kind} of {n} frames: the mean over {len(views)} clips of "
            f"{size.frames * stride / rate:.1f} seconds {over} its {n / own_rate:.1f} seconds")
    if length[1] is None:
        note += ", if it has 25 frames a second, which nothing says"
    return views, middles.round(2).tolist(), note


# --------------------------------------------------------- what the paper shows of a trained model

def data_name(samples: Samples) -> str:
    """The test data, called what they are."""
    name = samples.name
    if name not in CATALOGUE:
        name = "/".join(own_lists(name)[-1].parts[-2:])
    elif samples.fold and catalogue(name).folds > 1:
        name += f", fold {samples.fold}"
    return f"test {'clips' if samples.modality == 'video' else 'images'} of {name}"


def show_scores(samples: Samples, scores: dict) -> list[Figure]:
    """Scores, the confusion matrix (Fig. 7) and recalls (Table III)."""
    classes = scores["classes"]
    rows = [["", "value", "95 % interval", "always the most frequent class"]]
    for name in ("uar", "war"):
        low, high = scores[f"{name}_interval"]
        interval = f"{low:.4f} to {high:.4f}"
        rows.append([name.upper(), scores[name], interval, scores[f"majority_{name}"]])
    rows.append(["macro F1", scores["macro_f1"], None, None])
    rows.append(["weighted F1", scores["weighted_f1"], None, None])
    # Shares make classes of different sizes comparable, numbers say how much a share means
    counts = [["true ↓ predicted →", *classes]]
    cells = [counts[0]]
    for name, row, shares in zip(classes, scores["confusion"], scores["by_row"]):
        counts.append([name, *row])
        cells.append([f"{name} ({sum(row)})"])
        for share, count in zip(shares, row):
            words = f"{share:.0%}\n{count}" if count else "0"
            cells[-1].append(None if share is None else (share, words))
    recall = [["", *classes, "UAR", "WAR"]]
    recall.append(["here", *scores["recall"], scores["uar"], scores["war"]])
    if samples.name == "dfew" and classes == list(samples.classes):
        recall.append(["the paper", *PAPER_RECALLS])
    of = data_name(samples)
    note = f"{scores['samples']} {of}"
    if samples.name in PAPER:
        note += f" (the paper: {PAPER[samples.name]})"
    return [Figure("scores", rows, of=of, note=note), Figure("confusion", counts, grid(cells), of),
            Figure("recall", recall, of=of)]


def show_training(log: Path) -> list[Figure]:
    """The curves of a run's log.jsonl; none where it is not there."""
    if not log.is_file():
        return []
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    sources = list(records[0]["loss"])
    losses = [["epoch", *(f"{m}s" for m in sources)]]
    scores = [["epoch", *(f"{score}, {m}s" for m in sources for score in ("UAR", "WAR"))]]
    chosen_by = []
    for record in records:
        losses.append([record["epoch"], *(record["loss"].get(m) for m in sources)])
        tested = record.get("validation", record.get("test"))  # not after every epoch of size tiny
        if tested:
            values = [tested[m][score] for m in sources for score in ("uar", "war")]
            scores.append([record["epoch"], *values])
            chosen_by.append(record["score"])
    figures = [Figure("training-loss", losses, line_chart(losses, "loss"))]
    if chosen_by:
        best = int(np.argmax(chosen_by))
        held_out = "validation" in records[-1]
        data = "samples held out of the training fold" if held_out else "the test samples"
        note = f"Of {data}. Dashed: the best epoch, {scores[best + 1][0]}, chosen by WAR on them"
        drawing = line_chart(scores, "", 1, mark=best, widths=[2, 5] * len(sources))
        figures.append(Figure("training-scores", scores, drawing, note=note))
    return figures


def show_mistakes(model: S4D, samples: Samples, seen: Observed) -> list[Figure]:
    """The ten most confident mistakes, with their frames."""
    labels = labels_of(samples, model)
    classes = model.architecture[f"{samples.modality}_classes"]
    probabilities = seen.probabilities[samples.modality]
    predictions = probabilities.argmax(1)
    confidence = probabilities.max(1)
    wrong = np.flatnonzero(predictions != labels)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")][:10]
    data = TestData(samples, model.size)
    rows = [["", "true", "predicted", "probability", "file"]]
    pictures = [[""] * 5]
    for place, i in enumerate(wrong, 1):
        true, taken = classes[labels[i]], classes[predictions[i]]
        rows.append([place, true, taken, float(confidence[i]), name_of(samples, i)])
        views = data[i][1].flatten(0, -4)                                   # (v T, 3, H, W)
        name = f"{place}. {true}, taken for {taken} {confidence[i]:.2f}"
        pictures.append([name, *views[::model.size.frames // 2]])           # four of two clips
    return [Figure("mistakes", rows, grid(pictures), data_name(samples))] if len(wrong) else []


def show_paths(model: S4D, samples: Samples, seen: Observed) -> list[Figure]:
    """The ten most frequent paths of tokens through the experts, the first two in colour."""
    if not seen.paths:
        return []
    paths, shares = zip(*seen.paths)
    names = [f"{'-'.join(map(str, path))}: {share:.1%}" for path, share in seen.paths]
    rows = [["layer", *names]]
    for layer, *experts in zip(model.architecture["moae_layers"][-len(paths[0]):], *paths):
        rows.append([layer, *experts])
    experts = range(model.architecture["experts"])
    widths = [12 * share / shares[0] for share in shares]
    colours = [*COLOURS[:2], *["#999"] * 8]
    drawing = line_chart(rows, "expert", max(1, experts[-1]), experts, None, widths, colours)
    return [Figure("paths", rows, drawing, data_name(samples))]


def cross_task(samples: Samples, probabilities: np.ndarray, classes: list[str]) -> dict | None:
    """Table IX: the other task's head on these samples, among the classes that both have; None if
    they share none.

    probabilities: (n, C') of the head whose classes are given. The paper does not say how the head
    of one task sees the other's data; here a head takes the representation of either.
    """
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


def show_tasks(run: Run, model: S4D, tested: dict) -> list[Figure]:
    """The experts of each task (Fig. 5), each head on the other's data (Table IX) and, of two data
    sets, how similar their classes are (Fig. 4)."""
    experts = [["layer ↓ expert →", *range(model.architecture["experts"])]]
    heads = [["", "UAR", "WAR", "samples"]]
    for m, (samples, seen) in tested.items():
        for layer, gate in gate_statistics(model, seen.activation).items():
            experts.append([f"{brief(samples)}, layer {layer}", *gate["share"]])
        other = "image" if m == "video" else "video"
        theirs = model.architecture[f"{other}_classes"]
        scores = cross_task(samples, seen.probabilities.get(other), theirs)
        if scores:
            run.numbers[samples.name][f"{other}_head"] = scores
            heads.append([f"{other} head on {brief(samples)}", scores["uar"], scores["war"],
                          scores["samples"]])
    figures = []
    if len(experts) > 1:
        drawing = grid(experts, high=1 / model.architecture["k"])
        figures.append(Figure("experts", experts, drawing))
    if len(heads) > 1:
        figures.append(Figure("heads", heads))
    if len(tested) == 2:
        # Columns in the rows' order, so that the same classes are the diagonal
        (clips, of_clips), (images, of_images) = tested["video"], tested["image"]
        order = [i for i in class_numbers(clips.classes, images.classes) if i is not None]
        order += [i for i in range(len(images.classes)) if i not in order]
        centres = class_centres(of_clips.features, clips.labels, len(clips.classes))
        others = class_centres(of_images.features, images.labels, len(images.classes))[order]
        similarity = F.cosine_similarity(centres[:, None], others[None], dim=-1).numpy()
        rows = [["clips ↓ images →", *(images.classes[i] for i in order)]]
        rows += [[name, *row] for name, row in zip(clips.classes, listed(similarity))]
        figures.append(Figure("similarity", rows, grid(rows)))
    return figures


@torch.no_grad()
def attention(model: S4D, x: torch.Tensor, process: Process) -> torch.Tensor:
    """What the mean over the tokens draws on, uint8 images or clips -> (B, time slots, rows,
    columns); 1 = even spread.

    Attention rollout (Abnar and Zuidema, 2020): from the last layer to the first, a token passes
    half of what it contributes on by attention, mean over the heads, and keeps half, as residuals
    do. The paper names no method.
    """
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


def show_attention(run: Run, model: S4D, tested: dict) -> list[Figure]:
    """Fig. 6: the first sample of each class, and what the model and --baseline attend to."""
    models = {"attention": model}
    if run.args.baseline:
        checkpoint = read_checkpoint(run.args.baseline)
        models["baseline"] = load_model(run, run.args.baseline, checkpoint)
    figures = []
    for m, (samples, _) in tested.items():
        rows = []
        for label in np.unique(samples.labels):
            first = int(np.flatnonzero(samples.labels == label)[0])
            row = []
            for other in models.values():
                x = TestData(samples, other.size)[first][1][:1]             # (1, T, 3, H, W)
                frames = x[0, ::other.size.tubelet] if m == "video" else x  # (time slots, 3, H, W)
                row = row or [samples.classes[label], *frames[::2]]
                row += heat_on(frames, attention(other, x, run.process)[0])[::2]
            rows.append(row)
        columns = [""]
        step = 2 * model.size.tubelet * samples.stride
        for name in ("frame", *models):
            columns += [f"{name} {step * i}" for i in range(len(frames[::2]))]
        figures.append(Figure("attention", [], grid([columns, *rows]), data_name(samples)))
    return figures


def unpatchify(patches: torch.Tensor, size: Size) -> torch.Tensor:
    """The inverse of patchify: (B, N, P) -> uint8 (B, T, 3, H, W); an image has T = tubelet."""
    side, p = size.pixels // size.patch, size.patch
    x = patches.unflatten(1, (-1, side, side)).unflatten(-1, (size.tubelet, p, p, 3))
    x = x.permute(0, 1, 4, 7, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(1, 2)
    mean = channel_values(IMAGE_MEAN, x.device).view(3, 1, 1)
    std = channel_values(IMAGE_STD, x.device).view(3, 1, 1)
    return (255 * (x * std + mean)).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def reconstruct(model: MaskedAutoencoder, x: torch.Tensor, ratio: float, process: Process) -> tuple:
    """Original, masked and reconstructed frames, uint8 (B, T, 3, H, W) each; the loss, and that of
    the mean patch, which predicts 0 everywhere.

    The model predicts patches normalised by their own mean and deviation (as released), which are
    borrowed from the original for display.
    """
    torch.manual_seed(0)
    with process.autocast():
        x = to_float(process.upload(x))
        loss, pred, hidden = model(x, mask_ratio=ratio)
    patches = patchify(x, model.size).cpu()
    hidden = hidden.cpu()
    target, mean, deviation = normalised_target(patches[hidden].unflatten(0, (len(x), -1)))
    pixels = at_least_fp32(pred).cpu().unflatten(-1, (-1, 3)) * deviation + mean
    masked = patches.masked_fill(hidden[..., None], 0)
    pasted = patches.masked_scatter(hidden[..., None], pixels)
    frames = [unpatchify(part, model.size) for part in (patches, masked, pasted)]
    return frames, loss.item(), target.square().mean().item()


def show_reconstructions(run: Run, file: Path, checkpoint: dict) -> None:
    """A stage-1 checkpoint on --dataset, or on test samples of what it was trained on."""
    if checkpoint["stage"] != "pretrain":
        raise UserError(f"{file} is of stage 2: only stage 1 reconstructs")
    model = rebuild(checkpoint, file).to(run.process.device).eval()
    identity = checkpoint.get("identity", {})
    losses = [["", "masked", "samples", "loss", "mean patch"]]
    for name in tested_sets(run, file, identity):
        samples = load_test(run, file, checkpoint, name)
        m = samples.modality
        index = np.unique(np.linspace(0, len(samples) - 1, 32).round().astype(int))
        data = TestData(samples, model.size)
        cut = partial(fixed_crop, part=samples.crop)                        # as in stage 1
        data.frame_transform = v2.Compose([cut, data.frame_transform])
        ratio = identity.get(f"{m}_mask_ratio", MASK_RATIO[m])
        x = torch.stack([data[i][1][0] for i in index])
        parts, loss, mean_patch = reconstruct(model, x, ratio, run.process)
        losses.append([brief(samples), f"{ratio:.0%}", len(index), loss, mean_patch])
        rows = []
        for what, frames in zip(("original", "masked", "reconstructed"), parts):
            pictures = frames[::4, 0] if m == "image" else frames[0, ::model.size.tubelet]
            rows.append([what, *pictures])
        drawing = grid([[""] * len(rows[0]), *rows])
        run.figures.append(Figure("reconstructions", [], drawing, data_name(samples)))
    run.figures.append(Figure("reconstruction", losses))


def show_settings(checkpoint: dict) -> Figure:
    rows = [["", ""], ["this command", shlex.join(sys.argv)], ["this torch", torch.__version__]]
    for part in ("architecture", "identity", "made_by"):
        rows += [[name, str(value)] for name, value in checkpoint.get(part, {}).items()]
    return Figure("settings", rows)


# ------------------------------------------------------------------- figures: SVG and HTML as text

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b08800", "#56b4e9", "#8c564b", "#777")


def escape(value) -> str:
    """Text for HTML and SVG, in one line, without what no XML file may hold."""
    words = " ".join(str(value).split())
    return html.escape(re.sub("[\0-\x1f\x7f\ud800-\udfff\ufffe\uffff]", "\ufffd", words))


def length(value) -> float:
    """About the width of a text in pixels; Chinese, Japanese and Korean letters are the widest."""
    return sum(13 if letter > "\u2e80" else 7 for letter in str(value))


def text(x: float, y: float, words, anchor: str = "middle", more: str = "") -> str:
    place = f'x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}"'
    return f"<text {place} {more}>{escape(words)}</text>"


def picture(frame: torch.Tensor, x: float, y: float, side: int) -> str:
    """uint8 (3, h, w) in an SVG, pixel by pixel."""
    file = io.BytesIO()
    Image.fromarray(frame.permute(1, 2, 0).numpy()).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return (f'<image x="{x:.0f}" y="{y:.0f}" width="{side}" height="{side}" '
            f'style="image-rendering:pixelated" href="data:image/png;base64,{data}"/>')


def svg(width: float, height: float, parts: list[str]) -> str:
    """A drawing in the page's colours, which does not shrink beyond what can be read."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
            f'width="{width:.0f}" style="min-width:{0.7 * width:.0f}px" font-family="sans-serif" '
            f'font-size="13" fill="currentColor">{"".join(parts)}</svg>')


def stand_alone(drawing: str) -> str:
    """A drawing in black on white, for a file of its own."""
    drawing = re.sub(r"var\(--\w+, ([^)]+)\)", r"\1", drawing).replace("currentColor", "black")
    return drawing.replace(">", '><rect width="100%" height="100%" fill="white"/>', 1)


def grid(rows: list[list], high: float = 1.0) -> str:
    """A table as SVG, whose first row and column are names.

    Cells: a number, whose colour is the stronger the nearer it is to `high`, and another one below
    0; (number, text), which shows the text; a text; None, shown as -; a picture, uint8 (3, h, w).
    """
    (corner, *columns), *rows = rows
    side = 80 if any(isinstance(cell, torch.Tensor) for row in rows for cell in row) else 0
    width, height = max(60, side), max(38, side)
    left = 16 + max(length(name) for name in [corner, *(row[0] for row in rows)])
    # Names of columns that are wider than these are turned, and need room above and at the right
    longest = max(map(length, columns))
    turned = longest > width
    top = 24 + (0.65 * longest if turned else 0)
    parts = [text(left - 8, top - 8, corner, "end")]
    for j, name in enumerate(columns):
        x = left + width * (j + 0.5)
        turn = f'transform="rotate(-40 {x:.0f} {top - 8:.0f})"' if turned else ""
        parts.append(text(x, top - 8, name, "start" if turned else "middle", turn))
    for i, (name, *cells) in enumerate(rows):
        y = top + height * i
        parts.append(text(left - 8, y + height / 2 + 5, name, "end"))
        for j, cell in enumerate(cells):
            x = left + width * j
            if isinstance(cell, torch.Tensor):
                parts.append(picture(cell, x + 1, y + 1, side - 2))
            else:
                parts.append(grid_cell(cell, x, y, width, height, high))
    right = left + width * len(columns) + (0.8 * longest if turned else 8)
    return svg(right, top + height * len(rows) + 8, parts)


def grid_cell(cell, x: float, y: float, width: float, height: float, high: float) -> str:
    value, words = cell if isinstance(cell, tuple) else (cell, cell)
    ink = box = ""
    if isinstance(value, float):
        words = f"{value:.2f}" if words is value else words
        strength = min(abs(value) / high, 1)
        colour = "var(--low, #b35806)" if value < 0 else "var(--high, #08306b)"
        ink = 'fill="var(--page, white)"' if strength > 0.65 else ""       # to be read on dark blue
        box = (f'<rect x="{x + 1:.0f}" y="{y + 1:.0f}" width="{width - 2}" height="{height - 2}" '
               f'fill="{colour}" fill-opacity="{strength:.2f}"/>')
    lines = shown(words).split("\n")
    for i, line in enumerate(lines):
        below = height / 2 + 13 - 8 * len(lines) + 16 * i
        box += text(x + width / 2, y + below, line, more=ink)
    return box


def line_chart(rows: list[list], y_name: str, top: float | None = None, y_ticks=(),
               mark: int | None = None, widths=None, colours=COLOURS, pictures=None) -> str:
    """A table as SVG: a line for each column over the first one, y from 0 to `top`; None is a gap.

    mark: the row at which a dashed line stands. widths, colours: of the lines. pictures: of the
    rows, uint8 (n, 3, h, w), of which at most eight are put below the axis.
    """
    (x_name, *names), *rows = rows
    xs, *lines = np.array(rows, float).T
    low = math.floor(xs[0])
    high = max(low + 1, math.ceil(xs[-1]))
    top = top or math.ceil(np.nanmax(lines))
    left, right, upper, lower = 52, 372, 16, 216
    across = left + (right - left) * (xs - low) / (high - low)
    parts = [text((left + right) / 2, lower + 38, x_name)]
    parts.append(text(14, 116, y_name, more='transform="rotate(-90 14 116)"'))
    for tick in y_ticks or np.linspace(0, top, 5):
        y = lower - (lower - upper) * tick / top
        parts.append(f'<path d="M{left} {y:.0f}H{right}" stroke="currentColor" opacity="0.2"/>')
        parts.append(text(left - 8, y + 4, f"{tick:.3g}", "end"))
    for tick in np.unique(np.linspace(low, high, 6).round()):
        x = left + (right - left) * (tick - low) / (high - low)
        parts.append(text(x, lower + 18, f"{tick:.0f}"))
    if mark is not None:
        dashed = 'stroke="currentColor" stroke-dasharray="4 4"'
        parts.append(f'<path d="M{across[mark]:.0f} {upper}V{lower}" {dashed}/>')
    for i in reversed(range(len(names))):   # the first is drawn last, on top of the others
        up = lower - (lower - upper) * lines[i] / top
        colour = colours[i % len(colours)]
        thickness = widths[i] if widths else 2
        style = f'stroke="{colour}" stroke-width="{thickness:.1f}" fill="none"'
        if i >= len(colours):
            style += ' stroke-dasharray="6 5"'
        there = ~np.isnan(up)
        points = [f"{x:.1f} {y:.1f}" for x, y in zip(across[there], up[there])]
        # h0 and round ends make a dot of a single point
        parts.append(f'<path d="M{"L".join(points)}h0" stroke-linecap="round" {style}/>')
        parts.append(f'<path d="M{right + 16} {26 + 19 * i}h18" {style}/>')
        parts.append(text(right + 42, 31 + 19 * i, names[i], "start"))
    below = 48
    if pictures is not None:
        below = 96
        for i in range(0, len(xs), math.ceil(len(xs) / 8)):
            parts.append(picture(pictures[i], across[i] - 20, lower + 48, 40))
    width = right + 50 + max(map(length, names))
    return svg(width, max(lower + below, 36 + 19 * len(names)), parts)


def html_table(rows: list[list], caption: str) -> str:
    """A table whose first row and column are names. caption: HTML."""
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in rows[0])
    body = ""
    for name, *cells in rows[1:]:
        columns = "".join(f"<td>{escape(shown(cell))}</td>" for cell in cells)
        body += f"<tr><th scope=row>{escape(name)}</th>{columns}</tr>\n"
    return f"<table><caption>{caption}</caption>\n<tr>{head}</tr>\n{body}</table>"


def section(figure: Figure) -> str:
    """A figure as a part of the page. What is too wide scrolls in a box of its own."""
    title, how_to_read, paper = TEXTS[figure.kind]
    title = escape(f"{title}: {figure.of}" if figure.of else title)
    text = escape(". ".join(filter(None, [figure.note, how_to_read])))
    if paper:
        text += f" <small>In the paper: {paper}.</small>"
    # A box that scrolls must be reached by the keyboard and be named
    scroll = f'<div class=scroll role=region tabindex=0 aria-label="{title}">'
    numbers = ""
    if figure.rows:
        numbers = f"{scroll}{html_table(figure.rows, title if figure.drawing else text)}</div>"
    if figure.drawing:
        drawing = figure.drawing.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
        body = f"<figure>{scroll}{drawing}</div><figcaption>{text}</figcaption></figure>"
        if figure.rows:
            body += f"<details><summary>In numbers</summary>{numbers}</details>"
    else:
        body = numbers
    return f'<section id="{figure.name}"><h2>{title}</h2>{body}</section>\n'


def page(title: str, warnings: list[str], figures: list[Figure]) -> str:
    """One file that needs nothing else. Each section's drawing also lies beside it, as an SVG."""
    said = "".join(f"<p class=warning>Warning: {escape(warning)}</p>" for warning in warnings)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body><main><h1>{escape(title)}</h1>{said}
{"".join(map(section, figures))}</main></body></html>
"""


TEXTS = {  # of each kind of figure: what it shows, how to read it, what the paper has of the kind
    "scores": (
        "How often it is right", "UAR is the mean of the classes' recalls: every class counts the "
        "same. WAR is the share of all that are right.", "Table II"),
    "confusion": (
        "What is taken for what", "Of the samples of each true class (rows, with their number) the "
        "share and the number that is taken for each class (columns).", "Fig. 7"),
    "recall": ("How much of each class is found", "", "Table III"),
    "folds": ("Each fold by itself", "", "Section IV-A joins them"),
    "training-loss": ("Loss in training", "Mean of each epoch: it falls, then levels off.", ""),
    "training-scores": ("Scores in training", "", ""),
    "mistakes": (
        "Where it is most wrong", "The mistakes of the highest probability: doubtful labels and "
        "badly cut faces show here first.", ""),
    "paths": (
        "Paths through the experts", "A token's path is its expert of the largest weight in each "
        "layer. The ten most frequent, as wide as their shares of all tokens.",
        "Fig. 5 of its latest version"),
    "experts": (
        "Which experts are used", "The share of a layer's assignments of tokens that each expert "
        "receives. Layers and experts are counted from 0.", "Fig. 5"),
    "heads": (
        "Each head on the other's data", "Among the classes that both have.",
        "Table IX, UAR and WAR: AffectNet-7's head on DFEW 0.4336, 0.4713, on FERV39K 0.3234, "
        "0.3510; on AffectNet-7 that of DFEW 0.4520, 0.4504, of FERV39K 0.5146, 0.5138"),
    "similarity": (
        "Do the two tasks mean the same by a class?", "Cosine similarity of the mean features of a "
        "class of clips and one of images: 1 the same, 0 nothing in common, in another colour "
        "opposed.", "Fig. 4"),
    "attention": (
        "Where it looks", "The first of each class. Orange: what the prediction draws on more than "
        "evenly (attention rollout).", "Fig. 6"),
    "reconstructions": (
        "What stage 1 fills in", "Grey patches were hidden from the model. Mean and deviation of "
        "the predicted ones are borrowed from the original.", ""),
    "reconstruction": ("How well stage 1 fills in", "The loss, and that of flat patches.", ""),
    "video": ("Video", "Below: frames as the model sees them.", ""),
    "own images": ("Own images", "Probability of each class.", ""),
    "own videos": ("Own videos", "Probability of each class.", ""),
    "settings": ("Settings, data and versions", "As the checkpoint records them.", "")}
PAPER = {  # Table II; V on one fold; VI
    "dfew": "UAR 0.6680 and WAR 0.7668 over five folds, 0.7058 and 0.7937 on one, Table V",
    "ferv39k": "UAR 0.4341 and WAR 0.5365", "mafw": "UAR 0.4372 and WAR 0.5844 over five folds",
    "affectnet-7": "UAR 0.6545 and WAR 0.6550, trained with FERV39K, Table VI"}
PAPER_RECALLS = [0.9476, 0.7904, 0.7460, 0.7980, 0.6726, 0.2759, 0.4457, 0.6680, 0.7668]
STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1a1a1a; --quiet: #555; --high: #08306b;
  --low: #b35806 }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171a; --ink: #e8e8e8; --quiet: #aaa; --high: #9ecae1; --low: #fdb863 } }
body { background: var(--page); color: var(--ink); font: 16px/1.5 sans-serif; margin: 0 }
main { max-width: 62rem; margin: auto; padding: 1rem; display: flex; flex-wrap: wrap; gap: 0 2rem }
h1, section, .warning { flex: 1 1 100%; min-width: 0; overflow-wrap: anywhere }
section[id^=training], section[id^=paths] { flex-basis: 26rem }
h2 { font-size: 1.25rem; margin: 2rem 0 .5rem }
figure { margin: 0 }
figcaption, caption, details { color: var(--quiet); font-size: .9rem; text-align: left }
.scroll { overflow-x: auto }
svg { display: block; height: auto; max-width: 100% }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #8886; text-align: right }
th:first-child { text-align: left }
.warning { border-left: .3rem solid var(--low); padding-left: .7rem }
@media print { @page { size: A4; margin: 15mm } main { display: block; padding: 0 }
  .scroll { overflow: visible } section { break-inside: avoid } svg { max-height: 22cm }
  details:not([open]) { display: none } }
"""


if __name__ == "__main__":
    guarded(main)
