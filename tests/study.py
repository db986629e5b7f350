"""The paper's comparisons on synthetic faces: does each of its orderings appear at this size?

    python tests/study.py                   run what is not finished yet, then print the table as Markdown
    python tests/study.py --plan            the runs of a seed, their commands, and how long everything takes
    python tests/study.py --table           the table of what is finished

Every run is the real pretrain.py or finetune.py, one thread each, as many at once as there are cores (one on a GPU).
Interrupted, it goes on where it stopped. One budget for all rows, nothing is tuned for one of them. Seed s trains on
fold s + 1 and is tested on its people; rows are compared seed by seed, so that a fold's difficulty cancels out.
"""
import argparse
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

from data import FOLDS, ensure_synthetic, read_list, split_file  # noqa: E402  (needs the path above)
from finetune import TINY  # noqa: E402
from pretrain import guarded  # noqa: E402

EPOCHS = (14, 8)                            # of stage 1 and of stage 2: what fits into 2.5 hours on two cores
LEFT_OUT = "Left out for the time: 4 experts, 1 MoAE layer, the shares between those of Fig. 3c and 3d."
START = 6                                   # seconds that a run takes beside its epochs


class Run(NamedTuple):
    """A command of the study, once per seed. seconds: of an epoch on one core of an AMD EPYC (Zen 5)."""
    flags: str
    seconds: float
    start: str = ""                         # of stage 2: the stage-1 run that it starts from, or none
    longer: float = 1                       # times the epochs of the others
    half: bool = False                      # with half of the labelled clips


STAGE_1 = {
    "dual": Run("", 15),
    "images": Run("--dataset none --image-mask-ratio 0.75", 5.5),
    "videos": Run("--image-dataset none --video-mask-ratio 0.9", 12.5),
    # 1.3125 * 1,600 frames: as many images as in "dual"; 0.263 does the same for the paper's data sets.
    "frames": Run("--image-dataset frames --image-share 1.3125", 18),
}
CLIPS = "--image-dataset none"
EQUAL, EQUAL_HALF = 60 / 28, 46 / 14        # an epoch has 28 steps of clips (14 of half of them) and 32 of images
STAGE_2 = {
    "s4d": Run("", 11, "dual"),
    "scratch": Run("", 11, "none"),
    "from-images": Run("", 11, "images"),
    "from-videos": Run("", 11, "videos"),
    "from-frames": Run("", 11, "frames"),
    "vit": Run(f"{CLIPS} --moae-layers none", 8, "dual"),
    "vit-mtl": Run("--moae-layers none", 10, "dual"),
    "vit-moe": Run("--expert ffn", 22, "dual"),
    "static": Run("--dataset none", 2.5, "dual"),
    "dynamic": Run(CLIPS, 9, "dual"),
    "dynamic-longer": Run(CLIPS, 9, "dual", longer=EQUAL),
    "baseline": Run(f"{CLIPS} --moae-layers none", 8, "videos"),
    "early": Run("--moae-layers early", 11, "dual"),
    "middle": Run("--moae-layers middle", 11, "dual"),
    "alternate": Run("--moae-layers alternate", 11, "dual"),
    "experts-2": Run("--experts 2", 10, "dual"),
    "experts-16": Run("--experts 16", 12, "dual"),
    "layers-3": Run("--moae-layers 1,2,3", 12, "dual"),
    "images-1": Run("--image-share 1", 14, "dual"),
    "no-residual": Run("--no-residual", 11, "dual"),
    "half-joint": Run("", 8, "dual", half=True),
    "half-dynamic-longer": Run(CLIPS, 5, "dual", longer=EQUAL_HALF, half=True),
    "scratch-dynamic-longer": Run(CLIPS, 9, "none", longer=EQUAL),
}


class Row(NamedTuple):
    """A row of a table: its run, and the paper's UAR in per cent on its data sets, or what its text says instead."""
    label: str
    run: str
    paper: tuple[float, ...] | str = "lower"


class Table(NamedTuple):
    """A table of the paper. reference: the run that rows are compared with, none: each with the row above."""
    title: str
    reference: str
    rows: tuple[Row, ...]
    modality: str = "video"                 # on whose UAR


