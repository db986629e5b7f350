"""The study of the paper's comparisons: what it runs, how it goes on, and its statistics."""
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import study
from conftest import ROOT

import finetune
import pretrain
from data import load_samples


def arguments(monkeypatch, *given):
    monkeypatch.setattr("sys.argv", ["study.py", *map(str, given)])
    return study.settings().parse_args()


def parsed(task):
    """A task's settings as its script reads them."""
    script = {"pretrain.py": pretrain, "finetune.py": finetune}[os.path.basename(task.command[1])]
    return script, vars(pretrain.parse(script.settings(), script.TINY, task.command[2:]))


def test_every_row_is_one_run_of_a_seed_and_no_two_runs_are_the_same(monkeypatch, tmp_path):
    tasks = study.plan(arguments(monkeypatch, "--seeds", 2, "--output", tmp_path))
    named = {run for table in study.TABLES for row in table.rows for run in row.runs.split() if run not in "+-"}
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


def test_runs_of_as_many_steps_as_joint_have_them(monkeypatch):
    tasks = {task.name: parsed(task)[1] for task in study.plan(arguments(monkeypatch, "--seeds", 1))}

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
    return (task, seed), dict(task=task, seed=seed, flags="", steps=1480, seconds=1, uar=scores, war=scores)


def test_differences_are_paired_and_have_a_t_interval():
    rng = np.random.default_rng(0)
    fold = rng.normal(0, 0.2, 5)            # what makes a fold hard for both
    better, worse = 0.6 + fold + rng.normal(0, 0.01, 5), 0.5 + fold + rng.normal(0, 0.01, 5)
    done = dict([line("finetune-s4d", seed, value) for seed, value in enumerate(better)]
                + [line("finetune-early", seed, value) for seed, value in enumerate(worse)])
    mean, half = study.mean_and_interval(list(study.uar(done, "early - s4d", "video").values()))
    differences = 100 * (worse - better)
    assert mean == pytest.approx(differences.mean())
    assert half == pytest.approx(2.776 * np.sqrt(((differences - mean) ** 2).sum() / 4 / 5), rel=1e-3)
    of_one = study.mean_and_interval(list(study.uar(done, "early", "video").values()))[1]
    assert half < of_one / 5, "the folds' difficulty cancels out"
    assert math.isnan(study.mean_and_interval([1.0])[1]) and math.isnan(study.mean_and_interval([])[0])
    del done["finetune-s4d", 3]
    assert list(study.uar(done, study.minus("early", "s4d - early"), "video")) == [0, 1, 2, 4]
    assert study.uar(done, study.minus("early", "s4d - early"), "video")[2] == pytest.approx(
        100 * (2 * worse[2] - better[2]))


@pytest.mark.parametrize("low, high", [([0.4, 0.41, 0.41], [0.6, 0.61, 0.6]), ([0.6, 0.5, 0.7], [0.5, 0.6, 0.7])])
def test_the_table_says_whether_the_papers_ordering_appears(monkeypatch, low, high):
    done = dict([line("pretrain-dual", 0, 0)] + [
        line(f"finetune-{run}", seed, value, value) for values, runs in (
            (low, ("scratch", "early", "no-residual", "dynamic", "vit", "half-joint")),
            (high, ("s4d", "from-images", "images-1", "experts-2", "vit-mtl", "half-dynamic-longer")))
        for run in runs for seed, value in enumerate(values)])
    for seed, value in enumerate(low):      # s4d - dynamic-longer is half-joint - half-dynamic-longer
        done |= [line("finetune-dynamic-longer", seed, 2 * high[seed] - low[seed] + (seed - 1) / 100)]
        done |= [line("finetune-images-1", seed, 2 * high[seed] - value)]
    table = [[cell.strip() for cell in row.split("|")[1:-1]]
             for row in study.report(arguments(monkeypatch), done).splitlines() if row.startswith("|")]
    assert {len(row) for row in table} == {7}
    told = low[0] < high[0]

    def cells(label):
        return next(row for row in table if row[0] == label)
    difference = 100 * np.subtract(low, high)
    assert cells("early")[1:4] == ["1,480 + 1,480", "43.15 / 67.93", cells("early")[4]]
    assert cells("early")[3].startswith(f"{100 * np.mean(low):.1f} ± ")
    assert cells("early")[5].startswith(f"{difference.mean():+.1f} ± ".replace("-", "−"))
    for label, claim, here in (
            ("early", "lower", "agrees"), ("clips only", "lower", "agrees"), ("without", "no claim", "lower"),
            ("2 against 1", "higher", "agrees"), ("7 against 6", "its data sets differ", "higher"),
            ("2, both always chosen", "lower", "open"), ("1", "not higher", "**disagrees**"),
            ("clips only, as many steps as joint", "no claim", "higher"),
            ("joint's gain, against that with all clips", "no claim", "open")):
        assert cells(label)[6] == f"{claim}: {here if told else 'open'}", label
    assert cells("later")[6] == "reference" and cells("1 none")[1].startswith("0 + ")
    assert cells("middle (0 of 3 seeds)")[3:] == [""] * 4


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

    other = subprocess.run([*command, "--table", "--epochs", "2", "1"], cwd=tmp_path, capture_output=True, text=True)
    assert other.returncode == 1 and "holds pretrain-dual of seed 0 with --dataset synthetic" in other.stderr
