"""Proof that a file equals its integer model, and its measurement on data."""
