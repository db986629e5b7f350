"""evaluate.py: every number against plain Python and numpy on small cases, then the real commands: folds, one process and
two, own media, and what is written where. The page is test_report.py's."""
import csv
import filecmp
import json
import os
import re
from collections import Counter
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import Forked, ended, run_here
from PIL import Image

import data
import evaluate
from data import load_samples, open_clip, read_clip, to_float
from evaluate import (attention, class_centres, class_numbers, confusion_matrix, covering_frames, cross_task,
                      gate_statistics, join_folds, markdown, metrics, observe, reconstruct, unpatchify)
from model import S4D, MaskedAutoencoder, UserError, normalised_target, patchify, unnamed
from pretrain import Process

CPU = Process(0, 1, torch.device("cpu"), "fp32")
CLIP_CLASSES = ["happy", "sad", "neutral", "angry", "surprise", "disgust", "fear"]
IMAGE_CLASSES = ["neutral", "happy", "sad", "surprise", "fear", "disgust", "anger"]


# ------------------------------------------------------------------------------------------------ numbers, by hand

def plain_scores(labels, predictions, classes):
    """UAR and WAR from their definitions."""
    recalls = []
    for c in range(classes):
        hits = sum(label == c == p for label, p in zip(labels, predictions))
        if support := labels.count(c):
            recalls.append(hits / support)
    hits = sum(label == p for label, p in zip(labels, predictions))
    return sum(recalls) / len(recalls), hits / len(labels)


def scores_in_order(labels, predictions, classes):
    scores = metrics(confusion_matrix(np.array(labels), np.array(predictions), classes))
    return [scores[name] for name in ("uar", "war")]


@pytest.mark.parametrize("labels, predictions, classes", [
    ([0, 0, 1, 2, 2, 2], [0, 1, 1, 2, 0, 2], 3),
    ([0, 0, 1], [0, 3, 1], 4),              # 2 neither occurs nor is predicted, 3 is only predicted
    ([1], [1], 3), ([1], [0], 3),           # one sample
    ([0, 1, 0, 1], [0, 0, 0, 0], 2)])       # 1 is never predicted
def test_scores_are_those_of_their_definitions(labels, predictions, classes):
    assert scores_in_order(labels, predictions, classes) == pytest.approx(plain_scores(labels, predictions, classes))


def drawn(seed, n, classes):
    """Labels and predictions that are right half of the time, the same with any version of anything."""
    numbers, state = [], seed
    for _ in range(3 * n):
        state = (1103515245 * state + 12345) % 2 ** 31
        numbers.append(state >> 16)
    labels = [number % classes for number in numbers[:n]]
    guesses = [number % classes for number in numbers[n:2 * n]]
    return labels, [guess if coin % 2 else label for label, guess, coin in zip(labels, guesses, numbers[2 * n:])]


# balanced_accuracy_score and accuracy_score of scikit-learn 1.9.1 for drawn(*arguments)
SCIKIT_LEARN = {(1, 200, 7): (0.538948, 0.54), (2, 60, 11): (0.437013, 0.416667), (3, 9, 5): (0.75, 0.888889),
                (4, 1, 4): (0, 0)}


@pytest.mark.parametrize("arguments", SCIKIT_LEARN)
def test_scores_are_scikit_learns(arguments):
    assert scores_in_order(*drawn(*arguments), arguments[2]) == pytest.approx(SCIKIT_LEARN[arguments], abs=1e-6)


def test_intervals_are_those_of_resampled_predictions():
    labels, predictions = map(np.array, drawn(5, 120, 4))
    scores, rng = metrics(confusion_matrix(labels, predictions, 4)), np.random.default_rng(1)
    resampled = []
    for _ in range(2000):
        index = rng.integers(120, size=120)
        resampled.append(plain_scores(labels[index].tolist(), predictions[index].tolist(), 4))
    for name, values in zip(("uar", "war"), np.transpose(resampled)):
        assert scores[f"{name}_interval"] == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=0.015)
        assert scores[f"{name}_interval"][0] < scores[name] < scores[f"{name}_interval"][1]
    assert metrics(np.diag([5, 1, 0]))["uar_interval"] == [1, 1], "nothing to resample"


