"""What check.py finds wrong with a data set, and what it shows of one."""
import os
import shutil

import check
import numpy as np
import pytest
from conftest import ROOT, run_here
from PIL import Image

import data
from data import load_samples
from model import UserError

ANNOTATIONS = ROOT.parent / "shared" / "annotations"


def test_good_data_are_right(faces):
    text = run_here(faces, "tests/check.py", "--dataset", "synthetic", "--data-root", faces)
    assert "nothing is wrong" in text and "fold 5, test" in text
    assert "height x width: 64 x 64 (35)" in text and "frames of a clip: 36 minimum" in text
    for name in ("synthetic-images", "synthetic-unlabelled"):
        assert check.check(name, faces) == []


def test_what_is_wrong_is_named(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (20, 30 + i // 7, 3)).astype(np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "train.csv").write_text("path,label,person\n0.png,a,Ann\n1.png,b,Bob\n2.png,b,Bob\n3.png,a,Cem\n"
                                        "3.png,a,Cem\n4.png,a,Dan\n")
    (tmp_path / "test.csv").write_text("path,label,person\n4.png,a,Flo\n5.png,a,Bob\nempty.png,a,Gil\n6.png,b,Hal\n"
                                       "7.png,a,Ida\n")
    text = run_here(tmp_path, "tests/check.py", "--dataset", "train.csv,test.csv", status=1)
    name = f"{tmp_path}/train.csv,{tmp_path}/test.csv"
    for expected in ("error: train lists more than once: 1: 3.png",
                     f"error: samples in both train and test of {name}: 1: {tmp_path}/4.png; people in both train and "
                     f"test of {name}: 1: Bob",
                     f"error: unreadable: 1: {tmp_path / 'empty.png'} cannot be read",
                     "height x width: 20 x 30 (7), 20 x 31 (1)"):
        assert expected in text, text
    assert text.count("error: ") == 3
    rows = [line.split() for line in text.splitlines() if line.startswith("  ")]
    assert ["a", "4", "4"] in rows and ["b", "2", "1"] in rows and ["in", "all", "6", "5"] in rows
    (tmp_path / "6.png").unlink()
    text = run_here(tmp_path, "tests/check.py", "--dataset", "train.csv,test.csv", status=1)
    assert f"not there in {tmp_path}: 1: 6.png" in text


def test_the_published_split_is_known_and_so_are_clips_of_the_wrong_version(tmp_path, monkeypatch, capsys):
    lists = {"train": "video_name,label\n7,7\n12,1\n", "test": "video_name,label\n3,7\n"}  # as DFEW hands them out
    for split, text in lists.items():
        path = tmp_path / f"DFEW/EmoLabel_DataSplit/{split}(single-labeled)/{split}_set_1.csv"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    for i in (3, 7, 12):
        (tmp_path / f"DFEW/clip_jpg_256/{i}").mkdir(parents=True)
        for frame in range(16):
            Image.new("RGB", (8, 8), (10 * i, 10 * frame, 0)).save(tmp_path / f"DFEW/clip_jpg_256/{i}/{frame}.png")
    digest = check.list_digest(["00012.mp4", "00007"], np.array([0, 6]))
    counts = "1 0 0 0 0 0 1"
    for known, wrong in ((digest, None), ("0" * 16, "fold 1, train is not the published split: other samples")):
        monkeypatch.setattr(check, "PUBLISHED", f"dfew train 1 {known} {counts}\ndfew test 1 - 0 0 0 0 0 0 1")
        problems = check.check("dfew", tmp_path, 1)
        printed = capsys.readouterr().out
        assert ("matches the published split" in printed) == (wrong is None) and wrong in (None, problems[0])
        assert "labels count from 1" in printed and "published number of samples" in printed
        assert "no clip has more than 16 frames" in problems[-1]  # DFEW's 16 frames in the place of whole clips


@pytest.mark.skipif(not ANNOTATIONS.is_dir(), reason="the real split files are not beside the repository")
@pytest.mark.parametrize("name, listed, media", [
    ("dfew", "DFEW/EmoLabel_DataSplit/{split}(single-labeled)/{split}_set_{fold}.csv", "DFEW/clip_jpg_256"),
    ("ferv39k", "FERV39K/Annotation/{split}.csv", "FERV39K/2_ClipsforFaceCrop"),
    ("mafw", "MAFW/anno/single/no_caption/set_{fold}/{split}.csv", "MAFW/frames_crop_align_224")])
def test_the_real_split_files_are_the_published_ones(tmp_path, capsys, monkeypatch, name, listed, media):
    """All lists of a set, as if the clips were there."""
    monkeypatch.setattr(data, "locate", lambda root, names, modality: names)
    monkeypatch.setattr(check, "inspect", lambda samples: (np.zeros((len(samples), 4), int), []))
    found = {"dfew": "DFEW/{split}_set_{fold}.csv", "ferv39k": "FERV39K/{split}.csv",
             "mafw": "MAFW/set_{fold}/{split}.csv"}
    (tmp_path / media).mkdir(parents=True)
    folds = 1 if name == "ferv39k" else 5
    for fold, split in ((fold, split) for fold in range(1, folds + 1) for split in ("train", "test")):
        path = tmp_path / listed.format(fold=fold, split=split)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ANNOTATIONS / found[name].format(fold=fold, split=split), path)
    assert check.check(name, tmp_path) == []
    assert capsys.readouterr().out.count("matches the published split") == 2 * folds


