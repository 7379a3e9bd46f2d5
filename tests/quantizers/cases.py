"""A table of quantizers, and what their tests share."""

import numpy as np

from tf_lowbit import quantizers
from tf_lowbit.compat import keras, tf

LOW_BITS = range(1, 9)
ALL_BITS = (*LOW_BITS, 16, 32)
IMPLEMENTATIONS = ("auto", "fused", "composed")

DoReFaWeight = quantizers.DoReFaWeightQuantizer
DoReFaActivation = quantizers.DoReFaActivationQuantizer
LSQWeight = quantizers.LSQWeightQuantizer
LSQActivation = quantizers.LSQActivationQuantizer
PACT = quantizers.PACTActivationQuantizer
StatsQWeight = quantizers.StatsQWeightQuantizer
UniformWeight = quantizers.UniformWeightQuantizer
UniformActivation = quantizers.UniformActivationQuantizer

# name -> (class, arguments other than the defaults)
WEIGHTS = {
    "dorefa": (DoReFaWeight, {}),
    "dorefa without the maximum": (DoReFaWeight, {"max_gradient": False}),
    "lsq": (LSQWeight, {}),
    "lsq narrow": (LSQWeight, {"narrow_range": True}),
    "lsq per channel": (LSQWeight, {"per_axis": True}),
    "uniform": (UniformWeight, {"per_axis": False}),
    "uniform per channel": (UniformWeight, {}),
    "uniform depthwise": (UniformWeight, {"channel_axes": (2, 3)}),
    "statsq": (StatsQWeight, {}),
    "statsq depthwise": (StatsQWeight, {"channel_axes": (2, 3)}),
    "dorefa standardized": (DoReFaWeight, {"standardize": True}),
    "lsq standardized": (LSQWeight, {"standardize": True}),
    "uniform standardized": (UniformWeight, {"standardize": True}),
    "statsq standardized": (StatsQWeight, {"standardize": True}),
}
ACTIVATIONS = {
    "dorefa": (DoReFaActivation, {}),
    "lsq": (LSQActivation, {}),
    "lsq signed": (LSQActivation, {"signed": True}),
    "pact": (PACT, {"alpha": 3.0}),
    "uniform": (UniformActivation, {"clip": 3.0}),
    "uniform signed": (UniformActivation, {"clip": 3.0, "signed": True}),
}
CASES = {
    **{f"weight {name}": case for name, case in WEIGHTS.items()},
    **{f"activation {name}": case for name, case in ACTIVATIONS.items()},
}


def make(name, bits):
    """The quantizer of a row of CASES."""
    cls, arguments = CASES[name]
    return cls(bits=bits, **arguments)


def with_bits(quantizer, bits):
    """The same quantizer, made for other bits."""
    return type(quantizer).from_config({**quantizer.get_config(), "bits": bits})


def build(quantizer, shape=(3, 3, 4, 8)):
    """The quantizer's variables, on a plain layer."""
    return quantizer.build(shape, "kernel", keras.layers.Layer())


def quantize(quantizer, variables, inputs):
    """The values as a NumPy array."""
    inputs = tf.convert_to_tensor(inputs, tf.float32)
    return quantizer(inputs, training=True, weights=variables).numpy()


def reconstruct(codes, step):
    """`code * step` in float32."""
    return np.asarray(codes, np.float32) * np.asarray(step, np.float32)


def gradients(quantizer, variables, inputs, upstream, name):
    """The gradients to the inputs and to the variable of that name (or None)."""
    inputs = tf.convert_to_tensor(inputs, tf.float32)
    sources = [inputs, variables[name]] if name else [inputs]
    with tf.GradientTape() as tape:
        tape.watch(sources)
        outputs = quantizer(inputs, training=True, weights=variables)
    found = tape.gradient(outputs, sources, tf.constant(upstream, tf.float32))
    return [None if g is None else g.numpy() for g in found]


def random_inputs(shape=(3, 3, 4, 8), spread=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(0, spread, shape).astype(np.float32)


def random_upstream(shape, seed=1):
    """Eighths of small integers: their sums are exact in float32 in any order."""
    rng = np.random.default_rng(seed)
    return (rng.integers(-16, 17, shape) / 8).astype(np.float32)
