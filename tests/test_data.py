"""Behaviour of data.py: split files, readers, clip sampling, augmentation, schedule and loading."""
import argparse
import os
import shutil
import struct
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import ROOT, run_here
from PIL import Image

import data
from data import CATALOGUE, Samples, Schedule, Source, load_samples, read_clip, read_image
from model import Size, UserError

ANNOTATIONS = ROOT.parent / "shared" / "annotations"
SMALL = Size(32, 1, 2, 32, 2, 1, pixels=32, patch=8)  # 16 frames of 32 x 32


# ----------------------------------------------------------------------------------------------------- split files

# Folder of samples and training list as people have them: written out here so that a wrong catalogue is noticed.
LAYOUT = {
    "dfew": ("DFEW/clip_jpg_256", "DFEW/EmoLabel_DataSplit/train(single-labeled)/train_set_1.csv"),
    "ferv39k": ("FERV39K/2_ClipsforFaceCrop", "FERV39K/Annotation/train.csv"),
    "mafw": ("MAFW/frames_crop_align_224", "MAFW/anno/single/no_caption/set_1/train.csv"),
    "affectnet-7": ("AffectNet/Manually_Annotated_Images", "AffectNet/train_affectnet7.txt"),
}


def write_set(root: Path, name: str, text: str, samples: list[str], media: str = "") -> Path:
    """Write the training list and empty samples: folders for clips, files for images and where there is a suffix."""
    folder, split = LAYOUT[name]
    (root / split).parent.mkdir(parents=True, exist_ok=True)
    (root / split).write_bytes(text.encode(errors="surrogateescape"))
    for sample in samples:
        path = root / (media or folder) / sample
        if path.suffix:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        else:
            path.mkdir(parents=True)
    return root / split


def paths_of(samples: Samples) -> list[str]:
    return [str(samples.path(i).relative_to(samples.root)) for i in range(len(samples))]


