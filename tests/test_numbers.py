"""Every figure in the documents' prose is in results/, or a fact whose source is named here."""

import json
import re
from collections.abc import Iterator

import pandas as pd
import pytest

from marsclf import ledger, paths

DOCUMENTS = ("README.md", "RESULTS.md", "MODEL_CARD.md")
# Facts that no run measures, each with its source. What a run measures has no place here.
FACTS = {
    "0.9": "metrics.THRESHOLD: the PDS Image Atlas shows a label from there up",
    "62.5 %": "the training split file: 2,343 of its 3,746 images are labelled ground",
    "35 GB": "features.embed_views at 600 pixels: 38 x 38 x 224 numbers of B7's block5 a view, of "
    "2 bytes for 11,703 random views and of 4 for 20,790 looks at whole images",
    "61 MB": "the archive at doi 10.5281/zenodo.1049137",
}
KINDS = {
    "%": "share",
    **dict.fromkeys(("ms", "s", "seconds", "min", "minutes", "hours"), "time"),
    **dict.fromkeys(("MB", "GB"), "memory"),
    "": "score",
}
# How many of a unit there are in what the results count: shares, seconds and megabytes.
SCALES = {"%": 100, "ms": 1000, "min": 1 / 60, "minutes": 1 / 60, "hours": 1 / 3600, "GB": 1e-3}
UNITS = "|".join(unit for unit in KINDS if unit.isalpha())
# Numbers with a unit, and scores, which lie in 0 to 1; other bare numbers are versions or counts.
FIGURE = re.compile(
    rf"(?<![\w.,-])(?:(?P<digits>\d+(?:\.\d+)?)[ \xa0]?(?P<unit>%|(?:{UNITS})\b)"
    r"|(?P<score>0\.\d+)(?![\w%]|\.\d))"
)


def prose(text: str) -> str:
    """Drop what `make publish` makes, code, and the addresses of links."""
    text = re.sub(r"<!-- ([\w-]+):begin -->.*?<!-- \1:end -->", "", text, flags=re.DOTALL)
    text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    return re.sub(r"\]\([^)]*\)|doi\s+\S+|10\.\d{4,}/\S+", "", text)


def figures(text: str) -> list[tuple[str, str]]:
    """Return digits and unit of each figure: shares, times, memory and scores."""
    matches = FIGURE.finditer(prose(text))
    return [(found["digits"] or found["score"], found["unit"] or "") for found in matches]


def measured() -> dict[str, list[float]]:
    """Return all that the results hold, by kind; shares in 0 to 1, seconds and megabytes."""
    values: dict[str, list[float]] = {kind: [] for kind in KINDS.values()}
    for path in paths.RESULTS.rglob("*.json"):
        for name, value in leaves(json.loads(path.read_text(encoding="utf-8"))):
            if "wall_s" in name or name.endswith(".seconds"):
                values["time"].append(value)
            elif "ms_an_image" in name:
                values["time"].append(value / 1000)
            elif name.endswith("_mb"):
                values["memory"].append(value)
            elif name.endswith("memory_gb"):
                values["memory"].append(1000 * value)
            elif ".splits." in name:
                values["share"].append(value)
                values["score"].append(value)
            elif path.name == "published.json":
                values["share"].append(value / 100)
                values["score"].append(value)
    # Shares of the two tables that lines are only added to, and their mean and spread over seeds.
    scored = pd.read_csv(paths.RESULTS / ledger.NAME)
    recipes = scored.drop_duplicates(["recipe", "seed"], keep="last").groupby("recipe")
    seeds = [group for _, group in recipes]
    for path in paths.RESULTS.glob("*/metrics.json"):
        of_seeds = ledger.seeds(json.loads(path.read_text(encoding="utf-8")))
        seeds.append(pd.DataFrame.from_dict(of_seeds, orient="index"))
    compared = pd.read_csv(paths.RESULTS / ledger.SELECTION)
    for column in ("accuracy", "macro_f1", "burst_accuracy", "ece"):
        found = scored[column].tolist() + [group[column].mean() for group in seeds]
        found += [group[column].std() for group in seeds if len(group) > 1]
        values["share"] += found
        values["score"] += found
    for column in ("criterion", "early", "late"):
        values["share"] += compared[column].tolist()
    values["score"] += compared["log loss"].dropna().tolist()
    return values


def leaves(tree: object, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield the dotted name and value of each number in nested mappings and lists."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{name}.{key}")
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield name, tree


def unknown(text: str) -> list[str]:
    """Return the figures of a text that neither the results nor the facts hold."""
    known = measured()
    strays = []
    for digits, unit in figures(text):
        decimals = len(digits.partition(".")[2])
        values = (SCALES.get(unit, 1) * value for value in known[KINDS[unit]])
        written = f"{digits} {unit}".strip()
        if written not in FACTS and not any(f"{v:.{decimals}f}" == digits for v in values):
            strays.append(written)
    return strays


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_figure_in_prose_is_measured_or_a_known_fact(document: str) -> None:
    assert unknown((paths.PROJECT_ROOT / document).read_text(encoding="utf-8")) == []


def test_a_figure_from_nowhere_is_found() -> None:
    text = "It takes 7 sols, 0.123456 and 98.76 % or 98.7654%, in 4321 seconds,\n"
    text += "<!-- results:begin -->55.55%<!-- results:end --> `11.11 %` and 0.9, version 1.2.0."
    assert unknown(text) == ["0.123456", "98.76 %", "98.7654 %", "4321 seconds"]


def test_no_fact_is_left_over() -> None:
    texts = [(paths.PROJECT_ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS]
    written = {f"{digits} {unit}".strip() for text in texts for digits, unit in figures(text)}
    assert set(FACTS) - written == set()
