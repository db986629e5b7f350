"""Nothing is lost: killed, signalled, restarted and moved runs, other settings and data, damaged files, failing
processes, small data, losses that are not finite."""
import contextlib
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Forked, ended, quick, run_command
from endure import differences, endure, finish, processes_of, start, wait_for_a_step

import data
import finetune
import model
import pretrain
from model import UserError

COMMON = ["--dataset", "synthetic", "--workers", 1, "--precision", "fp32", "--resume"]
STAGE_1 = ["pretrain.py", *COMMON, "--batch-size", 16, "--micro-batch", 8]
STAGE_2 = ["finetune.py", *COMMON, "--batch-size", 8, "--micro-batch", 4, "--pretrained", "none", "--test-every", 1]


def epochs(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list:
    return [loss for record in epochs(folder) for loss in record["losses"]]


# ---------------------------------------------------------------------------------------------------------- killed

def test_a_run_that_is_killed_ends_as_if_it_was_not(tmp_path, faces):
    """python tests/endure.py does it 30 times, in both stages."""
    assert "equal bit for bit" in endure(tmp_path, faces, "finetune.py", 2, 1, 1, 0, "--pretrained", "none")


def test_a_second_signal_does_not_wait_for_the_end_of_the_step(tmp_path, faces, monkeypatch):
    """Of a step that takes for ever; the first one waits for it."""
    monkeypatch.setattr(data.TrainingData, "read", lambda *given: open("reading", "w").close() or time.sleep(1000))
    process = Forked(tmp_path, *STAGE_1, "--data-root", faces, "--workers", 0, "--output", tmp_path / "run")
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "reading").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        text, _ = process.communicate(timeout=30)
        assert process.returncode == -signal.SIGTERM, text
    finally:
        process.kill()


@pytest.fixture(scope="module")
def run(tmp_path_factory, faces):
    """A finished run of stage 1 and one of stage 2, two epochs long each."""
    folder = tmp_path_factory.mktemp("run")
    for script, command in ((pretrain, STAGE_1), (finetune, STAGE_2)):
        quick(script, *command[1:], "--data-root", faces, "--epochs", 2, "--output", folder / command[0])
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, run, faces):
    """Undisturbed runs of stage 1, two epochs long, by one process and by two."""
    folder = tmp_path_factory.mktemp("whole")
    run_command(folder, *STAGE_1, "--data-root", faces, "--epochs", 2, "--output", folder / "2", processes=2)
    return {1: run / "pretrain.py", 2: folder / "2"}


