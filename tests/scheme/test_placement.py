"""Which quantizer stands where, before anything is rewritten."""

import pytest

from tests.scheme import nets
from tf_lowbit import PrecisionRule, quantize, quantizers
from tf_lowbit.compat import keras, tf
from tf_lowbit.network import inspection, layer_registry
from tf_lowbit.scheme.placement import edge_layers, make_plan
from tf_lowbit.scheme.rules import as_rules

layers = keras.layers
W2A2 = PrecisionRule(".*", weight_bits=2, activation_bits=2)
EVERYWHERE = PrecisionRule(".*", weight_bits=2, activation_bits=2, edges=True)


def plan_of(model, rules):
    eligible = {layer.name for layer in model.layers if layer_registry.kernels(layer)}
    return make_plan(model, as_rules(rules), eligible)


def weight_bits(plan):
    return {
        name: [quantizer.bits for quantizer in by_attribute.values()]
        for name, by_attribute in plan.weights.items()
    }


def activation_bits(plan):
    return {name: quantizer.bits for name, quantizer in plan.activations.items()}


def inserted(plan):
    """Name of each new layer -> how many places read it."""
    names = [insertion.name for insertion in plan.insertions.values()]
    return {name: names.count(name) for name in names}


def conv(x, name, **arguments):
    return layers.Conv2D(4, 1, name=name, **arguments)(x)


def relu(x, name):
    return layers.ReLU(name=name)(x)


def start():
    """An input, and a first convolution and its ReLU."""
    image = keras.Input(nets.IMAGE, name="image")
    return image, relu(conv(image, "stem"), "relu0")


def finish(image, x):
    """A last layer behind `x`."""
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(image, layers.Dense(2, name="head")(x))


def test_the_catch_all_leaves_the_first_and_the_last_layer_float():
    plan = plan_of(nets.chain(), W2A2)
    assert weight_bits(plan) == {"mid": [2], "last": [2]}
    # relu3 feeds only the float head.
    assert activation_bits(plan) == {"relu1": 2, "relu2": 2}
    assert not plan.insertions
    assert not plan.problems()


def test_a_name_reaches_the_edges():
    rules = [PrecisionRule("stem|head", weight_bits=8, activation_bits=8), W2A2]
    plan = plan_of(nets.chain(), rules)
    assert weight_bits(plan) == {"stem": [8], "mid": [2], "last": [2], "head": [8]}
    assert activation_bits(plan) == {"relu1": 2, "relu2": 2, "relu3": 8}
    assert inserted(plan) == {"image_quantizer": 1}


def test_edges_true_reaches_everything():
    plan = plan_of(nets.chain(), EVERYWHERE)
    assert set(plan.weights) == {"stem", "mid", "last", "head"}
    assert set(plan.activations) == {"relu1", "relu2", "relu3"}
    assert inserted(plan) == {"image_quantizer": 1}


def test_the_first_match_wins():
    rules = [
        PrecisionRule("mid", weight_bits=3),
        PrecisionRule("m.*", weight_bits=5),
        PrecisionRule(".*", weight_bits=1, layer_type="Conv2D"),
    ]
    plan = plan_of(nets.chain(), rules)
    assert weight_bits(plan) == {"mid": [3], "last": [1]}
    assert plan.unused_rules == [rules[1]]


def test_a_rule_without_bits_keeps_a_layer_float():
    plan = plan_of(nets.chain(), [PrecisionRule("mid"), W2A2])
    assert set(plan.weights) == {"last"}
    assert not plan.problems()


def test_weights_only_and_activations_only():
    weights = plan_of(nets.chain(), PrecisionRule(".*", weight_bits=2))
    assert weights.weights
    assert not weights.activations
    activations = plan_of(nets.chain(), PrecisionRule(".*", activation_bits=2))
    assert not activations.weights
    assert set(activations.activations) == {"relu1", "relu2"}


