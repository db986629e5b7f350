"""Checkpoints: what is refused and in which words, and the files that others release: S4D's, VideoMAE's and MAE-DFER's
own and transformers' VideoMAE. Then Tables IV and V, which need no data."""
import argparse
import json
import math
import os
import struct
import zipfile

import pytest
import torch
from conftest import quick
from test_equations import batch, linear, random_weights, represent

import model
from model import (SIZES, MaskedAutoencoder, S4D, UserError, initialise, load_checkpoint, load_weights, read_checkpoint,
                   rebuild, whole_file)

CLASSES = ["calm", "glad", "sad"]


def save(path, module, stage, **changes):
    torch.save(dict(stage=stage, architecture=module.architecture, model=module.state_dict() | changes), path)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    path = tmp_path_factory.mktemp("stage1") / "last.pt"
    save(path, MaskedAutoencoder("tiny"), "pretrain")
    return path


# ----------------------------------------------------------------------------------- what may be missing from a file

def test_stage_2_takes_the_encoder_and_says_what_is_new(stage1):
    state, s4d = torch.load(stage1, weights_only=True)["model"], S4D("tiny", CLASSES, CLASSES)
    said = initialise(s4d, read_checkpoint(stage1), stage1)
    assert torch.equal(s4d.blocks[3].mlp.fc1.weight, state["encoder.blocks.3.mlp.fc1.weight"])
    assert torch.equal(s4d.patch_embed.proj.weight, state["encoder.patch_embed.proj.weight"])
    assert "made new: blocks.*.moe_layer, fc_norm, head\n" in said
    assert said.endswith("dropped: decoder, encoder_to_decoder, mask_token, norm")


def test_vit_moe_starts_as_the_pretrained_ffn(stage1):
    vit_moe = S4D("tiny", CLASSES, CLASSES, expert="ffn")
    initialise(vit_moe, read_checkpoint(stage1), stage1)
    ffn = torch.load(stage1, weights_only=True)["model"]["encoder.blocks.3.mlp.fc1.weight"]
    assert all(torch.equal(expert.fc1.weight, ffn) for expert in vit_moe.blocks[3].moe_layer.experts)


def test_weights_that_no_stage_makes_or_drops_are_errors(tmp_path):
    module = MaskedAutoencoder("tiny")
    state, path = module.state_dict(), tmp_path / "1.pt"
    lost = {name: value for name, value in state.items() if name != "encoder.blocks.1.norm1.weight"}
    infinite = state["encoder.blocks.2.attn.q_bias"].clone()
    infinite[5] = math.nan
    for broken, named in ((lost, "missing: .*blocks.1.norm1.weight"),
                          (state | {"encoder.extra": torch.zeros(1)}, "not expected: .*extra"),
                          (state | {"encoder.patch_embed.proj.weight": torch.zeros(128, 3, 4, 16, 16)}, "16, 16.*8, 8"),
                          (state | {"encoder.blocks.2.attn.q_bias": infinite}, "not finite: .*blocks.2.attn.q_bias")):
        torch.save(dict(stage="pretrain", architecture=module.architecture, model=broken), path)
        for use in (load_checkpoint, lambda path: initialise(S4D("tiny", CLASSES), read_checkpoint(path), path)):
            with pytest.raises(UserError, match=f"1.pt .*{named}"):
                use(path)


def test_nothing_is_half_loaded():
    s4d = S4D("tiny", CLASSES, CLASSES)
    before = s4d.fc_norm.weight.clone()
    for state in ({"fc_norm.weight": before + 1},
                  s4d.state_dict() | {"fc_norm.weight": before + 1, "head.video.bias": torch.full((3,), math.inf)}):
        with pytest.raises(UserError, match="partial.pt"):
            load_weights(s4d, state, "partial.pt")
        assert torch.equal(s4d.fc_norm.weight, before)


def test_positions_with_experts_are_sorted_and_kept():
    assert S4D("tiny", CLASSES, CLASSES, moae_layers=[3, 0, 3]).architecture["moae_layers"] == [0, 3]


# ----------------------------------------------------------------------------------------- files that are no checkpoint

