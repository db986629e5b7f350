"""Every system that the paper compares, its tables that need no data, and the checkpoints that others release."""
import argparse
import json
import shlex

import pytest
import torch
from conftest import quick
from test_equations import batch, gate, gelu, linear, random_weights, represent

import data
import evaluate
import finetune
import model
import pretrain
from evaluate import observe
from model import CheckpointError, MaskedAutoencoder, Mlp, MoE, S4D, initialise, load_checkpoint, read_checkpoint

CLASSES = ["calm", "glad", "sad"]


# -------------------------------------------------------------------------- the README's table of the paper's systems

def readme_commands() -> list[str]:
    from readme import ROOT
    section = (ROOT / "README.md").read_text().split("## Every system of the paper")[1].split("\n## ")[0]
    return [cell for line in section.splitlines() for cell in line.split("`")
            if cell.startswith(("pretrain.py --", "finetune.py --"))]


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    path = tmp_path_factory.mktemp("stage1") / "last.pt"
    torch.manual_seed(0)
    module = MaskedAutoencoder("tiny")
    pretrain.write(path, dict(stage="pretrain", architecture=module.architecture, model=module.state_dict()))
    return path


@pytest.mark.parametrize("command", readme_commands())
def test_every_system_of_the_paper_trains(tmp_path, faces, stage1, command):
    """The README's command on synthetic faces and the tiny size, for two short epochs."""
    script, *arguments = shlex.split(command)
    replaced = {"dfew": "synthetic", "voxceleb2": "synthetic", "6,7,8,9,10,11": "2,3", "8,9,10,11": "3"}
    arguments = [replaced.get(argument, argument) for argument in arguments]
    if "--dataset" not in arguments:
        arguments += ["--dataset", "synthetic"]
    if "none" in arguments[arguments.index("--dataset") + 1]:
        arguments += ["--size", "tiny", "--image-dataset", "synthetic-images"]
    if script == "finetune.py" and "--pretrained none" not in command:
        arguments += ["--pretrained", stage1]
    module = {"pretrain.py": pretrain, "finetune.py": finetune}[script]
    quick(module, *arguments, "--data-root", faces, "--output", tmp_path, "--epochs", 2, "--workers", 0,
          "--batch-size", 16)
    first, record = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(first["losses"] + record["losses"]) >= 2 and all(loss is not None for loss in record["loss"].values())
    trained = load_checkpoint(tmp_path / "last.pt")
    if script == "finetune.py":
        assert bool(record["gates"]) == any(block.moe_layer is not None for block in trained.blocks)


def test_positions_of_table_8():
    expected = dict(none=[], early=[0, 1, 2, 3, 4, 5], middle=[3, 4, 5, 6, 7, 8], later=[6, 7, 8, 9, 10, 11],
                    alternate=[1, 3, 5, 7, 9, 11])
    assert {name: finetune.layers_with_experts(name, 12) for name in expected} == expected
    assert finetune.layers_with_experts("0,5", 12) == [0, 5]
    assert S4D("tiny", CLASSES, CLASSES, moae_layers=[3, 0, 3]).architecture["moae_layers"] == [0, 3]
    with pytest.raises(model.SettingError, match="last"):
        finetune.layers_with_experts("last", 12)


def test_vit_moe_is_equation_7_over_ffns_and_starts_as_the_pretrained_ffn(stage1):
    moe = random_weights(MoE(16, [Mlp(16, 64) for _ in range(4)], k=2))
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    for token, output in zip(x[0], moe(x)[0]):
        gates = gate(moe.router, 2, token)
        expected = sum(gates[i] * linear(e.fc2, gelu(linear(e.fc1, token))) for i, e in enumerate(moe.experts))
        torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-9)
    vit_moe = S4D("tiny", CLASSES, CLASSES, expert="ffn")
    initialise(vit_moe, read_checkpoint(stage1), stage1)
    ffn = torch.load(stage1, weights_only=True)["model"]["encoder.blocks.3.mlp.fc1.weight"]
    assert all(torch.equal(expert.fc1.weight, ffn) for expert in vit_moe.blocks[3].moe_layer.experts)


# ---------------------------------------------------------------------------------------- training the joint system