def test_the_layer_type_selects():
    rule = PrecisionRule(".*", weight_bits=4, layer_type="Dense", edges=True)
    assert weight_bits(plan_of(nets.chain(), rule)) == {"head": [4]}


def test_edges_of_a_branched_model():
    left, right = keras.Input((4,), name="left"), keras.Input((4,), name="right")
    a, b = layers.Dense(3, name="a")(left), layers.Dense(3, name="b")(right)
    x = layers.Dense(3, name="middle")(layers.Add()([a, b]))
    outputs = {"one": layers.Dense(1, name="one")(x), "two": x}
    model = keras.Model([left, right], outputs)
    assert edge_layers(model) == ({"a", "b"}, {"one"})


def test_a_relu_before_pooling_padding_and_dropout_is_found():
    image, x = start()
    x = layers.MaxPooling2D(2, name="max")(x)
    x = layers.ZeroPadding2D(1, name="pad")(x)
    x = layers.AveragePooling2D(2, name="average")(x)
    x = layers.Dropout(0.5, name="dropout")(x)
    plan = plan_of(finish(image, conv(x, "conv")), W2A2)
    assert activation_bits(plan) == {"relu0": 2}
    assert not plan.insertions


def test_a_relu_before_flatten_is_found():
    image, x = start()
    x = layers.Dense(4, name="dense")(layers.Flatten(name="flat")(x))
    model = keras.Model(image, layers.Dense(2, name="head")(x))
    assert activation_bits(plan_of(model, W2A2)) == {"relu0": 2}


def test_concatenate_of_mixed_sources():
    image, x = start()
    activated = relu(conv(x, "a"), "relu_a")
    linear = conv(x, "b")
    both = layers.Concatenate(name="both")([activated, linear])
    plan = plan_of(finish(image, conv(both, "c")), W2A2)
    assert activation_bits(plan) == {"relu0": 2, "relu_a": 2}
    assert inserted(plan) == {"b_quantizer": 1}


def test_a_linear_bottleneck_gets_one_quantizer_for_all_its_readers():
    image, x = start()
    bottleneck = conv(x, "bottleneck")
    summed = layers.Add(name="sum")(
        [conv(bottleneck, "a"), conv(bottleneck, "b"), bottleneck]
    )
    plan = plan_of(finish(image, summed), W2A2)
    assert inserted(plan) == {"bottleneck_quantizer": 2}
    (quantizer,) = {i.quantizer for i in plan.insertions.values()}
    assert quantizer == quantizers.UniformActivationQuantizer(bits=2, signed=True)


def test_readers_of_other_precision_get_quantizers_of_their_own():
    image, x = start()
    bottleneck = conv(x, "bottleneck")
    summed = layers.Add()([conv(bottleneck, "a"), conv(bottleneck, "b")])
    rules = [PrecisionRule("a", weight_bits=2, activation_bits=4), W2A2]
    plan = plan_of(finish(image, summed), rules)
    names = {i.name: i.quantizer.bits for i in plan.insertions.values()}
    assert names == {"bottleneck_quantizer": 4, "bottleneck_quantizer_2": 2}


def test_an_inserted_name_never_collides():
    image, x = start()
    bottleneck = conv(x, "bottleneck")
    taken = layers.Dropout(0.1, name="bottleneck_quantizer")(bottleneck)
    plan = plan_of(finish(image, conv(taken, "a")), W2A2)
    assert inserted(plan) == {"bottleneck_quantizer_quantizer": 1}

    again = conv(bottleneck, "b")
    summed = layers.Add()([conv(taken, "c"), again])
    assert "bottleneck_quantizer_2" in inserted(plan_of(finish(image, summed), W2A2))


def test_learned_rules_insert_learned_steps():
    image, x = start()
    model = finish(image, conv(conv(x, "a"), "b"))
    rule = PrecisionRule(
        ".*", weight_bits=2, activation_bits=3, activation_quantizer="lsq"
    )
    (insertion,) = plan_of(model, rule).insertions.values()
    assert insertion.quantizer == quantizers.LSQActivationQuantizer(3, signed=True)


