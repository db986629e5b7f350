"""What the code costs, measured on files that it writes itself: nothing here is a test, and no test waits for it.

    python tests/benchmark.py data            reading, sampling and augmenting, beside decord and plain JPEG decoding

Rivals run in turns, several times, and medians are printed: other work on the machine then disturbs all of them. CPU
seconds are those of this process and its threads. decord is measured where it is installed (pip install decord).
"""
import argparse
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402  (needs the path above)
from model import SIZES  # noqa: E402

try:
    import decord
except ImportError:
    decord = None


def measure(rivals: dict, rounds: int) -> dict[str, tuple[float, float]]:
    """Median (CPU seconds, seconds) of one call of each rival, in turns; the first round does not count."""
    times = {name: [] for name in rivals}
    for turn in range(rounds + 1):
        for name, run in rivals.items():
            cpu, began = time.process_time(), time.perf_counter()
            run(turn)
            if turn:
                times[name].append((time.process_time() - cpu, time.perf_counter() - began))
    return {name: tuple(np.median(values, axis=0)) for name, values in times.items()}


def print_rates(title: str, samples: int, measured: dict, rival: str | None) -> None:
    """Samples per CPU-second and per second, and how many times the rival's rate that is."""
    print(title)
    for name, (cpu, seconds) in measured.items():
        ratio = f"   {measured[rival][0] / cpu:.2f} x {rival} per CPU-second" if rival in measured else ""
        print(f"  {name:28}{samples / cpu:9.1f} per CPU-second{samples / seconds:9.1f} per second{ratio}")


# ------------------------------------------------------------------------------------------------------------- data

def moving_picture(rng: np.random.Generator, frames: int):
    """Frames (224, 224, 3) of a smooth picture that sways behind a little noise: about VoxCeleb2's bits per second."""
    picture = Image.fromarray(rng.integers(0, 256, (24, 24, 3)).astype(np.uint8)).resize((384, 384), Image.BICUBIC)
    wide, speeds = np.asarray(picture).astype(np.int16), rng.uniform(0.03, 0.12, 2)
    for i in range(frames):
        down, right = (80 + 60 * np.sin(speeds * i)).astype(int)
        noisy = wide[down:down + 224, right:right + 224] + rng.integers(-8, 9, (224, 224, 1))
        yield noisy.clip(0, 255).astype(np.uint8)


