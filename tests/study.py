"""The paper's comparisons on synthetic faces: does each of its orderings appear at this size?

    python tests/study.py                   run what is not finished yet, then print the table as Markdown
    python tests/study.py --plan            the runs of a seed, their commands, and how long everything takes
    python tests/study.py --table           the table of what is finished

Every run is the real pretrain.py or finetune.py, one thread each, as many at once as there are cores (one on a GPU).
Interrupted, it goes on where it stopped. One budget for all rows, nothing is tuned for one of them. Seed s trains on
fold s + 1 and is tested on its people; rows are compared seed by seed, so that a fold's difficulty cancels out.
"""
import argparse
import functools
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import read_list  # noqa: E402  (needs the path above)
from faces import FOLDS, write_faces  # noqa: E402
from finetune import TINY  # noqa: E402
from pretrain import guarded  # noqa: E402

EPOCHS = (14, 8)                            # of stage 1 and of stage 2: what fits into 2.5 hours on two cores
START = 7                                   # seconds that a run takes beside its epochs
LEFT_OUT = ("Left out for the time: 4 experts, 1 MoAE layer, the shares between those of Fig. 3c and 3d, and faces in "
            "which identity or motion matters more or less.")


class Run(NamedTuple):
    """A command of the study, once per seed. seconds: of an epoch and its test on one core of an AMD EPYC (Zen 5)."""
    flags: str
    seconds: float
    start: str = ""                         # of stage 2: the stage-1 run that it starts from, or none
    longer: float = 1                       # times the epochs of the others
    half: bool = False                      # with half of the labelled clips


STAGE_1 = {
    "dual": Run("", 13.5),
    "images": Run("--dataset none --image-mask-ratio 0.75", 5),
    "images-90": Run("--dataset none", 4.5),
    "videos": Run("--image-dataset none --video-mask-ratio 0.9", 10),
    # 1.3125 * 1,600 frames: as many images as in "dual"; 0.263 does the same for the paper's data sets.
    "frames": Run("--image-dataset frames --image-share 1.3125", 23),
}
CLIPS = "--image-dataset none"
EQUAL, EQUAL_HALF = 60 / 28, 46 / 14        # an epoch has 28 steps of clips (14 of half of them) and 32 of images
STAGE_2 = {
    "s4d": Run("", 12.5, "dual"),
    "scratch": Run("", 12.5, "none"),
    "from-images": Run("", 12.5, "images"),
    "from-images-90": Run("", 12.5, "images-90"),
    "from-videos": Run("", 12.5, "videos"),
    "from-frames": Run("", 12.5, "frames"),
    "vit": Run(f"{CLIPS} --moae-layers none", 7.5, "dual"),
    "vit-mtl": Run("--moae-layers none", 10.5, "dual"),
    "vit-moe": Run("--expert ffn", 13, "dual"),
    "static": Run("--dataset none", 3, "dual"),
    "static-1": Run("--dataset none --image-share 1", 5.5, "dual"),
    "dynamic": Run(CLIPS, 8.5, "dual"),
    "dynamic-longer": Run(CLIPS, 8.5, "dual", longer=EQUAL),
    "baseline": Run(f"{CLIPS} --moae-layers none", 7, "videos"),
    "early": Run("--moae-layers early", 12, "dual"),
    "middle": Run("--moae-layers middle", 12, "dual"),
    "alternate": Run("--moae-layers alternate", 12, "dual"),
    "experts-2": Run("--experts 2", 11, "dual"),
    "experts-16": Run("--experts 16", 12.5, "dual"),
    "layers-3": Run("--moae-layers 1,2,3", 13, "dual"),
    "images-1": Run("--image-share 1", 15, "dual"),
    "no-residual": Run("--no-residual", 12, "dual"),
    "half-joint": Run("", 8.5, "dual", half=True),
    "half-dynamic-longer": Run(CLIPS, 5.3, "dual", longer=EQUAL_HALF, half=True),
    "scratch-dynamic-longer": Run(CLIPS, 8.5, "none", longer=EQUAL),
}


