"""Keras 3 activations that `tf_keras` lacks or defines differently."""

from tf_lowbit.compat import keras, tf


@keras.utils.register_keras_serializable(package="tf_lowbit")
def hard_sigmoid(x: tf.Tensor) -> tf.Tensor:
    """Returns `relu6(x + 3) / 6`, as Keras 3; `tf_keras` has another slope."""
    return tf.nn.relu6(x + 3.0) / 6.0


@keras.utils.register_keras_serializable(package="tf_lowbit")
def hard_silu(x: tf.Tensor) -> tf.Tensor:
    """Returns `x hard_sigmoid(x)`, as Keras 3."""
    return x * hard_sigmoid(x)
