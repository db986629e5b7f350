"""What comes from outside is not what it should be: lists, full and unwritable disks, too little shared memory, dying
loading processes, odd checkpoints. Each ends within seconds in a line that says what is wrong."""
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_command, run_here
from PIL import Image

import data
import pretrain
FEW = ["--epochs", 1, "--batch-size", 8, "--workers", 0]
IMAGES = ["--dataset", "none", "--size", "tiny", *FEW]  # and --image-dataset


def one_line(text: str) -> str:
    """The last line of what was printed, which is the error; it is the only one, and there is no traceback."""
    lines = [line for line in text.splitlines() if "rror" in line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in text, text
    return lines[0]


def write_images(folder: Path, count: int, classes: str = "ab") -> list[str]:
    """Grey pictures 0.png, 1.png, ... -> the lines of a list of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (40, 30), (5 * i, 90, 90)).save(folder / f"{i}.png")
    return [f"{i}.png,{classes[i % len(classes)]}" for i in range(count)]


def write_list(path: Path, lines: list[str], header: str = "path,label") -> Path:
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


# ----------------------------------------------------------------------------------------------------------- lists

def test_one_list_under_two_names_is_one_run(tmp_path):
    write_list(tmp_path / "train.csv", write_images(tmp_path, 8))
    (tmp_path / "below").mkdir()
    output = ["--output", tmp_path / "run", "--resume"]
    first = run_here(tmp_path, "pretrain.py", *IMAGES, "--image-dataset", "./train.csv", *output)
    assert "resumed" not in first
    for folder, name in ((tmp_path, "train.csv"), (tmp_path / "below", "../train.csv"),
                         (Path("/"), tmp_path / "train.csv")):
        assert "resumed from" in run_here(folder, "pretrain.py", *IMAGES, "--image-dataset", name, *output)
    write_list(tmp_path / "other.csv", write_images(tmp_path, 7))
    text = run_here(tmp_path, "pretrain.py", *IMAGES, "--image-dataset", "other.csv", *output, status=1)
    assert "train image was fold 1, stride 1: 8 samples, " in text and "now fold 1, stride 1: 7 samples, " in text
    (tmp_path / "train.csv").rename(tmp_path / "renamed.csv")               # a run is its contents
    assert "resumed from" in run_here(tmp_path, "pretrain.py", *IMAGES, "--image-dataset", "renamed.csv", *output)


def test_a_pipe_among_the_samples_is_refused(tmp_path):
    """Reading a pipe that nobody writes to waits for ever; more than 1 % that cannot be read is an error."""
    write_list(tmp_path / "train.csv", [*write_images(tmp_path, 4), "pipe.png,a"])
    os.mkfifo(tmp_path / "pipe.png")
    text = run_command(tmp_path, "pretrain.py", *IMAGES, "--image-dataset", "train.csv", "--output", "run", status=1)
    assert "error: 1 of 5 images cannot be read, more than 1 %; the last: " in text and "pipe.png" in one_line(text)


def test_training_samples_in_the_test_list_are_refused(tmp_path):
    lines = write_images(tmp_path / "faces", 12)
    write_list(tmp_path / "faces/train.csv", lines[:8])
    write_list(tmp_path / "exam.csv", [f"faces/./{line}" for line in lines[6:]])  # under another name
    text = run_here(tmp_path, "finetune.py", *IMAGES, "--image-dataset", "faces/train.csv,exam.csv", "--pretrained",
                    "none", "--output", "run", status=1)
    assert "6.png" in one_line(text) and "7.png" in text and "exam.csv" in text and not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------- loading processes, shared memory

def test_too_little_shared_memory_ends_the_run(tmp_path, faces):
    script = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    if subprocess.run(["unshare", "-m", "sh", "-c", script, "sh", "true"], capture_output=True).returncode:
        pytest.skip("no /dev/shm of its own for a process")
    command = ["pretrain.py", "--dataset", "none", "--size", "tiny", "--image-dataset", "synthetic-images",
               "--data-root", faces, "--epochs", 1, "--workers", 1, "--output", tmp_path / "run"]
    done = subprocess.run(["unshare", "-m", "sh", "-c", script, "sh", sys.executable, *map(str, command)], cwd=ROOT,
                          text=True, capture_output=True, timeout=60)
    assert done.returncode == 1 and "/dev/shm" in one_line(done.stderr), done.stderr


def test_a_batch_that_cannot_be_handed_over_is_an_error():
    """As where shared memory has room for the pictures and not for the labels: only the queue's thread would know."""
    class Odd(torch.utils.data.Dataset):
        def __getitem__(self, index):
            return lambda: index            # cannot be pickled

    with pytest.raises(RuntimeError, match="DataLoader worker"):
        next(iter(data.loader(Odd(), 1, batch_size=None, sampler=[0, 1])))


def killed(self, samples, modality, index):
    """In the place of TrainingData.read: a loading process of rank 0 dies, as where a system is short of memory."""
    if os.environ.get("RANK", "0") == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.zeros(3, 48, 48, dtype=torch.uint8)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_loading_process_that_is_killed_ends_the_run(tmp_path, faces, monkeypatch, processes):
    monkeypatch.setattr(pretrain.TrainingData, "read", killed)
    text = run_command(tmp_path, "pretrain.py", *IMAGES, "--image-dataset", "synthetic-images", "--data-root", faces,
                       "--workers", 1, "--output", tmp_path / "run", processes=processes, status=1)
    assert "error: DataLoader worker (pid" in text and "fewer --workers" in text
    assert processes == 2 or one_line(text)


# -------------------------------------------------------------------------------------------------------- the disk

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A list of images and a finished run of each stage on it."""
    folder = tmp_path_factory.mktemp("run")
    lines = write_images(folder, 12)
    write_list(folder / "train.csv", lines[:8])
    write_list(folder / "test.csv", lines[8:])
    for command in commands(folder):
        run_here(folder, *command)
    return folder


def commands(folder: Path) -> list[list]:
    own = [folder / "train.csv", f"{folder}/train.csv,{folder}/test.csv"]
    return [["pretrain.py", *IMAGES, "--image-dataset", own[0], "--resume", "--output", folder / "stage 1"],
            ["finetune.py", *IMAGES, "--image-dataset", own[1], "--resume", "--output", folder / "stage 2",
             "--pretrained", folder / "stage 1/last.pt"]]


def test_a_folder_that_cannot_be_written_is_said_before_training(tmp_path, run):
    (tmp_path / "file").write_text("in the way")
    for output, said in (("file", "File exists: 'file'"), ("file/run", "Not a directory: 'file/run'")):
        for command in commands(run):
            text = run_here(tmp_path, *command, "--output", output, status=1)
            assert one_line(text).endswith(said) and "epoch 1" not in text
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_list(root / "train.csv", write_images(root, 8))
        (root / "run").mkdir()
        for folder in (root, root / "run"):
            folder.chmod(0o555)
        if os.geteuid() == 0:               # root may write everything
            os.seteuid(65534)
        try:
            for output in ("new", "run"):
                command = ["pretrain.py", *IMAGES, "--image-dataset", "train.csv", "--output", output]
                assert "Permission denied" in one_line(run_here(root, *command, status=1))
        finally:
            os.seteuid(os.getuid())


@pytest.mark.parametrize("name, start", [("last.pt", 0), ("log.jsonl", 0), ("best.pt", 1)])
def test_a_full_disk_is_a_line_and_the_files_before_stay(tmp_path, run, name, start):
    command = [*commands(run)[start], "--output", tmp_path]
    (tmp_path / f"{name}.part").symlink_to("/dev/full")  # every write to it fails as on a full disk
    text = run_here(tmp_path, *command, status=1)
    line = one_line(text)
    assert line.startswith(f"error: {tmp_path / name} cannot be written: ") and "No space left" in line
    assert not list(tmp_path.glob("*.part")) and not (tmp_path / name).exists()
    run_here(tmp_path, *command, *([] if (tmp_path / "last.pt").exists() else ["--epochs", 1]))
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


# ----------------------------------------------------------------------------------------------------- checkpoints

NAN = float("nan")
ODD = {                                     # where in the checkpoint what is put
    "a weight of text": (["model", "mask_token"], "0.1"),
    "an infinite bias": (["model", "encoder.patch_embed.proj.bias"], torch.full((128,), float("inf"))),
    "another stage": (["stage"], "middle"),
    "moments not finite": (["optimizer", "state", 0, "exp_avg"], torch.full((1, 1, 64), NAN)),
}


@pytest.mark.parametrize("keys, value", ODD.values(), ids=ODD)
def test_an_odd_checkpoint_is_neither_continued_nor_written_over(tmp_path, run, keys, value):
    contents = part = torch.load(run / "stage 1/last.pt", weights_only=True)
    contents["state"] |= dict(epoch=0, step=0, losses=[])
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    path = tmp_path / "last.pt"
    torch.save(contents, path)
    before = path.read_bytes()
    text = run_here(tmp_path, *commands(run)[0], "--output", tmp_path, "--epochs", 1, status=1)
    assert str(path) in one_line(text) and path.read_bytes() == before
    if keys[0] != "optimizer":
        text = run_here(tmp_path, *commands(run)[1], "--output", tmp_path / "run", "--pretrained", path, status=1)
        assert str(path) in one_line(text)
