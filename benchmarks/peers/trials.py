"""The smallest network through other tools: what the documents say of them.

  pip install --no-deps --target=FOLDER nncf==3.4.0 networkx==3.6.1 ...
  PYTHONPATH=FOLDER python -m benchmarks.peers.trials --tool=nncf

with the versions of benchmarks/requirements-trials.txt. Each tool has a folder of its
own: HGQ2 and qkeras-v3 both bring a package `qkeras`. Nothing is measured; a trial
prints what the tool did, and fails where the tool no longer does it. finn-plus and
hls4ml read QONNX files of this library; others quantize a network.
"""

import importlib.metadata
import os
import tempfile

import numpy as np
from absl import app, flags

FLAGS = flags.FLAGS


def _images():
    return np.random.default_rng(0).normal(size=(16, 8, 8, 1)).astype(np.float32)


def _trained(keras, layers):
    """Fits a Sequential model for two epochs, and returns it with its outputs."""
    model = keras.Sequential([keras.layers.Input((8, 8, 1)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss)
    model.fit(_images(), np.arange(16) % 3, epochs=2, verbose=0)
    return model, model.predict(_images(), verbose=0)


def _torch_layers():
    """The smallest network in PyTorch, and the images as it takes them."""
    import torch

    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(144, 3),
    )
    return network, torch.from_numpy(_images().transpose(0, 3, 1, 2))


def _fit_torch(network, images):
    """Fits a network of PyTorch for two epochs, and returns its outputs."""
    import torch

    optimizer = torch.optim.Adam(network.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        outputs = network(images)
        torch.nn.functional.cross_entropy(outputs, torch.arange(16) % 3).backward()
        optimizer.step()
    outputs = network.eval()(images).detach().numpy()
    assert np.isfinite(outputs).all()
    return outputs


def _levels(tensor) -> int:
    """Counts the values of a tensor of PyTorch."""
    return len(np.unique(tensor.detach().numpy()))


def _onnx_network():
    """A convolution and a ReLU in ONNX."""
    from onnx import TensorProto, helper, numpy_helper

    kernel = np.random.default_rng(1).normal(size=(4, 1, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
            helper.make_node("Relu", ["c"], ["y"], name="relu"),
        ],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 6, 6])],
        [numpy_helper.from_array(kernel, "w")],
    )
    opset = helper.make_opsetid("", 17)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=9)
    return model, [{"x": image[None, None, :, :, 0]} for image in _images()]


def _onnx_outputs(model, feed):
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, feed)[0]


def _stored(model) -> list[str]:
    """The types of an ONNX network's constants."""
    from onnx import numpy_helper

    constants = model.graph.initializer
    return sorted({numpy_helper.to_array(t).dtype.name for t in constants})


def aimet_onnx() -> list[str]:
    """Quantizes an ONNX network after training, and runs it."""
    from aimet_onnx import QuantizationSimModel

    model, data = _onnx_network()
    sim = QuantizationSimModel(model, param_type="int4", activation_type="int8")
    sim.compute_encodings(data)
    (simulated,) = sim.session.run(None, data[0])
    file = sim.to_onnx_qdq(prequantize_constants=True)
    model, _ = _onnx_network()
    outputs = [_onnx_outputs(x, data[0]) for x in (model, file)]
    np.testing.assert_allclose(outputs[1], simulated, atol=1e-4)
    difference = np.abs(outputs[0] - outputs[1]).max()
    return [f"stored: {_stored(file)}; outputs differ by {difference:.2g}"]


def aimet_torch() -> list[str]:
    """Trains 4-bit weights and activations in a float network."""
    from aimet_torch import QuantizationSimModel

    network, images = _torch_layers()
    sim = QuantizationSimModel(network, images, default_param_bw=4, default_output_bw=4)
    sim.compute_encodings(lambda model: model(images))
    _fit_torch(sim.model, images)
    convolution = sim.model[0]
    weights = convolution.param_quantizers["weight"](convolution.weight)
    # Each filter has a step of its own.
    levels = [_levels(weights[0]), _levels(sim.model[:2](images))]
    assert max(levels) <= 2**4, levels
    return [f"trained; levels of a filter and of the ReLU's outputs: {levels}"]


