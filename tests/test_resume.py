"""Nothing is lost: killed, signalled and restarted runs, other settings and data, full disks, damaged files, failing
processes, small and odd data."""
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import quick, run_command, start_command
from endure import differences, endure, finish, processes_of, start, wait_for_a_step

import data
import finetune
import model
import pretrain

STAGE_1 = ["pretrain.py", "--dataset", "synthetic", "--batch-size", 16, "--workers", 1, "--resume"]
STAGE_2 = ["finetune.py", "--dataset", "synthetic", "--batch-size", 8, "--workers", 1, "--resume", "--pretrained",
           "none"]


def epochs(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list:
    return [loss for record in epochs(folder) for loss in record["losses"]]


# ---------------------------------------------------------------------------------------------------------- killed

def test_a_run_that_is_killed_ends_as_if_it_was_not(tmp_path, faces):
    """python tests/endure.py does it 30 times, in both stages."""
    assert "equal bit for bit" in endure(tmp_path, faces, "finetune.py", 4, 1, 1, 0, "--pretrained", "none")


@pytest.fixture(scope="module")
def run(tmp_path_factory, faces):
    """A finished run of stage 1 and one of stage 2, three and two epochs long."""
    folder = tmp_path_factory.mktemp("run")
    for script, command, length in ((pretrain, STAGE_1, 3), (finetune, STAGE_2, 2)):
        quick(script, *command[1:], "--data-root", faces, "--epochs", length, "--output", folder / command[0])
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, run, faces):
    """Undisturbed runs of stage 1, three epochs long, by one process and by two."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(folder, *STAGE_1, "--data-root", faces, "--epochs", 3, "--output", folder / "2", processes=2), folder)
    return {1: run / "pretrain.py", 2: folder / "2"}


@pytest.mark.parametrize("number, processes", [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_ends_a_run_within_the_epoch_without_losing_a_step(whole, tmp_path, faces, number, processes):
    """With a checkpoint per epoch, so that the signal itself must have saved what came after."""
    command = [*STAGE_1, "--data-root", faces, "--epochs", 3, "--output", tmp_path / "stopped"]
    process = start(tmp_path, *command, processes=processes)
    wait_for_a_step(process, tmp_path / "stopped")
    if processes == 1:                      # to the loading processes too, as a terminal or a batch system does
        for pid in processes_of(tmp_path / "stopped"):
            os.kill(pid, number)
    else:
        process.send_signal(number)
    status = process.wait(timeout=60)
    text = (tmp_path / "output.txt").read_text()
    assert status == (128 + number if processes == 1 else 1), text  # torchrun's own exit status is 1
    assert processes == 2 or "Traceback" not in text
    assert model.read_checkpoint(tmp_path / "stopped/last.pt")["progress"]["epoch"] < 3
    finish(start(tmp_path, *command, processes=processes), tmp_path)
    assert not differences(whole[processes], tmp_path / "stopped")


def test_torchrun_restarts_a_run_that_goes_on_where_it_was(whole, tmp_path, faces):
    process = start(tmp_path, *STAGE_1, "--data-root", faces, "--epochs", 3, "--save-minutes", 0, "--output",
                    tmp_path / "restarted", processes=2, restarts=1)
    wait_for_a_step(process, tmp_path / "restarted")
    of_rank_one = [pid for pid in processes_of(tmp_path / "restarted")
                   if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(min(of_rank_one), signal.SIGKILL)  # the others are its loading processes
    finish(process, tmp_path)
    assert "resumed from" in (tmp_path / "output.txt").read_text()
    assert not differences(whole[2], tmp_path / "restarted")


# ------------------------------------------------------------------------------------------------ continued or refused

def copy(run: Path, to: Path, script: str, **changes) -> Path:
    """The run's folder again, with its last checkpoint changed."""
    shutil.copytree(run / script, to)
    checkpoint = torch.load(to / "last.pt", weights_only=True)
    torch.save(checkpoint | changes, to / "last.pt")
    return to


