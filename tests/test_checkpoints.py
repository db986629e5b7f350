"""Checkpoints: what is refused and in which words, heads of other classes, released weights; then Tables IV and V."""
import argparse
import math
import os
import zipfile

import pytest
import torch
from test_equations import batch, linear, random_weights, represent

import model
from model import (S4D, MaskedAutoencoder, UserError, initialise, load_checkpoint, read_checkpoint, rebuild,
                   unnamed, whole_file)

CLASSES = ["calm", "glad", "sad"]


def described(module, **changes):
    stage = "finetune" if isinstance(module, S4D) else "pretrain"
    return dict(stage=stage, architecture=module.architecture, model=module.state_dict()) | changes


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    path = tmp_path_factory.mktemp("stage1") / "last.pt"
    torch.save(described(MaskedAutoencoder("tiny")), path)
    return path


# --------------------------------------------------------------------------------- what may be missing from a file

def test_stage_2_takes_the_encoder_and_says_what_is_new(stage1):
    state, s4d = torch.load(stage1, weights_only=True)["model"], S4D("tiny", CLASSES, CLASSES)
    said = initialise(s4d, read_checkpoint(stage1), stage1)
    assert torch.equal(s4d.blocks[3].mlp.fc1.weight, state["encoder.blocks.3.mlp.fc1.weight"])
    assert torch.equal(s4d.patch_embed.proj.weight, state["encoder.patch_embed.proj.weight"])
    assert "made new: fc_norm, head, moe_layer\n" in said
    assert said.endswith("dropped: decoder, encoder_to_decoder, mask_token, norm")


def test_vit_moe_starts_as_the_pretrained_ffn(stage1):
    vit_moe = S4D("tiny", CLASSES, CLASSES, expert="ffn")
    initialise(vit_moe, read_checkpoint(stage1), stage1)
    ffn = torch.load(stage1, weights_only=True)["model"]["encoder.blocks.3.mlp.fc1.weight"]
    assert all(torch.equal(expert.fc1.weight, ffn) for expert in vit_moe.blocks[3].moe_layer.experts)
    lost = read_checkpoint(stage1)
    del lost["model"]["encoder.blocks.3.mlp.fc1.weight"]
    with pytest.raises(UserError, match="Missing.*blocks.3.moe_layer.experts.0.fc1.weight.*experts.7.fc1.weight"):
        initialise(vit_moe, lost, stage1)


def test_weights_that_no_stage_makes_or_drops_are_errors(tmp_path):
    module = MaskedAutoencoder("tiny")
    state, path = module.state_dict(), tmp_path / "1.pt"
    lost = {name: value for name, value in state.items() if name != "encoder.blocks.1.norm1.weight"}
    infinite = state["encoder.blocks.2.attn.q_bias"].clone()
    infinite[5] = math.nan
    for broken, named in ((lost, "Missing.*blocks.1.norm1.weight"),
                          (state | {"encoder.extra": torch.zeros(1)}, "Unexpected.*extra"),
                          (state | {"encoder.patch_embed.proj.weight": torch.zeros(128, 3, 4, 16, 16)}, "16, 16.*8, 8"),
                          (state | {"encoder.blocks.2.attn.q_bias": infinite}, "blocks.2.attn.q_bias is not finite")):
        torch.save(described(module, model=broken), path)
        for use in (load_checkpoint, lambda path: initialise(S4D("tiny", CLASSES), read_checkpoint(path), path)):
            with pytest.raises(UserError, match=f"1.pt .*{named}"):
                use(path)
    with pytest.raises(UserError, match="1.pt .*this file is size base: --size base"):
        initialise(S4D("tiny", CLASSES), described(module, architecture={"size": "base"}), "1.pt")


# ------------------------------------------------------------------------------ heads are kept with their classes only

@pytest.mark.parametrize("theirs, ours, kept", [
    (CLASSES, CLASSES, True), (["sad", "calm", "glad"], CLASSES, False), (["calm", "glad", "cross"], CLASSES, False),
    (["calm", "glad"], CLASSES, False), (unnamed(3), CLASSES, False)])
