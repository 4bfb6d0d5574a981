"""Verification of the published results: python -m tools.verify; needs no images or Keras."""

import sys
from functools import partial
from itertools import zip_longest

from marsclf import paths
from marsclf.errors import MarsclfError
from tools.command import make_main
from tools.documents import update_documents
from tools.results import find_classifier_faults, find_faults, read_published


def verify() -> None:
    """Recompute every published metric and compare the documents with their templates.

    Raises MarsclfError if a number is wrong, if the ledger lacks a score, or if a classifier is not
    the one that was measured.
    """
    published, faults = read_published(), []
    checks = {preset: partial(find_faults, result) for preset, result in published.items()}
    for labels in sorted(paths.CLASSIFIERS):
        checks[f"classifier {labels}"] = partial(find_classifier_faults, labels)
    for name, check in checks.items():
        found = check()
        faults += found
        print(f"{name}: {'WRONG' if found else 'ok'}")
    for file, expected in update_documents(published).items() if not faults else ():
        lines = file.read_text(encoding="utf-8").splitlines(), expected.splitlines()
        for number, (line, right) in enumerate(zip_longest(*lines), start=1):
            if line != right:
                faults.append(f"{file}, line {number}: is {line!r}, must be {right!r}")
                break
    if faults:
        raise MarsclfError("What is published is not right:\n" + "\n".join(faults))
    print(f"{len(published)} published results and the documents verified.")


main = make_main(verify)

if __name__ == "__main__":
    sys.exit(main())
