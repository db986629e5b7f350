"""The README's table of equations, its files and its commands are those of the code."""
import re

import pytest
from readme import FILES, PAGES, ROOT, command, equations, with_true_lines

README = (ROOT / "README.md").read_text()


def test_every_equation_is_tagged_and_the_table_points_at_its_line():
    rows = equations()
    assert [int(re.match(r"\| \((\d+)\)", row).group(1)) for row in rows] == list(range(1, 14))
    for row in rows:
        assert row in README, "run python tests/readme.py equations"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_that_the_pages_name_hold_the_code_that_they_quote(page):
    assert page.read_text() == with_true_lines(page.read_text()), "run python tests/readme.py lines"


def test_the_first_screen_has_the_two_commands():
    assert README.index("```bash") < README.index("\n\n", README.index(command(2)))
    assert len(README[:README.index(command(2))].splitlines()) < 30
    assert "pretrain.py --dataset synthetic" in command(1) and "pytest" in command(2)


def test_options_in_the_readme_exist():
    import evaluate
    import finetune
    import pretrain
    known = {option for script in (evaluate, finetune, pretrain) for action in script.settings()._actions
             for option in action.option_strings}
    known |= {"--scale", "--mask", "--show", "--export", "--picture", "--plan"}  # of model.py and tests/
    torchrun = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id", "--max-restarts", "--ipc"}
    used = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", README))
    assert used <= known | torchrun, used - known


@pytest.mark.parametrize("code, expected", [
    (code, expected) for code, expected in re.findall(r"```python\n(.*?)```\n```\n(.*?)```", README, re.DOTALL)
    if '"data"' not in code and "runs/" not in code])  # the others need what the first command leaves
def test_the_lessons_experiments_print_what_the_readme_says(code, expected, capsys):
    exec(code, {})
    assert capsys.readouterr().out == expected


def test_the_pictures_are_there():
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert len(pictures) >= 5 and all((ROOT / path).stat().st_size < 150_000 for path in pictures)


def test_only_the_files_of_the_card_are_modules():
    assert {path.name for path in ROOT.glob("*.py")} == set(FILES)
