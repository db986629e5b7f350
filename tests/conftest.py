"""Shared by all tests: the project on the import path, small synthetic data, and the real commands, in a subprocess or
in this process."""
import contextlib
import importlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""     # before torch is imported: a GPU adds up in no fixed order (test_gpu.py)
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from faces import write_faces  # noqa: E402  (needs the path above)
from pretrain import guarded  # noqa: E402


@pytest.fixture(scope="session")
def faces(tmp_path_factory) -> Path:
    """A data root with few synthetic faces: 105 + 14 images, 35 labelled clips, 80 videos."""
    root = tmp_path_factory.mktemp("data")
    write_faces(root / "synthetic", seed=0, scale=0.05)
    return root


def start_command(folder: Path, script: str, *arguments, processes: int = 1) -> subprocess.Popen:
    """Start one of the project's scripts in a folder of its own; `processes` > 1 goes through torchrun."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen([*launcher, str(ROOT / script), *map(str, arguments)], cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"COLUMNS": "100"})


def run_command(folder: Path, script: str, *arguments, processes: int = 1, status: int = 0) -> str:
    """Run a script to its end; returns what it printed, and fails if it ends with another exit status."""
    process = start_command(folder, script, *arguments, processes=processes)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, f"exit status {process.returncode}:\n{output}"
    return output


def quick(script, *arguments) -> None:
    """A script's main in this process, without the seconds that a new one takes to start."""
    try:
        with mock.patch("sys.argv", [script.__name__, *map(str, arguments)]):
            script.main()
    finally:                                # start() catches them
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def run_here(folder: Path, script: str, *arguments, status: int = 0) -> str:
    """run_command in this process; an error that is not expected is raised."""
    output, found = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True), 0  # evaluate.py reconfigures it
    with contextlib.chdir(folder), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            guarded(lambda: quick(importlib.import_module(Path(script).stem), *arguments))
        except SystemExit as end:
            found = end.code
            if isinstance(found, str):      # a message means status 1
                print(found)
                found = 1
    text = output.buffer.getvalue().decode(errors="surrogateescape")
    assert found == status, f"exit status {found}:\n{text}"
    return text
