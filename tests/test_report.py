"""evaluate.py's page: well-formed, complete in itself, readable at both widths; its figures as files of their own."""
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from conftest import run_here
from test_evaluate import save, video

from data import load_samples
from evaluate import escape, grid, line_chart

ODD = ["<b>", '"quoted"', "&amp;", "高兴非常非常高兴", "مفاجأة", "two\nlines", "disappointment \x1b[1m"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory, faces):
    """Folders with the pages of: a run, with a log; one of odd class names, on own lists; folds; own media of a model
    whose classes have line ends; stage 1."""
    root = tmp_path_factory.mktemp("pages")
    for fold in range(1, 6):
        save(root / f"run/fold{fold}.pt", seed=fold, fold=fold, **{"video stride": 2})
    scores = dict(uar=0.3, war=0.4)
    with open(root / "run/log.jsonl", "w", encoding="utf-8") as log:
        for epoch in range(1, 9):
            record = dict(epoch=epoch, loss=dict(video=2 / epoch, image=1 / epoch), left_out=0)
            if epoch % 2 == 0:                          # tests every other epoch
                record |= dict(score=0.1 * (epoch % 5), test=dict(video=scores, image=scores))
            log.write(json.dumps(record) + "\n")
    samples = load_samples("synthetic", faces, "test")
    names = ["高兴", "<b>", '"q"', "&amp;", "مفاجأة", "disappointment", "恐惧"]
    (root / "own").mkdir()
    (root / "own/faces").symlink_to(samples.root)
    for split in ("train", "test"):
        lines = ["path,label"]
        for i, label in enumerate(samples.labels):
            quoted = names[label].replace('"', '""')
            lines.append(f'faces/{samples.path(i).relative_to(samples.root)},"{quoted}"')
        (root / f"own/{split}.csv").write_text("\n".join(lines), encoding="utf-8")
    save(root / "own/odd.pt", classes=([], sorted(names)), image_dataset="none",
         dataset=f"{root}/own/train.csv,{root}/own/test.csv")
    save(root / "media/odd.pt", classes=(ODD, ODD))
    video(root / "long.mp4", faces, seconds=4)
    report = ("--data-root", faces, "--report")
    run_here(root, "evaluate.py", "--checkpoint", "run/fold1.pt", *report, "run/page")
    run_here(root, "evaluate.py", "--dataset", "synthetic", "--folds", *sorted((root / "run").glob("*.pt")), *report,
             "folds/page")
    run_here(root, "evaluate.py", "--checkpoint", "own/odd.pt", *report, "own/page")
    run_here(root, "evaluate.py", "--checkpoint", "media/odd.pt", "long.mp4",
             load_samples("synthetic-images", faces, "test").path(0), "--report", "media/page")
    return {name: root / name / "page" for name in ("run", "folds", "own", "media")}


class Page(HTMLParser):
    """Fails where a tag is not closed; keeps tags with their attributes, and the text."""
    EMPTY = ("meta", "rect", "image", "path", "polyline")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, words):
        self.words.append(words)

    def all(self, tag):
        return [attributes for found, attributes in self.tags if found == tag]


