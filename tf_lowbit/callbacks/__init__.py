"""Keras callbacks that carry schedules out, and that recover interrupted trainings."""

from tf_lowbit.callbacks.recovery import Position, Recovery
from tf_lowbit.callbacks.staging import StagedPrecision

__all__ = ["Position", "Recovery", "StagedPrecision"]