def write_files(root: Path, count: int) -> tuple[data.Samples, data.Samples]:
    """Videos as VoxCeleb2 has them (8 s, 25 fps, H.264, a key frame every 250 frames) and folders of 60 JPEGs."""
    rng, options = np.random.default_rng(0), {"g": "250"}
    for i in range(count):
        (root / "folders" / f"{i}").mkdir(parents=True)
        with av.open(str(root / f"{i}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=25, options=options)
            stream.width = stream.height = 224
            for n, frame in enumerate(moving_picture(rng, 200)):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
                if n < 60:
                    Image.fromarray(frame).save(root / "folders" / f"{i}" / f"{n + 1:05d}.jpg", quality=92)
            container.mux(stream.encode())

    def samples(folder: Path, suffix: str) -> data.Samples:
        names = np.array([f"{i}{suffix}".encode() for i in range(count)])
        return data.Samples("", data.VOXCELEB2, folder, names, np.zeros(count, np.int64), stride=4)
    return samples(root, ".mp4"), samples(root / "folders", "")


def decord_clip(path: Path, choose) -> torch.Tensor:
    """data.read_clip, by decord."""
    reader = decord.VideoReader(str(path), num_threads=1)
    return torch.from_numpy(reader.get_batch(choose(len(reader))).asnumpy()).permute(0, 3, 1, 2)


def plain_jpegs(path: Path, choose) -> torch.Tensor:
    """data.read_clip of a folder without any of its care: nothing but Pillow's decoding."""
    files = sorted(os.listdir(path))
    frames = [torch.from_numpy(np.array(Image.open(path / files[i]))) for i in choose(len(files))]
    return torch.stack(frames).permute(0, 3, 1, 2)


def draw(training: data.TrainingData, source: data.Source, reader, turn: int) -> torch.Tensor:
    """One micro-batch of every sample through the whole path, with another reader in place of data.read_clip."""
    own, data.read_clip = data.read_clip, reader
    try:
        micro = data.schedule_epoch({"video": source}, 0, turn)[0][0]
        _, x, _, unreadable = training[micro]
    finally:
        data.read_clip = own
    assert not unreadable and len(x) == source.batch, unreadable
    return x


def benchmark_reading(rounds: int, clips: int) -> None:
    torch.set_num_threads(1)                # as in a loading process
    own = data.read_clip
    with tempfile.TemporaryDirectory() as folder:
        videos, folders = write_files(Path(folder), clips)
        size = sum(videos.path(i).stat().st_size for i in range(clips)) / clips
        print(f"{clips} videos, 224 x 224, 200 frames, a key frame every 250, {size / 1024:.0f} KiB on average; and "
              "their first 60 frames as JPEG")
        for stage, repeats in (("pretrain", 4), ("finetune", 1)):
            for kind, samples, rival, reader in (("videos", videos, "decord", decord and decord_clip),
                                                 ("folders", folders, "plain JPEGs", plain_jpegs)):
                source = data.Source(samples, clips * repeats, clips * repeats, share=repeats, repeats=repeats)
                training = data.TrainingData({"video": source}, stage, SIZES["base"])
                readers = {"data.py": own} | ({rival: reader} if reader else {})
                drawn = [draw(training, source, reader, 0) for reader in readers.values()]
                assert all(torch.equal(x, drawn[0]) for x in drawn), "the readers differ"
                measured = measure({name: partial(draw, training, source, reader) for name, reader in readers.items()},
                                   rounds)
                print_rates(f"{stage}, {kind}, whole path", clips * repeats, measured, rival)


def memory(pid: int) -> tuple[float, float]:
    """A process's proportional and own memory, PSS and USS, in MiB."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    kib = {name: int(lines[name].split()[0]) for name in ("Pss", "Private_Clean", "Private_Dirty")}
    return kib["Pss"] / 1024, (kib["Private_Clean"] + kib["Private_Dirty"]) / 1024


def benchmark_index(lines: int, workers: int = 4) -> None:
    """Time to load a list file of that many clips, and what the loading processes then hold. No clip is there."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "VoxCeleb2"
        root.mkdir()
        names = (f"id{i // 182:05d}/{i // 8:011d}/{i % 8:05d}.mp4" for i in range(lines))
        (root / data.FILE_LIST).write_text("\n".join(names))
        began = time.perf_counter()
        samples = data.load_samples("voxceleb2", Path(folder), "train")
        seconds = time.perf_counter() - began
        source = data.Source(samples, 16, 16, repeats=4)
        began = time.perf_counter()
        loading = iter(data.loader(data.TrainingData({"video": source}, "pretrain", SIZES["base"]), workers,
                                   batch_size=None, sampler=data.Schedule({"video": source}, 0, 1, 0, 1)))
        for _ in range(10 * workers):
            next(loading)
        first = time.perf_counter() - began
        held = [memory(worker.pid) for worker in loading._workers]
        pss, uss = np.mean(held, axis=0)
        print(f"{len(samples):9,} clips listed: loaded in {seconds:.2f} s, {10 * workers} micro-batches after "
              f"{first:.2f} s; each of {workers} loading processes PSS {pss:.0f} MiB, USS {uss:.0f} MiB")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser("data", help="reading, sampling, augmenting; the index of VoxCeleb2")
    c.add_argument("--rounds", type=int, default=7, help="measured turns of each rival")
    c.add_argument("--clips", type=int, default=8, help="videos and folders to write")
    args = p.parse_args()
    if args.command == "data":
        for lines in (1_000, 1_092_009):
            benchmark_index(lines)
        benchmark_reading(args.rounds, args.clips)


if __name__ == "__main__":
    main()
