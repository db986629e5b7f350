"""Do static data help dynamic recognition, when, and through which part? The paper's question, on drawn worlds.

    python tests/study.py       run what is missing, then print the result and draw its picture

A world is a replicate: its seed draws its own people, faces and clips (tests/faces.py), the weights and the batches, so
that nothing overlaps and a plain paired t interval over the worlds is right. All rows take the same number of steps:
fewer samples come more often. They are tested on 100 unseen people. What is finished is not run again.
"""
import argparse
import json
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest.mock import Mock

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}  # a core per world; their bars would mix
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import faces  # noqa: E402  (needs the path above)
import finetune  # noqa: E402
import pretrain  # noqa: E402
from data import Source, TrainingData, load_samples, read_sample, schedule_epoch  # noqa: E402
from evaluate import evaluate, markdown  # noqa: E402
from model import MaskedAutoencoder  # noqa: E402
from pictures import curves  # noqa: E402

SCALE, PEOPLE, TEST_PEOPLE = 1, 64, 100     # of the worlds: people with labelled clips, and those to test on
EPOCHS = {"pretrain": 40, "finetune": 21}   # the README's first command: 20 and 14
STEPS = {"pretrain": {"video": 100, "image": 131}, "finetune": {"video": 28, "image": 32}}  # of an epoch, as there


class Row(NamedTuple):
    """A setting of stage 2, and the stage 1 that it starts from. All else is as in the README's first command."""
    label: str
    start: str = "both"                     # what stage 1 saw: none, image, video or both
    people: int = PEOPLE                    # whose clips are labelled
    images: str = "image"                   # "": clips only; "disagree": with labels that the clips' must ignore
    flags: str = ""                         # of finetune.py


ROWS = {
    "s4d": Row("S4D: stage 1 on both, joint stage 2, MoAE, 64 people"),
    "none": Row("no stage 1", start="none"),
    "image": Row("stage 1 on images", start="image"),
    "video": Row("stage 1 on clips", start="video"),
    **{f"joint-{n}": Row(f"joint, {n} people", people=n) for n in (4, 8, 16)},
    **{f"clips-{n}": Row(f"clips only, {n} people", people=n, images="") for n in (4, 8, 16, PEOPLE)},
    "clips-heads": Row("clips only, no experts", images="", flags="--moae-layers none"),
    "heads": Row("two heads, no experts", flags="--moae-layers none"),
    "ffn": Row("FFN experts", flags="--expert ffn"),
    "disagree-heads": Row("tasks disagree: two heads, no experts", flags="--moae-layers none", images="disagree"),
    "disagree": Row("tasks disagree: MoAE", images="disagree"),
    "disagree-ffn": Row("tasks disagree: FFN experts", flags="--expert ffn", images="disagree"),
    "k": Row("k = 8: every expert sees every token", flags="--k 8"),
    "sigma": Row("sigma = 0: no noise in the gate", flags="--sigma 0"),
    "residual": Row("no residual in Eq. (8)", flags="--no-residual"),
}
HEADLINES = (  # the differences that the study is made to decide, on clips: (what, row, minus row)
    ("stage 1 on both - none", "s4d", "none"), ("stage 1 on images - on clips", "image", "video"),
    ("stage 1 on both - on clips", "s4d", "video"), ("joint - clips only, 4 people", "joint-4", "clips-4"),
    ("joint - clips only, 64 people", "s4d", "clips-64"), ("tasks agree: MoAE - two heads", "s4d", "heads"),
    ("tasks disagree: MoAE - two heads", "disagree", "disagree-heads"),
    ("tasks disagree: two heads - clips only, no experts", "disagree-heads", "clips-heads"),
    ("tasks disagree: MoAE - clips only, MoAE", "disagree", "clips-64"))
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, 1 to 9 degrees of freedom


# ------------------------------------------------------------------------------------------------------ one world

class InMemory(TrainingData):
    """TrainingData that decodes each file once."""
    memory: dict                            # what is decoded already, by path

    def read(self, samples, modality, index):
        path = samples.path(index)
        if path not in self.memory:
            self.memory[path] = read_sample(samples, index, self.transform[modality], lambda n: list(range(n)))
        whole = self.memory[path]
        return whole if modality == "image" else whole[self.which_frames[modality](len(whole))]