# UAR in per cent on FERV39K and on DFEW
PAPER = {"scratch": (27.67, 40.96), "from-images": (36.10, 53.80), "from-videos": (42.92, 67.71),
         "from-frames": (42.36, 68.35), "s4d": (43.41, 70.58), "vit": (42.68, 68.69), "vit-mtl": (42.63, 69.62),
         "vit-moe": (41.79, 68.88), "dynamic": (42.45, 66.52), "baseline": (42.58, 64.66), "early": (43.15, 67.93),
         "middle": (43.32, 69.96), "alternate": (43.27, 70.48)}


class Row(NamedTuple):
    """A row of a table: a run, or one minus another, "a - b"."""
    label: str
    runs: str
    says: str = ""                          # what the paper says of it; "": what its figures say, if there are any
    paper: str = ""                         # its figures, where they are not those of PAPER
    against: str = ""                       # what it is compared with, where that is not the table's reference


class Table(NamedTuple):
    """A table of the paper. reference: the run that rows are compared with; "": each with the row above."""
    title: str
    reference: str
    rows: tuple[Row, ...]
    modality: str = "video"                 # on whose UAR


WHOLE_GAIN = "s4d - dynamic-longer"
TABLES = (
    Table("Table IV: stage 1", "s4d", (
        Row("1 none", "scratch"), Row("2 images only, 75 % masked", "from-images"),
        Row("2 images only, 90 % masked, as in 4", "from-images-90"),
        Row("3 videos only, 90 % masked (Fig. 3c: 0)", "from-videos"),
        Row("4 images, 90 % masked, and videos, 95 % (Fig. 3c: 1)", "s4d"),
        Row("5 videos and their frames, 95 % and 90 %", "from-frames"),
        Row("2, 75 % masked, against 90 %", "from-images", against="from-images-90"),
        Row("2 against 1", "from-images", against="scratch"),
        Row("3 against 1", "from-videos", against="scratch"),
        Row("3 against 2", "from-videos", against="from-images"))),
    Table("Table V: sharing between the tasks", "s4d", (
        Row("6 ViT, clips only", "vit"), Row("7 ViT-MTL: images too, no experts", "vit-mtl"), Row("8 S4D", "s4d"),
        Row("9 ViT-MoE: experts begin as the pre-trained FFN", "vit-moe"),
        Row("7 against 6", "vit-mtl", against="vit"))),
    Table("Table VI: joint fine-tuning, on clips (DFEW's figures are Table VII's)", "s4d", (
        Row("clips only", "dynamic"), Row("clips only, as many steps as joint", "dynamic-longer"),
        Row("joint", "s4d"))),
    Table("the same with the labelled clips of half of the people", "half-joint", (
        Row("clips only, as many steps as joint", "half-dynamic-longer"), Row("joint", "half-joint"),
        Row("joint's gain, against that with all clips", "half-joint - half-dynamic-longer", against=WHOLE_GAIN))),
    Table("the same without stage 1", "scratch", (
        Row("clips only, as many steps as joint", "scratch-dynamic-longer"), Row("joint", "scratch"),
        Row("joint's gain, against that after stage 1", "scratch - scratch-dynamic-longer", against=WHOLE_GAIN))),
    Table("Table VI, on images (the paper: AffectNet-7; in brackets at the epoch best for images)", "s4d", (
        Row("images only, half of them an epoch, as in joint", "static", "depends on the epoch", "65.58"),
        Row("images only, all of them an epoch", "static-1", "depends on the epoch", "65.58"),
        Row("joint", "s4d", paper="65.45 (65.88)")), "image"),
    Table("Table VII: components, each against the row above", "", (
        Row("baseline: videos only, then ViT", "baseline"), Row("+ images in stage 1", "vit"), Row("+ MoAE", "dynamic"),
        Row("+ joint fine-tuning", "s4d"), Row("all against the baseline", "s4d", against="baseline"))),
    Table("Table VIII: position of the experts", "s4d", (
        Row("early", "early"), Row("middle", "middle"), Row("later", "s4d"), Row("alternate", "alternate"),
        Row("early against middle", "early", against="middle"))),
    Table("Fig. 3a: experts", "s4d", (
        Row("2, both always chosen", "experts-2", "lower"), Row("8", "s4d"), Row("16", "experts-16", "lower"))),
    Table("Fig. 3b: MoAE layers (the paper: 6 of 12 are best)", "s4d", (
        Row("0 of 4", "vit-mtl"), Row("2 of 4", "s4d"), Row("3 of 4", "layers-3", "lower"))),
    Table("Fig. 3d: share of the images in stage 2", "s4d", (
        Row("0", "dynamic"), Row("0.5", "s4d"), Row("1", "images-1", "not higher"))),
    Table("Eq. (8): the residual (the released code has none)", "s4d", (
        Row("with", "s4d"), Row("without", "no-residual"))),
)

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, 1 to 9 degrees of freedom


