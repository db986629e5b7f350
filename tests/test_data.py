"""Behaviour of data.py but for its readers: lists, one's own data, clip sampling, augmentation, schedule, loading."""
import os
import pickle
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import ROOT, run_here
from PIL import Image

import data
from data import CATALOGUE, Samples, Source, deal, load_samples
from model import Size, UserError

SHARED = ROOT.parent / "shared"
SMALL = Size(32, 1, 2, 32, 2, 1, pixels=32, patch=8)  # 16 frames of 32 x 32


# ------------------------------------------------------------------------------------------------ published data sets

# Folder of samples and training list as people have them: written out here so that a wrong catalogue is noticed.
LAYOUT = {
    "dfew": ("DFEW/clip_jpg_256", "DFEW/EmoLabel_DataSplit/train(single-labeled)/train_set_1.csv"),
    "dfew-16f": ("DFEW/Clip/clip_224x224_16f", "DFEW/EmoLabel_DataSplit/train(single-labeled)/train_set_1.csv"),
    "ferv39k": ("FERV39K/2_ClipsforFaceCrop", "FERV39K/Annotation/train.csv"),
    "mafw": ("MAFW/frames_crop_align_224", "MAFW/anno/single/no_caption/set_1/train.csv"),
    "affectnet-7": ("AffectNet/Manually_Annotated_Images", "AffectNet/train_affectnet7.txt"),
}


def make(root: Path, names: list[str]) -> None:
    """Empty samples: folders, and files where there is a suffix."""
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = root / name
        (path.parent if path.suffix else path).mkdir(parents=True, exist_ok=True)
        if path.suffix:
            path.touch()


def write_set(root: Path, name: str, text: str, samples: list[str]) -> Path:
    """Write the training list and its samples."""
    folder, split = LAYOUT[name]
    (root / split).parent.mkdir(parents=True, exist_ok=True)
    (root / split).write_bytes(text.encode(errors="surrogateescape"))
    make(root / folder, samples)
    return root / split


def paths_of(samples: Samples) -> list[str]:
    return [str(samples.path(i).relative_to(samples.root)) for i in range(len(samples))]


def error_of(name: str, root: Path, split: str = "train", **options) -> str:
    with pytest.raises(UserError) as caught:
        load_samples(name, root, split, **options)
    return str(caught.value)


@pytest.mark.parametrize("name, text, paths, labels, first", [
    ("dfew", "video_name,label\n00001,0\n00010,6\n", ["00001", "00010"], [0, 6], 0),
    ("dfew", "video_name,label\n00001,1\n00010,7\n", ["00001", "00010"], [0, 6], 1),  # as handed out
    ("dfew-16f", "video_name,label\r\n00001,0\r\n00002,6\r\n", ["00001", "00002"], [0, 6], 0),
    ("dfew", "\ufeffvideo_name,label\n\n00001, 0\n00002,6\n\n", ["00001", "00002"], [0, 6], 0),
    ("ferv39k", "path,id\nInterview/Happy/0118,3\nCrime\\Angry\\0063,0\n",
     ["Interview/Happy/0118", "Crime/Angry/0063"], [3, 0], 0),
    ("mafw", "video_name,labels\n00025,0\n00028,10\n", ["00025", "00028"], [0, 10], 0),
    ("affectnet-7", "1/a b.jpg 2\n2/Müller 表情.png 0\n3/x,y.bmp 6\n",  # no header: the first line is a sample
     ["1/a b.jpg", "2/Müller 表情.png", "3/x,y.bmp"], [2, 0, 6], 0),
])
def test_split_files_as_people_have_them(tmp_path, name, text, paths, labels, first):
    split = write_set(tmp_path, name, text, paths)
    samples = load_samples(name, tmp_path, "train")
    assert paths_of(samples) == paths and samples.labels.tolist() == labels and samples.rate is None
    assert samples.stride == {"dfew": 4, "mafw": 4}.get(name, 1)
    assert len(samples.counts()) == (11 if name == "mafw" else 7) and sum(samples.counts()) == len(paths)
    assert samples.notes == [f"{split}: labels count from {first}"]


@pytest.mark.parametrize("listed", ["00007", "7"])
@pytest.mark.parametrize("stored", ["00007", "7", "00007.mp4", "7.avi"])
def test_dfew_names_with_and_without_zeros_find_folders_and_videos(tmp_path, listed, stored):
    write_set(tmp_path, "dfew", f"video_name,label\n{listed},0\n", [stored])
    assert paths_of(load_samples("dfew", tmp_path, "train")) == [stored]


def test_the_16_frame_version_of_dfew_is_a_set_of_its_own(tmp_path):
    write_set(tmp_path, "dfew-16f", "video_name,label\n00001,0\n", ["00001"])
    assert str(tmp_path / LAYOUT["dfew"][0]) in error_of("dfew", tmp_path)
    assert [load_samples("dfew-16f", tmp_path, "train", stride=stride).stride for stride in (None, 4)] == [1, 4]


