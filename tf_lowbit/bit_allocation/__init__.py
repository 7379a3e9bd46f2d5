"""How much each layer suffers from few bits, and bits for each layer that follow."""

from tf_lowbit.bit_allocation.search import allocate_bits
from tf_lowbit.bit_allocation.sensitivity import Sensitivity, sensitivity

__all__ = ["Sensitivity", "allocate_bits", "sensitivity"]
