"""A batch, with the mean of a loss over its examples."""

from typing import Any

from tf_lowbit.compat import keras, tf


class Batch:
    """One replica's part of a global batch, the argument of a Keras step.

    Attributes:
        x: Inputs.
        y: Targets, or None.
        sample_weight: Sample weights, or None.
        examples: Number of examples, int32 scalar. It can be 0 if the last batch is
            small.
    """

    def __init__(self, data: Any):
        self.x, self.y, self.sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        self.examples = tf.shape(tf.nest.flatten(self.x)[0])[0]

    def mean(self, losses: tf.Tensor) -> tf.Tensor:
        """Returns Keras's mean `sum(weight * loss) / examples`: [batch] -> scalar."""
        if self.sample_weight is not None:
            (weights,) = tf.nest.flatten(self.sample_weight)
            losses *= tf.reshape(tf.cast(weights, tf.float32), [-1])
        return tf.math.divide_no_nan(
            tf.reduce_sum(losses), tf.cast(self.examples, tf.float32)
        )

    def share(self) -> tf.Tensor | None:
        """Returns this replica's share of the global batch: float32 scalar.

        None on a single replica.
        """
        if replicas() == 1:
            return None
        here = tf.cast(self.examples, tf.float32)
        context = tf.distribute.get_replica_context()
        return here / context.all_reduce(tf.distribute.ReduceOp.SUM, here)


def replicas() -> int:
    """Returns the number of replicas of the current strategy."""
    return tf.distribute.get_strategy().num_replicas_in_sync
