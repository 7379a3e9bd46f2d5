"""A fault in the lowering, ranges of other data and a stale file are noticed.

A fault in the lowering is in the plan and in the file alike, so the file is the plan's:
only the comparison with the trained network shows it.
"""

import dataclasses

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.export import networks
from tf_lowbit import export
from tf_lowbit.compat import keras
from tf_lowbit.export import layer_table
from tf_lowbit.export.integer import twin
from tf_lowbit.export.lowering import (
    attention,
    builder,
    elementwise,
    forms,
    joins,
    pools,
    recurrent,
)
from tf_lowbit.export.lowering import linear as linears
from tf_lowbit.export.lowering.builder import copy_of
from tf_lowbit.export.lowering.layers import FUNCTIONS
from tf_lowbit.export.options import Options
from tf_lowbit.export.proof.outputs import Classes, Numbers
from tf_lowbit.export.proof.verification import Report
from tf_lowbit.export.tflite import writer
from tf_lowbit.network import inspection

layers = keras.layers
# Beyond the first quantizer's clip: an image of pixels would be one code.
DATA = 2.0 * networks.normals(24)


def prove(model, data=DATA, ranges_of=None, **options):
    """The report on a file that is made and proved by the same lowering."""
    made = export.snap(
        model, [data if ranges_of is None else ranges_of], options=Options(**options)
    )
    return export.verify(writer.to_bytes(made), model, [data], verbose=0)


def diverging(report) -> set[str]:
    """The tensors that are named."""
    words = " diverges from the trained network"
    return {f.split(words)[0] for f in report.failures if words in f}


def block(body, classes=networks.CLASSES):
    made = networks.network(body, classes=classes)
    return networks.quantize(made, networks.EVERYWHERE)


def conv(x):
    return networks.conv_bn_relu(x, 4, name="target")


def depthwise(x):
    x = layers.DepthwiseConv2D(3, padding="same", name="target")(x)
    return networks.bn_relu(x, "target")


def dense(x):
    x = layers.Dense(5, name="target")(layers.Flatten()(x))
    return networks.bn_relu(x, "target")


def conv_1d(x):
    x = layers.Reshape((64, 4))(x)
    x = layers.Conv1D(4, 3, name="target")(x)
    return networks.bn_relu(x, "target")


def norm(x):
    return networks.bn_relu(layers.MaxPooling2D()(x), "target")


def average(x):
    return conv(layers.AveragePooling2D(2, name="pooled")(x))


def residual(x):
    y = layers.Conv2D(4, 3, padding="same", name="branch")(x)
    return networks.bn_relu(layers.Add(name="sum")([x, y]), "target")


def joined(x):
    y = networks.conv_bn_relu(x, 4, name="branch")
    return conv(layers.Concatenate(name="joined")([x, y]))


def gated(x):
    y = networks.conv_bn_relu(x, 4, name="branch")
    return layers.Multiply(name="product")([x, y])


def behind(*others):
    """These layers between two convolutions."""

    def body(x):
        x = networks.conv_bn_relu(x, 4, name="front")
        for layer in others:
            x = layer(x)
        return conv(x)

    return body


def other_layer(form, layer):
    """Another layer in the place of all of one form."""

    def fault(monkeypatch):
        def faulty(builder, value, sources, node):
            del node
            made = copy_of(layer, builder.name(value.name))
            if form == layer_table.CODES:
                codes, value.grid = builder.codes(sources[0])
                value.codes = made(codes)
            else:
                value.values = made(builder.values(sources[0]))

        monkeypatch.setitem(FUNCTIONS, form, faulty)

    return fault


def mirrored_kernel(monkeypatch):
    weights = linears.weights

    def faulty(linear):
        codes, steps, latent, *rest = weights(linear)
        if linear.kind == twin.TRANSPOSED:
            codes, latent = codes[::-1], latent[::-1]
        return codes, steps, latent, *rest

    monkeypatch.setattr(linears, "weights", faulty)


def half_a_pixel_aside(monkeypatch):
    monkeypatch.setattr(pools, "_triangle", lambda size: np.array([1.0, 1.0, 0.0]))


