"""Keras callbacks that carry schedules out, watch and recover trainings."""

from tf_lowbit.callbacks.monitoring import QuantizationMonitor
from tf_lowbit.callbacks.oscillation_freezing import OscillationFreezing
from tf_lowbit.callbacks.recovery import Position, Recovery
from tf_lowbit.callbacks.reestimation import BatchNormReestimation
from tf_lowbit.callbacks.staging import StagedPrecision

__all__ = [
    "BatchNormReestimation",
    "OscillationFreezing",
    "Position",
    "QuantizationMonitor",
    "Recovery",
    "StagedPrecision",
]
