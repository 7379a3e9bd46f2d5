import io
import itertools

import numpy as np
import pytest

from tests.datasets import tfds_files
from tf_lowbit import datasets
from tf_lowbit.compat import tf
from tf_lowbit.datasets import imagenet

_TRAIN, _TEST = 11, 5


def _jpeg(seed, shape) -> bytes:
    random = np.random.RandomState(seed)
    small = random.randint(0, 256, (4, 4, 3)).astype(np.float32)
    image = tf.cast(tf.image.resize(small, shape), tf.uint8)
    return tf.io.encode_jpeg(image, quality=95).numpy()


def _decode(encoded) -> np.ndarray:
    return tf.io.decode_jpeg(encoded, channels=3).numpy()


@pytest.fixture(scope="module", name="prepared")
def _prepared(tmp_path_factory):
    """A folder, and by split and label the encoded image; sizes vary."""
    folder = tmp_path_factory.mktemp("imagenet")
    images = {
        split: {
            first + index: _jpeg(first + index, (16 + index % 3, 20 + index))
            for index in range(count)
        }
        for split, count, first in (("train", _TRAIN, 0), ("validation", _TEST, 100))
    }
    tfds_files.write(
        "imagenet2012",
        folder,
        {
            split: [
                {
                    "image": io.BytesIO(encoded),
                    "label": label,
                    "file_name": f"{label}.JPEG",
                }
                for label, encoded in part.items()
            ]
            for split, part in images.items()
        },
        shards=3,
    )
    return str(folder), images


@pytest.fixture(name="load")
def _load(prepared):
    def load(**options):
        defaults = {"batch_size": 4, "image_size": 14, "data_dir": prepared[0]}
        return datasets.load("imagenet2012", **(defaults | options))

    return load


def _epochs(data, count):
    iterator = iter(data.train.as_numpy_iterator())
    return [
        list(itertools.islice(iterator, data.steps_per_epoch)) for _ in range(count)
    ]


def _labels(batches):
    return [int(label) for _, labels in batches for label in labels]


def _assert_same(first, second):
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])


def test_sizes_shapes_and_dtypes(load):
    data = load()
    assert data.input_shape == (14, 14, 3)
    assert data.classes == 1000
    assert (data.train_size, data.test_size, data.steps_per_epoch) == (11, 5, 3)
    for part in (data.train, data.test):
        images, labels = part.element_spec
        assert images.shape.as_list() == [None, 14, 14, 3]
        assert (images.dtype, labels.dtype) == (tf.float32, tf.int64)
    assert data.train.cardinality() == tf.data.INFINITE_CARDINALITY
    assert data.test.cardinality() == 2


def test_default_size_is_224(prepared):
    data = datasets.load("imagenet2012", batch_size=2, data_dir=prepared[0])
    assert next(iter(data.train))[0].shape == (2, 224, 224, 3)
    assert next(iter(data.test))[0].shape == (2, 224, 224, 3)


@pytest.mark.parametrize("augment", [False, True])
def test_each_epoch_holds_each_example_once(load, augment):
    for batches in _epochs(load(augment=augment), 3):
        assert [len(labels) for _, labels in batches] == [4, 4, 3]
        assert sorted(_labels(batches)) == list(range(_TRAIN))


@pytest.mark.parametrize("shuffle_buffer", [1, 2, 100])
def test_start_epoch_resumes_exactly(load, shuffle_buffer):
    whole = _epochs(load(seed=3, shuffle_buffer=shuffle_buffer), 3)
    assert len({tuple(_labels(batches)) for batches in whole}) > 1
    resumed = load(seed=3, shuffle_buffer=shuffle_buffer, start_epoch=2)
    _assert_same(_epochs(resumed, 1)[0], whole[2])


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize(("epoch", "step"), [(0, 1), (1, 2)])
def test_start_step_resumes_exactly(load, epoch, step, augment):
    options = {"seed": 3, "shuffle_buffer": 5, "augment": augment}
    whole = list(itertools.chain(*_epochs(load(**options), 3)))
    resumed = load(**options, start_epoch=epoch, start_step=step)
    tail = whole[epoch * resumed.steps_per_epoch + step :]
    assert len(tail) > resumed.steps_per_epoch - step  # across the end of an epoch
    _assert_same(itertools.islice(resumed.train.as_numpy_iterator(), len(tail)), tail)


def test_start_step_must_be_a_step_of_the_epoch(load):
    with pytest.raises(ValueError, match=r"below the 3 steps .* Received: .*=3"):
        load(start_step=3)


def test_order_and_augmentation_change_with_the_seed(load):
    first, second = (_epochs(load(seed=seed), 1)[0] for seed in (0, 1))
    assert _labels(first) != _labels(second)