def test_the_sum_of_relus_is_a_linear_input():
    image, x = start()
    total = layers.Add(name="sum")([relu(conv(x, "a"), "relu_a"), x])
    plan = plan_of(finish(image, conv(total, "b")), W2A2)
    assert inserted(plan) == {"sum_quantizer": 1}
    assert activation_bits(plan) == {"relu0": 2}


def test_consumers_of_different_bits_share_the_finer_activation():
    image, x = start()
    summed = layers.Add()([conv(x, "a"), conv(x, "b")])
    rules = [PrecisionRule("a", weight_bits=2, activation_bits=2)]
    rules += [PrecisionRule("b", weight_bits=2, activation_bits=4)]
    plan = plan_of(finish(image, summed), rules)
    assert activation_bits(plan) == {"relu0": 4}
    (note,) = plan.notes
    assert "relu0" in note
    assert plan.problems() == [note]


def test_a_rule_that_names_a_relu_comes_first():
    rules = [PrecisionRule("relu1", activation_bits=8), W2A2]
    plan = plan_of(nets.chain(), rules)
    assert activation_bits(plan) == {"relu1": 8, "relu2": 2}
    assert not plan.problems()


def test_a_rule_can_keep_a_relu_float_or_quantize_the_last_one():
    plan = plan_of(nets.chain(), [PrecisionRule("relu1"), W2A2])
    assert set(plan.activations) == {"relu2"}
    rules = [PrecisionRule("relu3", activation_bits=3), W2A2]
    assert activation_bits(plan_of(nets.chain(), rules))["relu3"] == 3


def test_a_rule_of_layer_type_relu_sets_every_relu():
    image, x = start()
    model = finish(image, conv(relu(conv(x, "middle"), "relu"), "late"))
    eights = PrecisionRule(".*", activation_bits=8, layer_type="ReLU")
    plan = plan_of(model, [eights, W2A2])
    assert activation_bits(plan)["relu"] == 8
    assert eights not in plan.unused_rules


def test_a_named_relu_that_stays_float_in_front_of_a_quantized_layer_is_noted():
    image, x = start()
    model = finish(image, conv(relu(conv(x, "middle"), "relu"), "late"))
    plan = plan_of(model, [PrecisionRule("relu"), W2A2])
    assert plan.notes == ["a rule that names activation relu keeps it float"]


def test_a_shared_relu_is_quantized_once():
    image = keras.Input(nets.IMAGE, name="image")
    shared = layers.ReLU(name="shared")
    x = conv(shared(conv(image, "a")), "b")
    x = conv(shared(x), "c")
    plan = plan_of(finish(image, x), W2A2)
    assert activation_bits(plan) == {"shared": 2}
    assert set(plan.weights) == {"b", "c"}


def test_a_shared_convolution_reads_quantized_inputs_at_every_call():
    image, x = start()
    shared = layers.Conv2D(4, 1, name="shared")
    x = shared(relu(shared(x), "relu1"))
    plan = plan_of(finish(image, x), W2A2)
    assert set(plan.activations) == {"relu0", "relu1"}
    assert set(plan.weights) == {"shared"}


def test_unused_rules_and_unsupported_layers_are_problems():
    image, x = start()
    x = layers.PReLU(name="prelu")(conv(x, "a"))
    x = layers.LayerNormalization(name="norm")(x)
    unused = PrecisionRule("nowhere", weight_bits=2)
    plan = plan_of(finish(image, conv(x, "b")), [unused, W2A2])
    assert plan.unused_rules == [unused]
    assert set(plan.unsupported) == {"prelu", "norm"}
    assert len(plan.problems()) == 3
    # A linear input of "b", whatever put it out.
    assert inserted(plan) == {"norm_quantizer": 1}


def test_a_layer_that_no_rule_reaches_is_no_problem():
    image, x = start()
    x = layers.PReLU(name="prelu")(conv(x, "a"))
    rule = PrecisionRule("a", weight_bits=2)
    assert not plan_of(finish(image, x), rule).problems()


