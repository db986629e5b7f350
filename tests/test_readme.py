"""What the README and the pages beside it say is so: commands, options, links, line numbers and printed results."""
import ast
import csv
import re
import xml.etree.ElementTree as xml
from code import InteractiveConsole

import pytest
from readme import FILES, PAGES, ROOT, command, equations, read, with_true_lines

README = read(ROOT / "README.md")
LESSON = read(ROOT / "tests/lesson.md")
OF_OTHERS = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id",  # torchrun's
             "--ipc", "--index-url"}                                                            # docker's, pip's


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 220 and len(README) <= 14_000


def test_the_first_screen_has_the_commands_the_files_and_where_to_go_on():
    screen = "\n".join(README.splitlines()[:55])
    assert "pretrain.py --dataset synthetic" in command(1) and command(1) in screen
    assert "pytest" in command(2) and command(2) in screen
    assert command(1).splitlines()[0].endswith("pip install -r requirements.txt && \\")  # .ci/run takes it, too
    for file in (*FILES, "tests/lesson.md", "tests/data.md", "tests/paper.md", "tests/benchmark.md"):
        assert f"]({file})" in screen


def test_every_equation_has_a_row_in_the_table():
    rows = equations()
    assert [int(re.match(r"\| \((\d+)\)", row).group(1)) for row in rows] == list(range(1, 14))
    assert "\n".join(rows) in read(ROOT / "tests/paper.md"), "run python tests/readme.py lines"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_that_a_page_names_hold_the_code_that_it_quotes(page):
    assert read(page) == with_true_lines(read(page)), "run python tests/readme.py lines"


def anchors(page: str) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    text = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{page.name}: {target}"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(read(there)), f"{page.name}: {target}"


def options() -> dict[str, set[str]]:
    """The options of every script, by its path."""
    import evaluate
    import finetune
    import pretrain
    known = {}
    for script in (pretrain, finetune, evaluate):
        known[f"{script.__name__}.py"] = {o for action in script.settings()._actions for o in action.option_strings}
    for file in [ROOT / "model.py", *(ROOT / "tests").glob("*.py")]:
        calls = [node for node in ast.walk(ast.parse(read(file))) if isinstance(node, ast.Call) and node.args]
        words = [node.args[0].value for node in calls if isinstance(node.args[0], ast.Constant)]
        words = {word for word in words if isinstance(word, str) and word.startswith("--")}
        known[file.relative_to(ROOT).as_posix()] = words | {"--help"}
    return known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_options_of_their_script(page):
    known, text = options(), read(page).replace("\\\n", " ")
    for script, rest in re.findall(r"(?<![\w\[/])((?:tests/)?\w+\.py)((?: +[^\s`|#&]+)+)", text):
        used = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", rest))
        assert used <= known.get(script, used), f"{page.name}: {script} has no {used - known[script]}"
    every = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text))
    assert every <= set().union(OF_OTHERS, *known.values()), page.name


BLOCKS = re.findall(r"```python\n(.*?)```\n```\n(.*?)```", README + LESSON, re.DOTALL)


@pytest.mark.parametrize("code, expected", BLOCKS)
def test_a_block_prints_what_stands_below_it(code, expected, capsys):
    exec(code, {})
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("code, expected", BLOCKS)
def test_a_block_prints_the_same_when_it_is_pasted_at_the_prompt(code, expected, capsys):
    prompt = InteractiveConsole({})
    for line in (code + "\n").splitlines():                                 # the last, empty one is Enter
        prompt.push(line)
    assert capsys.readouterr().out == expected


def test_figures_of_the_study_are_those_of_its_page():
    figures = re.findall(r"[\d.]+ ± [\d.]+\d", README + LESSON)
    assert len(figures) > 8 and all(figure in read(ROOT / "tests/study.md") for figure in figures)


def test_ravdess_names_become_lists_with_persons(tmp_path, monkeypatch):
    for actor, emotion in (("03", "01"), ("12", "06"), ("24", "08")):
        folder = tmp_path / f"RAVDESS/Actor_{actor}"
        folder.mkdir(parents=True)
        for kind in ("01-01", "01-02", "02-01"):                            # spoken; sung; without sound
            (folder / f"{kind}-{emotion}-01-02-01-{actor}.mp4").touch()
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", read(ROOT / "tests/data.md"), re.DOTALL)[1], {})
    rows = [list(csv.reader(open(f"RAVDESS/{split}.csv", encoding="utf-8"))) for split in ("train", "test")]
    assert rows == [[["path", "label", "person"], ["Actor_03/01-01-01-01-02-01-03.mp4", "neutral", "03"],
                     ["Actor_12/01-01-06-01-02-01-12.mp4", "fearful", "12"]],
                    [["path", "label", "person"], ["Actor_24/01-01-08-01-02-01-24.mp4", "surprised", "24"]]]


def test_pictures_are_there_and_drawings_stand_alone():
    shown = set()
    for page in PAGES:
        shown |= {(page.parent / path).resolve() for path in re.findall(r"!\[[^]]+\]\(([^)]+)\)", read(page))}
    assert len(shown) >= 6 and all(path.stat().st_size < 150_000 for path in shown)
    for path in shown:
        if path.suffix == ".svg":
            places = [value for node in xml.parse(path).iter() for name, value in node.attrib.items() if "href" in name]
            assert all(value.startswith(("data:", "#")) for value in places), path.name


def test_only_the_five_files_are_modules():
    assert {path.name for path in ROOT.glob("*.py")} == set(FILES)