@pytest.mark.parametrize("settings", [{}, dict(expert="ffn"), dict(experts=32, k=1), dict(sigma=0.5)])
def test_every_parameter_has_a_gradient_path_in_every_batch(settings):
    """So DDP finds all gradients without find_unused_parameters, also of experts and heads that a batch leaves out."""
    joint = finetune.JointLoss(S4D("tiny", CLASSES, CLASSES, **settings)).train()
    for x in (torch.randint(256, (2, 3, 48, 48), dtype=torch.uint8),
              torch.randint(256, (2, 4, 3, 48, 48), dtype=torch.uint8)):
        joint.zero_grad(set_to_none=True)
        joint(x, torch.tensor([0, 1])).backward()
        assert [name for name, p in joint.named_parameters() if p.grad is None] == []


def test_gate_statistics_and_balancing_loss_equal_plain_counts():
    torch.manual_seed(0)
    s4d = S4D("tiny", CLASSES, CLASSES, experts=4, k=2, moae_layers=[3], sigma=0.0).train()
    router, seen = s4d.blocks[3].moe_layer.router, {}
    router.register_forward_hook(lambda module, inputs, gates: seen.update(x=inputs[0], g=gates))
    x, labels = torch.randint(256, (2, 3, 48, 48), dtype=torch.uint8), torch.tensor([0, 1])
    joint = finetune.JointLoss(s4d, balance=0.5)
    added = joint(x, labels) - finetune.JointLoss(s4d)(x, labels)
    counts, probability = [0] * 4, [0.0] * 4
    for x, gates in zip(seen["x"].flatten(0, 1), seen["g"].flatten(0, 1)):
        for i in range(4):
            counts[i] += int(gates[i] > 0)
            probability[i] += router.topkroute_linear(x).softmax(-1)[i].item() / 72
    alone = pretrain.Run(0, 1, torch.device("cpu"), torch.float32)
    expected = 4 * sum(count / 144 * p for count, p in zip(counts, probability))
    assert added.item() == pytest.approx(0.5 * expected, rel=1e-4)
    summary = joint.gates.summary(alone)["image"][3]
    assert summary["share"] == pytest.approx([count / 144 for count in counts], abs=1e-4) and sum(counts) == 144
    assert summary["cv"] == pytest.approx(torch.tensor(counts).double().std(unbiased=False).item() / 36, abs=1e-4)
    assert joint.gates.summary(alone) == {}, "each epoch counts anew"


def test_evaluation_is_deterministic_and_the_batch_size_does_not_matter(faces):
    torch.manual_seed(0)
    s4d = S4D("tiny", data.AFFECTNET_7.classes, data.DFEW.classes)
    samples = data.load_samples("synthetic", faces, "test", 1)
    run = pretrain.Run(0, 1, torch.device("cpu"), torch.float32)
    one, two, single = (observe(s4d, data.TestData(samples, s4d.size), run, 0, batch).probabilities["video"]
                        for batch in (32, 32, 1))
    assert (one == two).all()
    assert (one.argmax(1) == single.argmax(1)).all() and abs(one - single).max() < 1e-5


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
    for source, tokens, ratio, measured in (("video", 800, 0.95, 12.48), ("video", 800, 0.90, 15.98),
                                            ("image", 100, 0.90, 1.770), ("image", 100, 0.75, 3.058)):
        masked = round(tokens * ratio)
        visible = tokens - masked
        ours = (visible * 1536 * 768 + layers(visible, 768, 12) + visible * 768 * 384 + layers(tokens, 384, 4)
                + masked * 384 * 1536) / 1e9
        everything = ours + masked * 1536 * 768 / 1e9
        counted = model.multiply_accumulates(source, ratio)
        assert counted == (pytest.approx(everything), pytest.approx(ours))
        assert counted[0] == pytest.approx(measured, rel=0.006), "what the released code measures"


# ---------------------------------------------------------------------------------- checkpoints of S4D, VideoMAE, ...

def released_classifier():
    """A fine-tuned model as released: no adapter residual, learned noise, three image and four video classes."""
    torch.manual_seed(1)
    return random_weights(S4D("tiny", CLASSES, [*CLASSES, "cross"], residual=False)).float()


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "backbone.", "encoder.", "_orig_mod.module."])
def test_a_released_classifier_gives_the_released_models_logits(tmp_path, prefix):
    source = released_classifier()
    torch.save({"model": {prefix + key: value for key, value in source.state_dict().items()}}, tmp_path / "s4d.pt")
    loaded = load_checkpoint(tmp_path / "s4d.pt").double().eval()
    assert loaded.architecture["residual"] is False and loaded.architecture["moae_layers"] == [2, 3]
    if prefix:
        return
    loaded.positions = source.double().positions
    for kind in ("image", "video"):
        x = batch(kind)
        expected = [linear(loaded.head[kind], represent(loaded, sample, residual=False)) for sample in x]
        torch.testing.assert_close(loaded(x), torch.stack(expected), rtol=1e-5, atol=1e-5)  # fp32 position table