def test_augmentation_changes_with_the_epoch(load):
    by_label = [
        {
            int(label): image
            for images, labels in batches
            for image, label in zip(images, labels, strict=True)
        }
        for batches in _epochs(load(), 2)
    ]
    assert all((by_label[0][k] != by_label[1][k]).any() for k in range(_TRAIN))


def test_global_seed_has_no_part_in_it_and_is_not_touched(load):
    results, draws = [], []
    for global_seed in (1, 2):
        tf.random.set_seed(global_seed)
        results.append(_epochs(load(), 1)[0])
        tf.random.set_seed(5)
        load()
        draws.append(float(tf.random.uniform([])))
    _assert_same(*results)
    tf.random.set_seed(5)
    assert draws == [float(tf.random.uniform([]))] * 2


def test_evaluation_without_scaling_is_a_centre_crop(load, prepared):
    """A shorter side of 16 is what size 14 asks for, so no pixel is interpolated."""
    data = load()
    exact = 0
    for image, label in data.test.unbatch().as_numpy_iterator():
        stored = _decode(prepared[1]["validation"][int(label)])
        if stored.shape[0] != 16:
            continue
        left = (stored.shape[1] - 14) // 2
        expected = data.normalization(stored[1:15, left : left + 14])
        np.testing.assert_allclose(image, expected, atol=1e-4)
        exact += 1
    assert exact == 2


@pytest.mark.parametrize("shape", [(64, 64), (60, 90), (90, 61), (10, 15)])
def test_centre_crop_scales_the_shorter_side(shape):
    encoded = _jpeg(0, shape)
    cropped = imagenet.center_crop(encoded, image_size=28)
    assert cropped.shape == (28, 28, 3)
    # On a smooth image, the centre keeps its colour.
    stored = _decode(encoded).astype(np.float32)
    middle = stored[shape[0] // 2, shape[1] // 2]
    np.testing.assert_allclose(cropped[14, 14], middle, atol=20.0)


def test_random_crop_has_the_promised_area_and_shape():
    """Pixels that hold their coordinates tell which part was cut out."""
    size = 128
    rows, columns = np.mgrid[:size, :size].astype(np.float32) * 255 / size
    image = np.stack([rows, columns, np.full_like(rows, 128)], axis=-1)
    encoded = tf.io.encode_jpeg(
        image.astype(np.uint8), quality=100, chroma_downsampling=False
    )
    areas, mirrored = [], 0
    for step in range(200):
        crop = imagenet.random_resized_crop(
            encoded, tf.constant([1, step], tf.int64), image_size=16
        ).numpy()
        assert crop.min() >= 0.0
        assert crop.max() <= 255.0
        # Pixel centres of the result are 1/16 of a side apart.
        height = np.ptp(crop[..., 0].mean(axis=1)) / 255 * 16 / 15
        width = np.ptp(crop[..., 1].mean(axis=0)) / 255 * 16 / 15
        assert 0.6 < width / height < 1.6
        areas.append(width * height)
        mirrored += crop[0, 0, 1] > crop[0, -1, 1]
    assert min(areas) > 0.06
    assert max(areas) < 1.05
    assert min(areas) < 0.25 < 0.75 < max(areas)
    assert 70 < mirrored < 130


def test_without_augmentation_training_images_are_centre_crops(load, prepared):
    data = load(augment=False)
    images, labels = next(data.train.as_numpy_iterator())
    for image, label in zip(images, labels, strict=True):
        crop = imagenet.center_crop(prepared[1]["train"][int(label)], image_size=14)
        np.testing.assert_allclose(image, data.normalization(crop), atol=1e-5)


def test_validation_is_held_out(load):
    data = load(validation_fraction=0.3)
    assert (data.train_size, data.validation_size) == (8, 3)
    held_out = _labels(data.validation.as_numpy_iterator())
    for batches in _epochs(data, 2):
        assert sorted(_labels(batches) + held_out) == list(range(_TRAIN))


def test_limit_comes_before_the_validation_split(load):
    data = load(validation_fraction=0.5, limit=4)
    assert (data.train_size, data.validation_size, data.test_size) == (2, 2, 4)
    held_out = _labels(data.validation.as_numpy_iterator())
    (batches,) = _epochs(data, 1)
    assert len(set(_labels(batches) + held_out)) == 4
    assert len(_labels(data.test.as_numpy_iterator())) == 4


@pytest.mark.parametrize("option", ["image_size", "shuffle_buffer"])
def test_refuses_options_out_of_range(load, option):
    with pytest.raises(ValueError, match=f"{option} must .* Received: {option}=0"):
        load(**{option: 0})


def test_absent_data_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="`tfds build imagenet2012`"):
        datasets.load("imagenet2012", batch_size=4, data_dir=str(tmp_path))