def test_rows_are_shares_and_the_majority_is_of_the_labels():
    scores = metrics(np.array([[3, 1, 0], [0, 0, 0], [0, 5, 5]]))
    assert scores["by_row"] == [[0.75, 0.25, 0], [None] * 3, [0, 0.5, 0.5]]
    assert scores["confusion"] == [[3, 1, 0], [0, 0, 0], [0, 5, 5]]
    assert scores["majority_war"] == 10 / 14 and scores["majority_uar"] == 1 / 2


def test_folds_of_different_sizes_are_concatenated_not_averaged():
    folds = [metrics(confusion_matrix(np.array(labels), np.array(chosen), 7))
             for labels, chosen in (([0], [0]), ([0, 1, 1], [1, 1, 0]))]
    together = join_folds(folds)
    assert together["war"] == 2 / 4 and together["uar"] == (1 / 2 + 1 / 2) / 2
    assert np.sum(together["confusion"]) == 4 and together["folds"] == folds
    assert together["war_mean"] == pytest.approx((1 + 1 / 3) / 2)
    assert together["uar_mean"] == pytest.approx((1 + (0 + 1 / 2) / 2) / 2)
    assert together["war_deviation"] == pytest.approx(np.sqrt(2 * (1 / 3) ** 2))   # each 1/3 from the mean, n - 1 = 1
    assert join_folds(folds[:1])["war_deviation"] is None


def test_a_table_is_markdown_and_aligned():
    text = markdown(["", "UAR", "n"], [["a", 0.5, 12], ["long name", None, None]])
    assert text.split("\n") == ["|           |    UAR |  n |", "| --------- | -----: | -: |",
                                "| a         | 0.5000 | 12 |", "| long name |      - |  - |"]


def test_scores_are_printed_with_the_majority_baseline_and_the_recalls(faces):
    run, samples = evaluate.Run(Mock(report=None, media=[]), CPU), load_samples("synthetic", faces, "test")
    scores = metrics(np.array([[3, 0], [1, 0]])) | dict(classes=["happy", "sad"], checkpoint="best.pt")
    evaluate.show_scores(run, "faces", samples, scores)
    title, first, second, empty, *lines = run.lines[0].strip().split("\n")
    assert title == "faces: 4 test samples, best.pt" and first.startswith("UAR 0.5000 (0.5000 to 1.0000)  WAR 0.7500 (")
    assert second == "always the most frequent class: UAR 0.5000  WAR 0.7500" and empty == ""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["true \\ predicted", "happy", "sad", "recall"] and cells[2] == ["happy", "3", "0", "1.0000"]
    assert cells[3] == ["sad", "1", "0", "0.0000"] and len(cells) == 4


def test_gate_statistics_are_shares_of_each_layer():
    model = S4D("tiny", IMAGE_CLASSES, CLIP_CLASSES, experts=4)
    gates = gate_statistics(model, np.array([[1, 1, 1, 1], [3, 1, 0, 0]]))
    assert gates == {2: [0.25] * 4, 3: [0.75, 0.25, 0, 0]}
    gates = gate_statistics(model, np.array([[1, 1, 1, 0], [2, 0, 1, 0]]))
    assert gates == {2: [0.3333, 0.3333, 0.3333, 0], 3: [0.6667, 0, 0.3333, 0]}


def test_cross_task_compares_by_name_the_classes_that_both_have(faces):
    samples = load_samples("synthetic", faces, "test")
    samples = replace(samples, names=samples.names[:4], labels=np.array([1, 3, 5, 0]))  # sad, angry, disgust, happy
    theirs = ["anger", "contempt", "sadness", "happiness"]
    probabilities = np.array([[0.1, 0.7, 0.2, 0.0], [0.4, 0.1, 0.3, 0.2], [1.0, 0, 0, 0], [0.2, 0.5, 0.3, 0.0]])
    scores = cross_task(samples, probabilities, theirs)  # contempt is no choice, disgust is left out
    assert scores["classes"] == ["happy", "sad", "angry"] and scores["samples"] == 3
    assert scores["confusion"] == [[0, 1, 0], [0, 1, 0], [0, 0, 1]] and scores["uar"] == pytest.approx(2 / 3)
    assert cross_task(samples, probabilities[:, :1], ["boredom"]) is None