def error_of(name: str, root: Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        load_samples(name, root, "train", **options)
    return str(caught.value)


@pytest.mark.parametrize("name, text, paths, labels, stride, said", [
    ("dfew", "video_name,label\n00001,0\n00010,6\n", ["00001", "00010"], [0, 6], 4, "0 to 6"),
    ("dfew", "video_name,label\n00001,1\n00010,7\n", ["00001", "00010"], [0, 6], 4, "1 to 7"),  # as handed out
    ("dfew", "video_name,label\r\n00001,0\r\n00002,6\r\n", ["00001", "00002"], [0, 6], 4, "0 to 6"),
    ("dfew", "\ufeff00001,0\r\n00002,6\r\n", ["00001", "00002"], [0, 6], 4, "0 to 6"),
    ("dfew", "\ufeffvideo_name,label\n\n00001, 0\n00002,6\n\n", ["00001", "00002"], [0, 6], 4, "0 to 6"),
    ("ferv39k", "path,id\nInterview/Happy/0118,3\nCrime/Angry/0063,0\n", ["Interview/Happy/0118", "Crime/Angry/0063"],
     [3, 0], 1, "0 to 3"),
    ("mafw", "video_name,labels\n00025,0\n00028,10\n", ["00025", "00028"], [0, 10], 4, "0 to 10"),
    ("affectnet-7", "1/a b.jpg 2\n2/Müller 表情.png 0\n3/x,y.bmp 6\n", ["1/a b.jpg", "2/Müller 表情.png", "3/x,y.bmp"],
     [2, 0, 6], 1, "0 to 6"),               # no header: the first line is a sample
])
def test_split_files_as_people_have_them(tmp_path, name, text, paths, labels, stride, said):
    split = write_set(tmp_path, name, text, paths)
    samples = load_samples(name, tmp_path, "train")
    assert paths_of(samples) == paths and samples.labels.tolist() == labels and samples.stride == stride
    assert len(samples.counts()) == (11 if name == "mafw" else 7) and sum(samples.counts()) == len(paths)
    assert any(said in note and str(split) in note for note in samples.notes)


@pytest.mark.parametrize("listed", ["00007", "7"])
@pytest.mark.parametrize("stored", ["00007", "7", "00007.mp4", "7.avi"])
def test_dfew_names_with_and_without_zeros_find_folders_and_videos(tmp_path, listed, stored):
    write_set(tmp_path, "dfew", f"video_name,label\n{listed},0\n", [stored])
    assert paths_of(load_samples("dfew", tmp_path, "train")) == [stored]


def test_the_16_frame_version_of_dfew_has_stride_1_and_is_said(tmp_path):
    write_set(tmp_path, "dfew", "video_name,label\n00001,0\n", ["00001"], media="DFEW/Clip/clip_224x224_16f")
    samples = load_samples("dfew", tmp_path, "train")
    assert samples.stride == 1
    assert any("clip_224x224_16f" in note and "stride 1" in note for note in samples.notes)
    samples = load_samples("dfew", tmp_path, "train", stride=4)
    assert samples.stride == 4 and any("stride 4 as given; the set's own is 1" in note for note in samples.notes)


@pytest.mark.parametrize("name, text, words", [
    ("dfew", "", ["no samples"]),
    ("dfew", "video_name,label\n", ["no samples"]),
    ("dfew", "video_name,label\n,0\n", ["line 2"]),
    ("dfew", "video_name,label\nM\udcfcller,0\n", ["UTF-8"]),  # Latin 1
    ("dfew", "00001,hapy\n00002,1\n", ["line 1", "hapy"]),  # no header: skipping it would lose a sample silently
    ("dfew", "video_name,label\n00001,0\n00002,8\n", ["8", "out of range"]),
    ("dfew", "video_name,label\n00001,-1\n00002,2\n", ["-1", "out of range"]),
    ("dfew", "video_name,label\n00001,0\n00002,happy\n", ["line 3", "happy"]),
    ("dfew", "video_name,label\n00001,0\n00002,1.5\n", ["line 3", "1.5"]),
    ("dfew", "video_name,label\n00001,0\n00002\n", ["line 3", "00002"]),
    ("dfew", "video_name,label,id\n00001,0,7\n00002,1,8\n", ["line 1", "video_name, label, id"]),  # two of labels
    ("dfew", "label,clip\n0,00001\n1,00002\n", ["line 1", "label, clip", "video_name (name)"]),
    ("affectnet-7", "00001 1\n00002 7\n", ["counted from 1", "0 to 6"]),
    ("ferv39k", "path,id\n00001,1\n00002,7\n", ["counted from 1", "0 to 6"]),
], ids=lambda value: value if isinstance(value, str) and len(value) < 12 else "")
def test_a_bad_list_is_an_error_that_names_file_and_value(tmp_path, name, text, words):
    split = write_set(tmp_path, name, text, ["00001", "00002"])
    message = error_of(name, tmp_path)
    assert all(word in message for word in [str(split), *words]), message



def test_missing_data_names_what_was_looked_for_and_the_synthetic_way_out(tmp_path):
    for name, (folder, split) in LAYOUT.items():
        message = error_of(name, tmp_path)
        assert str(tmp_path / folder) in message and str(tmp_path / split) in message, message
        assert "synthetic" in message
    write_set(tmp_path, "dfew", "video_name,label\n00001,0\n00002,1\n00003,2\n", ["00001", "00003"])
    message = error_of("dfew", tmp_path)
    assert "00002" in message and "00001" not in message and str(tmp_path / LAYOUT["dfew"][0]) in message
    assert "fold 6" in error_of("dfew", tmp_path, fold=6)
    assert "defw" in error_of("defw", tmp_path) and "ferv39k" in error_of("defw", tmp_path)  # and what there is


def test_voxceleb2_is_every_video_of_its_tree(tmp_path):
    videos = ["id00012/21Uxsk56VDQ/00001.mp4", "id00012/21Uxsk56VDQ/00002.mp4", "id00015/0fijmz4vTVU/00001.mp4"]
    for name in [*videos, "id00012/21Uxsk56VDQ/00001.txt", "notes/x/00001.mp4"]:
        (tmp_path / "VoxCeleb2" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "VoxCeleb2" / name).touch()
    samples = load_samples("voxceleb2", tmp_path, "train")
    assert paths_of(samples) == videos and set(samples.labels) == {-1} and samples.stride == 4
    shutil.rmtree(tmp_path / "VoxCeleb2")
    assert str(tmp_path / "VoxCeleb2") in error_of("voxceleb2", tmp_path)


def test_voxceleb2s_files_are_listed_once(tmp_path):
    root = tmp_path / "VoxCeleb2/dev/mp4"   # as the archive unpacks
    root.mkdir(parents=True)
    for _ in range(2):                      # a list of nothing would hide the files that come later
        assert "holds no file id*/*/*.mp4" in error_of("voxceleb2", tmp_path) and not list(root.iterdir())
    first = ["id00012/a/00001.mp4", "id00012/b/00001.mp4"]
    for name in first:
        (root / name).parent.mkdir(parents=True)
        (root / name).touch()
    assert paths_of(load_samples("voxceleb2", tmp_path, "train")) == first
    (root / "id00012/a/00002.mp4").touch()
    samples = load_samples("voxceleb2", tmp_path, "train")
    assert paths_of(samples) == first and any("2 files, as listed then" in note for note in samples.notes)
    assert [path.name for path in root.iterdir() if path.is_file()] == ["files.txt"]  # nothing half-written
    (root / first[0]).unlink()
    sources = {"video": Source(samples.subset(np.array([0])), 1, 1)}
    unreadable = data.TrainingData(sources, "pretrain", SMALL)[data.schedule_epoch(sources, 0, 0)[0][0]][-1]
    assert unreadable == [f"{root / first[0]} is not there: expected an image or a video"]
    (root / "files.txt").unlink()
    (root / "files.txt").mkdir()            # cannot be written: said, and works without
    samples = load_samples("voxceleb2", tmp_path, "train")
    assert len(samples) == 2 and any("cannot be written" in note for note in samples.notes)
    assert sorted(path.name for path in root.iterdir()) == ["files.txt", "id00012"]  # nothing half-written


def test_no_other_clip_stands_in_for_a_missing_one(tmp_path):
    """Leading zeros are a matter of numbers alone."""
    write_set(tmp_path, "ferv39k", "path,id\nCrime/Angry/0a,0\n", ["Crime/Angry/a", "Crime/Angry/0000a"])
    assert "0a" in error_of("ferv39k", tmp_path)


def test_rafdb_has_one_list_for_both_splits_and_labels_from_1(tmp_path):
    listed = tmp_path / "RAF-DB/basic/EmoLabel/list_patition_label.txt"
    listed.parent.mkdir(parents=True)
    listed.write_text("train_00001.jpg 5\ntrain_00002.jpg 7\ntest_0001.jpg 1\n")
    stored = tmp_path / "RAF-DB/basic/Image/aligned"
    stored.mkdir(parents=True)
    for name in ("train_00001", "train_00002", "test_0001"):
        (stored / f"{name}_aligned.jpg").touch()
    train, test = (load_samples("rafdb", tmp_path, split) for split in ("train", "test"))
    assert paths_of(train) == ["train_00001_aligned.jpg", "train_00002_aligned.jpg"]
    assert [train.classes[label] for label in train.labels] == ["sadness", "neutral"]
    assert paths_of(test) == ["test_0001_aligned.jpg"] and test.classes[test.labels[0]] == "surprise"


@pytest.mark.parametrize("name, kept, said", [
    ("affectnet-7", [0, 6], "1 contempt, 0 none, 2 uncertain, 1 no face"),
    ("affectnet-8", [0, 6, 7], "0 none, 2 uncertain, 1 no face")])
def test_the_original_csv_of_affectnet_loses_what_has_no_class_and_says_how_many(tmp_path, name, kept, said):
    folder = tmp_path / "AffectNet"
    (folder / "Manually_Annotated_Images/1").mkdir(parents=True)
    lines = ["subDirectory_filePath,face_x,facial_landmarks,expression,valence"]
    for i, label in enumerate([0, 9, 6, 7, 10, 9]):
        lines.append(f"1/{i}.jpg,0,1;2;3,{label},-2")
        (folder / f"Manually_Annotated_Images/1/{i}.jpg").touch()
    (folder / "training.csv").write_text("\n".join(lines))
    samples = load_samples(name, tmp_path, "train")
    assert samples.labels.tolist() == kept and any(said in note for note in samples.notes)
    # A list file, under the released code's name, comes first.
    (folder / f"train_affectnet{name[-1]}_2w.txt").write_text("1/3.jpg 4\n")
    assert paths_of(load_samples(name, tmp_path, "train")) == ["1/3.jpg"]


def test_part_of_dfew_whose_labels_may_count_from_0_or_from_1(tmp_path):
    split = write_set(tmp_path, "dfew", "video_name,label\n00001,3\n00002,6\n", ["00001", "00002"])
    message = error_of("dfew", tmp_path)
    assert str(split) in message and "neither 0 nor 7" in message
    other = tmp_path / "DFEW/EmoLabel_DataSplit/test(single-labeled)/test_set_4.csv"  # of another fold
    other.parent.mkdir(parents=True)
    for label, expected in ((7, [2, 5]), (0, [3, 6])):
        other.write_text(f"video_name,label\n7,{label}\n")
        assert load_samples("dfew", tmp_path, "train").labels.tolist() == expected


@pytest.mark.parametrize("line", ["../secret,0", "1/../../secret,0", "/etc/passwd,0", "1/a\0b,0"])
def test_no_list_leads_out_of_the_data_folder(tmp_path, line):
    split = write_set(tmp_path, "dfew", f"video_name,label\n00001,0\n{line}\n", ["00001"])
    message = error_of("dfew", tmp_path)
    assert f"{split}, line 3" in message and repr(line.split(",")[0]) in message
    split.write_text("video_name,label\n00001,0\n00002,1\n")  # a link that the user made is fine
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "DFEW/clip_jpg_256/00002").symlink_to(tmp_path / "elsewhere")
    assert paths_of(load_samples("dfew", tmp_path, "train")) == ["00001", "00002"]


