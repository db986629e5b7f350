"""How often a model is right, and what else the paper shows of a trained model (Section IV).

`metrics` makes UAR and WAR of a confusion matrix; `observe` is one pass over a test set, which
predictions, features and experts come from; then comes the command. Below the line of '=' follow
one's own videos, and what --report shows: analyses, and figures as text.

    python evaluate.py --checkpoint runs/dfew/fold1/last.pt           on the test data of its fold
    python evaluate.py --dataset dfew --folds runs/dfew/fold?/last.pt     five folds as one
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
                   at_least_fp32, channel_values, normalised_target, patchify, read_checkpoint,
                   rebuild, unnamed, whole_file)
from pretrain import Formatter, Process, box, default_workers, guarded, number, start

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
    """UAR, WAR, their 95 % intervals, recalls and what always the most frequent class would have,
    as fractions. A class without samples has no recall (None) and is left out of UAR. Intervals are
    percentiles of 2,000 bootstrap samples."""
    total = int(confusion.sum())
    uar = np.nanmean(recalls(confusion))    # unweighted: every class counts the same, however small
    war = np.trace(confusion) / total       # weighted by the classes' sizes: the accuracy
    support = confusion.sum(1)
    # To draw n samples with replacement is to draw n of the matrix's cells
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(total, confusion.ravel() / total, 2000).reshape(-1, *confusion.shape)
    uars = np.nanmean(recalls(drawn), axis=1)
    wars = np.trace(drawn, axis1=1, axis2=2) / total
    return dict(
        uar=float(uar), uar_interval=np.quantile(uars, (0.025, 0.975)).tolist(),
        war=float(war), war_interval=np.quantile(wars, (0.025, 0.975)).tolist(),
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
    """A table's cell as text; of (number, text) the text, and of a picture none."""
    if isinstance(cell, torch.Tensor):
        return ""
    if isinstance(cell, tuple):
        return cell[1]
    if isinstance(cell, float):
        return f"{cell:.4f}"
    return "-" if cell is None else str(cell)