def test_a_head_is_kept_where_both_name_the_same_classes_in_the_same_order(theirs, ours, kept):
    source, s4d = random_weights(S4D("tiny", CLASSES, theirs)).float(), S4D("tiny", CLASSES, ours)
    new_head, x = s4d.head["video"].weight.clone(), batch("video").float()
    said = initialise(s4d, described(source), "a.pt")
    assert torch.equal(s4d.eval().features(x), source.features(x))
    assert torch.equal(s4d.head["image"].weight, source.head["image"].weight)
    if kept:
        assert torch.equal(s4d(x), source(x))
        assert said.endswith("made new: nothing\ndropped: nothing")
    else:
        assert torch.equal(s4d.head["video"].weight, new_head)
        assert "made new: head\n" in said
        assert said.endswith(f"the head of videos is dropped: its classes are {', '.join(theirs)}")


def test_a_head_that_the_model_lacks_is_dropped():
    only = S4D("tiny", CLASSES)
    assert "dropped: head\n" in initialise(only, described(S4D("tiny", CLASSES, CLASSES)), "a.pt")


# --------------------------------------------------------------------------------------- files that are no checkpoint

def odd_files(folder, whole):
    """Name and contents of files that must be refused."""
    good, half = torch.load(whole, weights_only=True), whole.read_bytes()
    wrong_bit = bytearray(half)
    with zipfile.ZipFile(whole) as archive:
        part = max(archive.infolist(), key=lambda part: part.file_size)
    wrong_bit[part.header_offset + part.file_size // 2] ^= 1
    for share in (0.0, 0.1, 0.5, 0.99):
        yield f"half{share}.pt", half[:int(share * len(half))]
    yield "bit.pt", bytes(wrong_bit)
    yield "rubbish.pt", b"no checkpoint"
    with zipfile.ZipFile(folder / "some.zip", "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")
    yield "zip.pt", (folder / "some.zip").read_bytes()
    patches = "patch_embed.proj.weight"
    for name, contents in dict(
            tensor=torch.zeros(3), number=3, list=[1], nothing={}, empty={"model": {}}, text={"model": "x"},
            name={"model": {1: torch.zeros(2)}}, texts={"model": {"a": "b"}},
            prefix={"model": {f"module.{patches}": torch.zeros(128)}},
            integers={"model": {patches: torch.arange(128)}},
            complex={"model": {patches: torch.zeros(128, dtype=torch.complex64)}},
            scalar={"model": {patches: torch.tensor(1.0)}},
            other={"model": {patches: torch.zeros(128), "head.weight": torch.zeros(400, 128)}},
            width={"model": {patches: torch.zeros(1280)}}, stage=good | {"stage": "third"},
            stages=good | {"stage": ["pretrain"]}, namespace={"model": {}, "args": argparse.Namespace(lr=1)}).items():
        torch.save(contents, folder / "written.pt")
        yield f"{name}.pt", (folder / "written.pt").read_bytes()


def test_odd_files_are_refused_by_name(tmp_path, stage1):
    for name, contents in odd_files(tmp_path, stage1):
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(UserError, match=name):
            read_checkpoint(tmp_path / name)
    (tmp_path / "folder.pt").mkdir()
    advice = ".*python tests/convert.py .*"
    for name, said in (("absent.pt", "there is no checkpoint .*absent.pt"), ("folder.pt", f"folder.pt{advice}"),
                       ("bit.pt", "bit.pt .*the checksum of its part"),
                       ("other.pt", f"head.weight{advice}other.pt OUT"),
                       ("namespace.pt", f"namespace.pt .*holds more than tensors{advice}")):
        with pytest.raises(UserError, match=said):
            read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("change", [
    dict(k=0), dict(k=9), dict(experts="8"), dict(adapter_width=-1), dict(moae_layers=[4]), dict(moae_layers=["1"]),
    dict(moae_layers=3), dict(expert="head"), dict(size="huge"), dict(size=[]), dict(colour=1), dict(image_classes=3),
    dict(image_classes=torch.zeros(2))])
def test_descriptions_that_make_no_model_are_refused(change):
    module = S4D("tiny", CLASSES)
    with pytest.raises(UserError, match="odd.pt describes no model"):
        rebuild(described(module, architecture=module.architecture | change), "odd.pt")


# ------------------------------------------------------------------------------------------------ writing whole files

def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "report.txt"
    with whole_file(path, "w", encoding="utf-8") as file:
        file.write("first\u2026")
        assert not path.exists()
    assert path.read_text("utf-8") == "first\u2026"
    with pytest.raises(KeyboardInterrupt), whole_file(path, "w") as file:
        file.write("second")
        raise KeyboardInterrupt
    assert path.read_text("utf-8") == "first\u2026" and os.listdir(tmp_path) == ["report.txt"]


def test_what_cannot_be_written_is_said_by_name(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path, said in ((tmp_path / "absent/a.pt", "No such file"), (tmp_path / "file/a.pt", "Not a directory"),
                       (tmp_path / "folder", "directory")):
        with pytest.raises(UserError, match=f"{path} cannot be written: .*{said}"), whole_file(path) as file:
            file.write(b"x")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


# ---------------------------------------------------------------------------- bare weights of S4D, VideoMAE, MAE-DFER

@pytest.mark.parametrize("below", ["model", None])
def test_a_released_classifier_gives_the_released_models_logits(tmp_path, below):
    """It has no adapter residual and learned noise, here with three image and four video classes."""
    source = random_weights(S4D("tiny", CLASSES, [*CLASSES, "cross"], residual=False)).float()
    state = dict(source.state_dict())
    torch.save({below: state} if below else state, tmp_path / "s4d.pt")
    loaded = load_checkpoint(tmp_path / "s4d.pt").double().eval().requires_grad_(False)
    assert loaded.architecture == source.architecture | {"image_classes": unnamed(3), "video_classes": unnamed(4)}
    loaded.positions = source.double().positions
    for name, x in (("image", batch("image")[:1]), ("video", batch("video", frames=4)[:1])):
        expected = linear(loaded.head[name], represent(loaded, x[0], residual=False))
        torch.testing.assert_close(loaded(x)[0], expected, rtol=1e-5, atol=1e-5)  # fp32 position table


@pytest.mark.parametrize("part", ["all", "encoder"])
def test_released_stage_1_files_start_stage_2(tmp_path, part):
    source = MaskedAutoencoder("tiny")
    state = {name: value for name, value in source.state_dict().items() if part in ("all", name.split(".")[0])}
    torch.save({"model": state, "epoch": 99}, tmp_path / "pre.pt")
    if part == "all":
        assert isinstance(load_checkpoint(tmp_path / "pre.pt"), MaskedAutoencoder)
    s4d = S4D("tiny", CLASSES, CLASSES)
    initialise(s4d, read_checkpoint(tmp_path / "pre.pt"), tmp_path / "pre.pt")
    assert torch.equal(s4d.blocks[2].attn.qkv.weight, source.encoder.blocks[2].attn.qkv.weight)


# ---------------------------------------------------------------------------------------- tables that need no data

def test_multiply_accumulates_equal_a_count_by_hand():
    def layers(tokens, width, depth):       # projections 4 d^2 and FFN 8 d^2 a token, and attention 2 N d a token
        return depth * tokens * (12 * width ** 2 + 2 * tokens * width)
    ours = (40 * 1536 * 768 + layers(40, 768, 12) + 40 * 768 * 384 + layers(800, 384, 4) + 760 * 384 * 1536)
    counted = model.multiply_accumulates(MaskedAutoencoder("base"), (1, 3, 16, 160, 160), 0.95)
    assert counted == pytest.approx(ours + 760 * 1536 * 768)    # which the released code embeds, and ours does not


def test_tables_4_and_5_as_printed(capsys):
    model.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-3:] for line in lines[1:5]] == [
        ["86.23", "/", "86.23"], ["86.24", "/", "86.24"], ["89.86", "/", "100.51"], ["114.65", "/", "284.65"]]
    assert [line.split()[-2:] for line in lines[6:]] == [
        ["8.8e4", "8.75e+04"], ["1.8e6", "1.74e+06"], ["1.4e6", "1.41e+06"]]