def test_class_centres_are_means():
    features, labels = np.random.default_rng(0).normal(size=(6, 5)), np.array([0, 0, 2, 2, 2, 0])
    centres = class_centres(features, labels, 3).numpy()
    assert centres[0] == pytest.approx(sum(features[i] for i in (0, 1, 5)) / 3)
    assert np.isnan(centres[1]).all() and not np.isnan(centres[2]).any(), "a class without samples has no centre"


def test_a_pass_yields_what_each_sample_alone_gives(faces):
    torch.manual_seed(0)
    model = S4D("tiny", IMAGE_CLASSES, CLIP_CLASSES).eval()
    tested = data.TestData(load_samples("synthetic", faces, "test"), model.size)
    seen = observe(model, tested, CPU, workers=0, batch=3)
    counts, paths = np.zeros((2, 8)), Counter()
    for i in range(len(tested)):
        _, views, _ = tested[i]
        probabilities, features = 0, 0
        for clip in views:
            x = model.patch_embed(patchify(to_float(clip[None]), model.size)) + model.positions
            path = []
            for block in model.blocks:
                if block.moe_layer is not None:
                    logits = block.moe_layer.router.topkroute_linear(block.norm2(x + block.attn(block.norm1(x))))[0]
                    chosen = logits.argsort(-1, descending=True)[:, :2]
                    counts[len(path)] += np.bincount(chosen.flatten(), minlength=8)
                    path.append(chosen[:, 0].tolist())
                x = block(x)
            paths.update(zip(*path))
            representation = model.fc_norm(x.mean(1))
            features = features + representation.detach()[0].numpy() / 2
            probabilities = probabilities + model.head["image"](representation).softmax(-1).detach()[0].numpy() / 2
        assert seen.features[i] == pytest.approx(features, abs=1e-4)
        assert seen.probabilities["image"][i] == pytest.approx(probabilities, abs=1e-4), "the other task's head"
    assert abs(seen.activation - counts).max() <= 2 and seen.activation.sum() == counts.sum()  # rounding may tie gates
    assert [share for _, share in seen.paths] == sorted((share for _, share in seen.paths), reverse=True)
    tokens = sum(paths.values())
    for path, share in seen.paths:
        assert abs(share * tokens - paths[tuple(path)]) <= 2, "the expert of the largest weight in each layer"
    assert len(seen.paths) == 10 and seen.paths[0][1] * tokens == pytest.approx(max(paths.values()), abs=2)


def test_attention_follows_the_layers_back():
    torch.manual_seed(0)
    model = S4D("tiny", IMAGE_CLASSES, CLIP_CLASSES).eval()
    for parameter in model.parameters():
        parameter.data.mul_(2)              # far from even attention
    images = torch.randint(256, (2, 3, 48, 48), dtype=torch.uint8)
    x = model.patch_embed(patchify(to_float(images), model.size)) + model.positions[:36]
    mixed = torch.eye(36).repeat(2, 1, 1)
    for block in model.blocks:
        mixed = (block.attn.weights(block.norm1(x)).mean(1) + torch.eye(36)) / 2 @ mixed
        x = block(x)
    received = attention(model, images, CPU)
    assert received.shape == (2, 1, 6, 6)
    assert torch.allclose(received.flatten(1), 36 * mixed.mean(1), atol=1e-4) and received.std() > 0.05


def test_reconstruction_of_a_perfect_model_is_the_original(monkeypatch):
    torch.manual_seed(0)
    model, clip = MaskedAutoencoder("tiny"), torch.randint(256, (2, 16, 3, 48, 48), dtype=torch.uint8)
    assert torch.equal(unpatchify(patchify(to_float(clip), model.size), model.size), clip)
    patches = patchify(to_float(clip), model.size)
    mask = torch.rand(2, 144).argsort(1) < 100
    target = normalised_target(patches[mask].unflatten(0, (2, 100)))[0]
    monkeypatch.setattr(model, "forward", lambda x, mask_ratio: (torch.zeros(()), target, mask))
    original, masked, pasted = reconstruct(model, clip, 0.7, CPU)
    assert torch.equal(original, clip) and (pasted.int() - clip.int()).abs().max() <= 1
    grey = to_float(masked).abs().flatten(1).max(1).values
    assert torch.equal(patchify(to_float(masked), model.size)[~mask], patches[~mask]), "visible patches stay"
    assert patchify(to_float(masked), model.size)[mask].abs().max() < 0.02 < grey.min(), "masked ones are one grey"


