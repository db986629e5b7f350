"""Do static data help dynamic recognition, when, and through which part? The paper's question, on drawn worlds.

    python tests/study.py                   run what is missing, then print the result and draw its picture
    python tests/study.py --report          only print and draw what is there

A world is a replicate: its seed draws its own people, faces and clips (tests/faces.py), the weights and the batches, so
that nothing overlaps and a plain paired t interval over the worlds is right. All rows have the same number of steps in
both stages, whatever they train on: where there are fewer samples they come more often. A core takes one world after
the other; what is finished is not run again. Worlds are tested on 100 people who appear in no training.
"""
import argparse
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest.mock import Mock

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import faces  # noqa: E402  (needs the path above)
import finetune  # noqa: E402
import pretrain  # noqa: E402
from data import Samples, Schedule, Source, TrainingData, load_samples, read_clip, read_image  # noqa: E402
from evaluate import evaluate, markdown  # noqa: E402
from model import MaskedAutoencoder, UserError  # noqa: E402
from pictures import curves  # noqa: E402

SCALE, PEOPLE, TEST_PEOPLE = 1, 64, 100     # of the worlds: people with labelled clips, and those to test on
EPOCHS = {"pretrain": 40, "finetune": 21}   # the README's first command: 20 and 14
STEPS = {"pretrain": 231, "finetune": 60}   # of an epoch, as there
CLIP_STEPS = {"pretrain": 100, "finetune": 28}  # of them, where there are images too


class Row(NamedTuple):
    """A setting of stage 2, and the stage 1 that it starts from. All else is as in the README's first command."""
    label: str
    start: str = "both"                     # what stage 1 saw: none, image, video or both
    people: int = PEOPLE                    # whose clips are labelled
    images: bool = True                     # joint training, or on clips only
    flags: str = ""                         # of finetune.py
    disagree: bool = False                  # the images' labels follow what the clips' labels must ignore


ROWS = {
    "s4d": Row("S4D: stage 1 on both, joint stage 2, MoAE, 64 people"),
    "none": Row("no stage 1", start="none"),
    "image": Row("stage 1 on images", start="image"),
    "video": Row("stage 1 on clips", start="video"),
    **{f"joint-{n}": Row(f"joint, {n} people", people=n) for n in (4, 8, 16)},
    **{f"clips-{n}": Row(f"clips only, {n} people", people=n, images=False) for n in (4, 8, 16, PEOPLE)},
    "heads": Row("two heads, no experts", flags="--moae-layers none"),
    "ffn": Row("FFN experts", flags="--expert ffn"),
    "disagree-heads": Row("tasks disagree: two heads, no experts", flags="--moae-layers none", disagree=True),
    "disagree": Row("tasks disagree: MoAE", disagree=True),
    "disagree-ffn": Row("tasks disagree: FFN experts", flags="--expert ffn", disagree=True),
    "k": Row("k = 8: every expert sees every token", flags="--k 8"),
    "sigma": Row("sigma = 0: no noise in the gate", flags="--sigma 0"),
    "residual": Row("no residual in Eq. (8)", flags="--no-residual"),
}
HEADLINES = (  # the differences that the study is made to decide, on clips: (what, row, minus row)
    ("stage 1 on both - none", "s4d", "none"), ("stage 1 on both - on clips", "s4d", "video"),
    ("joint - clips only, 4 people", "joint-4", "clips-4"),
    (f"joint - clips only, {PEOPLE} people", "s4d", f"clips-{PEOPLE}"),
    ("tasks disagree: MoAE - two heads", "disagree", "disagree-heads"),
    ("tasks disagree: two heads - clips only", "disagree-heads", f"clips-{PEOPLE}"))
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, 1 to 9 degrees of freedom


# ------------------------------------------------------------------------------------------------------ one world

class InMemory(TrainingData):
    """TrainingData that decodes each file once. memory: what is decoded already, by path."""

    def __init__(self, memory: dict, *given):
        super().__init__(*given)
        self.memory = memory

    def read(self, samples, modality, index):
        path, fitted = samples.path(index), self.fit[modality]
        if path not in self.memory:
            self.memory[path] = (fitted(read_image(path)) if modality == "image" else
                                 read_clip(path, lambda n: list(range(n)), fitted))
        whole = self.memory[path]
        return whole if modality == "image" else whole[self.choose(len(whole), self.frames, samples.stride)]


def defaults(script, seed: int, longer: int, flags: str = ""):
    """The settings of pretrain.py or finetune.py at size tiny."""
    parser = script.settings()
    parser.set_defaults(**script.TINY | dict(size="tiny", workers=0, epochs=longer * EPOCHS[script.__name__]))
    return parser.parse_args(["--seed", str(seed), *flags.split()])


