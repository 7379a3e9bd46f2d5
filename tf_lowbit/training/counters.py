"""Counters that checkpoints save."""

from tf_lowbit.compat import tf


def counter(value: int = 0) -> tf.Variable:
    """Makes a scalar int64 variable, not trainable, the same on every replica."""
    return tf.Variable(
        value,
        dtype=tf.int64,
        trainable=False,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    )
