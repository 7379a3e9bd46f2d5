import numpy as np
import pytest

from tf_lowbit.datasets.dataset import Normalization, PipelineOptions, batches


def test_normalization_follows_its_equation():
    normalize = Normalization(255.0, (0.1, 0.5), (0.2, 0.4))
    pixels = np.random.RandomState(0).randint(0, 256, (3, 4, 4, 2), np.uint8)
    result = normalize(pixels)
    assert result.dtype == "float32"
    expected = (pixels / 255.0 - np.array([0.1, 0.5])) / np.array([0.2, 0.4])
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_measured_normalization_gives_mean_0_and_deviation_1():
    pixels = np.random.RandomState(0).randint(0, 17, (50, 4, 4, 3), np.uint8)
    result = Normalization.of(pixels, scale=16)(pixels).numpy()
    np.testing.assert_allclose(result.mean(axis=(0, 1, 2)), 0.0, atol=1e-5)
    np.testing.assert_allclose(result.std(axis=(0, 1, 2)), 1.0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (0.0, (0.5,), (0.5,)),
            "scale must be a finite number above 0. Rec",
        ),
        ((1.0, (0.5,), (0.5, 0.5)), "value per channel"),
        ((1.0, (0.5,), (0.0,)), "deviation must be positive. Received"),
    ],
)
def test_refuses_impossible_normalizations(arguments, message):
    with pytest.raises(ValueError, match=message):
        Normalization(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must .* Received: batch_size=0"),
        ({"batch_size": 2.5}, "batch_size must be an integer .* Received: .*2.5"),
        ({"seed": -1}, "seed must .* Received: seed=-1"),
        ({"seed": 2**63}, "seed must be .* below"),
        ({"start_epoch": -1}, "start_epoch must .* Received: start_epoch=-1"),
        ({"start_step": -1}, "start_step must .* Received: start_step=-1"),
        ({"start_step": 1.0}, "start_step must be an integer .* Received: .*1.0"),
        ({"limit": 0}, "limit must .* Received: limit=0"),
        ({"validation_fraction": 1.0}, r"at least 0 and below 1. Received: .*=1.0"),
        ({"validation_fraction": -0.1}, r"at least 0 and below 1. Received: .*=-0.1"),
        (
            {"validation_fraction": float("nan")},
            r"at least 0 and below 1. Received: .*=nan",
        ),
    ],
)
def test_refuses_options_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        PipelineOptions(**({"batch_size": 8} | arguments))


def test_held_out():
    options = PipelineOptions(batch_size=8, validation_fraction=0.25)
    assert options.held_out(100) == 25
    assert PipelineOptions(batch_size=8).held_out(1) == 0
    with pytest.raises(ValueError, match="at least one example in each part"):
        options.held_out(1)


def test_limited():
    assert PipelineOptions(batch_size=8).limited(100) == 100
    assert PipelineOptions(batch_size=8, limit=7).limited(100) == 7
    assert PipelineOptions(batch_size=8, limit=101).limited(100) == 100


def test_batches():
    assert [batches(size, 4) for size in (1, 4, 5, 8)] == [1, 1, 2, 2]
