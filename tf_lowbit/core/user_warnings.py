"""Warnings that name the user's line, however deep in the library they are raised."""

import sys
import warnings

# Packages between that line and a warning. A context as a decorator is `contextlib`'s.
_BETWEEN = ("tf_lowbit", "tensorflow_model_optimization", "tf_keras", "contextlib")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns, at the first line outside of the library, TF-MOT and Keras.

    Args:
        message: The text.
        category: Class of the warning.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _package(frame) in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _package(frame) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]
