"""The study of the paper's comparisons: what it runs, how it goes on, and its statistics."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
import study
from conftest import ROOT

import finetune
import pretrain
from data import load_samples


def arguments(*given):
    return study.settings().parse_args([str(value) for value in given])


def parsed(task):
    """A task's settings as its script reads them."""
    script = {"pretrain.py": pretrain, "finetune.py": finetune}[os.path.basename(task.command[1])]
    with mock.patch("sys.argv", task.command[1:]):
        return script, vars(pretrain.parse(script.settings(), script.TINY))


def test_every_row_is_one_run_of_a_seed_and_no_two_runs_are_the_same(tmp_path):
    tasks = study.plan(arguments("--seeds", 2, "--output", tmp_path))
    named = {run for table in study.TABLES for row in table.rows
             for run in f"{row.runs} {row.against} {table.reference}".split() if run != "-"}
    assert named == set(study.STAGE_2), "a row without a run, or the reverse"
    assert set(study.PAPER) < named
    seen = set()
    for task in tasks:
        script, settings = parsed(task)
        assert settings["size"] == "tiny" and settings["resume"] and settings["output"] == task.folder
        assert (tmp_path in settings["data_root"].parents) == task.name.startswith("finetune-half-")
        if script is finetune:
            assert settings["fold"] == settings["seed"] + 1 == task.seed + 1
            start = tmp_path / task.needs / f"seed{task.seed}" / "last.pt"
            assert settings["pretrained"] == (str(start) if task.needs else "none")
        seen.add((script, *((name, value) for name, value in settings.items() if name != "output")))
    assert len(seen) == len(tasks)


