"""The command line: python -m marsclf COMMAND."""

import argparse
import os
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return 0, or 1 after an error (one sentence on stderr), or 130 after Ctrl-C.

    `predict` also returns 3, if some images could not be read.
    """
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        print(f"error: marsclf needs Python 3.11 to 3.13, not {sys.version}.", file=sys.stderr)
        return 1
    # Imported here, because another Python version may lack the packages or fail to load them.
    from marsclf import paths
    from marsclf.errors import MarsclfError

    options = vars(_parser().parse_args(arguments))
    command = options.pop("command")
    try:
        if command is not _predict and not paths.NOTEBOOKS.is_dir():
            raise MarsclfError(
                "This is the library alone, which can predict; run the other commands in a copy "
                "of the repository, which has the notebooks and presets."
            )
        return command(**options)
    except MarsclfError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(
            f"error: {sys.executable} lacks the package {error.name}: make the environment with "
            "`make environment` and call .venv/bin/python -m marsclf, or run `pip install .`.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; the same command starts it again.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m marsclf", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    predict = commands.add_parser(
        "predict",
        help="classify images",
        description="Classify images. The exit status is 0, or 3 if some could not be read.",
    )
    add = predict.add_argument
    source_help = "file, folder, pattern such as 'a/**/*.jpg', or - for paths on standard input"
    add("sources", metavar="PATH", nargs="+", help=source_help)
    output_help = "table to write, .csv or .parquet (default: CSV on standard output)"
    add("--output", type=Path, metavar="FILE", help=output_help)
    threshold_help = "a prediction of less confidence is uncertain (default: 0.9)"
    add("--threshold", type=float, default=0.9, help=threshold_help)
    model_help = "classifier.safetensors of a run (default: the published one)"
    add("--model", type=Path, metavar="FILE", help=model_help)
    explain_help = "folder for overlays that show which pixels support the class"
    add("--explain", type=Path, metavar="DIR", help=explain_help)
    engine_help = "this process, or Ray, which writes a folder of Parquet files (default: local)"
    add("--engine", choices=("local", "ray"), default="local", help=engine_help)
    add("--address", help="Ray cluster, such as auto (default: Ray on this machine only)")
    add("--resume", action="store_true", help="continue a run that was stopped")
    predict.set_defaults(command=_predict)

    data_help = "folder of the images (default: MARSCLF_DATA_DIR)"
    data_dir = {"metavar": "DIR", "type": os.path.abspath, "help": data_help}
    run = commands.add_parser("run", help="run a preset's notebooks and print the results")
    run.add_argument("--preset", default="laptop", help="one of presets/ (default: laptop)")
    source = run.add_mutually_exclusive_group()
    source.add_argument("--data-dir", **data_dir)
    source.add_argument("--sample", action="store_true", help="use generated images")
    many = {"nargs": "+", "action": "extend", "default": [], "metavar": "NAME=VALUE"}
    many["help"] = "override parameters of the notebooks; values are YAML"
    run.add_argument("--set", dest="settings", **many)
    weights_help = "ImageNet weights of the backbone, if Keras cannot download them"
    run.add_argument("--weights", type=Path, metavar="FILE", help=weights_help)
    run.set_defaults(command=_run)

    check = commands.add_parser("check-data", help="list every fault of the data")
    check.add_argument("--data-dir", **data_dir)
    check.set_defaults(command=_check_data)
    return parser


def _predict(**options: object) -> int:
    from marsclf.classify.local import Job, predict

    return predict(Job(**options))


def _run(
    preset: str, data_dir: str | None, sample: bool, settings: list[str], weights: Path | None
) -> int:
    from marsclf.pipeline.presets import parameters_of, parse_settings
    from marsclf.pipeline.run import run

    parsed = parse_settings(settings)
    if weights:
        from marsclf.networks.backbones import install_weights  # starts TensorFlow

        install_weights(parameters_of(preset, parsed)["backbone"], weights)
    run(preset, data_dir, parsed, sample)
    return 0


def _check_data(data_dir: str | None) -> int:
    from marsclf import paths
    from marsclf.data.msl import find_faults
    from marsclf.data.open import locate
    from marsclf.errors import MarsclfError

    root = locate(data_dir)
    if root is None:
        raise MarsclfError(
            "There is no data yet: name a folder with --data-dir or MARSCLF_DATA_DIR, or let "
            f"`make run` download it to {paths.DATA}."
        )
    faults = find_faults(root)
    print("\n".join([*faults, f"{root}: {len(faults)} faults"]))
    return 1 if faults else 0
