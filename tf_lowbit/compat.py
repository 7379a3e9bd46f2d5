"""The one place that picks the Keras of this library, and meets its internals.

TF-MOT works on Keras 2 (the `tf_keras` package) and picks it with the
environment variable `TF_USE_LEGACY_KERAS`. Everything here imports `keras` from
this module, so that there is one answer to "which Keras". What has no public
name in TensorFlow or Keras is reached here and nowhere else.
"""

import contextlib
import os
import shutil
import sys
import tempfile
import threading

os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")

import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras as keras
from tensorflow.python.ops import control_flow_util
from tf_keras.src.applications.convnext import LayerScale, StochasticDepth
from tf_keras.src.applications.inception_resnet_v2 import CustomScaleLayer
from tf_keras.src.engine.compile_utils import LossesContainer, MetricsContainer
from tf_keras.src.mixed_precision import autocast_variable
from tf_keras.src.saving import saving_lib, serialization_lib

__all__ = [
    "CustomScaleLayer",
    "LayerScale",
    "LossesContainer",
    "MetricsContainer",
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
]
_UNPACKING = threading.RLock()
_DEEPENING = threading.RLock()
# Layers, one behind the other, that a network may have.
_DEEPEST = 20_000


def as_float32(value):
    """Reads a tensor or variable in float32, whatever the precision policy.

    Under `mixed_float16` and `mixed_bfloat16` a Keras variable is cast when it is
    read inside a layer. A quantizer must see the float32 value: a weight rounded
    to 16 bits first can fall on the other side of a decision threshold.

    Args:
        value: tensor or variable of any floating dtype and any shape.

    Returns:
        A float32 tensor of the same shape. The gradient is the identity.
    """
    with autocast_variable.enable_auto_cast_variables(None):
        tensor = tf.convert_to_tensor(value)
    return tf.cast(tensor, tf.float32)


def logits_in_front(probabilities):
    """What a sigmoid or softmax has read, where Keras has kept it for its losses.

    Args:
        probabilities: tensor that a network put out.

    Returns:
        Tensor of the same shape and dtype, or None.
    """
    return getattr(probabilities, "_keras_logits", None)


def in_xla_context() -> bool:
    """Whether the ops built now will be compiled by XLA (`jit_compile=True`)."""
    if tf.executing_eagerly():
        return False
    return control_flow_util.GraphOrParentsInXlaContext(
        tf.compat.v1.get_default_graph()
    )


def is_keras3(value, kind: str = "Model") -> bool:
    """Whether a value is a model, or another object, of Keras 3.

    Args:
        value: of any type.
        kind: the public name of the class, such as "optimizers.Optimizer".
    """
    # Who has such an object has imported it.
    found = sys.modules.get("keras")
    for name in kind.split("."):
        found = getattr(found, name, None)
    return isinstance(found, type) and isinstance(value, found)


def keras_safe_mode(is_safe: bool) -> contextlib.AbstractContextManager:
    """Within it, whether Keras refuses to load a Python lambda from a file.

    `keras.models.load_model` sets it for `.keras` files alone: it runs the code in a
    `.h5` file whatever its argument `safe_mode` says.
    """
    return serialization_lib.SafeModeScope(is_safe)


@contextlib.contextmanager
def deep_graphs():
    """Within it, Keras makes models that are deeper than Python's recursion limit.

    Keras walks from a model's outputs to its inputs by a call within a call for each
    layer on the way. A network of a few hundred layers, with quantizers between them,
    is deeper than the 1,000 calls that Python allows.
    """
    with _DEEPENING:
        before = sys.getrecursionlimit()
        sys.setrecursionlimit(max(before, _DEEPEST))
        try:
            yield
        finally:
            sys.setrecursionlimit(before)


@contextlib.contextmanager
def unpacked_archives():
    """Within it, Keras unpacks the weights of a `.keras` file before it reads them.

    By itself it reads HDF5 within the ZIP, where Python goes back by reading from the
    start again: the larger the file, the longer each of many steps back takes.
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
