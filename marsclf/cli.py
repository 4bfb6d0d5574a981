"""The command line: python -m marsclf COMMAND."""

import argparse
import os

from marsclf import paths
from marsclf.errors import MarsclfError, run_command


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status: see run_command, and 3 for unreadable images."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: options.command(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m marsclf", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    text = "classify images; the exit status is 0, or 3 if some could not be read"
    predict = commands.add_parser("predict", help=text, description=text)
    add, a_path = predict.add_argument, {"type": paths.from_user}
    text = "file, folder, 'a/**/*.jpg', or - for a list"
    add("sources", type=os.path.expanduser, metavar="PATH", nargs="+", help=text)
    add("--output", help=".csv or .parquet (default: CSV on standard output)", **a_path)
    add("--threshold", type=float, default=0.9, help="less confidence is uncertain (default: 0.9)")
    add("--explain", help="folder for overlays that show which pixels support the class", **a_path)
    add("--resume", action="store_true", help="continue a run that was stopped")
    which = predict.add_mutually_exclusive_group()
    text = "parts of the rover (default), or kinds of content"
    which.add_argument("--labels", choices=paths.CLASSIFIERS, default="parts", help=text)
    which.add_argument("--model", help="your own classifier.safetensors", **a_path)
    predict.set_defaults(command=_predict)

    run = commands.add_parser("run", help="run a preset's notebooks and print the results")
    run.add_argument("--preset", default="laptop", help="one of presets/ (default: laptop)")
    source = run.add_mutually_exclusive_group()
    source.add_argument("--sample", action="store_true", help="use generated images")
    text = "override parameters of the notebooks; values are YAML"
    many = {"nargs": "+", "action": "extend", "default": [], "metavar": "NAME=VALUE"}
    run.add_argument("--set", dest="settings", help=text, **many)
    text = "train without a GPU even if that takes many hours"
    run.add_argument("--yes-on-cpu", action="store_true", help=text)
    text = "ImageNet weights of EfficientNetB0 to B7, if Keras cannot download them"
    for command in (predict, run):
        command.add_argument("--weights", help=text, **a_path)
    run.set_defaults(command=_run)

    check = commands.add_parser("check-data", help="list every fault of the data")
    text = "folder of the images (default: MARSCLF_DATA_DIR)"
    for group in (source, check):
        group.add_argument("--data-dir", type=lambda t: paths.from_user(t).absolute(), help=text)
    check.set_defaults(command=_check_data)
    return parser


def _predict(options: argparse.Namespace) -> int:
    from marsclf.classify.predict import predict

    options.model = options.model or paths.CLASSIFIERS[options.labels]
    if options.weights:
        from marsclf.classify.classifier_file import read
        from marsclf.networks.backbones import fetch_weights

        fetch_weights(read(options.model)[1]["backbone"], options.weights)
    return predict(options)


def _run(options: argparse.Namespace) -> int:
    _check_repository()
    from marsclf.pipeline.presets import parameters_of, parse_settings
    from marsclf.pipeline.run import run

    settings = parse_settings(options.settings)
    if options.weights:  # Keras takes seconds to load
        from marsclf.networks.backbones import fetch_weights

        fetch_weights(parameters_of(options.preset, settings)["backbone"], options.weights)
    run(options.preset, options.data_dir, settings, options.sample, options.yes_on_cpu)
    return 0


def _check_data(options: argparse.Namespace) -> int:
    _check_repository()
    from marsclf.data.open import locate, scan

    root = locate(options.data_dir)
    if root is None:
        raise MarsclfError(
            "There is no data yet: name a folder with --data-dir or MARSCLF_DATA_DIR, or call "
            f"`make run`, which downloads it to {paths.DATA}."
        )
    faults = scan(root)[0]
    print("\n".join([*faults, f"{root}: {len(faults)} fault{'s' * (len(faults) != 1)}"]))
    return 1 if faults else 0


def _check_repository() -> None:
    if not paths.NOTEBOOKS.is_dir():
        raise MarsclfError(
            "This is the library alone, which can only predict; run the other commands in a copy "
            "of the repository, which has the notebooks and presets."
        )
