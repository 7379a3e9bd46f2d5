import itertools
import subprocess
import sys

import numpy as np
import pytest

from tf_lowbit import datasets


def test_names():
    assert datasets.names() == (
        "cifar10",
        "cifar100",
        "digits",
        "fashion_mnist",
        "imagenet2012",
        "synthetic",
    )


def test_unknown_name():
    with pytest.raises(ValueError, match=r"one of .*'digits'.* Received: 'mnist'"):
        datasets.load("mnist", batch_size=8)


def test_options_are_checked_before_anything_is_read():
    with pytest.raises(ValueError, match="Received: batch_size=0"):
        datasets.load("imagenet2012", batch_size=0, data_dir="/nowhere")


def test_start_reaches_the_pipeline():
    whole = datasets.load("synthetic", batch_size=8, limit=20)
    resumed = datasets.load(
        "synthetic", batch_size=8, limit=20, start_epoch=1, start_step=2
    )
    expected = list(itertools.islice(whole.train.as_numpy_iterator(), 7))
    for position, batch in enumerate(itertools.islice(resumed.train, 2)):
        np.testing.assert_array_equal(batch[0], expected[5 + position][0])


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_data_dir_is_refused_where_it_would_be_ignored(name):
    with pytest.raises(ValueError, match=r"reads no files.* Received: data_dir='x'"):
        datasets.load(name, batch_size=8, data_dir="x")


def test_source_options_of_another_data_set_are_refused():
    with pytest.raises(TypeError, match="image_shape"):
        datasets.load("digits", batch_size=8, image_shape=(8, 8, 1))


@pytest.mark.slow
def test_heavy_packages_are_imported_only_when_needed():
    program = (
        "import sys\n"
        "import tf_lowbit.compat\n"
        # What TensorFlow and Keras import by themselves does not count.
        "before = set(sys.modules)\n"
        "from tf_lowbit import datasets\n"
        "datasets.load('synthetic', batch_size=8)\n"
        "new = set(sys.modules) - before\n"
        "assert not {'tensorflow_datasets', 'sklearn'} & new, new\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
