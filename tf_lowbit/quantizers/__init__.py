"""TF-MOT quantizers for 1 to 8 bits: one module per paper, and `residual` for Adds.

A quantizer holds configuration; its layer holds the variables. `get` finds a quantizer
by name.
"""

from tf_lowbit.quantizers.base import (
    ACTIVATION,
    WEIGHT,
    ActivationQuantizer,
    LowBitQuantizer,
    WeightQuantizer,
)
from tf_lowbit.quantizers.dorefa import DoReFaActivationQuantizer, DoReFaWeightQuantizer
from tf_lowbit.quantizers.lookup import deserialize, find, get, names, serialize
from tf_lowbit.quantizers.lsq import LSQActivationQuantizer, LSQWeightQuantizer
from tf_lowbit.quantizers.pact import PACTActivationQuantizer
from tf_lowbit.quantizers.residual import ResidualQuantizer
from tf_lowbit.quantizers.statsq import StatsQWeightQuantizer
from tf_lowbit.quantizers.uniform import (
    UniformActivationQuantizer,
    UniformWeightQuantizer,
)

__all__ = [
    "ACTIVATION",
    "WEIGHT",
    "ActivationQuantizer",
    "DoReFaActivationQuantizer",
    "DoReFaWeightQuantizer",
    "LSQActivationQuantizer",
    "LSQWeightQuantizer",
    "LowBitQuantizer",
    "PACTActivationQuantizer",
    "ResidualQuantizer",
    "StatsQWeightQuantizer",
    "UniformActivationQuantizer",
    "UniformWeightQuantizer",
    "WeightQuantizer",
    "deserialize",
    "find",
    "get",
    "names",
    "serialize",
]