def off_by_one_code(monkeypatch, names):
    """The folding's offset is one output code too large."""
    emit = builder.Builder.emit_integer

    def faulty(self, value, linear, grid, in_place=False):
        if value.name in names:
            offset = linear.offset + grid.step
            linear = dataclasses.replace(linear, offset=offset)
        return emit(self, value, linear, grid, in_place)

    monkeypatch.setattr(builder.Builder, "emit_integer", faulty)


def ratio_of_another_term(monkeypatch):
    term = joins._term

    def faulty(builder, source, wanted, name):
        codes, ratio = term(builder, source, wanted, name)
        return codes, ratio * 3 if name.endswith("input2") else ratio

    monkeypatch.setattr(joins, "_term", faulty)


def terms_swapped(monkeypatch):
    def faulty(builder, value, sources, node):
        joins.concatenate(builder, value, sources[::-1], node)

    monkeypatch.setitem(FUNCTIONS, layer_table.CONCATENATE, faulty)


def sum_for_product(monkeypatch):
    def faulty(builder, value, sources, node):
        del node
        layer = layers.Add(name=builder.name(value.name), dtype="float32")
        value.values = layer([builder.values(source) for source in sources])

    monkeypatch.setitem(FUNCTIONS, layer_table.MULTIPLY, faulty)


def part_of_the_image(monkeypatch):
    def faulty(builder, value, sources, node):
        crop = layers.Cropping2D(2, name=builder.name("crop"), dtype="float32")
        made = copy_of(node.layer, builder.name(value.name))
        value.values = made(crop(builder.values(sources[0])))

    monkeypatch.setitem(FUNCTIONS, layer_table.GLOBAL_POOL, faulty)


def no_offset(monkeypatch):
    """The normalisation's mean and beta are left out."""
    scale = elementwise.scale

    def faulty(node):
        found = scale(node)
        if found is None or not isinstance(node.layer, layers.BatchNormalization):
            return found
        return found[0], 0.0 * found[1]

    monkeypatch.setattr(elementwise, "scale", faulty)


def state_ignored(monkeypatch):
    """An unrolled cell that forgets its state."""
    both = recurrent._Cell._both

    def faulty(self, name, part):
        self._recurrent = 0.0 * self._recurrent
        return both(self, name, part)

    monkeypatch.setattr(recurrent._Cell, "_both", faulty)


def flat_softmax(monkeypatch):
    """Attention without the scores' projection of the keys."""
    projected = attention._projected

    def faulty(dense, x, head, free_name, factor=1.0):
        return projected(dense, x, head, free_name, 0.1 * factor)

    monkeypatch.setattr(attention, "_projected", faulty)


def last_term_left_out(monkeypatch):
    adds = forms._adds_of_two
    monkeypatch.setattr(
        forms,
        "_adds_of_two",
        lambda layer, terms, *rest: adds(layer, [*terms[:-1], terms[0]], *rest),
    )


def own_activation_of_another_kind(monkeypatch):
    monkeypatch.setattr(
        forms,
        "_as_layer",
        lambda activation, name, policy: layers.Activation("tanh", name=name),
    )


def sum_over_another_axis(monkeypatch):
    monkeypatch.setattr(forms, "dot_axes", lambda layer: (2, 3 - layer.axes[1]))


def series(tail):
    """A body that ends in 8 steps of 8 features."""

    def body(x):
        x = layers.MaxPooling2D(2)(networks.conv_bn_relu(x, 4, name="front"))
        return tail(layers.Reshape((8, 8), name="series")(x))

    return body


def three_terms(x):
    y = networks.conv_bn_relu(x, 4, name="branch")
    z = networks.conv_bn_relu(x, 4, name="third")
    return networks.bn_relu(layers.Add(name="sum")([x, y, z]), "target")


