"""Publishing the result of a preset on the real data: python -m tools.publish --preset P.

Figures that show only the data are published with the default preset alone.
"""

import gzip
import json
import shutil
import sys

from marsclf import paths
from marsclf.errors import MarsclfError
from marsclf.files import replace_atomically, write_json
from marsclf.pipeline.presets import DEFAULT_PRESET, data_of, parameters_of
from tools.command import make_main
from tools.documents import update_documents, write_documents
from tools.results import find_faults, read_published, read_run


def publish(preset: str) -> None:
    """Copy the result of a run into results/ and figures/ and update the documents.

    Raises MarsclfError, and changes nothing, unless the run is complete, used the real data and the
    preset's own parameters, and its metrics can be recomputed from its predictions.
    """
    run, run_dir = read_run(preset), paths.RUNS / preset
    used = run.record["parameters"] | {"dataset": run.record.get("dataset")}
    expected = json.loads(json.dumps(parameters_of(preset)))  # lists in place of tuples
    expected["dataset"] = data_of(preset)
    faults = [
        f"{parameter} was {used.get(parameter)!r}, but the preset says {value!r}"
        for parameter, value in expected.items()
        if used.get(parameter) != value
    ] or find_faults(run)
    figures = {*run_dir.glob("figures/*.png")}
    if preset != DEFAULT_PRESET:  # notebook 01 shows only the data
        figures -= {*run_dir.glob("figures/01_*")}
    if not figures:
        faults.append(f"there are no figures in {run_dir / 'figures'}")
    if faults:
        raise MarsclfError(f"The run of {preset} cannot be published: {'; '.join(faults)}.")
    documents = update_documents(dict(sorted((read_published() | {preset: run}).items())))
    with replace_atomically(paths.FIGURES / preset) as folder:
        folder.mkdir()
        for figure in figures:
            shutil.copyfile(figure, folder / figure.name)
    with replace_atomically(paths.RESULTS / preset) as folder:
        folder.mkdir()
        for part, file in run.predictions.items():
            # mtime=0: equal predictions give an equal file.
            packed = gzip.compress(file.read_bytes(), mtime=0)
            (folder / f"{part}.csv.gz").write_bytes(packed)
        write_json(folder / run.file.name, run.record)
    write_documents(documents)
    print(f"Published {preset}: {paths.RESULTS / preset}, {paths.FIGURES / preset}, the documents.")
    commit = run.record["commit"]
    if commit == "unknown" or commit.endswith("-dirty"):
        print(f"Warning: its code is commit {commit!r}, which nobody else can check out.")


main = make_main(publish, "preset")

if __name__ == "__main__":
    sys.exit(main())
