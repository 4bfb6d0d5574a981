"""The command line: python -m marsclf COMMAND."""

import argparse
import os
import sys
from pathlib import Path

from marsclf import paths
from marsclf.errors import MarsclfError


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return 0, or 1 after an error (one sentence on stderr), or 130 after Ctrl-C.

    `predict` also returns 3, if some images could not be read.
    """
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        print(f"error: marsclf needs Python 3.11 to 3.13, not {sys.version}.", file=sys.stderr)
        return 1
    options = _parser().parse_args(arguments)
    try:
        if options.command is not _predict and not paths.NOTEBOOKS.is_dir():
            raise MarsclfError(
                "This is the library alone, which can predict; run the other commands in a copy "
                "of the repository, which has the notebooks and presets."
            )
        return options.command(options)
    except MarsclfError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(
            f"error: {sys.executable} lacks the package {error.name}: make the environment with "
            "`make environment` and call .venv/bin/python -m marsclf, or run `pip install .`, for "
            "Ray `pip install '.[ray]'`.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; the same command starts it again.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m marsclf", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    text = "classify images; the exit status is 0, or 3 if some could not be read"
    predict = commands.add_parser("predict", help=text, description=text)
    add = predict.add_argument
    add("sources", metavar="PATH", nargs="+", help="file, folder, 'a/**/*.jpg', or - for a list")
    add("--output", type=Path, help=".csv or .parquet file (default: CSV on standard output)")
    add("--threshold", type=float, default=0.9, help="less confidence is uncertain (default: 0.9)")
    add("--model", type=Path, default=paths.CLASSIFIER, help="classifier.safetensors of a run")
    add("--explain", type=Path, help="folder for overlays that show which pixels support the class")
    text = "this process, or Ray, which writes a folder of Parquet files (default: local)"
    add("--engine", choices=("local", "ray"), default="local", help=text)
    add("--address", help="Ray cluster, such as auto (default: Ray on this machine only)")
    add("--resume", action="store_true", help="continue a run that was stopped")
    predict.set_defaults(command=_predict)

    run = commands.add_parser("run", help="run a preset's notebooks and print the results")
    run.add_argument("--preset", default="laptop", help="one of presets/ (default: laptop)")
    source = run.add_mutually_exclusive_group()
    source.add_argument("--sample", action="store_true", help="use generated images")
    text = "override parameters of the notebooks; values are YAML"
    many = {"nargs": "+", "action": "extend", "default": [], "metavar": "NAME=VALUE"}
    run.add_argument("--set", dest="settings", help=text, **many)
    run.add_argument("--weights", type=Path, help="ImageNet weights, if Keras cannot download them")
    run.set_defaults(command=_run)

    check = commands.add_parser("check-data", help="list every fault of the data")
    text = "folder of the images (default: MARSCLF_DATA_DIR)"
    for group in (source, check):
        group.add_argument("--data-dir", type=os.path.abspath, help=text)
    check.set_defaults(command=_check_data)
    return parser


def _predict(options: argparse.Namespace) -> int:
    from marsclf.classify.local import predict

    return predict(options)


def _run(options: argparse.Namespace) -> int:
    from marsclf.pipeline.presets import parameters_of, parse_settings
    from marsclf.pipeline.run import run

    settings = parse_settings(options.settings)
    if options.weights:  # Keras takes seconds to load
        from marsclf.networks.backbones import install_weights

        install_weights(parameters_of(options.preset, settings)["backbone"], options.weights)
    run(options.preset, options.data_dir, settings, options.sample)
    return 0


def _check_data(options: argparse.Namespace) -> int:
    from marsclf.data.msl import find_faults
    from marsclf.data.open import locate

    root = locate(options.data_dir)
    if root is None:
        raise MarsclfError(
            "There is no data yet: name a folder with --data-dir or MARSCLF_DATA_DIR, or call "
            f"`make run`, which downloads it to {paths.DATA}."
        )
    faults = find_faults(root)
    print("\n".join([*faults, f"{root}: {len(faults)} faults"]))
    return 1 if faults else 0
