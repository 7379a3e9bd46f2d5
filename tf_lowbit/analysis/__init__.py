"""Analysis of a network: cost, report, sensitivity to rounding, and a bit search."""

from tf_lowbit.analysis.bit_search import allocate_bits
from tf_lowbit.analysis.cost import Cost, LayerCost, cost
from tf_lowbit.analysis.environment import environment
from tf_lowbit.analysis.page import report
from tf_lowbit.analysis.sensitivity import Sensitivity, sensitivity
from tf_lowbit.analysis.summary import Summary, summary

__all__ = [
    "Cost",
    "LayerCost",
    "Sensitivity",
    "Summary",
    "allocate_bits",
    "cost",
    "environment",
    "report",
    "sensitivity",
    "summary",
]
