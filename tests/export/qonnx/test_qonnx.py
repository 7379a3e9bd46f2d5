"""QONNX files, in qonnx's executor and in onnxruntime."""

import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.transformation.qonnx_to_qcdq import QuantToQCDQ
from qonnx.util.inference_cost import inference_cost

import tf_lowbit as tfl
from tests.export.networks import (
    EDGE,
    NEAR_TIES,
    NETWORKS,
    Rule,
    bn_relu,
    conv_bn_relu,
    finished,
    images,
    layers,
    network,
    quantize,
)
from tf_lowbit import export
from tf_lowbit.compat import keras, tf
from tf_lowbit.export import layer_table
from tf_lowbit.export.qonnx import grids
from tf_lowbit.network import inspection

LSQ = [EDGE, Rule(".*", 2, 2, "lsq", "lsq")]
METHODS = {
    "lsq 3, 4": ("lsq", "lsq", 3, 4),
    "dorefa 1, 1": ("dorefa", "dorefa", 1, 1),
    "dorefa 2, 2": ("dorefa", "dorefa", 2, 2),
    "statsq 4, pact 3": ("statsq", "pact", 4, 3),
    "uniform 8, 8": ("uniform", "uniform", 8, 8),
    "dorefa 8, pact 8": ("dorefa", "pact", 8, 8),
}


def written(model, path, **options):
    export.to_qonnx(model, path, batch_size=5, **options)
    data = images(5, model.input_shape[1:])
    onnx.checker.check_model(str(path))
    return data, export.compare_qonnx(path, model, data)


def assert_same(agreement):
    assert agreement.codes > 1000
    assert sum(agreement.different.values()) <= NEAR_TIES * agreement.codes, agreement
    if not any(agreement.different.values()):
        assert agreement.error < 1e-3


@pytest.mark.quick(1)
@pytest.mark.parametrize("activations", grids.ACTIVATIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, activations, tmp_path):
    model = quantize(NETWORKS[name](), LSQ)
    folded = activations == "multithreshold"
    options = {"activations": activations, "fold_batch_norm": folded}
    assert_same(written(model, tmp_path / "n.onnx", **options)[1])
    names = {n.op_type for n in onnx.load(tmp_path / "n.onnx").graph.node}
    assert ("MultiThreshold" in names) == folded
    assert ("BatchNormalization" in names) != folded


@pytest.mark.quick(2)
@pytest.mark.parametrize("method", METHODS)
def test_quantizers(method, tmp_path):
    weight, activation, w, a = METHODS[method]
    rules = [Rule(".*", w, a, weight, activation, edges=True)]
    model = quantize(NETWORKS["residual"](), rules, residual_bits=8)
    assert_same(written(model, tmp_path / "n.onnx")[1])
    graph = ModelWrapper(str(tmp_path / "n.onnx"))
    is_odd = weight in ("dorefa", "statsq")
    bits = w if w == 1 else w + is_odd
    kind = graph.get_tensor_datatype("inner_kernel_quant")
    assert kind.get_canonical_name() == f"SCALEDINT<{bits}>"
    producer = graph.find_producer("inner_kernel_quant").op_type
    assert producer == ("BipolarQuant" if w == 1 else "Quant")


def test_transposed_convolutions_of_all_sizes(tmp_path):
    """Kernels wider and narrower than the stride, of even and odd sizes."""

    def body(x):
        for place, (size, stride, padding) in enumerate(
            [(1, 2, "same"), (4, 2, "same"), (2, 3, "valid"), ((3, 2), 1, "valid")]
        ):
            name = f"up{place}"
            x = layers.Conv2DTranspose(4, size, stride, padding=padding, name=name)(x)
            x = layers.MaxPooling2D()(bn_relu(x, name))
        return conv_bn_relu(x, 4, name="inner")

    model = quantize(network(body), LSQ)
    assert_same(written(model, tmp_path / "n.onnx")[1])


def test_outputs_that_do_not_vary_are_compared_by_their_size(tmp_path):
    model = quantize(NETWORKS["plain"](), LSQ)
    head = model.get_layer("head")
    head.set_weights([0.0 * v if v.ndim > 1 else v for v in head.get_weights()])
    _, found = written(model, tmp_path / "n.onnx")
    assert found.error < 1e-3


@pytest.mark.parametrize("name", ["depthwise", "map of classes"])
def test_onnxruntime_runs_qcdq(name, tmp_path):
    model = quantize(NETWORKS[name](), LSQ)
    data, _ = written(model, tmp_path / "n.onnx")
    converted = ModelWrapper(str(tmp_path / "n.onnx")).transform(QuantToQCDQ())
    assert not {node.domain for node in converted.graph.node} - {""}
    options = onnxruntime.SessionOptions()
    basic = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.graph_optimization_level = basic
    session = onnxruntime.InferenceSession(converted.model.SerializeToString(), options)
    (found,) = session.run(None, {"image": data.transpose(0, 3, 1, 2)})
    np.testing.assert_allclose(found, model(data), atol=1e-4)