def brevitas() -> list[str]:
    """Trains 2-bit weights and activations, and writes QONNX that qonnx runs."""
    import brevitas.nn as qnn
    import torch
    from brevitas.export import export_qonnx
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx

    _, images = _torch_layers()
    network = torch.nn.Sequential(
        qnn.QuantConv2d(1, 4, 3, weight_bit_width=2),
        qnn.QuantReLU(bit_width=2),
        torch.nn.Flatten(),
        qnn.QuantLinear(144, 3, bias=True, weight_bit_width=4),
    )
    outputs = _fit_torch(network, images)
    weights = network[0].quant_weight().value
    levels = [_levels(weights[0]), _levels(network[:2](images))]
    assert max(levels) <= 2**2, levels
    lines = [f"trained; levels of a filter and of the ReLU's outputs: {levels}"]
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        export_qonnx(network, images, export_path=file.name)
        model = ModelWrapper(file.name)
    feed = {model.graph.input[0].name: images.numpy()}
    (found,) = execute_onnx(model, feed).values()
    lines.append(f"QONNX: {sorted({node.op_type for node in model.graph.node})}")
    difference = np.abs(found - outputs).max()
    assert difference < 1e-4
    return [*lines, f"outputs in qonnx's executor differ by {difference:.2g}"]


def hgq2() -> list[str]:
    """Trains with bits of its own for each weight."""
    import keras
    from hgq.layers import QConv2D, QDense

    layers = [QConv2D(4, 3, activation="relu"), keras.layers.Flatten(), QDense(3)]
    model, outputs = _trained(keras, layers)
    assert np.isfinite(outputs).all()
    return [
        f"trained; bit operations of the convolution: {float(model.layers[0].ebops)}"
    ]


def _two_bits(blocks, **options):
    """A QONNX file of a 2-bit network, cleaned by qonnx; its input and its outputs.

    Args:
        blocks: A function from the network's input to that of the last layer.
        **options: Options of `to_qonnx`.
    """
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.util.cleanup import cleanup_model

    import tf_lowbit as tfl
    from tf_lowbit.compat import keras

    keras.utils.set_random_seed(0)
    image = keras.Input((8, 8, 1), name="image")
    outputs = keras.layers.Dense(3, name="head")(blocks(keras.layers, image))
    rules = [
        tfl.PrecisionRule("first|head", 8, 8, "lsq", "lsq"),
        tfl.PrecisionRule(".*", 2, 2, "lsq", "lsq"),
    ]
    network = keras.Model(image, outputs)
    model = tfl.quantize(network, rules, residual_bits=8)
    tfl.calibrate(model, [abs(_images())])
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "net.onnx")
        tfl.export.to_qonnx(model, path, **options)
        file = cleanup_model(ModelWrapper(path))
    images = abs(_images()[:1])
    return file, images, model(images).numpy()


def _conv(layers, x, name):
    x = layers.Conv2D(4, 3, padding="same", use_bias=False, name=name)(x)
    return layers.BatchNormalization(name=f"{name}_bn")(x)


def _dense(layers, x):
    x = layers.Flatten(name="flat")(x)
    for name in ("first", "second"):
        x = layers.ReLU(name=f"{name}_relu")(layers.Dense(8, name=name)(x))
    return x


def _plain(layers, x):
    x = layers.ReLU(name="first_relu")(_conv(layers, x, "first"))
    x = layers.MaxPooling2D(name="pool")(x)
    x = layers.ReLU(name="second_relu")(_conv(layers, x, "second"))
    return layers.Flatten(name="flat")(x)


