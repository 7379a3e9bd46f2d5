"""Pipelines over examples in memory."""

import dataclasses
from collections.abc import Callable

import numpy as np

from tf_lowbit.compat import tf
from tf_lowbit.datasets.augmentation import Augmentation
from tf_lowbit.datasets.dataset import Dataset, Normalization, PipelineOptions, batches
from tf_lowbit.datasets.splitting import stratified_split

# Enough to bridge the end of an epoch; ImageNet's batches have 150 MB each.
_BATCHES_AHEAD = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Stored images and their labels.

    Attributes:
        images: Uint8 array [N, H, W, C].
        labels: Int64 array [N].

    Raises:
        ValueError: If shapes or dtypes are wrong, or there is not one label per image.
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

    def select(self, which: slice | np.ndarray) -> "Examples":
        """Returns the examples that a slice or an index array selects."""
        return Examples(self.images[which], self.labels[which])


@dataclasses.dataclass(frozen=True, eq=False)
class InMemorySource:
    """A data set in memory, and how to process its images.

    Attributes:
        name: Name of the data set.
        train: Training examples, at least one.
        test: Test examples, at least one.
        classes: Number of classes.
        normalization: Applied to every image, after augmentation.
        augmentation: Applied to the stored pixels of training images.

    Raises:
        ValueError: If a part is empty, or a label is not in [0, classes).
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

    `limit` keeps the first examples of each part. Then the held-out part is taken from
    the rest of the training set, stratified by class.

    Raises:
        ValueError: If `validation_fraction` would leave a part empty, or an epoch has
            no batch `start_step`.
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
    epoch_pipeline: Callable[[tf.Tensor, tf.Tensor], tf.data.Dataset],
    steps_per_epoch: int,
    options: PipelineOptions,
) -> tf.data.Dataset:
    """Chains the pipelines of all epochs, from the start in `options`, without end.

    Args:
        epoch_pipeline: Function (epoch, first batch), int64 scalar tensors ->
            tf.data.Dataset of the epoch's batches, starting with that batch.
        steps_per_epoch: Batches in a whole epoch.
        options: For `start_epoch` and `start_step`.

    Returns:
        A pipeline of infinite cardinality.

    Raises:
        ValueError: If `start_step` is not below `steps_per_epoch`.
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
    """Derives the seeds of an epoch's order and augmentation, each int64 [2].

    `seed` is that of the run, in [0, 2**63), and `epoch` an int64 scalar tensor.
    """
    pair = tf.stack([tf.constant(seed, tf.int64), tf.cast(epoch, tf.int64)])
    order, augmentation = tf.unstack(tf.random.split(pair, 2))
    return order, augmentation


def finish(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Adds prefetching and a deterministic order; several workers share each batch."""
    options = tf.data.Options()
    options.deterministic = True
    # The autotune thread sleeps for up to a minute. The end of an iterator can wait for
    # it, which stalled `fit` and `evaluate`. Without it there are as many parallel
    # calls as cores.
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

    # The epochs yield only indices. Pixels are processed after flat_map, so that the
    # work runs in parallel and ahead, even across the end of an epoch.
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
