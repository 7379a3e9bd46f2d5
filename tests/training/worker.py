"""What a worker process of `test_workers.py` runs: one training, its share of it.

    python -m tests.training.worker RESULT

`TF_CONFIG` says which worker this is. RESULT becomes an .npz file: see `train`.
"""

import sys

import numpy as np

import tf_lowbit as tfl
from tf_lowbit.compat import keras, tf

CLASSES, BATCH, EXAMPLES, EPOCHS = 4, 16, 49, 5
STARTED = "The strategy is made."


def methods():
    """What a trainer is told to do, made before there is a strategy."""
    return {
        "stochastic_precision": tfl.StochasticPrecision(seed=5),
        "distillation": tfl.JointDistillation(hints=["relu"]),
    }


def network():
    layers = keras.layers
    x = image = keras.Input((6, 6, 2))
    x = layers.Conv2D(4, 3, strides=3, name="conv")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.Flatten()(x)
    return keras.Model(image, layers.Dense(CLASSES, name="head")(x))


def data():
    """Global batches: (images, labels, sample weights), the last of one example."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(EXAMPLES, 6, 6, 2)).astype("f")
    labels = rng.integers(0, CLASSES, EXAMPLES)
    weights = rng.uniform(0, 2, EXAMPLES).astype("f")
    options = tf.data.Options()
    by_example = tf.data.experimental.AutoShardPolicy.DATA
    options.experimental_distribute.auto_shard_policy = by_example
    batches = tf.data.Dataset.from_tensor_slices((images, labels, weights))
    return batches.batch(BATCH).with_options(options)


class _Steps(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.logs = []

    def on_train_batch_end(self, batch, logs=None):
        self.logs.append(dict(logs))


def train(strategy, settings):
    """Stochastic precision and joint distillation, over `EPOCHS` epochs.

    Returns:
        `logs/NAME`: of each step; `weights/NAME`: after training; `seen/STEP`: the
        sample weights, all different, of the examples that came here in an epoch.
    """
    keras.utils.set_random_seed(3)
    with strategy.scope():
        rules = [tfl.PrecisionRule(".*", 2, 2, edges=True)]
        trainer = tfl.LowBitTrainer(
            tfl.quantize(network(), rules), network(), **settings
        )
        trainer.compile(
            keras.optimizers.SGD(0.05, momentum=0.9),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            teacher_optimizer=keras.optimizers.Adam(0.01),
        )
    tfl.calibrate(trainer, data())
    steps = _Steps()
    trainer.fit(data(), epochs=EPOCHS, callbacks=[steps], verbose=0)
    result = {
        f"logs/{name}": np.array([logs[name] for logs in steps.logs])
        for name in steps.logs[0]
    }
    for index, weight in enumerate(trainer.weights):
        result[f"weights/{index}"] = weight.numpy()
    distributed = strategy.experimental_distribute_dataset(data())
    for step, (_, _, weights) in enumerate(distributed):
        (here,) = strategy.experimental_local_results(weights)
        result[f"seen/{step}"] = here.numpy()
    return result


def main():
    # In this order: the strategy sets up TensorFlow, which must not run yet.
    settings = methods()
    ring = tf.distribute.experimental.CommunicationImplementation.RING
    strategy = tf.distribute.MultiWorkerMirroredStrategy(
        communication_options=tf.distribute.experimental.CommunicationOptions(
            implementation=ring
        )
    )
    print(STARTED, flush=True)
    np.savez(sys.argv[1], **train(strategy, settings))


if __name__ == "__main__":
    main()
