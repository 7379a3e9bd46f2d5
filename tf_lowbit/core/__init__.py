"""Numerics without Keras models: grids, straight-through gradients, checks, files."""
