"""Measured ranges of tensors whose range training did not fix."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tf_lowbit.compat import KerasTensor, keras, tf
from tf_lowbit.core import checks
from tf_lowbit.network import graph
from tf_lowbit.network.observation import batches_for, inputs_in, validate_batches


def key(tensor: KerasTensor) -> str:
    """A name for a Keras tensor that is the same in every copy of the model."""
    history = tensor._keras_history
    call = f"@{history.node_index}" if history.node_index else ""
    output = f":{history.tensor_index}" if history.tensor_index else ""
    return f"{history.layer.name}{call}{output}"


class MissingRangeError(ValueError):
    """There is no data to measure the range of a tensor on.

    Args:
        tensor: Name of the tensor.
    """

    def __init__(self, tensor: str) -> None:
        self.tensor = tensor
        super().__init__(
            "data must be given: training did not fix the range of every integer "
            f"tensor. Received: data=None, and {tensor!r} has no range"
        )


def _pairs(ranges) -> dict[str, tuple[float, float]]:
    """Ranges that were measured before, checked."""
    is_whole = isinstance(ranges, Mapping) and all(
        isinstance(name, str)
        and isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(map(checks.is_number, pair))
        for name, pair in ranges.items()
    )
    if not is_whole:
        raise ValueError(
            "ranges must be a dict of names and pairs of finite numbers, as "
            f"`Snapped.ranges`. {checks.received('ranges', ranges)}"
        )
    return {name: tuple(pair) for name, pair in ranges.items()}


class Ranges:
    """Minimum and maximum of a network's tensors, measured on first use.

    Args:
        model: Functional model.
        data: Iterable of batches, `x` or `(x, y)` or `(x, y, weight)`; or None.
        batches: Number of batches to measure on.
        known: Ranges that were measured before, `key` -> (minimum, maximum).

    Attributes:
        used: The ranges that were asked for.
    """

    def __init__(
        self,
        model: keras.Model,
        data: Iterable[Any] | None = None,
        batches: int = 8,
        known: Mapping[str, tuple[float, float]] | None = None,
    ):
        validate_batches(batches)
        self._model = model
        self._data = data
        self._batches = batches
        self._measured: dict | None = None
        self._known = _pairs({} if known is None else known)
        self.used: dict[str, tuple[float, float]] = {}

    def __call__(self, tensor: KerasTensor) -> tuple[float, float]:
        """The range of a Keras tensor of the model.

        Raises:
            ValueError: If there is no data to measure it on, or a value is not finite.
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

    def can_tell(self, tensor: KerasTensor) -> bool:
        """Whether the range of a Keras tensor is known or can be measured."""
        return self._data is not None or key(tensor) in self._known

    def _measure(self, wanted):
        if self._data is None:
            raise MissingRangeError(wanted)
        tensors = [
            tensor
            for node in graph.nodes(self._model)
            for tensor in graph.outputs_of(node)
            if tensor.dtype.is_floating
        ]
        # Not `inputs`: a dict's keys may differ from the layers' names.
        reduced = tf.function(self._reduced(keras.Model(self._model.input, tensors)))
        low = np.full(len(tensors), np.inf)
        high = np.full(len(tensors), -np.inf)
        count = 0
        for batch in batches_for(self._model, self._data, self._batches):
            lowest, highest = reduced(inputs_in(batch))
            # NumPy's minimum keeps a NaN.
            low = np.minimum(low, lowest.numpy())
            high = np.maximum(high, highest.numpy())
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
            # TensorFlow's minimum drops a NaN; 0 * NaN brings it back.
            nan_or_0 = tf.stack([tf.reduce_sum(0.0 * v) for v in values])
            low = tf.stack([tf.reduce_min(v) for v in values])
            high = tf.stack([tf.reduce_max(v) for v in values])
            return low + nan_or_0, high + nan_or_0

        return reduce