@pytest.mark.skipif(not ANNOTATIONS.is_dir(), reason="the real split files are not beside the repository")
def test_affectnets_real_test_list_is_a_published_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "locate", lambda root, names, modality: names)
    monkeypatch.setattr(check, "inspect", lambda samples: (np.zeros((len(samples), 4), int), []))
    (tmp_path / "AffectNet/Manually_Annotated_Images").mkdir(parents=True)
    for split in ("train", "test"):
        shutil.copyfile(ANNOTATIONS / "AffectNet/test_affectnet7.txt", tmp_path / f"AffectNet/{split}_affectnet7.txt")
    problems = check.check("affectnet-7", tmp_path)
    assert capsys.readouterr().out.count("matches the published split") == 1
    assert problems[0] == "train is not the published split: other counts"
    assert problems[1].startswith("samples in both train and test of affectnet-7: 3267: ")


def sheet(*arguments) -> np.ndarray:
    """What --show draws, (H, W, 3)."""
    return check.show(check.settings().parse_args([str(argument) for argument in arguments])).permute(1, 2, 0).numpy()


def test_the_sheet_holds_the_pixels_of_the_loader(faces, tmp_path):
    colour = (200, 60, 40)
    picture = Image.new("RGB", (90, 60), "blue")
    picture.paste(colour, (40, 10, 90, 50))
    for i in range(4):
        picture.save(tmp_path / f"{i}.png")
    (tmp_path / "faces.csv").write_text("path\n0.png\n1.png\n2.png\n3.png\n")
    given = ["--dataset", tmp_path / "faces.csv", "--crop", "40,10,50,40"]
    run_here(tmp_path, "tests/check.py", *given, "--mask", "--show", "sheet.png")
    for shown, size, least, most in ((sheet(*given), 160, 1, 1), (sheet(*given, "--size", "tiny"), 96, 1, 1),
                                     (Image.open(tmp_path / "sheet.png"), 160, 0.1, 0.1)):  # 90 % of it hidden
        pictures = np.array(shown).reshape(-1, 3)
        pictures = pictures[(pictures != 255).all(1)]
        seen = (pictures == colour).all(1)
        assert len(pictures) == 4 * size * size and least <= seen.mean() <= most
        assert (pictures[~seen] == 128).all()
    drawn = ["--data-root", faces, "--dataset"]
    assert sheet(*drawn, "synthetic", "--fold", 2).shape == (8 * 98 + 2, 16 * 98 + 2, 3)
    assert sheet(*drawn, "synthetic", "--size", "base").shape == (8 * 162 + 2, 16 * 162 + 2, 3)
    first, again, other = (sheet(*drawn, "synthetic-images", "--seed", seed) for seed in (0, 0, 1))
    assert (first == again).all() and (first != other).any()
    light, paper = (sheet(*drawn, "synthetic-images", "--augment", strength) for strength in ("light", "paper"))
    assert (light == first).all() and (light != paper).any()
    text = run_here(faces, "tests/check.py", *drawn, "synthetic", "--show", "sheet.png")
    assert text.count("row ") == 8 and ".mp4" in text
    os.remove(tmp_path / "0.png")
    with pytest.raises(UserError, match="0.png"):
        sheet(*given)
    text = run_here(faces, "tests/check.py", "--dataset", "synthetic", "--data-root", faces, "--show", "no/a.png",
                    status=1)
    assert "no/a.png" in text and "cannot be written" in text


def test_a_clip_whose_frames_differ_in_size_is_named(tmp_path):
    for clip, widths in (("even", (40, 40)), ("odd", (40, 50))):
        (tmp_path / f"faces/happy/{clip}").mkdir(parents=True)
        for i, width in enumerate(10 * widths[:1] + 10 * widths[1:]):
            Image.new("L", (width, 40)).save(tmp_path / f"faces/happy/{clip}/{i}.png")
    text = run_here(tmp_path, "tests/check.py", "faces")
    assert "different sizes, which are resized like all: 1: " in text and "faces/happy/odd" in text


def test_a_folder_by_class_is_split_with_people_apart(tmp_path):
    for person in range(10):
        for label in ("happy", "sad, very"):
            path = tmp_path / f"faces/{label}/p{person}_{label[0]}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 20 * person).save(path)
    text = run_here(tmp_path, "tests/check.py", "faces", "--split", "0.3", "--person", r"(p\d+)_")
    assert "test.csv: 6 samples of 3 people: 3 happy, 3 sad, very" in text
    train, test = (load_samples(f"{tmp_path}/train.csv,{tmp_path}/test.csv", tmp_path, split)
                   for split in ("train", "test"))
    assert (len(train), len(test)) == (14, 6) and not data.overlap(train, test)
    assert train.classes == ("happy", "sad, very") and train.modality == "image"
    assert {name.split(b"/")[-1].split(b"_")[0] for name in test.names.tolist()} == set(test.people.tolist())
    run_here(tmp_path, "tests/check.py", "--dataset", "train.csv,test.csv")
    text = run_here(tmp_path, "tests/check.py", "train.csv", "--split", "0.5", "--output", "out")  # one's own list
    assert "train.csv: 8 samples of 4 people" in text or "train.csv: 6 samples of 3 people" in text
    assert "1: " not in run_here(tmp_path, "tests/check.py", "out/train.csv,out/test.csv")
    for arguments, status, said in ((["faces", "--split", "0.3"], 1, "there already"),
                                    (["train.csv,test.csv", "--split", "0.3"], 2, "divided already"),
                                    (["faces", "--split", "0.3", "--person", "x"], 1, "finds nobody in happy/p0_")):
        assert said in run_here(tmp_path, "tests/check.py", *arguments, status=status)


def test_settings_that_cannot_be_are_refused(tmp_path, faces):
    text = run_here(tmp_path, "tests/check.py", "--dataset", "synthetic", "--data-root", faces, "--fold", 6, status=1)
    assert "fold 6" in text
    assert "defw" in run_here(tmp_path, "tests/check.py", "--dataset", "defw", status=1)
