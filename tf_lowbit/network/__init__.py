"""Keras networks: graph, layers, quantizers in them, variables, Keras 3 models."""