@pytest.mark.parametrize("number, processes", [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_ends_a_run_within_the_epoch_without_losing_a_step(whole, tmp_path, faces, number, processes):
    """With a checkpoint per epoch, so that the signal itself must have saved what came after."""
    command = [*STAGE_1, "--data-root", faces, "--epochs", 2, "--output", tmp_path / "stopped"]
    process = Forked(tmp_path, *command, processes=processes)
    while not re.search(r"epoch 2/2:.*\| [1-5]/11 ", process.text()) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number, group=processes == 1)
    assert "Traceback" not in ended(process, 128 + number)
    state = model.read_checkpoint(tmp_path / "stopped/last.pt")["state"]
    assert state["epoch"] == 1 and state["step"] > 0
    run_command(tmp_path, *command, processes=processes)
    assert not differences(whole[processes], tmp_path / "stopped")


def test_torchrun_restarts_and_ends_a_run_that_goes_on_where_it_was(whole, tmp_path, faces):
    command = [*STAGE_1, "--data-root", faces, "--epochs", 2, "--save-minutes", 0, "--output", tmp_path / "restarted"]
    process = start(tmp_path, *command, processes=2, restarts=1)
    wait_for_a_step(process, tmp_path / "restarted")
    of_rank_one = [pid for pid in processes_of(tmp_path / "restarted")
                   if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    for pid in sorted(of_rank_one):         # its loading process too, which alone would keep its sockets open for 5 s
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + 120
    while "resumed from" not in (tmp_path / "output.txt").read_text() and time.monotonic() < until:
        time.sleep(0.05)
    assert "resumed from" in (tmp_path / "output.txt").read_text()
    wait_for_a_step(process, tmp_path / "restarted")
    process.send_signal(signal.SIGTERM)
    finish(process, tmp_path, status=1)     # torchrun's own
    assert "resumed from" in run_command(tmp_path, *command, processes=2)
    assert not differences(whole[2], tmp_path / "restarted")


# ------------------------------------------------------------------------------------------------ continued or refused

def copy(run: Path, to: Path, epoch: int) -> Path:
    """The folder of stage 1 again, as if the run had so many epochs behind it, whatever the weights."""
    shutil.copytree(run / "pretrain.py", to)
    checkpoint = torch.load(to / "last.pt", weights_only=True)
    checkpoint["state"] |= dict(epoch=epoch, step=0, losses=[])
    torch.save(checkpoint, to / "last.pt")
    return to


def test_a_checkpoint_says_where_it_comes_from(run, faces):
    checkpoint = model.read_checkpoint(run / "finetune.py/last.pt")
    made_by = checkpoint["made_by"]
    assert made_by["torch"] == torch.__version__ and made_by["processes"] == 1
    assert "--epochs 2" in made_by["command"] and "digests" not in checkpoint
    identity = checkpoint["identity"]
    assert identity["seed"] == 0 and identity["batch_size"] == 8 and identity["data_root"] == str(faces)
    assert identity["precision"] == "fp32"
    assert identity["video stride"] == 2 and identity["video rate"] > 0
    for split in ("train", "test"):
        for m, name in (("video", "synthetic"), ("image", "synthetic-images")):
            assert identity[f"{split} {m}"] == data.load_samples(name, faces, split).fingerprint()


@pytest.mark.parametrize("more, said", [
    (["--seed", 1, "--lr", 0.5], "last.pt is of another run: lr was 0.024, now 0.5; seed was 0, now 1"),
    (["--video-mask-ratio", 0.5], "video_mask_ratio was 0.862, now 0.5"),
    (["--stride", 1], "video stride was 2, now 1"),
    (["--crop", "0,0,40,48"], r"crop was None, now \(0, 0, 40, 48\)"),
    (["--precision", "bf16"], "precision was fp32, now bf16"),
    (["--image-dataset", "none"], "train image was fold 1, .* now None"),
])
def test_other_settings_are_refused(run, faces, more, said):
    with pytest.raises(UserError, match=said):
        quick(pretrain, *STAGE_1[1:], "--data-root", faces, "--epochs", 2, "--output", run / "pretrain.py", *more)


def test_a_moved_run_goes_on_with_settings_that_change_no_number(run, faces, tmp_path, capsys):
    """The run, its data and the weights that it began with are elsewhere, or no more; other loading, other times."""
    quick(finetune, *STAGE_2[1:], "--data-root", faces, "--epochs", 1, "--output", run / "on",
          "--pretrained", run / "pretrain.py/last.pt")
    for folder, new in ((faces / "synthetic", "data/synthetic"), (run / "on", "on"), (run / "pretrain.py", "first")):
        shutil.copytree(folder, tmp_path / new)
    command = [*STAGE_2[1:], "--data-root", tmp_path / "data", "--epochs", 1, "--output", tmp_path / "on"]
    for first in (tmp_path / "first/last.pt", tmp_path / "lost.pt"):
        capsys.readouterr()
        quick(finetune, *command, "--pretrained", first, "--workers", 0, "--save-minutes", 3, "--stride", 2)
        text = capsys.readouterr().out
        assert "resumed from" in text and "fp32: as --precision says" in text
        assert "best.pt is epoch 1, chosen by WAR on the test fold itself\n" in text
    torch.save({}, tmp_path / "lost.pt")
    with pytest.raises(UserError, match="pretrained fingerprint was [0-9a-f]{16}, now"):
        quick(finetune, *command, "--pretrained", tmp_path / "lost.pt")
    split = tmp_path / "data/synthetic/AffectNet/train_affectnet7.txt"
    split.write_text("".join(split.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="train image was .*: 105 samples, fingerprint .*, now .*: 104 samples, fing"):
        quick(finetune, *command, "--pretrained", tmp_path / "first/last.pt")


def test_a_run_keeps_its_precision(run, faces, tmp_path, monkeypatch, capsys):
    """Also where another one is faster; without --precision what is faster is taken, and said."""
    command = [*STAGE_1[1:], "--data-root", faces, "--epochs", 2, "--output"]
    command = [argument for argument in command if argument not in ("--precision", "fp32")]
    copy(run, tmp_path / "run", epoch=1)
    monkeypatch.setattr(pretrain, "product_seconds", lambda width: [2.0, 1.5])
    quick(pretrain, *command, tmp_path / "run")
    assert model.read_checkpoint(tmp_path / "run/last.pt")["identity"]["precision"] == "fp32"
    assert "fp32: as the run began" in capsys.readouterr().out
    process = pretrain.start("tiny")
    assert process.precision == "bf16" and process.reason == "products in fp32 take 1.33 of their time in bf16 here"


def test_a_second_run_in_the_same_folder_stops_and_the_first_goes_on(run, faces, tmp_path):
    """Whoever finds another file than the one that it wrote or read leaves it alone."""
    copy(run, tmp_path / "run", epoch=0)
    command = [*STAGE_1, "--data-root", faces, "--epochs", 2, "--output", tmp_path / "run"]
    slow = Forked(tmp_path, *command, "--save-minutes", 100)
    while not re.search("epoch 1/2:.*[1-9]/11 ", slow.text()) and slow.poll() is None:
        time.sleep(0.01)
    before = (tmp_path / "run/last.pt").stat()
    os.utime(tmp_path / "run/last.pt", ns=(before.st_atime_ns, before.st_mtime_ns + 1000))
    text = ended(slow, status=1)
    assert "another run writes here: " in text and "Traceback" not in text
    assert (tmp_path / "run/last.pt").stat().st_mtime_ns == before.st_mtime_ns + 1000


def test_another_number_of_processes_is_accepted(run, faces, tmp_path):
    copy(run, tmp_path / "run", epoch=1)
    shutil.copytree(tmp_path / "run", tmp_path / "one")
    quick(pretrain, *STAGE_1[1:], "--data-root", faces, "--epochs", 2, "--output", tmp_path / "one")
    run_command(tmp_path, *STAGE_1, "--data-root", faces, "--epochs", 2, "--output", tmp_path / "run", processes=2)
    assert len(losses(tmp_path / "run")) == len(losses(run / "pretrain.py"))
    assert [loss for _, loss in losses(tmp_path / "run")] == pytest.approx(
        [loss for _, loss in losses(tmp_path / "one")], rel=2e-3)


def test_a_damaged_checkpoint_is_said_and_stays(run, faces, tmp_path):
    folder = copy(run, tmp_path / "run", epoch=1)
    whole = (folder / "last.pt").read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1           # one wrong bit in a weight
    for damaged, said in ((changed, ".*the checksum of its part"), (whole[:1000], "cannot be read as a")):
        (folder / "last.pt").write_bytes(damaged)
        with pytest.raises(UserError, match=f"{folder}/last.pt {said}"):
            quick(pretrain, *STAGE_1[1:], "--data-root", faces, "--epochs", 2, "--output", folder)
        assert (folder / "last.pt").read_bytes() == damaged
    shutil.copy(run / "finetune.py/best.pt", folder / "last.pt")
    with pytest.raises(UserError, match="last.pt is no last.pt of a run: it has no optimizer"):
        quick(finetune, *STAGE_2[1:], "--data-root", faces, "--output", folder)


@pytest.mark.parametrize("name, resume", [("last.pt", False), ("best.pt", True), ("log.jsonl", True)])
def test_a_folder_that_holds_part_of_a_run_is_not_written_over(run, faces, tmp_path, name, resume):
    """Also with --resume, which needs last.pt."""
    shutil.copy(run / "finetune.py" / name, tmp_path)
    before = (tmp_path / name).read_bytes()
    command = [*STAGE_2[1:], "--data-root", faces, "--epochs", 2, "--output", tmp_path]
    with pytest.raises(UserError, match=f"{name} exists: give --resume to continue that run from last.pt, another"):
        quick(finetune, *(argument for argument in command if resume or argument != "--resume"))
    assert (tmp_path / name).read_bytes() == before


# ------------------------------------------------------------------------------------------- processes, losses, data

def test_four_processes_do_what_one_does(tmp_path, faces):
    """Two micro-batches of clips and of images in a step: fewer than processes, and of different sizes."""
    command = [*STAGE_2, "--data-root", faces, "--epochs", 1, "--image-batch-size", 12, "--output"]
    quick(finetune, *command[1:], tmp_path / "1")
    run_command(tmp_path, *command, tmp_path / "4", processes=4)
    one, four = losses(tmp_path / "1"), losses(tmp_path / "4")
    assert [modality for modality, _ in one] == [modality for modality, _ in four]
    assert [loss for _, loss in one] == pytest.approx([loss for _, loss in four], rel=2e-3)
    for mine, theirs in zip(epochs(tmp_path / "1"), epochs(tmp_path / "4")):
        for modality in ("image", "video"):
            assert mine["gates"][modality].keys() == {"2", "3"}  # the last two of four, counted from 0
            share = mine["gates"][modality]["2"]
            assert sum(share) == pytest.approx(1, abs=1e-3)
            assert share == pytest.approx(theirs["gates"][modality]["2"], abs=0.01)


@pytest.mark.parametrize("script, command", [(pretrain, STAGE_1),
                                             (finetune, [*STAGE_2, "--mixing", 1, "--augment", "paper"])])
def test_the_number_of_loading_workers_changes_nothing(tmp_path, faces, script, command):
    for workers in (0, 2):
        quick(script, *command[1:], "--data-root", faces, "--epochs", 1, "--output",
              tmp_path / str(workers), "--workers", workers)
    assert not differences(tmp_path / "0", tmp_path / "2")


def test_under_torchrun_the_reason_stands_last(tmp_path, faces):
    shutil.copytree(faces / "synthetic", tmp_path / "synthetic")
    for clip in sorted((tmp_path / "synthetic/DFEW/clip_jpg_256").iterdir())[:20]:
        clip.write_bytes(b"")
    finish(start(tmp_path, *STAGE_2, "--data-root", tmp_path, "--output", tmp_path / "run", processes=2), tmp_path, 1)
    *_, last, _ = (tmp_path / "output.txt").read_text().splitlines()
    assert re.fullmatch(r"  traceback : \d+ of 28 videos cannot be read, more than 1 %; the last: .*\.mp4.*", last)


@pytest.mark.parametrize("script, command", [(pretrain, STAGE_1), (finetune, STAGE_2)])
def test_a_loss_that_is_not_finite_stops_naming_step_and_files(tmp_path, faces, monkeypatch, script, command):
    monkeypatch.setattr(pretrain.Rate, "__call__", lambda self, step: 1e30)
    with pytest.raises(UserError, match=r"epoch 1, step \d: the loss became .*: stopped before the weights change\. "
                                        r"The last (images|videos) of this process: .*\.(jpg|mp4)"):
        quick(script, *command[1:], "--data-root", faces, "--epochs", 3, "--output", tmp_path / "run",
              "--save-minutes", 0)
    model.load_checkpoint(tmp_path / "run/last.pt")  # which refuses weights that are not finite


def small_data(faces: Path, root: Path, clips: int, images: int, label: int | None = None) -> Path:
    """Synthetic data with so few training samples, and one test sample each; `label`: all of one class."""
    shutil.copytree(faces / "synthetic", root / "synthetic")
    for split, number in (("train", clips), ("test", 1)):
        path = root / f"synthetic/DFEW/EmoLabel_DataSplit/{split}(single-labeled)/{split}_set_1.csv"
        header, *lines = path.read_text().splitlines()
        path.write_text("\n".join([header, *relabelled(lines[:number], ",", label)]) + "\n")
        path = root / f"synthetic/AffectNet/{split}_affectnet7.txt"
        lines = path.read_text().splitlines()[:images if split == "train" else 1]
        path.write_text("\n".join(relabelled(lines, " ", label)) + "\n")
    for path in sorted((root / "synthetic/VoxCeleb2").glob("*/*/*.mp4"))[clips:]:
        path.unlink()
    (root / "synthetic/VoxCeleb2/files.txt").unlink(missing_ok=True)
    return root


def relabelled(lines: list[str], separator: str, label: int | None) -> list[str]:
    return lines if label is None else [f"{line.rsplit(separator, 1)[0]}{separator}{label}" for line in lines]


@pytest.mark.parametrize("clips, images, label, more", [
    (1, 1, None, []), (2, 3, None, ["--mixing", 1, "--augment", "paper"]), (3, 5, 3, []),
    (3, 1, None, ["--image-dataset", "none"]), (1, 20, None, ["--dataset", "none", "--size", "tiny", "--image-dataset",
                                                              "synthetic-images"])])
def test_few_samples_and_one_class_train_and_test(tmp_path, faces, capsys, clips, images, label, more):
    root = small_data(faces, tmp_path, clips, images, label)
    of_both = [m for m in more if m not in ("--mixing", 1, "--augment", "paper")]
    for script, command, more in ((pretrain, STAGE_1, of_both), (finetune, STAGE_2, more)):
        quick(script, *command[1:], "--data-root", root, "--epochs", 2, "--workers", 0, "--output",
              tmp_path / script.__name__, *more)
        assert all(loss > 0 for _, loss in losses(tmp_path / script.__name__))
    assert "UAR" in capsys.readouterr().out


def test_an_empty_test_fold_is_said_before_training(tmp_path, faces):
    root = small_data(faces, tmp_path, 3, 3)
    path = root / "synthetic/DFEW/EmoLabel_DataSplit/test(single-labeled)/test_set_1.csv"
    path.write_text("video_name,label\n")
    with pytest.raises(UserError, match="test_set_1.csv holds no samples"):
        quick(finetune, *STAGE_2[1:], "--data-root", root, "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_more_validation_data_than_a_class_has_samples_is_said(tmp_path, faces):
    root = small_data(faces, tmp_path, 1, 1)
    with pytest.raises(UserError, match="0.2 of the 1 samples .* leaves none to hold out"):
        quick(finetune, *STAGE_2[1:], "--data-root", root, "--output", tmp_path / "run", "--validation",
              0.2)


class Steps(list):
    """A step for each given batch, in their order; they stand in the place of the labels."""

    def __init__(self, batches: list):
        super().__init__(batches)
        n = len(batches)
        samples = data.Samples("", "image", (), Path(), np.array(n * [b"7.jpg"]), np.zeros(n))
        self.sources = {"image": data.Source(samples, 1, 1)}

    def __getitem__(self, micro):
        return micro, torch.zeros(1, 3, 8, 8, dtype=torch.uint8), self.pop(0), []


def train_linear(batches: list, clip: float | None = None) -> tuple[torch.Tensor, list]:
    """pretrain.train with a loss whose gradient is the batch itself, by plain descent at rate 1, from weights of 0.
    Returns the weights at the end and what the log has."""
    weights, records = torch.nn.Linear(3, 1, bias=False), []
    optimizer = torch.optim.SGD(pretrain.decayed(weights.named_parameters(), 0.0), 1.0)
    torch.nn.init.zeros_(weights.weight)
    folder = SimpleNamespace(load=lambda *_: None, due=lambda: False, stage="pretrain",
                             save=lambda model, optimizer, state, record=None: records.append(record))
    with contextlib.suppress(UserError):
        pretrain.train(pretrain.Process(0, 1, torch.device("cpu"), "fp32"),
                       SimpleNamespace(epochs=1, workers=0, compile=None, clip_grad=clip, seed=0), folder, weights,
                       Linear(weights), optimizer, pretrain.Rate(1.0, 0, len(batches), 1.0, 1.0), Steps(batches))
    return weights.weight.detach(), records


class Linear(torch.nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.weights = weights

    def forward(self, x, labels):
        return (self.weights.weight * labels).sum()


@pytest.fixture
def signals():
    """`train` catches them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_gradient_is_clipped_to_the_norm_that_is_set(signals):
    direction = torch.tensor([[3.0, 0, 4.0]])
    for clip, expected in ((None, [3.0, 0, 4.0]), (1.0, [0.6, 0, 0.8]), (50.0, [3.0, 0, 4.0])):
        weights, _ = train_linear([direction], clip)
        assert (-weights).flatten().tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_no_weight(signals, value):
    good, bad = torch.tensor([[3.0, 0, 4.0]]), torch.tensor([[1.0, value, 1.0]])
    weights, records = train_linear([good, bad])
    assert (-weights).flatten().tolist() == [3.0, 0, 4.0] and not records  # nothing is saved after it either
    weights, records = train_linear([good, good])
    assert (-weights).flatten().tolist() == [6.0, 0, 8.0]
    assert [loss for _, loss in records[-1]["losses"]] == [0, -25] and records[-1]["loss"] == {"image": -12.5}