TARGET = {"target_relu", "quantize_target_relu", "target"}
FAULTS = {
    "conv": (conv, lambda m: off_by_one_code(m, TARGET)),
    "depthwise": (depthwise, lambda m: off_by_one_code(m, TARGET)),
    "dense": (dense, lambda m: off_by_one_code(m, TARGET)),
    "conv1d": (conv_1d, lambda m: off_by_one_code(m, TARGET)),
    "scale": (norm, lambda m: off_by_one_code(m, TARGET)),
    "average pool": (average, lambda m: off_by_one_code(m, {"pooled"})),
    "batch norm": (conv, no_offset),
    "add": (residual, ratio_of_another_term),
    "concatenate": (joined, terms_swapped),
    "multiply": (gated, sum_for_product),
    "global pool": (conv, part_of_the_image),
    "transposed": (
        behind(layers.Conv2DTranspose(4, 3, 2, padding="same")),
        mirrored_kernel,
    ),
    "codes": (
        behind(layers.Cropping2D(((2, 0), (0, 0)))),
        other_layer(layer_table.CODES, layers.Cropping2D(((0, 2), (0, 0)))),
    ),
    "activation": (
        behind(layers.Activation("sigmoid")),
        other_layer(layer_table.ACTIVATION, layers.Activation("tanh")),
    ),
    "floats": (
        behind(layers.Conv2D(4, 1), layers.LeakyReLU(0.3)),
        other_layer(layer_table.FLOATS, layers.LeakyReLU(0.1)),
    ),
    "lstm": (series(layers.LSTM(4)), state_ignored),
    "gru": (series(layers.GRU(4)), state_ignored),
    "attention": (
        series(lambda x: layers.MultiHeadAttention(2, 4)(x, x)),
        flat_softmax,
    ),
    "dot": (series(lambda x: layers.Dot((2, 1))([x, x])), sum_over_another_axis),
    "sum of three": (three_terms, last_term_left_out),
    "own activation": (
        behind(layers.Conv2D(4, 1, activation="sigmoid")),
        own_activation_of_another_kind,
    ),
    "interpolate": (
        behind(layers.UpSampling2D(2, interpolation="bilinear")),
        half_a_pixel_aside,
    ),
}


@pytest.mark.quick(3)
@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_in_the_lowering_is_named(kind, monkeypatch):
    body, fault = FAULTS[kind]
    model = block(body)
    fault(monkeypatch)
    report = prove(model)
    assert diverging(report), str(report)


@pytest.fixture(scope="module")
def model():
    """First and last layer in float: image, first layer and sum are rounded, noted."""
    rules = [networks.Rule(".*", 2, 2)]
    return networks.quantize(networks.network(residual), rules)


def test_without_a_fault_nothing_is_named(model):
    report = prove(model)
    assert report.ok, str(report)
    assert report.is_measured
    assert [row.tensor for row in report.agreements if row.levels]
    for row in report.agreements:
        assert row.equal <= row.near <= row.elements


def steep():
    """A layer that reads zeros: its batch variance is 0, its gain 316 times gamma."""

    def body(x):
        return networks.conv_bn_relu(networks.conv_bn_relu(x, 4, name="dead"), 32)

    rules = [networks.Rule("conv_relu", None, 8), *networks.EVERYWHERE]
    made = networks.quantize(networks.network(body), rules)
    made.get_layer("dead_bn").beta.assign([-100.0] * 4)
    norm = made.get_layer("conv_bn")
    norm.epsilon = 1e-5
    norm.gamma.assign(np.ones(32))
    norm.beta.assign(np.linspace(0.0, 0.05, 32))
    norm.moving_mean.assign(np.zeros(32))
    norm.moving_variance.assign(np.zeros(32))
    return made


def test_channels_too_steep_for_integer_biases_do_not_diverge(monkeypatch):
    """A step of the bias moves their output by several codes."""
    model = steep()
    report = prove(model)
    (row,) = [row for row in report.agreements if row.tensor == "conv_relu"]
    assert row.equal < 0.9 * row.elements, "no test of the kind"
    assert report.ok, str(report)

    emit = builder.Builder.emit_integer

    def faulty(self, value, linear, grid, in_place=False):
        if "conv" in value.name:
            linear = dataclasses.replace(linear, offset=linear.offset + 9 * grid.step)
        return emit(self, value, linear, grid, in_place)

    monkeypatch.setattr(builder.Builder, "emit_integer", faulty)
    assert "conv_relu" in diverging(prove(model))