def odd_files(folder, whole):
    """Name and contents or writer of files that must be refused."""
    good, half = torch.load(whole, weights_only=True), whole.read_bytes()
    wrong_bit = bytearray(half)
    with zipfile.ZipFile(whole) as archive:
        part = max(archive.infolist(), key=lambda part: part.file_size)
    wrong_bit[part.header_offset + part.file_size // 2] ^= 1
    for share in (0.0, 0.1, 0.5, 0.99):
        yield f"half{share}.pt", half[:int(share * len(half))]
    yield "bit.pt", bytes(wrong_bit)
    yield "rubbish.pt", b"no checkpoint"
    yield "zip.pt", zip_of(folder / "some.zip")
    for name, contents in dict(
            tensor=torch.zeros(3), number=3, list=[1], nothing={}, empty={"model": {}}, text={"model": "x"},
            name={"model": {1: torch.zeros(2)}}, texts={"model": {"a": "b"}},
            sparse={"model": {"patch_embed.proj.weight": torch.eye(3).to_sparse()}},
            complex={"model": {"patch_embed.proj.weight": torch.zeros(128, dtype=torch.complex64)}},
            scalar={"model": {"patch_embed.proj.weight": torch.tensor(1.0)}},
            stage=good | {"stage": "third"}, stages=good | {"stage": ["pretrain"]}, settings=good | {"identity": [1]},
            description=good | {"architecture": None}, namespace={"model": {}, "args": argparse.Namespace(lr=1)},
            layer={"model": {"patch_embed.proj.weight": torch.zeros(128), "head.video.weight": torch.zeros(1),
                             "blocks.x.moe_layer.a": torch.zeros(1)}}).items():
        torch.save(contents, folder / "written.pt")
        yield f"{name}.pt", (folder / "written.pt").read_bytes()


def zip_of(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")
    return path.read_bytes()


@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_odd_files_are_refused_by_name(tmp_path, stage1):
    for name, contents in odd_files(tmp_path, stage1):
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(UserError, match=name):
            read_checkpoint(tmp_path / name)
    (tmp_path / "folder.pt").mkdir()
    for name, said in (("absent.pt", "there is no checkpoint .*absent.pt"), ("folder.pt", "folder.pt"),
                       ("bit.pt", "bit.pt .*the checksum of its part"),
                       ("namespace.pt", "namespace.pt .*convert it once")):
        with pytest.raises(UserError, match=said):
            read_checkpoint(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable to root")
def test_unreadable_files_are_refused_by_name(tmp_path, stage1):
    stage1.chmod(0)
    with pytest.raises(UserError, match=stage1.name):
        read_checkpoint(stage1)


@pytest.mark.parametrize("change", [
    dict(experts=10 ** 30), dict(experts=1025), dict(experts=0), dict(experts="8"), dict(adapter_width=10 ** 12),
    dict(k=-1), dict(k=9), dict(k=1.5), dict(experts=1024, adapter_width=65536), dict(experts=1024, expert="ffn"),
    dict(sigma=math.nan), dict(sigma=-1.0), dict(sigma="much"), dict(moae_layers=[4]), dict(moae_layers=["1"]),
    dict(moae_layers=3), dict(expert="head"), dict(size="huge"), dict(size=[]), dict(colour=1),
    dict(image_classes=3), dict(image_classes=torch.zeros(2)), dict(sigma=torch.zeros(2))])
def test_descriptions_that_make_no_model_are_refused(change):
    module = S4D("tiny", CLASSES)
    checkpoint = dict(stage="finetune", architecture=module.architecture | change, model=module.state_dict())
    with pytest.raises(UserError, match="odd.pt describes no model"):
        rebuild(checkpoint, "odd.pt")


# -------------------------------------------------------------------------------------------------- writing whole files

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


def test_export_writes_the_released_names_and_never_over_its_own_checkpoint(tmp_path, stage1, monkeypatch):
    quick(model, "--export", stage1, tmp_path / "export.pt")
    exported = torch.load(tmp_path / "export.pt", weights_only=True)
    assert exported.keys() == {"model"}
    assert exported["model"]["encoder.patch_embed.proj.weight"].shape == (128, 3, 4, 8, 8)
    assert exported["model"]["encoder.blocks.0.attn.qkv.weight"].shape == (384, 128)
    assert {"mask_token", "encoder_to_decoder.weight", "decoder.head.weight"} < exported["model"].keys()
    before = stage1.read_bytes()
    (tmp_path / "link.pt").symlink_to(stage1)
    os.link(stage1, tmp_path / "hard.pt")
    for same in (stage1, os.path.relpath(stage1), tmp_path / "link.pt", tmp_path / "hard.pt"):
        with pytest.raises(SystemExit, match="error: .* is the checkpoint itself"):
            quick(model, "--export", stage1, same)
    with pytest.raises(SystemExit, match="error: there is no checkpoint lost.pt"):
        quick(model, "--export", "lost.pt", "lost.pt")
    assert stage1.read_bytes() == before


# ------------------------------------------------------------------------------ bare weights of S4D, VideoMAE, MAE-DFER

def released_classifier():
    """A fine-tuned model as released: no adapter residual, learned noise, three image and four video classes."""
    torch.manual_seed(1)
    return random_weights(S4D("tiny", CLASSES, [*CLASSES, "cross"], residual=False)).float()


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "backbone.", "encoder.", "_orig_mod.module."])
def test_a_released_classifier_gives_the_released_models_logits(tmp_path, prefix):
    source = released_classifier()
    torch.save({"model": {prefix + name: value for name, value in source.state_dict().items()}}, tmp_path / "s4d.pt")
    loaded = load_checkpoint(tmp_path / "s4d.pt").double().eval().requires_grad_(False)
    assert loaded.architecture == source.architecture | {"image_classes": model.unnamed(3),
                                                         "video_classes": model.unnamed(4)}
    if prefix:
        return
    loaded.positions = source.double().positions
    for name in ("image", "video"):
        x = batch(name)
        expected = [linear(loaded.head[name], represent(loaded, sample, residual=False)) for sample in x]
        torch.testing.assert_close(loaded(x), torch.stack(expected), rtol=1e-5, atol=1e-5)  # fp32 position table


@pytest.mark.parametrize("settings", [dict(experts=1, k=1), dict(sigma=0.0, adapter_width=5), dict(moae_layers=[1])])
def test_a_released_files_experts_follow_from_its_names_and_shapes(tmp_path, settings):
    source = S4D("tiny", (), CLASSES, residual=False, **settings)
    torch.save({"model": source.state_dict()}, tmp_path / "s4d.pt")
    expected = source.architecture | {"video_classes": model.unnamed(3)}
    assert load_checkpoint(tmp_path / "s4d.pt").architecture == expected


def test_a_fine_tuned_file_does_not_start_a_model_of_another_function(tmp_path):
    torch.save({"model": released_classifier().state_dict()}, tmp_path / "s4d.pt")
    with pytest.raises(UserError, match="residual = False"):
        initialise(S4D("tiny", CLASSES, [*CLASSES, "cross"]), read_checkpoint(tmp_path / "s4d.pt"), "s4d.pt")
    fitting = S4D("tiny", CLASSES, [*CLASSES, "cross"], residual=False)
    said = initialise(fitting, read_checkpoint(tmp_path / "s4d.pt"), "s4d.pt")
    assert said.endswith("made new: nothing\ndropped: nothing")
    other = S4D("tiny", CLASSES, CLASSES, residual=False)
    assert "made new: head\n" in initialise(other, read_checkpoint(tmp_path / "s4d.pt"), "s4d.pt")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_released_stage_1_files_start_stage_2(tmp_path, prefix):
    source = MaskedAutoencoder("tiny")
    torch.save({"model": {prefix + name: value for name, value in source.state_dict().items()}, "epoch": 99},
               tmp_path / "pre.pt")
    assert isinstance(load_checkpoint(tmp_path / "pre.pt"), MaskedAutoencoder)
    s4d = S4D("tiny", CLASSES, CLASSES)
    initialise(s4d, read_checkpoint(tmp_path / "pre.pt"), tmp_path / "pre.pt")
    assert torch.equal(s4d.blocks[2].attn.qkv.weight, source.encoder.blocks[2].attn.qkv.weight)


def test_an_encoder_alone_starts_stage_2(tmp_path):
    source = MaskedAutoencoder("tiny").encoder
    state = {f"encoder.{name}": value for name, value in source.state_dict().items()}
    torch.save({"model": state}, tmp_path / "vit.pt")
    s4d = S4D("tiny", CLASSES, CLASSES)
    initialise(s4d, read_checkpoint(tmp_path / "vit.pt"), tmp_path / "vit.pt")
    assert torch.equal(s4d.blocks[2].attn.qkv.weight, source.blocks[2].attn.qkv.weight)


def test_released_files_that_do_not_fit_name_keys_and_shapes(tmp_path):
    state = MaskedAutoencoder("tiny").state_dict()
    wider = state | {"encoder.patch_embed.proj.weight": torch.zeros(128, 3, 2, 14, 14)}
    for name, broken, said in (("shape", wider, "14, 14.*8, 8"),
                               ("extra", state | {"decoder.more": torch.zeros(1)}, "more"),
                               ("none", {"layer.weight": torch.zeros(2)}, "patch_embed.proj.weight")):
        torch.save({"model": broken}, tmp_path / f"{name}.pt")
        with pytest.raises(UserError, match=said):
            load_checkpoint(tmp_path / f"{name}.pt")


# ---------------------------------------------------------------------------------------------- transformers' VideoMAE

def transformers_layers(prefix, count, width, hidden, query="q_bias", value="v_bias"):
    shapes = {}
    for name in (f"{prefix}.{i}" for i in range(count)):
        attention = f"{name}.attention.attention"
        shapes |= {f"{attention}.{part}.weight": (width, width) for part in ("query", "key", "value")}
        shapes |= {f"{attention}.{query}": (width,), f"{attention}.{value}": (width,)}
        for part, out, into in (("attention.output.dense", width, width), ("intermediate.dense", hidden, width),
                                ("output.dense", width, hidden)):
            shapes |= {f"{name}.{part}.weight": (out, into), f"{name}.{part}.bias": (out,)}
        for norm in ("layernorm_before", "layernorm_after"):
            shapes |= {f"{name}.{norm}.weight": (width,), f"{name}.{norm}.bias": (width,)}
    return shapes


def transformers_names(size, head, **biases):
    """What a file of transformers' VideoMAE holds, names and shapes: "pretrain", "finetune" of 5 classes, or the bare
    "encoder". biases: what those of queries and values are called, which differs between versions."""
    prefix = "" if head == "encoder" else "videomae."
    shapes = {f"{prefix}embeddings.patch_embeddings.projection.weight": (size.width, 3, size.tubelet, size.patch,
                                                                              size.patch),
              f"{prefix}embeddings.patch_embeddings.projection.bias": (size.width,)}
    shapes |= transformers_layers(f"{prefix}encoder.layer", size.depth, size.width, 4 * size.width, **biases)
    if head == "finetune":
        return shapes | {"fc_norm.weight": (size.width,), "fc_norm.bias": (size.width,),
                         "classifier.weight": (5, size.width), "classifier.bias": (5,)}
    shapes |= {f"{prefix}layernorm.weight": (size.width,), f"{prefix}layernorm.bias": (size.width,)}
    if head == "encoder":
        return shapes
    width, pixels = size.decoder_width, size.tubelet * size.patch ** 2 * 3
    return (shapes | transformers_layers("decoder.decoder_layers", size.decoder_depth, width, 4 * width, **biases)
            | {"encoder_to_decoder.weight": (width, size.width), "mask_token": (1, 1, width),
               "decoder.norm.weight": (width,), "decoder.norm.bias": (width,),
               "decoder.head.weight": (pixels, width), "decoder.head.bias": (pixels,)})


def write_safetensors(path, state, **changes):
    """As the format's description says. changes: of the header's entry of the first tensor."""
    names = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, value in state.items():
        values = value.flatten().clone().view(torch.uint8).numpy().tobytes()
        offsets, data = [len(data), len(data) + len(values)], data + values
        header[name] = dict(dtype=names[value.dtype], shape=list(value.shape), data_offsets=offsets)
    header[next(iter(state))] |= changes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


NEW_BIASES = dict(query="query.bias", value="value.bias")


@pytest.mark.parametrize("biases", [{}, NEW_BIASES])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("size, head", [("tiny", "pretrain"), ("tiny", "finetune"), ("tiny", "encoder")])
def test_files_of_transformers_videomae_have_our_names_and_shapes(tmp_path, size, head, name, biases):
    """As the file and as its folder; position tables of 224 pixels and biases on keys do not matter."""
    state = {key: torch.randn(shape) for key, shape in transformers_names(SIZES[size], head, **biases).items()}
    stem = "" if head == "encoder" else "videomae."
    extra = {f"{stem}embeddings.position_embeddings": torch.zeros(1, 1568, SIZES[size].width),
             f"{stem}encoder.layer.0.attention.attention.key.bias": torch.ones(SIZES[size].width)}
    write = write_safetensors if name.endswith("safetensors") else lambda path, state: torch.save(state, path)
    write(tmp_path / name, state | extra)
    (tmp_path / "config.json").touch()
    s4d = S4D(size, (), CLASSES, moae_layers=[], residual=False, sigma=0.0)
    for path in (tmp_path, tmp_path / name):
        if head != "encoder":
            loaded = load_checkpoint(path)
            own = loaded.encoder if head == "pretrain" else loaded
            assert isinstance(loaded, MaskedAutoencoder if head == "pretrain" else S4D)
            assert head == "pretrain" or loaded.architecture["video_classes"] == model.unnamed(5)
        initialise(s4d, read_checkpoint(path), path)
        for own in (s4d, own) if head != "encoder" else (s4d,):
            attention, layer = own.blocks[1].attn, f"{stem}encoder.layer.1."
            theirs = [state[f"{layer}attention.attention.{part}.weight"] for part in ("query", "key", "value")]
            assert torch.equal(attention.qkv.weight, torch.cat(theirs))
            assert torch.equal(attention.v_bias, state[f"{layer}attention.attention.{biases.get('value', 'v_bias')}"])
            assert torch.equal(own.blocks[1].mlp.fc2.weight, state[f"{layer}output.dense.weight"])
            assert torch.equal(own.blocks[1].norm2.bias, state[f"{layer}layernorm_after.bias"])


def test_files_of_transformers_videomae_of_other_sizes_are_refused_with_the_numbers(tmp_path):
    tiny, path = SIZES["tiny"], tmp_path / "model.safetensors"
    names = {name: torch.zeros(shape) for name, shape in transformers_names(tiny, "pretrain").items()}
    patches = "videomae.embeddings.patch_embeddings.projection.weight"
    for changes, said in (({patches: torch.zeros(128, 3, 4, 16, 16)}, r"patch_embed.*4, 16, 16\).*4, 8, 8\)"),
                          ({patches: torch.zeros(128, 3, 1, 8, 8)}, r"patch_embed.*3, 1, 8, 8\).*3, 4, 8, 8\)"),
                          ({patches: torch.zeros(1280, 3, 4, 8, 8)}, r"has \[128, 384, 768, 1024\] rows, here 1280"),
                          ({"encoder_to_decoder.weight": torch.zeros(32, 128)}, r"\(32, 128\).*\(64, 128\)"),
                          ({"videomae.encoder.layer.4.output.dense.bias": torch.zeros(128)}, "blocks.4.mlp.fc2.bias"),
                          ({"decoder.decoder_layers.2.output.dense.bias": torch.zeros(64)}, "decoder.blocks.2")):
        write_safetensors(path, names | changes)
        with pytest.raises(UserError, match=f"model.safetensors .*{said}"):
            load_checkpoint(path)
    for part in ("query", "value"):
        lost = f"videomae.encoder.layer.2.attention.attention.{part}.weight"
        write_safetensors(path, {name: value for name, value in names.items() if name != lost})
        with pytest.raises(UserError, match="model.safetensors .*qkv"):
            load_checkpoint(path)


def test_safetensors_are_read_and_odd_ones_refused(tmp_path):
    path, values = tmp_path / "a.safetensors", torch.tensor([[1.5, -2.0, 0.25]])
    for dtype in model.DTYPES.values():
        write_safetensors(path, {"a": values.to(dtype), "b.c": values.T.to(dtype)})
        state = model.read_safetensors(path)
        assert state["a"].dtype == dtype and torch.equal(state["a"].float(), values)
        assert torch.equal(state["b.c"].float(), values.T)
    state = {"patch_embed.proj.weight": torch.zeros(128, 2), "b": torch.zeros(7)}
    write_safetensors(path, state)
    whole = path.read_bytes()
    odd = [whole[:int(share * len(whole))] for share in (0, 0.01, 0.1, 0.5, 0.999)]
    odd += [struct.pack("<Q", 2 ** 63) + whole[8:], struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 7) + b'{"a":1}']
    for changes in (dict(dtype="I64"), dict(dtype="F8_E4M3"), dict(shape=[128, 3]), dict(shape=["x"]),
                    dict(data_offsets=[0]), dict(data_offsets=[0, 10 ** 12]), dict(data_offsets=["a", "b"]),
                    dict(data_offsets=[8, 0])):
        write_safetensors(path, state, **changes)
        odd.append(path.read_bytes())
    for contents in odd:
        path.write_bytes(contents)
        with pytest.raises(UserError, match="a.safetensors"):
            read_checkpoint(path)