# ----------------------------------------------------------------------------------------------------- classes by name

def test_classes_are_matched_by_name_in_any_order_and_by_the_data_sets_words():
    assert class_numbers(["anger", "happy", "bored"], ["neutral", "happiness", "angry"]) == [2, 1, None]
    assert class_numbers(["happy", "happiness"], ["happiness", "happy"]) == [1, 0], "the same word comes first"


def test_data_may_have_fewer_classes_than_the_model(faces, monkeypatch):
    samples = load_samples("synthetic", faces, "test")
    samples = replace(samples, classes=("sadness", "happiness", "fear"), names=samples.names[:5],
                      labels=np.array([0, 0, 1, 2, 1]))
    model = S4D("tiny", IMAGE_CLASSES, CLIP_CLASSES)
    probabilities = np.eye(7)[[1, 2, 0, 6, 6]]          # sad, neutral, happy, fear
    probabilities[4] = 1 / 7                            # of equally probable classes the first: happy
    seen = evaluate.Observed({"video": probabilities}, None, None, [])
    monkeypatch.setattr(evaluate, "observe", lambda *arguments: seen)
    scores, _ = evaluate.evaluate(model, samples, CPU, 0)
    assert scores["recall"] == [1, 0.5, None, None, None, None, 1] and scores["war"] == 0.8
    assert np.array(scores["confusion"]).shape == (7, 7)
    with pytest.raises(UserError, match="'bored'\\]: expected classes that the model was trained on, \\['happy', 'sad'"):
        evaluate.evaluate(model, replace(samples, classes=("sad", "happy", "bored")), CPU, 0)
    with pytest.raises(UserError, match="synthetic has videos of the classes .*, \\[\\]"):
        evaluate.evaluate(S4D("tiny", IMAGE_CLASSES, []), samples, CPU, 0)


# ------------------------------------------------------------------------------------------------ the real commands

def save(path, seed=0, fold=1, classes=(IMAGE_CLASSES, CLIP_CLASSES), **identity):
    """A fine-tuned checkpoint whose weights are random."""
    torch.manual_seed(seed)
    model = S4D("tiny", *classes)
    for parameter in model.parameters():
        parameter.data.mul_(2)
    path.parent.mkdir(parents=True, exist_ok=True)
    identity = dict(dataset="synthetic", image_dataset="synthetic-images", fold=fold,
                    pretrained=str(path.parents[1] / "pre.pt"), precision="fp32") | identity
    torch.save(dict(stage="finetune", architecture=model.architecture, model=model.state_dict(), identity=identity,
                    made_by={}, state=dict(epoch=1)), path)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory, faces):
    """Five folds' checkpoints, which say what they were tested on, and one of stage 1."""
    folder = tmp_path_factory.mktemp("evaluated")
    model = MaskedAutoencoder("tiny")
    torch.save(dict(stage="pretrain", architecture=model.architecture, model=model.state_dict(),
                    identity=dict(dataset="synthetic-unlabelled", image_dataset="synthetic-images")), folder / "pre.pt")
    for fold in range(1, 6):
        test = load_samples("synthetic", faces, "test", fold)
        save(folder / f"fold{fold}/best.pt", seed=fold, fold=fold, **{
            "test video": test.fingerprint(), "video stride": 2, "video rate": 25.0})
    return folder


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def results_in(folder):
    return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))


def test_five_folds_make_one_uar_and_war(runs, faces):
    folds = [runs / f"fold{fold}/best.pt" for fold in (3, 1, 2, 4, 5)]
    text = run_here(runs, "evaluate.py", "--dataset", "synthetic", "--folds", *folds, "--data-root", faces)
    scores, rows = results_in(runs / "fold3/best/folds")["synthetic"], read_csv(runs / "fold3/best/folds/predictions-videos.csv")
    assert len(rows) == len({row["sample"] for row in rows}) == 35
    hits = {name: [row["prediction"] == name for row in rows if row["label"] == name] for name in CLIP_CLASSES}
    assert scores["war"] == pytest.approx(sum(map(sum, hits.values())) / 35)
    assert scores["uar"] == pytest.approx(np.mean([np.mean(of_class) for of_class in hits.values()]))
    for row in rows:
        probabilities = [float(row[name]) for name in CLIP_CLASSES]
        assert row["prediction"] == CLIP_CLASSES[np.argmax(probabilities)]
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
    assert [fold["fold"] for fold in scores["folds"]] == [1, 2, 3, 4, 5]
    assert scores["war_mean"] == pytest.approx(sum(fold["war"] for fold in scores["folds"]) / 5)
    assert f"UAR {scores['uar']:.4f}" in text and f"| fold 3    | {scores['folds'][2]['uar']:.4f} |" in text
    assert "| mean " in text and "| deviation " in text and "warning" not in text


