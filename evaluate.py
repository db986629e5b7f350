"""How often a model is right, and everything else that the paper shows of a trained model (Section IV).

The first two parts are the method: `metrics` makes UAR and WAR of a confusion matrix, and `observe` is one pass over a
test set, which predictions, features and experts come from. The rest shows it: a table of numbers is one array in up
to three forms, Markdown that reads well in a terminal, JSON and, with --report, a heat map.

    python evaluate.py --checkpoint runs/dfew/fold1/last.pt                 on the test data of its own fold
    python evaluate.py --dataset dfew --folds runs/dfew/*/last.pt           the five folds' predictions as one
    python evaluate.py --checkpoint runs/dfew/fold1/last.pt --report out    all tables and figures, with an index
    python evaluate.py --checkpoint runs/dfew/fold1/last.pt FILE ...        on videos, images, folders of frames

n samples    v views of one (two clips or one image)    C classes    d token width    L layers with experts, E in each
"""
import argparse
import csv
import io
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms import v2
from tqdm import tqdm

from data import (CATALOGUE, IMAGE_SUFFIXES, OWN_DATA_STRIDE, VIDEO_SUFFIXES, Samples, TestData, catalogue,
                  dataset_name, digests_of, few, fixed_crop, identity_of, load_samples, loader, natural, read_clip,
                  read_image, short_name, shows_clip, to_float)
from model import (IMAGE_MEAN, IMAGE_STD, MASK_RATIO, S4D, MaskedAutoencoder, Size, UserError, at_least_fp32,
                   channel_values, normalised_target, patchify, read_checkpoint, rebuild, same_classes, unnamed)
from pretrain import Formatter, Process, default_workers, guarded, number, path, start

# -------------------------------------------------------------------------------------------- counting: Tables II to IX

def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Counts (C, C): rows are true classes, columns predicted ones."""
    return np.bincount(labels * classes + predictions, minlength=classes ** 2).reshape(classes, classes)


def recalls(confusion: np.ndarray) -> np.ndarray:
    """Of each class the share that is found: (..., C, C) -> (..., C), NaN for a class without samples."""
    with np.errstate(invalid="ignore"):
        return np.diagonal(confusion, axis1=-2, axis2=-1) / confusion.sum(-1)


def metrics(confusion: np.ndarray) -> dict:
    """UAR, WAR, their 95 % intervals, recalls, F1 and the majority-class baseline of a confusion matrix, as fractions.

    A class without samples has no recall (None) and is left out of UAR; one that is not predicted either is left out
    of the macro F1. Intervals are percentiles of 2,000 bootstrap samples: drawing n samples with replacement is drawing
    n of the matrix's cells. UserError if there are no samples at all.
    """
    support, predicted, total = confusion.sum(1), confusion.sum(0), int(confusion.sum())
    if not total:
        raise UserError("no samples to evaluate: UAR and WAR are undefined")
    uar = np.nanmean(recalls(confusion))    # unweighted average recall: every class counts the same, however small
    war = np.trace(confusion) / total       # weighted by the classes' sizes, which makes it the accuracy
    drawn = np.random.default_rng(0).multinomial(total, confusion.ravel() / total, 2000).reshape(-1, *confusion.shape)
    uars, wars = np.nanmean(recalls(drawn), axis=1), np.trace(drawn, axis1=1, axis2=2) / total
    occurs = support + predicted > 0
    f1 = 2 * np.diagonal(confusion) / np.where(occurs, support + predicted, 1)
    return dict(uar=float(uar), war=float(war), recall=listed(recalls(confusion)),
                uar_interval=np.quantile(uars, (0.025, 0.975)).tolist(),
                war_interval=np.quantile(wars, (0.025, 0.975)).tolist(),
                macro_f1=float(f1[occurs].mean()), weighted_f1=float(f1 @ support / total),
                majority_uar=1 / int((support > 0).sum()), majority_war=float(support.max() / total),
                confusion=confusion.tolist(), by_row=listed(confusion / np.where(support, support, np.nan)[:, None]))


def listed(values: np.ndarray) -> list:
    """The same as lists of numbers, None for NaN, as JSON can hold them."""
    return np.where(np.isnan(values), None, values).tolist()


def join_folds(scores: list[dict]) -> dict:
    """DFEW's and MAFW's protocol (Section IV-A): metrics of all folds' predictions as one; beside them the mean of the
    folds' UAR and WAR and the sample standard deviation, which one fold has not (None)."""
    together = metrics(sum(np.array(score["confusion"]) for score in scores))
    for name in ("uar", "war"):
        values = [score[name] for score in scores]
        together[f"{name}_mean"] = float(np.mean(values))
        together[f"{name}_deviation"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return dict(together, folds=scores)


def markdown(columns: list[str], rows: list[list]) -> str:
    """A table that is Markdown and reads well in a terminal. A row begins with its name; None is shown as -."""
    cells = [["-" if cell is None else f"{cell:.4f}" if isinstance(cell, float) else
              str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in [columns, *rows]]
    first, *others = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * first, *("-" * (width - 1) + ":" for width in others)])
    return "\n".join(f"| {row[0]:{first}} | " + " | ".join(map(str.rjust, row[1:], others)) + " |" for row in cells)