@pytest.mark.parametrize("name, text, words", [
    ("dfew", "", ["no samples"]),
    ("dfew", "video_name,label\n", ["no samples"]),
    ("dfew", "video_name,label\n,0\n", ["line 2"]),
    ("dfew", "video_name,label\nM\udcfcller,0\n", ["UTF-8"]),  # Latin 1
    ("dfew", "00001,3\n00002,0\n", ["line 1", "00001,3", "no header"]),  # skipping it would lose a sample silently
    ("dfew", "video_name,label\n00001,0\n00002,8\n", ["line 3", "'8'", "expected 0, 1, 2, 3, 4, 5, 6"]),
    ("dfew", "video_name,label\n00001,0\n00002,7\n", ["line 3", "'7'"]),
    ("dfew", "video_name,label\n00001,-1\n00002,0\n", ["'-1'"]),
    ("dfew", "video_name,label\n00001,0\n00002,1.5\n", ["line 3", "1.5"]),
    ("dfew", "video_name,label\n00001,0\n00002\n", ["line 3", "00002"]),
    ("dfew", "video_name,label,id\n00001,0,7\n00002,1,8\n", ["line 1", "video_name,label,id"]),  # two of labels
    ("dfew", "label,clip\n0,00001\n1,00002\n", ["line 1", "label,clip"]),
    ("affectnet-7", "00001 1\n00002 7\n", ["line 2", "'7'"]),
    ("ferv39k", "path,id\n00001,0\n../secret,3\n", ["../secret", "not there"]),
    ("ferv39k", "path,id\n00001,0\n1/a\0b,3\n", ["not there"]),
], ids=lambda value: value if isinstance(value, str) and len(value) < 12 else "")
def test_a_bad_list_is_an_error_that_names_file_and_value(tmp_path, name, text, words):
    split = write_set(tmp_path, name, text, ["00001", "00002"])
    message = error_of(name, tmp_path)
    assert all(word in message for word in [str(split), *words]), message


def test_missing_data_names_what_was_looked_for_and_the_synthetic_way_out(tmp_path):
    for name, (folder, split) in LAYOUT.items():
        message = error_of(name, tmp_path)
        assert str(tmp_path / folder) in message and str(tmp_path / split) in message and "synthetic" in message
    write_set(tmp_path, "dfew", "video_name,label\n00001,0\n00002,1\n00003,2\n", ["00001", "00003"])
    message = error_of("dfew", tmp_path)
    assert "00002" in message and "00001" not in message and str(tmp_path / LAYOUT["dfew"][0]) in message
    assert "fold 6" in error_of("dfew", tmp_path, fold=6)
    assert "defw" in error_of("defw", tmp_path) and "ferv39k" in error_of("defw", tmp_path)  # and what there is
    write_set(tmp_path, "ferv39k", "path,id\nCrime/Angry/0a,0\n", ["Crime/Angry/a", "Crime/Angry/0000a"])
    assert "0a" in error_of("ferv39k", tmp_path)  # leading zeros are a matter of numbers alone


def test_voxceleb2s_files_are_listed_once(tmp_path):
    root = tmp_path / "VoxCeleb2/dev/mp4"   # as the archive unpacks
    assert str(root) in error_of("voxceleb2", tmp_path)
    root.mkdir(parents=True)
    for _ in range(2):                      # a list of nothing would hide the files that come later
        assert "holds no file id*/*/*.mp4" in error_of("voxceleb2", tmp_path) and not list(root.iterdir())
    first = ["id00012/a/00001.mp4", "id00012/b/00001.mp4", "id00015/c/00001.mp4"]
    make(root, [*first, "id00012/a/00001.txt", "notes/x/00001.mp4"])
    samples = load_samples("voxceleb2", tmp_path, "train")
    assert paths_of(samples) == first and set(samples.labels) == {-1} and samples.stride == 4
    assert samples.box == CATALOGUE["voxceleb2"].box  # what stage 1 sees
    (root / "id00012/a/00002.mp4").touch()
    samples = load_samples("voxceleb2", tmp_path, "train")
    assert paths_of(samples) == first and any("3 files, as listed then" in note for note in samples.notes)
    assert [path.name for path in root.iterdir() if path.is_file()] == ["files.txt"]  # nothing half-written
    (root / first[0]).unlink()
    sources = {"video": Source(samples.subset(np.array([0])), 1, 1)}
    unreadable = data.TrainingData(sources, "pretrain", SMALL)[data.schedule_epoch(sources, 0, 0)[0][0]][-1]
    assert unreadable == [f"{root / first[0]} is not there, or no file: expected an image or a video"]
    (root / "files.txt").unlink()
    (root / "files.txt").mkdir()            # cannot be written: works without
    samples = load_samples("voxceleb2", tmp_path, "train")
    assert len(samples) == 3 and any("3 files listed now" in note for note in samples.notes)


def test_rafdb_has_one_list_for_both_splits_and_labels_from_1(tmp_path):
    listed = tmp_path / "RAF-DB/basic/EmoLabel/list_patition_label.txt"
    listed.parent.mkdir(parents=True)
    listed.write_text("train_00001.jpg 5\ntrain_00002.jpg 7\ntest_0001.jpg 1\n")
    make(tmp_path / "RAF-DB/basic/Image/aligned",
         ["train_00001_aligned.jpg", "train_00002_aligned.jpg", "test_0001_aligned.jpg"])
    train, test = (load_samples("rafdb", tmp_path, split) for split in ("train", "test"))
    assert paths_of(train) == ["train_00001_aligned.jpg", "train_00002_aligned.jpg"]
    assert [train.classes[label] for label in train.labels] == ["sadness", "neutral"]
    assert paths_of(test) == ["test_0001_aligned.jpg"] and test.classes[test.labels[0]] == "surprise"


@pytest.mark.parametrize("name, kept", [("affectnet-7", [0, 6]), ("affectnet-8", [0, 6, 7])])
def test_the_original_csv_of_affectnet_loses_what_has_no_class(tmp_path, name, kept):
    lines = ["subDirectory_filePath,face_x,facial_landmarks,expression,valence"]
    lines += [f"1/{i}.jpg,0,1;2;3,{label},-2" for i, label in enumerate([0, 9, 6, 7, 10, 9])]
    make(tmp_path / "AffectNet/Manually_Annotated_Images", [f"1/{i}.jpg" for i in range(6)])
    (tmp_path / "AffectNet/training.csv").write_text("\n".join(lines))
    samples = load_samples(name, tmp_path, "train")
    assert samples.labels.tolist() == kept and samples.notes[1].startswith("left out: labels ")
    # A list file, under the released code's name, comes first.
    (tmp_path / f"AffectNet/train_affectnet{name[-1]}_2w.txt").write_text("1/3.jpg 4\n")
    assert paths_of(load_samples(name, tmp_path, "train")) == ["1/3.jpg"]


