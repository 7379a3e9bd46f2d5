"""Counters that checkpoints save, equal on all replicas."""

from tf_lowbit.compat import tf


def counter(value: int = 0) -> tf.Variable:
    """A scalar int64 variable, not trainable, equal on all replicas."""
    return tf.Variable(
        value,
        dtype=tf.int64,
        trainable=False,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    )