def test_cost_is_that_of_tfl_cost(tmp_path):
    image = keras.Input((8, 8, 2), name="image")
    x = layers.Conv2D(4, 3, padding="same", name="first")(image)
    x = layers.MaxPooling2D(name="half")(layers.ReLU(name="relu")(x))
    x = layers.Flatten(name="flat")(x)
    model = quantize(finished(image, x), [Rule(".*", 3, 4, "lsq", "lsq", edges=True)])
    export.to_qonnx(model, tmp_path / "n.onnx")
    wrapper = ModelWrapper(str(tmp_path / "n.onnx"))
    found = inference_cost(wrapper, discount_sparsity=False)["total_cost"]
    cost = tfl.cost(model)
    weights = [t for t in inspection.quantized_tensors(model) if t.role == "weight"]
    bits = sum(t.bits * int(np.prod(t.latent.shape)) for t in weights)
    assert found["total_macs"] == cost.macs
    assert found["total_bops"] == cost.bops
    assert found["total_mem_w_bits"] == bits


def test_a_damaged_file_differs(tmp_path):
    model = quantize(NETWORKS["plain"](), LSQ)
    data, agreement = written(model, tmp_path / "n.onnx")
    assert not any(agreement.different.values())
    proto = onnx.load(tmp_path / "n.onnx")
    (kernel,) = [t for t in proto.graph.initializer if t.name == "inner_kernel"]
    values = -onnx.numpy_helper.to_array(kernel)
    kernel.CopyFrom(onnx.numpy_helper.from_array(values, kernel.name))
    damaged = export.compare_qonnx(proto.SerializeToString(), model, data)
    assert damaged.different["inner_relu"] > 100


def test_what_has_no_form_is_named(tmp_path):
    body = lambda x: layers.ELU(name="curved")(x)  # noqa: E731
    model = quantize(network(body), LSQ)
    with pytest.raises(export.ExportError, match="'curved' of type ELU"):
        export.to_qonnx(model, tmp_path / "n.onnx")
    with pytest.raises(ValueError, match="activations"):
        export.to_qonnx(model, tmp_path / "n.onnx", activations="other")
    assert not list(tmp_path.iterdir())


# --- what `check` foretells -----------------------------------------------------------


def _series(x):
    return layers.Reshape((16, 16), name="series")(x)


def _lines(layer):
    """A layer of series, between images."""
    return lambda x: layers.Reshape((1, -1, 4))(
        layers.Conv1D(4, 1, name="late")(layer(_series(x)))
    )


def _pair(layer):
    return lambda x: layer([x, layers.MaxPooling2D(1)(x)])


def _attended(x):
    y = _series(x)
    y = layers.MultiHeadAttention(2, 4, name="attention")(y, y)
    return layers.Reshape((8, 8, 4))(y)


