"""What trains: every parameter in every batch, mixed batches, where the experts are, the learning rates, and that
testing is deterministic."""
import json

import numpy as np
import pytest
import torch
from conftest import quick, run_here

import data
import finetune
import pretrain
from evaluate import observe
from model import S4D, MaskedAutoencoder, UserError
from pretrain import Process, Rate

CLASSES = ["calm", "glad", "sad"]
ALONE = Process(0, 1, torch.device("cpu"), "fp32")


@pytest.mark.parametrize("settings", [{}, dict(expert="ffn"), dict(experts=32, k=1), dict(sigma=0.5)])
def test_every_parameter_has_a_gradient_path_in_every_batch(settings):
    """So DDP finds all gradients without find_unused_parameters, also of experts and heads that a batch leaves out."""
    joint = finetune.JointLoss(S4D("tiny", CLASSES, CLASSES, **settings)).train()
    for x in (torch.randn(2, 3, 48, 48), torch.randn(2, 3, 4, 48, 48)):
        joint.zero_grad(set_to_none=True)
        joint(x, torch.tensor([0, 1])).backward()
        assert [name for name, p in joint.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("shape", [(4, 3, 48, 48), (4, 16, 3, 48, 48)])
def test_mixed_batches_have_mixed_labels(monkeypatch, shape):
    """Mixup or CutMix of a whole batch, one of the two each time, the same for all frames of a clip."""
    objective = finetune.JointLoss(S4D("tiny", CLASSES, CLASSES), mixing=1.0)
    inputs, kinds = [], set()
    monkeypatch.setattr(objective.model, "forward", lambda x: inputs.append(x) or torch.zeros(len(x), 3))
    monkeypatch.setattr(finetune.F, "cross_entropy", lambda logits, labels, **_: inputs.append(labels) or logits.sum())
    x = data.to_float(torch.stack([torch.full(shape[1:], 60 * i, dtype=torch.uint8) for i in range(4)]))
    torch.manual_seed(0)
    for _ in range(20):
        objective(x, torch.tensor([0, 1, 2, 2]))
        mixed, labels = inputs[-2:]
        assert mixed.ndim == len(shape) and torch.allclose(labels.sum(1), torch.ones(4)) and labels.shape == (4, 3)
        first = mixed[1, 0]                     # the red of sample 1: (H, W), or (T, H, W)
        assert len(shape) == 4 or (first == first[:1]).all()
        plain = x[1, 0].unique()
        kinds.add("mixup" if first.unique().numel() == 1 and plain not in first.unique() else "cutmix")
        share = labels[1, 1].item()             # of its own class: as large as its share of the pixels
        other = x[0, 0].unique()                # what RandomChoice rolls onto sample 1
        own = ((first - other) / (plain - other)).mean().item()
        assert own == pytest.approx(share, abs=1e-3)
    assert kinds == {"mixup", "cutmix"}


def test_positions_of_table_8():
    expected = dict(none=[], early=[0, 1, 2, 3, 4, 5], middle=[3, 4, 5, 6, 7, 8], later=[6, 7, 8, 9, 10, 11],
                    alternate=[1, 3, 5, 7, 9, 11])
    assert {name: finetune.layers_with_experts(name, 12) for name in expected} == expected
    assert finetune.layers_with_experts("0,5", 12) == [0, 5]
    with pytest.raises(UserError, match="last"):
        finetune.layers_with_experts("last", 12)


def test_learning_rate_rises_in_a_line_and_falls_in_a_cosine():
    rate = Rate(peak=1.0, warmup=10, steps=110, first=0.1, end=0.2)
    assert [rate(step) for step in (0, 5, 10)] == pytest.approx([0.1, 0.55, 1.0])
    assert rate(60) == pytest.approx(0.6) and rate(110) == pytest.approx(0.2)
    assert all(rate(step) > rate(step + 1) for step in range(10, 109))
    assert Rate(1.0, 0, 10, 0.1, 0.0)(0) == 1.0, "no warm-up"


@pytest.mark.parametrize("script, module", [(finetune, S4D("tiny", CLASSES, CLASSES)),
                                            (pretrain, MaskedAutoencoder("tiny"))])
def test_vectors_have_no_weight_decay_and_layers_their_own_learning_rate(script, module):
    args = script.settings().parse_args(["--weight-decay", "0.05"])
    optimizer, _ = script.optimisation(args, module, 10)
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(of) == len(list(module.parameters()))
    for name, parameter in module.named_parameters():
        vector = name.endswith("bias") or "norm" in name or name == "mask_token"
        assert of[id(parameter)]["weight_decay"] == (0.0 if vector else 0.05), name
    if isinstance(module, S4D):
        assert of[id(module.patch_embed.proj.weight)]["scale"] == pytest.approx(0.75 ** 5)
        assert of[id(module.blocks[3].moe_layer.experts[0].fc1.weight)]["scale"] == pytest.approx(0.75)
        assert of[id(module.blocks[0].norm1.weight)]["scale"] == pytest.approx(0.75 ** 4)
        assert of[id(module.head["image"].weight)]["scale"] == of[id(module.fc_norm.weight)]["scale"] == 1


def test_testing_is_deterministic_and_the_batch_size_does_not_matter(faces):
    torch.manual_seed(0)
    s4d = S4D("tiny", data.AFFECTNET[:7], data.DFEW)
    samples = data.load_samples("synthetic", faces, "test", 1)
    one, two, single = (observe(s4d, data.TestData(samples, s4d.size), ALONE, 0, batch).probabilities["video"]
                        for batch in (32, 32, 1))
    assert np.array_equal(one, two)
    assert (one.argmax(1) == single.argmax(1)).all() and abs(one - single).max() < 1e-5


def test_a_fine_tuned_file_starts_another_fine_tuning_without_a_flag(tmp_path, faces, capsys):
    """With the file's experts; its image head fits and its video head, of three classes, does not."""
    source = S4D("tiny", data.AFFECTNET[:7], CLASSES, experts=4, residual=False, moae_layers=[3])
    torch.save(dict(stage="finetune", architecture=source.architecture, model=source.state_dict()), tmp_path / "s4d.pt")
    quick(finetune, "--dataset", "synthetic", "--data-root", faces, "--workers", 0, "--epochs", 1,
          "--pretrained", tmp_path / "s4d.pt", "--output", tmp_path / "run")
    architecture = torch.load(tmp_path / "run/last.pt", weights_only=True)["architecture"]
    assert architecture["experts"] == 4 and architecture["residual"] is False and architecture["moae_layers"] == [3]
    said = capsys.readouterr().out
    assert "made new: head\n" in said and "experts as in that file" in said
    record, = map(json.loads, (tmp_path / "run/log.jsonl").read_text().splitlines())
    assert record["gates"].keys() == {"image", "video"} and record["gates"]["video"].keys() == {"3"}
    assert all(len(gates["3"]) == 4 and sum(gates["3"]) == pytest.approx(1, abs=1e-3)
               for gates in record["gates"].values())


def test_a_released_classifier_is_evaluated_in_the_catalogues_label_order(tmp_path, faces):
    torch.save({"model": S4D("tiny", range(7), range(7), residual=False).state_dict()}, tmp_path / "s4d.pt")
    arguments = ["evaluate.py", "--checkpoint", tmp_path / "s4d.pt", "--data-root", faces, "--workers", 0]
    text = run_here(tmp_path, *arguments, "--dataset", "synthetic")
    assert "7 test samples" in text and "| surprise" in text
    assert "give --dataset" in run_here(tmp_path, *arguments, status=1)
