"""What every quantizer of this library has in common."""

import abc

import numpy as np

from tf_lowbit.compat import as_float32, keras, tf, tfmot
from tf_lowbit.core import checks, grid
from tf_lowbit.quantizers import sampling

# The smallest learned step or clip. A step that reaches zero would divide by zero,
# and one that turns negative would flip the grid (a known LSQ failure).
SMALLEST_RANGE = 1e-6
# Below it weights count as all equal: a deviation of 1e-8.
_LEAST_VARIANCE = 1e-16
WEIGHT = "weight"
ACTIVATION = "activation"
# Values of the variable `calibrated`, 0 before `calibrate`. The second one also says
# that data held nothing below zero. One variable for both: files of earlier versions
# have no other.
_CALIBRATED, _CALIBRATED_UNSIGNED = 1, 2


@keras.utils.register_keras_serializable(package="tf_lowbit")
class KeptPositive(keras.constraints.Constraint):
    """Keeps a learned step or clip at `SMALLEST_RANGE` or above after an update."""

    def __call__(self, value):
        """Returns `max(value, SMALLEST_RANGE)`."""
        return tf.maximum(value, SMALLEST_RANGE)


class LowBitQuantizer(tfmot.quantization.keras.quantizers.Quantizer, abc.ABC):
    """A TF-MOT `Quantizer` whose bit-width is a variable.

    The object holds configuration; the layer holds the variables. `build` returns
    them as a dict that comes back as `weights`: `bits` (scalar int32) always, and
    what a subclass adds in `build_range`. Assigning `weights["bits"]` changes the next
    step and never retraces; `assign_bits` does so and lets the quantizer adapt its
    range.

    Arithmetic is float32 whatever the dtype of the inputs; the result has their
    dtype.

    Attributes:
        bits: the bits that the quantizer is meant for, and its first ones.
        signed: whether codes below zero exist.
        narrow_range: whether the lowest signed code is left out.
        per_axis: whether there is a step for each output channel.
    """

    signed = True
    narrow_range = False
    per_axis = False
    needs_calibration = False
    role: str

    def __init__(self, bits: int):
        self.bits = grid.validate_bits(bits)

    def build(self, tensor_shape, name: str, layer) -> dict:
        """Makes the variables on `layer`; `name` prefixes theirs."""
        variables = {"bits": self.add_state(layer, f"{name}_bits", self.bits, tf.int32)}
        self.build_range(tensor_shape, name, layer, variables)
        return variables

    # Nothing below needs AutoGraph, and converting it makes tracing slower.
    @tf.autograph.experimental.do_not_convert
    def __call__(self, inputs, training, weights, **kwargs):
        """Quantizes `inputs`; the same in training and inference.

        Within `sampling.sampled`, a quantizer that is drawn unquantized keeps its
        range and does not round; with raw weights, weights pass as they are. Within
        `sampling.opened` it neither rounds nor clips.
        """
        del training, kwargs
        values = as_float32(inputs)
        if sampling.is_open(weights):
            exact = self.exact(values, weights)
            top = sampling.ceiling(weights)
            exact = exact if top is None else tf.minimum(exact, top)
            return tf.cast(exact, inputs.dtype)
        is_quantized = sampling.drawn(weights)
        if is_quantized is not None:
            weights = sampling.with_rounding_bits(weights, is_quantized)
        outputs = self._quantize_at_present(values, weights)
        if (
            is_quantized is not None
            and self.role == WEIGHT
            and sampling.passes_raw_weights()
        ):
            outputs = tf.where(is_quantized, outputs, values)
        return tf.cast(outputs, inputs.dtype)

    def _quantize_at_present(self, values, weights):
        return self.quantize(values, weights)

    @abc.abstractmethod
    def quantize(self, inputs, variables: dict):
        """Values on the grid, with the gradient that training uses.

        Args:
            inputs: float32 tensor.
            variables: what `build` returned; for one call they may hold
                `rounding_bits` besides, which `rounding_bits` reads.

        Returns:
            Float32 tensor of the same shape.
        """

    @abc.abstractmethod
    def codes(self, inputs, variables: dict):
        """Integer codes: int32, the shape of `inputs`; `value = code * step`.

        Args:
            inputs: tensor of any floating dtype.
            variables: what `build` returned, at 1 to 8 bits.
        """

    @abc.abstractmethod
    def step(self, inputs, variables: dict):
        """The step between neighbouring integers: float32, broadcastable.

        Args:
            inputs: the tensor to be quantized, on which some steps depend.
            variables: what `build` returned.
        """

    def assign_bits(self, variables: dict, bits: int) -> None:
        """Sets the bit-width that the next step uses.

        Args:
            variables: what `build` returned.
            bits: 1 to 8, or 16 or 32 for "not rounded".

        Raises:
            ValueError: for any other value.
        """
        variables["bits"].assign(grid.validate_bits(bits))

    def level_codes(self, bits: int) -> range:
        """A range that holds every code of the grid at `bits` in [1, 8].

        Of step 1; or of step 2 from -n to n, the odd codes. Not all of them need be
        levels, as where those are powers of two.
        """
        return grid.level_codes(
            bits, signed=self.signed, narrow_range=self.narrow_range
        )

    def level_count(self, bits: int) -> int:
        """How many levels the grid has at `bits` in [1, 8]."""
        return len(self.level_codes(bits))

    def exact(self, inputs, variables: dict):
        """What the values on the grid stand for: float32, the shape of `inputs`.

        The inputs themselves, or behind a ReLU where the quantizer takes its place.

        Args:
            inputs: float32 tensor.
            variables: what `build` returned.
        """
        del variables
        return inputs if self.signed else tf.nn.relu(inputs)

    def get_config(self) -> dict:
        """The constructor's arguments."""
        return {"bits": self.bits}

    def __eq__(self, other):
        return type(self) is type(other) and self.get_config() == other.get_config()

    def __hash__(self):
        return hash((type(self), repr(self.get_config())))

    def __repr__(self):
        arguments = ", ".join(f"{k}={v!r}" for k, v in self.get_config().items())
        return f"{type(self).__name__}({arguments})"

    def build_range(self, tensor_shape, name, layer, variables):
        """Adds what the subclass needs to `variables`: `add_state`, `add_learned`.

        Args:
            tensor_shape: of what is quantized.
            name: prefix of the variables' names.
            layer: that holds them.
            variables: dict that gets them, by short names.
        """

    @staticmethod
    def rounding_bits(variables):
        """The bits to round to: `bits`, or "not rounded" within the same range.

        What `quantize` must round by, in place of `variables["bits"]`: stochastic
        precision leaves it unrounded in the steps in which it is not drawn.
        """
        return tf.convert_to_tensor(variables.get("rounding_bits", variables["bits"]))

    @staticmethod
    def add_state(layer, name, value, dtype=tf.float32, shape=()):
        """A non-trainable variable that is the same on every replica.

        Args:
            layer: that holds it.
            name: of the variable.
            value: at first.
            dtype: of the variable.
            shape: of the variable.
        """
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
    def add_learned(layer, name, value, shape=(), regularizer=None):
        """A trainable, positive float32 variable: a step or a clip that is learned.

        Args:
            layer: that holds it.
            name: of the variable.
            value: at first.
            shape: of the variable.
            regularizer: of the variable, or None.
        """
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
        replaces_relu: the unsigned ones are quantized ReLUs by themselves.
        has_fixed_clip: whether the method fixes the range, and there is a `misfit`.
    """

    role = ACTIVATION
    signed = False
    has_fixed_clip = False

    def unsigned(self) -> "ActivationQuantizer | None":
        """The same quantizer without codes below zero, on the same variables.

        None where this one is it, or its method has none: then its constructor has no
        argument `signed`.
        """
        config = self.get_config()
        if not config.get("signed"):
            return None
        return type(self).from_config({**config, "signed": False})

    def present(self, variables: dict) -> "ActivationQuantizer":
        """What quantizes now: this, or `unsigned()` where data held nothing below zero.

        Args:
            variables: what `build` returned. Outside of `tf.function` alone: the answer
                is read from `calibrated` and may change.
        """
        if not self._can_lose_sign(variables):
            return self
        is_unsigned = int(variables["calibrated"].numpy()) == _CALIBRATED_UNSIGNED
        return self.unsigned() if is_unsigned else self

    def assign_sign(self, samples, variables: dict) -> None:
        """Leaves codes below zero out where no sample is negative; else has them.

        Samples without any value but zero tell nothing and change nothing. Nor does a
        quantizer change that has no variable `calibrated`.

        Args:
            samples: as in `calibrate`.
            variables: what `build` returned.
        """
        if self._can_lose_sign(variables) and any(np.any(s) for s in samples):
            is_signed = any(np.min(sample, initial=0.0) < 0 for sample in samples)
            variables["calibrated"].assign(
                _CALIBRATED if is_signed else _CALIBRATED_UNSIGNED
            )

    @staticmethod
    def mark_calibrated(variables: dict) -> None:
        """Notes in `calibrated` that the range is from data; keeps the sign's note."""
        variables["calibrated"].assign(tf.maximum(variables["calibrated"], _CALIBRATED))

    def _can_lose_sign(self, variables):
        return "calibrated" in variables and self.unsigned() is not None

    def _quantize_at_present(self, values, weights):
        if not self._can_lose_sign(weights):
            return self.quantize(values, weights)
        # A variable, so that checkpoints hold it and nothing is traced anew.
        # Both are computed: on replicas a conditional cannot hold their gradients.
        return tf.where(
            weights["calibrated"] == _CALIBRATED_UNSIGNED,
            self.unsigned().quantize(values, weights),
            self.quantize(values, weights),
        )

    @property
    def replaces_relu(self) -> bool:
        """Whether the quantizer clips at zero, and so stands for the ReLU."""
        return not self.signed

    def calibrate(self, samples, variables: dict) -> None:
        """Sets the range from data. Does nothing where the method fixes it.

        Args:
            samples: list of float32 NumPy arrays: the quantizer's inputs, one
                array a batch.
            variables: what `build` returned.
        """


