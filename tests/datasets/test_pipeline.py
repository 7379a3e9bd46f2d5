import itertools

import numpy as np
import pytest

from tf_lowbit.compat import keras, tf
from tf_lowbit.datasets import augmentation, pipeline
from tf_lowbit.datasets.dataset import Normalization, PipelineOptions

_SIZE = 23
_CLASSES = 3


def _source(train_size=_SIZE, test_size=7) -> pipeline.InMemorySource:
    """Each image has a value of its own in all its pixels."""

    def examples(size, first):
        values = np.arange(first, first + size, dtype=np.uint8)
        images = np.tile(values[:, None, None, None], (1, 4, 5, 2))
        return pipeline.Examples(images, np.arange(size, dtype=np.int64) % _CLASSES)

    return pipeline.InMemorySource(
        name="tiny",
        train=examples(train_size, 1),
        test=examples(test_size, 100),
        classes=_CLASSES,
        normalization=Normalization(1.0, (0.0, 0.0), (1.0, 1.0)),
        augmentation=augmentation.crop_and_flip(2),
    )


def _build(source=None, **options):
    return pipeline.build(
        source or _source(), PipelineOptions(**({"batch_size": 5} | options))
    )


def _epochs(data, count):
    """Returns the batches of each of the first epochs, as NumPy arrays."""
    iterator = iter(data.train.as_numpy_iterator())
    return [
        list(itertools.islice(iterator, data.steps_per_epoch)) for _ in range(count)
    ]


def _values(batches):
    return np.concatenate([images[:, 0, 0, 0] for images, _ in batches])


def _assert_same(first, second):
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])


def test_sizes_shapes_and_dtypes():
    data = _build()
    assert data.steps_per_epoch == 5
    assert (data.train_size, data.test_size, data.validation_size) == (_SIZE, 7, 0)
    assert data.input_shape == (4, 5, 2)
    assert data.validation is None
    for part in (data.train, data.test):
        images, labels = part.element_spec
        assert (images.shape.as_list(), images.dtype) == ([None, 4, 5, 2], tf.float32)
        assert (labels.shape.as_list(), labels.dtype) == ([None], tf.int64)
    assert data.train.cardinality() == tf.data.INFINITE_CARDINALITY
    assert data.test.cardinality() == 2


def test_each_epoch_holds_each_example_once_with_its_label():
    for batches in _epochs(_build(augment=False), 3):
        assert [len(labels) for _, labels in batches] == [5, 5, 5, 5, 3]
        values = _values(batches)
        np.testing.assert_array_equal(np.sort(values), np.arange(1, _SIZE + 1))
        labels = np.concatenate([labels for _, labels in batches])
        np.testing.assert_array_equal(labels, (values - 1) % _CLASSES)


def test_batch_larger_than_the_data():
    for batches in _epochs(_build(augment=False, batch_size=100), 2):
        assert len(batches) == 1
        assert len(batches[0][1]) == _SIZE


def test_order_changes_with_epoch_and_seed():
    orders = [
        tuple(_values(batches))
        for seed in range(3)
        for batches in _epochs(_build(augment=False, seed=seed), 3)
    ]
    assert len(set(orders)) == 9


def test_augmentation_changes_with_epoch_step_and_seed():
    """With one image in all batches, only the augmentation can differ."""
    source = _source()
    image = np.random.RandomState(0).randint(1, 256, (1, 4, 5, 2), np.uint8)
    images = np.repeat(image, _SIZE, axis=0)
    train = pipeline.Examples(images, source.train.labels)
    source = pipeline.InMemorySource(
        "same", train, source.test, _CLASSES, source.normalization, source.augmentation
    )
    seen = {
        images.tobytes()
        for seed in range(2)
        for batches in _epochs(_build(source, seed=seed), 2)
        for images, _ in batches[:4]
    }
    assert len(seen) == 16


def test_same_seed_gives_identical_batches():
    _assert_same(
        *(itertools.chain(*_epochs(_build(seed=2**63 - 1), 3)) for _ in range(2))
    )


def test_global_seed_has_no_part_in_it():
    results = []
    for global_seed in (1, 2):
        tf.random.set_seed(global_seed)
        results.append(_epochs(_build(), 1)[0])
    _assert_same(*results)


def test_a_new_iterator_starts_again():
    data = _build()
    _assert_same(_epochs(data, 1)[0], _epochs(data, 1)[0])


def test_start_epoch_resumes_exactly():
    whole = _epochs(_build(seed=7), 4)
    for start in (1, 3):
        _assert_same(_epochs(_build(seed=7, start_epoch=start), 1)[0], whole[start])


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize(("epoch", "step"), [(0, 0), (0, 3), (1, 1), (2, 4)])
def test_start_step_resumes_exactly(epoch, step, augment):
    options = {"seed": 7, "augment": augment}
    whole = list(itertools.chain(*_epochs(_build(**options), 4)))
    resumed = _build(**options, start_epoch=epoch, start_step=step)
    tail = whole[epoch * resumed.steps_per_epoch + step :]
    assert len(tail) > resumed.steps_per_epoch  # across the end of an epoch
    _assert_same(itertools.islice(resumed.train.as_numpy_iterator(), len(tail)), tail)
    assert resumed.train.cardinality() == tf.data.INFINITE_CARDINALITY


