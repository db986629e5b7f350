"""The synthetic faces that stand in for the real data sets: drawn once, written in their layouts.

    python tests/faces.py                   writes data/synthetic, in less than a minute on two cores
    python tests/faces.py --data-root small --scale 0.1
    python tests/faces.py --data-root worlds/7 --seed 7 --test-people 100 --image-labels person

AffectNet's layout holds labelled images, DFEW's labelled clips in five folds and VoxCeleb2's unlabelled videos. A
parametric face is painted with numpy, driven by FACS action units (AU). Each person has an own face, expressiveness and
resting expression. Every file is a function of the seed and of its own number only. The numbers in the names begin at
the seed's million, so that no run takes one seed's faces for another's.
"""
import argparse
import io
import json
import os
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import UserError  # noqa: E402  (needs the path above)
from pretrain import guarded, number  # noqa: E402

ACTION_UNITS = (1, 2, 4, 5, 6, 7, 9, 12, 15, 20, 23, 26, 45)  # the columns of every `action_units` array
EXPRESSIONS = {"neutral": (), "happiness": (6, 12), "sadness": (1, 4, 15), "surprise": (1, 2, 5, 26),
               "fear": (1, 2, 4, 5, 20, 26), "disgust": (9, 15), "anger": (4, 5, 7, 23)}
AFFECTNET_LABELS = tuple(EXPRESSIONS)  # a label is a position in these
DFEW_LABELS = ("happiness", "sadness", "neutral", "anger", "surprise", "disgust", "fear")
TRAIN_IMAGE, TEST_IMAGE, CLIP, UNLABELLED = range(4)  # kinds of files, each with its own pool of people
FOLLOW = ("expression", "person")   # what the images' labels may follow
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


# ------------------------------------------------------------------------------------------------------- the files

class FaceFile(NamedTuple):
    """A file to write; `index` counts the files and `person` the people of its kind."""
    path: Path
    seed: int
    kind: int
    index: int
    person: int
    expression: str


def plan_files(root: Path, seed: int, scale: float, test_people: int = 0) -> list[FaceFile]:
    """All images and videos. A person of a labelled pool shows each expression once. test_people: as in write_faces."""
    train, test, clip, unlabelled = (max(1, round(scale * people)) for people in (300, 50, 16, 400))
    clips = FOLDS * clip
    if test_people:
        test, clips = test_people, (FOLDS - 1) * clip + test_people
    image, files = "AffectNet/Manually_Annotated_Images/{folder}/{number:06d}.jpg", []
    for kind, people, each, name, first in (
            (TRAIN_IMAGE, train, 7, image, 1), (TEST_IMAGE, test, 7, image, train + 1),
            (CLIP, clips, 7, "DFEW/clip_jpg_256/{number:05d}.mp4", 1),
            (UNLABELLED, unlabelled, VIDEOS_PER_PERSON, "VoxCeleb2/id{folder:05d}/synth{number:06d}/00001.mp4", 1)):
        for index in range(people * each):
            number = 1_000_000 * seed + index + (kind == CLIP)  # DFEW's begin at 1
            path = root / name.format(folder=first + index // each, number=number)
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
    try:
        if file.kind in (TRAIN_IMAGE, TEST_IMAGE):
            apex = person.strength * np.isin(ACTION_UNITS, EXPRESSIONS[file.expression])
            units = np.maximum(rng.uniform(0.6, 1.0) * apex, person.resting)[None].astype(np.float32)
            encoded = io.BytesIO()          # Pillow does not notice when a full disk takes a part of a file
            image = Image.fromarray(render_faces(person, units, move_head(1, rng), 64, rng)[0])
            image.save(encoded, "JPEG", quality=92)
            file.path.write_bytes(encoded.getvalue())
            return
        frames = int(rng.integers(36, 49)) if file.kind == CLIP else 40
        units, pose, size = perform(person, file.expression, frames, rng), move_head(frames, rng), 64
        if file.kind == UNLABELLED:         # a wider frame, with the face in its upper middle
            pose = pose * (1, VOXCELEB_SCALE, VOXCELEB_SCALE, 1) + (0, 0, -1 / 7, np.log(VOXCELEB_SCALE))
            size = 84
        write_video(file.path, render_faces(person, units, pose, size, rng))
    except OSError as error:
        raise UserError(f"{file.path} cannot be written: {error.strerror}") from error


def image_label(file: FaceFile, follow: str) -> int:
    """An image's label: its expression, or something of the person that no clip's label depends on."""
    if follow == "person":
        return file.person % len(AFFECTNET_LABELS)
    return AFFECTNET_LABELS.index(file.expression)


def write_labels(root: Path, files: list[FaceFile], test_people: int, follow: str) -> None:
    """AffectNet's two lists and DFEW's folds; a person's clips are in the test set of one fold only."""
    people = max(file.person for file in files if file.kind == CLIP) + 1
    for split, kind in (("train", TRAIN_IMAGE), ("test", TEST_IMAGE)):
        lines = [f"{file.path.parent.name}/{file.path.name} {image_label(file, follow)}"
                 for file in files if file.kind == kind]
        (root / "AffectNet" / f"{split}_affectnet7.txt").write_text("\n".join(lines) + "\n")
        folder = root / "DFEW" / "EmoLabel_DataSplit" / f"{split}(single-labeled)"
        folder.mkdir(parents=True)
        for fold in range(1 if test_people else FOLDS):
            tested = range(people - test_people, people) if test_people else range(fold, people, FOLDS)
            lines = [f"{file.path.stem},{DFEW_LABELS.index(file.expression)}" for file in files
                     if file.kind == CLIP and (file.person in tested) == (kind == TEST_IMAGE)]
            (folder / f"{split}_set_{fold + 1}.csv").write_text("\n".join(["video_name,label", *lines]) + "\n")


def end_with(parent: int) -> None:
    """For a drawing process: Ctrl-C is the parent's to handle, and when that is killed this must not wait for ever."""
    def watch():
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=watch, daemon=True).start()