@pytest.mark.skipif(not ANNOTATIONS.is_dir(), reason="the real split files are not beside the repository")
def test_real_split_files_hold_the_published_counts():
    def rows_of(name, path):
        return data.numbered(path, data.read_list(ANNOTATIONS / path), CATALOGUE[name].classes)[0]

    def labels(name, path):
        return [CATALOGUE[name].classes.index(row.label) for row in rows_of(name, path)]

    dfew = [labels("dfew", f"DFEW/test_set_{fold}.csv") for fold in range(1, 6)]
    assert [len(fold) for fold in dfew] == [2341, 2341, 2340, 2339, 2336]
    assert np.bincount(dfew[0]).tolist() == [489, 379, 534, 435, 294, 29, 181]
    mafw = [len(labels("mafw", f"MAFW/set_{fold}/test.csv")) for fold in range(1, 6)]
    assert mafw == [1839, 1837, 1833, 1832, 1831]
    assert [len(labels("ferv39k", f"FERV39K/{split}.csv")) for split in ("train", "test")] == [31088, 7847]
    assert len(labels("affectnet-7", "AffectNet/test_affectnet7.txt")) == 3267
    assert all(row.name.split("/")[1].lower() == row.label for row in rows_of("ferv39k", "FERV39K/train.csv"))


# ---------------------------------------------------------------------------------------------------- one's own data