def test_runs_of_as_many_steps_as_joint_have_them():
    tasks = {task.name: parsed(task)[1] for task in study.plan(arguments("--seeds", 1))}

    def steps(name, clips):
        settings = tasks[f"finetune-{name}"]
        images = 0 if settings["image_dataset"] == "none" else round(2100 * settings["image_share"]) // 32
        return settings["epochs"] * (clips // settings["batch_size"] + images)
    for longer, joint, clips in (("dynamic-longer", "s4d", 448), ("half-dynamic-longer", "half-joint", 224),
                                 ("scratch-dynamic-longer", "scratch", 448)):
        assert steps(longer, clips) == pytest.approx(steps(joint, clips), rel=0.03)


def test_half_of_the_clips_are_those_of_every_second_person(tmp_path, faces):
    half = tmp_path / "half"
    study.half_of_the_clips(faces, half)
    study.half_of_the_clips(faces, half)    # a study that goes on finds it there
    for fold in (1, 2):
        whole, kept = (load_samples("synthetic", root, "train", fold) for root in (faces, half))
        people = [sorted({(int(name[:5]) - 1) // 7 for name in samples.names}) for samples in (whole, kept)]
        assert people[1] == people[0][::2] and kept.counts() == [len(people[1])] * 7
        tests = [load_samples("synthetic", root, "test", fold).fingerprint() for root in (faces, half)]
        assert tests[0] == tests[1]
    assert (half / "synthetic/AffectNet/train_affectnet7.txt").samefile(
        faces / "synthetic/AffectNet/train_affectnet7.txt")


def line(task, seed, video, image=None):
    scores = {"video": video} | ({} if image is None else {"image": image})
    count = 3234 if task.startswith("pretrain") else 480
    return (task, seed), dict(task=task, seed=seed, flags="", steps=count, seconds=3600, uar=scores, war=scores)


def test_differences_are_paired_and_have_a_t_interval():
    rng = np.random.default_rng(0)
    fold = rng.normal(0, 0.2, 5)            # what makes a fold hard for both
    better, worse = 0.6 + fold + rng.normal(0, 0.01, 5), 0.5 + fold + rng.normal(0, 0.01, 5)
    done = dict([line("finetune-s4d", seed, value) for seed, value in enumerate(better)]
                + [line("finetune-early", seed, value) for seed, value in enumerate(worse)])
    mean, half = study.mean_and_interval(study.uar(done, "early - s4d", "video").values())
    differences = 100 * (worse - better)
    assert mean == pytest.approx(differences.mean())
    variance = ((differences - mean) ** 2).sum() / 4
    assert half == pytest.approx(2.776 * np.sqrt((1 / 5 + 112 / 448) * variance), rel=1e-3)
    of_one = study.mean_and_interval(study.uar(done, "early", "video").values())[1]
    assert half < of_one / 5, "the folds' difficulty cancels out"
    assert math.isnan(study.mean_and_interval([1.0])[1]) and math.isnan(study.mean_and_interval([])[0])
    del done["finetune-s4d", 3]
    gain = study.minus(study.uar(done, "early", "video"), study.uar(done, "s4d - early", "video"))
    assert list(gain) == [0, 1, 2, 4] and gain[2] == pytest.approx(100 * (2 * worse[2] - better[2]))


@pytest.mark.parametrize("low, high, told", [([0.4, 0.41, 0.41], [0.6, 0.61, 0.6], "as the paper"),
                                             ([0.6, 0.61, 0.6], [0.4, 0.41, 0.41], "the reverse"),
                                             ([0.6, 0.5, 0.7], [0.5, 0.6, 0.7], "nothing")])
def test_the_table_says_whether_the_papers_ordering_appears(low, high, told):
    """Rows that the paper has below the others get `low`; on images every score is 1 minus that on clips."""
    done = dict([line("pretrain-dual", 0, 0)] + [
        line(f"finetune-{run}", seed, value, 1 - value) for values, runs in (
            (low, ("scratch", "early", "no-residual", "dynamic", "vit", "half-joint", "static")),
            (high, ("s4d", "from-images", "experts-2", "vit-mtl", "half-dynamic-longer")))
        for run in runs for seed, value in enumerate(values)])
    for seed, value in enumerate(low):      # s4d - dynamic-longer is half-joint - half-dynamic-longer but for a little
        done |= [line("finetune-dynamic-longer", seed, 2 * high[seed] - low[seed] + (seed - 1) / 100)]
        done |= [line("finetune-images-1", seed, 2 * high[seed] - value)]
    del done["finetune-vit", 2]
    text = study.report(arguments(), done)
    assert "mean of 3 seeds" in text and "14 epochs of stage 1 and 8 of stage 2" in text
    assert "42 runs, 42.0 hours" in text
    # Tables IV 3, V 3, VI 2 + 2 + 1, VII 1, VIII 1, Figs. 3a 1, 3d 1, Eq. (8) 1; three more pairs stand there twice
    assert "0.8 of the 16 intervals" in text
    table = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines() if row.startswith("|")]
    assert {len(row) for row in table} == {7}

    def cells(label):
        return next(row for row in table if row[0] == label)
    difference = 100 * np.subtract(low, high)
    assert cells("early")[1:3] == ["3,234 + 480", "43.15 / 67.93"] and cells("1 none")[1] == "0 + 480"
    for column, values in ((3, low), (4, 1 - np.array(low))):
        assert cells("early")[column].startswith(f"{100 * np.mean(values):.1f} ± ")
    for label, mean in (("early", difference.mean()), ("images only, half of them an epoch, as in joint",
                                                       -difference.mean())):
        assert told == "nothing" or cells(label)[5].startswith(f"{mean:+.1f} ± ".replace("-", "−"))
    for label, claim, as_the_paper, reverse in (
            ("early", "lower", "agrees", "**disagrees**"), ("clips only", "lower", "agrees", "**disagrees**"),
            ("2 against 1", "higher", "agrees", "**disagrees**"), ("1", "not higher", "**disagrees**", "agrees"),
            ("7 against 6 (2 of 3 seeds)", "its data sets differ", "higher", "lower"),
            ("clips only, as many steps as joint", "no claim", "higher", "lower"),
            ("images only, half of them an epoch, as in joint", "depends on the epoch", "higher", "lower"),
            ("2, both always chosen", "lower", "open", "open"), ("without", "no claim", "lower", "higher"),
            ("joint's gain, against that with all clips", "no claim", "open", "open")):
        here = {"as the paper": as_the_paper, "the reverse": reverse, "nothing": "open"}[told]
        assert cells(label)[6] == f"{claim}: {here}", label
    assert cells("later")[6] == "reference" and cells("middle (0 of 3 seeds)")[3:] == [""] * 4


def test_a_study_goes_on_where_it_was_interrupted(tmp_path, faces):
    command = [sys.executable, str(ROOT / "tests/study.py"), "--data-root", str(faces), "--seeds", "1", "--epochs", "1",
               "1", "--rows", "s4d"]
    results = tmp_path / "runs/study/results.jsonl"
    with open(tmp_path / "first.txt", "w") as output:
        first = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT)
        while first.poll() is None and not results.exists():
            time.sleep(0.05)
        first.send_signal(signal.SIGTERM)
        assert first.wait(timeout=60) == 128 + signal.SIGTERM
    before = results.read_text()
    assert len(before.splitlines()) == 1
    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert second.returncode == 0, second.stderr
    lines = [json.loads(row) for row in results.read_text().splitlines()]
    assert results.read_text().startswith(before) and len(lines) == 2
    assert {row["task"] for row in lines} == {"pretrain-dual", "finetune-s4d"}
    assert [path.parent.parent.name for path in tmp_path.glob("runs/study/*/*/*.pt")] == ["pretrain-dual"]
    s4d = next(row for row in lines if row["task"] == "finetune-s4d")
    logged = json.loads((tmp_path / "runs/study/finetune-s4d/seed0/log.jsonl").read_text())
    assert s4d["uar"] == {name: scores["uar"] for name, scores in logged["test"].items()}
    assert f"{100 * s4d['uar']['image']:.1f}" in second.stdout and "finetune" not in second.stdout

    given = arguments(*command[2:], "--epochs", 2, 1, "--output", results.parent)
    with pytest.raises(SystemExit, match="holds pretrain-dual of seed 0 with --dataset synthetic .* not --dataset"):
        study.finished(given, study.plan(given))
