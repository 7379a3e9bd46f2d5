"""Keras losses, by name and by the kind of outputs that they are for."""

import functools
from typing import Any

from tf_lowbit.compat import keras, tf

BINARY = {"binary_crossentropy", "binary_focal_crossentropy"}
CATEGORICAL = {
    "categorical_crossentropy",
    "categorical_focal_crossentropy",
    "sparse_categorical_crossentropy",
}
REGRESSION = {
    *("huber", "log_cosh", "mean_absolute_error", "mean_absolute_percentage_error"),
    *("mean_squared_error", "mean_squared_logarithmic_error"),
}


def named(loss: Any) -> tuple[str | None, bool]:
    """Returns name and `from_logits` of a Keras loss; (None, False) for any other."""
    losses = tf.nest.flatten(loss)
    if len(losses) != 1 or losses[0] is None:
        return None, False
    (loss,) = losses
    if isinstance(loss, str):
        loss = keras.losses.get(loss)
    settings = {}
    if isinstance(loss, functools.partial):
        loss, settings = loss.func, loss.keywords
    elif isinstance(loss, keras.losses.Loss):
        loss, settings = getattr(loss, "fn", None), loss.get_config()
    name = getattr(loss, "__name__", "")
    is_of_keras = name in BINARY | CATEGORICAL | REGRESSION
    if not is_of_keras or loss is not getattr(keras.losses, name, None):
        return None, False
    return name, bool(settings.get("from_logits", False))
