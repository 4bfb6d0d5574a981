"""The web page in docs/: what the repository has, and what the command makes of a run."""

import base64
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from matplotlib.figure import Figure
from tiny_project import enter_project

from marsclf import paths
from marsclf.errors import MarsclfError
from marsclf.figures.results import png_of
from tools import site
from tools.results import Result

pytestmark = pytest.mark.browser
DOCS = paths.PROJECT_ROOT / "docs"


def opened(browser, docs: Path) -> dict[str, str]:
    """Follow all links from the page to others of the folder; return the text of each by its name.

    Nothing may fail or be loaded from elsewhere, and every picture must be there.
    """
    page, seen, texts, waiting = browser.new_page(), [], {}, ["index.html"]
    page.on("requestfailed", lambda request: seen.append(request.url))
    page.on("pageerror", lambda error: seen.append(error))
    page.on(
        "request", lambda request: request.url[:5] in ("file:", "data:") or seen.append(request)
    )
    while waiting:
        name = waiting.pop()
        page.goto(f"file://{docs}/{name}", wait_until="load")
        texts[name] = page.locator("body").inner_text()
        widths = page.locator("img").evaluate_all("all => all.map(image => image.naturalWidth)")
        assert 0 not in widths
        links = page.locator("a").evaluate_all("all => all.map(link => link.href)")
        found = {link.partition("#")[0] for link in links if link.startswith("file:")}
        names = {str(Path(link.removeprefix("file://")).relative_to(docs)) for link in found}
        waiting += names - {*texts, *waiting}
    assert seen == []
    return texts


def test_the_page_of_the_repository(browser) -> None:
    if not (DOCS / "index.html").is_file():
        pytest.skip("the page has not been made: make site")
    texts = opened(browser, DOCS)
    assert len(texts) >= 5
    readme = (paths.PROJECT_ROOT / "README.md").read_text(encoding="utf-8")
    headline = re.search(r"headline:begin -->\n(.+)\n", readme)[1].replace("**", "")
    assert headline in texts["index.html"]
    assert sum(file.stat().st_size for file in DOCS.rglob("*") if file.is_file()) < 8e6


def write_notebook(path: Path, title: str, code: str) -> None:
    figure = Figure((4, 2))
    figure.add_subplot().imshow(np.eye(9))
    text = f"in {paths.PROJECT_ROOT}/cache and /data/of mine"
    picture = {"image/png": base64.b64encode(png_of(figure)).decode()}
    tagged = {"tags": ["injected-parameters"]}
    given = nbformat.v4.new_code_cell('data_dir = "/data/of mine"', metadata=tagged)
    shown = nbformat.v4.new_code_cell(code)
    shown.outputs = [nbformat.v4.new_output("display_data", picture)]
    shown.outputs += [nbformat.v4.new_output("stream", name="stdout", text=text)]
    cells = [nbformat.v4.new_markdown_cell(f"# {title}\n\nText"), given, shown]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


def test_a_page_is_made_of_the_published_run(browser, tmp_path: Path, monkeypatch) -> None:
    enter_project(monkeypatch, tmp_path)
    docs, run = tmp_path / "docs", Result(paths.RUNS / "laptop" / "metrics.json", {"seed": 0}, {})
    monkeypatch.setattr(site, "DOCS", docs)
    monkeypatch.setattr(site, "read_run", lambda _: run)
    monkeypatch.setattr(site, "render", lambda name, _: f"**{name}** of all\n")
    monkeypatch.setattr(
        site, "execute", lambda name, output, _: write_notebook(output, name, "2 + 2")
    )
    write_notebook(run.file.with_name("01_one.ipynb"), "The <first>", "1 + 1")
    (paths.FIGURES / "laptop").mkdir(parents=True)
    for name in site.FIGURES:
        (paths.FIGURES / "laptop" / f"{name}.png").write_bytes(png_of(Figure((2, 2))))
    (docs / "page").mkdir(parents=True)
    (docs / "page" / "old.html").touch()
    monkeypatch.setattr(site, "read_published", lambda: {"laptop": run._replace(record={})})
    with pytest.raises(MarsclfError, match="is not the published run: run `make publish"):
        site.site()
    monkeypatch.setattr(site, "read_published", lambda: {"laptop": run})
    site.site()
    texts = opened(browser, docs)
    assert {*texts} == {"index.html", "page/01_one.html", f"page/{site.EXTRA}.html"}
    assert "The <first>" in texts["index.html"] and "headline of all" in texts["index.html"]
    assert "in ./cache and msl-images" in texts["page/01_one.html"]
    assert not (docs / "page" / "old.html").exists()
    everything = b"".join(file.read_bytes() for file in docs.rglob("*.html"))
    assert str(tmp_path).encode() not in everything and b"of mine" not in everything
