"""The page of `predict --report`: a thumbnail of each image, by class, with filters."""

import base64
import warnings
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from html import escape
from itertools import groupby, islice
from pathlib import Path
from string import Template

import cv2

from marsclf.classify.table import Row
from marsclf.errors import MarsclfError
from marsclf.images.decode import ignore_decoder_warnings, read_rgb
from marsclf.provenance import cores

TEMPLATE = Path(__file__).with_name("report.html")
SIDE, QUALITY = 128, 70  # of a thumbnail: longer side, pixels; JPEG quality, percent
AT_ONCE = 256  # thumbnails in memory
KINDS = ("certain", "uncertain", "unfamiliar", "unreadable")  # in the order of the page

Pair = tuple[str, Row]  # path and row of an image


def write_report(pairs: Iterable[Pair], file: Path, dataset: str, threshold: float) -> None:
    """Write an HTML page that needs no other file, for images and their rows.

    Certain images have a section for each class, the commonest first; each other kind has one. In a
    section the confidence falls. `dataset` is what the classifier learned from, `threshold` the
    confidence below which an image is uncertain.
    """
    pairs = list(pairs)
    kinds = Counter(_kind(row) for _, row in pairs)
    classes = Counter(row.predicted for _, row in pairs if row.predicted)

    def section(pair: Pair) -> tuple[int, int, str]:
        """Return where the section of an image is, and its title."""
        kind, name = _kind(pair[1]), pair[1].predicted
        return (0, -classes[name], name) if kind == "certain" else (KINDS.index(kind), 0, kind)

    pairs.sort(key=lambda pair: (section(pair), -(pair[1].confidence or 0)))
    links = [f'<a href="#{kind}">{kinds[kind]:,} {kind}</a>' for kind in KINDS if kinds[kind]]
    start, end = TEMPLATE.read_text(encoding="utf-8").split("$sections")
    start = Template(start).substitute(
        title=f"{len(pairs):,} classified images",
        links=", ".join(links),
        dataset=escape(str(dataset)),
        threshold=threshold,
        classes=_options(classes),
        kinds=_options(kinds),
    )
    with (
        warnings.catch_warnings(),
        file.open("w", encoding="utf-8") as page,
        ThreadPoolExecutor(cores()) as pool,
    ):
        ignore_decoder_warnings()
        page.write(start)
        for (kind, _, title), images in groupby(pairs, section):
            anchor = f' id="{KINDS[kind]}"' if kind else ""
            page.write(
                f'<section data-kind="{KINDS[kind]}"{anchor}><h2>{escape(title)} <output></output>'
                '</h2>\n<div class="grid">\n'
            )
            while batch := list(islice(images, AT_ONCE)):
                page.writelines(pool.map(_figure, batch))
            page.write("</div></section>\n")
        page.write(end)


def _kind(row: Row) -> str:
    if row.error:
        return "unreadable"
    if row.unfamiliar:
        return "unfamiliar"
    return "uncertain" if row.uncertain else "certain"


def _options(counts: Counter) -> str:
    return "".join(
        f'<option value="{escape(name)}">{escape(name)} ({counts[name]:,})</option>'
        for name in sorted(counts)
    )


def _figure(pair: Pair) -> str:
    path, row = pair
    lines = [row.error or f"{row.predicted} {row.confidence:.1%}", Path(row.path).name]
    if row.uncertain:
        lines.insert(1, f"or {row.runner_up} {row.runner_up_confidence:.1%}")
    title, *others = map(escape, lines)
    source = "" if row.error else _thumbnail(path)
    picture = f'<img loading="lazy" alt="" src="{source}">' if source else ""
    data = f'data-class="{escape(row.predicted or "")}" data-confidence="{row.confidence or 0}"'
    return (
        f'<figure {data} title="{escape(row.path)}">{picture}'
        f"<figcaption>{'<br>'.join([f'<b>{title}</b>', *others])}</figcaption></figure>\n"
    )


def _thumbnail(path: str) -> str:
    """Return a small JPEG of an image as a data URI, or nothing if it cannot be read."""
    try:
        image = read_rgb(path)
    except MarsclfError:
        return ""
    scale = SIDE / max(image.shape)
    if scale < 1:
        size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    options = [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
    _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
