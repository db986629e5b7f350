"""What the README must keep true: its first two commands and its table of equations.

    python tests/readme.py command 1      print the README's first (or second) command
    python tests/readme.py equations      print the table "equation -> file and line" of the code as it is
    python tests/readme.py lines          correct the line numbers in the README and the pages beside the scripts
"""
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "tests").glob("*.md")))
FILES = ("model.py", "data.py", "pretrain.py", "finetune.py", "evaluate.py")


def command(number: int) -> str:
    """The number-th fenced shell block of the README, counted from 1."""
    return re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[number - 1].strip()


def equations() -> list[str]:
    """Table rows for Eqs. (1) to (13): where each is computed, that is, the first line of code after its comment."""
    rows = {}
    for file in FILES:
        lines = (ROOT / file).read_text().splitlines()
        for i, line in enumerate(lines):
            if re.match(r"\s*# Eq\. \(\d+\)", line):
                code = next(j for j in range(i, len(lines)) if not lines[j].lstrip().startswith("#"))
                for number in map(int, re.findall(r"Eq\. \((\d+)\)", line)):
                    text = lines[code].split("  #")[0].strip()
                    rows.setdefault(number, f"| ({number}) | [{file}:{code + 1}]({file}#L{code + 1}) | `{text}` |")
    return [rows[number] for number in sorted(rows)]


def with_true_lines(text: str) -> str:
    """The text with every "[file:line](file#Lline) `code`" pointing at the first line that holds that code."""
    def true(match):
        file, code = match["file"], match["code"]
        lines = (ROOT / file).read_text().splitlines()
        number = next((i for i, line in enumerate(lines, 1) if code in line), None)
        if number is None:
            raise SystemExit(f"{file} has no line with {code!r}")
        return f"[{file}:{number}]({match['up']}{file}#L{number}) `{code}`"
    return re.sub(r"\[(?P<file>\w+\.py):\d+\]\((?P<up>(\.\./)?)\w+\.py#L\d+\) `(?P<code>[^`]+)`", true, text)


if __name__ == "__main__":
    if sys.argv[1] == "lines":
        for page in PAGES:
            page.write_text(with_true_lines(page.read_text()))
    else:
        print(command(int(sys.argv[2])) if sys.argv[1] == "command" else "\n".join(equations()))
