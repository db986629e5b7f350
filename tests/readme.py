"""What the pages must keep true: the README's first two commands, and the lines of code that any page names.

    python tests/readme.py command 1      print the README's first (or second) command
    python tests/readme.py equations      print the table "equation, line, code" of the code as it is
    python tests/readme.py lines          correct line numbers, files' lengths and that table in all pages
"""
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "tests").glob("*.md")))
FILES = ("model.py", "data.py", "pretrain.py", "finetune.py", "evaluate.py")


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def command(number: int) -> str:
    """The number-th fenced bash block of the README, counted from 1."""
    return re.findall(r"```bash\n(.*?)```", read(ROOT / "README.md"), re.DOTALL)[number - 1].strip()


def equations() -> list[str]:
    """A row for each of Eqs. (1) to (13), as tests/paper.md has them: the first line of code after its comment."""
    rows = {}
    for file in FILES:
        lines = read(ROOT / file).splitlines()
        for i, line in enumerate(lines):
            if re.match(r"\s*# Eq\. \(\d+\)", line):
                code = next(j for j in range(i, len(lines)) if not lines[j].lstrip().startswith("#"))
                place = f"[{file}:{code + 1}](../{file}#L{code + 1})"
                shown = lines[code].split("  #")[0].strip()
                for number in map(int, re.findall(r"Eq\. \((\d+)\)", line)):
                    rows.setdefault(number, f"| ({number}) | {place} | `{shown}` |")
    return [rows[number] for number in sorted(rows)]


def with_true_lines(page: str) -> str:
    """The text of a page with every "[file:line](file#Lline) `code`" pointing at the first line that holds that code.
    The table of equations, and the files' lengths and their sum, become those of the code, too."""
    def true(match):
        file, code = match["file"], match["code"]
        lines = read(ROOT / file).splitlines()
        number = next((i for i, line in enumerate(lines, 1) if code in line), None)
        if number is None:
            raise SystemExit(f"{file} has no line with {code!r}")
        return f"[{file}:{number}]({match['up']}{file}#L{number}) `{code}`"

    lengths = {file: len(read(ROOT / file).splitlines()) for file in FILES}
    page = re.sub(r"[\d,]+(?=\s+lines of five flat files)", f"{sum(lengths.values()):,}", page)
    page = re.sub(r"(\| \[(\w+\.py)\]\(\w+\.py\) \| )\d+ \|", lambda m: f"{m[1]}{lengths[m[2]]} |", page)
    page = re.sub(r"\[(?P<file>\w+\.py):\d+\]\((?P<up>(\.\./)?)\w+\.py#L\d+\) `(?P<code>[^`]+)`", true, page)
    return re.sub(r"(^\| \(\d+\) \| \[.*\n)+", lambda match: "\n".join(equations()) + "\n", page, flags=re.MULTILINE)


if __name__ == "__main__":
    if sys.argv[1] == "lines":
        for page in PAGES:
            page.write_text(with_true_lines(read(page)), encoding="utf-8")
    elif sys.argv[1] == "command":
        print(command(int(sys.argv[2])))
    else:
        print("\n".join(equations()))
