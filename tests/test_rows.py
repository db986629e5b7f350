"""tests/paper.md: its commands run on small drawn faces, and what it derives from the paper's numbers holds."""
import contextlib
import io
import json
import re
import shlex

import pytest
from conftest import ROOT, run_here

from model import load_checkpoint

ROWS = (ROOT / "tests/paper.md").read_text().split("## 2. Every row")[1]
RUNS = dict(re.findall(r"^\| ([\w-]+) \| `((?:pretrain|finetune)\.py [^`]+)`", ROWS, re.MULTILINE))
EVALUATIONS = re.findall(r"`(evaluate\.py -[^`]+)`", ROWS)
TWELVE_AS_FOUR = {"10,11": "3", "8,9,10,11": "2,3", "4,5,6,7,8,9,10,11": "1,2,3",
                  "0,1,2,3,4,5,6,7,8,9,10,11": "0,1,2,3"}
# The layers with experts that a run's model must have, of four, and how many experts. All others: (2, 3) and 8.
EXPECTED = {"videomae": ([], 8), "vit": ([], 8), "vit-mtl": ([], 8), "early": ([0, 1], 8), "middle": ([1, 2], 8),
            "alternate": ([1, 3], 8), "experts-2": ([2, 3], 2), "experts-4": ([2, 3], 4), "experts-16": ([2, 3], 16),
            "layers-2": ([3], 8), "layers-8": ([1, 2, 3], 8), "layers-12": ([0, 1, 2, 3], 8)}


def small(command: str, fold: int = 1) -> list[str]:
    """A command of the page for the drawn faces, a model of four layers and one short epoch, from the one stage 1 that
    is there. What size tiny leaves out of the paper's augmentation is put back."""
    command = re.sub(r"--pretrained runs/\S+", "--pretrained runs/pretrain-voxceleb2/last.pt", command)
    script, *words = shlex.split(command.replace("SET", "synthetic").replace("FOLD", str(fold)))
    words = [script, *(TWELVE_AS_FOUR.get(word, word) for word in words), "--workers", "0"]
    if script != "evaluate.py":
        words += ["--size", "tiny", "--epochs", "1", "--batch-size", "16", "--micro-batch", "16"]
        words += ["--dataset", "synthetic"] if "--dataset" not in words else []
        words += ["--image-dataset", "synthetic-images"] if words[words.index("--dataset") + 1] == "none" else []
    return words + (["--augment", "paper", "--mixing", "1"] if script == "finetune.py" else [])


def different(runs: dict[str, str]) -> list[str]:
    """The runs to test: one of those that differ only in their stage 1; `dual` and `s4d` have a test of their own."""
    first = {}
    for name, command in runs.items():
        first.setdefault(re.sub(r" --pretrained runs/\S+| --output \S+", "", command), name)
    return [name for name in first.values() if name not in ("dual", "s4d")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, faces):
    """Where the page's commands run: the data, and the stage 1 that most of stage 2 starts from."""
    path = tmp_path_factory.mktemp("rows")
    (path / "data").symlink_to(faces)
    run_here(path, *small(RUNS["dual"]))
    return path


@pytest.mark.parametrize("name", different(RUNS))
def test_every_run_of_the_page_trains(folder, name):
    words = small(RUNS[name])
    run_here(folder, *words)                # a loss that is not finite would end it
    output, trained = folder / words[words.index("--output") + 1], {"image", "video"}
    for option, left_out in ((" --dataset none", "video"), (" --image-dataset none", "image")):
        trained -= {left_out} if option in RUNS[name] else set()
    record = json.loads((output / "log.jsonl").read_text())
    assert record["loss"].keys() == trained
    if words[0] == "finetune.py":
        assert record["test"].keys() == trained
        model = load_checkpoint(output / "last.pt").architecture
        assert (model["moae_layers"], model["experts"]) == EXPECTED.get(name, ([2, 3], 8))
        assert model["expert"] == ("ffn" if name == "vit-moe" else "adapter") and model["k"] == 2 and model["residual"]


def test_from_stage_1_to_the_numbers(folder):
    """S4D on five folds, every evaluation of the page, and the epoch that is best for images."""
    for fold in range(1, 6):
        run_here(folder, *small(RUNS["s4d"], fold))
    for command in EVALUATIONS:
        words = small(command.replace("NAME", "s4d").replace("photographs", "s4d/synthetic/fold2"))
        words = [path for word in words for path in (sorted(folder.glob(word)) if "?" in word else [word])]
        said = run_here(folder, *words)
        assert "UAR" in said and "WAR" in said
    page = (folder / re.search(r"written to (.*report\.html)", said)[1]).read_text(encoding="utf-8")
    assert {"Table IX", "Fig. 4", "Fig. 5"} <= set(re.findall(r"(?:Table|Fig\.) \w+", page))
    code, printed = re.search(r"```python\n(.*?)```", ROWS, re.DOTALL)[1].replace("ferv39k", "synthetic"), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        exec(code, {})
    assert re.match(r"1 \{'video': \(0\.\d+, 0\.\d+\), 'image': \(0\.\d+, 0\.\d+\)\}", printed.getvalue())


def test_the_ablations_are_on_fold_5_of_dfew():
    """Each WAR of DFEW in Tables IV to IX is a whole number of clips over 2,336, fold 5's, and over no other fold's."""
    tables = ROWS.split("### Table IV\n")[1].split("### Table IX\n")[0].replace("AffectNet-7 |", "| -")
    wars = set(re.findall(r"/ (\d\d\.\d\d) \|$", re.sub(r"### Table VI\n.*?### ", "", tables, flags=re.DOTALL),
                          re.MULTILINE))
    wars |= set(re.findall(r"^\| AffectNet-7 \| DFEW.*/ (\d\d\.\d\d) \|$", ROWS, re.MULTILINE))

    def possible(war: str, clips: int) -> bool:
        return any(f"{100 * right / clips:.2f}" == war for right in range(clips + 1))

    assert len(wars) == 14 and wars > {"79.37", "52.65", "47.13"}
    assert [sum(possible(war, clips) for war in wars) for clips in (2341, 2340, 2339, 2336)] == [6, 7, 1, 14]
