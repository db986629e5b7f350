"""evaluate.py: every number against plain Python and numpy on small cases, then the real commands: folds, reports by
one process and by two, own media, and what is written where."""
import csv
import filecmp
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, Forked, ended, run_here
from PIL import Image

import data
import evaluate
from data import digests_of, identity_of, load_samples, read_clip, read_image, to_float
from evaluate import (attention, class_centres, colours, confusion_matrix, contact_sheet, cross_task, gate_statistics,
                      heat_map, join_folds, markdown, media_data, media_files, metrics, observe, reconstruct, table,
                      unpatchify)
from model import S4D, MaskedAutoencoder, UserError, normalised_target, patchify
from pretrain import Process, write

CPU = Process(0, 1, torch.device("cpu"), torch.float32)
CLIP_CLASSES = ["happy", "sad", "neutral", "angry", "surprise", "disgust", "fear"]
IMAGE_CLASSES = ["neutral", "happy", "sad", "surprise", "fear", "disgust", "anger"]


# ------------------------------------------------------------------------------------------------ numbers, by hand

def plain_scores(labels, predictions, classes):
    """UAR, WAR, macro and weighted F1 from their definitions."""
    recalls, f1, weighted = [], [], 0
    for c in range(classes):
        hits = sum(label == c == p for label, p in zip(labels, predictions))
        support, predicted = labels.count(c), predictions.count(c)
        if support:
            recalls.append(hits / support)
        if support or predicted:
            precision, recall = hits / max(predicted, 1), hits / max(support, 1)
            f1.append(2 * precision * recall / (precision + recall) if hits else 0)
            weighted += f1[-1] * support
    hits = sum(label == p for label, p in zip(labels, predictions))
    return sum(recalls) / len(recalls), hits / len(labels), sum(f1) / len(f1), weighted / len(labels)


def scores_in_order(labels, predictions, classes):
    scores = metrics(confusion_matrix(np.array(labels), np.array(predictions), classes))
    return [scores[name] for name in ("uar", "war", "macro_f1", "weighted_f1")]


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


# balanced_accuracy_score, accuracy_score and f1_score (macro, weighted) of scikit-learn 1.9.1 for drawn(*arguments)
SCIKIT_LEARN = {(1, 200, 7): (0.538948, 0.54, 0.536563, 0.541259), (2, 60, 11): (0.437013, 0.416667, 0.396081, 0.38838),
                (3, 9, 5): (0.75, 0.888889, 0.666667, 0.851852), (4, 1, 4): (0, 0, 0, 0)}


@pytest.mark.parametrize("arguments", SCIKIT_LEARN)
def test_scores_are_scikit_learns(arguments):
    assert scores_in_order(*drawn(*arguments), arguments[2]) == pytest.approx(SCIKIT_LEARN[arguments], abs=1e-6)


@pytest.mark.filterwarnings("ignore")       # it warns of classes that are only predicted
def test_scores_are_those_of_the_installed_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    for seed in range(20):
        labels, predictions = drawn(seed, 5 + 10 * seed, 2 + seed % 10)
        assert scores_in_order(labels, predictions, 2 + seed % 10) == pytest.approx([
            sklearn.balanced_accuracy_score(labels, predictions), sklearn.accuracy_score(labels, predictions),
            sklearn.f1_score(labels, predictions, average="macro"),
            sklearn.f1_score(labels, predictions, average="weighted")])


def test_intervals_are_those_of_resampled_predictions():
    labels, predictions = map(np.array, drawn(5, 120, 4))
    scores, rng = metrics(confusion_matrix(labels, predictions, 4)), np.random.default_rng(1)
    resampled = []
    for _ in range(2000):
        index = rng.integers(120, size=120)
        resampled.append(plain_scores(labels[index].tolist(), predictions[index].tolist(), 4)[:2])
    for name, values in zip(("uar", "war"), np.transpose(resampled)):
        assert scores[f"{name}_interval"] == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=0.015)
        assert scores[f"{name}_interval"][0] < scores[name] < scores[f"{name}_interval"][1]
    assert metrics(np.diag([5, 1, 0]))["uar_interval"] == [1, 1], "nothing to resample"


def test_rows_are_shares_and_the_majority_is_of_the_labels():
    scores = metrics(np.array([[3, 1, 0], [0, 0, 0], [0, 5, 5]]))
    assert scores["by_row"] == [[0.75, 0.25, 0], [None] * 3, [0, 0.5, 0.5]]
    assert scores["confusion"] == [[3, 1, 0], [0, 0, 0], [0, 5, 5]]
    assert scores["majority_war"] == 10 / 14 and scores["majority_uar"] == 1 / 2


