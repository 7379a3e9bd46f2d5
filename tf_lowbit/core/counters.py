"""Counters that checkpoints save and replicas agree on."""

from tf_lowbit.compat import tf


def counter(value: int = 0) -> tf.Variable:
    """A counter: scalar int64, not trained, one and the same on all replicas.

    Args:
        value: its first value.
    """
    return tf.Variable(
        value,
        dtype=tf.int64,
        trainable=False,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    )
