"""The documents' tables: each is between two markers and comes from the template of its name."""

import re
from itertools import zip_longest
from pathlib import Path

import jinja2

from marsclf import paths
from marsclf.data.dataset import Dataset
from marsclf.errors import MarsclfError
from marsclf.evaluation.ledger import append_row
from marsclf.files import replace_atomically, write_json
from tools.results import Result, read_published
from tools.tables import FILTERS, VALUES, NotMeasured

DOCUMENTS = ("README.md", "RESULTS.md", "MODEL_CARD.md", "docs/archive-scale.md")
MARKER = re.compile(r"<!-- ([a-z0-9-]+):(begin|end) -->\n?")
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.filters |= FILTERS


def store(measured: dict, file: Path, dataset: Dataset) -> None:
    """Store measurements of the real data in a JSON or CSV file and update the documents."""
    if dataset.name != "msl-v1":
        print(f"Nothing was stored, because the data set is {dataset.name}, not msl-v1.")
        return
    if file.suffix == ".csv":
        append_row(file, measured)
    else:
        write_json(file, measured)
    write_documents(update_documents(read_published()))
    print(f"Stored in {file} and in the documents.")


def update_documents(published: dict[str, Result]) -> dict[Path, str]:
    """Return the text of each document with its tables made from the published results.

    Raises MarsclfError where the markers of a document do not come in pairs, or have no template,
    and where a results file lacks a number.
    """
    files = (paths.PROJECT_ROOT / name for name in DOCUMENTS)
    return {file: _fill(file, published) for file in files if file.is_file()}


def write_documents(documents: dict[Path, str]) -> None:
    """Replace the documents with those that `update_documents` returned."""
    for file, text in documents.items():
        with replace_atomically(file) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _fill(file: Path, published: dict[str, Result]) -> str:
    text = file.read_text(encoding="utf-8")
    markers, parts, end = list(MARKER.finditer(text)), [], 0
    for first, second in zip_longest(markers[::2], markers[1::2]):
        name, marker = first[1], first[0].strip()
        if second is None or (first[2], second[1], second[2]) != ("begin", name, "end"):
            raise MarsclfError(f"{file}: no end marker follows {marker}.")
        if name not in VALUES:
            raise MarsclfError(f"{file}: there is no template for {marker}.")
        parts += [text[end : first.start()], f"{marker}\n", render(name, published)]
        end = second.start()
    return "".join([*parts, text[end:]])


def render(name: str, published: dict[str, Result]) -> str:
    """Return a table as Markdown, or what to run where its numbers are not measured."""
    try:
        return TEMPLATES.get_template(f"{name}.md").render(VALUES[name](published))
    except NotMeasured as remedy:
        return f"**Not measured**: run {remedy}.\n"
    except (KeyError, jinja2.UndefinedError) as error:
        raise MarsclfError(f"{paths.RESULTS} lacks what table {name} needs: {error}.") from error