class World:
    """The faces of a seed in memory, and what is trained on them."""

    def __init__(self, seed: int, output: Path, longer: int = 1):
        self.seed, self.longer, self.process = seed, longer, pretrain.start("tiny")
        self.folder = output / f"world-{seed}"
        faces.write_faces(self.folder / "synthetic", seed, SCALE, TEST_PEOPLE)
        names = {"image": "synthetic-images", "video": "synthetic"}
        self.samples = {(m, split): load_samples(name, self.folder, split)
                        for split in ("train", "test") for m, name in names.items()}
        self.samples["video", "unlabelled"] = load_samples("synthetic-unlabelled", self.folder, "train")
        drawn = faces.plan_files(Path(), seed, SCALE, TEST_PEOPLE)
        self.other_labels = {split: np.array([faces.image_label(file, "person") for file in drawn if file.kind == kind])
                             for split, kind in (("train", faces.TRAIN_IMAGE), ("test", faces.TEST_IMAGE))}
        self.memory = {"pretrain": {}, "finetune": {}}

    def images(self, split: str, disagree: bool) -> Samples:
        samples = self.samples["image", split]
        return replace(samples, labels=self.other_labels[split]) if disagree else samples

    def train(self, script, args, model, objective, sources: dict[str, Source]) -> None:
        stage = script.__name__
        schedule = Schedule(sources, self.seed, args.epochs, 0, 1)
        assert schedule.steps_per_epoch() == STEPS[stage]
        data = InMemory(self.memory[stage], sources, stage, model.size, "light")
        optimizer, rate = script.optimisation(args, model, STEPS[stage])
        folder = Mock(stage=stage, **{"load.return_value": None, "due.return_value": False})  # nothing goes on or stays
        pretrain.train(self.process, args, folder, model, objective, optimizer, rate, schedule, data)

    def stage_1(self, start: str) -> Path:
        """The checkpoint of a stage 1, trained if it is not there yet."""
        path = self.folder / f"{start}.pt"
        if not path.exists():
            args = defaults(pretrain, self.seed, self.longer)
            clips, images, both = self.samples["video", "unlabelled"], self.samples["image", "train"], start == "both"
            sources = {}
            if start != "image":            # `share` makes the steps: a step of clips reads 16 / repeats of them
                share = (CLIP_STEPS["pretrain"] if both else STEPS["pretrain"]) * 16 / len(clips)
                sources["video"] = Source(clips, 16, 16, share, args.repeats)
            if start != "video":
                share = (STEPS["pretrain"] - CLIP_STEPS["pretrain"] * both) * 16 / len(images)
                sources["image"] = Source(images, 16, 16, share)
            torch.manual_seed(self.seed)
            model = MaskedAutoencoder("tiny")
            ratios = {"image": args.image_mask_ratio, "video": args.video_mask_ratio}
            self.train(pretrain, args, model, pretrain.ReconstructionLoss(model, ratios), sources)
            pretrain.write(path, dict(stage="pretrain", architecture=model.architecture, model=model.state_dict()))
        return path

    def stage_2(self, row: Row) -> dict[str, float]:
        """Fine-tune and test: UAR by modality."""
        start = "none" if row.start == "none" else self.stage_1(row.start)
        args = defaults(finetune, self.seed, self.longer, f"--pretrained {start} {row.flags}")
        clips = self.samples["video", "train"]
        clips = clips.subset(np.arange(len(clips))[:7 * row.people])        # of a person seven in a row
        steps = CLIP_STEPS["finetune"] if row.images else STEPS["finetune"]
        sources = {"video": Source(clips, 16, 16, steps * 16 / len(clips))}
        if row.images:
            sources["image"] = Source(self.images("train", row.disagree), 32, 32, args.image_share, balanced=True)
        torch.manual_seed(self.seed)
        classes = [sources[m].samples.classes if m in sources else () for m in ("image", "video")]
        model, _ = finetune.build(args, classes, None)
        objective = finetune.JointLoss(model, args.mixing, args.label_smoothing, args.balance)
        self.train(finetune, args, model, objective, sources)
        test = {"video": self.samples["video", "test"], "image": self.images("test", row.disagree)}
        return {m: evaluate(model, test[m], self.process, 0)[0]["uar"] for m in sources}

    def run(self, names: list[str], results: Path) -> None:
        """The rows that are not in the world's file yet, each with a line there as soon as it is finished."""
        done = read(results)
        if other := {line["longer"] for line in done.values()} - {self.longer}:
            raise UserError(f"{results} holds runs with --longer {other}, not {self.longer}: give another --output")
        for name in names:
            if name not in done:
                began = time.time()
                line = dict(row=name, longer=self.longer, uar=self.stage_2(ROWS[name]),
                            seconds=round(time.time() - began))
                with open(results, "a") as file:
                    file.write(json.dumps(line) + "\n")
                print(f"world {self.seed}, {ROWS[name].label}: {line['uar']}, {line['seconds']} s", flush=True)


