"""The readers of data.py: images, folders of frames, animations and videos give the frames that are asked for, to the
pixel, or an error that names the file."""
import os
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torchvision.transforms import v2

import data
from data import Samples, Source, open_clip, read_image, resampled
from model import Size, UserError

SMALL = Size(32, 1, 2, 32, 2, 1, pixels=32, patch=8)  # 16 frames of 32 x 32
GREY_STEP = 6                               # frame i of a test video is grey level 6 * i: far enough apart for a codec


def every(n: int) -> list[int]:
    return list(range(n))


def pick(*numbers: int):
    return lambda n: list(numbers)


def read_clip(path: Path, which_frames, transform=v2.Identity()) -> torch.Tensor:
    clip = open_clip(path)
    return data.read_clip(clip, which_frames(clip.n), transform)


def video_length(path: Path) -> tuple[int, float | None]:
    clip = open_clip(path)
    return clip.n, clip.rate


def is_clip(path: Path) -> bool:
    return open_clip(path) is not None


def write_video(path: Path, frames: np.ndarray, codec: str = "libx264", pix_fmt: str = "yuv420p", uneven: bool = False,
                rate: int = 25, options: dict = {}, **container_options) -> Path:
    """frames: (n, h, w, 3). uneven: a variable frame rate."""
    quality = {"crf": "10"} if codec == "libx264" else {"qmax": "2"}
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream(codec, rate=rate, options=quality | options)
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


