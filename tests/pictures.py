"""Draws the pictures of the README and of the lesson from what the README's first command left.

    python tests/pictures.py        writes all of tests/pictures but speed, which is benchmark.py's

Photographs and frames are PNG, charts and drawings SVG.
"""
import html
import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

from data import TestData, load_samples, to_float  # noqa: E402
from evaluate import grid, picture, reconstruct  # noqa: E402
from model import load_checkpoint  # noqa: E402
from pretrain import TINY, start  # noqa: E402

FOLDER = ROOT / "tests/pictures"
STAGE_1 = "runs/pretrain-synthetic/last.pt"
STAGE_2 = "runs/synthetic/fold1/last.pt"
BLUE, PALE, ORANGE, CREAM, GREY, ASHEN = "#3182bd", "#deebf7", "#d95f0e", "#fee8c8", "#bdbdbd", "#f0f0f0"
SIZE = 16                                   # of letters, in pixels: that of the text around the picture


# --------------------------------------------------------------------------------------------------------------- SVG

def text(x: float, y: float, words: str, anchor: str = "middle", colour: str = "black") -> str:
    """One line whose middle is at height y; "start", "middle" or "end" of it is at x."""
    return (f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" dominant-baseline="central" fill="{colour}">'
            f"{html.escape(words)}</text>")


def box(x: float, y: float, width: float, height: float, words: str = "", fill: str = PALE, line: str = BLUE,
        more: str = "") -> str:
    """A rectangle with a line of text in its middle."""
    frame = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="{line}" {more}/>'
    return frame + (text(x + width / 2, y + height / 2, words) if words else "")


def path(*points: tuple[float, float], colour: str = BLUE, arrow: bool = True) -> str:
    """A line through points, with an arrow's head at its end."""
    corners = " ".join(f"{x:g},{y:g}" for x, y in points)
    head = f' marker-end="url(#{colour[1:]})"' if arrow else ""
    return f'<polyline points="{corners}" fill="none" stroke="{colour}" stroke-width="1.5"{head}/>'


def plus(x: float, y: float) -> str:
    return f'<circle cx="{x:g}" cy="{y:g}" r="15" fill="{PALE}" stroke="{BLUE}"/>' + text(x, y, "+")


def drawing(width: int, height: int, title: str, parts: list[str]) -> str:
    """A whole file, on white, as a page may be dark."""
    heads = "".join(f'<marker id="{colour[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
                    f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8z" fill="{colour}"/></marker>'
                    for colour in (BLUE, ORANGE, GREY))
    body = "\n".join(parts)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="sans-serif" font-size="{SIZE}" role="img">\n'
            f"<title>{html.escape(title)}</title>\n<defs>{heads}</defs>\n"
            f'<rect width="{width}" height="{height}" fill="white"/>\n{body}\n</svg>\n')