def test_of_equally_probable_classes_the_first_is_predicted(faces, monkeypatch):
    samples, model = load_samples("synthetic", faces, "test"), S4D("tiny", IMAGE_CLASSES, CLIP_CLASSES)
    tie = evaluate.Observed({"video": np.full((len(samples), 7), 1 / 7)}, None, None)
    monkeypatch.setattr(evaluate, "observe", lambda *arguments: tie)
    scores, _ = evaluate.evaluate(model, samples, CPU, 0)
    assert np.array(scores["confusion"])[:, 0].sum() == len(samples) and scores["uar"] == pytest.approx(1 / 7)


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
    text = markdown(["", "UAR", "n"], [["a|b", 0.5, 12], ["long\nname", None, None]])
    assert text.split("\n") == ["|           |    UAR |  n |", "| --------- | -----: | -: |",
                                "| a\\|b      | 0.5000 | 12 |", "| long name |      - |  - |"]
    lines = table(metrics(np.array([[3, 0], [1, 0]])), ("happy", "sad")).split("\n")
    assert lines[0].startswith("UAR 0.5000 (0.5000 to 1.0000)  WAR 0.7500 (")
    assert lines[1] == "always the most frequent class: UAR 0.5000  WAR 0.7500"
    assert [cell.strip() for cell in lines[5].split("|")[1:-1]] == ["happy", "3", "0", "1.0000"]
    assert lines[-1] == "never predicted: sad"


def test_gate_statistics_are_shares_of_each_layer():
    model = S4D("tiny", IMAGE_CLASSES, CLIP_CLASSES, experts=4)
    gates = gate_statistics(model, np.array([[1, 1, 1, 1], [3, 1, 0, 0]]))
    assert gates[2] == dict(share=[0.25] * 4, cv=0) and gates[3]["share"] == [0.75, 0.25, 0, 0]
    assert gates[3]["cv"] == pytest.approx(np.std([3, 1, 0, 0]), abs=1e-4)  # their mean is 1


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
    counts = np.zeros((2, 8))
    for i in range(len(tested)):
        _, views, _ = tested[i]
        probabilities, features = 0, 0
        for clip in views:
            x = model.patch_embed(patchify(to_float(clip[None]), model.size)) + model.positions
            layer = 0
            for block in model.blocks:
                if block.moe_layer is not None:
                    logits = block.moe_layer.router.topkroute_linear(block.norm2(x + block.attn(block.norm1(x))))[0]
                    counts[layer] += np.bincount(logits.argsort(-1, descending=True)[:, :2].flatten(), minlength=8)
                    layer += 1
                x = block(x)
            representation = model.fc_norm(x.mean(1))
            features = features + representation.detach()[0].numpy() / 2
            probabilities = probabilities + model.head["image"](representation).softmax(-1).detach()[0].numpy() / 2
        assert seen.features[i] == pytest.approx(features, abs=1e-4)
        assert seen.probabilities["image"][i] == pytest.approx(probabilities, abs=1e-4), "the other task's head"
    assert abs(seen.activation - counts).max() <= 2 and seen.activation.sum() == counts.sum()  # rounding may tie gates


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
    (original, masked, pasted), loss, baseline = reconstruct(model, clip, 0.7, CPU)
    assert torch.equal(original, clip) and (pasted.int() - clip.int()).abs().max() <= 1 and loss == 0
    grey = to_float(masked).abs().flatten(1).max(1).values
    assert torch.equal(patchify(to_float(masked), model.size)[~mask], patches[~mask]), "visible patches stay"
    assert patchify(to_float(masked), model.size)[mask].abs().max() < 0.02 < grey.min(), "masked ones are one grey"
    errors = []                             # of a patch that is its own mean colour, as in Section III-B
    for patch in patches[mask].unflatten(-1, (-1, 3)).double().numpy() * np.array([0.229, 0.224, 0.225]):
        errors.append((patch - patch.mean(0)) ** 2 / (patch.var(0, ddof=1) + 1e-6))
    assert baseline == pytest.approx(np.mean(errors), rel=1e-4)


@pytest.mark.parametrize("ramp", [evaluate.DARK, evaluate.BRIGHT])
def test_colours_read_the_same_in_grey(ramp):
    grey = colours(np.linspace(0, 1, 50), ramp) @ [0.299, 0.587, 0.114]
    assert (np.diff(grey) > 0).all() or (np.diff(grey) < 0).all()
    assert abs(grey[0] - grey[-1]) > 150