def test_a_checkpoint_says_where_it_comes_from(run, faces):
    checkpoint = model.read_checkpoint(run / "finetune.py/last.pt")
    made_by = checkpoint["made_by"]
    assert made_by["torch"] == torch.__version__ and made_by["processes"] == 1 and "--epochs 2" in made_by["command"]
    assert checkpoint["settings"]["seed"] == 0 and checkpoint["settings"]["batch_size"] == 8
    train, test = (data.load_samples("synthetic", faces, split) for split in ("train", "test"))
    video = checkpoint["data"]["train"]["video"]
    assert (video["name"], video["fold"], video["samples"]) == ("synthetic", 1, 28)
    assert video["fingerprint"] == train.fingerprint() != test.fingerprint()
    assert checkpoint["data"]["test"]["video"]["fingerprint"] == test.fingerprint()
    assert torch.equal(video["digests"], torch.from_numpy(train.digests()))
    assert not set(train.digests().tolist()) & set(test.digests().tolist()) and len(set(train.digests())) == 28


@pytest.mark.parametrize("more, message", [
    (["--seed", 1], "was trained with --seed 0, not 1: that is another run"),
    (["--lr", 0.5], "was trained with --lr 0.024, not 0.5"),
    (["--image-dataset", "none"], "--image-dataset None, not none"),
])
def test_other_settings_are_refused(run, faces, more, message):
    with pytest.raises(model.CheckpointError, match=message):
        quick(pretrain, *STAGE_1[1:], "--data-root", faces, "--epochs", 3, "--output",
              run / "pretrain.py", *more)