# Layer of the table -> a body with it, of images (8, 8, 4).
BODIES = {
    layers.Activation: layers.Activation("tanh"),
    layers.Add: _pair(layers.Add()),
    layers.AveragePooling1D: _lines(layers.AveragePooling1D()),
    layers.AveragePooling2D: layers.AveragePooling2D(),
    layers.Concatenate: _pair(layers.Concatenate()),
    layers.Conv1D: _lines(layers.Conv1D(4, 3, padding="causal")),
    layers.Conv2D: layers.Conv2D(4, 3),
    layers.Conv2DTranspose: layers.Conv2DTranspose(4, 3, 2),
    layers.Cropping1D: _lines(layers.Cropping1D(1)),
    layers.Cropping2D: layers.Cropping2D(1),
    layers.Dense: layers.Dense(4),
    layers.DepthwiseConv1D: _lines(layers.DepthwiseConv1D(3)),
    layers.DepthwiseConv2D: layers.DepthwiseConv2D(3),
    layers.Dot: _lines(lambda x: layers.Dot(2)([x, x])),
    layers.Flatten: layers.Flatten(),
    layers.GlobalAveragePooling1D: lambda x: layers.GlobalAveragePooling1D()(
        _series(x)
    ),
    layers.GlobalAveragePooling2D: layers.GlobalAveragePooling2D(),
    layers.GlobalMaxPooling1D: lambda x: layers.GlobalMaxPooling1D()(_series(x)),
    layers.GlobalMaxPooling2D: layers.GlobalMaxPooling2D(),
    layers.GRU: lambda x: layers.GRU(3)(_series(x)),
    layers.LSTM: lambda x: layers.LSTM(3)(_series(x)),
    layers.LayerNormalization: layers.LayerNormalization(),
    layers.LeakyReLU: layers.LeakyReLU(),
    layers.MaxPooling1D: _lines(layers.MaxPooling1D()),
    layers.MaxPooling2D: layers.MaxPooling2D(),
    layers.MultiHeadAttention: _attended,
    layers.Multiply: _pair(layers.Multiply()),
    layers.Permute: layers.Permute((2, 1, 3)),
    layers.PReLU: layers.PReLU(shared_axes=[1, 2]),
    layers.ReLU: layers.ReLU(6.0),
    layers.Reshape: layers.Reshape((4, 16, 4)),
    layers.UpSampling1D: _lines(layers.UpSampling1D()),
    layers.UpSampling2D: layers.UpSampling2D(interpolation="bilinear"),
    layers.ZeroPadding1D: _lines(layers.ZeroPadding1D()),
    layers.ZeroPadding2D: layers.ZeroPadding2D(),
    # Not of TFLite.
    "transposed": layers.Conv2DTranspose(4, 3, (1, 2)),
}
# What is refused, and a part of the message.
REFUSED = {
    "elu": (layers.ELU(name="bad"), "must be exportable"),
    "own": (layers.Conv2D(4, 1, activation="elu", name="bad"), "Activations must"),
    "bicubic": (layers.UpSampling2D(interpolation="bicubic", name="bad"), "Upsampling"),
    "first channels": (layers.BatchNormalization(axis=1, name="bad"), "last"),
    "normalize": (
        _lines(lambda x: layers.Dot(2, normalize=True, name="bad")([x, x])),
        "A Dot must be",
    ),
    "ranks": (
        lambda x: layers.Multiply(name="bad")([x, layers.GlobalMaxPooling2D()(x)]),
        "same number of axes",
    ),
    "mode": (lambda x: layers.BatchNormalization(name="bad")(x, training=True), "mode"),
    "masked": (
        lambda x: layers.MultiHeadAttention(2, 4, name="bad")(
            *[_series(x)] * 2, use_causal_mask=True
        ),
        "mask",
    ),
    "state": (
        lambda x: layers.LSTM(3, return_state=True, name="bad")(_series(x))[0],
        "one output",
    ),
    "argmax": (lambda x: tf.cast(tf.argmax(x, -1, name="bad"), tf.float32), "argmax"),
}


def test_every_row_of_the_table_has_a_body():
    trained = {
        row for row in layer_table.TABLE if row.__module__.startswith("tf_keras")
    }
    assert trained - {layers.InputLayer} == {*BODIES} - {"transposed"}


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    "kind", BODIES, ids=lambda kind: getattr(kind, "__name__", kind)
)
def test_what_check_takes_is_written(kind, tmp_path):
    model = network(BODIES[kind])
    assert export.check(model, target="qonnx").ok
    model = quantize(model, LSQ)
    assert export.check(model, target="qonnx").ok
    _, found = written(model, tmp_path / "n.onnx")
    assert sum(found.different.values()) <= NEAR_TIES * found.codes, found
    if not any(found.different.values()):
        assert found.error < 1e-3


@pytest.mark.quick(2)
@pytest.mark.parametrize("case", REFUSED)
def test_what_check_refuses_is_not_written(case, tmp_path):
    body, words = REFUSED[case]
    model = network(body)
    problem, *_ = export.check(model, target="qonnx").problems
    assert words in problem.reason + problem.remedy + problem.received
    model = quantize(model, LSQ)
    assert export.check(model, target="qonnx").problems[0] == problem
    with pytest.raises(export.ExportError) as refused:
        export.to_qonnx(model, tmp_path / "n.onnx")
    assert refused.value.problem == problem


def test_open_sizes_are_refused_once(tmp_path):
    image = keras.Input((None, None, 2), name="image")
    x = conv_bn_relu(conv_bn_relu(image, 4, name="first"), 4, name="inner")
    model = quantize(keras.Model(image, layers.Conv2D(3, 1, name="head")(x)), LSQ)
    (problem,) = export.check(model, target="qonnx").problems
    assert problem.layer == "image"
    with pytest.raises(export.ExportError, match="takes tensors of fixed sizes"):
        export.to_qonnx(model, tmp_path / "n.onnx")


def test_a_missing_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[qonnx\]'"):
        export.to_qonnx(None, tmp_path / "n.onnx")
    with pytest.raises(ImportError, match=r"pip install '\.\[qonnx\]'"):
        export.compare_qonnx(tmp_path / "n.onnx", None, None)
