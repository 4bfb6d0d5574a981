"""Keras with the settings that all numbers depend on, in the complete process: import it here."""

import os

from marsclf.errors import MarsclfError

os.environ["KERAS_BACKEND"] = "tensorflow"  # whatever the user's keras.json says
try:
    import keras
except ValueError as error:
    raise MarsclfError(f"Keras does not start: correct its keras.json ({error}).") from error
if (backend := keras.config.backend()) != "tensorflow":
    fix = "set KERAS_BACKEND=tensorflow before it is imported"
    raise MarsclfError(f"Keras runs on {backend} in this process, not on TensorFlow: {fix}.")
keras.config.set_floatx("float32")
keras.config.set_dtype_policy("float32")
keras.config.set_image_data_format("channels_last")
keras.config.set_epsilon(1e-7)
keras.config.set_max_epochs(None)
