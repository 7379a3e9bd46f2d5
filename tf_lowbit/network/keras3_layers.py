"""Keras 3 layers that `tf_keras` lacks."""

from typing import Any

from tf_lowbit.compat import keras, tf


@keras.utils.register_keras_serializable(package="tf_lowbit")
class RMSNormalization(keras.layers.Layer):
    """Keras 3's `scale x / sqrt(mean(x^2) + epsilon)` (arXiv:1910.07467), in float32.

    Args:
        axis: Last axis, or axes, whose mean is taken. `scale` has their shape.
        epsilon: Positive float.
        **kwargs: Arguments of `Layer`.
    """

    def __init__(
        self, axis: int | list[int] = -1, epsilon: float = 1e-6, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.axis = axis
        self.epsilon = epsilon

    def build(self, input_shape: tf.TensorShape) -> None:
        """Makes the weight `scale`."""
        axes = self.axis if isinstance(self.axis, list | tuple) else [self.axis]
        self._axes = sorted(axes)
        shape = [input_shape[axis] for axis in self._axes]
        self.scale = self.add_weight("scale", shape, initializer="ones")
        super().build(input_shape)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Normalizes; the result has shape and dtype of the inputs."""
        x = tf.cast(inputs, tf.float32)
        mean = tf.reduce_mean(tf.square(x), axis=self._axes, keepdims=True)
        x = x * tf.math.rsqrt(mean + self.epsilon) * tf.cast(self.scale, tf.float32)
        return tf.cast(x, inputs.dtype)

    def get_config(self) -> dict:
        """Returns the arguments."""
        return super().get_config() | {"axis": self.axis, "epsilon": self.epsilon}