def test_a_drawn_table_colours_numbers_and_shows_pictures():
    picture = torch.full((3, 40, 60), 200, dtype=torch.uint8)
    drawn = np.asarray(heat_map("", ["", "a", "b"], [["x", 0.0, 1.0], ["y", None, 0.5], ["z", picture, picture]]))
    left = [row.tolist() for row in (drawn == 200).all(-1)][-5].index(True)
    colour = [tuple(drawn[y, x].tolist()) for y, x in ((46, left + 2), (46, left + 64), (76, left + 64))]
    assert colour == [evaluate.DARK[0], evaluate.DARK[-1], tuple(colours(0.5, evaluate.DARK).astype(int).tolist())]
    assert (drawn == 200).all(-1).sum() == 2 * 40 * 60
    sheet = np.asarray(contact_sheet([("x", picture[None]), ("y", picture[None].repeat(3, 1, 1, 1))]))
    assert (sheet == 200).all(-1).sum() == 4 * 120 * 180, "40 pixels are enlarged to at least 96"


# ------------------------------------------------------------------------------------------------------- own media

def animation(path, faces, frames=6):
    """The first frames of a test clip as an animated GIF or WebP, without loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    x = read_clip(load_samples("synthetic", faces, "test").path(0), lambda n: list(range(frames)))
    first, *others = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in x]
    first.save(path, save_all=True, append_images=others, **({"lossless": True} if path.suffix == ".webp" else {}))
    return path


def test_a_folder_is_a_clip_or_holds_media(faces, tmp_path):
    for name in ("clip/2.png", "clip/10.png", "clip/notes.txt", "mixed/a.JPG", "mixed/b.mp4", "mixed/c/1.jpg",
                 "mixed/d.heic", "empty/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "mixed/c/.hidden.jpg").write_text("")
    os.mkfifo(tmp_path / "pipe.mp4")
    left_out = []
    assert media_files(tmp_path / "clip", left_out) == [tmp_path / "clip"]
    assert media_files(tmp_path / "mixed", left_out) == [tmp_path / "mixed" / name for name in ("a.JPG", "b.mp4", "c")]
    assert media_files(tmp_path / "clip/2.png", left_out) == [tmp_path / "clip/2.png"]
    assert [path.name for path in left_out] == ["notes.txt", "d.heic"]
    for path in ("empty", "lost.mp4", "pipe.mp4"):
        with pytest.raises(UserError, match=path):
            media_files(tmp_path / path, left_out)
    gifs = [animation(tmp_path / f"gifs/{name}", faces) for name in ("1.gif", "2.gif", "10.webp")]
    assert media_files(tmp_path / "gifs", left_out) == gifs, "each is a clip, not a frame of one"


@pytest.mark.parametrize("name, classes", [("synthetic", CLIP_CLASSES), ("synthetic-images", IMAGE_CLASSES)])
def test_own_media_give_the_logits_of_the_data_set_path(faces, name, classes):
    torch.manual_seed(0)
    model, samples = S4D("tiny", IMAGE_CLASSES, CLIP_CLASSES).eval(), load_samples(name, faces, "test")
    tested, files = data.TestData(samples, model.size), [samples.path(i) for i in range(3)]
    own = media_data(files, samples.modality, classes, model.size, samples.stride, crop=None)
    for i in range(3):
        (_, expected, _), (_, views, label) = tested[i], own[i]
        assert torch.equal(views, expected) and label == -1
        assert torch.equal(model(to_float(views)), model(to_float(expected)))
    cropped = media_data(files, samples.modality, classes, model.size, samples.stride, crop=(8, 2, 30, 40))
    cropped.fit.transforms.pop()            # what is cut out before it is resized
    whole = read_clip(files[0], lambda n: [0]) if name == "synthetic" else read_image(files[0])
    assert torch.equal(cropped.fit(whole), whole[..., 2:42, 8:38])


def test_clips_slide_over_a_long_video(faces):
    torch.manual_seed(0)
    model, samples = S4D("tiny", IMAGE_CLASSES, CLIP_CLASSES).eval(), load_samples("synthetic", faces, "test")
    own = media_data([samples.path(0)], "video", CLIP_CLASSES, model.size, 2, None)
    total, sizes, drawn = [], [], []
    read_clip(samples.path(0), lambda n: total.append(n) or [0])
    resize, own.fit = own.fit, lambda frame: sizes.append(frame.shape) or resize(frame)
    report = SimpleNamespace(process=CPU, results={}, picture=lambda name, draw: drawn.append(draw()))
    evaluate.report_time(report, model, own, samples.path(0), total[0], "time", most=3)
    assert sizes and all(len(size) == 3 for size in sizes), "frame by frame: memory follows the model's frames"
    every = list(range(0, total[0], 2))
    starts = [0, round((len(every) - 16) / 2), len(every) - 16]
    rows = report.results["time"]["rows"]
    assert report.results["time"]["columns"] == ["frame", *CLIP_CLASSES]
    assert [row[0] for row in rows] == [every[start + 8] for start in starts]
    for start, (_, *row) in zip(starts, rows):
        clip = resize(read_clip(samples.path(0), lambda n: every[start:start + 16]))
        assert row == pytest.approx(model(to_float(clip[None])).softmax(-1).detach()[0].tolist(), abs=1e-5)
    assert drawn[0].height > 72 + 7 * 20, "frames above the classes"


# ------------------------------------------------------------------------------------------------ the real commands

def save(path, seed=0, fold=1, digests=None, **identity):
    """A fine-tuned checkpoint whose weights are random."""
    torch.manual_seed(seed)
    model = S4D("tiny", IMAGE_CLASSES, CLIP_CLASSES)
    for parameter in model.parameters():
        parameter.data.mul_(2)
    path.parent.mkdir(parents=True, exist_ok=True)
    identity = dict(dataset="synthetic", image_dataset="synthetic-images", fold=fold,
                    pretrained=str(path.parents[1] / "pre.pt"), validation=0.0) | identity
    write(path, dict(stage="finetune", architecture=model.architecture, model=model.state_dict(), identity=identity,
                     digests=digests or {}, state=dict(epoch=1, step=0, losses=[], best=None, left_out={})))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory, faces):
    """Five folds' checkpoints, which say what they were trained on, and one of stage 1."""
    folder = tmp_path_factory.mktemp("evaluated")
    model = MaskedAutoencoder("tiny")
    write(folder / "pre.pt", dict(stage="pretrain", architecture=model.architecture, model=model.state_dict(),
                                  identity=dict(dataset="synthetic-unlabelled", image_dataset="synthetic-images")))
    for fold in range(1, 6):
        train, test = (load_samples("synthetic", faces, split, fold) for split in ("train", "test"))
        save(folder / f"fold{fold}/best.pt", seed=fold, fold=fold, digests={"video": torch.from_numpy(digests_of(train))},
             **{"test video": identity_of(test), "train video": identity_of(train), "video stride": 2})
    return folder


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_five_folds_make_one_uar_and_war(runs, faces):
    folds = [runs / f"fold{fold}/best.pt" for fold in (3, 1, 2, 4, 5)]
    text = run_here(runs, "evaluate.py", "--dataset", "synthetic", "--folds", *folds, "--data-root", faces,
                    "--report", runs / "five")
    results = json.loads((runs / "five/evaluation.json").read_text())
    scores, rows = results["synthetic"], read_csv(runs / "five/predictions-synthetic.csv")
    assert len(rows) == len({row["sample"] for row in rows}) == scores["samples"] == 35
    hits = {name: [row["prediction"] == name for row in rows if row["label"] == name] for name in CLIP_CLASSES}
    assert scores["war"] == pytest.approx(sum(map(sum, hits.values())) / 35)
    assert scores["uar"] == pytest.approx(np.mean([np.mean(of_class) for of_class in hits.values()]))
    for row in rows:
        probabilities = [float(row[name]) for name in CLIP_CLASSES]
        assert row["prediction"] == CLIP_CLASSES[np.argmax(probabilities)]
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
    assert [fold["fold"] for fold in scores["folds"]] == [1, 2, 3, 4, 5]
    wars = [fold["war"] for fold in scores["folds"]]
    assert scores["war_mean"] == pytest.approx(sum(wars) / 5)
    assert [row[2] for row in results["folds"]["rows"]] == [*wars, scores["war_mean"], scores["war_deviation"]]
    for expected in (f"UAR {scores['uar']:.4f}", f"| fold 3    | {scores['folds'][2]['uar']:.4f} |", "| mean ",
                     "| deviation "):
        assert expected in text
    assert "warning" not in text and (runs / "five/confusion-synthetic.png").is_file()