def test_folds_that_do_not_belong_together_are_refused(runs, faces, tmp_path):
    folds = [runs / f"fold{fold}/best.pt" for fold in range(1, 6)]
    other = save(tmp_path / "fold5/best.pt", fold=5, **{
        "test video": load_samples("synthetic", faces, "test", 4).fingerprint()})
    for given, expected in ((folds[1:], "expects one checkpoint of each of the 5 folds of synthetic: these 4 "
                             "are of folds [2, 3, 4, 5]"), (folds + folds[:1], "these 6 are of folds [1, 2, 3, 4, 5]"),
                            (folds[:4] + [other], "not the test samples of training")):
        text = run_here(tmp_path, "evaluate.py", "--dataset", "synthetic", "--folds", *given, "--data-root", faces,
                        "--report", "out", status=1)
        assert expected in text.splitlines()[-1] and text.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out/evaluation.json").exists()


def test_other_test_data_than_those_of_training_are_said(runs, faces, tmp_path):
    then = load_samples("synthetic", faces, "test").fingerprint()
    other = then[:-16] + "0" * 16
    save(tmp_path / "run/best.pt", **{"test video": other, "video stride": 2})
    command = ("evaluate.py", "--checkpoint", "run/best.pt", "--dataset", "synthetic", "--data-root", faces)
    text = run_here(tmp_path, *command)
    assert f"may have seen them: {then}; recorded: {other}" in text and "warning" in text
    assert len(read_csv(tmp_path / "run/best/predictions-videos.csv")) == 7
    text = run_here(tmp_path, *command, "--fold", 2)
    assert "may have seen them" in text, "the training samples of fold 1 among them"


def test_fold_is_that_of_the_set_with_folds(runs, faces, tmp_path):
    command = ("evaluate.py", "--checkpoint", runs / "fold1/best.pt", "--data-root", faces, "--fold", 3)
    text = run_here(tmp_path, *command, "--report", "out")
    assert "synthetic, fold 3: 7 test samples" in text and "synthetic-images: 14 test samples" in text


@pytest.fixture(scope="module")
def own(tmp_path_factory, faces):
    """A folder with own clips and own images, both in a train.csv and a test.csv, and models of both stages."""
    folder = tmp_path_factory.mktemp("own")
    for kind, name in (("clips", "synthetic"), ("images", "synthetic-images")):
        samples = load_samples(name, faces, "test")
        (folder / kind).mkdir()
        (folder / kind / "faces").symlink_to(samples.root)
        for split in ("train", "test"):
            (folder / f"{kind}/{split}.csv").write_text("path,label\n" + "".join(
                f"faces/{samples.path(i).relative_to(samples.root)},{samples.classes[label]}\n"
                for i, label in enumerate(samples.labels)))
    clips, images = (f"{folder}/{kind}/train.csv,{folder}/{kind}/test.csv" for kind in ("clips", "images"))
    save(folder / "run/best.pt", classes=(sorted(IMAGE_CLASSES), sorted(CLIP_CLASSES)), dataset=clips,
         image_dataset=images, **{"video stride": 3})
    model = MaskedAutoencoder("tiny")
    torch.save(dict(stage="pretrain", architecture=model.architecture, model=model.state_dict(), identity=dict(
        dataset="none", image_dataset=f"{folder}/images/train.csv", image_mask_ratio=0.75)), folder / "pre.pt")
    return folder


