"""What comes from outside is not what it should be: lists, files that are none, full and unwritable disks, too little
shared memory, dying loading processes, two runs in one folder, odd checkpoints, numbers without bounds, huge videos.
Each ends within seconds in a line that says what is wrong."""
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import ROOT, Forked, ended, run_command, run_here
from PIL import Image

import data
import pretrain
from data import catalogue, load_samples, read_clip, read_image
from model import Size, UserError, read_checkpoint

SMALL = Size(32, 1, 2, 32, 2, 1, pixels=32, patch=8)  # 16 frames of 32 x 32
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

@pytest.mark.parametrize("header, line, said", [
    ("path,label", '1.png,"happy', r"line 3: '1.png,\"happy'"), ("path,label", '"1.png,happy', "line 3"),
    ("path,label", '"1".png,a', "line 3"), ("filename,emotion", "1.png,a", "line 1.*found filename, emotion"),
    ("0.png,a", "1.png,b", "line 1.*found 0.png, a")])
def test_a_stray_quote_or_another_header_names_the_line(tmp_path, header, line, said):
    """A quote would swallow the lines after it, a header that is not known would become a sample."""
    lines = write_images(tmp_path, 6)
    path = write_list(tmp_path / "train.csv", [lines[0], line, *lines[2:]], header)
    with pytest.raises(UserError, match=rf"{path}, {said}"):
        load_samples(str(path), tmp_path, "train")


def test_a_list_in_capitals_and_quoted_names(tmp_path):
    write_list(tmp_path / "train.CSV", ['"a, b.png",happy', 'c.png,sad'])
    write_images(tmp_path, 1)
    for name in ("a, b.png", "c.png"):
        os.link(tmp_path / "0.png", tmp_path / name)
    samples = load_samples(str(tmp_path / "train.CSV"), tmp_path, "train")
    assert [samples.path(i).name for i in range(2)] == ["a, b.png", "c.png"] and samples.classes == ("happy", "sad")


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
    assert "was trained with image_dataset" in one_line(text)


def test_training_samples_in_the_test_list_are_refused(tmp_path):
    lines = write_images(tmp_path / "faces", 12)
    write_list(tmp_path / "faces/train.csv", lines[:8])
    write_list(tmp_path / "exam.csv", [f"faces/./{line}" for line in lines[6:]])  # under another name
    text = run_here(tmp_path, "finetune.py", *IMAGES, "--image-dataset", "faces/train.csv,exam.csv", "--pretrained",
                    "none", "--output", "run", status=1)
    assert "2 of the 6 test samples" in one_line(text) and "are training samples too" in text
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------ files that are none

@contextmanager
def time_limit(seconds: int):
    """What waits for ever fails instead."""
    def too_long(number, frame):
        raise TimeoutError(f"longer than {seconds} seconds")
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_pipe_among_the_samples_is_refused(tmp_path):
    """Reading a pipe that nobody writes to waits for ever."""
    lines = write_images(tmp_path, 4)
    os.mkfifo(tmp_path / "pipe.png")
    write_list(tmp_path / "train.csv", [*lines, "pipe.png,a"])
    (tmp_path / "frames").mkdir()
    for name in ("pipe.mp4", "pipe.gif", "frames/1.png"):
        os.mkfifo(tmp_path / name)
    said = "is no file: expected an image or a video"
    with time_limit(30):
        for name in ("pipe.png", "pipe.mp4", "pipe.gif", "frames"):
            with pytest.raises(UserError, match=f"{tmp_path}/{name}(/1.png)? {said}"):
                read_image(tmp_path / name) if name == "pipe.png" else read_clip(tmp_path / name, range)
        text = run_here(tmp_path, "pretrain.py", *IMAGES, "--image-dataset", "train.csv", "--output", "run", status=1)
    assert one_line(text) == f"error: 1 of 5 images cannot be read, more than 1 %; the last: {tmp_path}/pipe.png {said}"


@contextmanager
def as_nobody():
    """Root may read everything: go on as a user who may not."""
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(os.getuid())