def test_start_step_must_be_a_step_of_the_epoch():
    with pytest.raises(ValueError, match=r"below the 5 steps .* Received: .*=5"):
        _build(start_step=5)
    # Held-out examples make an epoch shorter.
    with pytest.raises(ValueError, match=r"below the 3 steps .* Received: .*=3"):
        _build(start_step=3, validation_fraction=0.4)


def test_test_set_is_in_stored_order_and_not_augmented():
    batches = list(_build().test.as_numpy_iterator())
    np.testing.assert_array_equal(_values(batches), np.arange(100, 107))
    assert (batches[0][0] == batches[0][0][:, :1, :1]).all()


def test_validation_is_held_out_and_stratified():
    data = _build(validation_fraction=0.4, augment=False)
    assert (data.train_size, data.validation_size) == (14, 9)
    assert data.validation.cardinality() == data.steps_per_epoch - 1 == 2
    held_out = list(data.validation.as_numpy_iterator())
    (kept,) = _epochs(data, 1)
    assert sorted([*_values(kept), *_values(held_out)]) == list(range(1, _SIZE + 1))
    labels = np.concatenate([labels for _, labels in held_out])
    np.testing.assert_array_equal(np.bincount(labels), [3, 3, 3])


def test_validation_does_not_depend_on_the_seed():
    parts = [
        list(_build(validation_fraction=0.4, seed=seed).validation.as_numpy_iterator())
        for seed in (0, 1)
    ]
    _assert_same(*parts)


def test_validation_must_leave_training_examples():
    with pytest.raises(ValueError, match="at least one example in each part"):
        _build(validation_fraction=0.999)


def test_limit_keeps_the_first_examples_of_each_part():
    data = _build(limit=6, augment=False)
    assert (data.train_size, data.test_size) == (6, 6)
    np.testing.assert_array_equal(
        np.sort(_values(_epochs(data, 1)[0])), np.arange(1, 7)
    )
    np.testing.assert_array_equal(
        _values(list(data.test.as_numpy_iterator())), np.arange(100, 106)
    )


def test_images_are_augmented_before_they_are_normalised():
    """The padding must be black, not grey."""
    source = _source()
    source = pipeline.InMemorySource(
        "grey",
        source.train,
        source.test,
        _CLASSES,
        Normalization(1.0, (50.0, 50.0), (1.0, 1.0)),
        source.augmentation,
    )
    images = np.concatenate([images for images, _ in _epochs(_build(source), 1)[0]])
    # The smallest pixel is 1, so zeros can only be padding.
    assert images.min() == -50.0


@pytest.mark.slow
def test_a_resumed_fit_is_the_uninterrupted_fit():
    """Keras takes the epochs one after the other from a single iterator."""

    def model():
        layers = [keras.layers.Flatten(), keras.layers.Dense(_CLASSES)]
        network = keras.Sequential([keras.Input((4, 5, 2)), *layers])
        network.set_weights([np.zeros_like(w) for w in network.get_weights()])
        network.compile(
            keras.optimizers.SGD(1e-4),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        return network

    def fit(network, first, last, start_epoch):
        data = _build(start_epoch=start_epoch)
        network.fit(
            data.train,
            steps_per_epoch=data.steps_per_epoch,
            initial_epoch=first,
            epochs=last,
            validation_data=data.test,
            verbose=0,
        )

        return network.get_weights()[0]

    whole, resumed, repeated = model(), model(), model()
    expected = fit(whole, 0, 3, start_epoch=0)
    fit(resumed, 0, 1, start_epoch=0)
    tolerance = {"rtol": 1e-5, "atol": 1e-8}
    np.testing.assert_allclose(fit(resumed, 1, 3, start_epoch=1), expected, **tolerance)
    # The data matter: with those of the first epoch again, the result is another.
    fit(repeated, 0, 1, start_epoch=0)
    assert not np.allclose(fit(repeated, 1, 3, start_epoch=0), expected, **tolerance)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 3, 3), np.uint8), np.zeros(2, np.int64), "images must be"),
        (np.zeros((2, 3, 3, 1)), np.zeros(2, np.int64), "images must be .*float64"),
        (np.zeros((2, 3, 3, 1), np.uint8), np.zeros(2), "labels must be .*float64"),
        (
            np.zeros((2, 3, 3, 1), np.uint8),
            np.zeros(3, np.int64),
            "Received: 2 images, 3 labels",
        ),
    ],
)
def test_refuses_wrong_examples(images, labels, message):
    with pytest.raises(ValueError, match=message):
        pipeline.Examples(images, labels)


@pytest.mark.parametrize(
    ("sizes", "part"), [({"train_size": 0}, "train"), ({"test_size": 0}, "test")]
)
def test_refuses_empty_parts(sizes, part):
    with pytest.raises(ValueError, match=f"must have {part} examples. Received: 0"):
        _source(**sizes)


@pytest.mark.parametrize("wrong", [-1, _CLASSES])
def test_refuses_labels_out_of_range(wrong):
    source = _source()
    labels = source.train.labels.copy()
    labels[4] = wrong
    with pytest.raises(ValueError, match=r"train labels .* in \[0, 3\). Received"):
        pipeline.InMemorySource(
            "wrong",
            pipeline.Examples(source.train.images, labels),
            source.test,
            _CLASSES,
            source.normalization,
            source.augmentation,
        )