def test_own_lists_and_a_head_without_names_which_serves_only_a_set_of_the_catalogue(own, faces):
    save(own / "released/best.pt", classes=(unnamed(7), unnamed(7)))
    command = ("evaluate.py", "--checkpoint", "released/best.pt", "--data-root", faces, "--dataset")
    text = run_here(own, *command, "synthetic")
    assert f"taken as those of synthetic, in its order: {', '.join(CLIP_CLASSES)}" in text
    text = run_here(own, *command, f"{own}/clips/train.csv,{own}/clips/test.csv", status=1)
    assert "expected classes that the model was trained on, ['class 0', 'class 1'" in text
    run_here(own, "evaluate.py", "--checkpoint", "run/best.pt", "--workers", 1, "--report", "out")
    for kind, count in (("videos", 7), ("images", 14)):     # both lists are called test.csv
        assert len(read_csv(own / f"out/predictions-{kind}.csv")) == count


def test_the_same_clips_score_the_same_as_ones_own_list(own, faces):
    """At the step in time of training, whichever rate the training clips had."""
    save(own / "drawn/best.pt", **{"video stride": 2, "video rate": 12.0})
    command = ("evaluate.py", "--checkpoint", "drawn/best.pt", "--data-root", faces, "--report", "drawn", "--dataset")
    found = []
    for name in ("synthetic", f"{own}/clips/train.csv,{own}/clips/test.csv"):
        run_here(own, *command, name)
        found.append([list(row.values())[1:] for row in read_csv(own / "drawn/predictions-videos.csv")])
    assert found[0] == found[1]


def test_two_processes_write_the_report_of_one(runs, faces):
    started = []
    for processes in (1, 2):
        (runs / f"report{processes}").mkdir()
        started.append(Forked(runs / f"report{processes}", "evaluate.py", "--checkpoint", "../fold1/best.pt",
                              "--baseline", "../fold2/best.pt", "--data-root", faces, "--report", ".", "--workers", 1,
                              processes=processes))
    for process in started:
        ended(process)
    written = sorted(os.listdir(runs / "report1"))
    assert written == sorted(os.listdir(runs / "report2"))
    assert filecmp.cmpfiles(runs / "report1", runs / "report2", written, shallow=False) == (written, [], [])
    results = results_in(runs / "report1")
    assert [row[0] for row in results["experts"][1:]] == [
        f"{name}, layer {layer}" for name in ("videos", "images") for layer in (2, 3)]
    assert sum(results["experts"][1][1:]) == pytest.approx(1, abs=1e-3)
    assert results["heads"][1][0] == "image head on synthetic, fold 1" and results["heads"][1][3] == 7
    assert results["similarity"][0][1:] == ["happy", "sad", "neutral", "anger", "surprise", "disgust", "fear"]
    assert results["similarity"][2][0] == "sad" and results["similarity"][2][6] == pytest.approx(
        similarity_of(runs, faces, "sad", "disgust"), abs=0.02)
    drawing = (runs / "report1/mistakes-test-images-of-synthetic-images.svg").read_text(encoding="utf-8")
    true, predicted, confidence = zip(*re.findall(r"jpg: (\w+), taken for (\w+) (0\.\d+)<", drawing))
    assert list(confidence) == sorted(confidence, reverse=True) and not any(map(str.__eq__, true, predicted))


def similarity_of(runs, faces, clip_class, image_class):
    """Cosine of the angle between a class of clips and a class of images, sample by sample."""
    checkpoint, centres = torch.load(runs / "fold1/best.pt"), []
    model = S4D(**checkpoint["architecture"]).eval()
    model.load_state_dict(checkpoint["model"])
    for name, label in (("synthetic", CLIP_CLASSES.index(clip_class)),
                        ("synthetic-images", IMAGE_CLASSES.index(image_class))):
        tested = data.TestData(load_samples(name, faces, "test"), model.size)
        features = [model.features(to_float(views)).mean(0).detach().double().numpy()
                    for _, views, found in map(tested.__getitem__, range(len(tested))) if found == label]
        centres.append(sum(features) / len(features))
    return centres[0] @ centres[1] / (sum(centres[0] ** 2) * sum(centres[1] ** 2)) ** 0.5


def test_results_of_last_and_best_lie_beside_each_other(faces, tmp_path):
    for name in ("last", "best"):
        save(tmp_path / f"run/{name}.pt", seed=ord(name[0]))
        run_here(tmp_path, "evaluate.py", "--checkpoint", f"run/{name}.pt", "--data-root", faces, "--dataset",
                 "synthetic")
        run_here(tmp_path, "evaluate.py", "--checkpoint", f"run/{name}.pt",
                 load_samples("synthetic-images", faces, "test").path(0))
    for name in ("last", "best"):
        assert sorted(os.listdir(tmp_path / f"run/{name}")) == ["evaluation.json", "media", "predictions-videos.csv"]
        assert {"evaluation.json", "predictions-images.csv", "report.html"} < set(os.listdir(tmp_path / f"run/{name}/media"))
    last, best = (read_csv(tmp_path / f"run/{name}/predictions-videos.csv") for name in ("last", "best"))
    assert last != best


