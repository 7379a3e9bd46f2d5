import functools

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.export.networks import (
    EVERYWHERE,
    IMAGE,
    NEAR_TIES,
    Rule,
    bn_relu,
    branched,
    conv,
    conv_bn_relu,
    differing_codes,
    finished,
    layers,
    normals,
    prove,
    quantize,
)
from tf_lowbit import export
from tf_lowbit.compat import CustomScaleLayer, keras
from tf_lowbit.export.integer import twin
from tf_lowbit.network import inspection


def _branch(x, name, filters=None):
    return layers.BatchNormalization(name=f"{name}_bn")(
        layers.Conv2D(filters or x.shape[-1], 3, padding="same", name=name)(x)
    )


def _preact(x, name):
    x = layers.Conv2D(4, 3, padding="same", name=f"{name}_stem")(x)
    y = bn_relu(x, f"{name}_first")
    y = layers.Conv2D(4, 3, padding="same", name=f"{name}_inner")(y)
    x = layers.Add(name=f"{name}_add")([y, x])
    return conv(3)(bn_relu(x, f"{name}_second"), name)


def _postact(x, name):
    y = _branch(conv_bn_relu(x, 3, name=f"{name}_inner"), f"{name}_outer")
    return layers.ReLU(name=f"{name}_relu")(layers.Add(name=f"{name}_add")([x, y]))


def _projected(x, name):
    y = _branch(x, f"{name}_outer", 5)
    x = _branch(x, f"{name}_shortcut", 5)
    return layers.ReLU(name=f"{name}_relu")(layers.Add(name=f"{name}_add")([y, x]))


def _bottleneck(x, name):
    x = _branch(x, f"{name}_linear", 3)
    for i in (1, 2):
        y = conv_bn_relu(x, 6, 1, name=f"{name}_expand{i}")
        y = bn_relu(
            layers.DepthwiseConv2D(3, padding="same", name=f"{name}_deep{i}")(y),
            f"{name}_deep{i}",
        )
        y = _branch(y, f"{name}_project{i}", 3)
        x = layers.Add(name=f"{name}_add{i}")([x, y])
    return conv_bn_relu(x, 4, 1, name=name)


def _pooled_identity(x, name):
    x = layers.MaxPooling2D(2, name=f"{name}_pool")(x)
    y = _branch(x, f"{name}_outer")
    y = layers.Dropout(0.5)(y)
    return layers.ReLU(name=f"{name}_relu")(layers.Add(name=f"{name}_add")([y, x]))


def _two_activations(x, name):
    y = conv_bn_relu(x, 3, name=f"{name}_outer")
    return layers.ReLU(name=f"{name}_relu")(layers.Add(name=f"{name}_add")([x, y]))


def _itself(x, name):
    y = conv_bn_relu(x, 3, name=f"{name}_outer")
    x = layers.Add(name=f"{name}_add")([y, y])
    return layers.ReLU(name=f"{name}_relu")(x)


ADDS = {
    "preact": _preact,
    "postact": _postact,
    "projected": _projected,
    "bottleneck": _bottleneck,
    "pooled_identity": _pooled_identity,
    "two_activations": _two_activations,
    "itself": _itself,
}


@functools.cache
def proven_add(case, residual_bits):
    model = branched({case: ADDS[case]}, (6, 6, 3))
    model = quantize(model, EVERYWHERE, residual_bits=residual_bits)
    x = normals(8, (6, 6, 3))
    if residual_bits:
        tfl.calibrate(model, [x])
    proof = prove(model, x)
    assert sum(proof.report.additions.values()) == 0
    assert len(proof.report.additions) == (2 if case == "bottleneck" else 1)
    wrong = sum(sum(decisions.wrong) for decisions in proof.report.decisions)
    return differing_codes(model, proof.snapped, x), proof.notes, wrong


@pytest.mark.quick(3)
@pytest.mark.parametrize("case", ADDS)
def test_a_trained_residual_stream_leaves_as_trained(case):
    found, notes, wrong = proven_add(case, 8)
    assert not notes
    # 255 decision points of one channel do not always fit one scale and one bias.
    allowed = 0.03 if wrong else NEAR_TIES
    assert sum(count for count, _ in found.values()) <= allowed * sum(
        size for _, size in found.values()
    ), found


