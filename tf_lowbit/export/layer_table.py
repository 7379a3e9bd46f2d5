"""The table of exportable layers, with one row for each.

A layer of a trained network has a *form*, by which `lowering.layers` finds the function
that lowers it. A layer of the integer model has a *kind*: its type in an archive, by
which `tflite.layers` and `qonnx.layers` find the function that writes it. Forms that
depend on more than a layer's type (sums, products, scales, activations) are found by
`lowering.forms`.
"""

import dataclasses

from tf_lowbit.compat import keras
from tf_lowbit.export.integer import plain_layers, twin

_layers = keras.layers

# Forms.
ADD = "add"
ACTIVATION = "activation"
ALIAS = "alias"
ARGMAX = "argmax"  # Ends a network in class numbers.
AVERAGE_POOL = "average pool"
CODES = "codes"  # Only moves or selects codes.
CONCATENATE = "concatenate"
DOT = "dot"
FLOATS = "floats"  # Copied; computes in float.
GLOBAL_POOL = "global pool"
INTERPOLATE = "interpolate"
LINEAR = "linear"
MULTIPLY = "multiply"
PARTS = "parts"  # Becomes several layers before the graph is walked.
RELU = "relu"
SCALE = "scale"


@dataclasses.dataclass(frozen=True)
class Row:
    """How layers of one type are exported.

    Attributes:
        kind: Type in an archive, and key of the writers' functions.
        form: Form in a trained network. None if `lowering.forms` finds it, or if the
            layer occurs in integer models only.
        needs_size: Whether the file stores the size of its input, which must then be
            fixed.
        is_float: Whether it computes in float in the integer model.
        operators: TFLite operators that a file always has for it.
    """

    kind: str
    form: str | None = None
    needs_size: bool = False
    is_float: bool = False
    operators: tuple[str, ...] = ()


# Kind of a weight layer -> its TFLite operators.
_WEIGHTED = {
    twin.CONV: ("CONV_2D",),
    twin.DENSE: ("FULLY_CONNECTED",),
    twin.DEPTHWISE: ("DEPTHWISE_CONV_2D",),
    twin.SCALE: ("DEPTHWISE_CONV_2D",),
    twin.TRANSPOSED: ("CONV_2D",),
}


def _weighted(kind, needs_size=False) -> Row:
    return Row(kind, LINEAR, needs_size, True, _WEIGHTED[kind])


def _codes(kind, needs_size=False, operator=None) -> Row:
    return Row(kind, CODES, needs_size, operators=(operator,) if operator else ())


def _floats(kind, *operators) -> Row:
    return Row(kind, FLOATS, is_float=True, operators=operators)


def _parts(kind, *operators) -> Row:
    return Row(kind, PARTS, True, True, ("FULLY_CONNECTED", *operators))


_RECURRENT = _parts(
    "recurrent",
    *("ADD", "CONCATENATION", "LOGISTIC", "MUL", "RESHAPE", "STRIDED_SLICE", "TANH"),
)
TABLE = {
    _layers.Activation: Row("activation", is_float=True),
    _layers.Add: Row("add", is_float=True, operators=("ADD",)),
    _layers.AveragePooling1D: Row("average_pool", AVERAGE_POOL, True, True),
    _layers.AveragePooling2D: Row("average_pool", AVERAGE_POOL, True, True),
    _layers.Concatenate: Row("concatenate", CONCATENATE, operators=("CONCATENATION",)),
    _layers.Conv1D: _weighted(twin.CONV, True),
    _layers.Conv2D: _weighted(twin.CONV),
    _layers.Conv2DTranspose: _weighted(twin.TRANSPOSED),
    _layers.Cropping1D: _codes("crop", True, "STRIDED_SLICE"),
    _layers.Cropping2D: _codes("crop", True, "STRIDED_SLICE"),
    _layers.Dense: _weighted(twin.DENSE),
    _layers.DepthwiseConv1D: _weighted(twin.DEPTHWISE, True),
    _layers.DepthwiseConv2D: _weighted(twin.DEPTHWISE),
    _layers.Dot: Row("dot", DOT, is_float=True, operators=("BATCH_MATMUL",)),
    _layers.Flatten: _codes("flatten", True),
    _layers.GlobalAveragePooling1D: Row(
        "global_average_pool", GLOBAL_POOL, is_float=True
    ),
    _layers.GlobalAveragePooling2D: Row(
        "global_average_pool", GLOBAL_POOL, is_float=True
    ),
    _layers.GlobalMaxPooling1D: _codes("global_max_pool", True, "MAX_POOL_2D"),
    _layers.GlobalMaxPooling2D: _codes("global_max_pool", True, "MAX_POOL_2D"),
    _layers.GRU: _RECURRENT,
    _layers.InputLayer: Row("input"),
    _layers.LSTM: _RECURRENT,
    _layers.LayerNormalization: _floats(
        "layer_norm", "ADD", "MEAN", "MUL", "RSQRT", "SUB"
    ),
    _layers.LeakyReLU: _floats("leaky_relu", "LEAKY_RELU"),
    _layers.MaxPooling1D: _codes("max_pool", True, "MAX_POOL_2D"),
    _layers.MaxPooling2D: _codes("max_pool", operator="MAX_POOL_2D"),
    _layers.MultiHeadAttention: _parts("attention", "BATCH_MATMUL", "SOFTMAX"),
    _layers.Multiply: Row("multiply", is_float=True, operators=("MUL",)),
    _layers.Permute: _codes("permute", operator="TRANSPOSE"),
    _layers.PReLU: _floats("prelu", "PRELU"),
    _layers.ReLU: Row("relu", is_float=True),
    _layers.Reshape: _codes("reshape", True),
    _layers.UpSampling1D: _codes("upsample", True, "RESIZE_NEAREST_NEIGHBOR"),
    _layers.UpSampling2D: _codes("upsample", True, "RESIZE_NEAREST_NEIGHBOR"),
    _layers.ZeroPadding1D: _codes("zero_pad", operator="PAD"),
    _layers.ZeroPadding2D: _codes("zero_pad", operator="PAD"),
    plain_layers.Affine: Row("affine", is_float=True),
    plain_layers.ArgMax: Row("argmax", ARGMAX, operators=("ARG_MAX",)),
    plain_layers.EdgePadding: Row("edge_pad"),
    twin.IntegerAdd: Row("integer_add"),
    twin.ToCodes: Row("to_codes"),
    twin.ToValues: Row("to_values"),
    plain_layers.ZeroPadding: _codes("zero_pad", operator="PAD"),
}
_INTERPOLATED = Row("interpolate", INTERPOLATE, True, True)
_INTEGER = {
    kind: Row(f"integer_{kind}", operators=operators)
    for kind, operators in _WEIGHTED.items()
}
INTEGER_KINDS = tuple(row.kind for row in _INTEGER.values())


def row_of(layer: keras.layers.Layer) -> Row | None:
    """The row of an unwrapped layer, or None."""
    if isinstance(layer, twin.IntegerLinear):
        return _INTEGER[layer.kind]
    if getattr(layer, "interpolation", "nearest") == "bilinear":
        return _INTERPOLATED if type(layer) is _layers.UpSampling2D else None
    return TABLE.get(type(layer))


def kind_of(layer: keras.layers.Layer) -> str:
    """The kind of an unwrapped layer, which must have a row."""
    row = row_of(layer)
    assert row is not None, f"{type(layer).__name__} has no row"
    return row.kind


def form_of(layer: keras.layers.Layer) -> str | None:
    """The form of an unwrapped layer if its type and settings decide it, else None."""
    row = row_of(layer)
    return None if row is None else row.form
