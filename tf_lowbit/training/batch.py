"""A batch, and the mean of a loss over its examples."""

from typing import Any

from tf_lowbit.compat import keras, tf


class Batch:
    """One replica's part of a global batch, the argument of a Keras step.

    Attributes:
        x: inputs.
        y: targets, or None.
        sample_weight: weights from Keras, or None.
        examples: number of examples, int32 scalar; can be 0 in a small last batch.
    """

    def __init__(self, data: Any):
        self.x, self.y, self.sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        self.examples = tf.shape(tf.nest.flatten(self.x)[0])[0]

    def mean(self, losses: tf.Tensor) -> tf.Tensor:
        """`sum(weight * loss) / examples`, Keras's mean: [batch] -> scalar."""
        if self.sample_weight is not None:
            (weights,) = tf.nest.flatten(self.sample_weight)
            losses *= tf.reshape(tf.cast(weights, tf.float32), [-1])
        return tf.math.divide_no_nan(
            tf.reduce_sum(losses), tf.cast(self.examples, tf.float32)
        )

    def share(self) -> tf.Tensor:
        """Share of the global batch, float32 scalar; None on a single replica."""
        if replicas() == 1:
            return None
        here = tf.cast(self.examples, tf.float32)
        context = tf.distribute.get_replica_context()
        return here / context.all_reduce(tf.distribute.ReduceOp.SUM, here)


def replicas() -> int:
    """The number of replicas of the present strategy."""
    return tf.distribute.get_strategy().num_replicas_in_sync
