"""How quantizers meet a model through TF-MOT's `quantize_apply`."""