def table(scores: dict, classes: tuple[str, ...]) -> str:
    """Scores as text, with the majority baseline, then the confusion matrix with recalls."""
    uar, war = ("{:.4f} ({:.4f} to {:.4f})".format(scores[s], *scores[f"{s}_interval"]) for s in ("uar", "war"))
    rows = [[name, *row, recall] for name, row, recall in zip(classes, scores["confusion"], scores["recall"])]
    never = [name for name, column in zip(classes, zip(*scores["confusion"])) if not any(column)]
    return "\n".join([
        f"UAR {uar}  WAR {war}, with 95 % intervals   macro F1 {scores['macro_f1']:.4f}  weighted F1 "
        f"{scores['weighted_f1']:.4f}",
        f"always the most frequent class: UAR {scores['majority_uar']:.4f}  WAR {scores['majority_war']:.4f}", "",
        markdown(["true \\ predicted", *classes, "recall"], rows),
        *(["", f"never predicted: {', '.join(never)}"] if never else [])])


# --------------------------------------------------------------------------------------------- one pass over a test set

@dataclass
class Observed:
    """What a pass over n samples yields, the same in every process."""
    probabilities: dict[str, np.ndarray]    # of each head, (n, C) float64: the samples' own, and the other's (Table IX)
    features: np.ndarray                    # (n, d) float64: the representation before the heads
    activation: np.ndarray                  # (L, E): tokens that each expert received


def forward(model: S4D, x: torch.Tensor, process: Process) -> dict[str, torch.Tensor]:
    """Of uint8 images or clips the "features" (B, d) and, by head, the probabilities (B, C), float64 on the device."""
    with process.autocast():
        features = model.features(to_float(process.upload(x)))
        logits = {name: head(features) for name, head in model.head.items()}
    return {"features": features.double(), **{name: at_least_fp32(value).double().softmax(-1)
                                              for name, value in logits.items()}}


@torch.no_grad()
def observe(model: S4D, data: TestData, process: Process, workers: int, batch: int = 16) -> Observed:
    """One pass over all samples, which predictions, features and experts come from.

    Clips of a video: softmax of each, then the mean (Section IV-B), and the mean of their features. Batches are fixed
    by the sample order and dealt to the processes, so that nothing is padded or counted twice and the numbers do not
    depend on how many there are. UserError names a sample that cannot be read: none is left out.
    """
    model.eval()
    n, experts, layers = len(data), model.architecture["experts"], model.architecture["moae_layers"]
    widths = [model.size.width, *(head.out_features for head in model.head.values())]
    rows = torch.zeros(n, sum(widths), dtype=torch.float64)
    activation = torch.zeros(len(layers), experts, dtype=torch.float64, device=process.device)
    gates = []
    hooks = [model.blocks[i].moe_layer.router.register_forward_hook(
        lambda module, inputs, output: gates.append(output[1].flatten())) for i in layers]
    chunks = [list(range(i, min(i + batch, n))) for i in range(0, n, batch)][process.rank::process.world]
    for index, views, _ in tqdm(loader(data, workers, batch_sampler=chunks), f"evaluating {data.samples.name}",
                                leave=False, disable=not process.main):
        gates.clear()
        row = torch.cat(list(forward(model, views.flatten(0, 1), process).values()), 1)     # (B v, d + C ...)
        rows[index] = row.unflatten(0, views.shape[:2]).mean(1).cpu()  # here a GPU is waited for
        if gates:
            chosen = torch.stack(gates)                                     # (L, B v N k)
            activation.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float64))
    for hook in hooks:
        hook.remove()
    if process.world > 1:                   # every sample's row is zero in all processes but one
        rows, activation = process.sum(process.upload(rows)).cpu(), process.sum(activation)
    features, *heads = np.split(rows.numpy(), np.cumsum(widths)[:-1], axis=1)
    return Observed(dict(zip(model.head, heads)), features, activation.cpu().numpy())


def evaluate(model: S4D, samples: Samples, process: Process, workers: int, batch: int = 16) -> tuple[dict, Observed]:
    """Metrics of the samples' own head, and the pass that they are from; of equally probable classes the first is
    predicted. UserError if the head's classes are not the samples'."""
    m, classes = samples.modality, list(samples.classes)
    theirs = model.architecture[f"{m}_classes"]
    if not theirs or not same_classes(theirs, classes):
        raise UserError(f"{samples.name} has the {m} classes {classes}, the model {theirs or 'was trained without'}")
    observed = observe(model, TestData(samples, model.size), process, workers, batch)
    return metrics(confusion_matrix(samples.labels, observed.probabilities[m].argmax(1), len(classes))), observed


def gate_statistics(model: S4D, activation: np.ndarray) -> dict[int, dict]:
    """By layer, numbered as in the checkpoint: each expert's share of the layer's assignments, and the coefficient of
    variation of these shares (0 = even). activation: (L, E), as observed."""
    shares = activation / activation.sum(1, keepdims=True)
    return {layer: dict(share=share.round(4).tolist(), cv=round(float(share.std() / share.mean()), 4))
            for layer, share in zip(model.architecture["moae_layers"], shares)}


# ====================================================================================================================
# From here on figures, reports and own media. On a first reading skip them.
# ====================================================================================================================

# --------------------------------------------------------------------------- drawing; skip it unless a picture is wrong