def _residual(layers, x):
    x = layers.ReLU(name="first_relu")(_conv(layers, x, "first"))
    y = layers.ReLU(name="second_relu")(_conv(layers, x, "second"))
    x = layers.Add(name="sum")([x, _conv(layers, y, "third")])
    x = layers.ReLU(name="sum_relu")(x)
    return layers.GlobalAveragePooling2D(name="average")(x)


def _average_pooled(layers, x):
    x = layers.ReLU(name="first_relu")(_conv(layers, x, "first"))
    x = layers.AveragePooling2D(name="pool")(x)
    return layers.Flatten(name="flat")(x)


def finn_plus() -> list[str]:
    """Converts QONNX files of this library to FINN's operators, and runs them."""
    from finn.transformation.qonnx.convert_qonnx_to_finn import ConvertQONNXtoFINN
    from qonnx.core.onnx_exec import execute_onnx

    lines = []
    for blocks in (_dense, _plain, _residual):
        file, images, wanted = _two_bits(blocks)
        file = file.transform(ConvertQONNXtoFINN())
        kinds = {node.op_type for node in file.graph.node}
        # Weights are integers now, and activations thresholds.
        assert "MultiThreshold" in kinds
        assert not kinds & {"Quant", "BipolarQuant"}
        feeds = {file.graph.input[0].name: images.transpose(0, 3, 1, 2)}
        outputs = execute_onnx(file, feeds)[file.graph.output[0].name]
        difference = np.abs(outputs - wanted).max()
        assert difference <= 1e-4 * np.abs(wanted).max()
        lines.append(
            f"{blocks.__name__}: {sorted(kinds)}; outputs differ by {difference:.2g}"
        )
    return lines


def hls4ml() -> list[str]:
    """Converts QONNX files of this library to HLS code, and compiles one on the CPU.

    Others, of an option or a layer that it does not take, stop it.
    """
    import hls4ml
    from qonnx.transformation.channels_last import ConvertToChannelsLastAndClean
    from qonnx.transformation.gemm_to_matmul import GemmToMatMul
    from qonnx.util.cleanup import cleanup_model

    def converted(file, folder):
        # Its front end takes convolutions in this order alone.
        file = file.transform(ConvertToChannelsLastAndClean())
        file = cleanup_model(file.transform(GemmToMatMul()))
        settings = hls4ml.utils.config.config_from_onnx_model(
            file,
            granularity="name",
            backend="Vivado",
            # The scale of two 8-bit grids is below the steps of fixed<32,16>.
            default_precision="fixed<48,16>",
        )
        return hls4ml.converters.convert_from_onnx_model(
            file, output_dir=folder, hls_config=settings, backend="Vivado"
        )

    lines = []
    for blocks in (_dense, _plain, _residual):
        file, images, wanted = _two_bits(blocks)
        with tempfile.TemporaryDirectory() as folder:
            made = converted(file, folder)
            kinds = {layer.class_name for layer in made.get_layers()}
            line = f"{blocks.__name__}: {sorted(kinds)}"
            if blocks is _dense:
                # Convolutions take the compiler minutes.
                made.compile()
                difference = np.abs(made.predict(images) - wanted).max()
                assert difference <= 1e-3 * np.abs(wanted).max()
                line += f"; outputs differ by {difference:.2g}"
        lines.append(line)
    for blocks, options in (
        (_average_pooled, {}),
        (_plain, {"fold_batch_norm": True}),
        (_dense, {"activations": "multithreshold"}),
    ):
        file, _, _ = _two_bits(blocks, **options)
        with tempfile.TemporaryDirectory() as folder:
            try:
                converted(file, folder)
            except Exception as error:  # Of any type.
                lines.append(f"{blocks.__name__} {options}: stopped, {error}")
            else:
                raise AssertionError(f"{blocks.__name__} {options} is taken now")
    return lines


