"""Train Keras networks with 1- to 8-bit weights and activations."""

from tf_lowbit import callbacks, export, inspection, quantizers
from tf_lowbit.api import quantize
from tf_lowbit.batch_norm import recalibrate_batch_norm
from tf_lowbit.bit_allocation import Sensitivity, allocate_bits, sensitivity
from tf_lowbit.calibration import calibrate, tie_residuals
from tf_lowbit.core.schedules import LinearRamp, weight_decay_at_bits
from tf_lowbit.core.stages import (
    Stage,
    progressive,
    split_epochs,
    two_stage,
    two_stage_progressive,
)
from tf_lowbit.keras3 import from_keras3
from tf_lowbit.keras3_inference import to_keras3
from tf_lowbit.reporting import Cost, Summary, cost, report, summary
from tf_lowbit.requantization import requantize, strip
from tf_lowbit.saving import load_model
from tf_lowbit.scheme.layout import QuantizationWarning
from tf_lowbit.scheme.registry import register_layer
from tf_lowbit.scheme.rules import PrecisionRule
from tf_lowbit.scheme.scheme import LowBitScheme
from tf_lowbit.separable import split_separable
from tf_lowbit.tensor_statistics import TensorStatistics, statistics
from tf_lowbit.training import (
    JointDistillation,
    LowBitTrainer,
    StochasticPrecision,
)
from tf_lowbit.version import __version__

__all__ = [
    "Cost",
    "JointDistillation",
    "LinearRamp",
    "LowBitScheme",
    "LowBitTrainer",
    "PrecisionRule",
    "QuantizationWarning",
    "Sensitivity",
    "Stage",
    "StochasticPrecision",
    "Summary",
    "TensorStatistics",
    "__version__",
    "allocate_bits",
    "calibrate",
    "callbacks",
    "cost",
    "export",
    "from_keras3",
    "inspection",
    "load_model",
    "progressive",
    "quantize",
    "quantizers",
    "recalibrate_batch_norm",
    "register_layer",
    "report",
    "requantize",
    "sensitivity",
    "split_epochs",
    "split_separable",
    "statistics",
    "strip",
    "summary",
    "tie_residuals",
    "to_keras3",
    "two_stage",
    "two_stage_progressive",
    "weight_decay_at_bits",
]
