"""TFLite files of float networks and of other libraries', and what is in a file."""

import re
from collections import Counter

import numpy as np

import tf_lowbit as tfl
from tf_lowbit import datasets
from tf_lowbit.compat import keras, tf
from tf_lowbit.export.tflite import flatbuffer

_TYPES = {
    number: name.lower()
    for name, number in vars(flatbuffer.schema.TensorType).items()
    if isinstance(number, int)
}


def converted(network: keras.Model, is_quantized: bool = False) -> bytes:
    """A network as TensorFlow's converter writes it.

    Args:
        network: To be converted.
        is_quantized: Whether it holds the converter's own fake quantization, which
            TF-MOT's guide has converted with the default optimizations.
    """
    converter = tf.lite.TFLiteConverter.from_keras_model(network)
    if is_quantized:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    return converter.convert()


def post_training(model: keras.Model, data: datasets.Dataset) -> bytes:
    """The float network, quantized to 8 bits by TensorFlow's converter."""
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    images = np.concatenate([x for x, _ in data.train.take(2).as_numpy_iterator()])
    converter.representative_dataset = lambda: ([image[None]] for image in images)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    return converter.convert()


def deployed(network, content: bytes, model, data: datasets.Dataset) -> dict:
    """What a file holds, how large it is, and what it computes on the test set.

    Args:
        network: What the file was made of.
        content: The file.
        model: The float network, whose file is the measure of size.
        data: Whose test set is used.

    Returns:
        JSON-ready.
    """
    run = tfl.export.Runner(content)
    float_file = converted(model)
    right = right_trained = same = images_seen = 0
    difference = 0.0
    for images, labels in data.test.as_numpy_iterator():
        (logits,) = run(images).values()
        expected = network.predict_on_batch(images)
        right += int((logits.argmax(axis=-1) == labels).sum())
        right_trained += int((expected.argmax(axis=-1) == labels).sum())
        same += int((logits.argmax(axis=-1) == expected.argmax(axis=-1)).sum())
        difference = max(difference, float(abs(logits - expected).max()))
        images_seen += len(images)
    return {
        "bytes": len(content),
        "gzip_bytes": tfl.export.gzip_bytes(content),
        "float_bytes": len(float_file),
        **contents(content),
        "float_operators": contents(float_file)["operators"],
        "test_images": images_seen,
        "accuracy": right / images_seen,
        "trained_accuracy": right_trained / images_seen,
        "trained_agrees": same,
        "largest_logit_difference": difference,
    }


def contents(content: bytes) -> dict:
    """How many operators of each kind are in a file, and its convolutions' types.

    Returns:
        "operators": kind -> count; "convolutions": "<input> x <weights>" -> count.
    """
    model = flatbuffer.unpack(content)
    (graph,) = model.subgraphs
    operators, convolutions = Counter(), Counter()
    for operator in graph.operators:
        code = model.operatorCodes[operator.opcodeIndex]
        # Which of the two fields holds it depends on the file's age.
        kind = flatbuffer.OPERATORS[max(code.builtinCode, code.deprecatedBuiltinCode)]
        operators[kind] += 1
        if kind == "CONV_2D":
            types = [_TYPES[graph.tensors[i].type] for i in operator.inputs[:2]]
            convolutions[" x ".join(types)] += 1
    return {
        "operators": dict(operators.most_common()),
        "convolutions": dict(convolutions.most_common()),
    }


def said(error: Exception) -> str:
    """An error's type and what it says.

    The converter puts places in source files around that, which are no result.
    """
    text = str(error)
    found = re.search(r"\berror: (.+)", text) or re.search(r"(.+)", text)
    return f"{type(error).__name__}: {found[1].strip() if found else ''}"
