"""The one exception that a user's mistake or a missing resource raises, and how commands end."""

import os
import sys
from collections.abc import Callable


class MarsclfError(Exception):
    """Says in one sentence what is wrong, where, and how to fix it."""


def run_command(command: Callable[[], int]) -> int:
    """Return the exit status of `command`: 1 after an error, whose sentence is printed on stderr.

    It is 130 after Ctrl-C, and 141 if the reader of standard output has stopped.
    """
    status = 1
    try:
        result = command()
        print(end="", flush=True)
        return result
    except KeyboardInterrupt:
        status, message = 130, "interrupted; the same command starts it again."
    except BrokenPipeError:
        status, message = 141, ""
    except MarsclfError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        fix = "make the environment with `make environment` and call .venv/bin/python -m marsclf"
        fix += ", or run `pip install .`"
        message = f"{sys.executable} lacks the package {error.name}: {fix}."
    except OSError as error:
        place = error.filename or "standard output or a file"
        message = f"{place} cannot be read or written ({error.strerror or error})."
    except UnicodeError as error:
        message = f"{getattr(error, 'object', '')!a:.300} is not valid text: rename that file."
    try:
        print(end="", flush=True)
    except OSError:  # Python would try again when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    print(f"error: {message}\n" if message else "", end="", file=sys.stderr)
    return status