FONT = ImageFont.load_default(13)
LINE = 18                                   # pixels from a line of text to the next
DARK = ((247, 251, 255), (158, 202, 225), (49, 130, 189), (8, 48, 107))  # white to dark blue, for tables
BRIGHT = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis, on grey faces


def text_width(*texts: str) -> int:
    """Of the longest line, in pixels."""
    return max(int(FONT.getlength(line)) for text in texts for line in text.split("\n"))


def colours(values: np.ndarray, ramp: tuple) -> np.ndarray:
    """Colours (..., 3) of values 0 to 1. Lightness changes in one direction only, so that grey prints read the same."""
    places = np.linspace(0, 1, len(ramp))
    return np.stack([np.interp(values, places, channel) for channel in zip(*ramp)], -1)


def heat_map(title: str, columns: list[str], rows: list[list], low: float = 0.0, high: float = 1.0) -> Image.Image:
    """A table, as for `markdown`, drawn. A cell is a number (or None), whose colour runs from `low` to `high`, a text,
    or a picture, uint8 (3, h, w)."""
    def tile(cell) -> Image.Image:
        if isinstance(cell, torch.Tensor):
            return Image.fromarray(cell.permute(1, 2, 0).numpy())
        value = low if cell is None or isinstance(cell, str) else cell
        colour = colours(np.clip((value - low) / ((high - low) or 1), 0, 1), DARK).astype(int).tolist()
        picture = Image.new("RGB", (width, LINE + 10), "white" if isinstance(cell, str) else tuple(colour))
        text = "-" if cell is None else cell if isinstance(cell, str) else f"{cell:.2f}"
        ImageDraw.Draw(picture).text((width / 2, LINE / 2 + 5), text, "white" if sum(colour) < 480 else "black", FONT,
                                     anchor="mm")
        return picture

    rows = [columns, *rows] if columns else rows
    width = max(cell.shape[2] if isinstance(cell, torch.Tensor) else 52 for row in rows for cell in row[1:])
    width = max(width, text_width("", *columns[1:]) + 12)
    tiles = [[tile(cell) for cell in row[1:]] for row in rows]
    heights = [max(picture.height for picture in row) + 2 for row in tiles]
    left, y = text_width(*(row[0] for row in rows)) + 14, LINE * len(title.splitlines()) + 8
    size = max(text_width(title) + 12, left + (width + 2) * max(map(len, tiles))), y + sum(heights)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((6, 4), title, "black", FONT, spacing=LINE - 13)
    for row, pictures, height in zip(rows, tiles, heights):
        draw.text((left - 6, y + height / 2), row[0], "black", FONT, anchor="rm")
        for j, picture in enumerate(pictures):
            sheet.paste(picture, (left + (width + 2) * j, y))
        y += height
    return sheet


