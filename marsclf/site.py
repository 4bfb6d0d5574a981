"""A run's notebooks as a small web site, for people without Jupyter."""

from pathlib import Path

import nbformat

from marsclf import data, paths
from marsclf.errors import MarsclfError
from marsclf.files import replace_atomically
from marsclf.publish import read_metrics

FOLDER = "html"
CREDIT = "Curiosity's images: NASA/JPL-Caltech/MSSS, CC BY-SA 4.0."
HEAD = ["Split", "Images", "Accuracy", "95 % interval, over sols", "Macro-F1", "ECE"]


def build_site(preset: str) -> Path:
    """Write the executed notebooks of runs/<preset>/ as pages, with an index; return the index.

    The pages need nothing but themselves: pictures are within them, and no script is fetched.
    Raises MarsclfError where no run of the preset has ended.
    """
    run_dir = paths.RUNS / preset
    result = read_metrics(run_dir / "metrics.json")
    names = [path.stem for path in sorted(run_dir.glob("[0-9]*.ipynb")) if "." not in path.stem]
    if not names:
        raise MarsclfError(
            f"There is no executed notebook in {run_dir}: make them with `make run`."
        )
    notebooks = {name: nbformat.read(run_dir / f"{name}.ipynb", as_version=4) for name in names}
    cells = [nbformat.v4.new_markdown_cell(_index(result, notebooks))]
    notebooks["index"] = nbformat.v4.new_notebook(cells=cells)
    with replace_atomically(run_dir / FOLDER) as temporary:
        temporary.mkdir()
        for name, notebook in notebooks.items():
            page = _page(notebook, _title(notebook), _head(result, name))
            (temporary / f"{name}.html").write_text(page, encoding="utf-8")
    index = run_dir / FOLDER / "index.html"
    print(f"{len(names)} notebooks as web pages: {index}")
    return index


def _head(result: dict, name: str) -> str:
    """Return as Markdown what stands above a page: the way back, and that it is sample data."""
    back = "" if name == "index" else f"[All pages of the run {result['preset']}](index.html)\n\n"
    return back + (f"**{data.SAMPLE_NOTICE}**" if result["dataset"] == "sample" else "")


def _page(notebook: nbformat.NotebookNode, title: str, head: str) -> str:
    from nbconvert import HTMLExporter

    if head:
        notebook.cells.insert(0, nbformat.v4.new_markdown_cell(head))
    notebook.metadata["title"] = title
    exporter = HTMLExporter(
        embed_images=True, mathjax_url="", require_js_url="", jquery_url="", mermaid_js_url=""
    )
    return exporter.from_notebook_node(notebook)[0]


def _title(notebook: nbformat.NotebookNode) -> str:
    """Return the first heading of a notebook."""
    return notebook.cells[0].source.splitlines()[0].lstrip("# ")


def _index(result: dict, notebooks: dict[str, nbformat.NotebookNode]) -> str:
    """Return the index page as Markdown: what ran, on which data, its numbers, the pages."""
    about = {name: result[name] for name in ("dataset", "backbone", "seed", "commit")}
    parts = [
        f"# marsclf: the run of preset {result['preset']}",
        ", ".join(f"{name} {value}" for name, value in about.items()),
        "\n".join(f"1. [{_title(page)}]({name}.html)" for name, page in notebooks.items()),
    ]
    rows = [HEAD, ["---"] * len(HEAD)]
    for split, numbers in result["splits"].items():
        low, high = (f"{share:.1%}" for share in numbers["accuracy_ci95"])
        row = [split, f"{numbers['n']:,}", f"{numbers['accuracy']:.1%}", f"{low} to {high}"]
        rows.append([*row, f"{numbers['macro_f1']:.3f}", f"{numbers['ece']:.3f}"])
    parts += ["\n".join(f"| {' | '.join(row)} |" for row in rows), CREDIT]
    return "\n\n".join(parts)
