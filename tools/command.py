"""What the commands of this folder share: their options, and errors as one sentence."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from marsclf.errors import run_command
from marsclf.paths import from_user
from marsclf.pipeline.presets import DEFAULT_PRESET, parse_settings

FOLDER = {"type": lambda text: from_user(text).absolute()}
OPTIONS = {
    "preset": {"default": DEFAULT_PRESET, "help": "one of presets/ (default: %(default)s)"},
    "data_dir": FOLDER | {"help": "folder of the images"},
    "outside_dir": FOLDER | {"help": "folder of msl-v2.1, for images of no class of msl-v1"},
    "seeds": {
        "type": int,
        "choices": range(1, 21),
        "metavar": "NUMBER",
        "default": 3,
        "help": "networks of each recipe, 1 to 20 (default: %(default)s)",
    },
    "set": {
        "dest": "settings",
        "metavar": "NAME=VALUE",
        "nargs": "+",
        "action": "extend",
        "default": [],
        "help": "override parameters of the preset; values are YAML",
    },
}


def make_main(work: Callable[..., object], *options: str) -> Callable[..., int]:
    """Return a function from the arguments of a command line to the exit status of the command.

    `options` are names in OPTIONS, which `work` takes as keyword arguments; the first line of its
    docstring is the help text. The arguments are those of this process, or a list.
    """

    def main(arguments: list[str] | None = None) -> int:
        program = f"python -m tools.{Path(sys.argv[0]).stem}"
        parser = argparse.ArgumentParser(program, description=work.__doc__.partition("\n")[0])
        for option in options:
            parser.add_argument(f"--{option.replace('_', '-')}", **OPTIONS[option])
        chosen = vars(parser.parse_args(arguments))

        def command() -> int:
            if "settings" in chosen:
                chosen["settings"] = parse_settings(chosen["settings"])
            work(**chosen)
            return 0

        return run_command(command)

    return main