S4D = (43.41, 70.58)                        # FERV39K, DFEW
TABLES = (
    Table("Table IV: stage 1", "s4d", (
        Row("1 none", "scratch", (27.67, 40.96)), Row("2 images only", "from-images", (36.10, 53.80)),
        Row("3 videos only (in Fig. 3c: 0)", "from-videos", (42.92, 67.71)),
        Row("4 images and videos (in Fig. 3c: 1)", "s4d", S4D),
        Row("5 videos and their frames", "from-frames", (42.36, 68.35)))),
    Table("Table V: sharing between the tasks", "s4d", (
        Row("6 ViT, clips only", "vit", (42.68, 68.69)), Row("7 ViT-MTL", "vit-mtl", (42.63, 69.62)),
        Row("8 S4D", "s4d", S4D), Row("9 ViT-MoE", "vit-moe", (41.79, 68.88)))),
    Table("Table VI: joint fine-tuning, on clips", "s4d", (
        Row("clips only", "dynamic", (42.45, 66.52)),
        Row("clips only, as many steps as joint", "dynamic-longer", "–"), Row("joint", "s4d", S4D))),
    Table("the same with half of the labelled clips", "half-joint", (
        Row("clips only, as many steps as joint", "half-dynamic-longer", "–"), Row("joint", "half-joint", "–"))),
    Table("the same without stage 1", "scratch", (
        Row("clips only, as many steps as joint", "scratch-dynamic-longer", "–"), Row("joint", "scratch", "–"))),
    Table("Table VI: joint fine-tuning, on images (the paper: AffectNet-7, at the best epoch)", "s4d", (
        Row("images only", "static", (65.58,)), Row("joint", "s4d", (65.88,))), "image"),
    Table("Table VII: components, each against the row above", "", (
        Row("baseline: videos only, then ViT", "baseline", (42.58, 64.66)),
        Row("+ images and videos in stage 1", "vit", (42.68, 68.69)), Row("+ MoAE", "dynamic", (42.45, 66.52)),
        Row("+ joint fine-tuning", "s4d", S4D))),
    Table("Table VIII: position of the experts", "s4d", (
        Row("early", "early", (43.15, 67.93)), Row("middle", "middle", (43.32, 69.96)), Row("later", "s4d", S4D),
        Row("alternate", "alternate", (43.27, 70.48)))),
    Table("Fig. 3a: experts", "s4d", (
        Row("2", "experts-2"), Row("8", "s4d", "best"), Row("16", "experts-16"))),
    Table("Fig. 3b: MoAE layers (the paper: of 12, best 6)", "s4d", (
        Row("0 of 4", "vit-mtl", (42.63, 69.62)), Row("2 of 4", "s4d", "best"), Row("3 of 4", "layers-3"))),
    Table("Fig. 3d: share of the images in stage 2", "s4d", (
        Row("0", "dynamic", (42.45, 66.52)), Row("0.5", "s4d", "best"), Row("1", "images-1"))),
    Table("Eq. (8): the residual (the released code has none)", "s4d", (
        Row("with", "s4d", S4D), Row("without", "no-residual", "no claim"))),
)

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, 1 to 9 degrees of freedom


# ------------------------------------------------------------------------------------------------------ what is run

class Task(NamedTuple):
    """One run of one seed."""
    name: str                               # pretrain-... or finetune-...
    seed: int
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
             *shlex.split(run.flags)]
    if stage == "finetune":
        flags += ["--pretrained", args.output / needs / f"seed{seed}" / "last.pt" if needs else "none",
                  "--warmup-epochs", round(TINY["warmup_epochs"] * run.longer, 2), "--fold", seed % FOLDS + 1]
    if not torch.cuda.is_available():
        flags += ["--workers", 0]           # the cores are busy with other runs
    flags += ["--seed", seed, "--data-root", args.output / "half" if run.half else args.data_root,
              "--output", folder, "--resume"]
    return Task(name, seed, [sys.executable, *map(str, [ROOT / f"{stage}.py", *flags])], folder,
                START + epochs * run.seconds, needs)


