"""Train Keras networks with 1- to 8-bit weights and activations."""

from tf_lowbit import callbacks, export, quantizers, recipes
from tf_lowbit.analysis import (
    Cost,
    Sensitivity,
    Summary,
    allocate_bits,
    cost,
    report,
    sensitivity,
    summary,
)
from tf_lowbit.calibration import batch_norm  # noqa: F401 (batch_norm.lag)
from tf_lowbit.calibration.activation_ranges import calibrate
from tf_lowbit.calibration.batch_norm import recalibrate_batch_norm
from tf_lowbit.calibration.residual_steps import tie_residuals
from tf_lowbit.conversion.keras3_inference import to_keras3
from tf_lowbit.conversion.quantization import quantize
from tf_lowbit.conversion.requantization import requantize, strip
from tf_lowbit.conversion.saving import load_model
from tf_lowbit.network import inspection
from tf_lowbit.network.keras3 import from_keras3
from tf_lowbit.network.layer_registry import register_layer
from tf_lowbit.network.separable import split_separable
from tf_lowbit.network.tensor_statistics import TensorStatistics, statistics
from tf_lowbit.scheme.layout import QuantizationWarning
from tf_lowbit.scheme.rules import PrecisionRule
from tf_lowbit.scheme.scheme import LowBitScheme
from tf_lowbit.training import JointDistillation, LowBitTrainer, StochasticPrecision
from tf_lowbit.training.schedules import LinearRamp, weight_decay_at_bits
from tf_lowbit.training.stages import (
    Stage,
    progressive,
    split_epochs,
    three_phase,
    two_stage,
    two_stage_progressive,
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
    "recipes",
    "register_layer",
    "report",
    "requantize",
    "sensitivity",
    "split_epochs",
    "split_separable",
    "statistics",
    "strip",
    "summary",
    "three_phase",
    "tie_residuals",
    "to_keras3",
    "two_stage",
    "two_stage_progressive",
    "weight_decay_at_bits",
]