def test_what_may_not_be_read_is_named():
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        for file in ("face.jpg", "clip.mp4", "frames"):
            (root / file).mkdir() if file == "frames" else (root / file).write_text("text")
            (root / file).chmod(0)
        for place in ("id1/a", "id2/b"):
            (root / "VoxCeleb2" / place).mkdir(parents=True)
            (root / "VoxCeleb2" / place / "1.mp4").touch()
        (root / "VoxCeleb2/id2").chmod(0)
        with as_nobody():
            for file in ("face.jpg", "clip.mp4", "frames"):
                with pytest.raises(UserError, match=f"{file}.*ermission"):
                    read_image(root / file) if file == "face.jpg" else read_clip(root / file, range)
            # Left out, its clips would be missing without a word.
            text = run_here(root.parent, "pretrain.py", "--data-root", root, "--output", "/no/run", status=1)
            assert one_line(text) == f"error: {root}/VoxCeleb2/id2: Permission denied"


# ------------------------------------------------------------------------- loading processes, shared memory, one folder

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


def test_a_loading_process_that_is_killed_ends_the_run(tmp_path, faces, monkeypatch):
    monkeypatch.setattr(pretrain.TrainingData, "read", killed)
    with time_limit(60):
        text = run_here(tmp_path, "pretrain.py", *IMAGES, "--image-dataset", "synthetic-images", "--data-root", faces,
                        "--workers", 1, "--output", "run", status=1)
    assert one_line(text).startswith("error: loading data: DataLoader worker")


def test_a_loading_process_that_is_killed_ends_both_processes(tmp_path, faces, monkeypatch):
    monkeypatch.setattr(pretrain.TrainingData, "read", killed)
    text = run_command(tmp_path, "pretrain.py", *IMAGES, "--image-dataset", "synthetic-images", "--data-root", faces,
                       "--workers", 1, "--output", tmp_path / "run", processes=2, status=1)
    assert "error: loading data: DataLoader worker" in text


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(tmp_path, faces):
    command = ["pretrain.py", "--dataset", "synthetic", "--data-root", faces, "--workers", 0, "--output",
               tmp_path / "run", "--resume"]
    first = Forked(tmp_path, *command, "--epochs", 1000, "--save-minutes", 0)
    until = time.monotonic() + 60
    while not (tmp_path / "run/last.pt").exists() and first.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    text = run_here(tmp_path, *command, "--epochs", 1000, status=1)
    assert one_line(text) == f"error: another run is writing to {tmp_path / 'run'}: give another --output"
    steps = read_checkpoint(tmp_path / "run/last.pt")["state"]["step"]
    time.sleep(1)
    first.send_signal(signal.SIGTERM)
    assert "rror" not in ended(first, 128 + signal.SIGTERM)
    state = read_checkpoint(tmp_path / "run/last.pt")["state"]
    assert state["epoch"] > 0 or state["step"] >= steps


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
    pre, fine = commands(run)
    for output, said in (("file", "file: File exists"), ("file/run", "file/run: Not a directory")):
        for command in (pre, fine):
            text = run_here(tmp_path, *command, "--output", output, status=1)
            assert one_line(text) == f"error: {said}" and "epoch 1" not in text
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_list(root / "train.csv", write_images(root, 8))
        root.chmod(0o555)
        with as_nobody():
            text = run_here(root, "pretrain.py", *IMAGES, "--image-dataset", "train.csv", "--output", "run", status=1)
        assert one_line(text) == "error: run: Permission denied"


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

def changed(run: Path, to: Path, change) -> Path:
    """The checkpoint of stage 1, as if its epoch was still to come, changed in place by a function."""
    contents = torch.load(run / "stage 1/last.pt", weights_only=True)
    contents["state"] |= dict(epoch=0, step=0, losses=[])
    change(contents)
    torch.save(contents, to)
    return to


def put(*keys_and_value):
    """A function that puts a value in a nested dict."""
    *keys, last, value = keys_and_value

    def change(contents):
        for key in keys:
            contents = contents[key]
        contents[last] = value
    return change