def test_part_of_dfew_whose_labels_may_count_from_0_or_from_1(tmp_path):
    write_set(tmp_path, "dfew", "video_name,label\n00001,3\n00002,6\n", ["00001", "00002"])
    message = error_of("dfew", tmp_path)
    assert "train_set_1.csv has the labels 3, 6: neither 0 nor 7" in message


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real split files are not beside the repository")
def test_real_split_files_hold_the_published_counts():
    def labels(name, path):
        found = [int(row.label) for row in data.read_list(SHARED / "annotations" / path)]
        assert set(found) == set(range(len(CATALOGUE[name].classes)))
        return found

    dfew = [labels("dfew", f"DFEW/test_set_{fold}.csv") for fold in range(1, 6)]
    assert [len(fold) for fold in dfew] == [2341, 2341, 2340, 2339, 2336]
    assert np.bincount(dfew[0]).tolist() == [489, 379, 534, 435, 294, 29, 181]
    mafw = [len(labels("mafw", f"MAFW/set_{fold}/test.csv")) for fold in range(1, 6)]
    assert mafw == [1839, 1837, 1833, 1832, 1831]
    assert [len(labels("ferv39k", f"FERV39K/{split}.csv")) for split in ("train", "test")] == [31088, 7847]
    assert len(labels("affectnet-7", "AffectNet/test_affectnet7.txt")) == 3267
    for row in data.read_list(SHARED / "annotations/FERV39K/train.csv"):
        assert row.name.split("/")[1].lower() == CATALOGUE["ferv39k"].classes[int(row.label)]


# ---------------------------------------------------------------------------------------------------- one's own data

def write_own(folder: Path, **lists: str) -> str:
    """Write lists and, empty, what they name; returns the data set's name."""
    for stem, text in lists.items():
        make(folder, [line.split(",")[0] for line in text.splitlines()[1:]])
        (folder / f"{stem}.csv").write_text(text, encoding="utf-8")
    return ",".join(str(folder / f"{stem}.csv") for stem in lists)


