"""Keras models as ONNX files, for the kinds of layers that this project's networks have.

Keras itself needs tf2onnx for this, which has no maintainer.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from marsclf.networks.pinned import keras

OPSET, IR_VERSION = 17, 8  # of 2022, so that older programs read the file, too
OPERATORS = {"relu": "Relu", "sigmoid": "Sigmoid", "softmax": "Softmax"}


def save_onnx(model: keras.Model, file: Path, info: Mapping[str, str]) -> None:
    """Write a model, images (n, height, width, 3) to probabilities (n, classes), as an ONNX file.

    `info` becomes its metadata_props. Raises NotImplementedError for a layer of another kind.
    """
    nodes, constants = [], []

    def add(operator: str, *inputs: str | np.ndarray, **attributes: Any) -> str:
        """Add a node, whose inputs are other nodes' outputs or constants; return its output."""
        names = []
        for tensor in inputs:
            if isinstance(tensor, np.ndarray):
                constants.append(numpy_helper.from_array(tensor, f"constant_{len(constants)}"))
                tensor = constants[-1].name
            names.append(tensor)
        nodes.append(helper.make_node(operator, names, [f"{operator}_{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    once = keras.models.clone_model(model)  # calls each layer once, so that it has one input
    once.set_weights(model.get_weights())
    outputs = {once.input.name: add("Transpose", "image", perm=(0, 3, 1, 2))}
    for layer in once.layers[1:]:
        tensors = layer.input if isinstance(layer.input, list) else [layer.input]
        outputs[layer.output.name] = _add_layer(add, layer, *(outputs[t.name] for t in tensors))
    nodes[-1].output[0] = "probabilities"
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", *shape[1:]])
        for name, shape in (("image", model.input_shape), ("probabilities", model.output_shape))
    ]
    graph = helper.make_graph(nodes, "marsclf", ends[:1], ends[1:], constants)
    opset = helper.make_opsetid("", OPSET)
    made = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
    helper.set_model_props(made, dict(info))
    onnx.checker.check_model(made, full_check=True)
    onnx.save(made, file)


def _add_layer(add: Callable[..., str], layer: keras.Layer, x: str, *others: str) -> str:
    """Add the nodes of a layer, for tensors (n, channels, height, width); return its output."""
    weights = layer.get_weights()
    match type(layer).__name__:
        case "Dropout" | "Activation":
            pass
        case "Rescaling":
            x = add("Add", add("Mul", x, _channels(layer.scale)), _channels(layer.offset))
        case "Normalization":
            x = add("Sub", x, _channels(weights[0]))
            x = add("Div", x, _channels(np.sqrt(weights[1])))
        case "ZeroPadding2D":
            (top, bottom), (left, right) = layer.padding
            x = add("Pad", x, np.array([0, 0, top, left, 0, 0, bottom, right]))
        case "Conv2D" | "DepthwiseConv2D" as kind:
            depthwise = kind == "DepthwiseConv2D"
            kernel = weights[0].transpose((2, 3, 0, 1) if depthwise else (3, 2, 0, 1))
            options = {"strides": layer.strides, "group": len(kernel) if depthwise else 1}
            options["auto_pad"] = {"same": "SAME_UPPER", "valid": "VALID"}[layer.padding]
            x = add("Conv", x, kernel, *weights[1:], **options)
        case "BatchNormalization":
            x = add("BatchNormalization", x, *weights, epsilon=layer.epsilon)
        case "ReLU":  # ReLU6
            x = add("Clip", x, np.array(0, "float32"), np.array(layer.max_value, "float32"))
        case "Add":
            x = add("Add", x, *others)
        case "Multiply":
            x = add("Mul", x, *others)
        case "GlobalAveragePooling2D":
            x = add("Flatten", add("GlobalAveragePool", x))
        case "Reshape":  # (n, channels) to (n, 1, 1, channels), for squeeze-and-excitation
            x = add("Reshape", x, np.array([-1, layer.target_shape[-1], 1, 1]))
        case "Dense":
            x = add("Gemm", x, *weights)
        case kind:
            raise NotImplementedError(f"the layer {layer.name} of kind {kind}")
    activation = getattr(layer, "activation", keras.activations.linear).__name__
    if activation == "silu":
        return add("Mul", x, add("Sigmoid", x))
    return x if activation == "linear" else add(OPERATORS[activation], x)


def _channels(values: Any) -> np.ndarray:
    """Return one value, or one per channel, in a shape that fits (n, channels, height, width)."""
    return np.array(values, np.float32).reshape(-1, 1, 1)