def test_folds_that_do_not_belong_together_are_refused(runs, faces, tmp_path):
    folds = [runs / f"fold{fold}/best.pt" for fold in range(1, 6)]
    leaky = load_samples("synthetic", faces, "test", 5)
    trained_on_test = save(tmp_path / "fold5/best.pt", fold=5,
                           digests={"video": torch.from_numpy(digests_of(leaky)[:3])})
    for given, expected in ((folds[1:], "--folds expects one checkpoint of each fold of synthetic, [1, 2, 3, 4, 5]: "
                             "these are of folds [2, 3, 4, 5]"),
                            (folds + folds[:1], "these are of folds [1, 1, 2, 3, 4, 5]"),
                            (folds[:4] + [trained_on_test], "was trained on 3 of the 7 test samples")):
        text = run_here(tmp_path, "evaluate.py", "--dataset", "synthetic", "--folds", *given, "--data-root", faces,
                        "--output", "out", status=1)
        assert expected in text.splitlines()[-1] and text.splitlines()[-1].startswith("error: ")
    text = run_here(tmp_path, "evaluate.py", "--dataset", "dfew", "--folds", *folds, "--data-root", faces, status=1)
    assert "was trained on synthetic and synthetic-images, not on dfew" in text
    assert not (tmp_path / "out").exists()


