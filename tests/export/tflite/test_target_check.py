"""What of a file its target cannot run."""

import dataclasses

import pytest

from tests.export.networks import EDGE, Rule, conv_bn_relu, images, network, quantize
from tf_lowbit import export
from tf_lowbit.export.options import Options
from tf_lowbit.export.tflite import flatbuffer, target_check, writer


@pytest.fixture(scope="module")
def content():
    """A file with a float head behind integer layers."""
    model = network(lambda x: conv_bn_relu(x, 4, name="inner"))
    model = quantize(model, [EDGE, Rule(".*", 2, 2)])
    options = Options(input_type="int8")
    return writer.to_bytes(export.snap(model, [images()], options=options))


def problems(content, target):
    return target_check.problems(flatbuffer.unpack(content), target)


def test_its_own_target_runs_it(content):
    assert problems(content, export.TARGETS["xnnpack"]) == []
    target_check.require_runnable(content, export.TARGETS["xnnpack"])


def test_each_operator_that_is_missing_is_named(content):
    operators = ("CONV_2D", "DEQUANTIZE", "MEAN")
    target = dataclasses.replace(
        export.TARGETS["xnnpack"], name="mine", operators=operators
    )
    (found,) = problems(content, target)
    assert "target='mine'" in found
    assert "FULLY_CONNECTED in 'head'" in found
    with pytest.raises(export.ExportError, match="FULLY_CONNECTED in 'head'"):
        target_check.require_runnable(content, target)


def test_each_operator_of_floats_is_named(content):
    target = dataclasses.replace(export.TARGETS["xnnpack"], name="mine", floats=False)
    found = problems(content, target)
    assert [text.split("Received: ")[1].split(" ")[0] for text in found] == [
        "DEQUANTIZE",
        "MEAN",
        "FULLY_CONNECTED",
    ]


def test_open_sizes_are_named(content):
    model = flatbuffer.unpack(content)
    (graph,) = model.subgraphs
    tensor = graph.tensors[graph.inputs[0]]
    tensor.shapeSignature = [-1, -1, 8, 2]
    content = flatbuffer.pack(model)
    assert problems(content, export.TARGETS["xnnpack"]) == []
    target = dataclasses.replace(
        export.TARGETS["xnnpack"], name="mine", open_sizes=False
    )
    (found,) = problems(content, target)
    assert "'image' of [None, None, 8, 2]" in found
