import numpy as np
import pytest

from tests.export.networks import (
    EVERYWHERE,
    NEAR_TIES,
    Rule,
    assert_as_trained,
    behind,
    branched,
    conv,
    differing_codes,
    images,
    layers,
    network,
    normals,
    prove,
    quantize,
)
from tf_lowbit import export
from tf_lowbit.compat import keras


def test_an_average_is_a_sum_where_it_fits():
    body = {"mean": behind(lambda: layers.AveragePooling2D(2, name="mean_pool"))}
    x = normals(8, (8, 8, 3))
    model = quantize(branched(body, (8, 8, 3)), EVERYWHERE)
    proof = prove(model, x)
    grid = proof.layer("mean_pool").grid
    assert (grid.low, grid.high) == (0, 12)
    assert_as_trained(proof, x)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [6, 8])
def test_an_average_of_more_levels_is_rounded_to_8_bits(bits):
    body = {"mean": behind(lambda: layers.AveragePooling2D(3, name="mean_pool"))}
    x = normals(8, (8, 8, 3))
    rules = [Rule(".*_relu", None, bits), Rule(".*", 2, bits, edges=True)]
    proof = prove(quantize(branched(body, (8, 8, 3)), rules), x)
    assert proof.layer("mean_pool").grid.levels == 256
    assert list(proof.notes) == ["mean_pool"]
    assert proof.notes["mean_pool"].startswith("the average is rounded to 8 bits")
    trained = keras.Model(proof.model.inputs, proof.model.get_layer("mean_pool").output)
    made = keras.Model(proof.snapped.twin.inputs, proof.layer("mean_pool").output)
    # Means reach less than what they are means of: the grid ends at the largest.
    means, step = trained(x).numpy(), proof.layer("mean_pool").grid.step
    assert step == pytest.approx(means.max() / 255)
    np.testing.assert_allclose(made(x).numpy() * step, means, atol=0.51 * step)


@pytest.mark.slow
def test_without_data_an_average_has_the_range_of_what_it_averages():
    body = {"mean": behind(lambda: layers.AveragePooling2D(3, name="mean_pool"))}
    rules = [Rule(".*_relu", None, 8), Rule(".*", 2, 8, edges=True)]
    snapped = export.snap(quantize(branched(body, (8, 8, 3)), rules), None)
    step = snapped.twin.get_layer("mean_pool").grid.step
    assert step == pytest.approx(1 / 255)  # DoReFa clips at 1.


@pytest.mark.slow
def test_a_global_average_in_front_of_an_int8_head_has_its_own_range():
    x = images(8)
    model = quantize(network(lambda x: x), EVERYWHERE)
    proof = prove(model, x, head="int8")
    means = keras.Model(model.inputs, model.get_layer("pool").output)(x).numpy()
    assert proof.layer("pool_sum").grid.step == pytest.approx(means.max() / 255)


@pytest.mark.slow
def test_same_average_pooling_is_computed_in_float():
    """Its borders average fewer codes, which no one step fits."""

    def body(x, name):
        x = layers.AveragePooling2D(3, strides=2, padding="same", name="pooled")(x)
        return conv(3)(x, name)

    x = normals(8, (8, 8, 3))
    proof = prove(quantize(branched({"mean": body}, (8, 8, 3)), EVERYWHERE), x)
    assert "in float" in proof.notes["pooled"]
    assert isinstance(proof.layer("pooled"), layers.AveragePooling2D)
    found = differing_codes(proof.model, proof.snapped, x)
    for name, (different, total) in found.items():
        assert different <= NEAR_TIES * total, name


@pytest.mark.quick(1)
@pytest.mark.parametrize("count", [1, 2])
def test_a_pool_of_one_element_takes_every_other_code(count):
    """As the shortcuts of ResNetV2 have it; XNNPACK leaves it to another kernel."""
    body = {
        f"pooled{i}": behind(lambda: layers.MaxPooling2D(1, strides=2))
        for i in range(count)
    }
    x = normals(8, (8, 8, 3))
    model = quantize(branched(body, (8, 8, 3)), EVERYWHERE)
    proof = prove(model, x, not_delegated=["MAX_POOL_2D"] * count)
    assert_as_trained(proof, x)
