"""A loaded data set: its pipelines, sizes and normalization."""

import dataclasses

import numpy as np

from tf_lowbit.compat import tf
from tf_lowbit.core import checks

# Seeds enter the stateless operations as int64.
_SEED_LIMIT = 2**63


@dataclasses.dataclass(frozen=True)
class Normalization:
    """Converts stored pixels to network inputs, channel by channel.

    `inputs = (pixels / scale - mean) / deviation`

    Attributes:
        scale: Largest stored pixel value; 255 for 8-bit images.
        mean: Channel means of `pixels / scale`, in [0, 1].
        deviation: Channel standard deviations of `pixels / scale`, above 0.
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
        if not self.mean or len(self.mean) != len(self.deviation):
            raise ValueError(
                "mean and deviation must each have one value per channel. "
                f"Received: mean={self.mean}, deviation={self.deviation}"
            )
        if not all(value > 0.0 for value in self.deviation):
            raise ValueError(
                f"deviation must be positive. Received: deviation={self.deviation}"
            )

    @classmethod
    def of(cls, images: np.ndarray, scale: float) -> "Normalization":
        """Measures the normalization of stored images.

        Args:
            images: Stored pixels: number array [N, H, W, C].
            scale: Largest stored pixel value.

        Returns:
            The normalization that gives each channel of `images` mean 0 and deviation
            1.

        Raises:
            ValueError: If a channel is constant.
        """
        pixels = images.astype(np.float64) / scale
        return cls(
            scale=float(scale),
            mean=tuple(float(value) for value in pixels.mean(axis=(0, 1, 2))),
            deviation=tuple(float(value) for value in pixels.std(axis=(0, 1, 2))),
        )

    def __call__(self, images: tf.Tensor) -> tf.Tensor:
        """Normalizes stored pixels [..., C] in [0, scale]; the result is float32."""
        images = tf.cast(images, tf.float32)
        # One multiplication and one addition per pixel: constants are folded here in
        # float64, not in the graph in float32.
        factor = 1.0 / (self.scale * np.asarray(self.deviation, np.float64))
        offset = -np.asarray(self.mean, np.float64) / np.asarray(self.deviation)
        return images * factor.astype(np.float32) + offset.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class PipelineOptions:
    """The options that every data set has; see `load`.

    Raises:
        ValueError: If a value is out of range. The pipeline checks `start_step`.
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
        """Returns how many of `size` training examples to hold out, in [1, size - 1].

        0 if `validation_fraction` is 0.

        Raises:
            ValueError: If one of the two parts would be empty.
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

    A batch is a pair of normalized images, float32 [B, H, W, C], and labels in [0,
    classes), int64 [B].

    `train` never ends. An epoch has `steps_per_epoch` batches, of which the last may be
    smaller, and holds each training example exactly once. The order and the
    augmentation of epoch e are a pure function of (seed, e). So a run that resumes at
    `step` of `epoch` gets the same batches as an uninterrupted one:

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

    Each new iterator over `train` starts at the same batch again. `test` and
    `validation` are one pass, in stored order, not augmented.

    Attributes:
        name: Name given to `load`.
        train: Infinite pipeline of training batches.
        test: Finite pipeline of test batches.
        validation: Finite pipeline of the held-out part of the training set, or None.
        input_shape: (H, W, C).
        classes: Number of classes.
        train_size: Training examples in an epoch, without the held-out ones.
        test_size: Test examples.
        validation_size: Held-out examples; 0 if `validation` is None.
        batch_size: Images in a full batch.
        normalization: Conversion from stored pixels to the images in a batch.
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
        """Batches in an epoch of `train`, including a smaller last one."""
        return batches(self.train_size, self.batch_size)


def batches(size: int, batch_size: int) -> int:
    """Returns how many batches hold `size` examples, including a smaller last one."""
    return -(-size // batch_size)
