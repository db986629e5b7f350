"""The study: equal steps, worlds in memory, what is finished stays, and its statistics."""
import json
import math
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import study
from faces import write_faces
from readme import ROOT

from data import MicroBatch, Source, TrainingData, deal
from model import SIZES


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> study.World:
    """A small world: 4 people with labelled clips, 3 to test on."""
    with mock.patch.multiple(study, TEST_PEOPLE=3, SCALE=0.05):
        return study.World(7, tmp_path_factory.mktemp("study"))


@pytest.fixture
def small(monkeypatch):
    steps = {"pretrain": {"video": 2, "image": 4}, "finetune": {"video": 4, "image": 1}}
    monkeypatch.setattr(study, "STEPS", steps)
    monkeypatch.setattr(study, "EPOCHS", {"pretrain": 1, "finetune": 1})


def test_all_rows_train_for_the_same_number_of_steps_whatever_they_see(world, small, monkeypatch):
    seen = {}

    def train(process, args, folder, model, objective, optimizer, rate, data):
        steps = [micro for micro in deal(data.sources, args.seed, args.epochs, 0, 1, 0, 0) if micro.is_last]
        seen[current] = len(steps), {m: sum(micro.modality == m for micro in steps) for m in data.sources}, rate.steps
    monkeypatch.setattr(study.pretrain, "train", train)
    monkeypatch.setattr(study, "evaluate", lambda *given: ({"uar": 0.5}, None))
    for start in ("image", "video", "both"):
        current = start
        world.stage_1(start)
    assert seen == {"image": (6, {"image": 6}, 6), "video": (6, {"video": 6}, 6),
                    "both": (6, {"video": 2, "image": 4}, 6)}
    seen.clear()
    for current, row in study.ROWS.items():
        world.stage_2(row._replace(people=min(row.people, 4)))
    lengths = {name: steps for name, (steps, _, _) in seen.items()}
    assert lengths == dict.fromkeys(study.ROWS, 5)
    assert all(parts == ({"video": 4, "image": 1} if study.ROWS[name].images else {"video": 5})
               for name, (_, parts, _) in seen.items())


def test_a_world_in_memory_gives_the_same_batches(world):
    for stage, key in (("pretrain", ("video", "unlabelled")), ("finetune", ("video", "train")),
                       ("finetune", ("image", "train"))):
        m, samples = key[0], world.samples[key]
        sources = {m: Source(samples, 4, 4)}
        micro = MicroBatch(m, np.array([3, 1, 3]), 1.0, True, seed=5)
        plain = TrainingData(sources, stage, SIZES["tiny"], "light")[micro]
        for _ in range(2):
            data = study.InMemory(sources, stage, SIZES["tiny"], "light")
            data.memory = world.memory[stage]
            kept = data[micro]
            assert (kept[1] == plain[1]).all() and (kept[2] == plain[2]).all()


def test_a_world_is_tested_on_so_many_people_of_whom_none_is_trained_on(world):
    clips = [{(int(name[:-4]) - 7_000_001) // 7 for name in world.samples["video", split].names}
             for split in ("train", "test")]
    assert clips == [set(range(4)), set(range(4, 7))]
    assert [world.samples["image", split].counts() for split in ("train", "test")] == [[15] * 7, [3] * 7]


def test_labels_that_disagree_are_those_that_the_option_writes(world, tmp_path):
    write_faces(tmp_path / "synthetic", 7, scale=0.05, test_people=3, follow="person")
    for split in ("train", "test"):
        samples = study.load_samples("synthetic-images", tmp_path, split)
        agreeing, disagreeing = world.samples["image", split], world.samples["disagree", split]
        assert (samples.labels == disagreeing.labels).all() and (samples.labels != agreeing.labels).any()
        assert (samples.names == agreeing.names).all() and (samples.names == disagreeing.names).all()


def test_what_is_finished_is_not_run_again(world, small, tmp_path, monkeypatch):
    results, made = tmp_path / "world-7.jsonl", []

    def run(*rows):
        args = study.settings().parse_args(["--worlds", "7", "--rows", *rows, "--output", str(tmp_path)])
        study.run_worlds(0, 1, args)
        return results.read_text().splitlines()

    monkeypatch.setattr(study, "World", lambda *given: made.append(given) or world)
    monkeypatch.setattr(world, "folder", tmp_path / "world-7")
    (tmp_path / "world-7").mkdir()
    lines = run("none", "clips-4")
    assert [json.loads(line)["row"] for line in lines] == ["none", "clips-4"]
    assert 0 <= json.loads(lines[1])["uar"]["video"] <= 1 and "image" not in json.loads(lines[1])["uar"]
    assert run("none", "clips-4") == lines and made == [(7, tmp_path / "world-7", 1)]
    again = run("none", "clips-4", "image")
    assert again[:2] == lines and json.loads(again[2])["row"] == "image"
    results.write_text(lines[1] + "\n")
    assert json.loads(run("none")[1])["uar"] == json.loads(lines[0])["uar"], "the same numbers once more"


def test_intervals_are_paired_and_open_where_they_hold_zero():
    first, second = [0.5, 0.6, 0.7], [0.4, 0.3, 0.5]
    worlds = [{"s4d": {"uar": {"video": a, "image": 0.9}, "seconds": 60}, "none": {"uar": {"video": b}, "seconds": 60}}
              for a, b in zip(first, second)]
    mean, half = study.interval(study.scores(worlds, "s4d", "none"))
    assert mean == pytest.approx(20)        # differences of 10, 30 and 20 points: deviation 10, t = 4.303
    assert half == pytest.approx(4.303 * 10 / math.sqrt(3))
    assert re.search(r"stage 1 on both - none +\| \+20.0 ± 24.8 \| open", study.report(worlds))
    for world, b in zip(worlds, (0.4, 0.5, 0.6)):
        world["none"]["uar"]["video"] = b + 1e-4 * b
    assert re.search(r"stage 1 on both - none .*higher", study.report(worlds))


def test_the_command_reports_and_draws(tmp_path, capsys):
    for seed in (0, 1):
        lines = [dict(row=name, uar={"video": 0.5 + 0.1 * seed, "image": 0.7}, seconds=1800) for name in study.ROWS]
        (tmp_path / f"world-{seed}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    with mock.patch("sys.argv", ["study.py", "--report", "--worlds", "0", "1", "--output", str(tmp_path)]):
        study.main()
    printed = capsys.readouterr().out
    assert "55.0 ± 63.5" in printed and f"{2 * len(study.ROWS)} runs in 2 worlds" in printed
    assert Path(tmp_path, "study.svg").stat().st_size > 1000


def test_the_pages_say_what_the_command_prints_of_the_rows_beside_them(capsys, monkeypatch):
    page, readme = (ROOT / "tests/study.md").read_text(), (ROOT / "README.md").read_text()
    command = re.search(r"`python tests/(study.py --report [^`]+)`", page)[1]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", command.split())
    monkeypatch.setattr(study, "picture", lambda worlds, path: None)  # it is there already
    study.main()
    printed = capsys.readouterr().out.strip()
    assert printed in page
    figures = re.findall(r"[\d.]+ ± [\d.]+\d", page + readme)
    assert len(figures) > 60 and all(figure in printed for figure in figures)