def test_results_are_written_at_the_end_whoever_reads(runs, faces, tmp_path, monkeypatch):
    command = ("evaluate.py", "--data-root", faces, "--dataset", "synthetic", "--report", "out", "--checkpoint")
    run_here(tmp_path, *command, runs / "fold1/best.pt")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "markdown", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_here(tmp_path, *command, runs / "fold2/best.pt")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before

    def closed(*words, **options):
        raise BrokenPipeError(32, "Broken pipe")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "print", closed, raising=False)
        run_here(tmp_path, *command, runs / "fold2/best.pt", status=1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} != before


# ------------------------------------------------------------------------------------------------------- own media

def test_clips_cover_a_video():
    for n in (1, 30, 64, 65, 750, 20_000):
        clips = np.reshape(covering_frames(n, 16, 4), (-1, 16))
        starts = clips[:, 0] // 4
        assert clips[0, 0] == 0 and n - 1 - clips[-1, -1] < 4 and clips.max() < n
        assert len(clips) <= 64 and (np.diff(starts) <= 8).all() or n > 2100
        assert (np.diff(clips) == 4).all() or n < 61
    assert len(clips) == 64 and np.ptp(np.diff(starts)) <= 1, "of a long one some, spread evenly"


def every_frame(path):
    clip = open_clip(path)
    return read_clip(clip, list(range(clip.n)))


def video(path, faces, rate=25, seconds=1):
    """Test clips of three classes one after the other, each for some seconds."""
    import av
    samples = load_samples("synthetic", faces, "test")
    frames = []
    for label in (0, 3, 4):
        clip = every_frame(samples.path(int(np.flatnonzero(samples.labels == label)[0])))
        frames += [clip[int(25 * i / rate) % len(clip)] for i in range(seconds * rate)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "1"})
        stream.height, stream.width = frames[0].shape[1:]
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def test_own_media_of_every_kind(runs, faces, tmp_path):
    photo = load_samples("synthetic-images", faces, "test").path(0)
    for rate in (25, 60):
        video(tmp_path / f"{rate}.mp4", faces, rate)
    (tmp_path / "frames").mkdir()
    for i, frame in enumerate(every_frame(tmp_path / "25.mp4")):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(tmp_path / f"frames/{i}.png")
    text = run_here(tmp_path, "evaluate.py", "--checkpoint", runs / "fold1/best.pt", "25.mp4", photo, "60.mp4",
                    "frames", "--report", "out")
    assert "the mean over 4 clips of 1.3 seconds, spread over its 3.0 seconds" in text and "if it has 25 frames a second, which nothing says" in text
    assert f"written to {os.path.join('out', 'report.html')}" in text
    clips, photos = read_csv(tmp_path / "out/predictions-videos.csv"), read_csv(tmp_path / "out/predictions-images.csv")
    assert [row["sample"] for row in clips + photos] == ["25.mp4", "60.mp4", "frames", str(photo)]
    at_25, at_60, as_frames = ([float(row[name]) for name in CLIP_CLASSES] for row in clips)
    assert at_25 == as_frames and at_25 == pytest.approx(at_60, abs=0.02), "time is time"
    model = evaluate.rebuild(torch.load(runs / "fold1/best.pt"), "best.pt").eval()
    samples = replace(load_samples("synthetic", faces, "test"), root=tmp_path, names=np.array([b"25.mp4"]), stride=2)
    tested = data.TestData(samples, model.size)
    tested.which_frames = partial(covering_frames, frames=16, stride=2)
    views = tested[0][1]
    course = model(to_float(views)).softmax(-1).detach()
    assert at_25 == pytest.approx(course.mean(0).tolist(), abs=0.01)        # bf16 where it is fast
    results = results_in(tmp_path / "out")
    columns, *rows = results["video-1-25-mp4"]
    assert columns == ["seconds", *CLIP_CLASSES] and {"video-2-60-mp4", "video-3-frames"} < results.keys()
    assert [row[0] for row in rows] == [0.64, 1.2, 1.84, 2.4], "the clips' middles"
    assert np.array(rows)[:, 1:] == pytest.approx(course.numpy(), abs=0.02)