def test_codes_of_ties_may_be_both(monkeypatch):
    """Products of ninths in steps of 2/99 are multiples of 5.5 steps."""

    def body(x):
        x = layers.Conv2D(16, 1, use_bias=False, name="conv")(x)
        return layers.ReLU(name="conv_relu")(x)

    rules = [networks.Rule("conv_relu", None, 8, "lsq", "lsq"), *networks.EVERYWHERE]
    made = networks.network(body)
    (kernel,) = made.get_layer("conv").get_weights()
    made.get_layer("conv").set_weights([np.abs(kernel)])  # Zero is no tie.
    model = networks.quantize(made, rules)
    (tensor,) = [
        tensor
        for tensor in inspection.quantized_tensors(model)
        if "conv_relu" in tensor.name
    ]
    tensor.variables["step"].assign(2 / 99)
    report = prove(model)
    (row,) = [row for row in report.agreements if row.tensor == tensor.layer.name]
    assert row.equal < row.elements, "no test of the kind"
    assert report.ok, str(report)
    assert row.equal_within == row.elements

    off_by_one_code(monkeypatch, {tensor.layer.name})
    assert row.tensor in diverging(prove(model))


def test_a_channel_whose_output_never_changes_has_its_code(monkeypatch):
    """Its multiplier is 1 but for float32's rounding, which is not steep."""
    model = block(conv)
    emit = builder.Builder.emit_integer
    moved = []

    def faulty(self, value, linear, grid, in_place=False):
        constant = linear.gain == 0.0
        if value.name == "first_relu":
            up = np.where(linear.offset < 1.5 * grid.step, grid.step, -grid.step)
            linear = dataclasses.replace(linear, offset=linear.offset + constant * up)
            moved.append(constant.sum())
        return emit(self, value, linear, grid, in_place)

    monkeypatch.setattr(builder.Builder, "emit_integer", faulty)
    report = prove(model)
    assert all(moved)
    assert "first_relu" in diverging(report), str(report)


@pytest.mark.quick(1)
def test_a_layer_that_is_split_may_be_called_several_times():
    """Each call has its own result."""

    def body(x):
        cell, join = layers.LSTM(2, name="cell"), layers.Add(name="sum")
        x = layers.MaxPooling2D(4)(networks.conv_bn_relu(x, 4, name="front"))
        other = layers.Permute((2, 1, 3))(x)
        ends = [cell(layers.Reshape((2, 8))(t)) for t in (x, other)]
        first = join([*ends, layers.Activation("tanh")(ends[0])])
        return join([first, first, ends[1]])

    report = prove(block(body))
    assert report.ok, str(report)


@pytest.mark.quick(1)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 100.0])
def test_ranges_of_other_data_are_noticed(model, scale):
    """A file that was made with absurd data is consistent with itself."""
    report = prove(model, ranges_of=np.float32(scale) * DATA)
    assert "image" in diverging(report)
    assert any("representative data" in f or "codes" in f for f in report.failures)


def test_a_term_of_a_sum_that_is_far_larger_is_no_wide_range():
    """Its step is the least that an int8 Add takes beside the sum's."""
    made = networks.network(residual)
    branch = made.get_layer("branch")
    branch.set_weights([weight / 100 for weight in branch.get_weights()])
    rules = [networks.Rule(".*", 2, 1, "uniform", "uniform")]
    model = networks.quantize(made, rules)
    report = prove(model)
    (row,) = [row for row in report.agreements if row.tensor == "branch"]
    assert 0.0 < max(row.span[1], -row.span[0]) < 255 / 8, "no test of the kind"
    assert report.ok, str(report)


def test_a_file_of_the_model_before_more_training(model):
    other = keras.models.clone_model(model)
    other.set_weights(model.get_weights())
    file = writer.to_bytes(export.snap(model, [DATA]))
    head = other.get_layer("head")
    kernel, *rest = head.get_weights()
    head.set_weights([kernel[..., ::-1], *rest])
    assert not export.verify(file, other, [DATA], verbose=0).ok


