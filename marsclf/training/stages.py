"""The parts of both training stages: the head, the classifier, and how they learn."""

from marsclf.networks.pinned import keras


def build_head(width: int, hidden: int, dropout: float, classes: int) -> keras.Model:
    """Return a new head, linear if `hidden` is 0: (n, width) to probabilities (n, classes)."""
    layers = keras.layers
    stack = [layers.Input((width,), name="features"), layers.Dropout(dropout, name="head_dropout")]
    if hidden:
        stack.append(layers.Dense(hidden, activation="relu", name="head_hidden"))
        stack.append(layers.Dropout(dropout, name="head_hidden_dropout"))
    stack.append(layers.Dense(classes, activation="softmax", name="probabilities"))
    return keras.Sequential(stack, name="head")


def join(backbone: keras.Model, head: keras.Model) -> keras.Model:
    """Return one flat model, images to probabilities, that shares the weights of both parts."""
    tensor = backbone.output
    for layer in head.layers:
        tensor = layer(tensor)
    return keras.Model(backbone.input, tensor, name=f"{backbone.name}_classifier")


def compile_model(
    model: keras.Model,
    learning_rate: float,
    steps: int,
    weight_decay: float,
    label_smoothing: float,
    ema: float = 0.0,
) -> None:
    """Compile a model for a stage of so many batches, as notebook 02 explains.

    The learning rate of AdamW falls to 0 along a cosine. `label_smoothing` is the share of the
    probability that is spread over all classes, `ema` the momentum per step of the exponential
    moving average of the weights (0: none).
    """
    optimizer = keras.optimizers.AdamW(
        keras.optimizers.schedules.CosineDecay(learning_rate, steps),
        weight_decay=weight_decay,
        use_ema=ema > 0,
        ema_momentum=ema,
    )
    if any(layer.compute_dtype == "float16" for layer in model.layers):
        # Keras does so itself only if the head, too, computes in float16.
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model.compile(
        optimizer,
        keras.losses.CategoricalCrossentropy(label_smoothing=label_smoothing),
        metrics=["accuracy"],
        # XLA makes TensorFlow's depthwise convolutions twenty times slower on a CPU.
        jit_compile=False,
    )
