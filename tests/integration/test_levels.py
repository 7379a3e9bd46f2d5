"""At most 2^k values in each quantized tensor of a running, trained network."""

import numpy as np
import pytest

from tests.scheme import nets
from tf_lowbit import PrecisionRule, calibrate, models, quantize, quantizers
from tf_lowbit.compat import keras

W2A2, W4A4, W1A2, W3A5 = CONFIGURATIONS = [(2, 2), (4, 4), (1, 2), (3, 5)]
# One scale for a tensor: with one for each channel, tensors have more values.
UNIFORM = quantizers.UniformWeightQuantizer(per_axis=False)
SMALL = {"classes": nets.CLASSES, "width": 4}


def count_levels(model, batch):
    """Name of each quantized tensor -> how many values it takes."""
    tensors = nets.by_name(model)
    activations = {n: t.layer.name for n, t in tensors.items() if t.latent is None}
    seen = nets.outputs_of(model, activations.values(), batch)
    used = nets.used_weights(model, batch)
    values = {**used, **{name: seen[layer] for name, layer in activations.items()}}
    assert set(values) == set(tensors)
    for name, value in values.items():
        assert np.isfinite(value).all(), name
    return {name: np.unique(value).size for name, value in values.items()}


def quantized_network(model, bits, batch, methods=("dorefa", "dorefa")):
    rule = PrecisionRule(
        ".*",
        *bits,
        weight_quantizer=methods[0],
        activation_quantizer=methods[1],
    )
    quantized = quantize(nets.randomize(model), rule, strict=True)
    calibrate(quantized, [batch])
    return quantized


def check(model, bits, *, steps, methods=("dorefa", "dorefa"), batch_size=2, eager):
    batch = nets.images(batch_size, model.input_shape[1:])
    quantized = quantized_network(model, bits, batch, methods)
    return check_trained(quantized, bits, batch, steps=steps, eager=eager)


def check_trained(quantized, bits, batch, *, steps, eager):
    for _ in range(steps):
        nets.train_step(
            quantized,
            batch,
            nets.labels(len(batch)),
            optimizer=keras.optimizers.SGD(0.01),
            eager=eager,
        )
    counts = count_levels(quantized, batch)
    tensors = nets.by_name(quantized)
    assert {t.role for t in tensors.values()} == {"weight", "activation"}
    too_many = {n: c for n, c in counts.items() if c > 2 ** tensors[n].bits}
    assert not too_many
    for name, tensor in tensors.items():
        assert tensor.bits == bits[tensor.role == "activation"], name
    # The grids are in use, not collapsed onto a value.
    assert min(counts[n] for n, t in tensors.items() if t.role == "weight") > 1
    return counts


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("build", "expected"),
    [
        # 6 convolutions and 2 shortcuts; all activations but the last.
        (lambda: models.preact_resnet(8, input_shape=(12, 12, 3), **SMALL), 8 + 6),
        (nets.mobilenet_like, 20),
    ],
    ids=["preact_resnet8", "mobilenet_like"],
)
def test_at_all_bits_one_after_the_other(build, expected):
    model = build()
    batch = nets.images(2, model.input_shape[1:])
    quantized = quantized_network(model, W2A2, batch)
    for bits in CONFIGURATIONS:
        for tensor in nets.by_name(quantized).values():
            tensor.assign_bits(bits[tensor.role == "activation"])
        counts = check_trained(quantized, bits, batch, steps=1, eager=True)
        assert len(counts) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "methods"), [(W3A5, ("lsq", "lsq")), (W2A2, (UNIFORM, "pact"))]
)
def test_mobilenet_like_with_other_quantizers(bits, methods):
    check(nets.mobilenet_like(), bits, steps=2, methods=methods, eager=True)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("build", "size", "bits"),
    [
        (lambda **k: models.preact_resnet(20, **k), 8, W2A2),
        (models.resnet18, 32, W4A4),
        (models.preact_resnet18, 32, W1A2),
        (models.resnet50, 32, W3A5),
    ],
    ids=["preact_resnet20", "resnet18", "preact_resnet18", "resnet50"],
)
def test_residual_networks(build, size, bits):
    model = build(input_shape=(size, size, 3), **SMALL)
    check(model, bits, steps=1, eager=True)


@pytest.mark.slow
def test_alexnet():
    model = models.alexnet(classes=nets.CLASSES, input_shape=(63, 63, 3), dropout=0.0)
    counts = check(model, W2A2, steps=1, eager=True)
    assert len(counts) == 6 + 6