class Quiet(pretrain.Process):
    """Shows no progress bars: those of several worlds would overwrite each other."""
    main = False


class World:
    """The faces of a seed in memory, and what is trained on them."""

    def __init__(self, seed: int, folder: Path, longer: int = 1):
        self.seed, self.folder, self.longer = seed, folder, longer
        self.process = Quiet(**vars(pretrain.start("tiny")))
        faces.write_faces(folder / "synthetic", seed, SCALE, TEST_PEOPLE)
        self.samples = {(m, split): load_samples({"image": "synthetic-images", "video": "synthetic"}[m], folder, split)
                        for m in ("image", "video") for split in ("train", "test")}
        self.samples["video", "unlabelled"] = load_samples("synthetic-unlabelled", folder, "train")
        drawn = faces.plan_files(Path(), seed, SCALE, TEST_PEOPLE)
        for split, kind in (("train", faces.TRAIN_IMAGE), ("test", faces.TEST_IMAGE)):
            labels = np.array([faces.image_label(file, "person") for file in drawn if file.kind == kind])
            self.samples["disagree", split] = replace(self.samples["image", split], labels=labels)
        self.memory = {"pretrain": {}, "finetune": {}}

    def settings(self, script, flags: str = ""):
        """Those of pretrain.py or finetune.py at size tiny."""
        p = script.settings()
        p.set_defaults(**script.TINY | dict(size="tiny", workers=0, epochs=self.longer * EPOCHS[script.__name__]))
        return p.parse_args(["--seed", str(self.seed), *flags.split()])

    def train(self, script, args, model, objective, sources: dict[str, Source]) -> None:
        stage, steps = script.__name__, len(schedule_epoch(sources, self.seed, 0))
        assert steps == sum(STEPS[stage].values())
        optimizer, rate = script.optimisation(args, model, steps)
        folder = Mock(stage=stage, **{"load.return_value": None, "due.return_value": False})  # nothing goes on or stays
        data = InMemory(sources, stage, model.size, "light")
        data.memory = self.memory[stage]
        pretrain.train(self.process, args, folder, model, objective, optimizer, rate, data)

    def stage_1(self, start: str) -> Path:
        """The checkpoint of a stage 1, trained if it is not there yet."""
        path = self.folder / f"{start}.pt"
        if not path.exists():
            args = self.settings(pretrain)
            given = {"video": self.samples["video", "unlabelled"], "image": self.samples["image", "train"]}
            steps = STEPS["pretrain"] if start == "both" else {start: sum(STEPS["pretrain"].values())}
            sources = {m: Source(given[m], 16, 16, n * 16 / len(given[m]), repeats=args.repeats if m == "video" else 1)
                       for m, n in steps.items()}
            torch.manual_seed(self.seed)
            model = MaskedAutoencoder("tiny")
            ratios = {"image": args.image_mask_ratio, "video": args.video_mask_ratio}
            self.train(pretrain, args, model, pretrain.ReconstructionLoss(model, ratios), sources)
            pretrain.write(path, dict(stage="pretrain", architecture=model.architecture, model=model.state_dict()))
        return path

    def stage_2(self, row: Row) -> dict[str, float]:
        """Fine-tune and test: UAR by modality."""
        start = "none" if row.start == "none" else self.stage_1(row.start)
        args = self.settings(finetune, f"--pretrained {start} {row.flags}")
        clips = self.samples["video", "train"]
        clips = clips.subset(np.arange(len(clips))[:7 * row.people])        # of a person seven in a row
        steps = STEPS["finetune"]["video"] if row.images else sum(STEPS["finetune"].values())
        sources = {"video": Source(clips, 16, 16, steps * 16 / len(clips))}
        if row.images:
            sources["image"] = Source(self.samples[row.images, "train"], 32, 32, args.image_share, balanced=True)
        torch.manual_seed(self.seed)
        classes = [sources[m].samples.classes if m in sources else () for m in ("image", "video")]
        model, _ = finetune.build(args, classes, None)
        objective = finetune.JointLoss(model, args.mixing, args.label_smoothing)
        self.train(finetune, args, model, objective, sources)
        test = {"video": "video", "image": row.images}
        return {m: evaluate(model, self.samples[test[m], "test"], self.process, 0)[0]["uar"] for m in sources}

    def run(self, name: str) -> None:
        """A row, with a line in the file beside the world's folder when it is finished."""
        began = time.process_time()
        line = dict(row=name, uar=self.stage_2(ROWS[name]), seconds=round(time.process_time() - began))
        with open(f"{self.folder}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{self.folder.name}: {line}", flush=True)


