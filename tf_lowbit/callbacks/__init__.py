"""Keras callbacks that carry schedules out."""

from tf_lowbit.callbacks.staging import StagedPrecision

__all__ = ["StagedPrecision"]
