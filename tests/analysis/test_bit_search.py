"""The choice of bits, against all choices that there are."""

import itertools
import sys

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.scheme import nets
from tf_lowbit.compat import keras

layers = keras.layers
WIDTHS = (2, 4)
RULE = tfl.PrecisionRule(".*", 4, 4)


def made_up(model, seed, widths=WIDTHS):
    """Losses that fall with the bits, by chance more or less steeply."""
    random = np.random.default_rng(seed)
    scores = {}
    for tensor in tfl.inspection.quantized_tensors(model):
        if not tensor.is_residual:
            steps = np.sort(random.gamma(0.5, 5.0, len(widths)))[::-1]
            scores[tensor.name] = dict(zip(widths, map(float, steps), strict=True))
    return tfl.Sensitivity("accuracy", widths, scores, 90.0)


def branched():
    """Two convolutions read one ReLU; a third reads a sum, a fourth one of its own."""
    image = keras.Input((8, 8, 3), name="image")
    x = layers.ReLU(name="relu1")(layers.Conv2D(4, 3, name="stem")(image))
    a = layers.Conv2D(4, 1, name="a")(x)
    b = layers.Conv2D(4, 3, padding="same", name="b")(x)
    x = layers.Add(name="sum")([a, b])
    c = layers.DepthwiseConv2D(3, name="c")(x)
    c = layers.ReLU(name="relu2")(layers.BatchNormalization(name="bn")(c))
    d = nets.Separable(6, 3, name="d")(c)
    d = layers.GlobalAveragePooling2D(name="pool")(d)
    return keras.Model(image, layers.Dense(3, name="head")(d))


READS = {"a": "relu1", "b": "relu1", "c": "sum_quantizer", "d": "relu2"}
KERNELS = {
    "a": ["kernel"],
    "b": ["kernel"],
    "c": ["depthwise_kernel"],
    "d": ["depthwise_kernel", "pointwise_kernel"],
}


@pytest.fixture(scope="module")
def network():
    return tfl.quantize(nets.randomize(branched()), RULE)


def chosen(rules):
    return {r.pattern: (r.weight_bits, r.activation_bits) for r in rules}


def costs(network):
    """All choices: ({layer: weight bits}, {source: bits}) -> bytes, bops."""
    tensors = nets.by_name(network)
    state = nets.snapshot(network.variables)
    sources = sorted(set(READS.values()))
    for bits in itertools.product(WIDTHS, repeat=len(READS) + len(sources)):
        weights = dict(zip(READS, bits, strict=False))
        reads = dict(zip(sources, bits[len(READS) :], strict=True))
        for layer, kernels in KERNELS.items():
            for kernel in kernels:
                tensors[f"{layer}/{kernel}"].assign_bits(weights[layer])
        for source, width in reads.items():
            tensors[f"{source}/output"].assign_bits(width)
        cost = tfl.cost(network)
        yield weights, reads, cost.weight_bytes, cost.bops
    for variable, value in zip(network.variables, state, strict=True):
        variable.assign(value)


def loss(found, weights, reads):
    total = sum(
        found.loss(f"{layer}/{kernel}", weights[layer])
        for layer, kernels in KERNELS.items()
        for kernel in kernels
    )
    return total + sum(found.loss(f"{s}/output", bits) for s, bits in reads.items())


@pytest.fixture(scope="module")
def every_choice(network):
    return list(costs(network))


@pytest.mark.quick(1)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["weight_bytes", "bops", "both"])
def test_no_other_choice_within_the_budget_is_better(seed, kind, network, every_choice):
    found = made_up(network, seed)
    sizes, operations = np.transpose([choice[2:] for choice in every_choice])
    budget = {
        "weight_bytes": int(np.quantile(sizes, 0.3 + 0.1 * seed)),
        "bops": int(np.quantile(operations, 0.3 + 0.1 * seed)),
    }
    if kind != "both":
        budget = {kind: budget[kind]}
    allowed = [
        loss(found, weights, reads)
        for weights, reads, size, operation in every_choice
        if size <= budget.get("weight_bytes", size)
        and operation <= budget.get("bops", operation)
        # They take no bytes, and keep their four bits.
        and ("bops" in budget or set(reads.values()) == {4})
    ]
    assert 0 < len(allowed) < len(every_choice)
    rules = tfl.allocate_bits(network, found, **budget)
    bits = chosen(rules)
    assert list(bits) == list(READS)
    assert bits["a"][1] == bits["b"][1]
    weights = {layer: w for layer, (w, _) in bits.items()}
    reads = {READS[layer]: a for layer, (_, a) in bits.items()}
    assert loss(found, weights, reads) == pytest.approx(min(allowed), rel=1e-6)
    # The rules make the network that was meant.
    made = tfl.requantize(network, rules)
    cost = tfl.cost(made)
    assert cost.weight_bytes <= budget.get("weight_bytes", cost.weight_bytes)
    assert cost.bops <= budget.get("bops", cost.bops)
    tensors = nets.by_name(made)
    assert tensors.keys() == found.scores.keys()
    for layer, kernels in KERNELS.items():
        assert {tensors[f"{layer}/{k}"].bits for k in kernels} == {weights[layer]}
        assert tensors[f"{READS[layer]}/output"].bits == bits[layer][1]


