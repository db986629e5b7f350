"""600 damaged files: each gives a result or a one-line error that names the file, and none a crash, a hang or other
weights than those that were saved."""
import multiprocessing
import random
import signal
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import data
from data import CATALOGUE, Samples, load_samples, read_image, read_sample
from model import MaskedAutoencoder, UserError, rebuild, read_checkpoint
from pretrain import write

SECONDS = 20                                # that one file may take


def damage(content: bytes, dice: random.Random) -> bytes:
    """Change bytes, cut the end off, leave a piece out, put one in, or overwrite one."""
    kind, content = dice.randrange(5), bytearray(content)
    at, length = dice.randrange(len(content)), dice.choice([1, 4, 100, 2000])
    if kind == 0:
        for _ in range(dice.choice([1, 3, 30])):
            content[dice.randrange(len(content))] = dice.randrange(256)
    elif kind == 1:
        del content[at:]
    elif kind == 2:
        del content[at:at + length]
    elif kind == 3:
        content[at:at] = dice.randbytes(length)
    else:
        content[at:at + length] = bytes(length)
    return bytes(content)


def damage_entry(checkpoint: dict, dice: random.Random) -> None:
    """Take an entry of a checkpoint or of a dict in it away, or put something else in its place."""
    place = dice.choice([checkpoint, checkpoint["architecture"], checkpoint["model"]])
    key = dice.choice(sorted(place))
    if dice.random() < 0.3:
        del place[key]
    else:
        place[key] = dice.choice([None, -1, 10 ** 30, "tiny", [], {}, torch.zeros(2), float("nan")])


def use_image(path: Path, folder: Path) -> None:
    image = read_image(path)
    assert image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3 and image.numel()


def use_video(path: Path, folder: Path) -> None:
    samples = Samples("", "video", (), folder, np.array([path.name.encode()]), np.array([-1]))
    clip = read_sample(samples, 0, v2.Identity(), lambda n: data.test_frames(n, 16, 2))
    assert clip.dtype == torch.uint8 and clip.shape[:2] == (32, 3) and clip.numel()


def use_split(path: Path, folder: Path) -> None:
    for name in ("synthetic", "synthetic-images"):
        samples = load_samples(name, folder, "train")
        assert len(samples) == len(samples.labels) and samples.path(0).exists()
        assert 0 <= samples.labels.min() and samples.labels.max() < len(CATALOGUE[name].classes)


def use_checkpoint(path: Path, folder: Path) -> None:
    module, original = rebuild(read_checkpoint(path), path), read_checkpoint(folder / "whole.pt")["model"]
    assert all(torch.equal(value, original[key]) for key, value in module.state_dict().items())


def outcome(use, path: Path, folder: Path) -> str:
    """"used", "refused", or what went wrong."""
    def too_long(number, frame):
        raise TimeoutError(f"longer than {SECONDS} seconds")
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        use(path, folder)
        return "used"
    except UserError as error:
        said = str(error)
        return "refused" if path.name in said and "\n" not in said else f"says only {said!r}"
    except Exception as error:              # whatever else comes out is what this test looks for
        return repr(error)
    finally:
        signal.alarm(0)


def damaged_files(kind: str, faces: Path, folder: Path, count: int):
    """Write `count` damaged files one after the other; yields the path to use each time."""
    dice = random.Random(kind)
    if kind == "checkpoint":
        checkpoint = read_checkpoint(folder / "whole.pt")
        for i in range(count):
            path = folder / f"{i}.pt"
            if i % 3:
                path.write_bytes(damage((folder / "whole.pt").read_bytes(), dice))
            else:
                entries = {key: dict(value) if isinstance(value, dict) else value for key, value in checkpoint.items()}
                damage_entry(entries, dice)
                torch.save(entries, path)
            yield path
            path.unlink()
    elif kind == "split":
        files = [*(folder / "synthetic").glob("DFEW/EmoLabel*/train*/train_set_1.csv"),
                 folder / "synthetic/AffectNet/train_affectnet7.txt"]
        for i in range(count):
            path, whole = files[i % 2], files[i % 2].read_bytes()
            path.write_bytes(damage(whole, dice))
            yield path
            path.write_bytes(whole)
    else:
        root, suffixes = {"image": (faces, [".jpg"]), "video": (faces, [".mp4"]),
                          "animation": (folder / "whole", [".gif", ".webp"])}[kind]
        files = [path for path in sorted(root.rglob("*.*")) if path.suffix in suffixes]
        for i in range(count):
            whole = dice.choice(files)
            path = folder / f"{i}{whole.suffix}"
            path.write_bytes(damage(whole.read_bytes(), dice))
            yield path


@pytest.mark.parametrize("kind, count", [("image", 140), ("video", 130), ("animation", 100), ("split", 130),
                                         ("checkpoint", 100)])
def test_damaged_files_are_used_or_refused_in_a_line(tmp_path, faces, kind, count):
    (tmp_path / "synthetic").mkdir()
    for name in ("DFEW", "AffectNet"):
        (tmp_path / "synthetic" / name).mkdir()
        for path in (faces / "synthetic" / name).iterdir():
            target = tmp_path / "synthetic" / name / path.name
            if path.is_dir() and path.name in ("clip_jpg_256", "Manually_Annotated_Images"):
                target.symlink_to(path)     # the samples; split files are copies, to be damaged
            elif path.is_dir():
                for file in path.rglob("*.csv"):
                    (target / file.parent.name).mkdir(parents=True, exist_ok=True)
                    (target / file.parent.name / file.name).write_bytes(file.read_bytes())
            else:
                target.write_bytes(path.read_bytes())
    (tmp_path / "whole").mkdir()
    moving = [Image.effect_noise((64, 64), 20 + i).convert("RGB") for i in range(20)]
    for suffix in ("gif", "webp"):
        moving[0].save(tmp_path / f"whole/face.{suffix}", save_all=True, append_images=moving[1:])
    module = MaskedAutoencoder("tiny")
    write(tmp_path / "whole.pt", dict(stage="pretrain", architecture=module.architecture, model=module.state_dict()))
    use = {"image": use_image, "video": use_video, "animation": use_video, "split": use_split,
           "checkpoint": use_checkpoint}[kind]
    seen = []
    # A crash must not take pytest with it; a forked process cannot use its parent's threads.
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork"), torch.set_num_threads, (1,)) as pool:
        for path in damaged_files(kind, faces, tmp_path, count):
            seen.append(pool.submit(outcome, use, path, tmp_path).result())
            assert seen[-1] in ("used", "refused"), f"{path.name}, number {len(seen)}: {seen[-1]}"
    assert len(seen) == count and {"used", "refused"} == set(seen), {word: seen.count(word) for word in set(seen)}
