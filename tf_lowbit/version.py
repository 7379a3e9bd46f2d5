"""The version of the library; setup.py reads it without importing anything."""

__version__ = "0.1.0"