NAN = torch.full((128, 3, 2, 8, 8), float("nan"))
ODD = {
    "settings in a list": put("identity", ["seed", 0]),
    "no dict of weights": put("model", [torch.zeros(3)]),
    "a weight of text": put("model", "mask_token", "0.1"),
    "not finite": put("model", "encoder.patch_embed.proj.weight", NAN),
    "an infinite bias": put("model", "encoder.patch_embed.proj.bias", torch.full((128,), float("inf"))),
    "another stage": put("stage", "middle"),
    "a stage in a list": put("stage", ["pretrain"]),
}
ODD_RUN = {
    "no state": put("state", {}),
    "no moments": put("optimizer", {}),
    "moments not finite": put("optimizer", "state", 0, "exp_avg", torch.full((1, 1, 64), float("nan"))),
    "made by a list": put("made_by", []),
}


@pytest.mark.parametrize("change", [*ODD.values(), *ODD_RUN.values()], ids=[*ODD, *ODD_RUN])
def test_an_odd_checkpoint_is_not_continued(tmp_path, run, change):
    changed(run, tmp_path / "last.pt", change)
    before = (tmp_path / "last.pt").read_bytes()
    text = run_here(tmp_path, *commands(run)[0], "--output", tmp_path, "--epochs", 1, status=1)
    assert f"{tmp_path / 'last.pt'}" in one_line(text)
    assert (tmp_path / "last.pt").read_bytes() == before


@pytest.mark.parametrize("change", ODD.values(), ids=ODD)
def test_an_odd_checkpoint_starts_no_stage_2(tmp_path, run, change):
    path = changed(run, tmp_path / "odd.pt", change)
    text = run_here(tmp_path, *commands(run)[1], "--output", tmp_path / "run", "--pretrained", path, status=1)
    assert str(path) in one_line(text)


def test_weights_that_are_not_finite_are_never_written(tmp_path, run):
    args = pretrain.settings().parse_args(list(map(str, commands(run)[0][1:])) + ["--output", str(tmp_path)])
    process = pretrain.Process(0, 1, torch.device("cpu"), torch.float32)
    folder = pretrain.RunFolder(process, args, "pretrain", {})
    model = pretrain.MaskedAutoencoder("tiny")
    optimizer, state = torch.optim.AdamW(model.parameters()), dict(epoch=0, step=1, losses=[], best=None, left_out={})
    folder.save(model, optimizer, state)
    before = (tmp_path / "last.pt").read_bytes()
    with torch.no_grad():
        model.mask_token[0, 0, 3] = float("inf")
    with pytest.raises(UserError, match="mask_token are not finite.*not written to .*last.pt"):
        folder.save(model, optimizer, state, dict(epoch=1), best=True)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "lock"]


# --------------------------------------------------------------------------------------------------------- numbers

@pytest.mark.parametrize("script, option, value", [
    *((script, option, value) for script in ("pretrain.py", "finetune.py") for option, value in (
        ("--image-share", "1e18"), ("--seed", "12345678901234567890123"), ("--lr", "nan"), ("--epochs", "-3"),
        ("--batch-size", "0"), ("--weight-decay", "inf"), ("--workers", "100000"), ("--stride", "0"))),
    ("finetune.py", "--experts", "1000000000"), ("finetune.py", "--k", "0"), ("finetune.py", "--adapter-width", "1e3"),
    ("finetune.py", "--sigma", "-0.1"), ("finetune.py", "--validation", "1"), ("finetune.py", "--mixing", "nan"),
    ("pretrain.py", "--image-mask-ratio", "1.5"), ("pretrain.py", "--repeats", "0"), ("pretrain.py", "--warmup", "2"),
    ("evaluate.py", "--workers", "-1")])
def test_numbers_have_bounds(tmp_path, script, option, value):
    text = run_here(tmp_path, script, option, value, status=2)
    assert f"error: argument {option}: " in text and value in text and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- images and videos

