"""tests/convert.py: what others write becomes ours, and what ours becomes computes the same when it is read again."""
import argparse
import json
import os
import runpy
import struct
import sys

import convert
import pytest
import torch
from conftest import run_here
from test_checkpoints import CLASSES, described
from test_equations import batch, masked, random_weights

from model import MaskedAutoencoder, S4D, UserError, initialise, load_checkpoint, read_checkpoint, sincos_table


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def converted(folder, contents, *options, name="in.pt", said=""):
    """Save contents, convert that file by the command, and return what the result holds."""
    torch.save(contents, folder / name)
    assert said in run_here(folder, "tests/convert.py", name, "out.pt", *options)
    return read_checkpoint(folder / "out.pt")


def refused(folder, contents, said, *options):
    torch.save(contents, folder / "in.pt")
    with pytest.raises(UserError, match=f"in.pt .*{said}"):
        convert.convert(folder / "in.pt", folder / "out.pt", *options)
    assert not (folder / "out.pt").exists()


def assert_same_encoder(checkpoint, source):
    s4d = S4D("tiny", CLASSES)
    initialise(s4d, checkpoint, "out.pt")
    for name, value in source.state_dict().items():
        assert name.startswith(("norm.", "head.")) or torch.equal(s4d.state_dict()[name], value)


# ---------------------------------------------------------------------------------------------- ours, out and in again

@pytest.mark.parametrize("middle", ["out.pt", "out.safetensors"])
@pytest.mark.parametrize("settings", [      # of stage 2; None: stage 1
    {}, dict(residual=False), dict(k=3, sigma=0.5, experts=5), dict(expert="ffn", k=1, moae_layers=[0, 2]), None])
def test_out_and_in_again_is_the_same_function_to_the_last_bit(tmp_path, monkeypatch, settings, middle):
    names = [*CLASSES, "g\u00eane, \u56f0\u60d1"]
    source = MaskedAutoencoder("tiny") if settings is None else S4D("tiny", CLASSES, names, **settings)
    random_weights(source).float()
    more = dict(identity={"video stride": 4, "dataset": "dfew", "crop": None}, made_by={"precision": "bf16"})
    torch.save(described(source, optimizer={"lr": 1}, **more), tmp_path / "last.pt")
    said = run_here(tmp_path, "tests/convert.py", "last.pt", middle)
    run_here(tmp_path, "tests/convert.py", middle, "again.pt")
    again, loaded = read_checkpoint(tmp_path / "again.pt"), load_checkpoint(tmp_path / "again.pt").eval()
    assert again.keys() == {"stage", "architecture", "model", "identity", "made_by"}
    assert loaded.architecture == source.architecture and {name: again[name] for name in more} == more
    for m in ("image", "video"):
        x = batch(m).float()
        hidden = torch.arange(36 if m == "image" else 72).expand(2, -1) < 30
        if settings is None:
            assert torch.equal(*(masked(monkeypatch, model, x, hidden)[1] for model in (loaded, source)))
        else:
            assert torch.equal(loaded(x), source(x))
    if middle.endswith("safetensors"):      # torch may read them as bare weights, without their settings
        with pytest.raises(UserError, match="out.safetensors .*python tests/convert.py"):
            read_checkpoint(tmp_path / middle)
    for name in {"residual", "k", "sigma", "expert"}.intersection(settings or ()):
        told = f"another code must be told: {name} = {settings[name]} "
        assert (told in said) == (name != "residual"), "the released code has no residual either"
    assert settings != {} or "another code must be told: residual = True" in said
    if middle == "out.pt":
        released_names = torch.load(tmp_path / middle, weights_only=True)["model"].keys()
        assert released_names == source.state_dict().keys()


