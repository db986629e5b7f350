"""The drawn faces: what they hold, that they depend on their seed only, and how drawing ends."""
import hashlib
import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import Forked, ended, run_here
from faces import plan_files, write_faces

import data
from data import load_samples
from model import Size, UserError

SMALL = Size(32, 1, 2, 32, 2, 1, pixels=32, patch=8)  # 16 frames of 32 x 32
SCALE = 0.01


def hashes(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(root.rglob("*")) if path.is_file()}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_data(tmp_path):
    for folder, seed in (("first", 0), ("again", 0), ("other", 1)):
        write_faces(tmp_path / folder / "synthetic", seed, SCALE)
    first, again, other = (hashes(tmp_path / folder / "synthetic") for folder in ("first", "again", "other"))
    assert again == first and len(set(first.values())) > 80  # and not all the same picture
    assert not set(other.values()) & set(first.values()) and len(other) == len(first)
    for name, splits in (("synthetic", 5), ("synthetic-images", 1), ("synthetic-unlabelled", 1)):
        for split in ("train", "test"):
            for fold in range(1, splits + 1):
                one, two = (load_samples(name, tmp_path / folder, split, fold) for folder in ("first", "other"))
                assert one.counts() == two.counts() if one.classes else len(one) == len(two)
                assert one.fingerprint() != two.fingerprint()
                assert not set(one.names.tolist()) & set(two.names.tolist())


@pytest.mark.parametrize("name, shape", [("synthetic", (2, 16, 3, 32, 32)), ("synthetic-images", (1, 3, 32, 32)),
                                         ("synthetic-unlabelled", (2, 16, 3, 32, 32))])
def test_the_sets_load_like_the_real_ones(faces, name, shape):
    samples = load_samples(name, faces, "train", 1)
    i, views, label = data.TestData(samples, SMALL)[len(samples) - 1]
    assert i == len(samples) - 1 and views.shape == shape and views.float().std() > 10
    assert label == samples.labels[-1]


def test_people_of_the_test_data_are_never_trained_on_and_folds_partition_the_clips(faces):
    files = plan_files(faces / "synthetic", 0, 0.05)
    person = {file.path: (file.kind, file.person) for file in files}
    word = {"happy": "happiness", "sad": "sadness", "angry": "anger"}  # DFEW's word -> the file's

    def loaded(name, split, fold=1):
        samples = load_samples(name, faces, split, fold)
        return samples, [samples.path(i) for i in range(len(samples))]

    tested = []
    clips = [file.path for file in files if "DFEW" in file.path.parts]
    expressions = {file.path: file.expression for file in files}
    for name, folds in (("synthetic", range(1, 6)), ("synthetic-images", [1])):
        for fold in folds:
            (train, training), (test, testing) = loaded(name, "train", fold), loaded(name, "test", fold)
            assert not {person[path] for path in training} & {person[path] for path in testing}
            assert min(train.counts()) > 0 and min(test.counts()) > 0
            classes = [word.get(c, c) for c in train.classes]
            assert [classes[label] for label in train.labels] == [expressions[path] for path in training]
            if name == "synthetic":
                assert sorted(training + testing) == sorted(clips)
                tested += testing
    assert sorted(tested) == sorted(clips)  # each clip is tested once


def test_what_is_there_already_stays(tmp_path):
    text = run_here(tmp_path, "tests/faces.py", "--scale", 0.001)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    assert len(before) > 20 and "there already" not in text
    assert "data/synthetic is there already" in run_here(tmp_path, "tests/faces.py", "--scale", 0.001)
    for other in (["--seed", 1, "--scale", 0.001], []):
        text = run_here(tmp_path, "tests/faces.py", *other, status=1)
        assert 'error: data/synthetic holds {"seed": 0, "scale": 0.001, ' in text and "delete it" in text
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == before
    shutil.rmtree(tmp_path / "data/synthetic")
    (tmp_path / "data/synthetic").mkdir()
    assert "data/synthetic holds other files" in run_here(tmp_path, "tests/faces.py", status=1)


@pytest.mark.parametrize("arguments, said", [
    (["--seed", -1], "--seed"), (["--scale", 0], "--scale"), (["--scale", "nan"], "--scale"),
    (["--scale", "inf"], "--scale")])
def test_wrong_settings_are_refused_before_anything_is_drawn(tmp_path, arguments, said):
    assert said in run_here(tmp_path, "tests/faces.py", *arguments, status=2) and not list(tmp_path.iterdir())


def test_two_starts_at_once_both_end_well(tmp_path):
    starts = [Forked(tmp_path, "tests/faces.py", "--scale", 0.001) for _ in range(2)]
    texts = [ended(process) for process in starts]
    assert sum("meanwhile" in text or "there already" in text for text in texts) == 1, texts
    assert os.listdir(tmp_path / "data") == ["synthetic"]
    assert len(load_samples("synthetic", tmp_path / "data", "train")) == 28


def test_what_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"{tmp_path}/file cannot be written: "):
        write_faces(tmp_path / "file" / "synthetic", scale=SCALE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit, file in ((1_000, "jpg"), (7_000, "mp4")):  # bytes of a file, as a full disk has it
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            text = run_here(tmp_path, "tests/faces.py", "--scale", 0.001, status=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        last = text.splitlines()[-1]
        assert last.startswith("error: data/synthetic.") and f".{file} cannot be written: File too large" in last
        assert not list((tmp_path / "data").iterdir())


def drawing(folder: Path) -> tuple[Forked, list[int]]:
    """A process that draws, and its workers."""
    process = Forked(folder, "tests/faces.py")
    until = time.monotonic() + 60
    while not list(folder.glob("data/synthetic.*/synthetic/AffectNet/*/*/*.jpg")):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{process.pids[0]}/task/{process.pids[0]}/children").read_text().split()
    assert len(children) == os.cpu_count()
    return process, [int(child) for child in children]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's list of processes")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_drawing_processes_end_with_their_parent(tmp_path, number):
    process, children = drawing(tmp_path)
    process.send_signal(number)
    text = process.communicate(timeout=30)[0]
    until = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < until, "a worker outlives its parent"
        time.sleep(0.05)
    assert "Traceback" not in text and not (tmp_path / "data/synthetic").exists()
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number and not list((tmp_path / "data").iterdir())


def test_the_folder_says_what_it_holds(faces):
    assert json.loads((faces / "synthetic/made_by.json").read_text()) == {
        "seed": 0, "scale": 0.05, "test_people": 0, "labels": "expression"}
