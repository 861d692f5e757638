"""Markdown pages as HTML documents: what is inside, what is not asked for."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ocnopt.experiments.errors import InputError
from ocnopt.experiments.page import html_page
from ocnopt.experiments.reproduce import EXPERIMENTS, Experiment, runner
from ocnopt.experiments.reproduce.report import Report, Settings

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Document(HTMLParser):
    """Elements with their attributes and text; refuses tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "text": "", **dict(attrs)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag):
        return [element for element in self.elements if element["tag"] == tag]


def test_pictures_are_inside_to_the_byte(tmp_path):
    (tmp_path / "a b.png").write_bytes(PNG)
    (image,) = Document(html_page("![What it shows](<a b.png>)", tmp_path)).all("img")
    head, data = image["src"].split(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data) == PNG
    assert image["alt"] == "What it shows"


def test_nothing_is_fetched(tmp_path):
    page = (
        "# T\n\n![far](https://example.org/x.png) <script src='https://example.org/x.js'></script>"
    )
    text = html_page(page, tmp_path)
    document = Document(text)
    for tag in ("script", "link", "iframe", "img"):
        assert document.all(tag) == []
    for element in document.elements:
        assert not re.match("https?:|//", element.get("src") or "")
    assert "url(" not in text and "@import" not in text
    (policy,) = [m for m in document.all("meta") if "http-equiv" in m]
    assert policy["content"].startswith("default-src 'none'")
    (link,) = document.all("a")  # what the page shows from the web can be followed
    assert link["href"] == "https://example.org/x.png" and link["text"] == "far"


@pytest.mark.parametrize(
    ("target", "leads_to"),
    [
        ("figure6.md", "figure6.html"),
        ("./figure6.md#the-count", "figure6.html#the-count"),
        ("../design.md", "../design.md"),
        ("https://example.org/a.md", "https://example.org/a.md"),
        ("figure6.json", "figure6.json"),
        ("#part", "#part"),
    ],
)
def test_links_lead_to_the_pages_beside(tmp_path, target, leads_to):
    (link,) = Document(html_page(f"[x]({target})", tmp_path)).all("a")
    assert link["href"] == leads_to


def test_title_and_headings_that_links_can_name(tmp_path):
    page = "Before.\n\n# A & `b` (Fig. 6)\n\n## The count\n\n## The count\n"
    document = Document(html_page(page, tmp_path))
    assert document.all("title")[0]["text"] == "A & b (Fig. 6)"
    assert [h["id"] for h in document.all("h2")] == ["the-count", "the-count-1"]
    assert Document(html_page("no heading", tmp_path)).all("title")[0]["text"] == "ocnopt"


def test_columns_of_numbers_are_aligned_right(tmp_path):
    page = "\n".join(
        [
            "| method | loss | when | none | lr | own |",
            "|---|---|---|---|---|:---:|",
            "| SGD | 10.3 (9.07 to 11) | 3 of 3, 513 | - | lr 0.1 | 1 |",
            "| EKFAC | 1e-05 / -2.5e+03 | 0 of 3 | | lr 1 | 2 |",
        ]
    )
    document = Document(html_page(page, tmp_path))
    right = [cell.get("class") == "number" for cell in document.all("th")]
    assert right == [False, True, True, False, False, False]
    assert [cell.get("class") == "number" for cell in document.all("td")] == right * 2
    assert "center" in document.all("th")[5]["style"]


@pytest.mark.parametrize(
    ("page", "says"),
    [
        ("![x](missing.png)", "missing.png"),
        ("![x](notes.txt)", "no picture"),
        ("![x](folder.png)", "cannot be read"),
    ],
)
def test_pictures_that_cannot_be_shown(tmp_path, page, says):
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match=says) as error:
        html_page(page, tmp_path)
    assert "\n" not in str(error.value)


def test_pages_of_results_can_be_made():
    folder = Path(__file__).parents[2] / "docs" / "results"
    if not folder.is_dir():
        pytest.skip("docs are not part of this copy")
    for path in folder.glob("*.md"):
        page = path.read_text()
        document = Document(html_page(page, folder))
        assert len(document.all("img")) == page.count("![")
        rules = re.findall(r"^\|(?: ?:?-+:? ?\|)+$", page, re.M)
        assert len(document.all("table")) == len(rules)


def drawn(settings, watcher):
    settings.picture.write_bytes(PNG)
    return Report(("a",), [["1"]], "Seen.", f"# Page\n\n![p]({settings.picture.name})", [])


def test_an_experiment_writes_its_page_as_html(tmp_path, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "drawn", Experiment(__name__, "drawn", "nothing"))
    monkeypatch.setattr(runner, "import_module", lambda name: __import__("sys").modules[__name__])
    runner.reproduce(Settings("drawn", tmp_path))
    (image,) = Document((tmp_path / "drawn.html").read_text()).all("img")
    assert base64.b64decode(image["src"].split(",")[1]) == PNG
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        f"drawn.{kind}" for kind in ("html", "json", "md", "png")
    ]