def test_a_stale_export_beside_the_trained_model(model):
    made = export.snap(model, [DATA])
    file = writer.to_bytes(made)
    weights = model.get_weights()
    try:
        assert export.verify(file, made, [DATA], trained=model, verbose=0).ok
        norm = model.get_layer("target_bn")
        norm.beta.assign_add(np.full(norm.beta.shape, 0.5, np.float32))
        report = export.verify(file, made, [DATA], trained=model, verbose=0)
    finally:
        model.set_weights(weights)
    assert diverging(report)


def test_a_twin_that_was_trained_further_answers_by_its_predictions(model):
    made = export.snap(model, [DATA])
    layer = made.twin.get_layer("branch")
    layer.latent.assign(-layer.latent)
    report = export.verify(
        writer.to_bytes(made), made, [DATA], trained=model, agreement=0.0, verbose=0
    )
    assert report.is_tuned
    assert not report.is_exact
    assert report.ok, str(report)


# --- outputs --------------------------------------------------------------------------


def judged(result, scores, labels, **options):
    report = Report("", "", **{"tolerance": 0.01, "agreement": 0.75, **options})
    result.add(scores, labels)
    result.judge(report, False)
    return report


def scores(classes):
    return np.eye(10, dtype=np.float32)[classes]


@pytest.mark.parametrize(
    ("examples", "wrong", "is_ok"),
    # One of twelve is chance; six of twelve, and 3 % of thousands, are none.
    [(12, 1, True), (12, 6, False), (10_000, 80, True), (10_000, 300, False)],
)
def test_lost_accuracy(examples, wrong, is_ok):
    labels = np.arange(examples) % 10
    file = labels.copy()
    file[:wrong] = (file[:wrong] + 1) % 10
    found = {"file": scores(file), "twin": scores(file), "trained": scores(labels)}
    report = judged(Classes(0.0), found, labels)
    assert report.ok == is_ok
    assert report.predictions.drop == pytest.approx(wrong / examples)
    assert judged(Classes(0.0), found, labels, tolerance=1.0).ok


@pytest.mark.parametrize(("wrong", "is_ok"), [(200, True), (400, False)])
def test_predictions_without_labels(wrong, is_ok):
    labels = np.arange(1000) % 10
    file = labels.copy()
    file[:wrong] = (file[:wrong] + 1) % 10
    found = {"file": scores(file), "twin": scores(file), "trained": scores(labels)}
    assert judged(Classes(0.0), found, None).ok == is_ok