@pytest.mark.quick(1)
@pytest.mark.parametrize("case", ["preact", "postact", "projected", "bottleneck"])
def test_a_float_residual_stream_is_rounded_and_noted(case):
    found, notes, _ = proven_add(case, None)
    assert notes
    assert all("8 bits" in text for text in notes.values())
    # The rounding is 8 bits': few of the 2-bit codes behind it move.
    assert sum(count for count, _ in found.values()) <= 0.05 * sum(
        size for _, size in found.values()
    ), found


def _of_a_convolution(x, name):
    return x, _branch(x, f"{name}_up")


def _of_codes_that_others_read(x, name):
    y = conv_bn_relu(x, 3, name=f"{name}_up")
    return layers.Conv2D(3, 1, name=f"{name}_other")(y), y


def _of_the_same(x, name):
    return x, x


@pytest.mark.quick(1)
@pytest.mark.parametrize("factor", [0.2, 5.0, -0.7, 1.0, 0.0])
@pytest.mark.parametrize(
    "terms", [_of_a_convolution, _of_codes_that_others_read, _of_the_same]
)
def test_a_scaled_residual_stream_leaves(terms, factor):
    # Inception-ResNet's sums.
    def body(x, name):
        x = CustomScaleLayer(factor, name=f"{name}_sum")(terms(x, name))
        return conv(3)(layers.ReLU(name=f"{name}_sum_relu")(x), name)

    model = quantize(branched({"block": body}, (6, 6, 3)), EVERYWHERE)
    x = normals(8, (6, 6, 3))
    proof = prove(model, x)
    assert isinstance(proof.layer("block_sum"), twin.IntegerAdd)
    assert sum(proof.report.additions.values()) == 0
    assert len(proof.report.additions) == 1
    # As of a float residual stream.
    found = differing_codes(model, proof.snapped, x)
    assert sum(count for count, _ in found.values()) <= 0.05 * sum(
        size for _, size in found.values()
    ), found
    if terms is _of_a_convolution and factor:
        grid = proof.layer("block_up").grid
        values = keras.Model(model.inputs, model.get_layer("block_up_bn").output)(x)
        # Odd ratios of the sum's step are never much more than what is needed.
        largest = np.abs(factor * values.numpy()).max()
        assert 0.99 * largest <= 128 * grid.step <= 2 * largest
    scales_on_its_own = "block_sum_scaled" in {
        layer.name for layer in proof.snapped.twin.layers
    }
    assert scales_on_its_own == (terms is not _of_a_convolution and factor != 1.0)


@pytest.mark.slow
def test_a_scaled_float_sum_stays_one():
    def body(x, name):
        y = layers.Conv2D(3, 1, name=f"{name}_up")(x)
        x = CustomScaleLayer(-0.3, name=f"{name}_sum")([x, y])
        return conv(3)(layers.ReLU(name=f"{name}_sum_relu")(x), name)

    model = quantize(branched({"block": body}, (6, 6, 3)), [Rule("block", 2, 2)])
    x = normals(8, (6, 6, 3))
    proof = prove(model, x, first_layer="float")
    assert isinstance(proof.layer("block_sum"), layers.Add)
    found = differing_codes(model, proof.snapped, x)
    assert sum(count for count, _ in found.values()) <= NEAR_TIES * sum(
        size for _, size in found.values()
    ), found


@pytest.mark.quick(1)
@pytest.mark.parametrize("count", [3, 4])
def test_an_add_of_many_is_adds_of_two(count):
    def body(x, name):
        y = [_branch(x, f"{name}{i}") for i in range(count - 1)]
        return layers.ReLU(name="relu")(layers.Add(name="many")([x, *y]))

    network = branched({"sum": body}, (6, 6, 3))
    assert export.check(network).ok
    model, x = quantize(network, EVERYWHERE), normals(16, (6, 6, 3))
    proof = prove(model, x)
    adds = [n for n in proof.snapped.twin.layers if isinstance(n, twin.IntegerAdd)]
    assert len(adds) == count - 1
    assert proof.snapped.tensors["many"] == "many"
    trained = keras.Model(model.inputs, model.get_layer("many").output)(x).numpy()
    made = keras.Model(proof.snapped.twin.inputs, proof.layer("many").output)(x)
    step = proof.layer("many").grid.step
    # Each term and each part of the sum is rounded to a step.
    assert np.abs(made.numpy() * step - trained).max() <= (count + 1) * step