# ------------------------------------------------------------------------------------------------------ what is run

class Task(NamedTuple):
    """One run of one seed."""
    name: str                               # pretrain-... or finetune-...
    seed: int
    flags: str                              # what decides, with its name, what it results in
    command: list[str]
    folder: Path
    seconds: float                          # that it is expected to take
    needs: str                              # name of the task before it, or ""


def plan(args) -> list[Task]:
    """Every run of the study once, seed by seed: what is finished at any time is a whole table of fewer seeds."""
    starts = {STAGE_2[row].start for row in args.rows}
    runs = [(f"pretrain-{name}", run) for name, run in STAGE_1.items() if name in starts]
    runs += [(f"finetune-{name}", STAGE_2[name]) for name in args.rows]
    return [make_task(args, name, run, seed) for seed in range(args.seeds) for name, run in runs]


def make_task(args, name: str, run: Run, seed: int) -> Task:
    stage, folder = name.split("-")[0], args.output / name / f"seed{seed}"
    epochs = round(args.epochs[stage == "finetune"] * run.longer)
    needs = f"pretrain-{run.start}" if run.start in STAGE_1 else ""
    flags = ["--dataset", "synthetic", "--image-dataset", "synthetic-images", "--size", "tiny", "--epochs", epochs,
             *shlex.split(run.flags), "--seed", seed]
    rest = ["--data-root", args.output / "half" if run.half else args.data_root, "--output", folder, "--resume"]
    if stage == "finetune":
        flags += ["--warmup-epochs", round(TINY["warmup_epochs"] * run.longer, 2), "--fold", seed % FOLDS + 1]
        rest += ["--pretrained", args.output / needs / f"seed{seed}" / "last.pt" if needs else "none"]
    if not torch.cuda.is_available():
        rest += ["--workers", 0]           # the cores are busy with other runs
    command = [sys.executable, *map(str, [ROOT / f"{stage}.py", *flags, *rest])]
    return Task(name, seed, shlex.join(map(str, flags)), command, folder, START + epochs * run.seconds, needs)


