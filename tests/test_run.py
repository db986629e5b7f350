"""The real commands: both stages and the evaluation, in forked processes, alone and as two, and what they say when
something is wrong."""
import io
import json
import re
import shutil
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
from conftest import Forked, ended, exit_status, quick, run_command, run_here

import data
import finetune
import model
import pretrain
from pretrain import guarded

SMALL = ["--dataset", "synthetic", "--batch-size", "16", "--micro-batch", "8", "--workers", "1"]


def log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder) -> list:
    """Modality and loss of every step of a run."""
    return [tuple(step) for epoch in log(folder) for step in epoch["losses"]]


def assert_same_losses(one, two, steps):
    assert [modality for modality, _ in one] == [modality for modality, _ in two]
    assert {modality for modality, _ in one} == {"image", "video"}
    assert len(one) >= steps
    assert [loss for _, loss in one[:steps]] == pytest.approx([loss for _, loss in two[:steps]], rel=2e-3)


@pytest.fixture(scope="module", autouse=True)
def few_layers():
    """Half as many layers, here and in forked processes: what is tested is the commands, not the model."""
    with mock.patch.dict(model.SIZES, tiny=replace(model.SIZES["tiny"], depth=2, decoder_depth=1)):
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory, faces):
    """Both stages by one process and by two, the second stage of each from the first stage's single-process result."""
    folder = tmp_path_factory.mktemp("runs")
    pre, fine = commands(folder, faces)
    together = Forked(folder, *pre, "--output", folder / "pre2", processes=2)
    printed = {"pretrain": run_command(folder, *pre, "--output", folder / "pre1")}
    ended(together)
    together = Forked(folder, *fine, "--output", folder / "fine2", processes=2)
    printed["finetune"] = run_command(folder, *fine, "--output", folder / "fine1")
    ended(together)
    return folder, printed


def commands(folder, faces) -> tuple[list, list]:
    common = [*SMALL, "--data-root", faces]
    return (["pretrain.py", *common, "--epochs", 2],
            ["finetune.py", *common, "--epochs", 3, "--warmup-epochs", 1, "--image-batch-size", 16, "--pretrained",
             folder / "pre1/last.pt"])


def test_both_stages_run_and_say_what_they_derived(runs):
    _, printed = runs
    for expected in ("M parameters; 1 process(es) on cpu, fp32: products in fp32 take 0.50 of their time in bf16 here",
                     "peak learning rate", "micro-batches of 8", "'video': 124", "'image': 26"):
        assert expected in printed["pretrain"]
    for expected in ("made new: fc_norm, head, moe_layer", "dropped: decoder"):
        assert expected in printed["finetune"]


def test_every_epoch_is_a_line_and_every_stage_names_the_next_command(runs, faces):
    folder, printed = runs
    loss, time = r"loss \d\.\d+", r"\d+ s, \d+\.\d min left"
    printed = {stage: text.replace("\r", "\n") for stage, text in printed.items()}  # of the bars
    lines = re.findall(rf"^epoch \d/2  videos: {loss}  images: {loss}  {time}$", printed["pretrain"], re.M)
    assert len(lines) == 2
    uar = r", test UAR 0\.\d+"             # after every second epoch and the last
    lines = re.findall(rf"^epoch \d/3  videos: {loss}({uar})?  images: {loss}({uar})?  {time}$", printed["finetune"],
                       re.M)
    assert [[text != "" for text in line] for line in lines] == [[False] * 2, [True] * 2, [True] * 2]
    for stage, output, options in (("pretrain", "pre1", "finetune.py --dataset synthetic --pretrained {}/last.pt"),
                                   ("finetune", "fine1", "evaluate.py --checkpoint {}/last.pt --report {}/report")):
        command = f"Next: python {options} --data-root {faces}".replace("{}", str(folder / output))
        assert printed[stage].splitlines()[-1] == command
    tested = [record for record in log(folder / "fine1") if "test" in record]
    shown = [tuple(f", test UAR {record['test'][m]['uar']:.3f}" for m in ("video", "image")) for record in tested]
    assert lines[1:] == shown, "what the log has is what is printed"
    best = max(tested, key=lambda record: record["score"])["epoch"]     # the first one of equal ones
    assert f"\nbest.pt is epoch {best}, chosen by WAR on the test fold itself\n" in printed["finetune"]
    assert model.read_checkpoint(folder / "fine1/best.pt")["state"]["epoch"] == best


@pytest.mark.parametrize("stage, steps", [("pre", 20), ("fine", 12)])
def test_two_processes_follow_the_losses_of_one(runs, stage, steps):
    folder, _ = runs
    assert_same_losses(losses(folder / f"{stage}1"), losses(folder / f"{stage}2"), steps)