def curves(title: str, below: str, x: tuple, lines: dict[str, list[tuple[float, float]]]) -> str:
    """Lines over x, which doubles from step to step, each a label with (mean, half-width of its band) in per cent."""
    left, right, bottom, one = 60, 700, 350, 3.6                            # pixels; `one` is that of a per cent
    places = [left + 40 + 140 * math.log2(value / x[0]) for value in x]
    parts = [text(left, 16, title, "start"), text((left + right) / 2, bottom + 46, below)]
    for value in range(20, 101, 20):
        y = bottom - one * (value - 20)
        parts += [path((left, y), (right, y), colour=GREY, arrow=False), text(left - 8, y, str(value), "end")]
    for place, value in zip(places, x):
        parts.append(text(place, bottom + 20, str(value)))
    for (label, points), colour, gap in zip(lines.items(), (BLUE, ORANGE), (-20, 24)):
        upper = [(place, bottom - one * (mean + half - 20)) for place, (mean, half) in zip(places, points)]
        middle = [(place, bottom - one * (mean - 20)) for place, (mean, half) in zip(places, points)]
        lower = [(place, bottom - one * (mean - half - 20)) for place, (mean, half) in zip(places, points)]
        corners = " ".join(f"{place:.1f},{y:.1f}" for place, y in upper + lower[::-1])
        parts.append(f'<polygon points="{corners}" fill="{colour}" fill-opacity="0.2"/>')
        parts.append(path(*middle, colour=colour, arrow=False))
        parts += [f'<circle cx="{place:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for place, y in middle]
        place, y = middle[2]
        parts.append(text(place + gap, y + gap, label, "end" if gap < 0 else "start", colour))
    return drawing(720, 410, title, parts)


# ---------------------------------------------------------------------------------------------------------- pictures

def token_picture(face: torch.Tensor, patch: int, row: int, column: int, gates: list[float]) -> str:
    """The way of one token through a layer with experts. face: uint8 (3, H, W), of which the token is the patch in that
    row and column. gates: the weight of every expert, 0 for those that were not chosen."""
    middle, top, step = 250, 172, 34                                        # the token's height; the first adapter's
    zoom = 144 / face.shape[-1]
    side = zoom * patch
    parts = [
        picture(face, 8, middle - 72, 144),
        box(8 + side * column, middle - 72 + side * row, side, side, "", "none", "white", 'stroke-width="3"'),
        text(8, middle + 92, f"token {row * (face.shape[-1] // patch) + column}", "start"),
        # Eq. (10)
        path((152, middle), (190, middle)), text(166, middle - 14, "x"),
        box(191, middle - 28, 70, 56), text(226, middle - 11, "LN"), text(226, middle + 11, "MHSA"),
        path((261, middle), (281, middle)), plus(297, middle), text(297, middle - 30, "(10)"),
        path((174, middle), (174, middle + 56), (297, middle + 56), (297, middle + 17)),
        path((312, middle), (342, middle)), text(324, middle - 14, "x'"),
        box(343, middle - 18, 36, 36, "LN"),
        # Eqs. (11) to (13)
        path((379, middle), (396, middle), (396, 28), (549, 28)),
        box(550, 8, 130, 40, "FFN   (11)"),
        path((680, 28), (806, 28), (806, middle - 17)), text(782, 14, "x_g"),
        box(412, 64, 334, 376, fill="white", more='stroke-dasharray="6 4" rx="8"'),
        text(424, 82, "MoAE", "start"),
        path((327, middle), (327, 458), (806, 458), (806, middle + 17)),
        path((746, middle), (789, middle)), text(768, middle - 14, "x_s"), text(768, middle + 22, "(12)"),
        plus(806, middle), text(844, middle + 22, "(13)"),
        path((821, middle), (868, middle)), text(844, middle - 14, "x_o"),
        # Eqs. (4) to (6)
        path((396, 122), (431, 122)),
        box(432, 98, 224, 48, fill=CREAM), text(544, 111, "gate: scores (4), noise (5),"),
        text(544, 132, "the best k = 2 (6)"),
    ]
    last = top + step * (len(gates) - 1)
    parts.append(path((396, middle), (396, last), colour=GREY, arrow=False))
    parts.append(path((592, 146), (592, last), colour=ORANGE, arrow=False))
    # Eq. (8), and Eqs. (7) and (9), the sum
    for number, gate in enumerate(gates):
        y = top + step * number
        colour = BLUE if gate else GREY
        parts.append(path((396, y), (431, y), colour=colour))
        parts.append(box(432, y - 13, 140, 26, f"adapter {number}   (8)" if gate else f"adapter {number}",
                         PALE if gate else ASHEN, colour))
        parts.append(path((572, y), (584, y), colour=colour, arrow=False))
        parts.append(f'<circle cx="592" cy="{y}" r="8" fill="{CREAM}" stroke="{ORANGE}"/>' + text(592, y, "×"))
        parts.append(text(606, y, f"{gate:.3f}" if gate else "0", "start", "black" if gate else "#767676"))
        if gate and y < middle - 15:
            parts.append(path((652, y), (708, y), (708, middle - 17)))
        elif gate and y > middle + 15:
            parts.append(path((652, y), (708, y), (708, middle + 17)))
        elif gate:
            parts.append(path((652, y), (672, y), (672, middle), (691, middle)))
    chosen = [top + step * number for number, gate in enumerate(gates) if gate]
    parts.append(path((396, 28), (396, max(*chosen, middle)), arrow=False))  # over the grey lines
    parts += [plus(708, middle), path((723, middle), (746, middle), arrow=False), text(716, middle + 34, "(7), (9)")]
    return drawing(880, 474, "One token's way through a layer with experts", parts)


def token() -> str:
    """token_picture with the gates that the first command's model gives a token about the mouth of a test image."""
    model = load_checkpoint(STAGE_2).eval()
    size, seen = model.size, []
    face = TestData(load_samples("synthetic-images", "data", "test"), size)[1][1]  # (1, 3, H, W)
    hook = model.blocks[-1].moe_layer.router.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        model(to_float(face))
    hook.remove()
    cells = size.pixels // size.patch
    row, column = 2 * cells // 3, cells // 2
    weights, chosen = (part.flatten(0, -2)[row * cells + column] for part in seen[0])  # (k,) each
    gates = torch.zeros(model.architecture["experts"]).scatter(0, chosen, weights.float())
    return token_picture(face[0], size.patch, row, column, gates.tolist())


def sheet(rows: dict[str, torch.Tensor], zoom: int = 1) -> Image.Image:
    """Rows of frames, label: uint8 (n, 3, h, w). Each pixel becomes zoom x zoom."""
    font, left = ImageFont.load_default(SIZE), 120
    frames = [part.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2) for part in rows.values()]
    n, _, height, width = frames[0].shape
    picture = Image.new("RGB", (left + n * (width + 2), len(rows) * (height + 2)), "white")
    for y, (label, part) in enumerate(zip(rows, frames)):
        top = y * (height + 2)
        ImageDraw.Draw(picture).text((left - 8, top + height / 2), label, "black", font, anchor="rm")
        for x, frame in enumerate(part):
            picture.paste(Image.fromarray(frame.permute(1, 2, 0).numpy()), (left + x * (width + 2), top))
    return picture


