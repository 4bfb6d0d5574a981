"""The page in docs/, from a run of the default preset: python -m tools.site."""

import html
import re
import shutil
import sys
from io import BytesIO
from pathlib import Path

import mistune
import nbformat
from nbconvert import HTMLExporter
from PIL import Image
from traitlets.config import Config

from marsclf import paths
from marsclf.errors import MarsclfError
from marsclf.files import replace_atomically
from marsclf.pipeline.presets import DEFAULT_PRESET
from marsclf.pipeline.run import execute
from tools.command import make_main
from tools.documents import TEMPLATES, render
from tools.results import read_published, read_run

DOCS = paths.PROJECT_ROOT / "docs"
EXTRA = "05_classify_new_images"  # executed for the page, on the examples
FIGURES = {
    "03_errors_per_class": "Images and wrong predictions per class, on the test set.",
    "03_confusion_matrix": "Which classes are confused.",
    "03_coverage_accuracy": "How many images are left, and right, above a confidence threshold.",
    "01_class_gallery": "Each class in training and in test.",
}
PIXELS, QUALITY = 1200, 80  # largest width of a picture, quality of its WebP file


def site() -> None:
    """Write docs/index.html, its figures and the executed notebooks as web pages.

    The notebooks are those of the last run of the default preset, which must be the published one.
    """
    published, run = read_published(), read_run(DEFAULT_PRESET)
    if DEFAULT_PRESET not in published or run.record != published[DEFAULT_PRESET].record:
        remedy = f"run `make publish PRESET={DEFAULT_PRESET}`, then this again"
        raise MarsclfError(f"{run.file.parent} is not the published run: {remedy}.")
    notebooks = sorted(run.file.parent.glob("0*.ipynb"))
    with replace_atomically(DOCS / "page") as folder:
        folder.mkdir()
        extra = folder / f"{EXTRA}.ipynb"
        execute(EXTRA, extra, {"run_dir": str(folder / "run")})
        titles = {}
        for file in [*notebooks, extra]:
            notebook = nbformat.read(file, as_version=4)
            titles[file.stem] = notebook.cells[0].source.splitlines()[0].removeprefix("# ")
            _write_notebook(notebook, folder, file.stem)
        extra.unlink()
        shutil.rmtree(folder / "run", ignore_errors=True)
        for name in FIGURES:
            picture = paths.FIGURES / DEFAULT_PRESET / f"{name}.png"
            (folder / f"{name}.webp").write_bytes(_as_webp(picture.read_bytes()))
    markdown = mistune.create_markdown(plugins=["table"])
    parts = {name: markdown(render(name, published)) for name in ("headline", "results")}
    text = TEMPLATES.get_template("site.html").render(**parts, figures=FIGURES, titles=titles)
    with replace_atomically(DOCS / "index.html") as file:
        file.write_text(text, encoding="utf-8")
    size = sum(file.stat().st_size for file in DOCS.rglob("*") if file.is_file())
    print(f"{DOCS / 'index.html'}: {len(titles)} notebooks, {size / 1e6:.1f} MB in {DOCS}.")


def _write_notebook(notebook: nbformat.NotebookNode, folder: Path, name: str) -> None:
    """Write an executed notebook as a web page, its code folded and its pictures as WebP files."""
    places = {str(paths.PROJECT_ROOT): "."}
    for cell in [c for c in notebook.cells if "injected-parameters" in c.metadata.get("tags", [])]:
        notebook.cells.remove(cell)
        if data_dir := re.search(r'^data_dir = "(.+)"$', cell.source, re.MULTILINE):
            places[data_dir[1]] = "msl-images"
    exporter = HTMLExporter(
        template_name="folded",
        extra_template_basedirs=[str(Path(__file__).with_name("templates") / "html")],
        config=Config(ExtractOutputPreprocessor={"enabled": True}),
    )
    exporter.require_js_url = exporter.mathjax_url = ""  # nothing is loaded from elsewhere
    body, resources = exporter.from_notebook_node(notebook, {"unique_key": name})
    for picture, content in resources["outputs"].items():
        webp = f"{picture.removesuffix('.png')}.webp"
        (folder / webp).write_bytes(_as_webp(content))
        body = body.replace(picture, webp)
    for place, shown in places.items():
        body = body.replace(html.escape(place), shown)
    (folder / f"{name}.html").write_text(body, encoding="utf-8")


def _as_webp(png: bytes) -> bytes:
    image, content = Image.open(BytesIO(png)).convert("RGB"), BytesIO()
    image.thumbnail((PIXELS, 100 * PIXELS), Image.Resampling.LANCZOS)
    image.save(content, "WEBP", quality=QUALITY)
    return content.getvalue()


main = make_main(site)

if __name__ == "__main__":
    sys.exit(main())