def test_a_clip_of_a_huge_video_needs_little_memory(tmp_path):
    with av.open(str(tmp_path / "huge.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "crf": "40", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 3840, 2160, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.full((2160, 3840, 3), 90, np.uint8), "rgb24").reformat(format="yuv420p")
        for i in range(40):
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    code = f"""import sys; sys.path.insert(0, {str(ROOT)!r})
import resource
from pathlib import Path
import numpy as np, torch
import data
from model import SIZES
torch.set_num_threads(1)
samples = data.Samples("own", "video", ("a",), Path(), np.array([b"huge.mp4"]), np.array([0]), stride=1)
sources = {{"video": data.Source(samples, 1, 1, repeats=1)}}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
_, views, _ = data.TestData(samples, SIZES["base"])[0]
assert views.shape == (2, 16, 3, 160, 160), views.shape
micro = data.schedule_epoch(sources, 0, 0)[0][0]
for stage in ("pretrain", "finetune"):
    assert data.TrainingData(sources, stage, SIZES["base"])[micro][1].shape == (1, 16, 3, 160, 160)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 400, "MB for frames of 25 MB each"


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_an_animation_gives_the_frames_that_were_drawn(tmp_path, suffix):
    frames = [Image.new("RGB", (32, 32), (6 * i, 6 * i, 6 * i)) for i in range(40)]
    for i, frame in enumerate(frames):
        frame.paste((200, 40, 60), (i % 24, 20, i % 24 + 8, 28))  # what moves is stored as a part of the picture only
    path = tmp_path / f"face{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=40, **(
        {"lossless": True} if suffix == ".webp" else {}))
    wanted, counts = [39, 0, 7, 7, 8, 31, 0], []
    clip = read_clip(path, lambda n: counts.append(n) or wanted)
    drawn = torch.stack([torch.from_numpy(np.array(frame)) for frame in frames]).permute(0, 3, 1, 2)
    assert counts == [40] and clip.dtype == torch.uint8 and clip.shape == (7, 3, 32, 32)
    assert (clip.int() - drawn[wanted].int()).abs().max() <= (0 if suffix == ".webp" else 8)
    halves = read_clip(path, range, lambda frame: frame[:, ::2, ::2])
    assert (halves.int() - drawn[:, :, ::2, ::2].int()).abs().max() <= (0 if suffix == ".webp" else 8)
    Image.new("RGB", (32, 32)).save(tmp_path / f"still{suffix}")
    assert data.shows_clip(path) and not data.shows_clip(tmp_path / f"still{suffix}")
    write_list(tmp_path / "moving.csv", [f"face{suffix},a"])
    write_list(tmp_path / "still.csv", [f"still{suffix},a"])
    write_list(tmp_path / "mixed.csv", [f"face{suffix},a", f"still{suffix},b"])
    assert catalogue(str(tmp_path / "moving.csv")).modality == "video"
    assert catalogue(str(tmp_path / "still.csv")).modality == "image"
    with pytest.raises(UserError, match=f"lists images .still{suffix}. and clips .face{suffix}."):
        catalogue(str(tmp_path / "mixed.csv"))
    samples = load_samples(str(tmp_path / "moving.csv"), tmp_path, "train")
    assert samples.modality == "video" and data.TestData(samples, SMALL)[0][1].shape == (2, 16, 3, 32, 32)


def test_a_damaged_animation_is_named(tmp_path):
    frames = [Image.effect_noise((64, 64), 50 + i) for i in range(10)]
    frames[0].save(tmp_path / "whole.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "cut.gif").write_bytes((tmp_path / "whole.gif").read_bytes()[:9000])
    with pytest.raises(UserError, match="cut.gif"):
        read_clip(tmp_path / "cut.gif", lambda n: range(10))


def test_an_image_of_floating_point_is_refused(tmp_path):
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match="float.tif cannot be read as an image: pixels of floating point"):
        read_image(tmp_path / "float.tif")


def test_an_older_python_is_named():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.version_info = (3, 10, 0); import model"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Python 3.11 or later is needed" in done.stderr
