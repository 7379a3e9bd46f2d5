"""The smallest network through other tools: what docs/comparison.md says of them.

  pip install --no-deps --target=FOLDER nncf==3.4.0 networkx==3.6.1 ...
  PYTHONPATH=FOLDER python -m benchmarks.peers.trials --tool=nncf

with the versions of benchmarks/requirements-trials.txt. Each tool has a folder of its
own: HGQ2 and qkeras-v3 both bring a package `qkeras`. Nothing is measured; a trial
prints what was quantized, and fails where the tool no longer does it.
"""

import importlib.metadata
import os

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


def nncf() -> list[str]:
    """Quantizes an ONNX network after training, and runs it."""
    import nncf
    import onnxruntime
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
    data = [{"x": image[None, None, :, :, 0]} for image in _images()]
    quantized = nncf.quantize(model, nncf.Dataset(data), subset_size=len(data))

    def outputs(network):
        session = onnxruntime.InferenceSession(network.SerializeToString())
        return session.run(None, data[0])[0]

    difference = np.abs(outputs(model) - outputs(quantized)).max()
    stored = {numpy_helper.to_array(t).dtype.name for t in quantized.graph.initializer}
    return [f"stored: {sorted(stored)}; outputs differ by {difference:.2g}"]


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
    "hgq2": (hgq2, "hgq2"),
    "keras": (keras, "keras"),
    "mct": (mct, "model-compression-toolkit"),
    "nncf": (nncf, "nncf"),
    "qkeras-v3": (qkeras_v3, "qkeras-v3"),
}
flags.DEFINE_enum("tool", "keras", list(TOOLS), "Which one; it must be installed.")


def main(_) -> None:
    """Prints the tool's version and what its trial says."""
    os.environ["TF_USE_LEGACY_KERAS"] = "0"
    trial, distribution = TOOLS[FLAGS.tool]
    print(distribution, importlib.metadata.version(distribution))
    for line in trial():
        print(line)


if __name__ == "__main__":
    app.run(main)