def test_other_test_data_than_those_of_training_are_said(runs, faces, tmp_path):
    checkpoint = torch.load(runs / "fold1/best.pt")
    then = checkpoint["identity"]["test video"]
    checkpoint["identity"]["test video"] = other = then[:-16] + "0" * 16
    checkpoint["digests"]["video"] = torch.from_numpy(digests_of(load_samples("synthetic", faces, "test")))
    write(tmp_path / "best.pt", checkpoint)
    command = ("evaluate.py", "--checkpoint", "best.pt", "--dataset", "synthetic", "--data-root", faces)
    text = run_here(tmp_path, *command)
    assert f"{then}; recorded: {other}" in text
    assert "best.pt was trained on 7 of the 7 test samples" in text
    assert len(read_csv(tmp_path / "best/predictions-synthetic.csv")) == 7
    assert identity_of(load_samples("synthetic", faces, "test", stride=1)) != identity_of(load_samples(
        "synthetic", faces, "test")), "16 sampled frames of DFEW are not its whole clips"
    checkpoint["identity"]["validation"] = 0.2          # then other data than the test fold chose the best epoch
    write(tmp_path / "best.pt", checkpoint)
    text = run_here(tmp_path, *command)
    assert "recorded" not in text and "was trained on 7 of the 7 test samples" in text


def test_training_samples_in_a_list_of_another_name_are_said(own, tmp_path):
    samples = load_samples(f"{own}/clips/train.csv", own, "train")
    checkpoint = torch.load(own / "best.pt")
    checkpoint["digests"]["video"] = torch.from_numpy(digests_of(samples)[:4])
    write(tmp_path / "best.pt", checkpoint)
    (own / "clips/other.csv").write_text((own / "clips/train.csv").read_text())
    text = run_here(own / "clips", "evaluate.py", "--checkpoint", tmp_path / "best.pt", "--dataset",
                    "train.csv,other.csv", "--output", tmp_path / "out")
    assert "was trained on 4 of the 7 test samples" in text


def test_a_model_of_images_alone_has_no_head_for_clips(faces):
    samples = load_samples("synthetic-unlabelled", faces, "test")
    with pytest.raises(UserError, match="has the video classes .*, the model was trained without"):
        evaluate.evaluate(S4D("tiny", IMAGE_CLASSES, []), samples, None, 0)


def test_fold_is_that_of_the_set_with_folds(runs, faces, tmp_path):
    text = run_here(tmp_path, "evaluate.py", "--checkpoint", runs / "fold1/best.pt", "--data-root", faces, "--fold",
                    3, "--output", "out")
    assert "synthetic, fold 3: 7 test samples" in text and "synthetic-images: 14 test samples" in text
    text = run_here(tmp_path, "evaluate.py", "--checkpoint", runs / "fold1/best.pt", "--data-root", faces, "--fold",
                    3, "--dataset", "synthetic-images", status=1)
    assert "fold 3 of synthetic-images: expected 1 to 1" in text


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
    torch.manual_seed(0)
    clips, images = (f"{folder}/{kind}/train.csv,{folder}/{kind}/test.csv" for kind in ("clips", "images"))
    for file, stage, model, identity in (
            ("best.pt", "finetune", S4D("tiny", sorted(IMAGE_CLASSES), sorted(CLIP_CLASSES)),
             {"dataset": clips, "image_dataset": images, "fold": 1, "video stride": 3}),
            ("pre.pt", "pretrain", MaskedAutoencoder("tiny"),
             dict(dataset="none", image_dataset=f"{folder}/images/train.csv", image_mask_ratio=0.75))):
        write(folder / file, dict(stage=stage, architecture=model.architecture, model=model.state_dict(),
                                  identity=identity, digests={}))
    return folder


