"""From float models to quantized ones and back: quantize, strip, load, Keras 3."""