# ------------------------------------------------------------------------------------------- all worlds, statistics

def finished(folder: Path) -> dict[str, dict]:
    """The lines of a world by row."""
    path = Path(f"{folder}.jsonl")
    return {line["row"]: line for line in map(json.loads, path.read_text().splitlines() if path.exists() else [])}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % t interval, in points."""
    n = len(values)
    half = T_975[min(n, 10) - 2] * np.std(values, ddof=1) / math.sqrt(n) if n > 1 else math.inf
    return 100 * float(np.mean(values)) if values else math.nan, 100 * float(half)


def scores(worlds: list[dict], row: str, minus: str = "", m: str = "video") -> list[float]:
    """A row's UAR, or its difference to another's, in each world that has them."""
    there = [world for world in worlds if {row, minus or row} <= world.keys() and m in world[row]["uar"]]
    return [world[row]["uar"][m] - (world[minus]["uar"][m] if minus else 0) for world in there]


def written(values: list[float], sign: str = "") -> str:
    return "{:{}.1f} ± {:.1f}".format(interval(values)[0], sign, interval(values)[1]) if values else ""


def report(worlds: list[dict]) -> str:
    """Both tables, in Markdown."""
    headlines = []
    for what, row, minus in HEADLINES:
        mean, half = interval(scores(worlds, row, minus))
        headlines.append([what, written(scores(worlds, row, minus), "+"),
                          "open" if not abs(mean) > half else "higher" if mean > 0 else "lower"])
    rows = [[row.label, written(scores(worlds, name)), written(scores(worlds, name, m="image")),
             "reference" if name == "s4d" else written(scores(worlds, name, "s4d"), "+")] for name, row in ROWS.items()]
    seconds = sum(line["seconds"] for world in worlds for line in world.values())
    return "\n\n".join([markdown(["difference of UAR on clips, in points", "", ""], headlines),
                        markdown(["UAR in %", "clips", "images", "clips, minus S4D"], rows),
                        f"{sum(map(len, worlds))} runs in {len(worlds)} worlds, {seconds / 3600:.1f} core hours"])


def picture(worlds: list[dict], path: Path) -> None:
    """UAR on clips over labelled people, joint and on clips only, with 95 % bands."""
    people, joint = (4, 8, 16, PEOPLE), ["joint-4", "joint-8", "joint-16", "s4d"]
    lines = {"photographs too (joint)": [interval(scores(worlds, name)) for name in joint],
             "clips only": [interval(scores(worlds, f"clips-{n}")) for n in people]}
    drawing = curves("UAR on clips of unseen people, %, with 95 % bands", "people whose clips are labelled (7 each)",
                     people, lines)
    path.write_text(drawing, encoding="utf-8")


def settings() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--worlds", type=int, nargs="+", default=list(range(10)), help="seeds (0 to 9; not counted: 100...)")
    p.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="of the table (all)")
    p.add_argument("--output", type=Path, default=Path("runs/study"), help="folder for all of it (runs/study)")
    p.add_argument("--longer", type=int, default=1, help="times the epochs: do scores still rise? (1)")
    p.add_argument("--report", action="store_true", help="run nothing")
    return p


def run_worlds(core: int, cores: int, args) -> None:
    """One core's share of the worlds: their rows that are not finished yet."""
    for seed in args.worlds[core::cores]:
        folder = args.output / f"world-{seed}"
        if missing := [name for name in args.rows if name not in finished(folder)]:
            world = World(seed, folder, args.longer)
            for name in missing:
                world.run(name)


def main() -> None:
    args = settings().parse_args()
    if args.longer > 1:
        args.output /= f"longer-{args.longer}"
    if not args.report:
        cores = len(os.sched_getaffinity(0))
        torch.multiprocessing.spawn(run_worlds, (cores, args), cores)
    worlds = [finished(args.output / f"world-{seed}") for seed in args.worlds]
    print(report(worlds))
    if all(set(ROWS) <= world.keys() for world in worlds):
        picture(worlds, args.output / "study.svg")


if __name__ == "__main__":
    pretrain.guarded(main)
