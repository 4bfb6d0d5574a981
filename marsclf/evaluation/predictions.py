"""The predictions file: its columns, and how it is written and read.

A CSV (or .csv.gz) with one row per image: split, path, label, predicted, confidence and, for each
class, the probability with four significant digits, p_00 ... p_24. Where the groups are not the
sols in the names of images, `group` and `sequence` follow confidence: images of one group are not
independent, images of one sequence show one subject.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import pandas as pd

from marsclf import paths
from marsclf.data.dataset import SPLITS
from marsclf.data.msl import MSL_V1
from marsclf.data.product_id import parse_product_id
from marsclf.errors import MarsclfError
from marsclf.files import replace_atomically

COLUMNS = ["split", "path", "label", "predicted", "confidence"]
SCENE = ["group", "sequence"]  # where the file lacks them, the path has sol, camera and sequence


def as_predictions(rows: pd.DataFrame, probabilities: np.ndarray) -> pd.DataFrame:
    """Return predictions for rows of an index, or of predictions, and probabilities (n, classes).

    Predicted class and confidence are those of the rounded probabilities.
    """
    rounded = np.char.mod("%.4g", probabilities).astype(np.float64)
    table = rows.filter([*COLUMNS[:3], *SCENE, "sol", "camera"]).reset_index(drop=True)
    if "sol" in rows and (rows["group"].astype(str) != rows["sol"].astype(str)).any():
        table = table.drop(columns=["sol", "camera"])  # the user's groups count
    table = table.assign(predicted=rounded.argmax(axis=1), confidence=rounded.max(axis=1))
    return _complete(table.join(pd.DataFrame(rounded, columns=_p_columns(rounded.shape[1]))))


def write_predictions(path: Path, rows: pd.DataFrame, probabilities: np.ndarray) -> None:
    """Write `as_predictions` of the arguments as CSV, gzipped if the name ends with .gz."""
    table = as_predictions(rows, probabilities)
    columns = COLUMNS + ([] if "sol" in table else SCENE) + _p_columns(probabilities.shape[1])
    with replace_atomically(path) as temporary:
        table[columns].to_csv(temporary, index=False, float_format="%.4g", lineterminator="\n")


def read_predictions(path: Path) -> pd.DataFrame:
    """Read a predictions file; raise MarsclfError, with the line, for the first fault.

    The table has the columns group and sequence and, if all paths are product ids, sol and camera;
    the group is then the sol.
    """
    texts = dict.fromkeys(["split", "path", *SCENE], str)
    try:  # only an empty text is missing; "NA" is a name
        table = pd.read_csv(path, dtype=texts, keep_default_na=False, na_values=[""])
    except FileNotFoundError:
        raise MarsclfError(f"There is no predictions file {path}: call `make run`.") from None
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise MarsclfError(f"{path} cannot be read as a CSV file: {error}.") from error
    classes = _p_columns(max(2, probabilities_of(table).shape[1]))
    scene = SCENE if {*SCENE} & {*table} else []
    columns = [*COLUMNS, *scene, *classes]
    if missing := [name for name in columns if name not in table.columns]:
        raise MarsclfError(f"{path} lacks the columns {', '.join(missing)}.")
    if table.empty:
        raise MarsclfError(f"{path} holds no predictions.")
    numbers = table[[*COLUMNS[2:], *classes]].apply(pd.to_numeric, errors="coerce")
    probabilities = numbers[classes].to_numpy(dtype=np.float64)
    is_valid = (
        table["split"].isin(SPLITS)
        & table[["path", *scene]].notna().all(axis=1)
        & numbers["label"].isin(range(len(classes)))
        & (probabilities >= 0).all(axis=1)
        # Rounding probabilities to four digits leaves their sum within 0.0005 of 1.
        & (np.abs(probabilities.sum(axis=1) - 1) <= 0.002)
        & (numbers["predicted"] == probabilities.argmax(axis=1))
        & (numbers["confidence"] == probabilities.max(axis=1))
    )
    if not is_valid.all():
        place = f"{path}, line {int(np.argmin(is_valid)) + 2}"
        raise MarsclfError(f"{place} is not a valid prediction: run notebook 02 again.")
    return _complete(table[columns].astype({"label": int, "predicted": int}))


def newest_predictions(run_dir: Path) -> Path | None:
    """Return the newest predictions.csv of the run in `run_dir` and of those in runs/, if any."""
    files = [run_dir / "predictions.csv", *paths.RUNS.glob("*/predictions.csv")]
    return max(filter(Path.is_file, files), key=lambda file: file.stat().st_mtime, default=None)


def probabilities_of(predictions: pd.DataFrame) -> np.ndarray:
    """Return the probabilities of predictions, (rows, classes)."""
    return predictions.filter(regex=r"^p_\d+$").to_numpy()


def _p_columns(classes: int) -> list[str]:
    return [f"p_{label:02d}" for label in range(classes)]


def _complete(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with `group` and `sequence`; from product ids also with sol and camera."""
    if "sol" not in table and "group" not in table:
        products = [parse_product_id(path)[:3] for path in table["path"]]
        table = table.join(pd.DataFrame(products, table.index, ["sol", "camera", "sequence"]))
    return table.assign(group=table["sol"]) if "sol" in table else table


def run_record(predictions_file: Path) -> dict:
    """Return training.json, else metrics.json, beside a predictions file; {} without either."""
    for path in map(predictions_file.with_name, ("training.json", "metrics.json")):
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError) as error:
            raise MarsclfError(f"{path} cannot be read as a run's record: {error}.") from error
    return {}


def class_names(record: dict, predictions: pd.DataFrame) -> tuple[str, ...]:
    """Return the names of the classes of predictions, by id, from the record of their run.

    A record without names is of the classes of msl-v1. Raises MarsclfError if the number of names
    is not that of the classes.
    """
    names = record.get("classes", MSL_V1.classes)
    if len(names) != (number := probabilities_of(predictions).shape[1]):
        reason = f"The run's record names {len(names)} classes, but its predictions have {number}"
        raise MarsclfError(f"{reason}: run notebook 02 again.")
    return tuple(names)