def test_a_terminal_that_is_closed_is_no_error(tmp_path, monkeypatch):
    torch.save(described(MaskedAutoencoder("tiny")), tmp_path / "last.pt")
    monkeypatch.setattr(sys, "argv", ["convert.py", str(tmp_path / "last.pt"), str(tmp_path / "out.pt")])
    monkeypatch.setattr(sys, "stdout", None)
    runpy.run_path(convert.__file__, run_name="__main__")
    assert read_checkpoint(tmp_path / "out.pt")["stage"] == "pretrain"


def test_the_input_is_never_written_over(tmp_path):
    source, path = described(S4D("tiny", CLASSES)), tmp_path / "last.pt"
    torch.save(source, path)
    before = path.read_bytes()
    os.link(path, tmp_path / "hard.pt")
    for same in ("last.pt", "./last.pt", "hard.pt"):
        assert "the file to convert itself" in run_here(tmp_path, "tests/convert.py", "last.pt", same, status=1)
    assert "no checkpoint lost.pt" in run_here(tmp_path, "tests/convert.py", "lost.pt", "out.pt", status=1)
    assert path.read_bytes() == before and not (tmp_path / "out.pt").exists()


# ------------------------------------------------------------------------------------------- weights below any key

@pytest.mark.parametrize("key", ["state_dict", "module", "model_ema", "checkpoint.model.net", "epoch.0"])
@pytest.mark.parametrize("stage", [1, 2])
def test_weights_are_found_wherever_they_lie(tmp_path, key, stage):
    """What is no weight is left out and named: counters, the optimizer's, the loss's."""
    source = MaskedAutoencoder("tiny") if stage == 1 else S4D("tiny", CLASSES, CLASSES, residual=False)
    counters = {"norm1.num_batches_tracked": torch.tensor(3), "relative_position_index": torch.ones(4).long()}
    contents = source.state_dict() | counters
    for part in reversed(key.split(".")):
        contents = {part: contents}
    contents |= {"stage": 2, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "loss": torch.tensor(0.5)}
    torch.save(contents, tmp_path / "in.pt")
    said = run_here(tmp_path, "tests/convert.py", "in.pt", "out.pt")
    for name in ("norm1.num_batches_tracked", "relative_position_index", "optimizer.state.*.exp_avg", "loss"):
        assert name in said
    loaded = load_checkpoint(tmp_path / "out.pt").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in source.state_dict().items())


def test_of_several_models_one_is_chosen(tmp_path):
    one, two = MaskedAutoencoder("tiny"), MaskedAutoencoder("tiny")
    contents = {"student": one.state_dict(), "teacher": two.state_dict()}
    refused(tmp_path, contents, "several models, give --key with one of: student., teacher.")
    assert_same_encoder(converted(tmp_path, contents, "--key", "teacher."), two.encoder)


def test_a_classifier_of_another_task_gives_its_encoder(tmp_path):
    """And its last norm; VideoMAE's own files of Kinetics-400, whose table of positions is ours."""
    source = S4D("tiny", (), CLASSES, moae_layers=[])
    state = {name: value for name, value in source.state_dict().items() if not name.startswith("head.")}
    state |= {"head.weight": torch.randn(400, 128), "head.bias": torch.zeros(400)}
    checkpoint = converted(tmp_path, {"module": state | {"pos_embed": sincos_table(1568, 128)[None].half()}},
                           said="the head of its own task is left out")
    assert checkpoint["stage"] == "pretrain" and "fc_norm.weight" in checkpoint["model"]
    assert_same_encoder(checkpoint, source)


