"""The integer model (twin) of a network, and the arithmetic of its kernels."""
