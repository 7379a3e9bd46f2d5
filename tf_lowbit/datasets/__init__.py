"""Data sets as tf.data pipelines that can be resumed at any epoch."""

from tf_lowbit.datasets.catalog import load, names
from tf_lowbit.datasets.dataset import Dataset, Normalization

__all__ = ["Dataset", "Normalization", "load", "names"]
