"""The base classes of all quantizers."""

import abc
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np

from tf_lowbit.compat import as_float32, keras, tf, tfmot
from tf_lowbit.core import grid
from tf_lowbit.quantizers import sampling

# The variables of a quantizer, by name.
Variables = dict[str, tf.Variable]
# The smallest learned step or clip. A step of zero would divide by zero, and a negative
# one would flip the grid (a known LSQ failure).
SMALLEST_RANGE = 1e-6
# Weights of less variance, a standard deviation of 1e-8, count as equal.
_LEAST_VARIANCE = 1e-16
WEIGHT = "weight"
ACTIVATION = "activation"
# Values of the variable `calibrated`, which is 0 before `calibrate`. The second value
# also means that the data held nothing below zero. Saved files have only this variable,
# so it holds both facts.
_CALIBRATED, _CALIBRATED_UNSIGNED = 1, 2


@keras.utils.register_keras_serializable(package="tf_lowbit")
class KeptPositive(keras.constraints.Constraint):
    """Keeps a learned step or clip at `SMALLEST_RANGE` or above after an update."""

    def __call__(self, value: tf.Tensor | tf.Variable) -> tf.Tensor:
        """Returns `max(value, SMALLEST_RANGE)`."""
        return tf.maximum(value, SMALLEST_RANGE)


def _parameters(kind: type) -> list[str]:
    """Names of a constructor's arguments; `**kwargs` are those of the next class."""
    names: list[str] = []
    for each in kind.__mro__:
        if constructor := vars(each).get("__init__"):
            own = inspect.signature(constructor).parameters
            names += [name for name in own if name not in names]
            if not any(p.kind == p.VAR_KEYWORD for p in own.values()):
                break
    return names