class WeightQuantizer(LowBitQuantizer):
    """A quantizer of weights.

    Attributes:
        standardize: whether weights are standardized in front of the grid
            (`prepared`). The next normalisation must take the scale up.
    """

    role = WEIGHT
    standardize = False

    def prepared(self, weights):
        """What is quantized: float32, standardized where `standardize` says so.

        `(w - mean) / std` over the whole tensor, the deviation the biased one. It is
        part of the gradient. Weights that are all equal become 0.

        Args:
            weights: tensor of any floating dtype: the latent weights.
        """
        weights = as_float32(weights)
        if not self.standardize:
            return weights
        axes = list(range(weights.shape.rank))
        mean, variance = tf.nn.moments(weights, axes)
        return (weights - mean) * tf.math.rsqrt(tf.maximum(variance, _LEAST_VARIANCE))

    def exact(self, inputs, variables):
        """See `LowBitQuantizer.exact`: the weights, standardized if they are so."""
        return super().exact(self.prepared(inputs), variables)

    def initialize(self, weights, variables: dict) -> None:
        """Sets the range from the weights. Does nothing where there is none.

        Args:
            weights: the latent weight variable.
            variables: what `build` returned.
        """


def channel_shape(tensor_shape, channel_axes) -> tuple[int, ...]:
    """The shape of a step for each channel: 1 off the channel axes."""
    rank = len(tensor_shape)
    kept = {axis % rank for axis in channel_axes}
    return tuple(int(d) if i in kept else 1 for i, d in enumerate(tensor_shape))


def shared_axes(tensor_shape, channel_axes) -> list[int]:
    """The axes along which a step for each channel is the same."""
    shape = channel_shape(tensor_shape, channel_axes)
    return [axis for axis, size in enumerate(shape) if size == 1]


def scaled_gradient(value, factor: float):
    """`value`, whose gradient is multiplied by a factor."""
    if factor == 1.0:
        return value
    fixed = tf.stop_gradient(value)
    return fixed + factor * (value - fixed)


def validate_gradient_factor(factor) -> float:
    """Returns `factor`, or raises an error that says what is allowed.

    Raises:
        ValueError: if it is not a number of at least 0.
    """
    return checks.number("gradient_factor", factor, at_least=0)


def _list_layer_weights_first(wrapper) -> None:
    """Puts the wrapped layer's weights ahead of the quantizer's own.

    TF-MOT's wrapper lists the weights of a layer that is built already before the
    quantizer's, and those of a fresh layer after them, so that a reload by order
    (h5) meets another order. Listing them here makes both the same.
    """
    listed = {id(weight) for weight in wrapper._trainable_weights}
    for weight in getattr(getattr(wrapper, "layer", None), "trainable_weights", ()):
        if id(weight) not in listed:
            wrapper._trainable_weights.append(weight)
