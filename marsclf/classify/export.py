"""The command `export`: a classifier's network as a file for another library.

The network takes views of images and gives calibrated probabilities: the weights of its last layer
are divided by the temperature. The file's metadata say how to make views and how to pool zooms.
"""

import json
import sys
import zipfile
from argparse import Namespace

from marsclf.classify import classifier_file
from marsclf.classify.local import quiet_libraries
from marsclf.errors import MarsclfError
from marsclf.files import replace_atomically

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "keras": ".keras"}
METADATA = "marsclf.json"  # in a .keras file, which is a zip archive


def export(options: Namespace) -> int:
    """Write the network of the classifier `options.model` to `options.file`; return 0.

    For OpenVINO, the weights are in a .bin beside the file. Raises MarsclfError if the classifier
    or the file cannot be used, or if OpenVINO reads a network from it that differs from Keras's.
    """
    file, suffix = options.file, SUFFIXES[options.format]
    if file.suffix != suffix or file.is_dir() or file.with_suffix(".bin").is_dir():
        raise MarsclfError(f"--format {options.format} writes a {suffix} file, not {file}.")
    weights, metadata, _ = classifier_file.read(options.model)
    info = _describe(metadata)
    print(f"Exporting {metadata['backbone']} ...", file=sys.stderr)
    with quiet_libraries():
        from marsclf.networks.engine import check_export, save_openvino
        from marsclf.networks.onnx_file import save_onnx
        from marsclf.networks.pinned import keras

        with keras.device("cpu:0"):  # a GPU would round more before the networks are compared
            model, _ = classifier_file.build_network(options.model, weights, metadata)
            last, temperature = model.layers[-1], metadata["calibration"]["temperature"]
            last.set_weights([weight / temperature for weight in last.get_weights()])
            with replace_atomically(file) as temporary:
                if suffix == ".keras":
                    model.save(temporary)
                    with zipfile.ZipFile(temporary, "a") as archive:
                        archive.writestr(METADATA, json.dumps(info, indent=1))
                else:
                    save = save_onnx if suffix == ".onnx" else save_openvino
                    save(model, temporary, info)
                    check_export(temporary, model)
                if suffix == ".xml":
                    with replace_atomically(file.with_suffix(".bin")) as binary:
                        temporary.with_suffix(".bin").rename(binary)
                        # If killed here, no old network has the new weights.
                        file.unlink(missing_ok=True)
    return 0


def _describe(metadata: dict) -> dict[str, str]:
    """Return the metadata of the exported file: what goes into the network and what comes out."""
    size = metadata["image_size"]
    return {
        "input": f"float32 (n, {size}, {size}, 3): views, RGB, 0 to 255",
        "view": f"scale the complete image until its longer side has {size} pixels times the zoom "
        f"(average areas to shrink it), center it in a square of {size} pixels, and fill the rest "
        "with its reflections, as marsclf.images.views.fit_view does",
        "output": "float32 (n, classes): calibrated probabilities",
        "classes": json.dumps(metadata["classes"]),
        "zooms": json.dumps(metadata["zooms"]),
        "pooling": "softmax of the mean, over the zooms, of the logarithms of the probabilities",
        "training": json.dumps(metadata["training"]),
    }
