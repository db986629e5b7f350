"""What may and may not be missing from a checkpoint, and the metrics against plain loops."""
import argparse

import numpy as np
import pytest
import torch

from data import DataError
from evaluate import confusion_matrix, metrics, table
from model import CheckpointError, MaskedAutoencoder, S4D, initialise, load_checkpoint, load_weights, read_checkpoint
from pretrain import Rate, decayed, write

CLASSES = ["calm", "glad", "sad"]


def save(path, module, stage, **changes):
    write(path, dict(stage=stage, architecture=module.architecture, model=module.state_dict() | changes))


def test_stage_2_takes_the_encoder_and_says_what_is_new(tmp_path):
    stage1 = MaskedAutoencoder("tiny")
    save(tmp_path / "1.pt", stage1, "pretrain")
    model = S4D("tiny", CLASSES, CLASSES)
    said = initialise(model, read_checkpoint(tmp_path / "1.pt"), tmp_path / "1.pt")
    assert torch.equal(model.blocks[3].mlp.fc1.weight, stage1.encoder.blocks[3].mlp.fc1.weight)
    assert torch.equal(model.patch_embed.proj.weight, stage1.encoder.patch_embed.proj.weight)
    assert "made new: blocks.*.moe_layer, fc_norm, head\n" in said
    assert said.endswith("dropped: decoder, encoder_to_decoder, mask_token, norm")


def test_keys_that_no_stage_makes_or_drops_are_errors(tmp_path):
    stage1 = MaskedAutoencoder("tiny")
    state = stage1.state_dict()
    lost = {key: value for key, value in state.items() if key != "encoder.blocks.1.norm1.weight"}
    for broken, named in ((lost, "blocks.1.norm1.weight"), (state | {"encoder.extra": torch.zeros(1)}, "extra"),
                          (state | {"encoder.patch_embed.proj.weight": torch.zeros(128, 3, 2, 16, 16)}, "16, 16")):
        write(tmp_path / "1.pt", dict(stage="pretrain", architecture=stage1.architecture, model=broken))
        with pytest.raises(CheckpointError, match=named):
            initialise(S4D("tiny", CLASSES, CLASSES), read_checkpoint(tmp_path / "1.pt"), tmp_path / "1.pt")
        with pytest.raises(CheckpointError, match=named):
            load_checkpoint(tmp_path / "1.pt")


def test_nothing_is_half_loaded(tmp_path):
    model = S4D("tiny", CLASSES, CLASSES)
    before = model.fc_norm.weight.clone()
    with pytest.raises(CheckpointError):
        load_weights(model, {"fc_norm.weight": before + 1}, "partial.pt")
    assert torch.equal(model.fc_norm.weight, before)


def test_files_with_code_or_rubbish_are_refused(tmp_path):
    torch.save({"args": argparse.Namespace(), "model": {}}, tmp_path / "pickled.pt")
    (tmp_path / "rubbish.pt").write_bytes(b"no checkpoint")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    for name in ("pickled.pt", "rubbish.pt", "empty.pt", "tensor.pt", "absent.pt"):
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(tmp_path / name)


def plain_metrics(labels, predictions, classes):
    recalls = []
    for c in range(classes):
        of_class = [p for label, p in zip(labels, predictions) if label == c]
        recalls.append(sum(p == c for p in of_class) / len(of_class) if of_class else None)
    present = [r for r in recalls if r is not None]
    return recalls, sum(present) / len(present), sum(p == y for p, y in zip(predictions, labels)) / len(labels)


def test_metrics_equal_plain_loops():
    rng = np.random.default_rng(0)
    for classes, n in ((7, 200), (11, 60), (3, 1), (2, 5)):
        labels, predictions = rng.integers(classes, size=n), rng.integers(classes, size=n)
        recall, uar, war = plain_metrics(labels, predictions, classes)
        scores = metrics(confusion_matrix(labels, predictions, classes))
        assert scores["recall"] == recall
        assert (scores["uar"], scores["war"]) == (pytest.approx(uar), pytest.approx(war))


def test_absent_and_never_predicted_classes_are_pointed_out():
    scores = metrics(confusion_matrix(np.array([0, 0, 1]), np.array([0, 1, 1]), 3))
    assert scores["recall"] == [0.5, 1.0, None] and scores["uar"] == 0.75
    assert scores["majority_war"] == pytest.approx(2 / 3) and scores["majority_uar"] == 0.5
    assert "never predicted: sad" in table(scores, CLASSES)
    with pytest.raises(DataError, match="no samples"):
        metrics(np.zeros((3, 3), int))


def test_learning_rate_rises_in_a_line_and_falls_in_a_cosine():
    rate = Rate(peak=1.0, warmup=10, steps=110, first=0.1, end=0.2)
    assert [rate(step) for step in (0, 5, 10)] == pytest.approx([0.1, 0.55, 1.0])
    assert rate(60) == pytest.approx(0.6) and rate(110) == pytest.approx(0.2)
    assert all(rate(step) > rate(step + 1) for step in range(10, 109))
    assert Rate(1.0, 0, 10, 0.1, 0.0)(0) == 1.0, "no warm-up"


def test_vectors_have_no_weight_decay_and_layers_their_own_learning_rate():
    from finetune import layer_of
    model = S4D("tiny", CLASSES, CLASSES)
    depth = model.size.depth
    groups = decayed(model.named_parameters(), 0.05, lambda name: 0.75 ** (depth + 1 - layer_of(name, depth)))
    of = {id(p): group for group in groups for p in group["params"]}
    assert len(of) == len(list(model.parameters()))
    assert of[id(model.patch_embed.proj.weight)]["scale"] == pytest.approx(0.75 ** 5)
    assert of[id(model.blocks[3].moe_layer.experts[0].fc1.weight)]["scale"] == pytest.approx(0.75)
    assert of[id(model.head["image"].weight)]["scale"] == of[id(model.fc_norm.weight)]["scale"] == 1
    for name, parameter in model.named_parameters():
        vector = name.endswith("bias") or "norm" in name
        assert of[id(parameter)]["weight_decay"] == (0.0 if vector else 0.05), name
