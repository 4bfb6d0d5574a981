"""The command line: python -m marsclf COMMAND."""

import argparse
import os
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return 0, or 1 with a sentence on stderr, or 130 after Ctrl-C."""
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        print(f"error: marsclf needs Python 3.11 to 3.13, not {sys.version}.", file=sys.stderr)
        return 1
    # Imported only now, because another Python may lack the packages or fail in them.
    from marsclf import paths
    from marsclf.errors import MarsclfError

    options = _parser().parse_args(arguments)
    try:
        if options.command is not _predict and not paths.NOTEBOOKS.is_dir():
            raise MarsclfError(
                "This is the library alone, which can predict; the other commands need the "
                "notebooks and presets of the repository: run them from a copy of it."
            )
        return options.command(options)
    except MarsclfError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(
            f"error: {sys.executable} lacks the package {error.name}: make the environment with "
            "`make environment` and call .venv/bin/python -m marsclf, or install what is missing "
            "with `pip install .`.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; the same command starts it again.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m marsclf", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    data_dir = {
        "metavar": "DIR",
        "type": os.path.abspath,
        "help": "folder of the images (default: MARSCLF_DATA_DIR)",
    }
    settings = {
        "dest": "settings",
        "metavar": "NAME=VALUE",
        "nargs": "+",
        "action": "extend",
        "default": [],
        "help": "override parameters of the notebooks; values are YAML",
    }

    predict = commands.add_parser(
        "predict",
        help="classify images",
        description="Classify images. The exit status is 0, or 3 if some could not be read.",
    )
    predict.add_argument(
        "sources",
        metavar="PATH",
        nargs="+",
        help="file, folder, pattern such as 'a/**/*.jpg', or - for names on standard input",
    )
    predict.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="table to write, .csv or .parquet (default: CSV on standard output)",
    )
    predict.add_argument(
        "--threshold",
        type=float,
        default=0.9,
        help="confidence beneath which a class is uncertain (default: 0.9)",
    )
    predict.add_argument(
        "--model",
        type=Path,
        metavar="FILE",
        help="classifier.npz of a run (default: the published one)",
    )
    predict.add_argument(
        "--explain", type=Path, metavar="DIR", help="folder for overlays of what spoke for a class"
    )
    predict.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="this process, or Ray, which writes a folder of parts (default: local)",
    )
    predict.add_argument(
        "--address", help="Ray cluster, such as auto (default: Ray on this machine alone)"
    )
    predict.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    predict.set_defaults(command=_predict)

    run = commands.add_parser("run", help="run a preset's notebooks and print the results")
    run.add_argument("--preset", default="laptop", help="one of presets/ (default: laptop)")
    source = run.add_mutually_exclusive_group()
    source.add_argument("--data-dir", **data_dir)
    source.add_argument("--sample", action="store_true", help="use generated images")
    run.add_argument("--set", **settings)
    run.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="ImageNet weights of the backbone, where Keras cannot download them",
    )
    run.set_defaults(command=_run)

    check = commands.add_parser("check-data", help="list every fault of the data")
    check.add_argument("--data-dir", **data_dir)
    check.set_defaults(command=_check_data)

    return parser


def _predict(options: argparse.Namespace) -> int:
    from marsclf.classify.local import predict
    from marsclf.errors import MarsclfError

    if options.engine == "ray":
        from marsclf.classify.on_ray import predict_on_ray

        if options.explain:
            raise MarsclfError("--explain is of the local engine: leave out --engine ray.")
        return predict_on_ray(
            options.sources,
            options.output,
            options.threshold,
            options.model,
            options.address,
            options.resume,
        )
    if options.address:
        raise MarsclfError("--address is of a Ray cluster: add --engine ray.")
    return predict(
        options.sources,
        options.output,
        options.threshold,
        options.model,
        options.explain,
        options.resume,
    )


def _run(options: argparse.Namespace) -> int:
    from marsclf.pipeline.presets import parameters_of, parse_settings
    from marsclf.pipeline.run import run

    settings = parse_settings(options.settings)
    if options.weights:
        from marsclf.networks.backbones import install_weights

        install_weights(parameters_of(options.preset, settings)["backbone"], options.weights)
    run(options.preset, options.data_dir, settings, options.sample)
    return 0


def _check_data(options: argparse.Namespace) -> int:
    from marsclf import paths
    from marsclf.data.msl import find_faults
    from marsclf.data.open import locate
    from marsclf.errors import MarsclfError

    root = locate(options.data_dir)
    if root is None:
        raise MarsclfError(
            "There is no data yet: name a folder with --data-dir or MARSCLF_DATA_DIR, or let "
            f"`make run` download it to {paths.DATA}."
        )
    faults = find_faults(root)
    print("\n".join([*faults, f"{root}: {len(faults)} faults"]))
    return 1 if faults else 0
