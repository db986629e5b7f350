"""Draws the README's pictures that no other command writes, from what its first command left.

    python tests/pictures.py            tests/pictures/expressions.png and token.png
"""
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402

from data import TestData, load_samples, to_float  # noqa: E402
from evaluate import FONT, contact_sheet  # noqa: E402
from model import load_checkpoint  # noqa: E402

BLUE, PALE, ORANGE, GREY = (49, 130, 189), (222, 235, 247), (254, 237, 200), (235, 235, 235)


def expressions(path: Path) -> None:
    """The first test clip of each class, every other frame that the model sees."""
    samples = load_samples("synthetic", "data", "test")
    clips = TestData(samples, load_checkpoint("runs/synthetic/fold1/last.pt").size)
    first = [int(np.flatnonzero(samples.labels == label)[0]) for label in range(len(samples.classes))]
    contact_sheet([(samples.classes[label], clips[i][1][0][::2]) for label, i in enumerate(first)],
                  least_height=48).quantize(256).save(path, optimize=True)


def box(draw: ImageDraw.ImageDraw, x: int, y: int, text: str, fill=PALE, width: int = 96) -> None:
    draw.rectangle((x, y, x + width, y + 34), fill, BLUE)
    draw.multiline_text((x + width / 2, y + 17), text, "black", FONT, anchor="mm", align="center", spacing=1)


def line(draw: ImageDraw.ImageDraw, *points: tuple[int, int], colour=BLUE, up: bool = False) -> None:
    """A line that ends in an arrow's head: to the right, down or `up`."""
    draw.line(points, colour)
    (_, before), (x, y) = points[-2:]
    if y == before:
        draw.polygon([(x, y), (x - 7, y - 4), (x - 7, y + 4)], colour)
    else:
        back = y + 7 if up else y - 7
        draw.polygon([(x, y), (x - 4, back), (x + 4, back)], colour)


def token(path: Path) -> None:
    """The way of one token through a MoAE layer, with the gates that a trained model gave it."""
    model, samples = load_checkpoint("runs/synthetic/fold1/last.pt").eval(), load_samples("synthetic-images", "data",
                                                                                         "test")
    seen, router = [], model.blocks[-1].moe_layer.router
    hook = router.register_forward_hook(lambda module, inputs, output: seen.append(output))
    face = TestData(samples, model.size)[1][1]
    with torch.no_grad():
        model(to_float(face))
    hook.remove()
    cells = model.size.pixels // model.size.patch
    row, column = 2 * cells // 3, cells // 2                                # about the mouth
    weights, chosen = (part.flatten(0, -2)[row * cells + column] for part in seen[0])  # (k,) each
    gates = torch.zeros(model.architecture["experts"]).scatter(0, chosen, weights.float()).tolist()

    sheet = Image.new("RGB", (900, 480), "white")
    draw = ImageDraw.Draw(sheet)
    zoom = 192 // model.size.pixels
    image = Image.fromarray(face[0].permute(1, 2, 0).numpy()).resize((192, 192), Image.Resampling.NEAREST)
    left, top, side = 8 + zoom * model.size.patch * column, 144 + zoom * model.size.patch * row, zoom * model.size.patch
    sheet.paste(image, (8, 144))
    draw.rectangle((left, top, left + side, top + side), None, "white", 2)
    draw.text((8, 342), f"one token: the patch in row {row},\ncolumn {column} of this image, from 0", "black", FONT)
    line(draw, (200, 240), (236, 240))
    box(draw, 238, 223, "LN, MHSA,\n+ x   (10)")
    draw.text((340, 220), "x'", "black", FONT)
    line(draw, (334, 240), (386, 240))
    box(draw, 388, 223, "LN", width=40)
    draw.line((428, 240, 446, 240), BLUE)
    box(draw, 562, 12, "FFN   (11)")
    box(draw, 562, 62, "gate  (4)-(6)", ORANGE)
    for y in (29, 79):
        line(draw, (446, 240), (446, y), (560, y))
    draw.line((658, 79, 684, 79, 684, 119 + 40 * (len(gates) - 1)), (230, 140, 30), 2)
    for i, gate in enumerate(gates):
        y, colour = 119 + 40 * i, BLUE if gate else (205, 205, 205)
        line(draw, (446, 240), (446, y), (560, y), colour=colour)
        box(draw, 562, y - 17, f"adapter {i}" + ("   (8)" if gate else ""), PALE if gate else GREY)
        draw.line((658, y, 694, y), colour)
        draw.text((698, y), f"x {gate:.3f}" if gate else "x 0", "black" if gate else (150, 150, 150), FONT, anchor="lm")
        if gate:
            line(draw, (748, y), *([(755, y)] if y == 239 else [(774, y), (774, 221 if y < 240 else 258)]), up=y > 240)
    draw.line((446, 29, 446, 119 + 40 * max(i for i, gate in enumerate(gates) if gate)), BLUE)  # over the grey ones
    for x in (757, 823):
        draw.ellipse((x, 223, x + 34, 257), PALE, BLUE)
        draw.text((x + 17, 240), "+", "black", FONT, anchor="mm")
    draw.text((784, 268), "(9)", "black", FONT)
    draw.text((796, 220), "x_s", "black", FONT)
    line(draw, (791, 240), (821, 240))
    line(draw, (658, 29), (840, 29), (840, 221))
    draw.text((664, 11), "x_g", "black", FONT)
    line(draw, (350, 240), (350, 460), (840, 460), (840, 258), up=True)
    line(draw, (857, 240), (894, 240))
    draw.text((860, 252), "x_o\n(13)", "black", FONT)
    sheet.save(path, optimize=True)


def curves(title: str, below: str, x: tuple, lines: dict[str, list[tuple[float, float]]]) -> Image.Image:
    """Lines over x, which doubles from step to step, each a label with (mean, half-width of its band) in per cent."""
    image, left, bottom = Image.new("RGB", (720, 420), "white"), 60, 350
    places = [left + 40 + 140 * math.log2(value / x[0]) for value in x]
    draw, colours = ImageDraw.Draw(image, "RGBA"), (BLUE, (217, 95, 14))
    for value in range(20, 101, 20):
        draw.line((left, bottom - 4 * (value - 20), 700, bottom - 4 * (value - 20)), GREY)
        draw.text((left - 8, bottom - 4 * (value - 20)), str(value), "black", FONT, anchor="rm")
    for place, value in zip(places, x):
        draw.text((place, bottom + 14), str(value), "black", FONT, anchor="mm")
    draw.text((left + 310, bottom + 44), below, "black", FONT, anchor="mm")
    draw.text((left, 12), title, "black", FONT, anchor="lm")
    for (label, points), colour, (anchor, gap) in zip(lines.items(), colours, (("rb", -14), ("lt", 14))):
        upper, middle, lower = ([(place, bottom - 4 * (mean + side * half - 20))
                                 for place, (mean, half) in zip(places, points)] for side in (1, 0, -1))
        draw.polygon(upper + lower[::-1], (*colour, 60))
        draw.line(middle, colour, 3)
        for at, y in middle:
            draw.ellipse((at - 4, y - 4, at + 4, y + 4), colour)
        draw.text((middle[2][0], middle[2][1] + gap), label, colour, FONT, anchor=anchor)
    return image


if __name__ == "__main__":
    expressions(ROOT / "tests/pictures/expressions.png")
    token(ROOT / "tests/pictures/token.png")
