"""Pipelines over examples that fit in memory."""

import dataclasses

import numpy as np

from tf_lowbit.compat import tf
from tf_lowbit.datasets.augmentation import Augmentation
from tf_lowbit.datasets.dataset import (
    Dataset,
    Normalization,
    PipelineOptions,
    batches,
)
from tf_lowbit.datasets.splitting import stratified_split

# Enough to bridge the end of an epoch, few enough for ImageNet's batches of 150 MB.
_BATCHES_AHEAD = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Stored images and their labels.

    Attributes:
      images: uint8 array [N, H, W, C].
      labels: int64 array [N].

    Raises:
      ValueError: wrong shapes or dtypes, or not one label per image.
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self):
        if self.images.ndim != 4 or self.images.dtype != np.uint8:
            raise ValueError(
                "images must be uint8 [N, H, W, C]. "
                f"Received: {self.images.dtype} {list(self.images.shape)}"
            )
        if self.labels.ndim != 1 or self.labels.dtype != np.int64:
            raise ValueError(
                "labels must be int64 [N]. "
                f"Received: {self.labels.dtype} {list(self.labels.shape)}"
            )
        if len(self.images) != len(self.labels):
            raise ValueError(
                "There must be one label per image. "
                f"Received: {len(self.images)} images, {len(self.labels)} labels"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, which) -> "Examples":
        """Returns the examples that a slice or an index array names."""
        return Examples(self.images[which], self.labels[which])


@dataclasses.dataclass(frozen=True, eq=False)
class InMemorySource:
    """A data set that was read, and how its images are to be treated.

    Attributes:
      name: the name of the data set.
      train: training examples, at least one.
      test: test examples, at least one.
      classes: number of classes.
      normalization: applied to every image, after augmentation.
      augmentation: applied to the stored pixels of training images.

    Raises:
      ValueError: a part is empty, or a label is not in [0, classes).
    """

    name: str
    train: Examples
    test: Examples
    classes: int
    normalization: Normalization
    augmentation: Augmentation

    def __post_init__(self):
        for part, examples in (("train", self.train), ("test", self.test)):
            if not len(examples):
                raise ValueError(
                    f"{self.name} must have {part} examples. Received: 0 examples"
                )
            low, high = examples.labels.min(), examples.labels.max()
            if low < 0 or high >= self.classes:
                raise ValueError(
                    f"The {part} labels of {self.name} must be in "
                    f"[0, {self.classes}). Received: labels in [{low}, {high}]"
                )


def build(source: InMemorySource, options: PipelineOptions) -> Dataset:
    """Builds the pipelines of a data set in memory.

    `limit` keeps the first examples of each part; then the held-out part is taken
    from what is left of the training set, with the balance of its classes.

    Args:
      source: the examples.
      options: batch size, seed and so on.

    Returns:
      The data set.

    Raises:
      ValueError: `validation_fraction` would leave a part empty, or an epoch has no
        batch `start_step`.
    """
    train = source.train.select(slice(options.limited(len(source.train))))
    test = source.test.select(slice(options.limited(len(source.test))))
    kept, held_out = stratified_split(train.labels, options.held_out(len(train)))
    validation = train.select(held_out)
    train = train.select(kept) if len(held_out) else train
    return Dataset(
        name=source.name,
        train=_training_batches(train, source, options),
        test=_evaluation_batches(test, source.normalization, options.batch_size),
        validation=_evaluation_batches(
            validation, source.normalization, options.batch_size
        )
        if len(validation)
        else None,
        input_shape=tuple(train.images.shape[1:]),
        classes=source.classes,
        train_size=len(train),
        test_size=len(test),
        validation_size=len(validation),
        batch_size=options.batch_size,
        normalization=source.normalization,
    )


