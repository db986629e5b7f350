"""Shared by all tests: the project on the import path, small synthetic data, and the real commands, by a process forked
from this one or in this process. endure.py's `start` runs them by a new Python and torchrun."""
import contextlib
import importlib
import io
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from unittest import mock

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""     # before torch is imported: a GPU adds up in no fixed order (test_gpu.py)
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import pretrain  # noqa: E402  (needs the path above)
from faces import write_faces  # noqa: E402
from pretrain import guarded  # noqa: E402

pretrain.product_seconds = lambda width: [1.0, 2.0]  # fp32 whatever is fast here: bits are compared
torch.set_num_threads(1)                    # as the scripts do for size tiny, whose products are too small to share
tqdm.set_lock(threading.RLock())            # its own is shared by forked processes, of which a killed one may hold it


@pytest.fixture(scope="session")
def faces(tmp_path_factory) -> Path:
    """A data root with few synthetic faces: 105 + 14 images, 35 labelled clips, 80 videos."""
    root = tmp_path_factory.mktemp("data")
    write_faces(root / "synthetic", seed=0, scale=0.05)
    return root


def ended(process, status: int = 0) -> str:
    """Wait for what Forked has started; returns what it printed, and fails if it ends with another exit status."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, f"exit status {process.returncode}:\n{output}"
    return output


class Forked:
    """One of the project's scripts, started in a folder of its own without the five seconds that a new Python takes to
    import torch: its process is forked from this one; `processes` > 1 meet as torchrun's do. Each leads a process
    group, and whatever is patched here is patched there. Has what the tests need of subprocess.Popen."""

    def __init__(self, folder: Path, script: str, *arguments, processes: int = 1):
        self.output, self.statuses = tempfile.TemporaryFile(), {}
        with socket.socket() as free:
            free.bind(("localhost", 0))
            ranks = [dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes,
                          MASTER_ADDR="localhost", MASTER_PORT=free.getsockname()[1]) for rank in range(processes)]
        self.pids = []
        for rank in ranks:
            self.pids.append(os.fork())
            if self.pids[-1] == 0:
                self.become(folder, script, arguments, rank if processes > 1 else {})

    def become(self, folder: Path, script: str, arguments, environment: dict) -> None:
        """What the forked process does, to its end."""
        status = 1
        try:
            os.setsid()
            for number in (1, 2):
                os.dup2(self.output.fileno(), number)
            sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ |= {"COLUMNS": "100"} | {name: str(value) for name, value in environment.items()}
            os.chdir(folder)
            sys.argv = [str(script), *map(str, arguments)]
            module = importlib.import_module(Path(script).stem)
            status = exit_status(lambda: guarded(module.main))
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def poll(self) -> int | None:
        """The exit status, 0 or another one of the processes', when all have ended."""
        for pid in self.pids:
            if pid not in self.statuses and (found := os.waitpid(pid, os.WNOHANG))[0]:
                self.statuses[pid] = os.waitstatus_to_exitcode(found[1])
        return next(filter(None, self.statuses.values()), 0) if len(self.statuses) == len(self.pids) else None

    returncode = property(poll)

    def wait(self, timeout: float) -> int:
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                self.kill()
                raise TimeoutError(f"longer than {timeout} seconds:\n{self.text()}")
            time.sleep(0.01)
        return self.returncode

    def text(self) -> str:
        """What the processes have printed so far; they share the file's position, which stays where it is."""
        return os.pread(self.output.fileno(), 1 << 24, 0).decode(errors="replace")

    def communicate(self, timeout: float) -> tuple[str, None]:
        self.wait(timeout)
        return self.text(), None

    def send_signal(self, number: int, group: bool = False) -> None:
        """group: to the loading processes too, as a terminal or a batch system does."""
        for pid in self.pids:
            if pid not in self.statuses:
                (os.killpg if group else os.kill)(pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL, group=True)


def run_command(folder: Path, script: str, *arguments, processes: int = 1, status: int = 0) -> str:
    """Run a script to its end in forked processes; returns what it printed."""
    return ended(Forked(folder, script, *arguments, processes=processes), status)


def exit_status(function) -> int:
    """As Python ends with after the function: a message is printed and means 1."""
    try:
        function()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return 1 if isinstance(end.code, str) else end.code or 0
    finally:                                # guarded() has removed it: the next loader is to set it again
        torch.utils.data._utils.signal_handling._SIGCHLD_handler_set = False
    return 0


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
    output = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)  # evaluate.py reconfigures it
    with contextlib.chdir(folder), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        found = exit_status(lambda: guarded(lambda: quick(importlib.import_module(Path(script).stem), *arguments)))
    text = output.buffer.getvalue().decode(errors="surrogateescape")
    assert found == status, f"exit status {found}:\n{text}"
    return text