def markdown(columns: list[str], rows: list[list]) -> str:
    """A table that is Markdown and reads well in a terminal. A row begins with its name."""
    cells = []
    for row in [columns, *rows]:
        cells.append([shown(cell) for cell in row])
    first, *others = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * first, *("-" * (width - 1) + ":" for width in others)])
    lines = []
    for name, *numbers in cells:
        numbers = map(str.rjust, numbers, others)
        lines.append(f"| {name:{first}} | {' | '.join(numbers)} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------- one pass over a test set

@dataclass
class Observed:
    """What a pass over n samples yields, the same in every process."""
    probabilities: dict[str, np.ndarray]    # (n, C) float64 of each head, also the other's
    features: np.ndarray                    # (n, d) float64: the representation before the heads
    activation: np.ndarray                  # (L, E): tokens that each expert received
    paths: list[tuple[list[int], float]]    # the ten most frequent, with their shares of all tokens
    labels: np.ndarray | None = None        # (n,) as numbers of the model's classes


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
    Batches are fixed by the sample order and dealt to the processes: nothing is padded or counted
    twice, and the numbers do not depend on how many there are.
    """
    model.eval()
    n = len(data)
    widths = [model.size.width, *(head.out_features for head in model.head.values())]
    rows = torch.zeros(n, sum(widths), dtype=torch.float64)
    experts, layers = model.architecture["experts"], model.architecture["moae_layers"]
    activation = torch.zeros(len(layers), experts, dtype=torch.float64, device=process.device)
    # A token's path is its expert of the largest weight in each layer, or in the last ones where
    # more than 2^24 paths are possible. paths[e1, e2, ...] counts the tokens that took e1, e2, ...
    length = min(len(layers), int(24 / math.log2(max(2, experts))))
    paths = torch.zeros([experts] * length, dtype=torch.float64, device=process.device)
    gates, hooks = [], []                   # gates: of a layer (B v N, k), the best expert first
    for i in layers:
        hooks.append(model.blocks[i].moe_layer.router.register_forward_hook(
            lambda module, inputs, output: gates.append(output[1].flatten(0, -2))))
    chunks = [list(range(i, min(i + batch, n))) for i in range(0, n, batch)]
    batches = loader(data, workers, batch_sampler=chunks[process.rank::process.world])
    title = f"evaluating {data.samples.name}"
    for index, views, _ in tqdm(batches, title, leave=False, disable=not process.main):
        gates.clear()
        found = forward(model, views.flatten(0, 1), process)
        if gates:
            chosen = torch.stack(gates)                                     # (L, B v N, k)
            ones = torch.ones_like(chosen, dtype=torch.float64)
            activation.scatter_add_(1, chosen.flatten(1), ones.flatten(1))
            path = chosen[len(layers) - length:, :, 0]                      # (length, B v N)
            paths.index_put_(tuple(path), paths.new_ones(()), accumulate=True)
        row = torch.cat(list(found.values()), 1)                            # (B v, d + C ...)
        rows[index] = row.unflatten(0, views.shape[:2]).mean(1).cpu()  # here a GPU is waited for
    for hook in hooks:
        hook.remove()
    if process.world > 1:                   # every sample's row is zero in all processes but one
        rows = process.sum(process.upload(rows)).cpu()
    features, *heads = [part.numpy() for part in rows.split(widths, 1)]
    activation = process.sum(activation).cpu().numpy()
    paths = process.sum(paths).cpu()
    tokens = paths.sum().item()
    counts, places = paths.flatten().topk(min(10, paths.numel()))
    frequent = []
    for count, place in zip(counts.tolist(), places.tolist()):
        if count:
            path = np.unravel_index(place, paths.shape)
            frequent.append(([int(expert) for expert in path], count / tokens))
    return Observed(dict(zip(model.head, heads)), features, activation, frequent)


SAME_CLASS = {"happiness": "happy", "sadness": "sad", "anger": "angry"}  # as data sets spell them


def class_numbers(classes: list[str], theirs: list[str]) -> list[int | None]:
    """The place in `theirs` of each of the classes, by name; None where there is none."""
    places = {SAME_CLASS.get(name, name): i for i, name in enumerate(theirs)}
    places |= {name: i for i, name in enumerate(theirs)}     # the very word comes first
    return [places.get(name, places.get(SAME_CLASS.get(name))) for name in classes]


def evaluate(model: S4D, samples: Samples, process: Process,
             workers: int) -> tuple[dict, Observed]:
    """Metrics of the samples' own head, and the pass that they are from. Classes are matched by
    name; the model may have more, and may predict these too. Of equally probable classes the first
    is predicted."""
    m = samples.modality
    theirs = model.architecture[f"{m}_classes"]
    numbers = class_numbers(samples.classes, theirs)
    if None in numbers or not numbers:
        raise UserError(f"{samples.name} has {m}s of the classes {list(samples.classes)}: expected "
                        f"classes that the model was trained on, {list(theirs)}")
    observed = observe(model, TestData(samples, model.size), process, workers)
    observed.labels = np.array(numbers)[samples.labels]
    predictions = observed.probabilities[m].argmax(1)
    confusion = confusion_matrix(observed.labels, predictions, len(theirs))
    return metrics(confusion), observed


def gate_statistics(model: S4D, activation: np.ndarray) -> dict[int, list[float]]:
    """Each expert's share of a layer's assignments, by layer, numbered as in the checkpoint.
    activation: (L, E), as observed."""
    shares = (activation / activation.sum(1, keepdims=True)).round(4).tolist()
    return dict(zip(model.architecture["moae_layers"], shares))


# ------------------------------------------------------------------------------------- the command

@dataclass
class Run:
    """What a command was given, and what it has found so far."""
    args: argparse.Namespace
    process: Process
    lines: list[str] = field(default_factory=list)          # to be printed
    numbers: dict = field(default_factory=dict)             # evaluation.json
    predictions: dict = field(default_factory=dict)         # by modality, predictions-*.csv
    sections: list[str] = field(default_factory=list)       # of report.html
    drawings: dict[str, str] = field(default_factory=dict)  # by the names of their files


def main() -> None:
    p = settings()
    args = p.parse_args()
    if args.folds and (args.media or args.fold or not args.dataset):
        p.error("--folds expects --dataset, and neither FILE nor --fold")
    file = args.checkpoint or args.folds[0]
    # Results of last.pt and best.pt, of folds and of own media stay apart
    part = "folds" if args.folds else "media" if args.media else ""
    folder = args.report or file.with_suffix("") / part
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()      # can it be written to? Before any work
    checkpoint = read_checkpoint(file)
    checkpoint.pop("optimizer", None)       # its moments are twice as large as the weights
    size = checkpoint["architecture"].get("size", "base")
    run = Run(args, start(size, checkpoint.get("identity", {}).get("precision")))
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
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    models = p.add_mutually_exclusive_group(required=True)
    models.add_argument("--checkpoint", type=Path,
                        help="of finetune.py; with --report also of pretrain.py")
    models.add_argument("--folds", type=Path, nargs="+", metavar="CHECKPOINT",
                        help="one of each fold of --dataset")
    add = p.add_argument
    add("media", type=Path, nargs="*", metavar="FILE",
        help="own image or video, or folder of one clip's frames")
    add("--report", type=Path, metavar="FOLDER", help="for report.html, figures and scores")
    add("--dataset", type=dataset_name, help="data set to test on (those of training)")
    add("--fold", type=number(int, 1), help="its fold (the checkpoint's)")
    add("--crop", type=box, metavar="X,Y,W,H", help="the face in FILE or in test clips, in pixels "
        "(all of it; of a run's own test clips what training had)")
    add("--baseline", type=Path, metavar="CHECKPOINT", help="show its attention beside (Fig. 6)")
    add("--data-root", type=Path, default=Path("data"), help="folder of all data sets")
    add("--workers", type=number(int, 0), default=default_workers(), help="loading processes each")
    return p


def write(run: Run, folder: Path, title: str) -> None:
    """Write every file whole, and only then print, so that results are there whoever reads."""
    files = run.drawings | {"evaluation.json": json.dumps(run.numbers, indent=1)}
    for m, rows in run.predictions.items():
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows(rows)
        files[f"predictions-{m}s.csv"] = lines.getvalue()
    written_to = folder
    if run.sections:
        written_to = folder / "report.html"
        body = f"<h1>{escape(title)}</h1>\n{''.join(run.sections)}"
        files["report.html"] = PAGE.format(title=escape(title), style=STYLE, body=body)
    as_names_are = dict(encoding="utf-8", errors="surrogateescape", newline="")
    for name, contents in files.items():
        with whole_file(folder / name, "w", **as_names_are) as file:
            file.write(contents)
    print(*run.lines, f"\nwritten to {written_to}", sep="\n")


def load_model(run: Run, file: Path, checkpoint: dict) -> S4D:
    """The model of a stage-2 checkpoint. Classes of a file that does not name them are those of
    --dataset, a set of the catalogue, in its order, and never those of one's own list."""
    model = rebuild(checkpoint, file)
    if not isinstance(model, S4D):
        raise UserError(f"{file} is a stage-1 checkpoint of pretrain.py: it has no classes; "
                        "fine-tune it first (finetune.py --pretrained), or give --report alone")
    if run.args.dataset in CATALOGUE:
        dataset = CATALOGUE[run.args.dataset]
        head = f"{dataset.modality}_classes"
        if model.architecture[head] == unnamed(len(dataset.classes)):
            model.architecture[head] = list(dataset.classes)
            run.lines.append(f"{file} does not name its classes: taken as those of {dataset.name}, "
                             f"in its order: {', '.join(dataset.classes)}")
    return model.to(run.process.device).eval()


def load_tests(run: Run, file: Path, checkpoint: dict) -> list[Samples]:
    """The test samples of --dataset or else of what a checkpoint was trained on, videos first. If
    training recorded others the model may have seen these: a warning, or with --folds an error."""
    args = run.args
    identity = checkpoint.get("identity", {})
    trained_on = [identity.get("dataset"), identity.get("image_dataset")]
    tests = []
    for name in [args.dataset] if args.dataset else trained_on:
        if name in (None, "none", "frames"):
            continue
        dataset = catalogue(name)
        own = name not in CATALOGUE
        # One's own single list has no test part
        split = "train" if own and len(dataset.lists) == 1 else "test"
        fold = 1 if dataset.folds == 1 else args.fold or identity.get("fold", 1)
        # Another set of the catalogue has a stride of its own, and is not what training recorded
        same = own or name in trained_on or args.folds
        stride = identity.get("video stride") if same else None
        samples = load_samples(name, args.data_root, split, fold, stride)
        found = samples.fingerprint()
        recorded = identity.get(f"test {samples.modality}")
        if same and recorded not in (None, found):
            warning = (f"not the test samples of training, {file} may have seen them: {found}; "
                       f"recorded: {recorded}")
            if args.folds:
                raise UserError(warning)
            run.lines.append(f"warning: {warning}")
        if samples.modality == "video":
            trained = name in trained_on or recorded == found
            crop = args.crop or (identity.get("crop") if trained else None)
            # One's own clips are sampled at the step in time that the training clips had
            rate = samples.rate and identity.get("video rate", samples.rate)
            samples = replace(samples, box=crop or samples.box, rate=rate)
        tests.append(samples)
    if not tests:
        raise UserError(f"{file} does not say what it was trained on: give --dataset, and --fold")
    return tests


def evaluate_set(run: Run, file: Path, model: S4D, samples: Samples) -> tuple[dict, Observed]:
    """Scores, and the pass that they are from. To the predictions are added a row of each sample's
    name, class, predicted class and probabilities."""
    m = samples.modality
    classes = model.architecture[f"{m}_classes"]
    scores, seen = evaluate(model, samples, run.process, run.args.workers)
    rows = run.predictions.setdefault(m, [["sample", "label", "prediction", *classes]])
    for name, label, row in zip(samples.names.tolist(), seen.labels, seen.probabilities[m]):
        names = [os.fsdecode(name), classes[label], classes[row.argmax()]]
        rows.append(names + row.round(6).tolist())
    scores |= dict(classes=classes, fold=samples.fold, samples=len(samples), checkpoint=str(file))
    return scores, seen


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
    scores = []
    by_fold = [["", "UAR", "WAR"]]
    for fold, (file, samples) in sorted(tests.items()):
        model = load_model(run, file, read_checkpoint(file))            # one at a time in memory
        score, _ = evaluate_set(run, file, model, samples)
        scores.append(score)
        by_fold.append([f"fold {fold}", score["uar"], score["war"]])
    together = join_folds(scores)
    by_fold.append(["mean", together["uar_mean"], together["war_mean"]])
    by_fold.append(["deviation", together["uar_deviation"], together["war_deviation"]])
    together |= dict(classes=score["classes"], checkpoint="all folds as one")
    run.lines.append(f"\n{name}, each fold by itself\n{markdown(by_fold[0], by_fold[1:])}")
    show_scores(run, f"{name}, {folds} folds", samples, together)
    show(run, "folds", by_fold)


def evaluate_sets(run: Run, file: Path, checkpoint: dict) -> None:
    """A fine-tuned checkpoint on its test data and, for a report, everything else."""
    model = load_model(run, file, checkpoint)
    tested = {}
    for samples in load_tests(run, file, checkpoint):
        scores, seen = evaluate_set(run, file, model, samples)
        if "state" in checkpoint:
            scores["checkpoint"] += f" after epoch {checkpoint['state']['epoch']}"
        show_scores(run, samples.title, samples, scores)
        tested[samples.modality] = samples, seen
    if run.args.report and run.process.main:
        for samples, _ in tested.values():
            show_mistakes(run, model, samples)
        show_training(run, file)
        show_experts(run, model, tested)
        show_tasks(run, model, tested)
        show_attention(run, model, tested)


# ==================================================================================================
# From here on one's own videos, and what --report shows. Skip it on a first reading.

# --------------------------------------------------------------------------- own images and videos

def covering_frames(n: int, frames: int, stride: int, most: int = 64) -> list[int]:
    """Frame numbers of clips that cover a video of n frames, joined: each overlaps half of the
    next, or there are `most`, spread evenly."""
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

SCORES = (
    "UAR {uar:.4f} ({uar_interval[0]:.4f} to {uar_interval[1]:.4f})  "
    "WAR {war:.4f} ({war_interval[0]:.4f} to {war_interval[1]:.4f}), with 95 % intervals\n"
    "always the most frequent class: UAR {majority_uar:.4f}  WAR {majority_war:.4f}")


def show_scores(run: Run, name: str, samples: Samples, scores: dict) -> None:
    """Scores, and the confusion matrix (Fig. 7) with recalls (Table III)."""
    classes = scores["classes"]
    title = f"{name}: {np.sum(scores['confusion'])} test samples, {scores['checkpoint']}"
    words = SCORES.format(**scores)
    printed = []
    rows = [["true ↓ predicted →", *classes, "recall"]]
    for i, true in enumerate(classes):
        counts = scores["confusion"][i]
        recall = scores["recall"][i]
        printed.append([true, *counts, recall])
        row = [f"{true} ({sum(counts)})"]
        # Shares make classes of different sizes comparable, numbers say how much a share means
        for count, share in zip(counts, scores["by_row"][i]):
            row.append(None if share is None else (share, f"{count} ({share:.0%})"))
        rows.append([*row, recall])
    columns = ["true \\ predicted", *classes, "recall"]
    run.lines.append(f"\n{title}\n{words}\n\n{markdown(columns, printed)}")
    run.numbers[samples.name] = scores
    of = f"test {samples.modality}s of {name}"
    show(run, "scores", rows, grid(rows), of, f"{title}. {words}.".replace("\n", "; "))


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
    tested = []                             # not after every epoch of size tiny; never in stage 1
    for record in records:
        losses.append([record["epoch"], *(record["loss"][m] for m in sources)])
        if "score" in record:
            tested.append(record)
            scores.append([record["epoch"]])
            for m in sources:
                found = record.get("validation", record.get("test"))[m]
                scores[-1] += [found["uar"], found["war"]]
    show(run, "training-loss", losses, line_chart(losses, "loss"))
    if tested:
        best = max(tested, key=lambda record: record["score"])
        by = "samples held out of the training fold" if "validation" in best else "the test samples"
        note = f"Of {by}. Dashed: the best epoch, {best['epoch']}, chosen by WAR on them."
        drawing = line_chart(scores, "share", mark=best["epoch"])
        show(run, "training-scores", scores, drawing, note=note)


def show_mistakes(run: Run, model: S4D, samples: Samples) -> None:
    """The ten most confident mistakes, with their frames."""
    _, *rows = run.predictions[samples.modality]
    wrong = []
    for i, (file, true, predicted, *probabilities) in enumerate(rows):
        if true != predicted:
            wrong.append((max(probabilities), i, f"{true}, taken for {predicted}", file))
    data = TestData(samples, model.size)
    pictures = []
    for confidence, i, words, file in sorted(wrong, reverse=True)[:10]:
        frames = data[i][1].flatten(0, -4)[::model.size.frames // 2]        # four of two clips
        pictures.append([f"{file}: {words} {confidence:.2f}", *frames])
    if wrong:
        show(run, "mistakes", [], grid(pictures), samples)


def cross_task(samples: Samples, probabilities: np.ndarray, classes: list[str]) -> dict | None:
    """Table IX: the other task's head, whose classes and probabilities (n, C') are given, on these
    samples, among the classes that both have; None if they share none. The paper does not say how
    a head sees the other's data; here it takes the representation of either."""
    places = class_numbers(samples.classes, classes)
    ours = [i for i, place in enumerate(places) if place is not None]
    theirs = [places[i] for i in ours]
    kept = np.isin(samples.labels, ours)
    if not kept.any():
        return None
    # Only these classes are a choice, so that chance is the same for both heads
    labels = np.searchsorted(ours, samples.labels[kept])
    predictions = probabilities[kept][:, theirs].argmax(1)
    scores = metrics(confusion_matrix(labels, predictions, len(ours)))
    return dict(scores, samples=len(labels), classes=[samples.classes[i] for i in ours])


def class_centres(features: np.ndarray, labels: np.ndarray, classes: int) -> torch.Tensor:
    """Mean features (C, d) of each class, NaN for a class without samples."""
    features = torch.from_numpy(features)
    return torch.stack([features[labels == c].mean(0) for c in range(classes)])


def show_experts(run: Run, model: S4D, tested: dict) -> None:
    """The experts of each task, and the ten most frequent paths of tokens through them, the first
    two in colour (Fig. 5)."""
    layers, experts = model.architecture["moae_layers"], model.architecture["experts"]
    if not layers:
        return
    shares = [["layer ↓ expert →", *range(experts)]]
    for m, (samples, seen) in tested.items():
        for layer, share in gate_statistics(model, seen.activation).items():
            shares.append([f"{m}s, layer {layer}", *share])
        paths, of_tokens = zip(*seen.paths)
        rows = [["layer"], *zip(layers[-len(paths[0]):], *paths)]
        pens = []
        for i, share in enumerate(of_tokens):
            rows[0].append(f"{'-'.join(map(str, paths[i]))}: {share:.1%}")
            pens.append((COLOURS[i] if i < 2 else "#999", 12 * share / of_tokens[0]))
        show(run, "paths", rows, line_chart(rows, "expert", experts - 1, pens=pens), samples)
    show(run, "experts", shares, grid(shares, high=1 / model.architecture["k"]))


def show_tasks(run: Run, model: S4D, tested: dict) -> None:
    """Each head on the other's data (Table IX), and how similar the classes are (Fig. 4)."""
    heads = [["", "UAR", "WAR", "samples"]]
    for m, (samples, seen) in tested.items():
        other = "image" if m == "video" else "video"
        theirs = model.architecture[f"{other}_classes"]
        scores = cross_task(samples, seen.probabilities.get(other), theirs)
        if scores:
            name = f"{other} head on {samples.title}"
            heads.append([name, scores["uar"], scores["war"], scores["samples"]])
    if len(heads) > 1:
        show(run, "heads", heads)
    if len(tested) < 2:
        return
    (clips, of_clips), (images, of_images) = tested.values()
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
    models = {"attention": model}
    if run.args.baseline:
        checkpoint = read_checkpoint(run.args.baseline)
        models["baseline"] = load_model(run, run.args.baseline, checkpoint)
    for m, (samples, _) in tested.items():
        data = TestData(samples, model.size)
        rows = [[""]]
        for label, first in zip(*np.unique(samples.labels, return_index=True)):
            x = data[first][1][:1]                                          # (1, T, 3, H, W)
            frames = x[0, ::model.size.tubelet] if m == "video" else x      # (time slots, 3, H, W)
            row = [samples.classes[label], *frames[::2]]
            for one in models.values():
                row += heat_on(frames, attention(one, x, run.process)[0])[::2]
            rows.append(row)
        for name in ("frame", *models):
            for i in range(0, len(frames), 2):
                rows[0].append(f"{name} {i * model.size.tubelet * samples.stride}")
        show(run, "attention", [], grid(rows), samples)


def unpatchify(patches: torch.Tensor, size: Size) -> torch.Tensor:
    """The inverse of patchify: (B, N, P) -> uint8 (B, T, 3, H, W); an image has T = tubelet."""
    side = size.pixels // size.patch
    x = patches.unflatten(1, (-1, side, side))
    x = x.unflatten(-1, (size.tubelet, size.patch, size.patch, 3))
    # (B, slot, row, column, frame, y, x, 3) -> (B, slot, frame, 3, row, y, column, x)
    x = x.permute(0, 1, 4, 7, 2, 5, 3, 6)
    x = x.flatten(6).flatten(4, 5).flatten(1, 2)                            # (B, T, 3, H, W)
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
        # Eight images, or eight frames of a video
        index = np.linspace(0, len(samples) - 1, 8 if m == "image" else 1).astype(int)
        x = torch.stack([data[i][1][0] for i in index])
        ratio = checkpoint.get("identity", {}).get(f"{m}_mask_ratio", MASK_RATIO[m])
        rows = []
        parts = reconstruct(model, x, ratio, run.process)
        for name, frames in zip(("original", "masked", "reconstructed"), parts):
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


def text(x: float, y: float, words, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(words)}</text>'


def text_width(cell) -> float:
    """About the width in pixels; Chinese, Japanese and Korean letters are the widest."""
    return sum(13 if letter > "\u2e80" else 7 for letter in shown(cell))


def picture(frame: torch.Tensor, x: float, y: float, side: int) -> str:
    """uint8 (3, h, w) in an SVG, pixel by pixel."""
    file = io.BytesIO()
    v2.functional.to_pil_image(frame).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return (f'<image x="{x:.1f}" y="{y:.1f}" width="{side}" height="{side}" '
            f'style="image-rendering:pixelated" href="data:image/png;base64,{data}"/>')


def svg(width: float, height: float, parts: list[str]) -> str:
    """A drawing on white, which a page does not shrink beyond what can be read."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
            f'width="{width:.0f}" style="min-width:{0.7 * width:.0f}px" font-family="sans-serif" '
            f'font-size="13"><rect width="100%" height="100%" fill="white"/>'
            f"{''.join(parts)}</svg>")


def grid(rows: list[list], high: float = 1.0) -> str:
    """A table as SVG. Cells: a number, whose colour is the stronger the nearer it is to `high`, and
    another one below 0; (number, text), which shows the text; a text; None, shown as -; a picture,
    uint8 (3, h, w), the first of which stands in the second column."""
    parts = []
    x = 0
    for column in zip(*rows):
        width = max(84, 12 + max(map(text_width, column)))
        y = 0
        for row, cell in zip(rows, column):
            height = 84 if isinstance(row[1], torch.Tensor) else 34
            value = cell[0] if isinstance(cell, tuple) else cell
            words = shown(cell)
            if isinstance(value, float):
                colour = "#d95f0e" if value < 0 else "#1f77b4"
                strength = 0.7 * min(abs(value) / high, 1)      # black letters stay readable
                parts.append(f'<rect x="{x}" y="{y}" width="{width - 2}" height="{height - 2}" '
                             f'fill="{colour}" opacity="{strength:.2f}"/>')
            if isinstance(cell, float):
                words = f"{cell:.2f}"
            if isinstance(cell, torch.Tensor):
                parts.append(picture(cell, x, y, height - 2))
            parts.append(text(x + width / 2 - 1, y + height / 2 + 4, words))
            y += height
        x += width
    return svg(x, y, parts)


def line_chart(rows: list[list], y_name: str, top: int = 0, mark: int | None = None, pens=(),
               pictures=None) -> str:
    """A table as SVG: a line for each column over the first one, y from 0 to `top`. mark: where
    across a dashed line stands. pens: colour and width of the lines. pictures: of the rows, uint8
    (n, 3, h, w); at most eight are put below the axis."""
    (x_name, *names), *rows = rows
    xs, *lines = np.array(rows, float).T
    low = math.floor(xs[0])
    high = max(low + 1, math.ceil(xs[-1]))
    top = top or max(1, math.ceil(np.max(lines)))
    across = partial(np.interp, xp=(low, high), fp=(52, 372))               # to pixels
    upward = partial(np.interp, xp=(0, top), fp=(216, 16))
    parts = [text(212, 254, x_name)]
    parts.append(text(14, 116, y_name, more=' transform="rotate(-90 14 116)"'))
    for tick in range(low, high + 1, math.ceil((high - low) / 8)):
        parts.append(text(across(tick), 234, tick))
    ticks = range(0, top + 1, math.ceil(top / 8))
    if top == 1:
        ticks = (0, 0.25, 0.5, 0.75, 1)
    for tick in ticks:
        y = upward(tick)
        parts.append(f'<path d="M52 {y:.1f}H372" stroke="#ccc"/>')
        parts.append(text(44, y + 4, tick, "end"))
    if mark is not None:
        line = f"M{across(mark):.1f} 16V216"
        parts.append(f'<path d="{line}" stroke="black" stroke-dasharray="4 4"/>')
    pens = pens or [(colour, 2) for colour in COLOURS]
    for i in reversed(range(len(names))):   # the first line on top of the others
        colour, width = pens[i % len(pens)]
        style = f'stroke="{colour}" stroke-width="{width:.1f}"'
        points = []
        for x, y in zip(across(xs), upward(lines[i])):
            points.append(f"{x:.1f} {y:.1f}")
        line = f"M{'L'.join(points)}h0"     # h0 and round ends make a dot of a single point
        parts.append(f'<path d="{line}" fill="none" stroke-linecap="round" {style}/>')
        y = 26 + 19 * i
        parts.append(f'<path d="M388 {y}h18" {style}/>')
        parts.append(text(414, y + 5, names[i], "start"))
    height = max(264, 36 + 19 * len(names))
    if pictures is not None:
        height = max(312, height)
        for i in range(0, len(xs), math.ceil(len(xs) / 8)):
            parts.append(picture(pictures[i], across(xs[i]) - 20, 264, 40))
    return svg(422 + max(map(text_width, names)), height, parts)


def show(run: Run, kind: str, rows: list[list], drawing: str = "", of: Samples | str = "",
         note: str = "") -> None:
    """Add a section to the page: a drawing and numbers, whose first row and column are names."""
    if not (run.args.report or run.args.media):
        return
    if isinstance(of, Samples):
        of = f"test {of.modality}s of {of.title}"
    title = kind.replace("-", " ").capitalize()
    title = escape(f"{title}: {of}" if of else title)
    name = re.sub(r"\W+", "-", f"{kind} {of}"[:80]).strip("-")
    body = f"<h2>{title}</h2><p>{escape(note)}</p><p>{TEXTS.get(kind, '')}</p>"
    # A box that scrolls must be reached by the keyboard and be named
    box = f'<div class=scroll tabindex=0 aria-label="{title}"'
    if drawing:
        run.drawings[f"{name}.svg"] = drawing
        body += f"{box} role=img>{drawing}</div>"
    if rows:
        run.numbers[name] = rows
        state = "" if drawing else "open"
        body += f"<details {state}><summary>In numbers</summary>{box} role=region><table>"
        for i, row in enumerate(rows):
            body += "<tr>"
            for j, cell in enumerate(row):
                words = escape(shown(cell))
                if i and j:
                    body += f"<td>{words}</td>"
                else:
                    body += f"<th scope={'row' if i else 'col'}>{words}</th>"
            body += "</tr>\n"
        body += "</table></div></details>"
    run.sections.append(f'<section id="{name}">{body}</section>\n')


TEXTS = {  # how to read each kind of section, and what the paper has of it; as HTML
    "scores": "UAR is the mean of the classes' recalls, however small a class; WAR is the share of "
              "all that are right. Below, of each true class (rows) the number and share taken for "
              "each class (columns), and its recall, the share found. <small>Paper: UAR and WAR of "
              "DFEW 0.6680, 0.7668 (one fold 0.7058, 0.7937), FERV39K 0.4341, 0.5365, MAFW 0.4372, "
              "0.5844, AffectNet-7 0.6545, 0.6550, Tables II, V, VI; recalls of DFEW: happy "
              "0.9476, sad 0.7904, neutral 0.7460, angry 0.7980, surprise 0.6726, disgust 0.2759, "
              "fear 0.4457, Table III; Fig. 7</small>",
    "training-loss": "Mean of each epoch: it falls, then levels off.",
    "mistakes": "Those of the highest probability: doubtful labels and badly cut faces show here.",
    "paths": "A token's path through the experts is its expert of the largest weight in each "
             "layer: the ten most frequent, as wide as their shares. <small>Paper: Fig. 5, latest "
             "version</small>",
    "experts": "The share of a layer's tokens that each expert receives. Layers and experts are "
               "counted from 0. <small>Paper: Fig. 5</small>",
    "heads": "Each head on the other's data, among the classes that both have. <small>Paper: UAR "
             "and WAR of AffectNet-7's head on DFEW 0.4336, 0.4713, on FERV39K 0.3234, 0.3510; on "
             "AffectNet-7 DFEW's 0.4520, 0.4504, FERV39K's 0.5146, 0.5138, Table IX</small>",
    "similarity": "Do both tasks mean the same by a class? Cosine of the mean features of a class "
                  "of clips and one of images: 1 the same, 0 nothing in common. <small>Paper: Fig. "
                  "4</small>",
    "attention": "The first of each class. Orange: what the prediction draws on more than evenly "
                 "(attention rollout). <small>Paper: Fig. 6</small>",
    "reconstructions": "What stage 1 fills in: grey patches are hidden from it. Mean and deviation "
                       "of the predicted ones are the original's.",
    "video": "Below: frames as the model sees them.",
    "image": "As the model sees it, with the probability of each class.",
    "settings": "Settings, data and versions, as the checkpoint records them."}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>
<body><main>{body}</main></body></html>
"""
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
th:first-child { text-align: left }
@media print { @page { size: A4; margin: 15mm } main { display: block }
  section { break-inside: avoid } svg { max-height: 22cm; min-width: 0 !important }
  .scroll { overflow: visible } details:not([open]) { display: none } }
"""


if __name__ == "__main__":
    guarded(main)