def expressions() -> Image.Image:
    """The first test clip of each class, every other frame that the model sees."""
    samples = load_samples("synthetic", "data", "test")
    clips = TestData(samples, load_checkpoint(STAGE_2).size)
    rows = {}
    for label, name in enumerate(samples.classes):
        first = int(np.flatnonzero(samples.labels == label)[0])
        rows[name] = clips[first][1][0][::2]                                # (8, 3, H, W)
    return sheet(rows)


def reconstruction() -> Image.Image:
    """Seven test images, what stage 1's encoder sees of them, and what its decoder makes of that."""
    model = load_checkpoint(STAGE_1).eval()
    samples = load_samples("synthetic-images", "data", "test")
    data = TestData(samples, model.size)
    index = [int(np.flatnonzero(samples.labels == label)[0]) for label in range(len(samples.classes))]
    x = torch.cat([data[i][1] for i in index])                              # (7, 3, H, W)
    with torch.no_grad():
        frames = reconstruct(model, x, TINY["image_mask_ratio"], start("tiny"))
    labels = ("original", "visible", "reconstructed")
    return sheet({label: part[:, 0] for label, part in zip(labels, frames)}, zoom=2)


def confusion(scores: dict, classes: list[str]) -> str:
    """The confusion matrix of scores as evaluate.metrics gives them: counts, coloured by their share of the row."""
    rows = [["true ↓  predicted →", *classes]]
    for name, shares, counts in zip(classes, scores["by_row"], scores["confusion"]):
        rows.append([name, *((share, str(count)) for share, count in zip(shares, counts))])
    return grid(rows)


def experts(gates: dict) -> str:
    """The share of a layer's assignments that each expert receives. gates: by modality, then layer, as in log.jsonl."""
    rows = []
    for m, name in (("video", "clips"), ("image", "photographs")):
        for layer, share in gates[m].items():
            rows.append([f"{name}, layer {layer}", *share])
    columns = [str(number) for number in range(len(rows[0]) - 1)]
    return grid([["expert", *columns], *rows], high=0.4)


def main() -> None:
    for make in (expressions, reconstruction):
        make().quantize(256).save(FOLDER / f"{make.__name__}.png", optimize=True)
    last = json.loads(Path(STAGE_2).with_name("log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    classes = load_samples("synthetic", "data", "test").classes
    charts = {"confusion": confusion(last["test"]["video"], classes), "experts": experts(last["gates"]), "token": token()}
    for name, chart in charts.items():
        (FOLDER / f"{name}.svg").write_text(chart, encoding="utf-8")


if __name__ == "__main__":
    main()
