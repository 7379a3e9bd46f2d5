"""What a network costs, apart from how it is shown."""

from tf_lowbit.report.cost import Cost, LayerCost, cost
from tf_lowbit.report.environment import environment
from tf_lowbit.report.summary import Summary, summary

__all__ = ["Cost", "LayerCost", "Summary", "cost", "environment", "summary"]