def test_own_clips_and_images_of_one_name_do_not_overwrite_each_other(own):
    run_here(own, "evaluate.py", "--checkpoint", "best.pt", "--workers", 1, "--output", "out")
    assert len(read_csv(own / "out/predictions-videos-train.csv")) == 7
    assert len(read_csv(own / "out/predictions-images-train.csv")) == 14


def test_a_model_of_own_data_needs_no_lists_for_own_media(own, tmp_path):
    (tmp_path / "clip.mp4").symlink_to(own / "clips/faces/00001.mp4")
    text = run_here(tmp_path, "evaluate.py", "--checkpoint", own / "best.pt", "clip.mp4", "--output", "out")
    assert "at stride 3 each" in text


def test_stage_1_of_own_data_without_a_test_file_is_shown_on_its_training_data(own):
    text = run_here(own, "evaluate.py", "--checkpoint", "pre.pt", "--report", "shown")
    assert "| images-train |    75% |      14 |" in text and (own / "shown/reconstruction-images.png").is_file()


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


def test_two_processes_write_the_report_of_one(runs, faces):
    started = []
    for processes in (1, 2):
        (runs / f"report{processes}").mkdir()
        started.append(Forked(runs / f"report{processes}", "evaluate.py", "--checkpoint", "../fold1/best.pt",
                              "--checkpoint", "../fold2/best.pt", "--data-root", faces, "--report", ".", "--workers", 1,
                              processes=processes))
    for process in started:
        ended(process)
    written = sorted(os.listdir(runs / "report1"))
    assert written == sorted(os.listdir(runs / "report2"))
    assert filecmp.cmpfiles(runs / "report1", runs / "report2", written, shallow=False) == (written, [], [])
    results = json.loads((runs / "report1/evaluation.json").read_text())
    assert sorted([*results["files"], "evaluation.json"]) == written
    assert [row[0] for row in results["experts"]["rows"]] == [
        f"{name}, layer {layer}" for name in ("synthetic", "synthetic-images") for layer in (2, 3)]
    assert sum(results["experts"]["rows"][0][1:]) == pytest.approx(1, abs=1e-3)
    assert results["synthetic"]["image_head"]["samples"] == 7
    assert results["2-synthetic-images"]["video_head"]["samples"] == 14
    assert results["heads"]["rows"][0] == ["image head on synthetic", *(results["synthetic"]["image_head"][key]
                                                                       for key in ("uar", "war", "samples"))]
    assert results["similarity"]["columns"][1:] == ["happy", "sad", "neutral", "anger", "surprise", "disgust", "fear"]
    assert results["similarity"]["rows"][1][0] == "sad" and results["similarity"]["rows"][1][6] == pytest.approx(
        similarity_of(runs, faces, "sad", "disgust"), abs=0.02)
    assert 0.9 < dict((row[0], row[4]) for row in results["reconstruction"]["rows"])["synthetic-images"] < 1
    index = (runs / "report1/README.md").read_text()
    pictures = [name for name in written if name.endswith(".png")]
    assert len(pictures) >= 12 and all(f"](<{name}>)" in index for name in pictures)
    for picture in pictures:
        with Image.open(runs / "report1" / picture) as image:
            assert image.width < 1500 and len(image.convert("L").getcolors()) > 5, f"{picture} is empty"


