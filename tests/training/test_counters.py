from tf_lowbit.compat import tf
from tf_lowbit.training.counters import counter


def test_a_counter_counts_once_on_several_replicas(mirrored):
    strategy = mirrored(2)
    with strategy.scope():
        steps = counter(3)
    strategy.run(tf.function(lambda: steps.assign_add(1)))
    assert steps.numpy() == 4
    assert steps.dtype == tf.int64
    assert not steps.trainable