def test_other_data_are_refused_and_the_same_data_elsewhere_are_not(run, faces, tmp_path, capsys):
    shutil.copytree(faces / "synthetic", tmp_path / "synthetic")
    command = [*STAGE_2[1:], "--epochs", 2, "--output", run / "finetune.py", "--data-root", tmp_path]
    quick(finetune, *command)
    assert "resumed from" in capsys.readouterr().out
    split = tmp_path / "synthetic/AffectNet/train_affectnet7.txt"
    split.write_text("".join(split.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(model.CheckpointError, match=r"belongs to other data: its image train data were 105 samples.* "
                                                    r"now they are 104"):
        quick(finetune, *command)


def test_another_number_of_processes_is_accepted_and_said(run, faces, tmp_path):
    shutil.copytree(run / "pretrain.py", tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run/previous.pt", weights_only=True)
    checkpoint["progress"] |= dict(pretrain.new_epoch(), epoch=2)  # one epoch to go, whatever the weights
    torch.save(checkpoint, tmp_path / "run/last.pt")
    shutil.copytree(tmp_path / "run", tmp_path / "one")
    quick(pretrain, *STAGE_1[1:], "--data-root", faces, "--epochs", 3, "--output", tmp_path / "one")
    text = run_command(tmp_path, *STAGE_1, "--data-root", faces, "--epochs", 3, "--output", tmp_path / "run",
                       processes=2)
    assert "1 processes then, 2 now: the samples of every step, their crops, masks and noise stay the same" in text
    assert len(losses(tmp_path / "run")) == len(losses(run / "pretrain.py"))
    assert [loss for _, loss in losses(tmp_path / "run")] == pytest.approx(
        [loss for _, loss in losses(tmp_path / "one")], rel=2e-3)


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(run, faces, tmp_path, capsys):
    folder = copy(run, tmp_path / "run", "pretrain.py")
    whole = bytearray((folder / "last.pt").read_bytes())
    whole[len(whole) // 2] ^= 1             # one wrong bit in a weight
    (folder / "last.pt").write_bytes(whole)
    command = [*STAGE_1[1:], "--data-root", faces, "--epochs", 3, "--output", folder]
    quick(pretrain, *command)
    printed = capsys.readouterr()
    assert "is damaged: the checksum of its part" in printed.err and "the checkpoint before it is taken" in printed.err
    assert not differences(run / "pretrain.py", folder)
    for name in ("last.pt", "previous.pt"):
        (folder / name).write_bytes(whole[:1000])
    with pytest.raises(model.DamagedError, match="previous.pt cannot be read"):
        quick(pretrain, *command)


def test_what_is_no_run_to_continue_is_said_in_a_line(run, faces, tmp_path):
    command = [*STAGE_1[1:], "--data-root", faces, "--epochs", 3, "--output"]
    folder = copy(run, tmp_path / "bare", "pretrain.py")
    checkpoint = torch.load(folder / "last.pt", weights_only=True)
    del checkpoint["optimizer"]
    torch.save(checkpoint, folder / "last.pt")
    with pytest.raises(model.CheckpointError, match="no checkpoint of pretrain to continue from.*lacks optimizer"):
        quick(pretrain, *command, folder)
    with pytest.raises(model.CheckpointError, match="no checkpoint of pretrain to continue from: it is of finetune"):
        quick(pretrain, *command, run / "finetune.py")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(model.CheckpointError, match="folder .*file cannot be written"):
        quick(pretrain, *command, tmp_path / "file")


def test_a_lost_log_is_said_and_begun_anew(run, faces, tmp_path, capsys):
    shutil.copytree(run / "pretrain.py", tmp_path / "run")
    (tmp_path / "run/last.pt").unlink()
    (tmp_path / "run/log.jsonl").unlink()
    quick(pretrain, *STAGE_1[1:], "--data-root", faces, "--epochs", 3, "--output", tmp_path / "run")
    assert "holds 0 of 2 epochs; the others are lost" in capsys.readouterr().out
    assert [record["epoch"] for record in epochs(tmp_path / "run")] == [3]


def test_a_full_disk_is_said_and_leaves_the_checkpoint_before(run, faces, tmp_path):
    shutil.copytree(run / "pretrain.py", tmp_path / "run")
    (tmp_path / "run/last.pt").rename(tmp_path / "run/previous.pt")
    before = (tmp_path / "run/previous.pt").read_bytes()
    changed = torch.load(tmp_path / "run/previous.pt", weights_only=True)
    changed["progress"] |= dict(pretrain.new_epoch(), epoch=2)  # one epoch to go
    torch.save(changed, tmp_path / "run/last.pt")
    before = (tmp_path / "run/last.pt").read_bytes()
    (tmp_path / "run/last.pt.part").symlink_to("/dev/full")  # every write to it fails as on a full disk
    with pytest.raises(model.CheckpointError, match=r"last.pt cannot be written: .*No space left .*MB are free"):
        quick(pretrain, *STAGE_1[1:], "--data-root", faces, "--epochs", 3, "--output", tmp_path / "run")
    assert (tmp_path / "run/last.pt").read_bytes() == before and not list((tmp_path / "run").glob("*.part"))


# ------------------------------------------------------------------------------------------- processes, losses, data

def test_four_processes_do_what_one_does(tmp_path, faces):
    """Two micro-batches of clips and of images in a step: fewer than processes, and of different sizes."""
    command = [*STAGE_2, "--data-root", faces, "--epochs", 2, "--micro-batch", 4, "--image-batch-size", 12, "--output"]
    quick(finetune, *command[1:], tmp_path / "1")
    run_command(tmp_path, *command, tmp_path / "4", processes=4)
    one, four = losses(tmp_path / "1"), losses(tmp_path / "4")
    assert [source for source, _ in one] == [source for source, _ in four]
    assert [loss for _, loss in one] == pytest.approx([loss for _, loss in four], rel=2e-3)
    for mine, theirs in zip(epochs(tmp_path / "1"), epochs(tmp_path / "4")):
        for source in ("image", "video"):
            share = mine["gates"][source]["2"]["share"]
            assert sum(share) == pytest.approx(1, abs=1e-3)
            assert share == pytest.approx(theirs["gates"][source]["2"]["share"], abs=0.01)


def test_the_first_processes_clock_alone_says_when_to_save(tmp_path, faces):
    """The others never write, so that to them a checkpoint is overdue for ever."""
    (tmp_path / "late.py").write_text(f"""import os, sys
sys.path.insert(0, {str(Path(pretrain.__file__).parent)!r})
import pretrain
save = pretrain.RunFolder.save
pretrain.RunFolder.save = lambda *given: print("saving") or save(*given)
pretrain.RunFolder.overdue = lambda self: os.environ["RANK"] == "1"
pretrain.main()
""")
    text = run_command(tmp_path, tmp_path / "late.py", *STAGE_1[1:], "--data-root", faces, "--epochs", 1, "--output",
                       tmp_path / "run", processes=2)
    assert text.count("saving") == 2        # before and after the end of the epoch


@pytest.mark.parametrize("script, command", [(pretrain, STAGE_1),
                                             (finetune, [*STAGE_2, "--mixing", 1, "--augment", "paper"])])
def test_the_number_of_loading_workers_changes_nothing(tmp_path, faces, script, command):
    for workers in (0, 1, 2):
        quick(script, *command[1:], "--data-root", faces, "--epochs", 1, "--output",
              tmp_path / str(workers), "--workers", workers)
    assert not differences(tmp_path / "0", tmp_path / "1") and not differences(tmp_path / "0", tmp_path / "2")


def test_a_process_that_fails_ends_all_with_its_own_message_first(tmp_path, faces):
    shutil.copytree(faces / "synthetic", tmp_path / "synthetic")
    for clip in sorted((tmp_path / "synthetic/DFEW/clip_jpg_256").iterdir())[:20]:
        clip.write_bytes(b"")
    process = start_command(tmp_path, *STAGE_2, "--data-root", tmp_path, "--output", tmp_path / "run", processes=2)
    began = time.monotonic()
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and time.monotonic() - began < 60, text  # gloo's own time-out is half an hour
    first = next(line for line in text.splitlines() if "error" in line.lower() or "Traceback" in line)
    assert "videos cannot be read, more than 1 %" in first


@pytest.mark.parametrize("command", [[*STAGE_1, "--lr", 1e30, "--warmup", 0],
                                     [*STAGE_2, "--lr", 1e30, "--warmup-epochs", 0]])
def test_a_loss_that_is_not_finite_stops_naming_step_and_files(tmp_path, faces, command):
    script = {"pretrain.py": pretrain, "finetune.py": finetune}[command[0]]
    with pytest.raises(pretrain.NotFinite, match=r"at step \d, epoch 1, a batch of (images|videos)s?: .*\.(jpg|mp4)"):
        quick(script, *command[1:], "--data-root", faces, "--epochs", 3, "--output", tmp_path / "run",
              "--save-minutes", 0)
    for name in ("last.pt", "previous.pt"):
        if (tmp_path / "run" / name).exists():
            model.load_checkpoint(tmp_path / "run" / name)


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
    (1, 1, None, []), (2, 3, None, ["--mixing", 1, "--augment", "paper"]), (3, 5, 3, ["--balance", 0.01]),
    (3, 1, None, ["--image-dataset", "none"]), (1, 20, None, ["--dataset", "none", "--size", "tiny", "--image-dataset",
                                                              "synthetic-images"])])
def test_few_samples_and_one_class_train_and_test(tmp_path, faces, capsys, clips, images, label, more):
    root = small_data(faces, tmp_path, clips, images, label)
    for script, command, more in ((pretrain, STAGE_1, [m for m in more if m not in ("--mixing", 1, "--augment", "paper",
                                                                                      "--balance", 0.01)]),
                                  (finetune, STAGE_2, more)):
        quick(script, *command[1:], "--data-root", root, "--epochs", 2, "--workers", 0, "--output",
              tmp_path / script.__name__, *more)
        assert all(loss > 0 for _, loss in losses(tmp_path / script.__name__))
    assert "UAR" in capsys.readouterr().out


def test_an_empty_test_fold_is_said_before_training(tmp_path, faces):
    root = small_data(faces, tmp_path, 3, 3)
    path = root / "synthetic/DFEW/EmoLabel_DataSplit/test(single-labeled)/test_set_1.csv"
    path.write_text("video_name,label\n")
    with pytest.raises(data.DataError, match="test_set_1.csv holds no samples"):
        quick(finetune, *STAGE_2[1:], "--data-root", root, "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_more_validation_data_than_a_class_has_samples_is_said(tmp_path, faces):
    root = small_data(faces, tmp_path, 1, 1)
    with pytest.raises(data.DataError, match="--validation 0.2 of the 1 samples .* leaves none to hold out"):
        quick(finetune, *STAGE_2[1:], "--data-root", root, "--output", tmp_path / "run", "--validation",
              0.2)


def test_the_gradient_is_clipped_to_the_norm_that_is_set():
    weights, direction = torch.nn.Linear(3, 1, bias=False), torch.tensor([[3.0, 0, 4.0]])
    for clip, expected in ((None, [3.0, 0, 4.0]), (1.0, [0.6, 0, 0.8]), (50.0, [3.0, 0, 4.0])):
        before = weights.weight.detach().clone()
        optimizer = torch.optim.SGD(weights.parameters(), 1.0)
        micro = data.MicroBatch("image", 0, 0, 0, torch.arange(0), 1.0, True, 0)
        one = pretrain.Run(0, 1, torch.device("cpu"), torch.float32)
        done = pretrain.optimise(one, lambda x, labels, weight: weight * (weights.weight * x).sum(),
                                 iter([(micro, direction, torch.zeros(1), [])]), optimizer,
                                 pretrain.Unreadable({"image": data.Source(None, 1, 1)}, {}), 0, clip, False)
        assert done.norm == pytest.approx(5.0)
        assert (before - weights.weight.detach()).flatten().tolist() == pytest.approx(expected, rel=1e-4)