def test_maps_have_a_mean_iou():
    labels = np.array([[[0, 0], [1, 1]]])
    file = np.array([[[0, 1], [1, 1]]])
    found = {"file": scores(file), "twin": scores(file), "trained": scores(labels)}
    predictions = judged(Classes(0.0), found, labels.ravel()).predictions
    assert predictions.right == {"file": 3, "twin": 3, "trained": 4}
    # Class 0: 1 of 2; class 1: 2 of 3.
    assert predictions.mean_iou["file"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert predictions.mean_iou["trained"] == 1.0


@pytest.mark.parametrize(("error", "is_ok"), [(0.0, True), (0.1, True), (3.0, False)])
def test_numbers_have_errors(error, is_ok):
    wanted = np.linspace(-1, 1, 100, dtype=np.float32)[:, None]
    file = wanted + np.float32(error)
    found = {"file": file, "twin": file, "trained": wanted}
    report = judged(Numbers(), found, None)
    assert report.ok == is_ok
    assert report.predictions is None
    assert report.values.against["trained"].mean == pytest.approx(error, abs=1e-6)
    assert report.values.against["twin"].largest == 0.0
    labelled = judged(Numbers(), found, wanted)
    assert labelled.ok == (error == 0.0)
    assert labelled.values.to_labels["file"].largest == pytest.approx(error, abs=1e-6)


def units(error):
    """Three units of deviation 1, 100 and 0, and the file's, the first `error` off."""
    wanted = np.stack(
        [np.tile([-1.0, 1.0], 8), np.tile([-100.0, 100.0], 8), np.full(16, 5.0)], axis=1
    )
    file = wanted + np.array([error, 1.0, 0.1])
    return {"file": file, "twin": file, "trained": wanted}


def test_small_units_beside_large_ones_are_noted():
    report = judged(Numbers(), units(0.9), None)
    assert report.ok  # 0.9, 1.0 and 0.1 beside a spread of 58.
    assert report.values.worst_unit == 0
    assert report.values.worst_share == pytest.approx(0.9)
    (note,) = report.notes
    assert note.startswith("1 of 3 units of the output")
    assert "unit 0 by 90%" in note
    assert "head='float' keeps small ones" in note
    (note,) = judged(Numbers(head="float"), units(0.9), None).notes
    assert "head='float'" not in note
    assert "90.0% of its own standard deviation" in " ".join(str(report).split())
    assert judged(Numbers(), units(0.2), None).notes == []
    assert judged(Numbers(), units(0.9), None, agreement=0.0).notes == []


def test_outputs_after_the_first_are_judged():
    found = units(0.1)
    report = judged(Numbers("second"), found, None)
    assert report.ok
    assert report.values is None
    assert report.further["second"].against["trained"].mean == pytest.approx(0.4)
    found["trained"] = found["trained"][::-1]
    report = judged(Numbers("second"), found, None)
    (failure,) = report.failures
    assert failure.startswith("second: outputs differ")


@pytest.mark.parametrize("head", ["int8", "float"])
def test_units_of_a_head_through_a_file(head, tmp_path):
    """One unit is 300 times another: beside it, int8 has no steps for the other."""
    rules = [networks.Rule(".*", 8, 8, "uniform", "uniform", edges=True)]
    image = keras.Input((8,), name="image")
    x = layers.Dense(8, activation="relu", name="first")(image)
    x = layers.Dense(8, activation="relu", name="second")(x)
    net = networks.randomize(
        keras.Model(image, [layers.Dense(2, name="a")(x), layers.Dense(2, name="b")(x)])
    )
    kernel, bias = net.get_layer("b").get_weights()
    net.get_layer("b").set_weights([kernel * [300.0, 1.0], bias])
    quantized = networks.quantize(net, rules)
    x = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    tfl.calibrate(quantized, [x])
    made = export.to_tflite(
        quantized, tmp_path / "net.tflite", [x], head=head, verbose=0
    )
    report = export.verify(made.path, quantized, [x], verbose=0)
    assert report.ok, str(report)
    lost = [note for note in report.notes if note.startswith("b: 1 of 2 units")]
    assert len(lost) == (head == "int8")
    assert list(report.further) == ["b"]
    assert (report.further["b"].worst_share > 0.25) == (head == "int8")


@pytest.mark.quick(1)
def test_outputs_without_an_axis_of_units():
    """`Reshape(())` leaves it out: batches of two sizes have outputs of two shapes."""
    image = keras.Input((8,), name="image")
    x = layers.Dense(8, activation="relu", name="first")(image)
    ends = [layers.Reshape(())(layers.Dense(1, name=name)(x)) for name in "ab"]
    model = networks.quantize(
        networks.randomize(keras.Model(image, ends)), networks.EVERYWHERE
    )
    x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    data = [x[:10], x[10:]]
    file = writer.to_bytes(export.snap(model, data))
    report = export.verify(file, model, data, verbose=0)
    assert report.ok, str(report)
    (second,) = report.further.values()
    assert report.values.examples == second.examples == len(x)


@pytest.mark.slow
def test_a_regression_through_a_file(tmp_path):
    image = keras.Input((8,), name="image")
    x = layers.Dense(8, activation="relu", name="first")(image)
    x = layers.Dense(8, activation="relu", name="second")(x)
    net = networks.randomize(keras.Model(image, layers.Dense(1, name="size")(x)))
    quantized = networks.quantize(net, networks.EVERYWHERE)
    x = np.random.default_rng(0).uniform(size=(64, 8)).astype(np.float32)
    y = quantized(x).numpy()
    made = export.to_tflite(quantized, tmp_path / "net.tflite", [x], verbose=0)
    report = export.verify(made.path, quantized, [(x, {"size": y})], verbose=0)
    assert report.ok, str(report)
    assert report.predictions is None
    assert report.values.to_labels["trained"].largest == 0.0
    text = str(report)
    assert "error of the file" in text
    assert "predictions" not in text
    assert tfl.export.verify(made.path, quantized, verbose=0).values is None
