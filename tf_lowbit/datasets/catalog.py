"""Data sets by name."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from tf_lowbit.core import checks
from tf_lowbit.datasets import (
    cifar,
    digits,
    fashion_mnist,
    imagenet,
    pipeline,
    synthetic,
)
from tf_lowbit.datasets.dataset import Dataset, PipelineOptions


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A data set; `load` is a function (PipelineOptions, source options) -> Dataset."""

    load: Callable[..., Dataset]
    reads_files: bool = True


def _in_memory(read) -> Callable[..., Dataset]:
    def load_in_memory(options: PipelineOptions, **source_options) -> Dataset:
        return pipeline.build(read(**source_options), options)

    return load_in_memory


_ENTRIES = {
    "cifar10": _Entry(_in_memory(cifar.read_cifar10)),
    "cifar100": _Entry(_in_memory(cifar.read_cifar100)),
    "digits": _Entry(_in_memory(digits.read), reads_files=False),
    "fashion_mnist": _Entry(_in_memory(fashion_mnist.read)),
    "imagenet2012": _Entry(imagenet.load),
    "synthetic": _Entry(_in_memory(synthetic.generate), reads_files=False),
}


def names() -> tuple[str, ...]:
    """Returns the names that `load` knows, in alphabetical order."""
    return tuple(sorted(_ENTRIES))


def load(
    name: str,
    *,
    batch_size: int,
    seed: int = 0,
    augment: bool = True,
    data_dir: str | None = None,
    validation_fraction: float = 0.0,
    start_epoch: int = 0,
    start_step: int = 0,
    limit: int | None = None,
    **source_options: Any,
) -> Dataset:
    """Loads a data set as tf.data pipelines. See `Dataset` for what they yield.

    Nothing is downloaded. "digits" and "synthetic" need no files; the others must be on
    this machine.

    | name | images | augmentation |
    |---|---|---|
    | cifar10, cifar100 | 32x32x3 | pad by 4, crop, mirror |
    | digits | 8x8x1 | shift by at most 1 |
    | fashion_mnist | 28x28x1 | pad by 2, crop, mirror |
    | imagenet2012 | 224x224x3 | random crop, scale, mirror |
    | synthetic | 8x8x1 | shift by at most 1 |

    Args:
        name: One of `names()`.
        batch_size: Images in a batch, at least 1. The last batch of an epoch may be
            smaller.
        seed: Seed of the order and the augmentation of the training examples, in [0,
            2**63). It changes neither the examples nor any split.
        augment: Whether training images are augmented.
        data_dir: Folder that holds the data, `~` for the home folder; None for the data
            set's default.
        validation_fraction: Part of the training set to hold out as `validation`, in
            [0, 1).
        start_epoch: First epoch of `train`, from 0.
        start_step: First batch of `train` in that epoch, from 0; below
            `steps_per_epoch`.
        limit: Largest number of training examples and of test examples, at least 1;
            None for all.
        **source_options: Options of single data sets: `image_size` and `shuffle_buffer`
            of imagenet2012; `image_shape`, `classes`, `train_size`, `test_size` and
            `noise` of synthetic.

    Returns:
        The data set.

    Raises:
        ValueError: If the name is unknown, an argument is out of range, or the data are
            malformed.
        FileNotFoundError: If the data are not on this machine; the message says how to
            get them.
        ImportError: If the package of the data set is not installed.
        TypeError: If the data set does not have the source option.
    """
    if not isinstance(name, str) or name not in _ENTRIES:
        raise ValueError(
            f"The name of a data set must be one of {list(names())}. Received: {name!r}"
        )
    entry = _ENTRIES[name]
    options = PipelineOptions(
        batch_size=batch_size,
        seed=seed,
        augment=augment,
        validation_fraction=validation_fraction,
        start_epoch=start_epoch,
        start_step=start_step,
        limit=limit,
    )
    if entry.reads_files:
        # A shell does not expand the ~ of --data_dir=~/data.
        if data_dir is not None:
            data_dir = os.path.expanduser(checks.path("data_dir", data_dir))
        return entry.load(options, data_dir=data_dir, **source_options)
    if data_dir is not None:
        raise ValueError(
            f"{name} reads no files: data_dir must be None. "
            f"Received: data_dir={data_dir!r}"
        )
    return entry.load(options, **source_options)