@pytest.mark.slow
def test_a_float_add_stays_one():
    image = keras.Input(IMAGE)
    x = [layers.Conv2D(4, 3, name=f"side{i}")(image) for i in range(3)]
    x = layers.Add(name="sum")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.Conv2D(4, 3, name="inner")(x)
    x = layers.ReLU(name="last_relu")(x)
    model = finished(image, x)
    model = quantize(model, [Rule("inner", 2, 2)])
    proof = prove(model, normals(), first_layer="float")
    assert isinstance(proof.layer("sum"), layers.Add)


def test_a_sum_far_larger_than_its_identity_does_not_clip():
    def body(x, name):
        y = layers.Conv2D(3, 3, padding="same", name=f"{name}_large")(x)
        x = layers.Add(name="sum")([x, y])
        return conv_bn_relu(x, 3, name=name)

    model = branched({"wide": body}, (6, 6, 3))
    model.get_layer("wide_large").bias.assign([30.0, -30.0, 20.0])
    rules = [Rule(".*_relu", None, 8), Rule(".*", 7, 8, edges=True)]
    model = quantize(model, rules, clip=60.0)
    x = normals(8, (6, 6, 3))
    proof = prove(model, x)
    trained = keras.Model(model.inputs, model.get_layer("sum").output)(x).numpy()
    made = keras.Model(proof.snapped.twin.inputs, proof.layer("sum").output)(x)
    have = made.numpy() * proof.layer("sum").grid.step
    np.testing.assert_allclose(have, trained, atol=2 * np.abs(trained).max() / 127)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "own"), [(5, 0), (6, 1)])
def test_a_concatenation_of_many(count, own):
    """XNNPACK joins five tensors at most; TFLite's own kernel joins more."""

    def body(x, name):
        parts = [conv_bn_relu(x, 2, name=f"part{i}") for i in range(count)]
        return conv(3)(layers.Concatenate(name="all")(parts), name)

    model = quantize(branched({"after": body}, (6, 6, 3)), EVERYWHERE)
    x = normals(8, (6, 6, 3))
    proof = prove(model, x, not_delegated=["CONCATENATION"] * own)
    assert "all" not in proof.notes
    codes = differing_codes(model, proof.snapped, x)
    assert sum(found for found, _ in codes.values()) <= NEAR_TIES * sum(
        size for _, size in codes.values()
    )


@pytest.mark.slow
def test_a_concatenation_of_different_grids_is_noted():
    def body(x, name):
        y = layers.ReLU(name="finer_relu")(layers.Conv2D(3, 1, name="finer")(x))
        x = layers.Concatenate(name="both")([x, y])
        return conv(3)(x, name)

    rules = [Rule("finer_relu", None, 3), *EVERYWHERE]
    model = quantize(branched({"after": body}, (6, 6, 3)), rules)
    x = normals(8, (6, 6, 3))
    proof = prove(model, x)
    assert "8 bits" in proof.notes["both"]
    made = keras.Model(proof.snapped.twin.inputs, proof.layer("both").output)(x)
    trained = keras.Model(model.inputs, model.get_layer("both").output)(x).numpy()
    np.testing.assert_allclose(made.numpy() / 127, trained, atol=0.51 / 127)


@pytest.mark.slow
def test_steps_that_drifted_are_noted_and_tied_ones_leave_as_trained():
    def body(x, name):
        x = layers.Add(name=f"{name}_add")([_branch(x, f"{name}_{i}") for i in "ab"])
        x = conv(3)(layers.ReLU(name=f"{name}_relu")(x), f"{name}_end")
        return layers.Dense(3, name=f"{name}_head")(layers.Flatten()(x))

    model = branched({"sum": body}, (6, 6, 3))
    rules = [Rule(".*", 4, 4, "lsq", "lsq", edges=True)]
    model = quantize(model, rules, residual_bits=8)
    x = normals(64, (6, 6, 3))
    tfl.calibrate(model, [x])
    (step,) = (
        tensor.variables["step"]
        for tensor in inspection.quantized_tensors(model)
        if tensor.name == "sum_relu/output"
    )
    step.assign(1.0137 * step)

    def as_in_the_file():
        proof = prove(model, x)
        found = differing_codes(model, proof.snapped, x).values()
        return " ".join(proof.notes.values()), sum(count for count, _ in found)

    notes, drifted = as_in_the_file()
    assert "tie_residuals" in notes
    tfl.tie_residuals(model)
    notes, tied = as_in_the_file()
    assert "tie_residuals" not in notes
    assert tied < drifted