def write_own(folder: Path, **lists: str) -> str:
    """Write lists and, empty, what they name; returns the data set's name."""
    for stem, text in lists.items():
        (folder / f"{stem}.csv").parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{stem}.csv").write_text(text, encoding="utf-8")
        for line in text.splitlines()[1:]:
            path = folder / line.split(",")[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch() if path.suffix else path.mkdir(exist_ok=True)
    return ",".join(str(folder / f"{stem}.csv") for stem in lists)


def test_own_clips_and_images_have_class_names(tmp_path):
    name = write_own(tmp_path, train="path,label,person\nclips/a b.mp4,sad,1\nclips/Müller 表情,happy,2\n7.avi,angry,2\n",
                     test="path,label\nclips/c.mp4,happy\n")
    train, test = (load_samples(name, tmp_path / "unused", split) for split in ("train", "test"))
    assert train.modality == "video" and train.classes == ("angry", "happy", "sad")
    assert paths_of(train) == ["clips/a b.mp4", "clips/Müller 表情", "7.avi"] and train.labels.tolist() == [2, 1, 0]
    assert train.people.tolist() == [b"1", b"2", b"2"] and train.stride == 4
    assert paths_of(test) == ["clips/c.mp4"] and test.labels.tolist() == [1]
    name = write_own(tmp_path / "images", train="path\n1.jpg\n2.PNG\n")  # stage 1 needs no labels
    samples = load_samples(name, tmp_path, "train")
    assert samples.modality == "image" and samples.labels.tolist() == [-1, -1]
    assert data.short_name(name) == "train"


@pytest.mark.parametrize("lists, words", [
    (dict(train="path,label\na.mp4,happy\n", test="path,label\nb.mp4,sad\n"), ["test.csv, line 2", "sad", "happy"]),
    (dict(train="path,label\na.mp4,happy\nb.jpg,sad\n"), ["a.mp4", "b.jpg"]),
    (dict(train="path,label\na.mp4,happy\nb.mp4\n"), ["train.csv, line 3"]),
    (dict(train="path,label\na.mp4,happy\n../b.mp4,sad\n"), ["train.csv, line 3", "../b.mp4"]),
    (dict(train="path,label\na.mp4,happy\n"), ["no test file"]),
    (dict(train="path,label\na.mp4,x\n", test="path,label\nb.mp4,x\n", third="path,label\nc.mp4,x\n"), ["3 files"]),
], ids=["unknown class", "mixed", "short line", "outside", "no test", "three files"])
def test_bad_lists_of_own_data_are_named(tmp_path, lists, words):
    name = write_own(tmp_path, **lists)
    with pytest.raises(UserError) as caught:
        load_samples(name, tmp_path, "test")
    assert all(word in str(caught.value) for word in words), caught.value


def test_own_clips_through_stage_2_and_evaluation(faces, tmp_path):
    clips = load_samples("synthetic", faces, "train")
    (tmp_path / "faces").symlink_to(clips.root)
    for split, first in (("learn", 0), ("held", 1)):
        lines = [f"faces/{path},{clips.classes[label]}"
                 for path, label in list(zip(paths_of(clips), clips.labels))[first::2]]
        (tmp_path / f"{split}.csv").write_text("\n".join(["path,label", *lines]) + "\n")
    text = run_here(tmp_path, "finetune.py", "--dataset", "learn.csv,held.csv", "--image-dataset", "none", "--size",
                    "tiny", "--epochs", 1, "--warmup-epochs", 0, "--pretrained", "none", "--workers", 1)
    assert "writing to runs/learn/fold1" in text and "0 angry, 1 disgust" in text
    text = run_here(tmp_path, "evaluate.py", "--checkpoint", "runs/learn/fold1/last.pt", "--workers", 1)
    assert "videos-learn: 14 test samples, runs/learn/fold1/last.pt" in text
    text = run_here(tmp_path, "pretrain.py", "--image-dataset", "learn.csv", status=2)
    assert "learn.csv holds videos with labels: expected images, or none or frames" in " ".join(text.split())


@pytest.mark.parametrize("name, fits", [("affectnet-7", False), ("voxceleb2", False), ("lost.csv", False), ("x", False),
                                        ("dfew", True), ("none", True)])
def test_a_stage_takes_data_sets_of_its_kind(name, fits):
    check = data.dataset_name("video", labelled=True, others=("none",))
    if fits:
        assert check(name) == name
    else:
        with pytest.raises(argparse.ArgumentTypeError, match=name):
            check(name)


# --------------------------------------------------------------------------------------------------------- readers

GREY_STEP = 6  # frame i of a test video is grey level 6 * i: far enough apart for a codec


def write_video(path: Path, frames: np.ndarray, codec: str = "libx264", pix_fmt: str = "yuv420p", uneven: bool = False,
                options: dict = {}, **container_options) -> Path:
    """uneven: a variable frame rate."""
    quality = {"crf": "10"} if codec == "libx264" else {"qmax": "2"}
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream(codec, rate=25, options=quality | options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        if uneven:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")
            if uneven:
                picture.pts, picture.time_base = 40 * i + 17 * (i % 3 == 1), Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def grey_frames(n: int) -> np.ndarray:
    frames = np.broadcast_to((GREY_STEP * np.arange(n, dtype=np.uint8))[:, None, None, None], (n, 32, 32, 3)).copy()
    frames[:, 16:, 16:] = 200, 40, 60       # red below on the right
    return frames


def numbers_of(clip: torch.Tensor) -> list[int]:
    """The frame numbers that the grey levels of frames (T, 3, H, W) stand for."""
    return (clip[..., :8].float().mean((1, 2, 3)) / GREY_STEP).round().int().tolist()


@pytest.mark.parametrize("suffix, codec", [(".mp4", "libx264"), (".avi", "mpeg4"), (".avi", "libx264")])
def test_a_video_gives_exactly_the_frames_asked_for_in_that_order(tmp_path, suffix, codec):
    path = write_video(tmp_path / f"clip{suffix}", grey_frames(40), codec)
    wanted, counts = [39, 0, 7, 7, 8, 31, 0], []
    clip = read_clip(path, lambda n: counts.append(n) or wanted)
    assert counts == [40] and numbers_of(clip) == wanted
    assert clip.dtype == torch.uint8 and clip.shape == (7, 3, 32, 32)
    assert (clip[:, :, 24, 24] - torch.tensor([200.0, 40, 60])).abs().max() < 20
    assert numbers_of(read_clip(path, range)) == list(range(40))
    samples = Samples("dfew", "video", data.DFEW, tmp_path, np.array([path.name.encode()]), np.array([3]), stride=1)
    _, views, label = data.TestData(samples, SMALL)[0]  # as evaluation sees it
    assert label == 3 and [numbers_of(view) for view in views] == [list(range(16)), list(range(24, 40))]


@pytest.mark.parametrize("folder", [False, True], ids=["video", "folder"])
def test_frames_are_fitted_one_by_one_as_they_are_decoded(tmp_path, folder):
    """So that memory holds frames of the model's size, whatever the file's size, and each is fitted once."""
    path = tmp_path if folder else write_video(tmp_path / "clip.mp4", grey_frames(40))
    for i in range(40) if folder else ():
        Image.fromarray(grey_frames(40)[i]).save(tmp_path / f"{i}.png")
    wanted, seen = [7, 7, 3, 20], []

    def each(frame):
        seen.append(frame)
        return frame[:, ::2, ::2]

    clip = read_clip(path, lambda n: wanted, each)
    assert clip.shape == (4, 3, 16, 16) and numbers_of(clip) == wanted
    assert sorted(numbers_of(torch.stack(seen))) == [3, 7, 20] and seen[0].shape == (3, 32, 32)
    torch.manual_seed(0)
    samples = Samples("dfew", "video", data.DFEW, path.parent, np.array([path.name.encode()]), np.array([0]), stride=1)
    for stage, strength, expected in (("pretrain", "paper", 16), ("finetune", "paper", 8), ("finetune", "light", 8)):
        fitted = data.fit(stage, samples, 8, strength)
        assert read_clip(path, range, fitted).shape == (40, 3, expected, expected)
    assert data.fit("finetune", replace(samples, modality="image"), 160)(seen[0]).shape == (3, 192, 192)


def test_a_video_trimmed_without_reencoding_shows_what_a_player_shows(tmp_path):
    """`ffmpeg -ss -c copy` and telephones keep the frames before the cut for decoding and mark them as not shown."""
    path = write_video(tmp_path / "whole.mp4", grey_frames(40))
    with av.open(str(path)) as whole, av.open(str(tmp_path / "trimmed.mp4"), "w") as trimmed:
        stream = trimmed.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.size:
                shift = round(10 / 25 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                trimmed.mux(packet)
    assert numbers_of(read_clip(tmp_path / "trimmed.mp4", range)) == list(range(10, 40))


def test_frames_of_a_folder_come_in_natural_order(tmp_path):
    for i in range(12):
        Image.new("L", (8, 8), GREY_STEP * i).save(tmp_path / f"frame{i}.png")  # 10 sorts before 2 as text
    (tmp_path / "notes.txt").write_text("no frame")
    assert numbers_of(read_clip(tmp_path, lambda n: [n - 1, *range(n), 3])) == [11, *range(12), 3]


def test_frames_are_of_any_image_format_and_of_one_size(tmp_path):
    for i, suffix in enumerate(("webp", "gif", "TIFF")):
        Image.new("L", (8, 8), GREY_STEP * i).save(tmp_path / f"{i}.{suffix}")
    assert numbers_of(read_clip(tmp_path, range)) == [0, 1, 2]
    Image.new("L", (9, 8)).save(tmp_path / "3.png")
    with pytest.raises(UserError, match=r"\[\(8, 8\), \(8, 9\)\].*photographs are given one by one"):
        read_clip(tmp_path, range)


def two_colours() -> Image.Image:
    """30 rows x 40 columns, the left half red and the right half blue."""
    image = Image.new("RGB", (40, 30), (200, 60, 40))
    image.paste((40, 60, 200), (20, 0, 40, 30))
    return image


@pytest.mark.parametrize("name, mode, options", [
    ("plain.jpg", "RGB", {}), ("palette.png", "P", {}), ("cmyk.jpg", "CMYK", {}), ("alpha.png", "RGBA", {}),
    ("webp.jpg", "RGB", {"format": "WEBP"}), ("face.bmp", "RGB", {}), ("grey.jpg", "L", {}), ("16 bit.png", "I;16", {}),
    ("gif.jpg", "RGB", {"format": "GIF", "save_all": True, "append_images": [Image.new("RGB", (40, 30))]}),
    ("moving.webp", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (40, 30))]})])
