"""Layers that Keras lacks and the integer model has, of codes or of floats.

They pad, find the largest of a class, or scale floats; none has a grid of its own.
"""

from collections.abc import Sequence
from typing import Any

from tf_lowbit.compat import keras, tf


@keras.utils.register_keras_serializable(package="tf_lowbit")
class EdgePadding(keras.layers.Layer):
    """Pads images symmetrically, edge pixels included: `a b` -> `a a b b`.

    Args:
        padding: Rows and columns at each border, as (rows, columns).
    """

    def __init__(
        self, padding: Sequence[int], name: str | None = None, **arguments: Any
    ):
        arguments["dtype"] = "float32"
        super().__init__(name=name, **arguments)
        self.padding = tuple(padding)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Images [batch, height, width, channels] -> images with borders."""
        sides = [(n, n) for n in (0, *self.padding, 0)]
        return tf.pad(inputs, sides, "SYMMETRIC")

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().get_config(), "padding": list(self.padding)}


@keras.utils.register_keras_serializable(package="tf_lowbit")
class ZeroPadding(keras.layers.Layer):
    """Pads with zeros, channels too, which Keras's layers leave as they are.

    Args:
        padding: (before, behind) for each axis behind the batch.
    """

    def __init__(
        self,
        padding: Sequence[Sequence[int]],
        name: str | None = None,
        **arguments: Any,
    ):
        arguments["dtype"] = "float32"
        super().__init__(name=name, **arguments)
        self.padding = tuple(map(tuple, padding))

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Tensor [batch, ...] -> larger tensor of the same rank."""
        return tf.pad(inputs, [(0, 0), *self.padding])

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().get_config(), "padding": [list(p) for p in self.padding]}


@keras.utils.register_keras_serializable(package="tf_lowbit")
class Affine(keras.layers.Layer):
    """`gain x + offset` per channel in float32: a folded batch normalization."""

    def __init__(self, name: str | None = None, **arguments: Any):
        arguments["dtype"] = "float32"
        super().__init__(name=name, **arguments)

    def build(self, input_shape: tf.TensorShape) -> tf.Tensor:
        """Makes gain and offset."""
        self.gain = self.add_weight("gain", (input_shape[-1],), initializer="ones")
        self.offset = self.add_weight("offset", (input_shape[-1],))
        super().build(input_shape)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Float32 tensor -> float32 tensor of the same shape."""
        return inputs * self.gain + self.offset


@keras.utils.register_keras_serializable(package="tf_lowbit")
class ArgMax(keras.layers.Layer):
    """Class numbers: where the last axis is largest, the first place of equal ones.

    It has no gradient.

    Args:
        output_type: "int32" or "int64".
    """

    # By which `passthrough.operation` knows it, as it knows TensorFlow's function.
    symbol = "math.argmax"

    def __init__(self, output_type: str, name: str | None = None, **arguments: Any):
        arguments["dtype"] = "float32"
        super().__init__(name=name, **arguments)
        self.output_type = output_type

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Codes or floats [batch, ..., classes] -> integers [batch, ...]."""
        return tf.argmax(inputs, axis=-1, output_type=self.output_type)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().get_config(), "output_type": self.output_type}