def contact_sheet(rows: list[tuple[str, torch.Tensor]], least_height: int = 96, title: str = "") -> Image.Image:
    """Rows of pictures (caption, uint8 (n, 3, h, w)). Small ones are enlarged by a whole number until they are at least
    `least_height` high, without smoothing: what a model sees is shown pixel by pixel."""
    enlarged = []
    for caption, pictures in rows:
        times = -(-least_height // pictures.shape[-2])
        enlarged.append([caption, *pictures.repeat_interleave(times, -1).repeat_interleave(times, -2)])
    return heat_map(title, [], enlarged)


# --------------------------------------------------- what a command prints and writes; skip it unless a file is missing

def files_of(folder: Path) -> set[str]:
    """What an earlier command has written there, as its evaluation.json lists it."""
    try:
        return {Path(name).name for name in json.loads((folder / "evaluation.json").read_text())["files"]}
    except (OSError, ValueError, LookupError, TypeError):  # none, or somebody else's
        return set()


def brief(samples: Samples) -> str:
    """A data set's name in files and captions; lists of one's own clips and images may both be called train.csv."""
    return samples.name if samples.name in CATALOGUE else f"{samples.modality}s-{short_name(samples.name)[:40]}"


def prediction_rows(samples: Samples, probabilities: np.ndarray) -> list[list]:
    """Of each sample its name, its class (empty for own media), the predicted one, and all probabilities."""
    return [[os.fsdecode(name), samples.classes[label] if label >= 0 else "", samples.classes[row.argmax()],
             *row.tolist()] for name, label, row in zip(samples.names.tolist(), samples.labels, probabilities)]


class Report:
    """What a command says and, at its end, writes: all of it or nothing. Only the first process does either."""

    def __init__(self, args, process: Process, folder: Path, title: str):
        self.args, self.process, self.folder = args, process, folder
        self.lines, self.results, self.files = [f"# {title}"], {}, {}

    def say(self, title: str, text: str) -> None:
        self.lines += [f"## {title}", text]
        if self.process.main:
            print(f"\n{title}\n{text}", flush=True)

    def warn(self, text: str) -> None:
        self.lines += [f"**Warning:** {text}"]
        if self.process.main:
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def table(self, name: str, title: str, columns: list[str], rows: list[list], **colours) -> None:
        """One array in up to three forms: Markdown, JSON and, with --report and where colours are given, a heat map."""
        if not rows:
            return
        self.say(title, markdown(columns, rows))
        self.results[name] = dict(columns=columns, rows=rows)
        if self.args.report and colours:
            self.picture(name, lambda: heat_map(title, columns, rows, **colours))

    def picture(self, name: str, draw) -> None:
        """Keep the picture that draw() returns."""
        if self.process.main:
            png = io.BytesIO()
            draw().save(png, "PNG", optimize=True)
            self.files[f"{name}.png"] = png.getvalue()
            self.lines += [f"![{name}](<{name}.png>)"]

    def predictions(self, name: str, classes: tuple[str, ...], rows: list[list]) -> None:
        """A line of CSV per sample. rows: as of `prediction_rows`."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([["sample", "label", "prediction", *classes], *(
            [f"{cell:.6f}" if isinstance(cell, float) else cell for cell in row] for row in rows)])
        self.files[f"{name}.csv"] = text.getvalue().encode("utf-8", "surrogateescape")
        self.lines += [f"[{name}](<{name}.csv>)"]

    def scores(self, title: str, samples: Samples, scores: dict, rows: list[list], prefix: str = "") -> None:
        """A data set's scores in every form."""
        classes, name = samples.classes, prefix + brief(samples)
        self.say(title, table(scores, classes))
        self.results[prefix + samples.name] = dict(scores, classes=classes, fold=samples.fold, samples=len(rows))
        self.predictions(f"predictions-{name}", classes, rows)
        if self.args.report:
            self.picture(f"confusion-{name}", lambda: heat_map(
                f"Fig. 7, {title}\nUAR {scores['uar']:.4f}, WAR {scores['war']:.4f}; shares of each true class (row)",
                ["", *classes], [[c, *row] for c, row in zip(classes, scores["by_row"])]))

    def close(self) -> None:
        """Write everything beside its place, then rename it; remove what an earlier command wrote and this one not."""
        if not self.process.main:
            return
        if self.args.report:
            text = "\n\n".join([*self.lines, "All numbers: [evaluation.json](evaluation.json)"])
            self.files["README.md"] = text.encode("utf-8", "surrogateescape")
        stale = files_of(self.folder) - self.files.keys()
        self.files["evaluation.json"] = json.dumps(dict(self.results, files=sorted(self.files)), indent=1).encode()
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part", dir=self.folder) as part:
            for name, content in self.files.items():
                Path(part, name).write_bytes(content)
            for name in stale:
                (self.folder / name).unlink(missing_ok=True)
            for name in self.files:
                os.replace(Path(part, name), self.folder / name)
        print(f"\nwritten to {os.path.relpath(self.folder)}")


# -------------------------------------------------- the paper's figures, with --report; skip those that you do not show

SAME_CLASS = {"happiness": "happy", "sadness": "sad", "anger": "angry"}  # the data sets spell them differently


def shared_classes(ours: list[str], theirs: list[str]) -> tuple[list[int], list[int]]:
    """Label numbers, in `ours` and in `theirs`, of the classes that both have, in our order."""
    ours, theirs = ([SAME_CLASS.get(name, name) for name in names] for names in (ours, theirs))
    both = [name for name in ours if name in theirs]
    return [ours.index(name) for name in both], [theirs.index(name) for name in both]


def cross_task(samples: Samples, probabilities: np.ndarray, classes: list[str]) -> dict | None:
    """Table IX: the other task's head on these samples, among the classes that both have; None if they share none.

    probabilities: (n, C') of the head whose classes are given. The paper does not say how one task's head sees the
    other's data; here a head takes the representation of either, an image's of one time slot, a video's of clips.
    """
    ours, theirs = shared_classes(samples.classes, classes)
    kept = np.isin(samples.labels, ours)
    if not kept.any():
        return None
    labels, predictions = np.searchsorted(ours, samples.labels[kept]), probabilities[kept][:, theirs].argmax(1)
    return dict(metrics(confusion_matrix(labels, predictions, len(ours))), samples=int(kept.sum()),
                classes=[samples.classes[i] for i in ours])


def class_centres(features: np.ndarray, labels: np.ndarray, classes: int) -> torch.Tensor:
    """Mean features (C, d) of each class, NaN for a class without samples."""
    return torch.stack([torch.from_numpy(features[labels == c]).mean(0) for c in range(classes)])


def report_tasks(report: Report, model: S4D, tested: dict, seen: dict[str, Observed], prefix: str) -> None:
    """Each head on the other's data, which experts both data sets use, and their class centres."""
    heads, experts = [], []
    for m, samples in tested.items():
        other, name = "image" if m == "video" else "video", brief(samples)
        if scores := cross_task(samples, seen[m].probabilities.get(other), model.architecture[f"{other}_classes"]):
            report.results[prefix + samples.name][f"{other}_head"] = scores
            heads.append([f"{other} head on {name}", scores["uar"], scores["war"], scores["samples"]])
        experts += [[f"{name}, layer {layer}", *gate["share"]]
                    for layer, gate in gate_statistics(model, seen[m].activation).items()]
    report.table(f"{prefix}heads", "Table IX: each head on the other task's data, among the classes that both have",
                 ["", "UAR", "WAR", "samples"], heads)
    report.table(f"{prefix}experts", "Fig. 5: share of a layer's assignments that each expert receives, counted "
                 "from 0, as layers are in the checkpoint",
                 ["", *map(str, range(model.architecture["experts"]))], experts, high=1 / model.architecture["k"])
    if len(tested) == 2:
        clips, images = tested["video"], tested["image"]
        order = shared_classes(clips.classes, images.classes)[1]            # so that the same classes are a diagonal
        order += [j for j in range(len(images.classes)) if j not in order]
        rows, columns = (class_centres(seen[part.modality].features, part.labels, len(part.classes))
                         for part in (clips, images))
        similarity = F.cosine_similarity(rows[:, None], columns[None, order], dim=-1).numpy()
        report.table(f"{prefix}similarity", f"Fig. 4: cosine similarity of class centres, {brief(clips)} (rows) and "
                     f"{brief(images)} (columns)", ["", *(images.classes[j] for j in order)],
                     [[c, *row] for c, row in zip(clips.classes, listed(similarity))], low=np.nanmin(similarity))


@torch.no_grad()
def attention(model: S4D, x: torch.Tensor, process: Process) -> torch.Tensor:
    """What the mean over the tokens draws on, uint8 images or clips -> (B, time slots, rows, columns); 1 = even spread.

    Attention rollout (Abnar and Zuidema, 2020): from the last layer to the first, a token passes half of what it
    contributes on by attention, mean over the heads, and keeps half, as residuals do. The paper names no method.
    """
    weights = []
    hooks = [block.attn.register_forward_hook(lambda module, inputs, output: weights.append(
        module.weights(inputs[0]).mean(1))) for block in model.blocks]      # (B, N, N) of each layer
    forward(model, x, process)
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


def attention_sheet(models: dict[str, S4D], samples: Samples, process: Process) -> Image.Image:
    """Fig. 6, a row per class: frames of its first clip, or its first images, then each model's attention to them."""
    rows, clips = [], samples.modality == "video"
    for label in np.unique(samples.labels):
        index, pictures = np.flatnonzero(samples.labels == label)[:1 if clips else 3], []
        for model in models.values():
            data = TestData(samples, model.size)
            x = torch.stack([data[i][1][0] for i in index])                 # (1, T, 3, H, W) or (3, 3, H, W)
            received = attention(model, x, process)[:, ::2]                 # of a clip every other time slot
            x = x[:, ::2 * model.size.tubelet] if clips else x[:, None]
            heat = [heat_on(*pair) for pair in zip(x, received)]
            pictures += heat if pictures else [x.flatten(0, 1), *heat]
        rows.append((samples.classes[label], torch.cat(pictures)))
    return contact_sheet(rows, title="\n".join([
        f"Fig. 6, {brief(samples)}: the first of each class, then, from left to right, the attention of", *models,
        "dark: an even spread over the tokens, or less; bright: the most"]))


def unpatchify(patches: torch.Tensor, size: Size) -> torch.Tensor:
    """The inverse of patchify, as uint8 frames: (B, N, P) -> (B, T, 3, H, W); an image has T = tubelet equal frames."""
    side, p = size.pixels // size.patch, size.patch
    x = patches.unflatten(1, (-1, side, side)).unflatten(-1, (size.tubelet, p, p, 3))
    x = x.permute(0, 1, 4, 7, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(1, 2)
    mean, std = (channel_values(values, x.device).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    return (255 * (x * std + mean)).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def reconstruct(model: MaskedAutoencoder, x: torch.Tensor, ratio: float, process: Process) -> tuple:
    """Original, masked and reconstructed frames, a list of uint8 (B, T, 3, H, W); the loss, and that of the mean patch.

    The model predicts patches normalised by their own mean and deviation (as released), which are borrowed from the
    original for display. The mean patch predicts 0 everywhere.
    """
    torch.manual_seed(0)
    with process.autocast():
        x = to_float(process.upload(x))
        loss, pred, hidden = model(x, mask_ratio=ratio)
    patches, pred, hidden = patchify(x, model.size).cpu(), at_least_fp32(pred).cpu(), hidden.cpu()
    target, mean, deviation = normalised_target(patches[hidden].unflatten(0, (len(x), -1)))
    masked, pasted = patches.clone(), patches.clone()
    masked[hidden] = 0
    pasted[hidden] = (pred.unflatten(-1, (-1, 3)) * deviation + mean).flatten(2).flatten(0, 1)
    return [unpatchify(p, model.size) for p in (patches, masked, pasted)], loss.item(), target.square().mean().item()


def report_reconstructions(report: Report, file: Path, checkpoint: dict) -> None:
    """A stage-1 checkpoint on --dataset, or on what it was trained on: on test samples, where there are some."""
    if checkpoint["stage"] != "pretrain":
        raise UserError(f"{file} is of stage 2: only stage 1 reconstructs")
    model, rows = rebuild(checkpoint, file).to(report.process.device).eval(), []
    for name in tested_sets(report.args, file, checkpoint):
        samples = load_test(report, file, checkpoint, name)
        data, m = TestData(samples, model.size), samples.modality
        data.fit = v2.Compose([partial(fixed_crop, box=samples.crop), data.fit])  # as stage 1 cuts them
        index = np.unique(np.linspace(0, len(samples) - 1, 32).round().astype(int))
        ratio = checkpoint.get("identity", {}).get(f"{m}_mask_ratio", MASK_RATIO[m])
        x = torch.stack([data[i][1][0] for i in index])
        frames, loss, mean_patch = reconstruct(model, x, ratio, report.process)
        rows.append([brief(samples), f"{ratio:.0%}", len(index), loss, mean_patch])
        shown = [x[::4, 0][None] if m == "image" else x[:2, ::model.size.tubelet] for x in frames]
        pictures = [pair for group in zip(*shown) for pair in zip(("original", "masked", "reconstructed"), group)]
        report.picture(f"reconstruction-{m}s", partial(contact_sheet, pictures, title=(
            f"Stage 1 on {brief(samples)}; the predicted patches' mean and deviation are borrowed from the original")))
    report.table("reconstruction", f"Reconstructions of {file}; mean patch: the loss of flat patches",
                 ["", "masked", "samples", "loss", "mean patch"], rows)


# ------------------------------------------------------------------ own images and videos; skip it unless you have some

def media_files(file: Path, left_out: list[Path]) -> list[Path]:
    """The images and clips that a path stands for, in natural order; what its suffix excludes is added to `left_out`.

    A folder of images, without videos, animations and folders, is one clip, as in the data sets; of any other folder,
    everything is taken whose suffix is an image's or a video's, and every folder. UserError if that is nothing.
    """
    if not file.is_dir():
        if not file.is_file():
            raise UserError(f"{file} is {'no regular file' if file.exists() else 'not there'}")
        return [file]
    if os.path.realpath(file) in map(os.path.realpath, Path(os.path.abspath(file)).parents):
        raise UserError(f"{file} is a link to a folder that it lies in")
    inside = [entry for entry in file.iterdir() if not entry.name.startswith(".")]
    inside.sort(key=lambda entry: natural(entry.name))
    media = [entry for entry in inside if entry.is_dir() or entry.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES]
    if not media:
        raise UserError(f"{file} holds neither images nor videos ({', '.join(IMAGE_SUFFIXES + VIDEO_SUFFIXES)})")
    left_out += sorted(set(inside) - set(media))
    if not any(entry.is_dir() or shows_clip(entry) for entry in media):
        return [file]
    return [found for entry in media for found in media_files(entry, left_out)]


def media_data(files: list[Path], m: str, classes: list[str], size: Size, stride: int, crop: list | None) -> TestData:
    """Files as test samples without labels: read, sampled and resized exactly as those of a data set."""
    names = np.array([os.fsencode(file) for file in files])
    data = TestData(Samples("own media", m, tuple(classes), Path(), names, np.full(len(files), -1), stride), size)
    if crop:
        left, top, width, height = crop
        data.fit = v2.Compose([partial(v2.functional.crop, top=top, left=left, height=height, width=width), data.fit])
    return data


@torch.no_grad()
def report_time(report: Report, model: S4D, data: TestData, file: Path, total: int, name: str, most: int = 48) -> None:
    """The course of each class in a video of `total` frames: W clips, at most so many, slide over it, each is shown by
    its middle frame, and below these stands a heat map of classes x time."""
    every = np.arange(0, total, data.samples.stride)
    starts = np.unique(np.linspace(0, len(every) - data.frames, most).round().astype(int))
    wanted = every[starts[:, None] + np.arange(data.frames)]                # (W, T)
    clips = read_clip(file, lambda n: wanted.ravel().tolist(), data.fit).unflatten(0, wanted.shape)
    course = torch.cat([forward(model, part, report.process)["video"] for part in clips.split(8)]).tolist()  # (W, C)
    middle, rows = wanted[:, data.frames // 2].tolist(), []
    frames = v2.functional.resize(clips[:, data.frames // 2], [72, 72])
    report.results[name] = dict(file=str(file), columns=["frame", *data.samples.classes],
                                rows=[[number, *p] for number, p in zip(middle, course)])
    for part in (slice(i, i + 16) for i in range(0, len(frames), 16)):
        rows += [["", *frames[part]], ["frame", *map(str, middle[part])]]
        rows += [[c, *p] for c, p in zip(data.samples.classes, zip(*course[part]))]
    report.picture(name, lambda: heat_map(f"{file.name}: probabilities in {data.frames} frames at stride "
                                          f"{data.samples.stride}, shown by the middle one", [], rows))


def report_media(report: Report, model: S4D, checkpoint: dict, media: list[Path]) -> None:
    """Predictions for the user's own files, and their course in videos that are longer than a clip."""
    args, crop, left_out, lengths = report.args, report.args.crop, [], {}
    files = [found for file in media for found in media_files(file, left_out)]
    if left_out:
        report.warn(f"left out, as their suffix is no image's and no video's: {few(left_out)}")
    for m in ("image", "video"):
        mine = [file for file in files if (file.is_dir() or shows_clip(file)) == (m == "video")]
        classes = model.architecture[f"{m}_classes"]
        if mine and not classes:
            raise UserError(f"{mine[0]} is {m} data, which this model was trained without")
        for file in mine:                   # what cannot be used is named before any work
            first = read_image(file) if m == "image" else read_clip(file, lambda n: lengths.update({file: n}) or [0])[0]
            height, width = first.shape[1:]
            if crop and (crop[0] + crop[2] > width or crop[1] + crop[3] > height or 0 in crop[2:]):
                raise UserError(f"{file}, {width} x {height} pixels, does not hold --crop {crop} (x, y, width, height)")
        stride = checkpoint.get("identity", {}).get("video stride", OWN_DATA_STRIDE)
        if not mine:
            continue
        data = media_data(mine, m, classes, model.size, stride, crop)
        seen = observe(model, data, report.process, args.workers, args.batch_size)
        rows = prediction_rows(data.samples, seen.probabilities[m])
        note = f", two clips of {data.frames} frames at stride {stride} each" if m == "video" else ""
        report.table(f"own {m}s", f"Own {m}s: {len(mine)}{note}", ["sample", "label", "prediction", *classes], rows)
        report.predictions(f"{m}s", classes, rows)
        for i, file in enumerate(mine):
            if report.process.main and lengths.get(file, 0) > data.frames * stride:
                report_time(report, model, data, file, lengths[file], f"time-{i + 1}-{file.stem[:40]}")


# ----------------------------------------------------------------------- the command; skip it unless an option is wrong

def tested_sets(args, file: Path, checkpoint: dict) -> list[str]:
    """--dataset, or what a checkpoint was trained on, videos first. UserError if it does not say that."""
    names = [checkpoint.get("identity", {}).get(key, "none") for key in ("dataset", "image_dataset")]
    names = [args.dataset] if args.dataset else [name for name in names if name not in ("none", "frames")]
    if not names:
        raise UserError(f"{file} does not say what it was trained on: give --dataset, and --fold")
    return names


def load_test(report: Report, file: Path, checkpoint: dict, name: str) -> Samples:
    """A data set's test samples, with --fold, or else the fold and the stride of training. Warns if they are not those
    that training recorded, or were trained on. With --folds the latter is a UserError, as are folds of another set."""
    args, identity, dataset = report.args, checkpoint.get("identity", {}), catalogue(name)
    fold = identity.get("fold", 1) if dataset.folds > 1 else 1
    if args.fold and (args.dataset or dataset.folds > 1):
        fold = args.fold
    if args.folds and name not in (names := (identity.get("dataset"), identity.get("image_dataset"))):
        raise UserError(f"{file} was trained on {names[0]} and {names[1]}, not on {name}")
    # Another set of the catalogue has a stride of its own; one's own single list has no test part.
    stride = identity.get("video stride") if name == identity.get("dataset") or name not in CATALOGUE else None
    samples = load_samples(name, args.data_root, "test" if name in CATALOGUE or "," in name else "train", fold, stride)
    then, now = identity.get(f"test {samples.modality}", ""), identity_of(samples)
    # With --validation, what training tested on is a part of its own fold.
    if then.startswith(f"{samples.name}, fold {fold}, ") and then != now and not identity.get("validation"):
        report.warn(f"these are not the test samples that {file} recorded: {now}; recorded: {then}")
    if known := np.isin(digests_of(samples), checkpoint.get("digests", {}).get(samples.modality, [])).sum():
        text = f"{file} was trained on {known} of the {len(samples)} test samples of {name}, fold {fold}"
        if args.folds:
            raise UserError(text)
        report.warn(text)
    return samples


def fine_tuned(report: Report, file: Path, checkpoint: dict) -> S4D:
    """The model of a stage-2 checkpoint; a released file does not name its classes: they are those of --dataset."""
    model = rebuild(checkpoint, file)
    if not isinstance(model, S4D):
        raise UserError(f"{file} is a stage-1 checkpoint of pretrain.py: it reconstructs pixels and has no classes; "
                        "fine-tune it first (finetune.py --pretrained), or give --report alone")
    if report.args.dataset:
        _, modality, classes, *_ = catalogue(report.args.dataset)
        if model.architecture[f"{modality}_classes"] == unnamed(len(classes)):
            model.architecture[f"{modality}_classes"] = list(classes)
    return model.to(report.process.device).eval()


def report_folds(report: Report, checkpoints: list[tuple[Path, dict]]) -> None:
    """DFEW's and MAFW's protocol (Section IV-A). UserError unless there is one checkpoint of each fold, and none was
    trained on its test data, before anything is computed."""
    args, name, scores, shown, rows = report.args, report.args.dataset, [], [], []
    tests = sorted([(load_test(report, *pair, name), *pair) for pair in checkpoints], key=lambda test: test[0].fold)
    folds, wanted = [samples.fold for samples, _, _ in tests], [*range(1, catalogue(name).folds + 1)]
    if folds != wanted:
        raise UserError(f"--folds expects one checkpoint of each fold of {name}, {wanted}: these are of folds {folds}")
    for samples, file, checkpoint in tests:
        model = fine_tuned(report, file, checkpoint)
        score, seen = evaluate(model, samples, report.process, args.workers, args.batch_size)
        scores.append(dict(score, fold=samples.fold, samples=len(samples), checkpoint=str(file)))
        shown.append([f"fold {samples.fold}", score["uar"], score["war"], len(samples), str(file)])
        rows += prediction_rows(samples, seen.probabilities[samples.modality])
    together, title = join_folds(scores), f"{brief(samples)}, {len(folds)} folds"
    shown += [[what, together[f"uar_{what}"], together[f"war_{what}"], None, None] for what in ("mean", "deviation")]
    report.table("folds", f"{title}, each by itself", ["", "UAR", "WAR", "samples", "checkpoint"], shown)
    report.scores(f"{title} concatenated", samples, together, rows)


def report_checkpoints(report: Report, checkpoints: list[tuple[Path, dict]]) -> None:
    """Fine-tuned checkpoints: own media, or the test data and, for a report, everything else."""
    args, models, firsts = report.args, {}, {}
    for i, (file, checkpoint) in enumerate(checkpoints):
        model = models[f"{i + 1}: {file}"] = fine_tuned(report, file, checkpoint)
        if args.media and not args.report:
            return report_media(report, model, checkpoint, args.media)
        tested, seen, prefix = {}, {}, f"{i + 1}-" if i else ""
        epoch = f" after epoch {checkpoint['state']['epoch']}" if "state" in checkpoint else ""
        for name in tested_sets(args, file, checkpoint):
            samples = load_test(report, file, checkpoint, name)
            scores, observed = evaluate(model, samples, report.process, args.workers, args.batch_size)
            tested[samples.modality], seen[samples.modality] = samples, observed
            fold = f", fold {samples.fold}" if catalogue(name).folds > 1 else ""
            report.scores(f"{brief(samples)}{fold}: {len(samples)} test samples, {file}{epoch}", samples, scores,
                          prediction_rows(samples, observed.probabilities[samples.modality]), prefix)
        if args.report:
            report_tasks(report, model, tested, seen, prefix)
        firsts = firsts or tested
    if not args.report:
        return
    for modality, samples in firsts.items():
        report.picture(f"attention-{modality}s", partial(attention_sheet, models, samples, report.process))
    (_, checkpoint), model = checkpoints[0], next(iter(models.values()))
    pretrained = checkpoint.get("identity", {}).get("pretrained", "none")
    try:
        report_reconstructions(report, pretrained, read_checkpoint(pretrained))
    except UserError as error:
        report.warn(f"left out, reconstructions of stage 1 (trained with --pretrained {pretrained}): {error}")
    if args.media or "video" in firsts:
        report_media(report, model, checkpoint, args.media or [firsts["video"].path(0)])


def box(text: str) -> tuple[int, ...]:
    """A type for argparse: x,y,w,h in pixels."""
    x, y, width, height = map(number(int, 0), text.split(","))
    return x, y, width, height


def settings() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    p.add_argument("media", type=path, nargs="*", metavar="FILE", help="own image, video, folder of frames or of these")
    models, results = p.add_mutually_exclusive_group(required=True), p.add_mutually_exclusive_group()
    models.add_argument("--checkpoint", type=path, action="append", help="best.pt or last.pt of finetune.py; of two "
                        "both are shown; with --report also last.pt of pretrain.py")
    models.add_argument("--folds", type=path, nargs="+", metavar="CHECKPOINT", help="one of each fold of --dataset")
    p.add_argument("--dataset", type=dataset_name(), help="data set to test on (those of training)")
    p.add_argument("--fold", type=number(int, 1), help="its fold (the checkpoint's)")
    p.add_argument("--crop", type=box, metavar="X,Y,W,H", help="the face in FILE, in pixels (the whole picture)")
    results.add_argument("--report", type=path, metavar="FOLDER", help="for all tables and figures, with an index")
    results.add_argument("--output", type=path, metavar="FOLDER", help="for tables (the checkpoint's name, beside it)")
    p.add_argument("--data-root", type=path, default=Path("data"), help="folder of all data sets (layouts: README)")
    p.add_argument("--batch-size", type=number(int, 1), default=16, help="samples that one process computes at once")
    p.add_argument("--workers", type=number(int, 0), default=default_workers(), help="loading processes per process")
    return p


def main() -> None:
    p = settings()
    args = p.parse_args()
    if sys.stdout:                          # None: closed
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files that are no UTF-8
    files = args.checkpoint or args.folds
    if args.checkpoint and len(files) > (1 if args.media else 2):
        p.error("expected --checkpoint once, or twice without FILE")
    if args.folds and (args.media or args.fold or not args.dataset):
        p.error("--folds expects --dataset, and neither FILE nor --fold")
    if args.crop and not args.media:
        p.error("--crop cuts the face out of FILE, which is missing")
    # Results of last.pt and best.pt, of folds and of own media stay apart.
    folder = args.report or args.output or Path(
        os.path.commonpath([file.parent.absolute() for file in files]), "folds" if args.folds else "",
        "-".join(dict.fromkeys(file.stem for file in files)), "media" if args.media else "")
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not there.is_dir() or not os.access(there, os.W_OK):
        p.error(f"{there} is no folder that results can be written to")
    if args.report and (folder / "README.md").exists() and "README.md" not in files_of(folder):
        p.error(f"--report {folder}: the README.md there is not a report's; give another folder")
    checkpoints = [(file, read_checkpoint(file)) for file in files]
    for _, checkpoint in checkpoints:       # moments, twice as large as the weights
        checkpoint.pop("optimizer", None)
    process = start(checkpoints[0][1]["architecture"].get("size", "base"))
    report = Report(args, process, folder, f"What {', '.join(map(str, files))} can do")
    if args.folds:
        report_folds(report, checkpoints)
    elif checkpoints[0][1]["stage"] == "pretrain" and args.report and len(files) == 1 and not args.media:
        report_reconstructions(report, *checkpoints[0])
    else:
        report_checkpoints(report, checkpoints)
    report.close()


if __name__ == "__main__":
    guarded(main)