def test_a_released_classifier_is_evaluated_in_the_catalogues_label_order(tmp_path, faces, capsys):
    torch.save({"model": S4D("tiny", range(7), range(7), residual=False).state_dict()}, tmp_path / "s4d.pt")
    arguments = ["--checkpoint", tmp_path / "s4d.pt", "--data-root", faces, "--workers", 0]
    quick(evaluate, *arguments, "--dataset", "synthetic")
    assert "synthetic, fold 1: 7 test samples" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="give --dataset"):
        quick(evaluate, *arguments)


def test_a_fine_tuned_file_does_not_start_a_model_of_another_function(tmp_path):
    torch.save({"model": released_classifier().state_dict()}, tmp_path / "s4d.pt")
    with pytest.raises(CheckpointError, match="residual = False"):
        initialise(S4D("tiny", CLASSES, [*CLASSES, "cross"]), read_checkpoint(tmp_path / "s4d.pt"), "s4d.pt")
    fitting = S4D("tiny", CLASSES, [*CLASSES, "cross"], residual=False)
    initialise(fitting, read_checkpoint(tmp_path / "s4d.pt"), "s4d.pt")


def test_a_fine_tuned_file_starts_another_fine_tuning_without_a_flag(tmp_path, faces, capsys):
    """With the file's experts; its image head fits and its video head, of three classes, does not."""
    source = S4D("tiny", range(7), CLASSES, experts=4, residual=False, moae_layers=[3])
    torch.save({"model": source.state_dict()}, tmp_path / "s4d.pt")
    quick(finetune, "--dataset", "synthetic", "--data-root", faces, "--workers", 0, "--epochs", 1,
          "--pretrained", tmp_path / "s4d.pt", "--output", tmp_path / "run")
    architecture = torch.load(tmp_path / "run/last.pt", weights_only=True)["architecture"]
    assert architecture["experts"] == 4 and architecture["residual"] is False and architecture["moae_layers"] == [3]
    said = capsys.readouterr().out
    assert "made new: head\n" in said and "experts as in that file" in said


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_released_stage_1_files_start_stage_2(tmp_path, prefix):
    source = MaskedAutoencoder("tiny")
    torch.save({"model": {prefix + key: value for key, value in source.state_dict().items()}, "epoch": 99},
               tmp_path / "pre.pt")
    assert isinstance(load_checkpoint(tmp_path / "pre.pt"), MaskedAutoencoder)
    s4d = S4D("tiny", CLASSES, CLASSES)
    initialise(s4d, read_checkpoint(tmp_path / "pre.pt"), tmp_path / "pre.pt")
    assert torch.equal(s4d.blocks[2].attn.qkv.weight, source.encoder.blocks[2].attn.qkv.weight)


def test_an_encoder_alone_starts_stage_2(tmp_path):
    source = MaskedAutoencoder("tiny").encoder
    torch.save({"model": {f"encoder.{key}": value for key, value in source.state_dict().items()}}, tmp_path / "vit.pt")
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
        with pytest.raises(CheckpointError, match=said):
            load_checkpoint(tmp_path / f"{name}.pt")


def test_a_pickled_namespace_is_refused_with_the_way_to_convert_it(tmp_path):
    torch.save({"model": {}, "args": argparse.Namespace(lr=1)}, tmp_path / "old.pt")
    with pytest.raises(CheckpointError, match="convert it once"):
        load_checkpoint(tmp_path / "old.pt")


def test_export_writes_the_released_names(tmp_path, stage1):
    quick(model, "--export", stage1, tmp_path / "export.pt")
    exported = torch.load(tmp_path / "export.pt", weights_only=True)
    assert exported.keys() == {"model"}
    assert exported["model"]["encoder.patch_embed.proj.weight"].shape == (128, 3, 2, 8, 8)
    assert exported["model"]["encoder.blocks.0.attn.qkv.weight"].shape == (384, 128)
    assert {"mask_token", "encoder_to_decoder.weight", "decoder.head.weight"} < exported["model"].keys()