def test_own_media_of_every_kind(runs, faces, tmp_path):
    samples, images = load_samples("synthetic", faces, "test"), load_samples("synthetic-images", faces, "test")
    frames = read_clip(samples.path(0), lambda n: list(range(n)))
    for i, frame in enumerate(frames):
        path = tmp_path / f"media/frames/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(path)
    (tmp_path / "media/clip.mp4").write_bytes(samples.path(0).read_bytes())
    (tmp_path / "media/photo.jpg").write_bytes(images.path(0).read_bytes())
    text = run_here(tmp_path, "evaluate.py", "--checkpoint", runs / "fold1/best.pt", "media", "--output", "out")
    assert "two clips of 16 frames at stride 2 each" in text and "left out" not in text
    clips, photos = read_csv(tmp_path / "out/videos.csv"), read_csv(tmp_path / "out/images.csv")
    assert [row["sample"] for row in clips + photos] == ["media/clip.mp4", "media/frames", "media/photo.jpg"]
    assert list(clips[0].values())[1:] == list(clips[1].values())[1:], "frames are the video's"
    checkpoint = torch.load(runs / "fold1/best.pt")
    model = S4D(**checkpoint["architecture"]).eval()
    model.load_state_dict(checkpoint["model"])
    for row, samples, classes in ((clips[0], samples, CLIP_CLASSES), (photos[0], images, IMAGE_CLASSES)):
        logits = model(to_float(data.TestData(samples, model.size)[0][1]))
        expected = logits.softmax(-1).mean(0).tolist()
        assert [float(row[name]) for name in classes] == pytest.approx(expected, abs=0.01)  # bf16 where it is fast
    results = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert [row[0] for row in results["own videos"]["rows"]] == ["media/clip.mp4", "media/frames"]
    course = results["time-1-clip"]
    assert course["file"] == "media/clip.mp4" and course["columns"] == ["frame", *CLIP_CLASSES]
    assert course["rows"][0][0] == 16 and all(sum(row[1:]) == pytest.approx(1) for row in course["rows"])
    assert {"time-1-clip.png", "time-2-frames.png"} < set(os.listdir(tmp_path / "out"))


def test_animations_are_clips_and_what_is_no_media_is_named(runs, faces, tmp_path):
    files = [animation(tmp_path / f"own/{name}", faces, 40) for name in ("1.webp", "2.webp", "10.gif")]
    (tmp_path / "own/notes.txt").write_text("")
    (tmp_path / "own/photo.heic").write_text("")
    text = run_here(tmp_path, "evaluate.py", "--checkpoint", runs / "fold1/best.pt", "own", "--output", "out")
    assert "left out, as their suffix is no image's and no video's: 2: own/notes.txt, own/photo.heic" in text
    clips = read_csv(tmp_path / "out/videos.csv")
    assert [row["sample"] for row in clips] == [f"own/{path.name}" for path in files]
    assert list(clips[0].values())[1:] == list(clips[1].values())[1:], "the same frames"
    (tmp_path / "frames").mkdir()
    for i, frame in enumerate(read_clip(files[0], lambda n: list(range(n)))):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(tmp_path / f"frames/{i}.png")
    run_here(tmp_path, "evaluate.py", "--checkpoint", runs / "fold1/best.pt", "frames", "--output", "again")
    assert list(read_csv(tmp_path / "again/videos.csv")[0].values())[1:] == list(clips[0].values())[1:]