def pictures(folder: Path, names: list[str]) -> Path:
    """Small grey pictures."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (20, 16), 10 * i).save(folder / name, "PNG")
    return folder


def test_own_clips_and_images_have_class_names(tmp_path):
    name = write_own(tmp_path, train="path,label,person\nclips/a b,sad,1\nclips/Müller 表情,happy,2\n7,angry,2\n",
                     test="path,label\nclips/c,happy\n")
    train, test = (load_samples(name, tmp_path / "unused", split) for split in ("train", "test"))
    assert train.modality == "video" and train.classes == ("angry", "happy", "sad")
    assert paths_of(train) == ["clips/a b", "clips/Müller 表情", "7"] and train.labels.tolist() == [2, 1, 0]
    assert train.people.tolist() == [b"1", b"2", b"2"] and (train.stride, train.rate) == (4, 25)
    assert paths_of(test) == ["clips/c"] and test.labels.tolist() == [1]
    pictures(tmp_path / "a,b", ["1.jpg", "2.PNG", "c.csv,d/3"])  # stage 1 needs no labels; commas in folders
    name = write_own(tmp_path / "a,b", train="path\n1.jpg\n2.PNG\nc.csv,d/3\n".replace("c.csv,d/3", '"c.csv,d/3"'))
    samples = load_samples(f"{name},{name}", tmp_path, "test")
    assert samples.modality == "image" and samples.labels.tolist() == [-1] * 3 and samples.stride == 1
    assert data.short_name(name) == "train"


@pytest.mark.parametrize("lists, words", [
    (dict(train="path,label\na,happy\n", test="path,label\nb,sad\n"), ["test.csv, line 2", "'sad'", "expected happy"]),
    (dict(train="path,label\na,happy\nb,Happy\n", test="path\nc"), ["two of the classes Happy, happy differ in capitals"]),
    (dict(train="path,label\na,happy\nb\n"), ["train.csv, line 3"]),
    (dict(train="path,label\na,happy\n"), ["no test part"]),
    (dict(train="path,label\na,x\n", test="path,label\nb,x\n", third="path,label\nc,x\n"), ["train.csv,test.csv"]),
    (dict(train="a,happy\nb,sad\n"), ["train.csv, line 1: 'a,happy' is no header", "path,label"]),
    (dict(train="path,id,label,class\na,1,x,y\n"), ["line 1", "no header"]),
    (dict(train="path;label\na;x\n"), ["semicolons between the columns: export with commas"]),
    (dict(train="path\tlabel\na\tx\n"), ["tabs between the columns: export with commas"]),
], ids=["unknown class", "capitals", "short line", "no test", "three", "no header", "two labels", "semicolons", "tabs"])
def test_bad_lists_of_own_data_are_named(tmp_path, lists, words):
    message = error_of(write_own(tmp_path, **lists), tmp_path, "test")
    assert all(word in message for word in words), message


def test_lists_as_other_programs_write_them(tmp_path):
    make(tmp_path, ["clips/1", "clips/2"])
    path, text = tmp_path / "train.csv", "path,label\r\nclips\\1,a\r\nclips\\2,b\r\n"
    for written in (text, "\ufeff" + text, text.replace("\r", ""), "Video , Emotion,person\nclips/1,a,x\nclips/2,b,y",
                    ",path,label\n0,clips/1,a\n1,clips/2,b\n", '"path","label"\n"clips/1","a"\n./clips/2 , b\n'):
        path.write_bytes(written.encode())
        samples = load_samples(str(path), tmp_path, "train")
        assert paths_of(samples) == ["clips/1", "clips/2"] and samples.classes == ("a", "b")
    for encoding, label, said in (("utf-16", "a", "is UTF-16"), ("utf-16-le", "a", "is UTF-16"), ("gbk", "高", "GBK"),
                                  ("latin-1", "ü", "Windows-1252")):
        path.write_text(f"path,label\nclips/1,{label}\n", encoding)
        assert said in error_of(str(path), tmp_path) and "save it as CSV UTF-8" in error_of(str(path), tmp_path)


def test_names_that_look_the_same_are_the_same(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Müller") for form in ("NFC", "NFD"))
    make(tmp_path, [f"{decomposed}/{decomposed} 1", "clips/x\u200b"])  # as macOS stores names
    (tmp_path / "train.csv").write_text(f"path,label\n{composed}/{composed} 1,Glück\nclips/x,Gl{decomposed[1:3]}ck \n"
                                        f"{decomposed}/{decomposed} 1,Gl\u200bück\n", encoding="utf-8")
    samples = load_samples(str(tmp_path / "train.csv"), tmp_path, "train")
    assert samples.classes == ("Glück",) and all(samples.path(i).is_dir() for i in range(3))
    assert len(set(paths_of(samples))) == 2
    (tmp_path / composed).mkdir()           # both are there: the spelling decides
    assert f"{composed}/{composed} 1" in error_of(str(tmp_path / "train.csv"), tmp_path)


def test_lists_may_lie_elsewhere_than_the_clips(tmp_path):
    make(tmp_path / "data", ["clips/1", "clips/2"])
    (tmp_path / "lists").mkdir()
    path, fingerprints = tmp_path / "lists/train.csv", []
    for prefix in ("", f"{tmp_path}/data/", "../data/", f"{tmp_path}/lists/../data/"):
        path.write_text(f"path,label\n{prefix}clips/1,a\n{prefix}clips/2,b\n")
        samples = load_samples(str(path), tmp_path / "data", "train")
        assert [os.path.realpath(samples.path(i)) for i in range(2)] == [f"{tmp_path}/data/clips/{i}" for i in (1, 2)]
        fingerprints.append(samples.fingerprint())
    assert len(set(fingerprints)) == 1 and fingerprints[0].startswith("fold 1, stride 4: 2 samples, finger")
    path.write_text("path,label\nclips/1,a\nclips/3,b\n")
    message = error_of(str(path), tmp_path / "data")
    assert f"not there in {tmp_path}/data: 1: clips/3" in message and f"nor in {tmp_path}/lists" in message


def test_what_a_file_is_its_content_tells(tmp_path):
    pictures(tmp_path, ["a.jfif", "b", "c.mp4"])
    make(tmp_path, ["clip"])
    for name in ("a.jfif", "b", "c.mp4", "clip"):
        (tmp_path / "train.csv").write_text(f"path\n{name}\n")
        modality = data.catalogue(str(tmp_path / "train.csv")).modality
        assert modality == ("video" if name == "clip" else "image")
    (tmp_path / "lists").mkdir()            # elsewhere: the suffix tells at first, but cannot be silently wrong
    for folder, names, said in (("lists", "b", "/b is no video"), ("", "a.jfif\nclip", "/clip is no image"),
                                ("", "clip\na.jfif", "/a.jfif is no video")):
        path = tmp_path / folder / "train.csv"
        path.write_text(f"path\n{names}\n")
        assert said in error_of(str(path), tmp_path) and "two data sets" in error_of(str(path), tmp_path)
    samples = Samples("own", "video", ("a",), tmp_path, np.array([b"a.jfif"]), np.array([0]))
    with pytest.raises(UserError, match="a.jfif is a picture: expected a clip"):
        data.TestData(samples, SMALL)[0]


@pytest.mark.parametrize("train, test", [("train", "test"), ("Train", "TEST")])
def test_folders_by_class(tmp_path, train, test):
    """torchvision's convention; what systems leave in folders is no sample."""
    make(tmp_path / "faces", [f"{train}/happy/10", f"{train}/happy/9", f"{train}/sad/1", f"{test}/sad/2", "readme.txt",
                              f"{train}/.DS_Store/x", f"{train}/happy/Thumbs.db", f"{test}/__MACOSX"])
    name = str(tmp_path / "faces")
    samples, tested = (load_samples(f"{name}/", tmp_path, split) for split in ("train", "test"))
    assert samples.name == name and data.short_name(name) == "faces" and samples.rate == 25
    assert paths_of(samples) == ["happy/9", "happy/10", "sad/1"] and samples.labels.tolist() == [0, 0, 1]
    assert paths_of(tested) == ["sad/2"] and tested.labels.tolist() == [1] and tested.classes == ("happy", "sad")
    alone = load_samples(str(tmp_path / "faces" / train), tmp_path, "train")  # not divided: for stage 1
    assert alone.classes == ("happy", "sad") and len(alone) == 3


@pytest.mark.parametrize("names, said", [
    (["train/a/1", "val/a/2"], "is divided into .*val.*: expected train and test"),
    (["test/a/1"], "is divided into test: expected train and test"),
    (["train/a/1", "train/A/2"], "differ in capitals"), (["a/1", "b.mp4"], "b.mp4 lies beside folders of classes"),
    (["train/a/1", "test/b/2"], "'b/2' has the label 'b': expected a"), (["train/.x/1"], "holds no samples")])
def test_folders_by_class_that_are_refused(tmp_path, names, said):
    make(tmp_path / "faces", names)
    with pytest.raises(UserError, match=said):
        load_samples(str(tmp_path / "faces"), tmp_path, "test")


def test_own_clips_through_stage_2_and_evaluation(faces, tmp_path):
    clips = load_samples("synthetic", faces, "train")
    for part, first in (("train", 0), ("test", 1)):
        for i in range(first, len(clips), 2):
            folder = tmp_path / "faces" / part / clips.classes[clips.labels[i]]
            folder.mkdir(parents=True, exist_ok=True)
            os.link(clips.path(i), folder / clips.path(i).name)
    text = run_here(tmp_path, "finetune.py", "--dataset", "faces", "--image-dataset", "none", "--size", "tiny",
                    "--epochs", 1, "--warmup-epochs", 0, "--pretrained", "none", "--workers", 1, "--crop", "2,2,60,60")
    assert "writing to runs/faces/fold1" in text and "faces/train: angry, disgust" in text
    text = run_here(tmp_path, "pretrain.py", "--dataset", "none", "--image-dataset", "faces", status=1)
    assert "faces holds videos: expected images" in text


