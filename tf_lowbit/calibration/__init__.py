"""Measures on data, without training: ranges, and statistics of normalization."""
