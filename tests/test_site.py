"""The web pages of a run: what they say, and that their links lead somewhere."""

import json
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from tiny_project import enter_project

from marsclf import data, site
from marsclf.errors import MarsclfError


class Page(HTMLParser):
    """The links of a page, what it loads, its anchors, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a":
            self.links.append(found.get("href") or "")
        elif source := found.get("src") or found.get("href"):
            self.loaded.append(source)

    def handle_data(self, text: str) -> None:
        self.text += text


def broken_links(folder: Path) -> list[str]:
    """Return every link and loaded file of the pages in `folder` that leads nowhere."""
    pages = {path.name: Page(path) for path in folder.glob("*.html")}
    broken = []
    for name, page in pages.items():
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https") and link in page.links:
                continue
            target = unquote(parts.path) or name
            found = parts.scheme == "data" or (not parts.scheme and target in pages)
            if found and parts.fragment:
                found = unquote(parts.fragment) in pages[target].anchors
            if not found:
                broken.append(f"{name}: {link[:80]}")
    return broken


def test_the_pages_of_a_run(smoke_run: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    enter_project(monkeypatch, smoke_run[0].parents[1])
    folder = site.build_site("smoke").parent
    names = ["01_data_exploration", "02_fine_tuning", "03_error_analysis", "index"]
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.html" for name in names]
    assert broken_links(folder) == []
    index = Page(folder / "index.html")
    for name in names:
        page = Page(folder / f"{name}.html")
        assert data.SAMPLE_NOTICE in page.text
        assert name == "index" or (f"{name}.html" in index.links and "index.html" in page.links)
    accuracy = json.loads((smoke_run[0] / "metrics.json").read_text())["splits"]["test"]["accuracy"]
    assert f"{accuracy:.1%}" in index.text
    pictures = [s for s in Page(folder / "03_error_analysis.html").loaded if "image/png" in s]
    assert len(pictures) == 12


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    text = '<h1 id="top"></h1><a href="#top"></a><a href="https://nasa.gov"></a>'
    text += '<a href="#no"></a><a href="gone.html"></a><img src="x.png"><script src="http://x">'
    (tmp_path / "a.html").write_text(text)
    assert broken_links(tmp_path) == [
        *("a.html: #no", "a.html: gone.html", "a.html: x.png", "a.html: http://x")
    ]


def test_no_run_no_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter_project(monkeypatch, tmp_path)
    with pytest.raises(MarsclfError, match="no run of this preset has ended"):
        site.build_site("laptop")
    run_dir = tmp_path / "runs" / "laptop"
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.json").write_text('{"parameters": {}, "splits": {}, "commit": ""}')
    with pytest.raises(MarsclfError, match="There is no executed notebook"):
        site.build_site("laptop")
    assert not (run_dir / "html").exists()