@pytest.mark.parametrize("name", ["run", "folds", "own", "media"])
def test_a_page_is_well_formed_complete_and_accessible(pages, name):
    text = (pages[name] / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not re.search("https?://", text.replace("http://www.w3.org/2000/svg", "")), "an outside address"
    assert not page.all("script") and not page.all("link")
    assert all(image["href"].startswith("data:image/png;base64,") for image in page.all("image"))
    assert page.all("html")[0]["lang"] == "en" and len(page.all("title")) == len(page.all("h1")) == 1
    assert {th["scope"] for th in page.all("th")} == {"row", "col"}
    assert all(box.keys() >= {"tabindex", "role", "aria-label"} for box in page.all("div"))
    roles = [box["role"] for box in page.all("div")]
    assert roles.count("img") == len(page.all("svg")) and roles.count("region") == len(page.all("table"))
    ids = [section["id"] for section in page.all("section")]
    assert len(ids) == len(set(ids)) == len(page.all("h2"))
    drawn = [path for path in pages[name].glob("*.svg")]
    assert len(drawn) == len(page.all("svg")) > 0 and {path.stem for path in drawn} < set(ids)


@pytest.mark.parametrize("name", ["run", "own", "media"])
def test_figures_stand_alone_as_files(pages, name):
    for file in pages[name].glob("*.svg"):
        text = file.read_text(encoding="utf-8")
        assert 'fill="white"' in text and "var(" not in text, "black on white, whatever page it is in"
        root = ElementTree.fromstring(text)             # an XML file, whatever the names
        width, height = map(float, root.get("viewBox").split()[2:])
        for node in root.iter("{http://www.w3.org/2000/svg}text"):
            assert 0 <= float(node.get("x")) <= width and 0 <= float(node.get("y")) <= height, (file, node.text)


def test_names_are_text(pages):
    words = Page((pages["own"] / "report.html").read_text(encoding="utf-8")).words
    assert {"高兴", "<b>", '"q"', "&amp;", "مفاجأة"} <= set(words)
    assert any("test videos of own/test.csv" in word for word in words), "data are called what they are"
    words = Page((pages["media"] / "report.html").read_text(encoding="utf-8")).words
    assert {"two lines", "disappointment \ufffd[1m", "高兴非常非常高兴"} <= set(words)
    assert escape('a\n<b>"\0\ud800') == "a &lt;b&gt;&quot;\ufffd\ufffd"


def test_a_page_shows_everything(pages):
    page = Page((pages["run"] / "report.html").read_text(encoding="utf-8"))
    assert {section["id"] for section in page.all("section")} == {
        *(f"{part}-test-{data}" for data in ("videos-of-synthetic-fold-1", "images-of-synthetic-images")
          for part in ("scores", "mistakes", "paths", "attention")),
        "training-loss", "training-scores", "experts", "heads", "similarity", "settings"}
    words = "".join(page.words)
    assert "the best epoch, 4, chosen by WAR" in words
    assert "--checkpoint run/fold1.pt" in words and torch.__version__ in words
    results = json.loads((pages["run"] / "evaluation.json").read_text(encoding="utf-8"))
    assert [row[0] for row in results["training-scores"][1:]] == [2, 4, 6, 8]
    assert sum(row[1] for row in results["training-loss"][1:]) == pytest.approx(sum(2 / n for n in range(1, 9)))


def test_figures_show_numbers_where_they_belong():
    cells = [["", "a", "b"], ["x", 0.5, (-1.0, "minus")], ["y", None, "word"]]
    drawing = grid(cells)
    assert 'fill="#1f77b4" opacity="0.35"' in drawing and 'fill="#d95f0e" opacity="0.70"' in drawing
    assert re.findall(">([^<>]+)</text>", drawing) == ["x", "y", "a", "0.50", "-", "b", "minus", "word"]
    chart = line_chart([["epoch", "a", "b"], [1, 0.0, 0.5], [2, 1.0, 0.5], [3, 0.5, 1.0]], "loss", 1, mark=1)
    b, a = (path.split("L") for path in re.findall('<path d="M([^"]+)h0"', chart))
    assert len(a) == len(b) == 3
    x, y = zip(*(map(float, point.split()) for point in a))
    assert x[1] - x[0] == x[2] - x[1] > 0 and y[0] > y[2] > y[1] and y[0] - y[2] == pytest.approx(y[2] - y[1])


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
def test_nothing_overflows_in_a_browser(pages, tmp_path):
    """All pages in frames of both widths, which a browser lays out; the script is the test's own."""
    frames = ""
    for folder in pages.values():
        text = html.escape((folder / "report.html").read_text(encoding="utf-8"))
        frames += "".join(f'<iframe srcdoc="{text}" width="{width}" height="800"></iframe>' for width in (390, 1280))
    widths = "f => f.contentDocument.documentElement.scrollWidth - f.clientWidth"
    script = f"onload = () => document.title = 'over: ' + [...document.querySelectorAll('iframe')].map({widths})"
    (tmp_path / "all.html").write_text(f"<!doctype html><meta charset=utf-8><script>{script}</script>{frames}",
                                       encoding="utf-8")
    seen = subprocess.run([CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
                           f"--user-data-dir={tmp_path}/profile", "--dump-dom", f"file://{tmp_path}/all.html"],
                          capture_output=True, text=True, encoding="utf-8", timeout=120)
    over = re.search("<title>over: ([^<]*)</title>", seen.stdout)[1].split(",")
    assert len(over) == 2 * len(pages) and max(map(int, over)) <= 0, over
    assert "CONSOLE" not in seen.stderr, seen.stderr
