"""Ranges of a network's tensors on data, where its training fixed none."""

import numpy as np

from tf_lowbit.compat import keras, tf
from tf_lowbit.observation import batches_for, inputs_in, validate_batches
from tf_lowbit.scheme import graph


def key(tensor) -> str:
    """A name for a Keras tensor that another copy of the model has too."""
    history = tensor._keras_history
    call = f"@{history.node_index}" if history.node_index else ""
    output = f":{history.tensor_index}" if history.tensor_index else ""
    return f"{history.layer.name}{call}{output}"


class Ranges:
    """Least and greatest values of a network's tensors.

    Args:
        model: functional model.
        data: iterable of batches, `x` or `(x, y)` or `(x, y, weight)`; or None.
        batches: how many of them to measure on.
        known: ranges that were measured before, `key` -> (least, greatest).

    Attributes:
        used: those that were asked for.
    """

    def __init__(self, model: keras.Model, data=None, batches: int = 8, known=None):
        validate_batches(batches)
        self._model = model
        self._data = data
        self._batches = batches
        self._measured: dict | None = None
        self._known = {k: tuple(v) for k, v in (known or {}).items()}
        self.used: dict[str, tuple[float, float]] = {}

    def __call__(self, tensor) -> tuple[float, float]:
        """The range of a Keras tensor of the model.

        Raises:
            ValueError: if there are no data to measure it on, or a value is not finite.
        """
        name = key(tensor)
        if name not in self._known:
            if self._measured is None:
                self._measured = self._measure(name)
            self._known[name] = self._measured[name]
        low, high = self._known[name]
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError(
                "Activations must be finite on the data; look for NaN in it or in the "
                f"weights. Received: {name} in [{low}, {high}]"
            )
        self.used[name] = (low, high)
        return low, high

    def _measure(self, wanted):
        if self._data is None:
            raise ValueError(
                "data must be given: nothing in the training fixed the range of some "
                f"integer tensors. Received: data=None, and {wanted!r} is one"
            )
        tensors = [
            tensor
            for node in graph.nodes(self._model)
            for tensor in graph.outputs_of(node)
            if tensor.dtype.is_floating
        ]
        reduced = tf.function(self._reduced(keras.Model(self._model.inputs, tensors)))
        low = np.full(len(tensors), np.inf)
        high = np.full(len(tensors), -np.inf)
        count = 0
        for batch in batches_for(self._model, self._data, self._batches):
            least, greatest = reduced(inputs_in(batch))
            # NumPy's minimum keeps a NaN.
            low = np.minimum(low, least.numpy())
            high = np.maximum(high, greatest.numpy())
            count += 1
        if not count:
            raise ValueError("data must hold at least one batch. Received: none")
        return {
            key(tensor): (float(a), float(b))
            for tensor, a, b in zip(tensors, low, high, strict=True)
        }

    @staticmethod
    def _reduced(observer):
        def reduce(inputs):
            outputs = tf.nest.flatten(observer(inputs, training=False))
            values = [tf.cast(v, tf.float32) for v in outputs]
            spoilt = [tf.reduce_sum(0.0 * v) for v in values]  # NaN where one is
            return (
                tf.stack(
                    [tf.reduce_min(v) + s for v, s in zip(values, spoilt, strict=True)]
                ),
                tf.stack(
                    [tf.reduce_max(v) + s for v, s in zip(values, spoilt, strict=True)]
                ),
            )

        return reduce