def test_weights_that_ours_have_no_place_for_are_refused(tmp_path):
    state = {f"encoder.{name}": value for name, value in MaskedAutoencoder("tiny").encoder.state_dict().items()}
    for more, said in (({"encoder.blocks.0.gamma_1": torch.ones(128)}, "Unexpected.*gamma_1"),
                       ({"cls_token": torch.zeros(1, 1, 128)}, r"no place for: model.cls_token \(1, 1, 128\)"),
                       ({"encoder.pos_embed": torch.randn(1, 144, 128)}, "no place for: model.encoder.pos_embed"),
                       ({"encoder.patch_embed.proj.weight": torch.zeros(1280, 3, 4, 8, 8)}, "another width"),
                       ({"encoder.blocks.1.norm1.bias": torch.full((128,), torch.inf)}, "norm1.bias is not finite")):
        refused(tmp_path, {"model": state | more}, said)
    refused(tmp_path, {"model": {"a.weight": torch.zeros(3)}}, "holds no weights of S4D or VideoMAE")
    refused(tmp_path, {"model": state}, "no name in it begins with 'ema.'", "ema.")
    with pytest.raises(UserError, match="model.safetensors, .*pytorch_model.bin is there"):
        convert.convert(tmp_path, tmp_path / "out.pt")


def test_objects_are_read_only_where_the_file_is_trusted(tmp_path):
    source = MaskedAutoencoder("tiny")
    for contents in ({"model": source.state_dict(), "args": argparse.Namespace(lr=1)}, {"net": source}):
        refused(tmp_path, contents, "--trust reads objects, which runs whatever code the file brings")
        assert_same_encoder(converted(tmp_path, contents, "--trust"), source.encoder)
        (tmp_path / "out.pt").unlink()
    (tmp_path / "in.pt").write_bytes(b"no checkpoint")
    for trust in (False, True):
        with pytest.raises(UserError, match="in.pt"):
            convert.convert(tmp_path / "in.pt", tmp_path / "out.pt", trust=trust)


# ---------------------------------------------------------------------------------------------- transformers' VideoMAE

THEIRS = {"encoder.blocks.": "videomae.encoder.layer.", "decoder.blocks.": "decoder.decoder_layers.",
          "encoder.patch_embed.proj": "videomae.embeddings.patch_embeddings.projection",
          "encoder.norm.": "videomae.layernorm.", ".norm1.": ".layernorm_before.", ".norm2.": ".layernorm_after.",
          ".mlp.fc1.": ".intermediate.dense.", ".mlp.fc2.": ".output.dense.", ".attn.proj.": ".attention.output.dense.",
          ".attn.": ".attention.attention."}


def transformers_names(state, **biases):
    """A state of ours under the names of transformers' VideoMAE. biases: what those of queries and values are called,
    which differs between versions."""
    theirs = {}
    for name, value in state.items():
        for ours, other in THEIRS.items():
            name = name.replace(ours, other)
        stem, _, part = name.rpartition(".attention.attention.")
        if part == "qkv.weight":
            for rows, which in zip(value.chunk(3), ("query", "key", "value")):
                theirs[f"{stem}.attention.attention.{which}.weight"] = rows
        else:
            theirs[name.replace(part, biases.get(part, part))] = value
    return theirs


@pytest.mark.parametrize("biases", [{}, dict(q_bias="query.bias", v_bias="value.bias")])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", ["pretrain", "finetune", "encoder"])
def test_transformers_videomae_as_a_folder(tmp_path, kind, name, biases):
    """Biases on keys, which the softmax takes out, and a table of positions at 224 pixels do not matter."""
    source = random_weights(MaskedAutoencoder("tiny")).float()
    state = transformers_names(source.state_dict(), **biases)
    if kind != "pretrain":
        state = {key: value for key, value in state.items() if key.startswith("videomae.")}
    if kind == "finetune":
        state |= {"classifier.weight": torch.zeros(400, 128), "classifier.bias": torch.zeros(400)}
    state |= {"videomae.embeddings.position_embeddings": sincos_table(1568, 128)[None],
              "videomae.encoder.layer.0.attention.attention.key.bias": torch.ones(128)}
    if kind == "encoder":
        state = {key.removeprefix("videomae."): value for key, value in state.items()}
    write = torch.save if name.endswith("bin") else lambda state, file: convert.write_safetensors(file, state, {})
    with open(tmp_path / name, "wb") as file:
        write(state, file)
    said = run_here(tmp_path, "tests/convert.py", tmp_path, "out.pt")
    assert ("the head of its own task is left out" in said) == (kind == "finetune")
    assert_same_encoder(read_checkpoint(tmp_path / "out.pt"), source.encoder)
    if kind == "pretrain":
        loaded = load_checkpoint(tmp_path / "out.pt").state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in source.state_dict().items())


