"""Converts models between float and quantized, and to Keras 3; loads them."""
