"""On a GPU, where there is one: all other tests run on the CPU, whose sums are taken in the same order every time."""
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, run_command

pytestmark = pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="this machine has no GPU")


def on_gpu(folder, script: str, *arguments) -> str:
    """run_command with the GPU in sight, which conftest.py hides."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], cwd=folder, env=environment,
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    assert done.returncode == 0, done.stdout
    return done.stdout


def losses(folder) -> list[float]:
    return [loss for line in (folder / "log.jsonl").read_text().splitlines() for _, loss in json.loads(line)["losses"]]


def test_both_stages_and_the_evaluation_run_on_a_gpu_with_the_losses_of_a_cpu(tmp_path, faces):
    common = ["--dataset", "synthetic", "--data-root", faces, "--workers", 1, "--epochs", 1]
    for script, more in (("pretrain.py", []), ("finetune.py", ["--pretrained", tmp_path / "gpu-pretrain.py/last.pt"])):
        text = on_gpu(tmp_path, script, *common, *more, "--output", tmp_path / f"gpu-{script}")
        assert "on cuda" in text
        run_command(tmp_path, script, *common, *more, "--output", tmp_path / f"cpu-{script}")
        # Masks and noise are drawn by another generator, so that only the size of the losses is the same.
        gpu, cpu = (losses(tmp_path / f"{device}-{script}") for device in ("gpu", "cpu"))
        assert len(gpu) == len(cpu) and sum(gpu) / len(gpu) == pytest.approx(sum(cpu) / len(cpu), rel=0.1)
    text = on_gpu(tmp_path, "evaluate.py", "--checkpoint", tmp_path / "gpu-finetune.py/last.pt", "--data-root", faces,
                  "--output", tmp_path / "out")
    assert "UAR" in text


def test_a_run_goes_on_on_a_gpu(tmp_path, faces):
    command = ["pretrain.py", "--dataset", "synthetic", "--data-root", faces, "--workers", 1, "--output", tmp_path / "r"]
    on_gpu(tmp_path, *command, "--epochs", 1)
    checkpoint = tmp_path / "r/last.pt"
    import torch
    saved = torch.load(checkpoint, weights_only=True)
    saved["state"] = dict(saved["state"], epoch=0, step=3)
    torch.save(saved, checkpoint)
    assert "resumed from" in on_gpu(tmp_path, *command, "--epochs", 1, "--resume")