def tiny_transformers(name, frames, **settings):
    transformers = pytest.importorskip("transformers")
    size = SIZES["tiny"]
    config = transformers.VideoMAEConfig(
        image_size=size.pixels, patch_size=size.patch, num_frames=frames, tubelet_size=size.tubelet,
        hidden_size=size.width, num_hidden_layers=size.depth, num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        decoder_hidden_size=size.decoder_width, decoder_num_hidden_layers=size.decoder_depth,
        decoder_num_attention_heads=size.decoder_heads, decoder_intermediate_size=4 * size.decoder_width, **settings)
    return random_weights(getattr(transformers, name)(config)).float()


@pytest.mark.parametrize("modality, frames", [("image", 4), ("video", 16)])
def test_transformers_own_models_give_the_same_outputs(tmp_path, modality, frames):
    """Images are clips of two equal frames to it. The epsilons differ: see model.released."""
    x = batch(modality, frames).float()
    clip = torch.stack([x, x], dim=2) if modality == "image" else x
    theirs = tiny_transformers("VideoMAEForPreTraining", frames, use_mean_pooling=False)
    theirs.save_pretrained(tmp_path)
    hidden = torch.stack([torch.randperm(clip.shape[2] // 2 * 36) < 30 for _ in x])
    with torch.no_grad():
        expected = theirs(clip.transpose(1, 2), bool_masked_pos=hidden)
        loss, pred, _ = load_checkpoint(tmp_path).eval()(x, hidden)
    assert (pred - expected.logits).norm() < 1e-5 * pred.norm()

    theirs = tiny_transformers("VideoMAEForVideoClassification", frames, num_labels=5)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = load_checkpoint(tmp_path / "pytorch_model.bin").eval()
    with torch.no_grad():
        expected, logits = theirs(clip.transpose(1, 2)).logits, loaded.head["video"](loaded.features(x))
    assert (logits - expected).norm() < 1e-5 * logits.norm()


# ------------------------------------------------------------------------------------------ tables that need no data

def test_parameters_of_table_5():
    for (name, paper, settings), expected in zip(model.TABLE_5, ((86.23, 86.23), (86.24, 86.24), (89.86, 100.51),
                                                                 (114.65, 284.65))):
        with torch.device("meta"):
            s4d = S4D("base", **(dict(image_classes=range(7), video_classes=range(7)) | settings))
        assert model.parameters(s4d) == (pytest.approx(expected[0], abs=0.01), pytest.approx(expected[1], abs=0.01))
        assert [round(value) for value in expected] == [int(value) for value in paper.split(" / ")], name


def test_multiply_accumulates_of_table_4_equal_a_count_by_hand():
    def layers(tokens, width, depth):       # projections 4 d^2 and FFN 8 d^2 a token, and attention 2 N d a token
        return depth * tokens * (12 * width ** 2 + 2 * tokens * width)
    for modality, tokens, ratio, measured in (("video", 800, 0.95, 12.48), ("video", 800, 0.90, 15.98),
                                              ("image", 100, 0.90, 1.770), ("image", 100, 0.75, 3.058)):
        hidden = round(tokens * ratio)
        visible = tokens - hidden
        ours = (visible * 1536 * 768 + layers(visible, 768, 12) + visible * 768 * 384 + layers(tokens, 384, 4)
                + hidden * 384 * 1536) / 1e9
        everything = ours + hidden * 1536 * 768 / 1e9
        counted = model.multiply_accumulates(modality, ratio)
        assert counted == (pytest.approx(everything), pytest.approx(ours))
        assert counted[0] == pytest.approx(measured, rel=0.006), "what the released code measures"