@pytest.mark.slow
def test_a_measured_network_keeps_its_quantizers():
    rules = [
        tfl.PrecisionRule(
            "mid",
            4,
            4,
            tfl.quantizers.LSQWeightQuantizer(per_axis=True),
            tfl.quantizers.PACTActivationQuantizer(alpha_decay=1e-3),
        ),
        tfl.PrecisionRule("last|stem", 4, 4, "uniform", "lsq"),
    ]
    model = tfl.quantize(nets.randomize(nets.chain()), rules)
    tfl.calibrate(model, [nets.images()])
    before = nets.snapshot(model.variables)
    found = tfl.sensitivity(model, [nets.images()], (2, 4), progress=False)
    size = tfl.cost(model).weight_bytes
    rules = tfl.allocate_bits(model, found, weight_bytes=size - 20)
    nets.assert_all_equal(nets.snapshot(model.variables), before)
    made = nets.by_name(tfl.requantize(model, rules))
    for name, tensor in nets.by_name(model).items():
        assert type(made[name].quantizer) is type(tensor.quantizer)
        same = {"bits": tensor.bits}
        assert {**made[name].quantizer.get_config(), **same} == {
            **tensor.quantizer.get_config(),
            **same,
        }
    bits = {made[f"{layer}/kernel"].bits for layer in ("stem", "mid", "last")}
    assert bits == {2, 4}


def test_weights_alone():
    model = tfl.quantize(nets.chain(), tfl.PrecisionRule(".*", 4))
    found = made_up(model, 0)
    rules = tfl.allocate_bits(model, found, weight_bytes=10**6)
    assert chosen(rules) == {"mid": (4, None), "last": (4, None)}


def test_residual_quantizers_are_left_out():
    model = tfl.quantize(nets.preactivation(), RULE, residual_bits=8)
    rules = tfl.allocate_bits(model, made_up(model, 0), bops=10**9)
    assert {rule.weight_bits for rule in rules} == {4}


@pytest.mark.slow
def test_a_budget_that_cannot_be_met(network, every_choice):
    found = made_up(network, 0)
    least = min(size for _, _, size, _ in every_choice)
    assert len(tfl.allocate_bits(network, found, weight_bytes=least)) == 4
    with pytest.raises(
        ValueError, match=rf"the minimum is .*{least}.*Received: .*{least - 1}"
    ):
        tfl.allocate_bits(network, found, weight_bytes=least - 1)


def test_what_cannot_be_searched(network, monkeypatch):
    found = made_up(network, 0)
    with pytest.raises(ValueError, match=r"weight_bytes, bops or both\. Received: n"):
        tfl.allocate_bits(network, found)
    other = tfl.quantize(nets.chain(), RULE)
    with pytest.raises(
        ValueError, match=r"measured on the model's tensors.*'a/kernel'"
    ):
        tfl.allocate_bits(other, found, bops=1)
    image = keras.Input((None, None, 3))
    x = layers.Conv2D(2, 3)(layers.ReLU()(layers.Conv2D(2, 3)(image)))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(2, 3)(layers.ReLU()(x)))
    open_size = tfl.quantize(keras.Model(image, x), RULE)
    with pytest.raises(ValueError, match=r"bops .* must be known.*Received: layer"):
        tfl.allocate_bits(open_size, made_up(open_size, 0), bops=1)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r"\.\[search\]"):
        tfl.allocate_bits(network, found, bops=10**9)


@pytest.mark.slow
def test_an_activation_that_nothing_reads_keeps_its_bits():
    image = keras.Input((8, 8, 3))
    x = layers.ReLU(name="relu")(layers.Conv2D(4, 3, name="stem")(image))
    x = layers.Conv2D(4, 1, name="inner")(x)
    model = keras.Model(image, layers.ReLU(name="out")(x))
    rules = [
        tfl.PrecisionRule("out", None, 3, activation_quantizer="uniform"),
        tfl.PrecisionRule(".*", 4, 4, edges=True),
    ]
    low_bit = tfl.quantize(model, rules)
    found = made_up(low_bit, 0)
    budget = tfl.cost(low_bit).weight_bytes
    again = tfl.requantize(low_bit, tfl.allocate_bits(low_bit, found, bops=10**9))
    tensors = {t.name: t for t in tfl.inspection.quantized_tensors(again)}
    assert tensors["out/output"].bits == 3
    assert tensors["out/output"].quantizer == tfl.quantizers.get(
        "uniform", "activation", bits=3
    )
    assert tfl.cost(again).weight_bytes <= budget