def repeat_epochs(
    epoch_pipeline, steps_per_epoch: int, options: PipelineOptions
) -> tf.data.Dataset:
    """Chains the pipelines of all epochs, from the start in `options`, for ever.

    Args:
      epoch_pipeline: from an epoch and the batch to start it with, int64 scalar
        tensors, to a tf.data.Dataset of the epoch's batches from that one on.
      steps_per_epoch: batches in a whole epoch.
      options: `start_epoch` and `start_step` count.

    Returns:
      A pipeline of infinite cardinality.

    Raises:
      ValueError: `start_step` is not below `steps_per_epoch`.
    """
    if options.start_step >= steps_per_epoch:
        raise ValueError(
            f"start_step must be below the {steps_per_epoch} steps of an epoch. "
            f"Received: start_step={options.start_step}"
        )

    def from_its_start(epoch):
        is_first = tf.cast(epoch == options.start_epoch, tf.int64)
        return epoch_pipeline(epoch, is_first * options.start_step)

    epochs = tf.data.Dataset.counter(start=options.start_epoch)
    # flat_map cannot know its cardinality, but Keras asks for it.
    return epochs.flat_map(from_its_start).apply(
        tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)
    )


def epoch_seeds(seed: int, epoch: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Derives the seeds of an epoch.

    Args:
      seed: the seed of the run, in [0, 2**63).
      epoch: int64 scalar tensor.

    Returns:
      Two independent seeds, int64 [2]: for the order, and for the augmentation.
    """
    pair = tf.stack([tf.constant(seed, tf.int64), tf.cast(epoch, tf.int64)])
    order, augmentation = tf.unstack(tf.random.split(pair, 2))
    return order, augmentation


def finish(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Adds prefetching, and demands a deterministic order.

    Several workers share each batch out; by files they would see other batches.
    """
    options = tf.data.Options()
    options.deterministic = True
    # Its thread sleeps for up to a minute between looks, and an iterator's end now and
    # then waits for it: `fit` and `evaluate` stood still. Parallel calls are as many as
    # there are cores without it.
    options.autotune.enabled = False
    sharding = options.experimental_distribute
    sharding.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return dataset.prefetch(_BATCHES_AHEAD).with_options(options)


def _training_batches(
    examples: Examples, source: InMemorySource, options: PipelineOptions
) -> tf.data.Dataset:
    size, batch_size = len(examples), options.batch_size
    steps = batches(size, batch_size)
    images, labels = _on_host(examples)

    def epoch_pipeline(epoch, start_step):
        order_seed, augmentation_seed = epoch_seeds(options.seed, epoch)
        order = tf.random.experimental.stateless_shuffle(
            tf.range(size, dtype=tf.int64), seed=order_seed
        )

        def indices_and_seed(step):
            indices = order[step * batch_size : (step + 1) * batch_size]
            return indices, tf.random.fold_in(augmentation_seed, step)

        return tf.data.Dataset.range(start_step, steps).map(indices_and_seed)

    def read(indices, seed):
        batch = tf.gather(images, indices)
        if options.augment:
            batch = source.augmentation(batch, seed)
        return source.normalization(batch), tf.gather(labels, indices)

    # The epochs yield indices only; the work on pixels comes after flat_map, so that
    # it runs in parallel and ahead across the end of an epoch.
    dataset = repeat_epochs(epoch_pipeline, steps, options)
    return finish(dataset.map(read, num_parallel_calls=tf.data.AUTOTUNE))


def _evaluation_batches(
    examples: Examples, normalization: Normalization, batch_size: int
) -> tf.data.Dataset:
    images, labels = _on_host(examples)

    def read(step):
        part = slice(step * batch_size, (step + 1) * batch_size)
        return normalization(images[part]), labels[part]

    steps = tf.data.Dataset.range(batches(len(examples), batch_size))
    return finish(steps.map(read, num_parallel_calls=tf.data.AUTOTUNE))


def _on_host(examples: Examples) -> tuple[tf.Tensor, tf.Tensor]:
    """Moves examples to tensors in main memory, where pipelines run."""
    with tf.device("CPU:0"):
        return tf.constant(examples.images), tf.constant(examples.labels)
