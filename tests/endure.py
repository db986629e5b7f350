"""Kill real training processes at random moments, continue each time, and compare with a run that nobody disturbed.

    python tests/endure.py              30 kills of both stages, by one process and by two; status 1 if a bit differs
    python tests/endure.py --kills 3    fewer; the suite does this too (test_resume.py)

A checkpoint is written after every step (--save-minutes 0), so that many kills fall into the writing of one.
"""
import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from faces import write_faces  # noqa: E402  (needs the path above)
from model import read_checkpoint  # noqa: E402


def start(folder: Path, script: str, *arguments, processes: int = 1, restarts: int = 0) -> subprocess.Popen:
    """A training script, alone or through torchrun, its output in a file."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--max-restarts={restarts}",
                     "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    with open(folder / "output.txt", "a") as output:
        return subprocess.Popen([*launcher, str(ROOT / script), *map(str, arguments)], cwd=folder, stdout=output,
                                stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, folder: Path, status: int = 0) -> None:
    """Wait for the end; its output in an error if the exit status is another one."""
    if process.wait(timeout=600) != status:
        raise AssertionError(f"exit status {process.returncode}: {(folder / 'output.txt').read_text()[-3000:]}")


def written(output: Path) -> int:
    """When the newest checkpoint was written, in nanoseconds; 0 without one."""
    times = [0]
    for path in output.glob("*.pt"):
        with contextlib.suppress(FileNotFoundError):  # it has just been renamed
            times.append(path.stat().st_mtime_ns)
    return max(times)


def wait_for_a_step(process: subprocess.Popen, output: Path, timeout: float = 120) -> None:
    """Until the process has written a checkpoint of its own, or ended."""
    before, until = written(output), time.monotonic() + timeout
    while process.poll() is None and written(output) == before:
        if time.monotonic() > until:
            raise AssertionError(f"no checkpoint in {output} within {timeout} seconds")
        time.sleep(0.002)


def processes_of(output: Path) -> list[int]:
    """Every process whose command line names the run's folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if os.fsencode(output) in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def kill_all(output: Path) -> None:
    """SIGKILL to every process of a run, until there is none."""
    while numbers := processes_of(output):
        for number in numbers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.01)


def kill_and_continue(folder: Path, command: list, kills: int, processes: int, dice: random.Random) -> tuple[int, int]:
    """SIGKILL to all processes of a run, `kills` times, then let it end. Returns how many kills fell into its training
    and how many of these into the writing of a checkpoint."""
    output = Path(command[command.index("--output") + 1])
    in_training = in_writing = 0
    for number in range(kills):
        process = start(folder, *command, processes=processes)
        if number % 6 == 5:                 # while it starts, or reads a checkpoint
            time.sleep(dice.uniform(0, 3))
        else:
            wait_for_a_step(process, output)
            time.sleep(dice.uniform(0, 0.4))
        alive = process.poll() is None
        kill_all(output)
        process.wait()
        unfinished = list(output.glob("*.part"))
        in_training += alive
        in_writing += alive and bool(unfinished)
        for path in output.glob("*.pt"):
            read_checkpoint(path)           # whatever was killed, what is there is whole
        for path in unfinished:
            path.unlink()                   # to tell the next kill's own from it; the run itself writes over it
    finish(start(folder, *command, processes=processes), folder)
    return in_training, in_writing


def differences(one: Path, two: Path) -> list[str]:
    """What differs between two runs' last checkpoints and logs, times aside: nothing, if nothing was lost."""
    first, second = (read_checkpoint(path / "last.pt") for path in (one, two))
    found = [f"weight {key}" for key in first["model"] if not torch.equal(first["model"][key], second["model"][key])]
    states = [checkpoint["optimizer"]["state"] for checkpoint in (first, second)]
    found += [f"optimiser state {i} {key}" for i in states[0] for key in states[0][i]
              if not torch.equal(states[0][i][key], states[1][i][key])]
    logs = [[{key: value for key, value in json.loads(line).items() if "seconds" not in key}
             for line in (path / "log.jsonl").read_text().splitlines()] for path in (one, two)]
    found += [f"epoch {i + 1} of the log" for i, pair in enumerate(zip(*logs)) if pair[0] != pair[1]]
    return found + (["the logs' lengths"] if len(logs[0]) != len(logs[1]) else [])


def endure(folder: Path, data_root: Path, script: str, epochs: int, kills: int, processes: int, seed: int,
           *more) -> str:
    """Compare an undisturbed run with one that was killed; returns a line on it, AssertionError if they differ."""
    common = [script, "--dataset", "synthetic", "--data-root", data_root, "--epochs", epochs, "--resume",
              "--micro-batch", 8, "--save-minutes", 0, "--workers", 1, "--precision", "fp32", *more]
    name = f"{Path(script).stem}-{processes}"
    whole = start(folder, *common, "--output", folder / f"{name}-whole", processes=processes)
    done, in_writing = kill_and_continue(folder, [*common, "--output", folder / f"{name}-killed"], kills, processes,
                                         random.Random(seed))
    finish(whole, folder)
    found = differences(folder / f"{name}-whole", folder / f"{name}-killed")
    if found:
        raise AssertionError(f"{name}: after {kills} kills these differ: {', '.join(found[:5])}")
    return (f"{script}, {processes} process{'es' if processes > 1 else ''}: {kills} kills, {done} in mid-run, "
            f"{in_writing} of them while a checkpoint was being written: all weights, optimiser states and losses of "
            f"{epochs} epochs equal bit for bit")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=30, help="in all")
    p.add_argument("--seed", type=int, default=0, help="of the moments")
    args = p.parse_args()
    share = -(-args.kills // 3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_faces(folder / "synthetic", scale=0.05)
        try:
            print(endure(folder, folder, "pretrain.py", 40, share, 1, args.seed), flush=True)
            print(endure(folder, folder, "finetune.py", 60, share, 1, args.seed + 1, "--pretrained",
                         folder / "pretrain-1-whole/last.pt"), flush=True)
            print(endure(folder, folder, "pretrain.py", 20, args.kills - 2 * share, 2, args.seed + 2), flush=True)
        except AssertionError as error:
            raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