class LowBitQuantizer(tfmot.quantization.keras.quantizers.Quantizer, abc.ABC):
    """A TF-MOT `Quantizer` whose bit-width is a variable.

    The quantizer holds configuration; its layer holds the variables. `build` returns
    the variables as a dict: `bits` (scalar int32), and what a subclass adds in
    `build_range`. The other methods take this dict as `variables` (TF-MOT: `weights`).
    Assigning `variables["bits"]` takes effect at the next step and never retraces.
    `assign_bits` also adapts the range.

    Inputs may have any floating dtype. Arithmetic is in float32, and the result has the
    dtype of the inputs.

    Attributes:
        bits: Bit-width of the quantizer's rule, and at the start.
        signed: Whether codes below zero exist.
        narrow_range: Whether the lowest signed code is left out.
        per_axis: Whether each output channel has its own step.
    """

    signed = True
    narrow_range = False
    per_axis = False
    needs_calibration = False
    role: str

    def __init__(self, bits: int):
        self.bits = grid.validate_bits(bits)

    def build(
        self,
        tensor_shape: tf.TensorShape | None,
        name: str,
        layer: keras.layers.Layer,
    ) -> Variables:
        """Makes the variables on `layer`; `name` prefixes their names."""
        variables = {"bits": self.add_state(layer, f"{name}_bits", self.bits, tf.int32)}
        self.build_range(tensor_shape, name, layer, variables)
        return variables

    # AutoGraph is not needed and would slow down tracing.
    @tf.autograph.experimental.do_not_convert
    def __call__(
        self,
        inputs: tf.Tensor | tf.Variable,
        training: bool | tf.Tensor | None,
        weights: Variables,
        **kwargs: Any,
    ) -> tf.Tensor:
        """Quantizes `inputs`, in training and inference alike.

        Within `sampling.sampled`, a quantizer that is drawn as unquantized keeps its
        range and does not round; with raw weights, it does not change weights. Within
        `sampling.opened` it neither rounds nor clips.
        """
        values = as_float32(inputs)
        if sampling.is_open(weights):
            exact = self.exact(values, weights)
            top = sampling.ceiling(weights)
            exact = exact if top is None else tf.minimum(exact, top)
            return tf.cast(exact, inputs.dtype)
        is_quantized = sampling.drawn(weights)
        if is_quantized is not None:
            weights = sampling.with_rounding_bits(weights, is_quantized)
        outputs = self._quantize(values, weights)
        if (
            is_quantized is not None
            and self.role == WEIGHT
            and sampling.passes_raw_weights()
        ):
            outputs = tf.where(is_quantized, outputs, values)
        return tf.cast(outputs, inputs.dtype)

    def _quantize(self, values, weights):
        return self.quantize(values, weights)

    @abc.abstractmethod
    def quantize(self, inputs: tf.Tensor, variables: Variables) -> tf.Tensor:
        """Returns values on the grid, with the gradient that training uses.

        Args:
            inputs: Float32 tensor.
            variables: The quantizer's variables; in some calls also `rounding_bits`.

        Returns:
            Float32 tensor of the same shape.
        """

    @abc.abstractmethod
    def codes(self, inputs: tf.Tensor, variables: Variables) -> tf.Tensor:
        """Returns int32 codes in the shape of `inputs`, at 1 to 8 bits.

        `value = code * step`.
        """

    @abc.abstractmethod
    def step(self, inputs: tf.Tensor | None, variables: Variables) -> tf.Tensor:
        """Returns the step, the value of code 1: float32, broadcastable to `inputs`.

        Some steps depend on `inputs`, the tensor to quantize.
        """

    def assign_bits(self, variables: dict, bits: int) -> None:
        """Sets the bit-width of the next step: 1 to 8, or 16 or 32 for "not rounded".

        Raises:
            ValueError: For any other value.
        """
        variables["bits"].assign(grid.validate_bits(bits))

    def level_codes(self, bits: int) -> range:
        """Returns a range that holds every code of the grid at `bits` in [1, 8].

        Its step is 1; for odd codes from -n to n it is 2. It may hold codes that are
        not levels, for example if the levels are powers of two.
        """
        return grid.level_codes(
            bits, signed=self.signed, narrow_range=self.narrow_range
        )

    def level_count(self, bits: int) -> int:
        """Returns the number of levels at `bits` in [1, 8]."""
        return len(self.level_codes(bits))

    def exact(self, inputs: tf.Tensor, variables: Variables) -> tf.Tensor:
        """Returns the values that the grid approximates: float32, shape of `inputs`.

        They are the float32 inputs, or their ReLU if the quantizer replaces a ReLU.
        """
        return inputs if self.signed else tf.nn.relu(inputs)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, from the attributes of the same names."""
        names = [name for name in _parameters(type(self)) if name in vars(self)]
        values = {name: getattr(self, name) for name in names}
        # As JSON has them.
        return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}

    def __eq__(self, other):
        return type(self) is type(other) and self.get_config() == other.get_config()

    def __hash__(self):
        return hash((type(self), repr(self.get_config())))

    def __repr__(self):
        arguments = ", ".join(f"{k}={v!r}" for k, v in self.get_config().items())
        return f"{type(self).__name__}({arguments})"

    def build_range(
        self,
        tensor_shape: tf.TensorShape | None,
        name: str,
        layer: keras.layers.Layer,
        variables: Variables,
    ) -> None:
        """Adds the subclass's variables, by `add_state` and `add_learned`."""

    @staticmethod
    def rounding_bits(variables: Variables) -> tf.Tensor:
        """Returns the bits to round to: `bits`, or "not rounded" within the same range.

        `quantize` must round by them and not by `variables["bits"]`: stochastic
        precision sets "not rounded" in steps that draw the quantizer as unquantized.
        """
        return tf.convert_to_tensor(variables.get("rounding_bits", variables["bits"]))

    @staticmethod
    def add_state(
        layer: keras.layers.Layer,
        name: str,
        value: float,
        dtype: tf.DType = tf.float32,
        shape: Sequence[int] = (),
    ) -> tf.Variable:
        """Adds a non-trainable variable with the same value on every replica."""
        return layer.add_weight(
            name=name,
            shape=shape,
            dtype=dtype,
            initializer=keras.initializers.Constant(value),
            trainable=False,
            experimental_autocast=False,
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )

    @staticmethod
    def add_learned(
        layer: keras.layers.Layer,
        name: str,
        value: float,
        shape: Sequence[int] = (),
        regularizer: keras.regularizers.Regularizer | None = None,
    ) -> tf.Variable:
        """Adds a trainable, positive float32 variable: a learned step or clip."""
        _list_layer_weights_first(layer)
        return layer.add_weight(
            name=name,
            shape=shape,
            dtype=tf.float32,
            initializer=keras.initializers.Constant(value),
            regularizer=regularizer,
            constraint=KeptPositive(),
            trainable=True,
            experimental_autocast=False,
        )