def test_images_of_every_kind_become_rgb(tmp_path, name, mode, options):
    grey = np.array(two_colours().convert("L"))
    image = Image.fromarray(257 * grey.astype(np.uint16)) if mode == "I;16" else two_colours().convert(mode)
    image.save(tmp_path / name, **options)
    expected = np.stack([grey] * 3, 2) if mode in ("L", "I;16") else np.array(two_colours())
    pixels = read_image(tmp_path / name)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 30, 40)  # of an animation, its first picture
    for column in (5, 35):
        assert np.abs(pixels[:, 15, column].numpy() - expected[15, column].astype(float)).max() < 25


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_exif_orientation_turns_the_image_upright(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6                        # to be shown turned right by 90 degrees: left becomes top
    two_colours().save(tmp_path / f"turned{suffix}", exif=exif)
    pixels = read_image(tmp_path / f"turned{suffix}").float()
    assert pixels.shape == (3, 40, 30)
    assert pixels[0, 5, 15] > 150 > pixels[0, 35, 15]  # red above


@pytest.mark.parametrize("options", [{}, {"movflags": "faststart"}], ids=["index last", "index first"])
def test_a_truncated_video_is_an_error_that_names_it(tmp_path, options):
    """Frames that are there must not stand for the whole video, wherever it was cut."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 32, 32, 3)).astype(np.uint8)
    whole = write_video(tmp_path / "whole.mp4", noise, **options)
    content = whole.read_bytes()
    with av.open(str(whole)) as container:  # also cut between two frames, where no packet is damaged
        ends = sorted(packet.pos + packet.size for packet in container.demux(video=0) if packet.size)
    for cut in (0, 8, 200, len(content) // 3, len(content) * 9 // 10, ends[15], ends[30], ends[-2], ends[-1] - 1):
        (tmp_path / "cut.mp4").write_bytes(content[:cut])
        with pytest.raises(UserError, match="cut.mp4"):
            read_clip(tmp_path / "cut.mp4", lambda n: data.test_frames(n, 16, 1))


def test_a_damaged_exif_block_is_an_error_that_names_the_image(tmp_path):
    two_colours().save(tmp_path / "odd.webp", exif=b"Exif\0\0II\x2b\0\x08")
    with pytest.raises(UserError, match="odd.webp cannot be read"):
        read_image(tmp_path / "odd.webp")


def test_a_video_whose_name_looks_like_a_protocol(tmp_path, monkeypatch):
    write_video(tmp_path / "at10:30.mp4", np.zeros((20, 32, 32, 3), np.uint8))
    monkeypatch.chdir(tmp_path)
    assert read_clip(Path("at10:30.mp4"), lambda n: data.test_frames(n, 16, 1)).shape == (32, 3, 32, 32)


def test_unreadable_files_are_named(tmp_path):
    two_colours().save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:500])
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound) + stream.encode())
    for folder in ("nothing", "damaged"):
        (tmp_path / folder).mkdir()
    for name, text in (("text.jpg", "text"), ("empty.jpg", ""), ("text.mp4", "text"), ("empty.avi", ""),
                       ("damaged/1.jpg", "text")):
        (tmp_path / name).write_text(text)
    video = write_video(tmp_path / "unknown.mp4", grey_frames(3)).read_bytes()
    (tmp_path / "unknown.mp4").write_bytes(video.replace(b"avc1", b"none"))
    for read, names in ((read_image, ("text.jpg", "empty.jpg", "half.jpg", "gone.jpg")),
                        (lambda path: read_clip(path, range),
                         ("sound.mp4", "text.mp4", "empty.avi", "gone.mp4", "unknown.mp4", "nothing", "damaged"))):
        for name in names:
            with pytest.raises(UserError, match=name):
                read(tmp_path / name)


def moving(n: int, height: int, width: int) -> np.ndarray:
    """Frames of a noisy pattern that moves, so that they are predicted from each other and all differ."""
    rng = np.random.default_rng(n)
    wide = np.kron(rng.integers(0, 200, (height, width, 3)), np.ones((4, 4, 1), int))
    return np.stack([wide[i % (3 * height):][:height, i % (2 * width):][:, :width]
                     + rng.integers(0, 56, (height, width, 1)) for i in range(n)]).astype(np.uint8)


def every_frame(path: Path) -> torch.Tensor:
    """Independent of the project: everything decoded from the start."""
    with av.open(str(path)) as container:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return torch.stack(frames).permute(0, 3, 1, 2)


@pytest.mark.parametrize("options", [
    {"g": "60", "bf": "3"}, {"g": "40", "x264-params": "open-gop=1:bframes=3"},
    {"g": "40", "x264-params": "intra-refresh=1"}, {"g": "1000"}, {"g": "60", "bf": "0"}],
    ids=["B-frames", "open GOP", "intra refresh", "one key frame", "no B-frames"])
@pytest.mark.parametrize("suffix, uneven", [(".mp4", False), (".mp4", True), (".mkv", True)], ids=["", "uneven", "mkv"])
def test_a_clip_in_a_long_video_is_bitwise_what_decoding_from_the_start_gives(tmp_path, suffix, uneven, options):
    path = write_video(tmp_path / f"long{suffix}", moving(300, 32, 32), options=options, uneven=uneven)
    frames = every_frame(path)
    assert len(frames) == 300
    torch.manual_seed(0)
    for choose in [data.pretrain_frames] * 3 + [data.train_frames] * 3:
        wanted = choose(300, 16, 4)
        assert torch.equal(read_clip(path, lambda n: wanted), frames[wanted])
    for wanted in ([299, 299], [0, 150, 299], [119, 120, 121], list(range(300))):
        assert torch.equal(read_clip(path, lambda n: wanted), frames[wanted])


def test_a_clip_is_reached_from_the_key_frame_before_it(tmp_path, monkeypatch):
    path = write_video(tmp_path / "long.mp4", moving(240, 32, 32), options={"g": "60"})
    frames = every_frame(path)
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    for position, size in packets[:126]:    # what comes before is not even looked at
        content[position + 4:position + size] = bytes(size - 4)
    path.write_bytes(content)
    attempts, decode = [], data.decode
    monkeypatch.setattr(data, "decode", lambda *a, **options: attempts.append(1) or decode(*a, **options))
    for wanted in ([130, 150, 239], [170], [128]):  # of these, key frames are 128 and 188
        assert torch.equal(read_clip(path, lambda n: wanted), frames[wanted])
    assert len(attempts) == 3               # a second would begin at the start of the file


@pytest.mark.parametrize("turns, matrix", [(0, (1, 0, 0, 1)), (1, (0, 1, -1, 0)), (2, (-1, 0, 0, -1)),
                                           (3, (0, -1, 1, 0))])
def test_a_video_taken_with_a_turned_telephone_is_shown_upright(tmp_path, turns, matrix):
    path = write_video(tmp_path / "turned.mp4", np.repeat(np.array(two_colours())[None], 3, 0))
    content = path.read_bytes()             # turns: quarter turns to the right that the player is to make
    start = content.index(struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30), content.index(b"tkhd"))
    a, b, c, d = (value << 16 for value in matrix)
    path.write_bytes(content[:start] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + content[start + 36:])
    clip = read_clip(path, lambda n: [0, 2]).float()
    expected = torch.from_numpy(np.rot90(np.array(two_colours()), -turns).copy()).permute(2, 0, 1)
    assert clip.shape == (2, *expected.shape) and (clip - expected).abs().mean() < 12


@pytest.mark.parametrize("height, width", [(31, 33), (1, 7), (120, 16)])
def test_videos_of_odd_sizes(tmp_path, height, width):
    frames = np.full((5, height, width, 3), 90, np.uint8)
    clip = read_clip(write_video(tmp_path / "odd.mp4", frames, pix_fmt="yuv444p"), range)
    assert clip.shape == (5, 3, height, width) and (clip.float() - 90).abs().max() < 5


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 100, 3000])
@pytest.mark.parametrize("folder", [False, True], ids=["video", "folder"])
def test_clips_of_n_frames_in_training_and_evaluation(tmp_path, n, folder):
    frames, name = (np.arange(n) % 250).astype(np.uint8), "Müller, A. 表情"  # a name with spaces and foreign letters
    if folder:
        (tmp_path / "elsewhere").mkdir()
        for grey in range(min(n, 250)):
            Image.new("L", (8, 8), grey).save(tmp_path / f"elsewhere/{grey}.png")
        for i in range(250, n):
            os.link(tmp_path / f"elsewhere/{i % 250}.png", tmp_path / f"elsewhere/{i}.png")
        (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    else:
        name += ".mp4"
        write_video(tmp_path / "elsewhere.mp4", np.broadcast_to(frames[:, None, None, None], (n, 16, 16, 3)),
                    options={"crf": "0", "preset": "ultrafast"})
        (tmp_path / name).symlink_to(tmp_path / "elsewhere.mp4")
    samples = Samples("dfew", "video", data.DFEW, tmp_path, np.array([name.encode()]), np.array([0]), stride=4)
    views = data.TestData(samples, SMALL)[0][1]
    expected = torch.from_numpy(frames[data.test_frames(n, 16, 4)].astype(int)).unflatten(0, (2, 16))
    assert views.shape == (2, 16, 3, 32, 32) and (views.float().mean((2, 3, 4)) - expected).abs().max() < 4
    sources = {"video": Source(samples, 1, 1)}
    for stage in ("pretrain", "finetune"):
        _, x, _, unreadable = data.TrainingData(sources, stage, SMALL)[data.schedule_epoch(sources, 0, 0)[0][0]]
        assert x.shape == (1, 16, 3, 32, 32) and not unreadable


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


def test_a_short_clip_of_30_frames_as_released():
    assert data.train_frames(30, 16, 4) == [0, 5, 10, 15, 20, 25] + [29] * 10


# --------------------------------------------------------------------------------------------------- augmentation


def whole_way(name: str, stage: str, strength: str = "paper", pixels: int = 32):
    """A frame's way as a data set reads it, (3, h, w) -> (3, pixels, pixels), and a clip's."""
    samples = made_up(name, [0])
    if stage == "test":
        return data.TestData(samples, SMALL).fit
    fit = data.fit(stage, samples, pixels, strength)
    augment = data.augmentation(stage, samples.modality, pixels, strength)
    return lambda x: augment(torch.stack([fit(frame) for frame in x]) if x.ndim == 4 else fit(x))


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
    assert torch.equal(data.fixed_crop(frames, CATALOGUE["voxceleb2"].crop), frames[:, :, 0:160, 32:192])
    seen = torch.zeros(1, 3, 224, 224, dtype=torch.uint8)
    seen[..., 0:160, 32:192] = 255          # stage 1 sees nothing outside of it
    for pixels in (32, 160):
        way = whole_way("voxceleb2", "pretrain", pixels=pixels)
        assert all((way(seen) == 255).all() for _ in range(20))


def test_to_float_normalises_as_imagenet_and_puts_channels_first():
    x = torch.randint(0, 256, (2, 5, 3, 4, 6), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = ((x.permute(0, 1, 3, 4, 2) / 255 - mean) / std).permute(0, 4, 1, 2, 3)  # (B, 3, T, H, W)
    assert data.to_float(x).shape == (2, 3, 5, 4, 6) and torch.allclose(data.to_float(x), expected, atol=1e-5)
    assert torch.allclose(data.to_float(x[:, 0]), expected[:, :, 0], atol=1e-5)


# -------------------------------------------------------------------------------------------------------- schedule

def made_up(name: str, labels: list[int]) -> Samples:
    names = np.array([f"{i:05d}".encode() for i in range(len(labels))])
    return Samples(name, CATALOGUE[name].modality, CATALOGUE[name].classes, Path("nowhere"), names, np.array(labels),
                   crop=CATALOGUE[name].crop)


def joint_sources() -> dict[str, Source]:
    """112 images, of which half are drawn in batches of 8, and 24 clips in batches of 6 in micro-batches of 4."""
    images = made_up("affectnet-7", [0] * 64 + [1] * 48)
    return {"image": Source(images, batch=8, micro=8, share=0.5, balanced=True),
            "video": Source(made_up("dfew", [i % 7 for i in range(24)]), batch=6, micro=4)}


def content(micro: data.MicroBatch) -> tuple:
    return micro.modality, micro.epoch, micro.step, micro.place, tuple(micro.index), micro.seed


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
    assert [(micro.epoch, micro.step) for step in steps for micro in step] == [
        (0, i) for i, step in enumerate(steps) for _ in step]


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
    ranks = [list(Schedule(sources, 3, 2, rank, world)) for rank in range(world)]
    steps = [step for epoch in (0, 1) for step in data.schedule_epoch(sources, 3, epoch)]
    assert len(steps) == 2 * Schedule(sources, 3, 2, 0, world).steps_per_epoch()
    for step in steps:
        at = step[0].epoch, step[0].step
        held = [[micro for micro in rank if (micro.epoch, micro.step) == at] for rank in ranks]
        working = sorted((micro for rank in held for micro in rank if micro.weight > 0), key=lambda m: m.place)
        assert [content(micro) for micro in working] == [content(micro) for micro in step]
        assert sum(micro.weight for rank in held for micro in rank) == pytest.approx(1)
        samples = sum(len(micro.index) for micro in step)
        assert [micro.weight for micro in working] == pytest.approx([len(m.index) / samples for m in working])
        for rank in held:                   # every process ends the step, also one that has nothing to do
            assert [micro.last for micro in rank] == [False] * (len(rank) - 1) + [True]
        assert sum(rank[0].weight == 0 for rank in held) == max(0, world - len(step))


def test_the_schedule_depends_on_seed_and_epoch_alone():
    def epoch_of(seed, epoch):
        return [content(micro) for step in data.schedule_epoch(joint_sources(), seed, epoch) for micro in step]

    assert epoch_of(0, 1) == epoch_of(0, 1)
    micros = epoch_of(0, 0) + epoch_of(0, 1) + epoch_of(1, 0) + epoch_of(1, 1)
    assert len({micro[-1] for micro in micros}) == len(micros)  # no two micro-batches share a seed
    orders = {tuple(micro[4] for micro in epoch_of(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(orders) == 6


@pytest.mark.parametrize("epoch, step", [(0, 0), (0, 5), (1, 3), (2, 10), (1, 11)])
def test_resuming_continues_the_same_sequence(epoch, step):
    sources = joint_sources()               # 11 steps an epoch: (1, 11) is the end of epoch 1
    for rank, world in ((0, 1), (1, 3)):
        whole = list(Schedule(sources, 0, 3, rank, world))
        rest = list(Schedule(sources, 0, 3, rank, world, (epoch, step)))
        expected = [micro for micro in whole if (micro.epoch, micro.step) >= (epoch, step)]
        assert rest and [(*content(m), m.weight, m.last) for m in rest] == [(*content(m), m.weight, m.last)
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


# --------------------------------------------------------------------------------------------------------- loading

def training_data(faces: Path, stage: str = "finetune") -> tuple[dict[str, Source], data.TrainingData]:
    sources = {"image": Source(load_samples("synthetic-images", faces, "train"), 8, 4, share=0.5, balanced=True),
               "video": Source(load_samples("synthetic", faces, "train", 1), 8, 4)}
    return sources, data.TrainingData(sources, stage, SMALL)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_workers_do_not_change_the_samples(faces, stage):
    def run(workers):
        sources, dataset = training_data(faces, stage)
        return list(data.loader(dataset, workers, batch_size=None, sampler=Schedule(sources, 0, 1, 0, 1)))

    here, there = run(0), run(2)
    assert {micro.modality for micro, *_ in here} == {"image", "video"} and len(here) == len(there) == 2 * (6 + 3)
    for (micro, x, labels, unreadable), (micro2, x2, labels2, _) in zip(here, there):
        assert content(micro) == content(micro2) and torch.equal(x, x2) and torch.equal(labels, labels2)
        assert x.shape == ((4, 3, 32, 32) if micro.modality == "image" else (4, 16, 3, 32, 32)) and not unreadable
        assert labels.tolist() == training_data(faces)[0][micro.modality].samples.labels[micro.index].tolist()


def test_repeats_are_4_different_crops_of_one_decoded_clip(faces, monkeypatch):
    read, asked = data.read_clip, []
    monkeypatch.setattr(data, "read_clip", lambda path, *how: asked.append(path) or read(path, *how))
    samples = load_samples("synthetic-unlabelled", faces, "train")
    sources = {"video": Source(samples, batch=8, micro=8, repeats=4)}
    micro = next(iter(Schedule(sources, 0, 1, 0, 1)))
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
    micro = data.MicroBatch("image", 0, 0, 0, np.array([0, 1, 2]), 1.0, True, seed=5)

    def read(samples, micro):
        return data.TrainingData({"image": Source(samples, 3, 3)}, "finetune", SMALL)[micro]

    _, x, labels, unreadable = read(broken, micro)
    assert len(unreadable) == 1 and str(broken.path(1)) in unreadable[0]
    assert torch.equal(x, read(samples, micro)[1][[0, 2]]) and labels.tolist() == samples.labels[[0, 2]].tolist()
    alone, x, labels, unreadable = read(broken, replace(micro, index=np.array([1, 1])))
    assert alone.weight == 0 and len(x) == len(labels) == 1 and broken.path(1).name in unreadable[0]
    with pytest.raises(UserError, match=broken.path(1).name):  # evaluation never leaves a sample out
        data.TestData(broken, SMALL)[1]
