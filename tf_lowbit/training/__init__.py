"""Training low-bitwidth networks: stochastic precision and joint distillation."""

from tf_lowbit.training.distillation import JointDistillation
from tf_lowbit.training.stochastic_precision import StochasticPrecision
from tf_lowbit.training.trainer import LowBitTrainer

__all__ = ["JointDistillation", "LowBitTrainer", "StochasticPrecision"]
