"""Places quantizers in a model through TF-MOT's `quantize_apply`."""