def test_half_a_layers_queries_keys_and_values_are_refused(tmp_path):
    state = transformers_names(MaskedAutoencoder("tiny").state_dict())
    for part in ("query", "key", "value"):
        lost = f"videomae.encoder.layer.2.attention.attention.{part}.weight"
        refused(tmp_path, {key: value for key, value in state.items() if key != lost}, "qkv")


@pytest.mark.parametrize("modality, frames", [("image", 4), ("video", 16)])
def test_transformers_own_models_give_the_same_outputs(tmp_path, monkeypatch, modality, frames):
    """Images are clips of equal frames to it. Its norms' epsilons are 1e-12 and 1e-5, ours 1e-6."""
    transformers = pytest.importorskip("transformers")
    config = transformers.VideoMAEConfig(
        image_size=48, patch_size=8, num_frames=frames, tubelet_size=4, hidden_size=128, num_hidden_layers=4,
        num_attention_heads=2, intermediate_size=512, decoder_hidden_size=64, decoder_num_hidden_layers=2,
        decoder_num_attention_heads=1, decoder_intermediate_size=256, use_mean_pooling=False)
    theirs, x = random_weights(transformers.VideoMAEForPreTraining(config)).float(), batch(modality, frames).float()
    theirs.save_pretrained(tmp_path)
    convert.convert(tmp_path, tmp_path / "out.pt")
    clip = x[:, :, None].expand(-1, -1, 4, -1, -1) if modality == "image" else x
    hidden = torch.stack([torch.randperm(clip.shape[2] // 4 * 36) < 30 for _ in x])
    with torch.no_grad():
        expected = theirs(clip.transpose(1, 2), bool_masked_pos=hidden).logits
        _, pred, _ = masked(monkeypatch, load_checkpoint(tmp_path / "out.pt").eval(), x, hidden)
    assert (pred - expected).norm() < 1e-5 * pred.norm()


# ------------------------------------------------------------------------------------------------------- safetensors

def test_safetensors_are_read_and_odd_ones_refused(tmp_path):
    path, values = tmp_path / "a.safetensors", torch.tensor([[1.5, -2.0, 0.25]])
    for dtype in convert.DTYPES.values():
        with open(path, "wb") as file:
            convert.write_safetensors(file, {"a": values.to(dtype), "b.c": values.T.to(dtype)}, {"note": "x"})
        state, metadata = convert.read_safetensors(path)
        assert torch.equal(state["a"], values.to(dtype)) and torch.equal(state["b.c"], values.T.to(dtype))
        assert metadata == {"note": "x"}
    header = {"patch_embed.proj.weight": dict(dtype="F32", shape=[128, 2], data_offsets=[0, 1024])}
    whole = safetensors_of(header)
    odd = [whole[:int(share * len(whole))] for share in (0, 0.01, 0.1, 0.5, 0.999)] + [whole + b"more"]
    odd += [struct.pack("<Q", 2 ** 63) + whole[8:], struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 7) + b'{"a":1}']
    for change in (dict(dtype="I4"), dict(shape=[128, 3]), dict(shape=["x"]), dict(data_offsets=[0]),
                   dict(data_offsets=[0, 10 ** 12]), dict(data_offsets=["a", "b"]), dict(data_offsets=[8, 0])):
        odd.append(safetensors_of({"patch_embed.proj.weight": header["patch_embed.proj.weight"] | change}))
    for contents in odd:
        path.write_bytes(contents)
        with pytest.raises(UserError, match="a.safetensors"):
            convert.convert(path, tmp_path / "out.pt")


def safetensors_of(header):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(1024)