def half_of_the_clips(data_root: Path, half: Path) -> None:
    """A data root of its own whose training lists name every second person's clips; images and clips are linked."""
    ensure_synthetic(["synthetic"], data_root)
    for path in ("AffectNet", "DFEW/clip_jpg_256"):
        link = half / "synthetic" / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to((data_root / "synthetic" / path).resolve(), target_is_directory=True)
    for fold, split in itertools.product(range(1, FOLDS + 1), ("train", "test")):
        source = split_file("synthetic", data_root, split, fold)
        rows = read_list(source)
        if split == "train":                # seven clips in a row are one person's
            people = sorted({(int(row.name) - 1) // 7 for row in rows})
            rows = [row for row in rows if people.index((int(row.name) - 1) // 7) % 2 == 0]
        target = half / source.relative_to(data_root)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("\n".join(["video_name,label", *(f"{row.name},{row.label}" for row in rows)]) + "\n")


def finished(args) -> dict[tuple[str, int], dict]:
    """(task, seed): its line of results.jsonl. Exits if these are of another budget."""
    path = args.output / "results.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for line in lines:
        if line["epochs"] != list(args.epochs):
            sys.exit(f"error: {path} holds results of --epochs {' '.join(map(str, line['epochs']))}, not "
                     f"{' '.join(map(str, args.epochs))}: give another --output")
    return {(line["task"], line["seed"]): line for line in lines}


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
                    done[key] = finish(args, task, process.returncode, time.monotonic() - began)
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


def finish(args, task: Task, status: int, seconds: float) -> dict:
    """The line of results.jsonl of a command that has ended, written. Of its checkpoints only stage 1's are needed."""
    if status:
        output = task.folder / "output.txt"
        sys.exit(f"error: {task.name} of seed {task.seed}, exit status {status}: "
                 f"{output.read_text().splitlines()[-1]} (all of it: {output})")
    record = json.loads((task.folder / "log.jsonl").read_text().splitlines()[-1])
    line = dict(task=task.name, seed=task.seed, epochs=list(args.epochs), seconds=round(seconds, 1),
                **{score: {name: scores[score] for name, scores in record.get("test", {}).items()}
                   for score in ("uar", "war")})
    with open(args.output / "results.jsonl", "a") as results:
        results.write(json.dumps(line) + "\n")
    for file in task.folder.glob("previous.pt" if task.name.startswith("pretrain") else "*.pt"):
        file.unlink()
    return line


# ---------------------------------------------------------------------------------------------------------- the table

def mean_and_interval(values) -> tuple[float, float]:
    """Mean of (n,) values and half the width of its 95 % t interval, nan of fewer than two."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return values.mean() if len(values) else np.nan, np.nan
    return values.mean(), T_975[len(values) - 2] * values.std(ddof=1) / math.sqrt(len(values))


def uar(done: dict, run: str, modality: str) -> dict[int, float]:
    """Seed: UAR in per cent at the last epoch, of the seeds that are finished and have that head."""
    return {seed: 100 * line["uar"][modality] for (task, seed), line in done.items()
            if task == f"finetune-{run}" and modality in line["uar"]}


def compare(ours: dict[int, float], others: dict[int, float]) -> tuple[float, float]:
    """Mean and interval of the differences of the seeds that both have."""
    return mean_and_interval([ours[seed] - others[seed] for seed in sorted(ours.keys() & others.keys())])


def claim(row: Row, other: Row) -> int:
    """What the paper says of a row's difference to the other: 1 higher, -1 lower, 0 nothing."""
    if isinstance(row.paper, tuple) and isinstance(other.paper, tuple):
        return 1 if row.paper[-1] > other.paper[-1] else -1
    return 0 if row.paper == "no claim" else -1


def verdict(difference: float, half: float, claimed: int) -> str:
    if math.isnan(half):
        return ""
    if abs(difference) <= half:
        return "cannot be told apart"
    if not claimed:
        return "higher" if difference > 0 else "lower"
    return "appears" if (difference > 0) == (claimed > 0) else "**reversed**"


def cell(mean: float, half: float, sign: str = "") -> str:
    text = "" if math.isnan(mean) else f"{mean:{sign}.1f}" + ("" if math.isnan(half) else f" ± {half:.1f}")
    return text.replace("-", "−")


def report(args, done: dict) -> str:
    """All tables as one in Markdown, after a paragraph on what is compared."""
    seeds = 1 + max((seed for task, seed in done if task.startswith("finetune")), default=-1)
    lines = ["| | paper: FERV39K / DFEW | clips | images | difference | the paper's ordering |",
             "|---|---|---|---|---|---|"]
    compared = set()                        # some pairs stand in several tables
    for table in TABLES:
        lines.append(f"| **{table.title}** | | | | | |")
        for i, row in enumerate(table.rows):
            other = (next(r for r in table.rows if r.run == table.reference) if table.reference
                     else table.rows[max(i - 1, 0)])
            scores = {name: uar(done, row.run, name) for name in ("video", "image")}
            difference, half = compare(scores[table.modality], uar(done, other.run, table.modality))
            shown = ["", "reference" if table.reference else ""]
            if row is not other:
                shown = [cell(difference, half, "+"), verdict(difference, half, claim(row, other))]
                if shown[1]:
                    compared.add((table.modality, frozenset((row.run, other.run))))
            n = len(scores[table.modality])
            paper = " / ".join(f"{value:.2f}" for value in row.paper) if isinstance(row.paper, tuple) else row.paper
            ours = [cell(*mean_and_interval(list(values.values()))) for values in scores.values()]
            lines.append(" | ".join([f"| {row.label}{f' ({n} of {seeds} seeds)' if n < seeds else ''}", paper, *ours,
                                     *shown]) + " |")
    hours = sum(line["seconds"] for line in done.values()) / 3600
    return "\n".join([
        f"UAR in per cent at the last epoch, on people who are not in training: mean of {seeds} seeds ± half of its "
        f"95 % t interval. Differences are paired by seed, to the table's reference, on clips unless the title says "
        f"images; where the interval includes 0, the two cannot be told apart at this size. Of {len(compared)} "
        f"comparisons {len(compared) / 20:.1f} would exclude 0 by chance. Where the paper has no figure (–), its claim "
        f"for the real data is what is looked for. Stage 1 of {args.epochs[0]} epochs and stage 2 of {args.epochs[1]} "
        f"for all rows unless they say more; less data means fewer steps, as in the paper. {len(done)} runs, "
        f"{hours:.1f} hours of one process each. {LEFT_OUT}",
        "", *lines])


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
    tasks, done = plan(args), finished(args)
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
