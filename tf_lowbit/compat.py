"""The one module that chooses Keras and reaches into TensorFlow and Keras internals.

TF-MOT works on Keras 2 (the `tf_keras` package) and selects it by the environment
variable `TF_USE_LEGACY_KERAS`. The library imports `keras` only from here. What has no
public name in TensorFlow or Keras is reached here and nowhere else.
"""

import contextlib
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")

import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras as keras
from tensorflow.python.ops import control_flow_util
from tf_keras.src.applications.convnext import LayerScale, StochasticDepth
from tf_keras.src.applications.inception_resnet_v2 import CustomScaleLayer
from tf_keras.src.engine.compile_utils import LossesContainer, MetricsContainer
from tf_keras.src.engine.keras_tensor import KerasTensor
from tf_keras.src.engine.node import Node
from tf_keras.src.mixed_precision import autocast_variable
from tf_keras.src.saving import saving_lib, serialization_lib

__all__ = [
    "CustomScaleLayer",
    "KerasTensor",
    "LayerScale",
    "Logs",
    "LossesContainer",
    "MetricsContainer",
    "Node",
    "StochasticDepth",
    "as_float32",
    "deep_graphs",
    "in_xla_context",
    "is_keras3",
    "keras",
    "keras_safe_mode",
    "logits_in_front",
    "tf",
    "tfmot",
    "unpacked_archives",
    "untraced_calls",
]
# What Keras gives the methods of a callback.
Logs = dict[str, Any] | None
_UNPACKING = threading.RLock()
_DEEPENING = threading.RLock()
_UNTRACING = threading.RLock()
# The recursion limit while Keras builds a model.
_DEEPEST = 20_000


def as_float32(value: tf.Tensor | tf.Variable) -> tf.Tensor:
    """Reads a tensor or variable in float32, whatever the precision policy.

    Under `mixed_float16` and `mixed_bfloat16` Keras casts a variable when a layer reads
    it. A quantizer must see the float32 value: rounding a weight to 16 bits first can
    move it across a decision threshold.

    Args:
        value: Tensor or variable of any floating dtype and any shape.

    Returns:
        A float32 tensor of the same shape. The gradient is the identity.
    """
    with autocast_variable.enable_auto_cast_variables(None):
        tensor = tf.convert_to_tensor(value)
    return tf.cast(tensor, tf.float32)


def logits_in_front(probabilities: tf.Tensor) -> tf.Tensor | None:
    """Returns the logits that Keras keeps beside the output of a sigmoid or softmax.

    Args:
        probabilities: Output tensor of a network.

    Returns:
        Tensor of the same shape and dtype; None where Keras kept none.
    """
    return getattr(probabilities, "_keras_logits", None)


def in_xla_context() -> bool:
    """Tells whether XLA will compile the ops built now (`jit_compile=True`)."""
    if tf.executing_eagerly():
        return False
    return control_flow_util.GraphOrParentsInXlaContext(
        tf.compat.v1.get_default_graph()
    )


def is_keras3(value: Any, kind: str = "Model") -> bool:
    """Tells whether a value is a Keras 3 model, or another Keras 3 object.

    Args:
        value: Any value.
        kind: Public name of the class, such as "optimizers.Optimizer".
    """
    # A Keras 3 object exists only if Keras 3 was imported.
    found = sys.modules.get("keras")
    for name in kind.split("."):
        found = getattr(found, name, None)
    return isinstance(found, type) and isinstance(value, found)


def keras_safe_mode(is_safe: bool) -> contextlib.AbstractContextManager:
    """A context that sets whether Keras refuses to load a Python lambda from a file.

    `keras.models.load_model` sets it for `.keras` files alone. It runs the code in a
    `.h5` file whatever its argument `safe_mode` says.
    """
    return serialization_lib.SafeModeScope(is_safe)


@contextlib.contextmanager
def deep_graphs() -> Iterator[None]:
    """A context in which Keras builds models deeper than Python's recursion limit.

    Keras walks from a model's outputs to its inputs with a nested call for each layer.
    A network of a few hundred layers, with quantizers between them, exceeds the 1,000
    nested calls that Python allows.
    """
    with _DEEPENING:
        before = sys.getrecursionlimit()
        sys.setrecursionlimit(max(before, _DEEPEST))
        try:
            yield
        finally:
            sys.setrecursionlimit(before)


@contextlib.contextmanager
def untraced_calls(
    known: Callable[[keras.layers.Layer], Any],
) -> Iterator[None]:
    """A context in which Keras does not trace the layers whose outputs are known.

    Keras traces what a layer computes, to learn shapes and dtypes of its outputs. That
    takes most of the time of building a model.

    Args:
        known: Function layer -> Keras tensors of the shapes and dtypes that the layer
            puts out, structured as its outputs. None for a layer that is to be traced;
            so must be one that makes weights outside of `build`.
    """
    owner = threading.get_ident()
    with _UNTRACING:
        trace = keras.layers.Layer._infer_output_signature

        def infer(layer, inputs, args, kwargs, masks):
            outputs = known(layer) if threading.get_ident() == owner else None
            has_effects = layer._activity_regularizer is not None or any(
                mask is not None for mask in tf.nest.flatten(masks)
            )
            if outputs is None or has_effects:
                return trace(layer, inputs, args, kwargs, masks)
            with (
                keras.backend.name_scope(layer._name_scope()),
                autocast_variable.enable_auto_cast_variables(
                    layer._compute_dtype_object
                ),
            ):
                layer._maybe_build(inputs)
            layer._set_save_spec(inputs, args, kwargs)
            return tf.nest.map_structure(_like, outputs)

        keras.layers.Layer._infer_output_signature = infer
        try:
            yield
        finally:
            keras.layers.Layer._infer_output_signature = trace


def _like(tensor):
    return type(tensor)(tensor.type_spec, tensor._inferred_value)


@contextlib.contextmanager
def unpacked_archives() -> Iterator[None]:
    """A context in which Keras unpacks the weights of a `.keras` file before reading.

    Keras reads HDF5 inside the ZIP. There every step backwards reads the file again
    from its start, so that loading time grows quickly with the file's size.
    """
    with _UNPACKING:
        original = saving_lib.H5IOStore
        saving_lib.H5IOStore = _UnpackedStore
        try:
            yield
        finally:
            saving_lib.H5IOStore = original


class _UnpackedStore(saving_lib.H5IOStore):
    def __init__(self, root_path, archive=None, mode="r"):
        if archive is not None and mode == "r":
            archive = _Unpacked(archive)
        super().__init__(root_path, archive, mode)


class _Unpacked:
    """A ZIP whose files are copied to temporary ones when they are opened."""

    def __init__(self, archive):
        self._archive = archive

    def open(self, name, mode="r"):
        file = tempfile.TemporaryFile()  # Keras closes it.
        with self._archive.open(name, mode) as packed:
            shutil.copyfileobj(packed, file, 2**20)
        file.seek(0)
        return file