def test_own_media_are_cut_out(runs, faces, tmp_path):
    photo = load_samples("synthetic-images", faces, "test").path(0)
    with Image.open(photo) as image:
        width, height = image.size
        image.crop((8, 2, 38, 42)).save(tmp_path / "cut.png")
    command = ("evaluate.py", "--checkpoint", runs / "fold1/best.pt")
    run_here(tmp_path, *command, "--crop", "8,2,30,40", photo, "--report", "a")
    run_here(tmp_path, *command, "cut.png", "--report", "b")
    a, b = (list(read_csv(tmp_path / f"{name}/predictions-images.csv")[0].values())[1:] for name in "ab")
    assert a == b
    text = run_here(tmp_path, *command, "--crop", f"{width - 9},0,10,20", photo, status=1)
    assert f"{photo}, {width} x {height} pixels, does not hold --crop" in text


def test_test_clips_are_cut_as_in_training(faces, tmp_path):
    """With --crop of training on its own test data; elsewhere, evaluate.py's own --crop does it."""
    save(tmp_path / "cut.pt", crop=(4, 0, 40, 48), image_dataset="none")
    save(tmp_path / "whole.pt", image_dataset="none")
    found = []
    crop = ("--crop", "4,0,40,48")
    for file, *more in (["cut"], ["whole", "--dataset", "synthetic", *crop], ["whole", *crop], ["whole"]):
        run_here(tmp_path, "evaluate.py", "--checkpoint", f"{file}.pt", "--data-root", faces, *more, "--report", "out")
        found.append(read_csv(tmp_path / "out/predictions-videos.csv"))
    assert found[0] == found[1] == found[2] != found[3]


def test_own_media_that_cannot_be_used_are_named_before_any_work(runs, own, faces, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    clip = load_samples("synthetic", faces, "test").path(0)
    for file, words in (("broken.mp4", "broken.mp4"), ("missing.mp4", "missing.mp4 is not there")):
        text = run_here(tmp_path, "evaluate.py", "--checkpoint", runs / "fold1/best.pt", "--report", "out", clip,
                        file, status=1)
        assert words in text and not (tmp_path / "out/evaluation.json").exists()
    save(tmp_path / "run/images.pt", classes=(IMAGE_CLASSES, []))
    text = run_here(tmp_path, "evaluate.py", "--checkpoint", "run/images.pt", clip, status=1)
    assert "is video data, which this model was trained without" in text


def test_a_stage_1_checkpoint_is_shown_by_its_reconstructions(runs, own, faces, tmp_path):
    run_here(tmp_path, "evaluate.py", "--checkpoint", runs / "pre.pt", "--data-root", faces, "--report", "shown")
    page = (tmp_path / "shown/report.html").read_text(encoding="utf-8")
    assert "of synthetic-unlabelled" in page and "95% of the patches" in page and "90% of the patches" in page
    run_here(own, "evaluate.py", "--checkpoint", "pre.pt", "--report", "shown")
    assert "75% of the patches" in (own / "shown/report.html").read_text(encoding="utf-8")
    text = run_here(tmp_path, "evaluate.py", "--checkpoint", runs / "pre.pt", "--data-root", faces, status=1)
    assert "stage-1 checkpoint of pretrain.py: it has no classes" in text


@pytest.mark.parametrize("arguments, expected", [
    ([], "one of the arguments --checkpoint --folds is required"),
    (["--checkpoint", "a.pt", "--folds", "b.pt"], "argument --folds: not allowed with argument --checkpoint"),
    (["--folds", "a.pt"], "--folds expects --dataset"),
    (["--folds", "a.pt", "--dataset", "dfew", "--fold", "2"], "--folds expects --dataset, and neither FILE nor --fold"),
    (["--checkpoint", "a.pt", "--crop", "1,2,3", "clip.mp4"], "argument --crop: invalid box value: '1,2,3'")])
def test_wrong_commands_say_what_they_expect(tmp_path, arguments, expected):
    assert expected in run_here(tmp_path, "evaluate.py", *arguments, status=2)
