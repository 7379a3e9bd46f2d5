"""Units and residual blocks, of networks whose structure is known by hand."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tf_lowbit as tfl
from tests.scheme import nets
from tf_lowbit import models
from tf_lowbit.compat import CustomScaleLayer, keras
from tf_lowbit.network import inspection
from tf_lowbit.training.units import find_units, residual_blocks

layers = keras.layers
SMALL = {"width": 2, "classes": 3, "input_shape": (16, 16, 3)}


def dense(x, name):
    """relu_<name> - <name>."""
    return layers.Dense(4, name=name)(layers.ReLU(name=f"relu_{name}")(x))


def residual(*, add=lambda x, y: layers.Add(name="sum")([x, y])):
    """stem - [a - b] + identity - head."""
    inputs = keras.Input((4,), name="in")
    x = layers.Dense(4, name="stem")(inputs)
    y = dense(dense(x, "a"), "b")
    return keras.Model(inputs, dense(add(x, y), "head"))


def shared():
    """One layer and one ReLU, each called twice; the second call in a block."""
    inputs = keras.Input((4,), name="in")
    relu, twice = layers.ReLU(name="relu"), layers.Dense(4, name="twice")
    x = twice(relu(layers.Dense(4, name="stem")(inputs)))
    y = dense(twice(relu(x)), "a")
    x = layers.Add(name="sum")([x, y])
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


NETS = {
    "chain": nets.chain,
    "pre-activation": functools.partial(
        models.preact_resnet, 8, width=2, input_shape=(8, 8, 3)
    ),
    "post-activation": nets.postactivation,
    "mobilenet": functools.partial(nets.mobilenet_like, 4),
    "residual": residual,
    "shared": shared,
}


RESIDUAL = ("pre-activation", "post-activation", "mobilenet", "residual")


@functools.cache
def quantized(name, residual_bits=None):
    rule = tfl.PrecisionRule(".*", 2, 2)
    return tfl.quantize(NETS[name](), rule, residual_bits=residual_bits)


def members(model, unit="layer"):
    """Unit name -> names of its quantizers, in their order."""
    return {u.name: [t.name for t in u.tensors] for u in find_units(model, unit)}


def read(*names):
    """What quantizes a layer `b` behind a ReLU `a`, for each pair 'a b'."""
    pairs = (name.split() for name in names)
    return [x for a, b in pairs for x in (f"{a}/output", f"{b}/kernel")]


def test_in_a_chain_each_layer_is_a_unit_with_the_activation_that_it_reads():
    found = find_units(quantized("chain"))
    # stem and head are float, and so is relu3, which only the head reads.
    assert [unit.name for unit in found] == ["mid", "last"]
    assert [[t.name for t in unit.tensors] for unit in found] == [
        ["relu1/output", "mid/kernel"],
        ["relu2/output", "last/kernel"],
    ]


def test_without_blocks_the_block_unit_is_the_layer():
    model = quantized("chain")
    assert members(model, "block") == members(model, "layer")
    assert residual_blocks(model) == {}


def test_units_of_a_pre_activation_network_by_layer():
    found = members(quantized("pre-activation"))
    assert found["stage1_block1_conv1"] == read(
        "stage1_block1_relu1 stage1_block1_conv1"
    )
    # relu1 is read by conv1 first; the shortcut that reads it too has its kernel.
    assert found["stage2_block1_conv1"] == read(
        "stage2_block1_relu1 stage2_block1_conv1"
    )
    assert found["stage2_block1_shortcut"] == ["stage2_block1_shortcut/kernel"]
    assert len(found) == 8


def test_units_of_a_pre_activation_network_by_block():
    found = members(quantized("pre-activation"), "block")
    blocks_of = [f"stage{stage}_block1" for stage in (1, 2, 3)]
    assert list(found) == [f"{block}_add" for block in blocks_of]
    for block in blocks_of:
        expected = read(f"{block}_relu1 {block}_conv1", f"{block}_relu2 {block}_conv2")
        if block != "stage1_block1":
            expected.append(f"{block}_shortcut/kernel")
        assert sorted(found[f"{block}_add"]) == sorted(expected)
        # In the graph's order: what is read stands before what reads.
        assert found[f"{block}_add"][:2] == expected[:2]


def test_a_post_activation_blocks_output_belongs_to_who_reads_it():
    assert members(quantized("post-activation"), "block").keys() == {
        "one_add",
        "two_add",
    }
    found = members(quantized("post-activation"), "block")
    assert found["one_add"] == read("stem_relu one_conv1", "one_relu1 one_conv2")
    expected = [*read("one_relu2 two_conv1", "two_relu1 two_conv2")]
    assert sorted(found["two_add"]) == sorted([*expected, "two_shortcut/kernel"])


@pytest.mark.slow
def test_linear_bottlenecks_stand_alone_where_nothing_is_added():
    found = members(quantized("mobilenet"), "block")
    assert list(found) == [
        "block1_add",
        *("block2_expand", "block2_depthwise", "block2_project"),
        "block3_add",
        "features",
    ]
    # Inserted quantizers go with what reads them.
    assert found["block2_expand"] == read("block1_add_quantizer block2_expand")
    assert found["block3_add"] == [
        *read("block2_project_bn_quantizer block3_expand"),
        *("block3_expand_relu/output", "block3_depthwise/depthwise_kernel"),
        *read("block3_depthwise_relu block3_project"),
    ]
    assert found["features"] == read("block3_add_quantizer features")


@pytest.mark.parametrize(("depth", "count"), [(8, 1), (14, 2)])
def test_blocks_of_pre_activation_networks(depth, count):
    model = models.preact_resnet(depth, width=2, input_shape=(8, 8, 3))
    expected = {}
    for stage in (1, 2, 3):
        for index in range(1, count + 1):
            block = f"stage{stage}_block{index}"
            names = {f"{block}_conv1", f"{block}_conv2"}
            if stage > 1 and index == 1:
                names.add(f"{block}_shortcut")
            expected[f"{block}_add"] = names
    assert residual_blocks(model) == expected
    assert list(residual_blocks(model)) == list(expected)


@pytest.mark.parametrize(
    ("make", "counts", "convs", "projected"),
    [
        (models.resnet18, (2, 2, 2, 2), 2, (2, 3, 4)),
        (models.resnet50, (3, 4, 6, 3), 3, (1, 2, 3, 4)),
    ],
)
def test_blocks_of_post_activation_networks(make, counts, convs, projected):
    expected = {}
    for stage, count in enumerate(counts, start=1):
        for index in range(1, count + 1):
            block = f"stage{stage}_block{index}"
            names = {f"{block}_conv{i}" for i in range(1, convs + 1)}
            if index == 1 and stage in projected:
                names.add(f"{block}_shortcut")
            expected[f"{block}_add"] = names
    assert residual_blocks(make(**SMALL)) == expected


def test_blocks_of_inverted_residuals():
    parts = ("expand", "depthwise", "project")
    assert residual_blocks(nets.mobilenet_like(4)) == {
        f"{block}_add": {f"{block}_{part}" for part in parts}
        for block in ("block1", "block3")
    }


def test_a_sum_written_as_an_operator_ends_a_block():
    model = residual(add=lambda x, y: x + y)
    (name,) = residual_blocks(model)
    assert residual_blocks(model) == {name: {"a", "b"}}
    found = members(tfl.quantize(model, tfl.PrecisionRule(".*", 2, 2)), "block")
    assert found == {name: read("relu_a a", "relu_b b")}


def test_a_scaled_sum_ends_a_block():
    model = residual(add=lambda x, y: CustomScaleLayer(0.2)([x, y]))
    (name,) = residual_blocks(model)
    assert residual_blocks(model) == {name: {"a", "b"}}


def test_a_constant_added_is_no_block():
    model = residual(add=lambda x, y: y + 1.0)
    assert residual_blocks(model) == {}


def test_a_tensor_added_to_itself_is_no_block():
    assert residual_blocks(residual(add=lambda x, y: y + y)) == {}


def test_a_block_of_three_branches():
    inputs = keras.Input((4,), name="in")
    x = layers.Dense(4, name="stem")(inputs)
    first = layers.Dense(4, name="shared_by_two")(x)
    y, z = layers.Dense(4, name="y")(first), layers.Dense(4, name="z")(first)
    total = layers.Add(name="sum")([x, y, z])
    model = keras.Model(inputs, layers.Dense(2, name="head")(total))
    assert residual_blocks(model) == {"sum": {"shared_by_two", "y", "z"}}


def test_unrelated_inputs_are_no_branches_of_a_block():
    one, two = keras.Input((4,), name="one"), keras.Input((4,), name="two")
    x = layers.Dense(4, name="a")(one)
    y = layers.Dense(4, name="b")(two)
    model = keras.Model([one, two], layers.Add(name="sum")([x, y]))
    assert residual_blocks(model) == {}


@pytest.mark.slow
def test_a_shared_layer_is_in_one_unit():
    model = quantized("shared")
    # The layer lies before the block, too, and so on all of its branches.
    assert residual_blocks(model) == {"sum": {"a"}}
    expected = {
        "twice": ["relu/output", "twice/kernel"],
        "a": ["relu_a/output", "a/kernel"],
    }
    assert members(model) == expected
    assert members(model, "block") == {
        "twice": expected["twice"],
        "sum": expected["a"],
    }


# A residual network is a list of its parts: a layer (None), or a block, likewise.
PARTS = st.recursive(
    st.lists(st.none(), min_size=1, max_size=2),
    lambda inner: st.lists(st.none() | inner, min_size=1, max_size=3),
    max_leaves=5,
)


@settings(max_examples=15, deadline=None)
@given(parts=PARTS)
def test_a_block_holds_the_layers_that_no_inner_block_does(parts):
    inputs = keras.Input((2,), name="in")
    expected, count = {}, iter(range(100))

    def follow(x, parts, own):
        for part in parts:
            if part is None:
                name = f"layer{next(count)}"
                own.add(name)
                x = layers.Dense(2, name=name)(x)
                continue
            of_block = set()
            add = layers.Add(name=f"sum{next(count)}")
            x = add([x, follow(x, part, of_block)])
            if of_block:
                expected[add.name] = of_block
        return x

    outputs = layers.Dense(2, name="head")(follow(inputs, parts, set()))
    assert residual_blocks(keras.Model(inputs, outputs)) == expected


@pytest.mark.parametrize("unit", ["layer", "block", [".*"], [".*[a1d].*"]], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_every_quantizer_is_in_exactly_one_unit(name, unit):
    model = quantized(name)
    found = [t.name for u in find_units(model, unit) for t in u.tensors]
    assert sorted(found) == sorted(t.name for t in inspection.quantized_tensors(model))
    units = [u.name for u in find_units(model, unit)]
    assert len(set(units)) == len(units)
    assert all(u.tensors for u in find_units(model, unit))


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["layer", "block", [".*"], [".*[a1d].*"]], ids=str)
@pytest.mark.parametrize("name", RESIDUAL)
def test_residual_quantizers_join_units_and_make_none(name, unit):
    plain, model = quantized(name), quantized(name, 8)
    found = members(model, unit)
    tensors = list(inspection.quantized_tensors(model))
    everything = [tensor for names in found.values() for tensor in names]
    assert sorted(everything) == sorted(t.name for t in tensors)
    residual = {t.name for t in tensors if t.is_residual}
    assert residual
    without = {unit: set(names) - residual for unit, names in found.items()}
    expected = {unit: set(names) for unit, names in members(plain, unit).items()}
    assert {unit: names for unit, names in without.items() if names} == expected
    assert residual_blocks(model) == residual_blocks(plain)


def test_a_residual_quantizer_goes_with_the_layer_in_front_of_it():
    found = members(quantized("pre-activation", 8))
    assert found["stage1_block1_conv2"] == [
        *read("stage1_block1_relu2 stage1_block1_conv2"),
        "stage1_block1_conv2_residual/output",
        "stage1_block1_add_residual/output",
    ]
    assert "stage2_block1_shortcut_residual/output" in found["stage2_block1_shortcut"]
    found = members(quantized("mobilenet", 8), "block")
    assert found["block2_project"][-1] == "block2_project_bn_residual/output"
    assert found["block3_add"][-2:] == [
        "block3_project_bn_residual/output",
        "block3_add_residual/output",
    ]


def test_a_residual_quantizer_behind_no_layer_stands_alone():
    inputs = keras.Input((4,), name="in")
    x = layers.Add(name="sum")([inputs, layers.Dense(4, name="a")(inputs)])
    model = keras.Model(inputs, dense(x, "head"))
    rule = tfl.PrecisionRule(".+", 2, 2)
    assert members(tfl.quantize(model, rule, residual_bits=8)) == {
        "in_residual": ["in_residual/output"],
        "a": ["in_quantizer/output", "a/kernel", "a_residual/output"],
        "head": read("relu_head head"),
    }


def test_the_first_pattern_that_matches_wins_and_others_stand_alone():
    model = quantized("mobilenet")
    found = members(model, [".*_expand", "block[12]_.*"])
    assert found == {
        ".*_expand": [
            *read("stem_relu block1_expand"),
            *read("block1_add_quantizer block2_expand"),
            *read("block2_project_bn_quantizer block3_expand"),
        ],
        "block[12]_.*": [
            *("block1_expand_relu/output", "block1_depthwise/depthwise_kernel"),
            *read("block1_depthwise_relu block1_project"),
            *("block2_expand_relu/output", "block2_depthwise/depthwise_kernel"),
            *read("block2_depthwise_relu block2_project"),
        ],
        "block3_depthwise": [
            *("block3_expand_relu/output", "block3_depthwise/depthwise_kernel"),
        ],
        "block3_project": read("block3_depthwise_relu block3_project"),
        "features": read("block3_add_quantizer features"),
    }


def test_a_pattern_must_match_the_whole_name():
    with pytest.raises(ValueError, match=r"pattern of unit must match"):
        find_units(quantized("chain"), ["mi"])


def test_no_patterns_leave_each_layer_alone():
    model = quantized("chain")
    assert members(model, []) == members(model, "layer")


@pytest.mark.parametrize(
    ("patterns", "unused"),
    [
        (["mid", "nothing"], ["nothing"]),
        (["stem"], ["stem"]),  # Float.
        (["relu1"], ["relu1"]),  # Goes with the layer that reads it.
        ([".*", "mid"], ["mid"]),  # The first one takes all.
    ],
)
def test_a_pattern_that_takes_no_layer_is_refused(patterns, unused):
    with pytest.raises(ValueError, match=r"^Each pattern of unit must match") as error:
        find_units(quantized("chain"), patterns)
    expected = f"Received: {unused}, with the layers ['last', 'mid']"
    assert str(error.value).endswith(expected)


@pytest.mark.parametrize(
    "unit", ["layers", "mid", "", [1], [None], None, 3, ["("], {"mid": 1}], ids=repr
)
def test_another_unit_is_refused(unit):
    with pytest.raises(ValueError, match=r"unit.*Received: "):
        tfl.StochasticPrecision(unit=unit)


def test_an_activation_that_no_layer_reads_is_a_unit_of_its_own():
    rules = [tfl.PrecisionRule("relu3", activation_bits=2, weight_bits=None)]
    rules += [tfl.PrecisionRule("mid", 2, 2)]
    model = nets.chain()
    tail = layers.Add(name="plus")([model.get_layer("relu3").output] * 2)
    model = tfl.quantize(keras.Model(model.inputs, tail), rules)
    assert members(model) == {
        "mid": ["relu1/output", "mid/kernel"],
        "relu3": ["relu3/output"],
    }
    assert members(model, ["mid|relu3"]).keys() == {"mid|relu3"}


@pytest.mark.parametrize("unit", ["layer", "block"])
def test_a_network_that_is_not_quantized_is_refused(unit):
    with pytest.raises(ValueError, match=r"tf_lowbit.quantize made. Received"):
        find_units(nets.perceptron(), unit)
