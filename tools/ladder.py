"""The command `ladder`: the notebook that reproduces the reference, from images to results/."""

import json
import time
from pathlib import Path

from marsclf import paths
from marsclf.data import msl as data
from marsclf.data.open import open_dataset
from marsclf.data.sample import make_sample
from marsclf.files import write_json
from marsclf.pipeline.presets import LADDER_NOTEBOOK, parameters_of
from marsclf.pipeline.run import execute
from marsclf.provenance import commit, hardware, peak_rss_mb
from tools.publish import publish_ladder


def run_ladder(
    preset: str,
    data_dir: str | Path | None = None,
    settings: dict[str, object] | None = None,
    sample: bool = False,
) -> dict:
    """Run the notebook of the ladder into runs/<preset>/ and return (and write) its results.

    Those of the real data with the preset's own parameters are published, too. Rungs that were
    done before are not done again.
    """
    started = time.monotonic()
    parameters = parameters_of(preset, settings)
    run_dir, code = paths.RUNS / preset, commit()
    dataset = open_dataset(make_sample(paths.CACHE / "sample") if sample else data_dir)
    print(f"Data: {dataset.name}, {len(dataset.index):,} images in {dataset.root}")
    fixed = {"data_dir": str(dataset.root.resolve()), "run_dir": str(run_dir), "preset": None}
    execute(LADDER_NOTEBOOK, run_dir / f"{LADDER_NOTEBOOK}.ipynb", parameters | fixed)
    rungs = json.loads((run_dir / "rungs.json").read_text(encoding="utf-8"))
    result = {
        "dataset": dataset.name,
        "data_digest": dataset.digest,
        "preset": preset,
        "backbone": parameters["backbone"],
        "seed": parameters["seed"],
        "commit": code,
        "settings": settings or {},
        "parameters": parameters,
        "hardware": hardware(),
        "wall_s": round(time.monotonic() - started, 1),
        "peak_rss_mb": peak_rss_mb(),
        "rungs": rungs,
    }
    write_json(run_dir / "ladder.json", result)
    for rung in rungs.values():
        shares = [f"{split} {rung['splits'][split]['accuracy']:.1%}" for split in data.SPLITS]
        print(f"{rung['name']:>18}  {', '.join(shares)}")
    if dataset.name != "msl-v1":
        print(f"\n{data.SAMPLE_NOTICE} Nothing was published.")
    elif not settings:
        publish_ladder(preset)
    return result