def draw(root: Path, seed: int, scale: float, test_people: int, follow: str) -> None:
    """Write all files of the three sets into the new folder `root`, on all cores."""
    files = plan_files(root, seed, scale, test_people)
    for folder in {file.path.parent for file in files}:
        folder.mkdir(parents=True, exist_ok=True)
    pool = ProcessPoolExecutor(initializer=end_with, initargs=(os.getpid(),))
    try:
        list(tqdm(pool.map(write_file, files, chunksize=8), total=len(files), desc="synthetic faces"))
    finally:
        pool.shutdown(cancel_futures=True)
    write_labels(root, files, test_people, follow)


MADE_BY = "made_by.json"                    # tells what a complete folder holds


def is_there(root: Path, made_by: str) -> bool:
    """Whether `root` holds these faces. UserError if it holds something else."""
    if not root.exists():
        return False
    path = root / MADE_BY
    found = path.read_text().strip() if path.is_file() else "other files"
    if found != made_by:
        raise UserError(f"{root} holds {found}, not {made_by}: delete it to draw it anew")
    return True


def write_faces(root: Path, seed: int = 0, scale: float = 1.0, test_people: int = 0, follow: str = "expression"):
    """Write synthetic AffectNet, DFEW and VoxCeleb2 into `root`, the folder "synthetic" of a data root.

    Scale 1 means 2,100 + 350 labelled images, 560 labelled clips in five folds and 1,600 unlabelled videos.
    test_people: instead of five folds one, and in the test sets so many people with 7 clips, or images, each. follow:
    what the images' labels follow, see image_label; the pictures stay the same. `root` appears when it is complete; if
    the same faces are there already, nothing is done. UserError if it is there with something else, or cannot be
    written.
    """
    root, made_by = Path(root), json.dumps(dict(seed=seed, scale=float(scale), test_people=test_people, labels=follow))
    try:
        if is_there(root, made_by):
            print(f"{root} is there already: {made_by}")
            return
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{root.name}.", dir=root.parent) as folder:
            drawn = Path(folder, root.name)
            draw(drawn, seed, scale, test_people, follow)
            (drawn / MADE_BY).write_text(f"{made_by}\n")
            try:
                drawn.rename(root)
            except OSError:
                if not is_there(root, made_by):
                    raise
                print(f"{root} was drawn by another process meanwhile: its faces stay, these are thrown away")
    except OSError as error:
        raise UserError(f"{error.filename or root} cannot be written: {error.strerror}") from error


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data-root", type=Path, default="data", help="folder of all data sets (data)")
    p.add_argument("--seed", type=number(int, 0), default=0, help="of everything random (0)")
    p.add_argument("--scale", type=number(float, 1e-6, 1e3), default=1.0,
                   help="1 = 2,450 images, 560 labelled clips, 1,600 videos (1)")
    p.add_argument("--test-people", type=number(int, 0, 10000), default=0, metavar="N",
                   help="one fold and a test set of so many people, instead of five folds")
    p.add_argument("--image-labels", choices=FOLLOW, default="expression", help="what the images' labels follow; "
                   "person (each has a number): the images' task asks for what the clips' must ignore")
    args = p.parse_args()
    for each in (signal.SIGINT, signal.SIGTERM):  # what is half drawn is thrown away
        signal.signal(each, lambda received, frame: sys.exit(128 + received))
    write_faces(args.data_root / "synthetic", args.seed, args.scale, args.test_people, args.image_labels)


if __name__ == "__main__":
    guarded(main)
