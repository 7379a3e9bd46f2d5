"""What a loaded data set is: its pipelines, its sizes, its normalisation."""

import dataclasses

import numpy as np

from tf_lowbit.compat import tf
from tf_lowbit.core import checks

# Seeds enter the stateless operations as int64.
_SEED_LIMIT = 2**63


@dataclasses.dataclass(frozen=True)
class Normalization:
    """From stored pixels to network inputs, channel by channel.

    `inputs = (pixels / scale - mean) / deviation`

    Attributes:
      scale: the largest stored pixel value; 255 for 8-bit images.
      mean: channel means of `pixels / scale`, in [0, 1].
      deviation: channel standard deviations of `pixels / scale`, above 0.
    """

    scale: float
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def __post_init__(self):
        checks.number("scale", self.scale, above=0)
        for name in ("mean", "deviation"):
            checks.instance(name, getattr(self, name), tuple)
            for value in getattr(self, name):
                checks.number(name, value)
        if len(self.mean) != len(self.deviation):
            raise ValueError(
                "mean and deviation must have a value per channel each. "
                f"Received: mean={self.mean}, deviation={self.deviation}"
            )
        if not all(value > 0.0 for value in self.deviation):
            raise ValueError(
                f"deviation must be positive. Received: deviation={self.deviation}"
            )

    @classmethod
    def of(cls, images: np.ndarray, scale: float) -> "Normalization":
        """Measures the normalisation of stored images.

        Args:
          images: number array [N, H, W, C], stored pixels.
          scale: the largest stored pixel value.

        Returns:
          The normalisation that gives each channel of `images` mean 0 and
          deviation 1.

        Raises:
          ValueError: a channel is constant.
        """
        pixels = images.astype(np.float64) / scale
        return cls(
            scale=float(scale),
            mean=tuple(float(value) for value in pixels.mean(axis=(0, 1, 2))),
            deviation=tuple(float(value) for value in pixels.std(axis=(0, 1, 2))),
        )

    def __call__(self, images) -> tf.Tensor:
        """Normalises images.

        Args:
          images: number tensor [..., C], stored pixels in [0, scale].

        Returns:
          float32, same shape.
        """
        images = tf.cast(images, tf.float32)
        # One multiplication and one addition per pixel: the constants are folded
        # here in float64, not in the graph in float32.
        factor = 1.0 / (self.scale * np.asarray(self.deviation, np.float64))
        offset = -np.asarray(self.mean, np.float64) / np.asarray(self.deviation)
        return images * factor.astype(np.float32) + offset.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class PipelineOptions:
    """What a caller of `load` may choose for any data set.

    Attributes:
      batch_size: images in a batch; the last batch of an epoch may be smaller.
      seed: seeds the order and the augmentation, in [0, 2**63).
      augment: whether training images are augmented.
      validation_fraction: part of the training set to hold out, in [0, 1).
      start_epoch: the epoch that the training pipeline starts with, from 0.
      start_step: the batch of `start_epoch` that the training pipeline starts with,
        from 0. That the epoch has such a batch is checked by the pipeline.
      limit: at most this many training and this many test examples are used;
        None for all.

    Raises:
      ValueError: a value is out of the range given above.
    """

    batch_size: int
    seed: int = 0
    augment: bool = True
    validation_fraction: float = 0.0
    start_epoch: int = 0
    start_step: int = 0
    limit: int | None = None

    def __post_init__(self):
        checks.integer("batch_size", self.batch_size, at_least=1)
        checks.integer("seed", self.seed, at_least=0, below=_SEED_LIMIT)
        checks.flag("augment", self.augment)
        checks.integer("start_epoch", self.start_epoch, at_least=0)
        checks.integer("start_step", self.start_step, at_least=0)
        if self.limit is not None:
            checks.integer("limit", self.limit, at_least=1)
        checks.number(
            "validation_fraction", self.validation_fraction, at_least=0, below=1
        )

    def limited(self, size: int) -> int:
        """Returns how many of `size` examples are used."""
        return size if self.limit is None else min(size, self.limit)

    def held_out(self, size: int) -> int:
        """Returns how many of `size` training examples are held out.

        Args:
          size: the number of training examples, before any is held out.

        Returns:
          0 if `validation_fraction` is 0, else a count in [1, size - 1].

        Raises:
          ValueError: one of the two parts would be empty.
        """
        if self.validation_fraction == 0.0:
            return 0
        count = round(self.validation_fraction * size)
        if not 1 <= count < size:
            raise ValueError(
                "validation_fraction must leave at least one example in each part "
                f"of the {size} training examples. "
                f"Received: validation_fraction={self.validation_fraction}"
            )
        return count


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set, ready for training and evaluation.

    A batch is a pair of images, float32 [B, H, W, C], normalised, and labels,
    int64 [B], in [0, classes).

    `train` never ends. An epoch is `steps_per_epoch` batches, of which the last may
    be smaller, and holds each training example exactly once; the order and the
    augmentation of epoch e are a pure function of (seed, e). Hence

    ```python
    recovery = tfl.callbacks.Recovery("checkpoints", every=10)
    epoch, step = recovery.position
    data = datasets.load("digits", batch_size=32, start_epoch=epoch, start_step=step)
    model.fit(
        data.train,
        steps_per_epoch=data.steps_per_epoch,
        epochs=100,
        validation_data=data.test,
        callbacks=[recovery],
    )
    ```

    feeds a run that resumes at `step` of `epoch` exactly what it would have seen
    without the interruption. Each new iterator over `train` starts again there.
    `test` and `validation` are one pass, in stored order, never augmented.

    Attributes:
      name: the name it was loaded by.
      train: infinite pipeline of training batches.
      test: finite pipeline of test batches.
      validation: finite pipeline of the held-out part of the training set, or None.
      input_shape: (H, W, C).
      classes: number of classes.
      train_size: training examples in an epoch, without the held-out ones.
      test_size: test examples.
      validation_size: held-out examples; 0 if `validation` is None.
      batch_size: images in a full batch.
      normalization: from stored pixels to the images in a batch.
    """

    name: str
    train: tf.data.Dataset
    test: tf.data.Dataset
    validation: tf.data.Dataset | None
    input_shape: tuple[int, int, int]
    classes: int
    train_size: int
    test_size: int
    validation_size: int
    batch_size: int
    normalization: Normalization

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch of `train`, counting a smaller last one."""
        return batches(self.train_size, self.batch_size)


def batches(size: int, batch_size: int) -> int:
    """Returns how many batches hold `size` examples, counting a smaller last one."""
    return -(-size // batch_size)