def test_results_are_written_whole_or_not_at_all(runs, faces, tmp_path, monkeypatch):
    command = ("evaluate.py", "--data-root", faces, "--dataset", "synthetic-images", "--checkpoint")
    run_here(tmp_path, *command, runs / "fold1/best.pt", "--report", "out")
    other = runs / "fold2/best.pt"
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(*arguments):
        raise UserError("too late")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "attention_sheet", fail)
        for output in ("out", "new"):
            assert "too late" in run_here(tmp_path, *command, other, "--report", output, status=1)
    with monkeypatch.context() as patch:            # a disk that is full at the last file
        write_bytes, left = Path.write_bytes, iter(range(5))

        def fill(path, content):
            if next(left, None) is None:
                raise OSError(28, "No space left on device")
            return write_bytes(path, content)
        patch.setattr(Path, "write_bytes", fill)
        assert "No space left" in run_here(tmp_path, *command, other, "--report", "out", status=1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_results_of_an_earlier_command_do_not_stay_among_the_new(runs, faces, tmp_path):
    command = ("evaluate.py", "--checkpoint", runs / "fold1/best.pt", "--data-root", faces, "--report", "out")
    run_here(tmp_path, *command, "--checkpoint", runs / "fold2/best.pt")
    (tmp_path / "out/mine.txt").write_text("mine")
    assert (tmp_path / "out/predictions-2-synthetic.csv").exists() and list((tmp_path / "out").glob("time-*.png"))
    run_here(tmp_path, *command, "--dataset", "synthetic-images")
    listed = json.loads((tmp_path / "out/evaluation.json").read_text())["files"]
    assert {*listed, "evaluation.json", "mine.txt"} == set(os.listdir(tmp_path / "out"))
    assert "predictions-synthetic-images.csv" in listed and not [name for name in listed if "2-" in name]


def test_results_of_last_and_best_lie_beside_each_other(runs, faces, tmp_path):
    for name in ("last", "best"):
        save(tmp_path / f"run/{name}.pt", seed=ord(name[0]))
        run_here(tmp_path, "evaluate.py", "--checkpoint", f"run/{name}.pt", "--data-root", faces, "--dataset",
                 "synthetic")
        run_here(tmp_path, "evaluate.py", "--checkpoint", f"run/{name}.pt",
                 load_samples("synthetic-images", faces, "test").path(0))
    for name in ("last", "best"):
        assert sorted(os.listdir(tmp_path / f"run/{name}")) == ["evaluation.json", "media", "predictions-synthetic.csv"]
        assert sorted(os.listdir(tmp_path / f"run/{name}/media")) == ["evaluation.json", "images.csv"]
    last, best = (read_csv(tmp_path / f"run/{name}/predictions-synthetic.csv") for name in ("last", "best"))
    assert last != best


def test_long_names_of_own_files_are_shortened(runs, faces, tmp_path):
    clip = tmp_path / f"{'ä' * 120}.mp4"
    clip.write_bytes(load_samples("synthetic", faces, "test").path(0).read_bytes())
    run_here(tmp_path, "evaluate.py", "--checkpoint", runs / "fold1/best.pt", clip, "--output", "out")
    assert f"time-1-{'ä' * 40}.png" in os.listdir(tmp_path / "out")


def test_own_media_that_cannot_be_used_are_named_before_any_work(runs, faces, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    clip = load_samples("synthetic", faces, "test").path(0)
    text = run_here(tmp_path, "evaluate.py", "--checkpoint", runs / "fold1/best.pt", "--output", "out", clip,
                    "broken.mp4", status=1)
    assert "broken.mp4 cannot be decoded" in text and not (tmp_path / "out").exists()
    text = run_here(tmp_path, "evaluate.py", "--checkpoint", runs / "fold1/best.pt", "--crop", "40,0,40,20", clip,
                    status=1)
    assert f"{clip}, 64 x 64 pixels, does not hold --crop (40, 0, 40, 20)" in text


def test_a_stage_1_checkpoint_is_shown_by_its_reconstructions(runs, faces, tmp_path):
    text = run_here(tmp_path, "evaluate.py", "--checkpoint", runs / "pre.pt", "--data-root", faces, "--report",
                    "shown")
    assert "|    95% |      32 |" in text and "|    90% |      14 |" in text
    results = json.loads((tmp_path / "shown/evaluation.json").read_text())["reconstruction"]["rows"]
    assert [row[0] for row in results] == ["synthetic-unlabelled", "synthetic-images"]
    assert set(os.listdir(tmp_path / "shown")) == {"reconstruction-images.png", "reconstruction-videos.png",
                                                   "README.md", "evaluation.json"}


@pytest.mark.parametrize("arguments, expected", [
    ([], "one of the arguments --checkpoint --folds is required"),
    (["--checkpoint", "a.pt", "--folds", "b.pt"], "argument --folds: not allowed with argument --checkpoint"),
    (["--checkpoint", "a.pt", "--checkpoint", "b.pt", "clip.mp4"], "expected --checkpoint once, or twice without FILE"),
    (["--folds", "a.pt"], "--folds expects --dataset"),
    (["--folds", "a.pt", "--dataset", "dfew", "--fold", "2"], "--folds expects --dataset, and neither FILE nor --fold"),
    (["--checkpoint", "a.pt", "--report", "a", "--output", "b"], "--output: not allowed with argument --report"),
    (["--checkpoint", "a.pt", "--output", f"{__file__}/x"], f"{__file__} is no folder"),
    (["--checkpoint", "a.pt", "--crop", "1,2,3,4"], "--crop cuts the face out of FILE"),
    (["--checkpoint", "a.pt", "--report", str(ROOT)], "the README.md there is not a report's"),
    (["--checkpoint", "a.pt", "--workers", "-1"], "-1: expected 0 or more"),
    (["--checkpoint", "a.pt", "--crop", "1,2,3", "clip.mp4"], "argument --crop: invalid box value: '1,2,3'"),
    (["--checkpoint", "a.pt", "--crop=-1,2,3,4", "clip.mp4"], "-1: expected 0 or more")])
def test_wrong_commands_say_what_they_expect(tmp_path, arguments, expected):
    assert expected in run_here(tmp_path, "evaluate.py", *arguments, status=2)