@pytest.mark.parametrize("script, options, said", [
    ("finetune.py", ["--dataset", "affectnet-7"], "affectnet-7 holds images: expected videos"),
    ("finetune.py", ["--dataset", "synthetic", "--image-dataset", "dfew"], "dfew holds videos: expected images"),
    ("finetune.py", ["--dataset", "synthetic-unlabelled"], "synthetic-unlabelled has no labels"),
    ("pretrain.py", ["--dataset", "affectnet-7"], "affectnet-7 holds images: expected videos"),
    ("pretrain.py", ["--dataset", "none", "--image-dataset", "voxceleb2"], "voxceleb2 holds videos: expected images")])
def test_a_stage_takes_data_sets_of_its_kind(faces, tmp_path, script, options, said):
    more = ["--pretrained", "none"] if script == "finetune.py" else []
    text = run_here(tmp_path, script, *options, *more, "--data-root", faces, status=1)
    assert text.splitlines()[-1].startswith(f"error: {said}") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, fits", [("lost.csv", False), ("x", False), ("dfew", True), ("none", True)])
def test_names_of_data_sets_that_there_are_none_of_are_refused(name, fits):
    if fits:
        assert data.dataset_name(name) == name
    else:
        with pytest.raises((UserError, FileNotFoundError), match=name):
            data.dataset_name(name)


# -------------------------------------------------------------------------------------------------- clip sampling