def test_compiled_layers_follow_the_losses_and_are_compiled_in_the_first_epoch_only(runs, faces, monkeypatch):
    folder, compile_module = runs[0], torch.nn.Module.compile

    def compile_and_say(module, **options):
        torch.compiler.reset()              # of what was compiled before in this process
        torch._logging.set_logs(recompiles=True)
        compile_module(module, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_and_say)
    pre, fine = commands(folder, faces)
    started = [Forked(folder, *command, "--compile", "aot_eager", "--output", folder / f"compiled-{command[0]}")
               for command in (pre, [*fine, "--test-every", 1])]
    for process, stage, plain, steps in zip(started, ("pretrain", "finetune"), ("pre1", "fine1"), (20, 12)):
        output = ended(process)
        first, later = output.split("epoch 2/", 1)
        assert "Recompiling function" in first, "the two kinds of batch have different shapes"
        assert "Recompiling function" not in later and "recompile_limit" not in output
        assert_same_losses(losses(folder / f"compiled-{stage}.py"), losses(folder / plain), steps)


def test_compiling_without_a_compiler_is_a_line(runs, faces, monkeypatch):
    monkeypatch.setenv("PATH", "")
    for command in commands(runs[0], faces):
        text = run_here(runs[0], *command, "--compile", "--output", runs[0] / f"no-{command[0]}", status=1)
        line = text.splitlines()[-1]
        assert line.startswith("error: ") and "No working C++ compiler" in line and "Traceback" not in text
        assert line.endswith("; --compile aot_eager needs none")


def test_a_fixed_part_of_every_frame_and_the_size_of_the_pretrained_model(runs, faces, tmp_path, monkeypatch):
    """--crop is for clips alone; --size is taken from --pretrained, and may not contradict it."""
    seen = {}
    monkeypatch.setattr(finetune, "train", lambda *given: seen.update(given[-2].sources) or sys.exit())
    command = ["finetune.py", "--data-root", faces, "--dataset", "synthetic", "--crop", "4,0,40,48", "--pretrained",
               runs[0] / "pre1/last.pt"]
    run_here(tmp_path, *command, "--output", tmp_path / "run")
    assert seen["video"].samples.box == (4, 0, 40, 48) and seen["image"].samples.box is None
    text = run_here(tmp_path, *command, "--size", "base", "--output", tmp_path / "base", status=1)
    assert "this file is size tiny: --size tiny" in text
    monkeypatch.setattr(finetune, "start", lambda size, precision: sys.exit(f"size {size}"))
    command[4:5] = ["none", "--image-dataset", "synthetic-images"]
    assert run_here(tmp_path, *command, status=1).endswith("size tiny\n")
    assert run_here(tmp_path, *command[:-2], status=1).endswith("size base\n")