def grey_frames(n: int, size: int = 32) -> np.ndarray:
    grey = (GREY_STEP * np.arange(n, dtype=np.uint8))[:, None, None, None]
    frames = np.broadcast_to(grey, (n, size, size, 3)).copy()
    frames[:, size // 2:, size // 2:] = 200, 40, 60  # red below on the right
    return frames


def numbers_of(clip: torch.Tensor) -> list[int]:
    """The frame numbers that the grey levels of frames (T, 3, H, W) stand for."""
    return (clip[..., :8].float().mean((1, 2, 3)) / GREY_STEP).round().int().tolist()


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


def two_colours() -> Image.Image:
    """30 rows x 40 columns, the left half red and the right half blue."""
    image = Image.new("RGB", (40, 30), (200, 60, 40))
    image.paste((40, 60, 200), (20, 0, 40, 30))
    return image


# ---------------------------------------------------------------------------------------------------------- videos

@pytest.mark.parametrize("suffix, codec", [
    (".mp4", "libx264"), (".avi", "mpeg4"), (".avi", "libx264"), (".ts", "libx264"), (".flv", "libx264"),
    (".mpg", "mpeg2video"), ("", "libx264")])
def test_a_video_gives_exactly_the_frames_asked_for_in_that_order(tmp_path, suffix, codec):
    path = write_video(tmp_path / f"clip{suffix or '.mp4'}", grey_frames(40), codec)
    path = path.rename(tmp_path / f"clip{suffix}")  # the content tells what it is
    clip = read_clip(path, pick(39, 0, 7, 7, 8, 31, 0))
    assert numbers_of(clip) == [39, 0, 7, 7, 8, 31, 0]
    assert clip.dtype == torch.uint8 and clip.shape == (7, 3, 32, 32)
    assert (clip[:, :, 24, 24] - torch.tensor([200.0, 40, 60])).abs().max() < 20
    assert numbers_of(read_clip(path, every)) == list(range(40))
    assert video_length(path) == (40, 25.0) and is_clip(path)


@pytest.mark.parametrize("folder", [False, True], ids=["video", "folder"])
def test_frames_are_transformed_once_and_one_by_one_as_they_are_decoded(tmp_path, folder):
    """So that memory holds frames of the size that is kept, whatever the file's size."""
    path = tmp_path if folder else write_video(tmp_path / "clip.mp4", grey_frames(40))
    for i in range(40) if folder else ():
        Image.fromarray(grey_frames(40)[i]).save(tmp_path / f"{i}.png")
    seen = []

    def halved(frame):
        seen.append(frame)
        return frame[:, ::2, ::2]

    clip = read_clip(path, pick(7, 7, 3, 20), halved)
    assert clip.shape == (4, 3, 16, 16) and numbers_of(clip) == [7, 7, 3, 20]
    assert sorted(numbers_of(torch.stack(seen))) == [3, 7, 20] and seen[0].shape == (3, 32, 32)
    assert clip[0].permute(1, 2, 0).is_contiguous()  # channel last: resizes fast


@pytest.mark.parametrize("options", [
    {"g": "60", "bf": "3"}, {"g": "40", "x264-params": "open-gop=1:bframes=3"},
    {"g": "40", "x264-params": "intra-refresh=1"}, {"g": "1000"}, {"g": "60", "bf": "0"}],
    ids=["B-frames", "open GOP", "intra refresh", "one key frame", "no B-frames"])
@pytest.mark.parametrize("suffix, uneven", [(".mp4", False), (".mp4", True), (".mkv", True), (".ts", False)])
def test_a_clip_in_a_long_video_is_bitwise_what_decoding_from_the_start_gives(tmp_path, suffix, uneven, options):
    path = write_video(tmp_path / f"long{suffix}", moving(300, 32, 32), options=options, uneven=uneven)
    frames = every_frame(path)
    assert len(frames) == 300
    torch.manual_seed(0)
    clips = [choose(300, 16, 4) for choose in [data.pretrain_frames] * 2 + [data.train_frames] * 2]
    for wanted in (*clips, [299, 299], [0, 150, 299], [119, 120, 121], [5, 290, 140, 6], list(range(300))):
        assert torch.equal(read_clip(path, pick(*wanted)), frames[wanted])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_what_lies_between_wanted_frames_is_not_decoded(tmp_path, suffix, monkeypatch):
    path = write_video(tmp_path / f"long{suffix}", moving(400, 32, 32), options={"g": "40", "sc_threshold": "0"})
    frames, decoded, decoded_frames = every_frame(path), [], data.decoded_frames
    monkeypatch.setattr(data, "decoded_frames", lambda *how: (decoded.append(0) or f for f in decoded_frames(*how)))
    for wanted, most in (([*range(16), *range(384, 400)], 60), ([390], 40), ([0, 100, 300], 100), (range(400), 400)):
        decoded.clear()
        assert torch.equal(read_clip(path, pick(*wanted)), frames[list(wanted)])
        assert len(decoded) <= most, "frames decoded"


def test_a_clip_is_reached_from_the_key_frame_before_it(tmp_path, monkeypatch):
    path = write_video(tmp_path / "long.mp4", moving(240, 32, 32), options={"g": "60"})
    frames = every_frame(path)
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    for position, size in packets[:126]:    # what comes before is not even looked at
        content[position + 4:position + size] = bytes(size - 4)
    path.write_bytes(content)
    opened, open_video = [], data.open_video
    monkeypatch.setattr(data, "open_video", lambda path: opened.append(path) or open_video(path))
    for wanted in ([130, 150, 239], [170], [128]):  # of these, key frames are 128 and 188
        assert torch.equal(read_clip(path, pick(*wanted)), frames[wanted])
    assert len(opened) == 6                 # to count and to decode; a third time would be from the start of the file
    with pytest.raises(UserError, match="long.mp4"):  # frames that are missing are not passed over
        read_clip(path, every)


@pytest.mark.parametrize("options", [{"g": "40", "bf": "3"}, {"g": "40", "x264-params": "open-gop=1:bframes=3"}],
                         ids=["", "open GOP"])
def test_a_stream_that_begins_between_key_frames_is_what_players_show_of_it(tmp_path, options):
    path = write_video(tmp_path / "whole.ts", moving(200, 32, 32), options=options)
    content = path.read_bytes()
    path.write_bytes(content[len(content) // 10 // 188 * 188:])
    frames = every_frame(path)
    assert 80 < len(frames) < 180 and video_length(path) == (len(frames), 25.0)
    for wanted in ([0, len(frames) - 1], [len(frames) // 2], range(len(frames))):
        assert torch.equal(read_clip(path, pick(*wanted)), frames[list(wanted)])


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
    assert numbers_of(read_clip(tmp_path / "trimmed.mp4", every)) == list(range(10, 40))


def test_two_recordings_in_one_file_follow_each_other(tmp_path):
    """Their times overlap; the second has another size, as where a telephone was turned."""
    first = write_video(tmp_path / "1.ts", grey_frames(20)).read_bytes()
    second = write_video(tmp_path / "2.ts", grey_frames(20, size=48)).read_bytes()
    (tmp_path / "twice.ts").write_bytes(first + first)
    assert numbers_of(read_clip(tmp_path / "twice.ts", every)) == [*range(20), *range(20)]
    (tmp_path / "both.ts").write_bytes(first + second)
    clip = read_clip(tmp_path / "both.ts", every, v2.Resize((32, 32), antialias=True))
    assert numbers_of(clip) == [*range(20), *range(20)]
    assert read_clip(tmp_path / "both.ts", every).shape == (40, 3, 32, 32)


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


@pytest.mark.parametrize("turns, matrix", [(0, (1, 0, 0, 1)), (1, (0, 1, -1, 0)), (2, (-1, 0, 0, -1)),
                                           (3, (0, -1, 1, 0))])
def test_a_video_taken_with_a_turned_telephone_is_shown_upright(tmp_path, turns, matrix):
    path = write_video(tmp_path / "turned.mp4", np.repeat(np.array(two_colours())[None], 80, 0), options={"g": "20"})
    content = path.read_bytes()             # turns: quarter turns to the right that the player is to make
    start = content.index(struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30), content.index(b"tkhd"))
    a, b, c, d = (value << 16 for value in matrix)
    path.write_bytes(content[:start] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + content[start + 36:])
    clip = read_clip(path, pick(0, 70)).float()
    expected = torch.from_numpy(np.rot90(np.array(two_colours()), -turns).copy()).permute(2, 0, 1)
    assert clip.shape == (2, *expected.shape) and (clip - expected).abs().mean() < 12


@pytest.mark.parametrize("height, width", [(31, 33), (1, 7), (120, 16)])
def test_videos_of_odd_sizes(tmp_path, height, width):
    frames = np.full((5, height, width, 3), 90, np.uint8)
    clip = read_clip(write_video(tmp_path / "odd.mp4", frames, pix_fmt="yuv444p"), every)
    assert clip.shape == (5, 3, height, width) and (clip.float() - 90).abs().max() < 5


def test_a_cover_picture_is_not_the_video(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "cover.jpg")
    with av.open(str(tmp_path / "music.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "10"})
        stream.height = stream.width = 32
        container.add_attachment("cover.jpg", "image/jpeg", (tmp_path / "cover.jpg").read_bytes())
        for frame in grey_frames(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    assert numbers_of(read_clip(tmp_path / "music.mkv", every)) == list(range(20))


@pytest.mark.parametrize("name", ["at10:30.mp4", os.fsdecode(b"M\xfcller.mp4"), "no suffix", "Müller, A. 表情.mp4"])
def test_videos_of_odd_names(tmp_path, monkeypatch, name):
    """One looks like a protocol, one is not UTF-8."""
    write_video(tmp_path / "video.mp4", grey_frames(20)).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert numbers_of(read_clip(Path(name), every)) == list(range(20))


def test_a_clip_of_a_huge_video_needs_little_memory(tmp_path):
    with av.open(str(tmp_path / "huge.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "crf": "40", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 3840, 2160, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.full((2160, 3840, 3), 90, np.uint8), "rgb24").reformat(format="yuv420p")
        for i in range(24):
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    code = f"""import sys; sys.path.insert(0, {str(ROOT)!r})
import resource
from pathlib import Path
import torch
import data
from torchvision.transforms import v2
torch.set_num_threads(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
clip = data.open_clip(Path("huge.mp4"))
clip = data.read_clip(clip, list(range(clip.n)) * 5, v2.Resize((48, 48), antialias=True))
assert clip.shape == (120, 3, 48, 48), clip.shape
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 250, "MB for frames of 25 MB each"


@pytest.mark.parametrize("n", [1, 16, 17, 3000])
@pytest.mark.parametrize("folder", [False, True], ids=["video", "folder"])
def test_clips_of_n_frames_in_training_and_evaluation(tmp_path, n, folder):
    frames, name = (np.arange(n) % 250).astype(np.uint8), "clip"
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


# ------------------------------------------------------------------------------------------------ frames a second

@pytest.mark.parametrize("rate", [15, 30, 60])
def test_the_rate_of_a_video_is_the_files(tmp_path, rate):
    path = write_video(tmp_path / "clip.mp4", grey_frames(30), rate=rate)
    assert video_length(path) == (30, rate)


def test_clips_of_any_rate_are_sampled_at_the_same_times():
    def choose(n):
        return list(range(0, n, 4))

    assert resampled(choose, 100, None, 25) == resampled(choose, 100, 25, 25.0) == choose(100)
    times = np.array(choose(100)) / 25
    for rate in (12.5, 15, 30, 50, 60, 24000 / 1001):
        n = round(4 * rate)                 # 4 seconds
        numbers = np.array(resampled(choose, n, rate, 25))
        assert len(numbers) == 25 and numbers.min() >= 0 and numbers.max() < n
        assert np.abs(numbers / rate - times).max() <= 0.5 / rate + 1e-9  # the frame nearest in time
    assert resampled(choose, 1, 60, 25) == [0]


# ----------------------------------------------------------------------------------------------- folders of frames

def test_frames_of_a_folder_come_in_natural_order(tmp_path):
    for i in range(12):
        Image.new("L", (8, 8), GREY_STEP * i).save(tmp_path / f"frame{i}.png")  # 10 sorts before 2 as text
    (tmp_path / "notes.txt").write_text("no frame")
    (tmp_path / "._frame0.png").write_text("left by a Mac")
    assert numbers_of(read_clip(tmp_path, lambda n: [n - 1, *range(n), 3])) == [11, *range(12), 3]
    assert video_length(tmp_path) == (12, None) and is_clip(tmp_path)


def test_frames_are_of_any_format_and_size(tmp_path):
    """A detector's crops differ in size; each is resized as a frame, or else to the first one's size."""
    for i, suffix in enumerate(("webp", "gif", "TIFF", "ppm", "jfif")):
        Image.new("L", (8, 8 + i // 4), GREY_STEP * i).convert("RGB").save(tmp_path / f"{i}.{suffix}")
    assert numbers_of(read_clip(tmp_path, pick(0, 1, 2, 3))) == [0, 1, 2, 3]
    clip = read_clip(tmp_path, every, v2.Resize((16, 16), antialias=True))
    assert clip.shape == (5, 3, 16, 16) and numbers_of(clip) == [0, 1, 2, 3, 4]
    for transform, height in ((v2.Identity(), 8), (lambda frame: frame[:, 1:], 7)):
        clip = read_clip(tmp_path, every, transform)
        assert clip.shape == (5, 3, height, 8) and numbers_of(clip) == [0, 1, 2, 3, 4]


# -------------------------------------------------------------------------------------------- images and animations

@pytest.mark.parametrize("name, mode, options", [
    ("plain.jpg", "RGB", {}), ("palette.png", "P", {}), ("cmyk.jpg", "CMYK", {}), ("alpha.png", "RGBA", {}),
    ("webp.jpg", "RGB", {"format": "WEBP"}), ("face.bmp", "RGB", {}), ("grey.jpg", "L", {}), ("16 bit.png", "I;16", {}),
    ("no suffix", "RGB", {"format": "PNG"}), ("face.mp4", "RGB", {"format": "JPEG"}), ("face.jp2", "RGB", {}),
    ("face.ppm", "RGB", {}), ("face.ico", "RGB", {"sizes": [(40, 30)]}), ("face.tga", "RGB", {}),
    ("pages.tif", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (40, 30))]}),
    ("phone.mpo", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (40, 30))]})])
def test_images_of_every_kind_become_rgb(tmp_path, name, mode, options):
    """Whatever their names say; of several pages, and of what telephones store beside a picture, the first."""
    grey = np.array(two_colours().convert("L"))
    image = Image.fromarray(257 * grey.astype(np.uint16)) if mode == "I;16" else two_colours().convert(mode)
    image.save(tmp_path / name, **options)
    expected = np.stack([grey] * 3, 2) if mode in ("L", "I;16") else np.array(two_colours())
    pixels = read_image(tmp_path / name)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 30, 40) and not is_clip(tmp_path / name)
    for column in (5, 35):
        assert np.abs(pixels[:, 15, column].numpy() - expected[15, column].astype(float)).max() < 25


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1", b"msf1"])
def test_heic_is_refused_with_the_remedy(tmp_path, brand):
    """FFmpeg would decode one of its tiles."""
    path = tmp_path / "IMG_0001.jpg"
    path.write_bytes(struct.pack(">i", 24) + b"ftyp" + brand + bytes(100))
    for read in (read_image, open_clip):
        with pytest.raises(UserError, match="IMG_0001.jpg is a HEIC picture.*save it as JPEG or PNG"):
            read(path)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_exif_orientation_turns_the_image_upright(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6                        # to be shown turned right by 90 degrees: left becomes top
    two_colours().save(tmp_path / f"turned{suffix}", exif=exif)
    pixels = read_image(tmp_path / f"turned{suffix}")
    assert pixels.shape == (3, 40, 30)
    assert pixels[0, 5, 15] > 150 > pixels[0, 35, 15]  # red above


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_an_animation_gives_the_frames_that_were_drawn(tmp_path, suffix):
    frames = [Image.new("RGB", (32, 32), (6 * i, 6 * i, 6 * i)) for i in range(40)]
    for i, frame in enumerate(frames):
        frame.paste((200, 40, 60), (i % 24, 20, i % 24 + 8, 28))  # what moves is stored as a part of the picture only
    path, options = tmp_path / f"face{suffix}", {"lossless": True} if suffix == ".webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[20, 60] * 20, **options)
    wanted, most = [39, 0, 7, 7, 8, 31, 0], 8 if suffix == ".gif" else 0
    clip = read_clip(path, pick(*wanted))
    drawn = torch.stack([torch.from_numpy(np.array(frame)) for frame in frames]).permute(0, 3, 1, 2)
    assert clip.dtype == torch.uint8 and clip.shape == (7, 3, 32, 32)
    assert (clip.int() - drawn[wanted].int()).abs().max() <= most
    assert video_length(path) == (40, 25.0) and is_clip(path)
    assert (read_image(path).int() - drawn[0].int()).abs().max() <= most  # as an image, the first
    Image.new("RGB", (32, 32)).save(tmp_path / f"still{suffix}")
    assert not is_clip(tmp_path / f"still{suffix}")


# ------------------------------------------------------------------------------------------- what cannot be read

def test_unreadable_files_are_named(tmp_path):
    two_colours().save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:500])
    two_colours().save(tmp_path / "exif.webp", exif=b"Exif\0\0II\x2b\0\x08")  # damaged
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "float.tif")
    noise = [Image.effect_noise((64, 64), 50 + i) for i in range(10)]
    noise[0].save(tmp_path / "cut.gif", save_all=True, append_images=noise[1:])
    os.truncate(tmp_path / "cut.gif", 9000)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound) + stream.encode())
    for folder in ("nothing", "damaged"):
        (tmp_path / folder).mkdir()
    for name, text in (("text.jpg", "text"), ("empty.jpg", ""), ("page.mp4", "<html>404</html>"), ("empty.avi", ""),
                       ("damaged/1.jpg", "text")):
        (tmp_path / name).write_text(text)
    video = write_video(tmp_path / "unknown.mp4", grey_frames(3)).read_bytes()
    (tmp_path / "unknown.mp4").write_bytes(video.replace(b"avc1", b"none"))
    (tmp_path / "video.jpg").write_bytes(video)
    images = ("text.jpg", "empty.jpg", "half.jpg", "gone.jpg", "exif.webp", "float.tif", "video.jpg")
    clips = ("sound.mp4", "page.mp4", "empty.avi", "gone.mp4", "unknown.mp4", "nothing", "damaged", "cut.gif")
    for read, names in ((read_image, images), (lambda path: read_clip(path, every), clips), (video_length, clips)):
        for name in names:
            if read == video_length and name == "damaged":
                continue                    # frames of a folder are counted, not opened
            with pytest.raises(UserError, match=f"{name}[^\n]*$"):
                read(tmp_path / name)
    with pytest.raises(UserError, match="float.tif cannot be read: pixels of floating point"):
        read_image(tmp_path / "float.tif")
    with pytest.raises(UserError, match="gone.mp4 is not there"):
        open_clip(tmp_path / "gone.mp4")
    assert not is_clip(tmp_path / "text.jpg") and not is_clip(tmp_path / "empty.jpg")  # named as pictures
    assert is_clip(write_video(tmp_path / "clip.mp4", grey_frames(4)).rename(tmp_path / "clip.jpg"))