@pytest.mark.parametrize(
    ("name", "layer", "shape", "axes"),
    [
        ("dense", layers.Dense(5), (3,), (-1,)),
        ("transpose", layers.Conv2DTranspose(5, 3), (8, 8, 3), (-2,)),
        ("depthwise", layers.DepthwiseConv2D(3), (8, 8, 3), (-2, -1)),
    ],
)
def test_per_channel_quantizers_learn_the_axes(name, layer, shape, axes):
    inputs = keras.Input(shape)
    model = keras.Model(inputs, type(layer).from_config(layer.get_config())(inputs))
    rule = PrecisionRule(".*", weight_bits=4, weight_quantizer="uniform", edges=True)
    ((quantizer,),) = [q.values() for q in plan_of(model, rule).weights.values()]
    assert quantizer.channel_axes == axes


def test_a_given_quantizer_keeps_its_arguments_and_takes_the_rules_bits():
    given = quantizers.PACTActivationQuantizer(bits=8, alpha=3.0, alpha_decay=0.5)
    rule = PrecisionRule(
        ".*",
        weight_bits=3,
        activation_bits=4,
        weight_quantizer=quantizers.LSQWeightQuantizer(per_axis=True),
        activation_quantizer=given,
    )
    plan = plan_of(nets.chain(), rule)
    assert plan.activations["relu1"] == quantizers.PACTActivationQuantizer(4, 3.0, 0.5)
    assert plan.weights["mid"]["kernel"] == quantizers.LSQWeightQuantizer(3, True)
    assert given.bits == 8


def test_operators_in_the_graph_are_linear_sources():
    image, x = start()
    plan = plan_of(finish(image, conv(tf.multiply(x, 2.0), "a")), W2A2)
    assert len(plan.insertions) == 1
    assert not plan.activations


@pytest.mark.parametrize("order", [("fine", "coarse"), ("coarse", "fine")])
def test_an_insertion_that_layers_of_different_rules_read_has_the_more_bits(order):
    image = keras.Input((4, 4, 2))
    relu = layers.ReLU(name="relu")(conv(image, "stem"))
    both = layers.Concatenate(name="both")([relu, conv(relu, "linear")])
    model = keras.Model(image, [conv(both, name) for name in order])
    rules = [PrecisionRule("fine", 8, 8, edges=True)]
    rules += [PrecisionRule("coarse", 2, 2, edges=True)]
    plan = plan_of(model, rules)
    (insertion,) = plan.insertions.values()
    assert insertion.quantizer.bits == 8
    assert activation_bits(plan) == {"relu": 8}
    notes = [note for note in plan.notes if "reads of linear" in note]
    assert len(notes) == 1
    assert "layers of different precision" in notes[0]


def test_an_inserted_lsq_quantizer_has_the_options_of_the_rules():
    image = keras.Input((4, 4, 2))
    model = keras.Model(image, conv(conv(image, "stem"), "linear"))
    given = quantizers.LSQActivationQuantizer(
        initialization="paper", gradient_factor=0.5
    )
    plan = plan_of(model, [PrecisionRule("linear", 2, 3, "dorefa", given)])
    (insertion,) = plan.insertions.values()
    expected = {**given.get_config(), "bits": 3, "signed": True}
    assert insertion.quantizer.get_config() == expected


@pytest.mark.parametrize(("bits", "narrow"), [(2, False), (7, False), (8, True)])
def test_8_bit_weights_by_the_name_lsq_are_what_int8_holds(bits, narrow):
    rule = PrecisionRule(".*", bits, 2, weight_quantizer="lsq", edges=True)
    model = quantize(nets.perceptron(), rule)
    weights = [t for t in inspection.quantized_tensors(model) if t.role == "weight"]
    assert {t.quantizer.narrow_range for t in weights} == {narrow}
    assert all((min(t.quantizer.level_codes(bits)) >= -127) for t in weights)