class ActivationQuantizer(LowBitQuantizer):
    """A quantizer of activations.

    Attributes:
        replaces_relu: Whether it clips at zero, and so replaces a ReLU.
        has_fixed_clip: Whether the method fixes the range. Then the class has `misfit`.
    """

    role = ACTIVATION
    signed = False
    has_fixed_clip = False

    def unsigned(self) -> "ActivationQuantizer | None":
        """Returns the same quantizer without codes below zero, on the same variables.

        None if it is unsigned already or its constructor has no argument `signed`.
        """
        config = self.get_config()
        if not config.get("signed"):
            return None
        return type(self).from_config({**config, "signed": False})

    def present(self, variables: dict) -> "ActivationQuantizer":
        """Returns the quantizer in use: this, or `unsigned()` if data had no negatives.

        Do not call it within `tf.function`: it reads the value of a variable.
        """
        unsigned = self.unsigned()
        if unsigned is None or not self._can_lose_sign(variables):
            return self
        is_unsigned = int(variables["calibrated"].numpy()) == _CALIBRATED_UNSIGNED
        return unsigned if is_unsigned else self

    def assign_sign(self, samples: Sequence[np.ndarray], variables: Variables) -> None:
        """Drops the codes below zero if no sample is negative, else restores them.

        Does nothing if all samples are zero, or without a variable `calibrated`.
        `samples` is as in `calibrate`.
        """
        if self._can_lose_sign(variables) and any(np.any(s) for s in samples):
            is_signed = any(np.min(sample, initial=0.0) < 0 for sample in samples)
            variables["calibrated"].assign(
                _CALIBRATED if is_signed else _CALIBRATED_UNSIGNED
            )

    @staticmethod
    def mark_calibrated(variables: dict) -> None:
        """Records in `calibrated` that the range is from data; keeps the sign."""
        variables["calibrated"].assign(tf.maximum(variables["calibrated"], _CALIBRATED))

    def _add_calibrated(self, name, layer, variables):
        variables["calibrated"] = self.add_state(
            layer, f"{name}_calibrated", 0, tf.int32
        )

    def _can_lose_sign(self, variables):
        return "calibrated" in variables and self.unsigned() is not None

    def _quantize(self, values, weights):
        if not self._can_lose_sign(weights):
            return self.quantize(values, weights)
        # A variable decides, so checkpoints hold the sign and no retrace is needed.
        # Both branches are computed: replicas get no gradients through a conditional.
        return tf.where(
            weights["calibrated"] == _CALIBRATED_UNSIGNED,
            self.unsigned().quantize(values, weights),
            self.quantize(values, weights),
        )

    @property
    def replaces_relu(self) -> bool:
        """Whether it clips at zero, and so replaces a ReLU."""
        return not self.signed

    def calibrate(self, samples: Sequence[np.ndarray], variables: Variables) -> None:
        """Sets the range from data. Does nothing if the method fixes the range.

        Args:
            samples: List of float32 NumPy arrays, one per batch: the quantizer's
                inputs.
            variables: The quantizer's variables.
        """