def keras() -> list[str]:
    """Quantizes a trained model after training, layer by layer."""
    import keras

    lines = []
    for mode in ("int8", "int4", "float8"):
        layers = [
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
        model, outputs = _trained(keras, layers)
        model.quantize(mode)
        difference = np.abs(model.predict(_images(), verbose=0) - outputs).max()
        changed = [type(x).__name__ for x in model.layers if x.quantization_mode]
        lines.append(
            f"{mode}: {', '.join(changed)}; outputs differ by {difference:.2g}"
        )
        fixed = [w.path for w in model.trainable_weights if "kernel" in w.path]
        lines.append(f"{mode}: kernels that fit trains: {len(fixed)} of 2")
    return lines


def mct() -> list[str]:
    """Looks for its Keras functions beside the installed TensorFlow."""
    import tensorflow as tf
    from model_compression_toolkit.verify_packages import FOUND_TF

    return [f"Keras support with TensorFlow {tf.__version__}: {FOUND_TF}"]


def mct_torch() -> list[str]:
    """Quantizes a network of PyTorch after training, and trains a quantized one."""
    import model_compression_toolkit as mct

    network, images = _torch_layers()
    network.eval()
    outputs = network(images).detach().numpy()
    quantized, _ = mct.ptq.pytorch_post_training_quantization(
        network, lambda: iter([[images]])
    )
    difference = np.abs(quantized(images).detach().cpu().numpy() - outputs).max()
    lines = [f"after training: outputs differ by {difference:.2g}"]
    trainable, _ = mct.qat.pytorch_quantization_aware_training_init_experimental(
        network, lambda: iter([[images]])
    )
    _fit_torch(trainable, images)
    return [*lines, "trained"]


def nncf() -> list[str]:
    """Quantizes an ONNX network after training, and runs it."""
    import nncf

    model, data = _onnx_network()
    quantized = nncf.quantize(model, nncf.Dataset(data), subset_size=len(data))
    outputs = [_onnx_outputs(x, data[0]) for x in (model, quantized)]
    difference = np.abs(outputs[0] - outputs[1]).max()
    return [f"stored: {_stored(quantized)}; outputs differ by {difference:.2g}"]


def qkeras_v3() -> list[str]:
    """Trains 2-bit weights and activations, and turns a float model into its own."""
    import keras
    import qkeras

    layers = [
        qkeras.QConv2D(
            4, 3, kernel_quantizer=qkeras.quantized_bits(2, 0, alpha="auto")
        ),
        qkeras.QActivation(qkeras.quantized_relu(2)),
        keras.layers.Flatten(),
        qkeras.QDense(3, kernel_quantizer="quantized_bits(4,0,1)"),
    ]
    _, outputs = _trained(keras, layers)
    assert np.isfinite(outputs).all()
    return ["trained"]


# Tool -> (its trial, name of its distribution).
TOOLS = {
    "aimet-onnx": (aimet_onnx, "aimet-onnx"),
    "aimet-torch": (aimet_torch, "aimet-torch"),
    "brevitas": (brevitas, "brevitas"),
    "finn-plus": (finn_plus, "finn-plus"),
    "hgq2": (hgq2, "hgq2"),
    "hls4ml": (hls4ml, "hls4ml"),
    "keras": (keras, "keras"),
    "mct": (mct, "model-compression-toolkit"),
    "mct-torch": (mct_torch, "model-compression-toolkit"),
    "nncf": (nncf, "nncf"),
    "qkeras-v3": (qkeras_v3, "qkeras-v3"),
}
flags.DEFINE_enum("tool", "keras", list(TOOLS), "Which one; it must be installed.")


def main(_) -> None:
    """Prints the tool's version and what its trial says."""
    trial, distribution = TOOLS[FLAGS.tool]
    # Those that read this library's files leave the choice of Keras to it.
    if trial not in (finn_plus, hls4ml):
        os.environ["TF_USE_LEGACY_KERAS"] = "0"
    print(distribution, importlib.metadata.version(distribution))
    for line in trial():
        print(line)


if __name__ == "__main__":
    app.run(main)
