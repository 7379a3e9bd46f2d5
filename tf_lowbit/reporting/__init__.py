"""What a network costs, and how it and its values are shown."""

from tf_lowbit.reporting.cost import Cost, LayerCost, cost
from tf_lowbit.reporting.environment import environment
from tf_lowbit.reporting.page import report
from tf_lowbit.reporting.summary import Summary, summary

__all__ = ["Cost", "LayerCost", "Summary", "cost", "environment", "report", "summary"]