class WeightQuantizer(LowBitQuantizer):
    """A quantizer of weights.

    Attributes:
        standardize: Whether weights are standardized before rounding (`prepared`). Then
            the layer needs a normalization behind it, to absorb the scale.
    """

    role = WEIGHT
    standardize = False

    def prepared(self, weights: tf.Tensor | tf.Variable) -> tf.Tensor:
        """Returns the latent weights to round: float32, standardized if `standardize`.

        `(w - mean) / std` over the whole tensor, with the biased deviation. The
        gradient includes it. Weights that are all equal become 0.
        """
        weights = as_float32(weights)
        if not self.standardize:
            return weights
        mean, variance = _moments(weights)
        return (weights - mean) * tf.math.rsqrt(variance)

    def exact(self, inputs: tf.Tensor, variables: Variables) -> tf.Tensor:
        """See `LowBitQuantizer.exact`: the weights, standardized if `standardize`."""
        return super().exact(self.prepared(inputs), variables)

    def latent(
        self, codes: tf.Tensor, weights: tf.Tensor, variables: Variables
    ) -> tf.Tensor:
        """Returns latent weights that lie on the levels of `codes`, not between two.

        `codes * step`, with the standardization undone. Override it if `quantize`
        transforms weights in another way before it rounds.

        Args:
            codes: Integers of any dtype.
            weights: The current latent weights, in the shape of `codes`. The step and
                other statistics are computed from them.
            variables: The quantizer's variables, at 1 to 8 bits.

        Returns:
            Float32 tensor in the shape of `codes`. Without a gradient.
        """
        values = tf.cast(codes, tf.float32) * self.step(weights, variables)
        return self.unprepared(values, weights)

    def unprepared(self, values: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
        """Returns the weights that `prepared` turns into `values`.

        Mean and deviation are those of `weights`.
        """
        if not self.standardize:
            return values
        mean, variance = _moments(as_float32(weights))
        return values * tf.sqrt(variance) + mean

    def initialize(self, weights: tf.Variable, variables: Variables) -> None:
        """Sets the range from the latent weights. Does nothing without a range."""


def channel_shape(
    tensor_shape: Sequence[int], channel_axes: Sequence[int]
) -> tuple[int, ...]:
    """Returns the shape of a per-channel step: 1 on all other axes.

    Raises:
        ValueError: If the tensor has no such axis.
    """
    rank = len(tensor_shape)
    if not all(-rank <= axis < rank for axis in channel_axes):
        raise ValueError(
            f"channel_axes must be axes of a tensor of rank {rank}. "
            f"Received: channel_axes={tuple(channel_axes)}"
        )
    kept = {axis % rank for axis in channel_axes}
    return tuple(int(d) if i in kept else 1 for i, d in enumerate(tensor_shape))


def shared_axes(tensor_shape: Sequence[int], channel_axes: Sequence[int]) -> list[int]:
    """Returns the axes along which a per-channel step is the same."""
    shape = channel_shape(tensor_shape, channel_axes)
    return [axis for axis, size in enumerate(shape) if size == 1]


def scaled_gradient(value: tf.Tensor, factor: float) -> tf.Tensor:
    """Returns `value`, whose gradient is multiplied by a factor."""
    if factor == 1.0:
        return value
    fixed = tf.stop_gradient(value)
    return fixed + factor * (value - fixed)


def _moments(weights) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns mean and biased variance of a whole tensor; the variance is not zero."""
    mean, variance = tf.nn.moments(weights, list(range(weights.shape.rank)))
    return mean, tf.maximum(variance, _LEAST_VARIANCE)


def _list_layer_weights_first(wrapper) -> None:
    """Lists the wrapped layer's weights before the quantizer's own.

    TF-MOT's wrapper lists the weights of a built layer before the quantizer's, and
    those of a new layer after them. Loading by order (h5) needs one order.
    """
    listed = {id(weight) for weight in wrapper._trainable_weights}
    for weight in getattr(getattr(wrapper, "layer", None), "trainable_weights", ()):
        if id(weight) not in listed:
            wrapper._trainable_weights.append(weight)