# ------------------------------------------------------------------------------------------- all worlds, statistics

def read(path: Path) -> dict[str, dict]:
    """The lines of a world by row."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {line["row"]: line for line in map(json.loads, lines)}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % t interval, in points."""
    n = len(values)
    half = T_975[n - 2] * np.std(values, ddof=1) / math.sqrt(n) if n > 1 else math.inf
    return 100 * float(np.mean(values)), 100 * float(half)


def scores(worlds: list[dict], row: str, minus: str = "", m: str = "video") -> list[float]:
    """A row's UAR, or its difference to another's, in each world that has them."""
    there = [world for world in worlds if {row, minus or row} <= world.keys() and m in world[row]["uar"]]
    return [world[row]["uar"][m] - (world[minus]["uar"].get(m, math.nan) if minus else 0) for world in there]


def written(values: list[float], sign: str = "") -> str:
    return "{:{}.1f} ± {:.1f}".format(interval(values)[0], sign, interval(values)[1]) if values else ""


def report(worlds: list[dict]) -> str:
    """Both tables, in Markdown."""
    rows = []
    for name, row in ROWS.items():
        images = scores(worlds, name, m="image")
        difference = written(scores(worlds, name, "s4d"), "+") if name != "s4d" else "reference"
        rows.append([row.label, written(scores(worlds, name)), written(images), difference])
    headlines = []
    for what, row, minus in HEADLINES:
        if values := scores(worlds, row, minus):
            mean, half = interval(values)
            verdict = "open" if abs(mean) <= half else "higher" if mean > 0 else "lower"
            headlines.append([what, written(values, "+"), verdict])
    seconds = sum(line["seconds"] for world in worlds for line in world.values())
    return "\n\n".join([markdown(["difference of UAR on clips, in points", "", ""], headlines),
                        markdown(["UAR in %", "clips", "images", "clips, minus S4D"], rows),
                        f"{sum(map(len, worlds))} runs in {len(worlds)} worlds, {seconds / 3600:.1f} core hours"])


def picture(worlds: list[dict], path: Path) -> None:
    """UAR on clips over labelled people, joint and on clips only, with 95 % bands."""
    people = (4, 8, 16, PEOPLE)
    rows = {"photographs too (joint)": ["joint-4", "joint-8", "joint-16", "s4d"],
            "clips only": [f"clips-{n}" for n in people]}
    curves("UAR on clips of unseen people, %", "people whose clips are labelled (7 each)", people,
           {label: [interval(scores(worlds, name)) for name in names] for label, names in rows.items()}).save(path)


def settings() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--worlds", type=int, nargs="+", default=list(range(10)), help="seeds (0 to 9; not counted: 100...)")
    p.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="of the table (all)")
    p.add_argument("--output", type=Path, default=Path("runs/study"), help="what is drawn and finished (runs/study)")
    p.add_argument("--longer", type=int, default=1, help="times the epochs: do scores still rise? (1)")
    p.add_argument("--picture", type=Path, default=ROOT / "tests/pictures/study.png")
    p.add_argument("--report", action="store_true", help="run nothing")
    p.add_argument("--one-core", action="store_true", help="one world after the other, in this process")
    return p


def main() -> None:
    args = settings().parse_args()
    results = {seed: args.output / f"world-{seed}.jsonl" for seed in args.worlds}
    if args.one_core:
        for seed in args.worlds:
            if set(args.rows) - read(results[seed]).keys():
                World(seed, args.output, args.longer).run(args.rows, results[seed])
        return
    if not args.report:
        args.output.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--one-core", "--worlds"]
        cores = len(os.sched_getaffinity(0))
        signal.signal(signal.SIGTERM, lambda *received: sys.exit(128 + signal.SIGTERM))
        quiet = os.environ | {"TQDM_DISABLE": "1"}
        running = [subprocess.Popen([*command, *map(str, args.worlds[i::cores])], env=quiet)
                   for i in range(min(cores, len(args.worlds)))]
        try:
            failed = [process.args for process in running if process.wait()]
        finally:
            for process in running:
                process.terminate()
        if failed:
            sys.exit(f"error: {shlex.join(failed[0])} failed")
    worlds = [read(path) for path in results.values()]
    print(report(worlds))
    if all(set(ROWS) <= world.keys() for world in worlds):
        picture(worlds, args.picture)


if __name__ == "__main__":
    pretrain.guarded(main)