def spread(first: int, last: int, values: int, n: int) -> list[int]:
    """The released rule's numbers, independent of the project: `values` even steps from first to last, both included,
    cut off to the last frame and to whole numbers."""
    return [min(first if values == 1 else (first * (values - 1) + i * (last - first)) // (values - 1), n - 1)
            for i in range(values)]


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("n", [1, 2, 3, 15, 16, 17, 30, 31, 32, 33, 64, 65, 100, 300])
def test_16_frames_of_n(n, stride):
    torch.manual_seed(0)
    every = list(range(0, n, stride))
    padded = every + every[-1:] * (16 - len(every))
    assert data.test_frames(n, 16, stride) == padded[:16] + padded[-16:]  # evaluation's two clips

    window = 16 * stride                    # a random window of a long clip, or all of a short one and its end again
    expected = ([spread(end - window, end, 16, end) for end in range(window, n)] if n > window else
                [spread(0, n, n // stride, n) + [n - 1] * (16 - n // stride)])
    training = [data.train_frames(n, 16, stride) for _ in range(100)]
    assert all(len(frames) == 16 and frames in expected for frames in training)
    assert len(set(map(tuple, training))) > min(len(expected), 20) // 2
    assert len(expected) > 4 or all(frames in training for frames in expected)

    pretraining = [data.pretrain_frames(n, 16, stride) for _ in range(40)]
    for frames in pretraining:              # stage 1: every stride-th frame from a random start
        distinct = sorted(set(frames))
        assert 0 <= frames[0] and frames[-1] < n and frames == distinct + distinct[-1:] * (16 - len(distinct))
        assert set(np.diff(distinct)) <= {stride} and len(distinct) == min(16, len(every))  # no needless repeats
    assert (len({frames[0] for frames in pretraining}) > 1) == (n > 15 * stride + 1)


# --------------------------------------------------------------------------------------------------- augmentation

def whole_way(name: str, stage: str, strength: str = "paper", pixels: int = 32):
    """A frame's way as a data set reads it, (3, h, w) -> (3, pixels, pixels), and a clip's."""
    samples = made_up(name, [0])
    if stage == "test":
        return data.TestData(samples, SMALL).transform
    transform = data.frame_transform(stage, samples.modality, pixels, strength)
    augment = data.augmentation(stage, samples.modality, pixels, strength)
    return lambda x: augment(torch.stack([transform(frame) for frame in x]) if x.ndim == 4 else transform(x))


@pytest.mark.parametrize("name", ["dfew", "affectnet-7"])
@pytest.mark.parametrize("stage, strength, least, most", [
    ("pretrain", "paper", 18, 20), ("finetune", "paper", 18, 20), ("finetune", "light", 2, 20),
    ("test", "paper", 1, 1)])
def test_one_draw_serves_all_frames_and_gives_the_size_of_the_model(name, stage, strength, least, most):
    torch.manual_seed(0)
    picture = torch.randint(0, 256, (3, 7, 7), dtype=torch.uint8).repeat_interleave(8, 1).repeat_interleave(10, 2)
    way, outcomes = whole_way(name, stage, strength), set()
    for _ in range(20):
        clip = way(picture.expand(16, 3, 56, 70).contiguous())
        assert clip.shape == (16, 3, 32, 32) and clip.dtype == torch.uint8
        # Erased pixels of a clip are drawn for each frame: in one rectangle, the same in all frames.
        other = (clip != clip[:1]).any(1).any(0)
        assert not other.any() or (name, stage, strength) == ("dfew", "finetune", "paper")
        assert other.sum() == other.any(1).sum() * other.any(0).sum()
        outcomes.add(clip[0].numpy().tobytes())
        image = way(picture[:, :20, :20].clone())  # smaller than the model's input
        assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    assert least <= len(outcomes) <= most


@pytest.mark.parametrize("modality, shape", [("image", (3, 32, 32)), ("video", (16, 3, 32, 32))])
def test_random_erasing_is_black_in_images_and_random_pixels_in_clips(modality, shape):
    erase = data.augmentation("finetune", modality, 32).transforms[-1]
    assert erase.p == 0.25
    erase.p, x = 1, torch.full(shape, 77, dtype=torch.uint8)
    torch.manual_seed(0)
    erased = torch.cat([y[y != 77] for y in (erase(x) for _ in range(50))])
    share = len(erased) / 50 / x.numel()
    assert 0.1 < share < 0.25               # the library's default, 0.02 to 0.33
    if modality == "image":
        assert (erased == 0).all()
    else:                                   # ImageNet's mean and deviation, cut off at black and white
        assert erased.unique().numel() > 200
        assert erased.float().mean() == pytest.approx(115, abs=5) and erased.float().std() == pytest.approx(57, abs=5)


@pytest.mark.parametrize("modality, operations, magnitude", [("image", 2, 9), ("video", 4, 7)])
def test_randaugment_is_the_papers_and_brings_in_grey(modality, operations, magnitude):
    parts = data.augmentation("finetune", modality, 32).transforms
    chain, = [part.transforms for part in parts if isinstance(part, data.v2.Compose)]
    assert len(chain) == operations and [apply.p for apply in chain] == [0.5] * operations
    for one in (apply.transforms[0] for apply in chain):
        assert (one.num_ops, one.magnitude, one.num_magnitude_bins) == (1, magnitude, 11)
    torch.manual_seed(0)
    black = torch.zeros(3, 32, 32, dtype=torch.uint8)
    warped = [x for x in (one(black) for _ in range(300)) if 0 < (x != 0).float().mean() < 0.5]
    assert len(warped) > 30 and all((x == 128).any() and x.max() == 128 for x in warped)


def test_stage_1_flips_images_but_never_videos():
    ramp = torch.arange(32, dtype=torch.uint8).mul(8).expand(3, 32, 32).contiguous()  # brighter to the right
    for name, may_flip in (("voxceleb2", False), ("affectnet-7", True)):
        way = whole_way(name, "pretrain")
        torch.manual_seed(0)
        flipped = [bool(x[0, 0, 0] > x[0, 0, -1]) for x in (way(ramp) for _ in range(20))]
        assert any(flipped) == may_flip and not all(flipped)


def test_voxceleb2_crop_is_rows_0_to_160_and_columns_32_to_192():
    frames = torch.arange(224 * 224).view(1, 1, 224, 224).expand(2, 3, 224, 224)
    box = CATALOGUE["voxceleb2"].box
    assert torch.equal(data.boxed(frames, box, Path("clip")), frames[:, :, 0:160, 32:192])


def test_to_float_normalises_as_imagenet_and_puts_channels_first():
    x = torch.randint(0, 256, (2, 5, 3, 4, 6), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = ((x.permute(0, 1, 3, 4, 2) / 255 - mean) / std).permute(0, 4, 1, 2, 3)  # (B, 3, T, H, W)
    assert data.to_float(x).shape == (2, 3, 5, 4, 6) and torch.allclose(data.to_float(x), expected, atol=1e-5)
    assert torch.allclose(data.to_float(x[:, 0]), expected[:, :, 0], atol=1e-5)


# -------------------------------------------------------------------------------------------------------- schedule

def made_up(name: str, labels: list[int]) -> Samples:
    names = np.array([f"{i:05d}".encode() for i in range(len(labels))])
    return Samples(name, CATALOGUE[name].modality, CATALOGUE[name].classes, Path("nowhere"), names, np.array(labels))


def joint_sources() -> dict[str, Source]:
    """112 images, of which half are drawn in batches of 8, and 24 clips in batches of 6 in micro-batches of 4."""
    images = made_up("affectnet-7", [0] * 64 + [1] * 48)
    return {"image": Source(images, batch=8, micro=8, share=0.5, balanced=True),
            "video": Source(made_up("dfew", [i % 7 for i in range(24)]), batch=6, micro=4)}


def content(micro: data.MicroBatch) -> tuple:
    return micro.modality, tuple(micro.index), micro.seed


def in_steps(micros) -> list[list[data.MicroBatch]]:
    """A process's micro-batches by the steps that their last ones end."""
    steps = [[]]
    for micro in micros:
        steps[-1].append(micro)
        if micro.is_last:
            steps.append([])
    assert steps.pop() == []
    return steps


def drawn(steps: list, source: str) -> list[int]:
    return [int(i) for step in steps for micro in step if micro.modality == source for i in micro.index]


def test_an_epoch_is_half_of_the_images_and_all_clips_in_shuffled_single_source_steps():
    steps = data.schedule_epoch(joint_sources(), seed=0, epoch=0)
    order = [step[0].modality for step in steps]
    assert all({micro.modality for micro in step} == {source} for step, source in zip(steps, order))
    assert order.count("image") == 56 // 8 and order.count("video") == 24 // 6
    orders = {tuple(s[0].modality for s in data.schedule_epoch(joint_sources(), 0, epoch)) for epoch in range(9)}
    assert len(orders) > 5                  # shuffled together: 330 orders are possible
    assert sorted(drawn(steps, "video")) == list(range(24))
    assert [sum(len(micro.index) for micro in step) for step in steps] == [8 if s == "image" else 6 for s in order]
    assert [len(micro.index) for step in steps if step[0].modality == "video" for micro in step] == [4, 2] * 4


def test_balanced_drawing_gives_each_class_its_equal_share_with_replacement():
    counts = [10, 4000, 1000, 1000, 500, 400, 90]
    samples = made_up("affectnet-7", np.repeat(np.arange(7), counts).tolist())
    source = Source(samples, batch=50, micro=50, share=0.5, balanced=True)
    index = np.array(drawn(data.schedule_epoch({"image": source}, 0, 0), "image"))
    assert len(index) == 3500
    classes = np.bincount(samples.labels[index], minlength=7)
    assert np.abs(classes - 500).max() < 110  # 5 standard deviations
    assert len(set(index[samples.labels[index] == 0])) == 10  # about 500 draws from 10 images


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_same_samples_and_seeds_for_any_number_of_processes(world):
    sources = joint_sources()
    ranks = [in_steps(deal(sources, 3, 2, rank, world, 0, 0)) for rank in range(world)]
    steps = [step for epoch in (0, 1) for step in data.schedule_epoch(sources, 3, epoch)]
    assert len(steps) == 2 * len(data.schedule_epoch(sources, 3, 0))
    for step, *held in zip(steps, *ranks, strict=True):  # every process ends each step, also one with nothing to do
        place = {micro.seed: i for i, micro in enumerate(step)}
        working = sorted((micro for rank in held for micro in rank if micro.weight > 0), key=lambda m: place[m.seed])
        assert [content(micro) for micro in working] == [content(micro) for micro in step]
        assert sum(micro.weight for rank in held for micro in rank) == pytest.approx(1)
        samples = sum(len(micro.index) for micro in step)
        assert [micro.weight for micro in working] == pytest.approx([len(m.index) / samples for m in working])
        assert sum(rank[0].weight == 0 for rank in held) == max(0, world - len(step))


def test_the_schedule_depends_on_seed_and_epoch_alone():
    def epoch_of(seed, epoch):
        return [content(micro) for step in data.schedule_epoch(joint_sources(), seed, epoch) for micro in step]

    assert epoch_of(0, 1) == epoch_of(0, 1)
    micros = epoch_of(0, 0) + epoch_of(0, 1) + epoch_of(1, 0) + epoch_of(1, 1)
    assert len({micro[-1] for micro in micros}) == len(micros)  # no two micro-batches share a seed
    orders = {tuple(micro[1] for micro in epoch_of(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(orders) == 6


@pytest.mark.parametrize("epoch, step", [(0, 0), (0, 5), (1, 3), (2, 10), (1, 11)])
def test_resuming_continues_the_same_sequence(epoch, step):
    sources = joint_sources()               # 11 steps an epoch: (1, 11) is the end of epoch 1
    for rank, world in ((0, 1), (1, 3)):
        whole = in_steps(deal(sources, 0, 3, rank, world, 0, 0))
        rest = list(deal(sources, 0, 3, rank, world, epoch, step))
        expected = [micro for held in whole[11 * epoch + step:] for micro in held]
        assert len(whole) == 33
        assert rest and [(*content(m), m.weight, m.is_last) for m in rest] == [(*content(m), m.weight, m.is_last)
                                                                           for m in expected]


def test_repeats_and_sets_smaller_than_a_batch():
    """Repeated augmentation: an epoch reads a quarter of the clips, a batch holds a quarter as many clips."""
    steps = data.schedule_epoch({"video": Source(made_up("dfew", [0] * 64), batch=16, micro=8, repeats=4)}, 0, 0)
    assert [[len(micro.index) for micro in step] for step in steps] == [[2, 2]] * 4
    assert len(set(drawn(steps, "video"))) == 16
    for n in (1, 3):
        for options in ({}, {"repeats": 4}, {"balanced": True, "share": 0.5}):
            steps = data.schedule_epoch({"video": Source(made_up("dfew", list(range(n))), 32, 32, **options)}, 0, 0)
            assert len(steps) == 1 and sum(micro.weight for micro in steps[0]) == pytest.approx(1)
            assert set(drawn(steps, "video")) <= set(range(n))


def test_hold_out_takes_the_same_share_of_each_class():
    samples = made_up("dfew", [0] * 100 + [1] * 40 + [2] * 10)
    rest, held = data.hold_out(samples, 0.2, seed=0)
    assert rest.counts()[:3] == [80, 32, 8] and held.counts()[:3] == [20, 8, 2]
    assert not set(paths_of(rest)) & set(paths_of(held)) and len(set(paths_of(rest) + paths_of(held))) == 150
    again, other = data.hold_out(samples, 0.2, seed=0)[1], data.hold_out(samples, 0.2, seed=1)[1]
    assert paths_of(again) == paths_of(held) != paths_of(other)


def test_hold_out_keeps_people_apart_and_overlap_names_them():
    samples = made_up("dfew", [i % 7 for i in range(70)])
    samples.people = np.array([f"person {i // 7}".encode() for i in range(70)])
    rest, held = data.hold_out(samples, 0.3, seed=0)
    assert len(held) == 21 and not set(rest.people) & set(held.people) and data.overlap(rest, held) == ""
    assert data.overlap(samples, held.subset(np.arange(4))).startswith("samples in both train and test of dfew: 4: ")
    moved = replace(held, root=Path("elsewhere"))
    assert data.overlap(rest, moved) == ""
    moved.people[3] = rest.people[0]
    assert data.overlap(rest, moved) == f"people in both train and test of dfew: 1: {rest.people[0].decode()}"
    with pytest.raises(UserError, match="none to hold out"):
        data.hold_out(samples, 0.01, seed=0)


# --------------------------------------------------------------------------------------------------------- loading

def training_data(faces: Path, stage: str = "finetune") -> tuple[dict[str, Source], data.TrainingData]:
    sources = {"image": Source(load_samples("synthetic-images", faces, "train"), 8, 4, share=0.5, balanced=True),
               "video": Source(load_samples("synthetic", faces, "train", 1), 8, 4)}
    return sources, data.TrainingData(sources, stage, SMALL)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_workers_do_not_change_the_samples(faces, stage):
    def run(workers):
        sources, dataset = training_data(faces, stage)
        return list(data.loader(dataset, workers, batch_size=None, sampler=deal(sources, 0, 1, 0, 1, 0, 0)))

    here, there = run(0), run(2)
    assert {micro.modality for micro, *_ in here} == {"image", "video"} and len(here) == len(there) == 2 * (6 + 3)
    for (micro, x, labels, unreadable), (micro2, x2, labels2, _) in zip(here, there):
        assert content(micro) == content(micro2) and torch.equal(x, x2) and torch.equal(labels, labels2)
        assert x.shape == ((4, 3, 32, 32) if micro.modality == "image" else (4, 16, 3, 32, 32)) and not unreadable
        assert labels.tolist() == training_data(faces)[0][micro.modality].samples.labels[micro.index].tolist()


def test_repeats_are_4_different_crops_of_one_decoded_clip(faces, monkeypatch):
    read, asked = data.read_clip, []
    monkeypatch.setattr(data, "read_clip", lambda clip, *how: asked.append(clip.path) or read(clip, *how))
    samples = load_samples("synthetic-unlabelled", faces, "train")
    sources = {"video": Source(samples, batch=8, micro=8, repeats=4)}
    micro = next(deal(sources, 0, 1, 0, 1, 0, 0))
    _, x, labels, _ = data.TrainingData(sources, "pretrain", SMALL)[micro]
    assert asked == [samples.path(i) for i in micro.index] and len(asked) == 2
    assert x.shape == (8, 16, 3, 32, 32) and labels.tolist() == [-1] * 8
    assert len({view.numpy().tobytes() for view in x}) == 8
    means = x.float().mean((1, 3, 4))       # colours: views of one clip stand together
    assert (means[0:4] - means[0:4].mean(0)).norm() < (means[0:4] - means[4:8].mean(0)).norm()


def test_an_unreadable_sample_is_left_out_and_named_and_leaves_the_others_as_they_were(faces, tmp_path):
    samples = load_samples("synthetic-images", faces, "train").subset(np.array([0, 1, 2]))
    shutil.copytree(samples.root, tmp_path / "broken")
    broken = replace(samples, root=tmp_path / "broken")
    broken.path(1).write_text("no image")
    micro = data.MicroBatch("image", np.array([0, 1, 2]), 1.0, True, seed=5)

    def read(samples, micro):
        return data.TrainingData({"image": Source(samples, 3, 3)}, "finetune", SMALL)[micro]

    _, x, labels, unreadable = read(broken, micro)
    assert len(unreadable) == 1 and str(broken.path(1)) in unreadable[0]
    assert torch.equal(x, read(samples, micro)[1][[0, 2]]) and labels.tolist() == samples.labels[[0, 2]].tolist()
    alone, x, labels, unreadable = read(broken, replace(micro, index=np.array([1, 1])))
    assert alone.weight == 0 and len(x) == len(labels) == 1 and broken.path(1).name in unreadable[0]
    with pytest.raises(UserError, match=broken.path(1).name):  # evaluation never leaves a sample out
        data.TestData(broken, SMALL)[1]


def numbered_video(path: Path, frames: int, rate: int) -> Samples:
    """A clip whose second k has the grey level 40 k."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "0"})
        stream.height = stream.width = 32
        for i in range(frames):
            grey = np.full((32, 32, 3), 40 * (i // rate), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, "rgb24")))
        container.mux(stream.encode())
    return Samples("own", "video", ("a",), path.parent, np.array([path.name.encode()]), np.array([0]), 4, 25.0)


@pytest.mark.parametrize("rate", [15, 25, 30, 60])
def test_time_is_time(tmp_path, rate):
    """Own clips are sampled as if they had 25 frames a second, whatever they have; the catalogue's as they are."""
    samples = numbered_video(tmp_path / "a.mp4", 5 * rate, rate)
    seconds = data.TestData(samples, SMALL)[0][1].float().mean((2, 3, 4)).div(40).round()
    expected = torch.tensor([[i * 4 // 25 for i in numbers] for numbers in (range(16), range(16, 32))])
    assert (seconds - expected).abs().sum() <= 4  # at the borders of seconds
    assert data.frame_rate(samples) == 25 and data.frame_rate(replace(samples, rate=None)) == rate
    own = replace(samples, rate=None)
    seconds = data.TestData(own, SMALL)[0][1].float().mean((2, 3, 4)).div(40).round()
    every = list(range(0, 5 * rate, 4))
    every += every[-1:] * (16 - len(every))
    expected = torch.tensor([[i // rate for i in numbers] for numbers in (every[:16], every[-16:])])
    assert torch.equal(seconds, expected.float())


@pytest.mark.parametrize("modality", ["image", "video"])
def test_a_box_is_cut_out_of_every_frame_in_training_and_test(tmp_path, modality):
    picture = Image.new("RGB", (60, 40))
    picture.paste((200, 200, 200), (20, 4, 52, 36))
    for i in range(20):
        (tmp_path / "clip").mkdir(exist_ok=True)
        picture.save(tmp_path / f"clip/{i}.png")
    name = b"clip/0.png" if modality == "image" else b"clip"
    samples = Samples("own", modality, ("a",), tmp_path, np.array([name]), np.array([0]), box=(20, 4, 32, 32))
    sources = {modality: Source(samples, 1, 1)}
    micro = data.schedule_epoch(sources, 0, 0)[0][0]
    views = [data.TestData(samples, SMALL)[0][1]]
    views += [data.TrainingData(sources, stage, SMALL, "light")[micro][1] for stage in ("pretrain", "finetune")]
    assert all((x == 200).all() for x in views)
    samples.box = (30, 4, 32, 32)
    _, _, _, errors = data.TrainingData(sources, "pretrain", SMALL)[micro]
    expected = f"{samples.path(0)}, 60 x 40 pixels, does not hold --crop (30, 4, 32, 32)"
    assert expected in errors[0]
    with pytest.raises(UserError, match="60 x 40 pixels"):
        data.TestData(samples, SMALL)[0]


def test_what_loading_processes_get_can_be_sent_to_spawned_ones(faces):
    sources, dataset = training_data(faces)
    dataset.sources["image"].samples.box = (0, 0, 60, 60)
    micro = next(deal(sources, 0, 1, 0, 1, 0, 0))
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[micro][1], dataset[micro][1])
    test = data.TestData(sources["video"].samples, SMALL)
    assert pickle.loads(pickle.dumps(test))[0][1].shape == (2, 16, 3, 32, 32)