def half_of_the_clips(data_root: Path, half: Path) -> None:
    """A data root of its own whose training lists name every second person's clips; images and clips are linked."""
    if not (data_root / "synthetic").exists():
        write_faces(data_root / "synthetic")
    for path in ("AffectNet", "DFEW/clip_jpg_256"):
        link = half / "synthetic" / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to((data_root / "synthetic" / path).resolve(), target_is_directory=True)
    for fold, split in itertools.product(range(1, FOLDS + 1), ("train", "test")):
        source = data_root / f"synthetic/DFEW/EmoLabel_DataSplit/{split}(single-labeled)/{split}_set_{fold}.csv"
        rows = read_list(source)
        if split == "train":                # seven clips in a row are one person's
            people = sorted({(int(row.name) - 1) // 7 for row in rows})
            rows = [row for row in rows if people.index((int(row.name) - 1) // 7) % 2 == 0]
        target = half / source.relative_to(data_root)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("\n".join(["video_name,label", *(f"{row.name},{row.label}" for row in rows)]) + "\n")


def finished(args, tasks: list[Task]) -> dict[tuple[str, int], dict]:
    """(task, seed): its line of results.jsonl. Exits if one of these tasks was run with other flags."""
    path = args.output / "results.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found = {(line["task"], line["seed"]): line for line in lines}
    done = {task[:2]: found[task[:2]] for task in tasks if task[:2] in found}
    for task in tasks:
        if task[:2] in done and done[task[:2]]["flags"] != task.flags:
            sys.exit(f"error: {path} holds {task.name} of seed {task.seed} with {done[task[:2]]['flags']}, not "
                     f"{task.flags}: give another --output")
    return done


def work(args, tasks: list[Task], done: dict) -> None:
    """Run what is not done, `jobs` at once, and add it to `done` and to results.jsonl. Exits if a command fails."""
    waiting, running = [task for task in tasks if task[:2] not in done], {}

    def behind() -> float:
        """Expected seconds of what is done, and of the running ones so far."""
        return sum(task.seconds for task in tasks if task[:2] in done) + sum(
            min(time.monotonic() - began, task.seconds) for task, began, _ in running.values())

    bar = tqdm(total=sum(task.seconds for task in tasks), initial=behind(), smoothing=0, mininterval=5, miniters=0,
               bar_format="{percentage:3.0f} %{bar}| {elapsed}, left: {remaining}{postfix}")
    try:
        while waiting or running:
            ready = [task for task in waiting if not task.needs or (task.needs, task.seed) in done]
            for task in ready[:args.jobs - len(running)]:
                waiting.remove(task)
                task.folder.mkdir(parents=True, exist_ok=True)
                with open(task.folder / "output.txt", "a") as output:
                    running[task[:2]] = task, time.monotonic(), subprocess.Popen(
                        task.command, stdout=output, stderr=subprocess.STDOUT,
                        env=os.environ | {"OMP_NUM_THREADS": "1"})
            for key, (task, began, process) in list(running.items()):
                if process.poll() is not None:
                    del running[key]
                    done[key] = finish(args, task, process.returncode)
            bar.n = behind()
            bar.set_postfix_str(", ".join(f"{name} of seed {seed}" for name, seed in running), refresh=False)
            bar.update(0)
            time.sleep(0.2)
    finally:                                # an interrupted run writes a checkpoint and ends
        for _, _, process in running.values():
            process.terminate()
        for _, _, process in running.values():
            process.wait()
        bar.close()


def finish(args, task: Task, status: int) -> dict:
    """The line of results.jsonl of a command that has ended, written. Of its checkpoints only stage 1's are needed."""
    if status:
        output = task.folder / "output.txt"
        sys.exit(f"error: {task.name} of seed {task.seed}, exit status {status}: "
                 f"{output.read_text().splitlines()[-1]} (all of it: {output})")
    records = [json.loads(line) for line in (task.folder / "log.jsonl").read_text().splitlines()]
    line = dict(task=task.name, seed=task.seed, flags=task.flags,
                steps=sum(len(record["losses"]) for record in records),
                seconds=round(sum(record["seconds"] for record in records), 1),
                **{score: {name: scores[score] for name, scores in records[-1].get("test", {}).items()}
                   for score in ("uar", "war")})
    with open(args.output / "results.jsonl", "a") as results:
        results.write(json.dumps(line) + "\n")
    if not task.name.startswith("pretrain"):
        for file in task.folder.glob("*.pt"):
            file.unlink()
    return line


# ---------------------------------------------------------------------------------------------------------- the table

def mean_and_interval(values) -> tuple[float, float]:
    """Mean of n values, one a seed, and half the width of its 95 % t interval, nan of fewer than two.

    The folds' training data overlap, so the values are not independent; the variance of their mean is taken as
    1 / n + test / training samples times theirs (Nadeau and Bengio, 2003), instead of 1 / n times.
    """
    values = np.fromiter(values, float)
    if len(values) < 2:
        return values.mean() if len(values) else math.nan, math.nan
    return values.mean(), T_975[len(values) - 2] * values.std(ddof=1) * math.sqrt(1 / len(values) + 1 / (FOLDS - 1))


def minus(ours: dict[int, float], theirs: dict[int, float]) -> dict[int, float]:
    """Of the seeds that both have."""
    return {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}


def uar(done: dict, runs: str, modality: str) -> dict[int, float]:
    """Seed: UAR in per cent at the last epoch of a run, or the difference of "a - b"."""
    return functools.reduce(minus, [{seed: 100 * line["uar"][modality] for (task, seed), line in done.items()
                                     if task == f"finetune-{run}" and modality in line["uar"]}
                                    for run in runs.split(" - ")])


def said(row: Row, other: str) -> str:
    """What the paper says of a row's UAR against the other's."""
    if row.says or not {row.runs, other} <= PAPER.keys():
        return row.says or "no claim"
    higher = sum(ours > theirs for ours, theirs in zip(PAPER[row.runs], PAPER[other]))
    return ("lower", "its data sets differ", "higher")[higher]


def seen(difference: float, half: float, claim: str) -> str:
    """Does a claim hold? What is seen instead, where there is none."""
    if abs(difference) <= half:
        return "open"
    here = "higher" if difference > 0 else "lower"
    expected = {"higher": "higher", "lower": "lower", "not higher": "lower"}.get(claim, "")
    return ("agrees" if here == expected else "**disagrees**") if expected else here


def cell(mean: float, half: float, sign: str = "") -> str:
    text = "" if math.isnan(mean) else f"{mean:{sign}.1f}" + ("" if math.isnan(half) else f" ± {half:.1f}")
    return text.replace("-", "−")


def steps(done: dict, run: str) -> str:
    """Optimiser steps of stage 1 and of stage 2."""
    counts = {task: f"{line['steps']:,}" for (task, _), line in done.items()} | {"pretrain-none": "0"}
    return " + ".join(counts.get(task, "?") for task in (f"pretrain-{STAGE_2[run].start}", f"finetune-{run}"))


def markdown(done: dict, table: Table, row: Row, other: str, seeds: int) -> tuple[str, float]:
    """A row, and half of its difference's interval, nan where there is none."""
    scores, difference, half = uar(done, row.runs, table.modality), math.nan, math.nan
    verdict = "reference" if table.reference else ""
    if row.runs != other:
        scores = minus(scores, uar(done, other, table.modality))
        difference, half = mean_and_interval(scores.values())
        claim = said(row, other)
        verdict = "" if math.isnan(half) else f"{claim}: {seen(difference, half, claim)}"
    first = [""] * 4
    if not row.against:
        figures = row.paper or " / ".join(f"{value:.2f}" for value in PAPER.get(row.runs, ()))
        first = [steps(done, row.runs), figures,
                 *(cell(*mean_and_interval(uar(done, row.runs, name).values())) for name in ("video", "image"))]
    label = row.label + (f" ({len(scores)} of {seeds} seeds)" if len(scores) < seeds else "")
    return "| " + " | ".join([label, *first, cell(difference, half, "+"), verdict]) + " |", half


def report(args, done: dict) -> str:
    """All tables as one in Markdown, after paragraphs on how to read it."""
    seeds = 1 + max((seed for task, seed in done if task.startswith("finetune")), default=-1)
    lines, halves = [], {}                  # half an interval of each pair: some pairs stand in several tables
    for table in TABLES:
        lines.append(f"| **{table.title}** | | | | | | |")
        for i, row in enumerate(table.rows):
            other = row.against or table.reference or table.rows[max(i - 1, 0)].runs
            line, half = markdown(done, table, row, other, seeds)
            lines.append(line)
            if not math.isnan(half):
                halves[table.modality, frozenset((row.runs, other))] = half
    hours = sum(line["seconds"] for line in done.values()) / 3600
    return "\n".join([
        f"UAR in per cent at the last epoch, mean of {seeds} seeds ± half of its 95 % t interval, which allows for the "
        "overlap of the folds' training data (Nadeau and Bengio, 2003) and, with five seeds, is 1.5 times as wide for "
        "it. WAR is the same, as all classes are equally frequent. Seed s trains on the training part of fold s + 1 "
        "and is tested on its 112 clips; the images, 1,750 and 350, are the same in every seed, so that the intervals "
        "on images tell nothing of other people.",
        "",
        "Difference: row minus the table's reference (Table VII: minus the row above; 'a against b': a minus b), seed "
        "by seed, on clips unless the title says images. In the last column, what the paper says of the difference, "
        "and after the colon what is seen here: agrees, disagrees, or open where the interval includes 0, which does "
        "not mean equal; where the paper says nothing definite, higher or lower. "
        + (f"Half of the intervals are wider than ± {np.median(list(halves.values())):.1f}, most of the paper's own "
           "differences smaller than 3, without seeds or intervals and at the best epoch. If no two runs differed, "
           f"{len(halves) / 20:.1f} of the {len(halves)} intervals would still exclude 0." if halves else ""),
        "",
        f"Budget: {args.epochs[0]} epochs of stage 1 and {args.epochs[1]} of stage 2 for all rows that do not say "
        "otherwise, all else the defaults of size tiny. Less data means fewer steps (stage 1 + stage 2), in the paper "
        "too; but here every row is trained too little, so that more steps may help by themselves. In stage 1 of "
        "images and videos 57 % of the samples are images, in the paper 21 %. Rows that do not say otherwise start "
        f"from the stage 1 of Table IV's row 4. {LEFT_OUT} {len(done)} runs, {hours:.1f} hours of training with one "
        "thread each.",
        "",
        "| | steps | paper: FERV39K / DFEW | clips | images | difference | the paper: here |",
        "|---|---|---|---|---|---|---|", *lines])


def settings() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--plan", action="store_true", help="print the runs of the first seed and the time of all")
    p.add_argument("--table", action="store_true", help="print the table of what is finished")
    p.add_argument("--seeds", type=int, default=5, choices=range(1, len(T_975) + 2), metavar="N", help="(5)")
    p.add_argument("--epochs", type=int, nargs=2, default=EPOCHS, help=f"of stages 1 and 2 {EPOCHS}")
    p.add_argument("--rows", nargs="+", default=list(STAGE_2), choices=STAGE_2, metavar="ROW",
                   help="only these runs: " + "; ".join(STAGE_2))
    p.add_argument("--jobs", type=int, default=1 if torch.cuda.is_available() else os.cpu_count(),
                   help="commands at once (the cores; one on a GPU)")
    p.add_argument("--data-root", type=Path, default=Path("data"), help="folder of the synthetic faces")
    p.add_argument("--output", type=Path, default=Path("runs/study"), help="folder of runs and results")
    return p


def main() -> None:
    args = settings().parse_args()
    tasks = plan(args)
    done = finished(args, tasks)
    if args.plan:
        for task in tasks[:len(tasks) // args.seeds]:
            print(f"{task.seconds:5.0f} s  {shlex.join(task.command[1:])}")
        seconds = sum(task.seconds for task in tasks if task[:2] not in done)
        print(f"{len(tasks)} runs of {args.seeds} seeds, {len(done)} finished; the others take about "
              f"{seconds / args.jobs / 3600:.1f} hours, {args.jobs} at once, one core each")
        return
    if not args.table:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda received, frame: sys.exit(128 + received))
        half_of_the_clips(args.data_root, args.output / "half")
        work(args, tasks, done)
    print(report(args, done))


if __name__ == "__main__":
    guarded(main)
