"""Whole trainings in one call: rules, calibration, teacher, optimizer and schedule."""

from tf_lowbit.recipes.low_bit import Recipe, low_bit

__all__ = ["Recipe", "low_bit"]
