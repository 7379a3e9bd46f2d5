"""Tensors in, tensors out: grids, straight-through gradients and schedules."""