@pytest.mark.parametrize("closed", [False, True])
def test_results_are_written_whatever_the_terminal_shows(faces, tmp_path, monkeypatch, closed):
    """One of cp1252, which has no Chinese letters, or none at all."""
    (tmp_path / "\u6570\u636e").symlink_to(faces)
    streams = [None if closed else io.TextIOWrapper(io.BytesIO(), "cp1252", write_through=True) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    assert exit_status(lambda: guarded(lambda: quick(
        pretrain, "--dataset", "synthetic", "--image-dataset", "none", "--data-root", tmp_path / "\u6570\u636e",
        "--epochs", 1, "--workers", 0, "--output", tmp_path / "run"))) == 0
    assert len(log(tmp_path / "run")) == 1
    assert closed or b"\\u6570\\u636e" in streams[0].buffer.getvalue()


def test_evaluation_by_two_processes_is_exactly_that_of_training_by_one(runs, faces):
    folder, _ = runs
    text = run_command(folder, "evaluate.py", "--checkpoint", folder / "fine1/last.pt", "--data-root", faces,
                       "--workers", 1, "--report", folder / "evaluation", processes=2)
    assert "synthetic, fold 1: 7 test samples" in text and "synthetic-images: 14 test samples" in text
    report = json.loads((folder / "evaluation/evaluation.json").read_text())
    assert sum(map(sum, report["synthetic"]["confusion"])) == 7, "no sample may be counted twice"
    last = log(folder / "fine1")[-1]
    assert last["test"]["video"]["confusion"] == report["synthetic"]["confusion"]
    assert last["test"]["image"]["confusion"] == report["synthetic-images"]["confusion"]


def test_checkpoints_hold_plain_data_and_rebuild_their_module(runs):
    folder, _ = runs
    for name in ("pre1/last.pt", "fine1/last.pt", "fine1/best.pt"):
        checkpoint = torch.load(folder / name, weights_only=True)
        module = model.load_checkpoint(folder / name)
        assert isinstance(module, model.MaskedAutoencoder if "pre" in name else model.S4D)
        assert all(torch.equal(value, checkpoint["model"][key]) for key, value in module.state_dict().items())
        assert checkpoint["state"]["epoch"] >= 1
        dataset = "synthetic-unlabelled" if "pre" in name else "synthetic"
        assert checkpoint["identity"]["dataset"] == dataset and checkpoint["identity"]["video stride"] == 2
    assert module.architecture["video_classes"] == list(data.DFEW)


def test_a_finished_run_is_not_overwritten(runs, faces):
    folder, _ = runs
    text = run_here(folder, "pretrain.py", *SMALL, "--data-root", faces, "--output", folder / "pre1", status=1)
    assert "last.pt exists: give --resume" in text


def test_validation_data_can_choose_the_best_epoch(runs, faces):
    folder, _ = runs
    text = run_here(folder, "finetune.py", *SMALL, "--data-root", faces, "--epochs", 1, "--warmup-epochs", 0,
                    "--validation", 0.25, "--augment", "paper", "--mixing", 1, "--pretrained", "none",
                    "--output", folder / "held")
    assert "best.pt is epoch 1, chosen by WAR on held-out training data" in text and "trained from scratch" in text
    assert ", validation UAR " in text
    assert "held/best.pt --report" in text.splitlines()[-1], "the test data are left to evaluate.py"
    record, = log(folder / "held")
    assert sum(map(sum, record["validation"]["video"]["confusion"])) == 7 and "test" not in record  # a quarter of 28


@pytest.mark.parametrize("status, arguments, expected", [
    (1, ["finetune.py", "--fold", 6], "fold 6 of dfew: expected 1 to 5"),
    (2, ["finetune.py", "--fold", 0], "argument --fold: 0: expected 1 or more"),
    (1, ["finetune.py", "--dataset", "celebs"], "unknown data set 'celebs'"),
    (2, ["finetune.py", "--crop", "1,2,3"], "argument --crop"),
    (1, ["finetune.py"], "DFEW/clip_jpg_256"),
    (1, ["finetune.py"], "python tests/faces.py"),
    (1, ["pretrain.py"], "VoxCeleb2/dev/mp4"),
    (1, ["finetune.py", "--dataset", "synthetic", "--pretrained", "lost.pt"],
     "checkpoint lost.pt: run pretrain.py first"),
    (1, ["finetune.py", "--dataset", "synthetic", "--pretrained", "none", "--k", 9], "k = 9: expected 1 to 8"),
    (1, ["pretrain.py", "--dataset", "synthetic", "--image-mask-ratio", 0.01], "mask ratio 0.01 of 36 tokens"),
    (2, ["pretrain.py", "--lr", "nan"], "argument --lr: nan: expected 0 or more"),
    (2, ["pretrain.py", "--image-mask-ratio", 1.5], "argument --image-mask-ratio: 1.5: expected 0 to 1"),
    (1, ["evaluate.py", "--checkpoint", "lost.pt"], "there is no checkpoint lost.pt"),
])
def test_wrong_commands_end_in_one_message(tmp_path, faces, monkeypatch, status, arguments, expected):
    """Which under torchrun is what it finds in a file, if the options are none that argparse refuses."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    if "synthetic" in arguments:
        arguments = [*arguments, "--data-root", faces]
    assert expected in run_here(tmp_path, *arguments, status=status)
    if status == 1:
        assert expected in json.loads((tmp_path / "error.json").read_text(encoding="utf-8"))["message"]["message"]


def test_a_stage_1_checkpoint_is_not_evaluated(runs, faces):
    folder, _ = runs
    text = run_here(folder, "evaluate.py", "--checkpoint", folder / "pre1/last.pt", "--data-root", faces, status=1)
    assert "is a stage-1 checkpoint" in text


def test_damaged_data_stops_training_and_evaluation_with_the_files_name(runs, faces, tmp_path):
    folder, _ = runs
    shutil.copytree(faces / "synthetic", tmp_path / "synthetic")
    for clip in sorted((tmp_path / "synthetic/DFEW/clip_jpg_256").iterdir()):
        clip.write_bytes(clip.read_bytes()[:800])
    command = ["--data-root", tmp_path, "--workers", 1]
    text = run_here(folder, "evaluate.py", "--checkpoint", folder / "fine1/last.pt", *command, status=1)
    assert "00001.mp4" in text
    text = run_here(folder, "finetune.py", "--dataset", "synthetic", *command, "--pretrained", "none", "--output",
                    tmp_path / "run", status=1)
    assert ".mp4" in text and "Traceback" not in text
