"""Validation of the fields in an archive's header."""

from typing import Any

from tf_lowbit.core import checks
from tf_lowbit.export.integer import int8_grids, kernels
from tf_lowbit.export.lowering import elementwise

# Fields of every layer.
COMMON = ("name", "type", "inputs", "shape", "input_grid", "grid", "arrays")


def _are(check, *counts):
    """A check for a list of one of the given lengths whose elements pass `check`."""
    return lambda value: (
        isinstance(value, list)
        and (not counts or len(value) in counts)
        and all(map(check, value))
    )


def _is_count(value) -> bool:
    return checks.is_integer(value) and value > 0


def _is_margin(value) -> bool:
    return checks.is_integer(value) and value >= 0


def _one_of(*values):
    return lambda value: isinstance(value, str) and value in values


_is_window = _one_of("valid", "same")
_are_pair = _are(_is_margin, 2)


def _are_margins(value) -> bool:
    return _are_pair(value) or _are(_are_pair, 2)(value)


_are_counts = _are(_is_count, 0, 1, 2)
# Setting -> check of its value.
_SETTINGS = {
    "activation": _one_of(*elementwise.FLOAT_ACTIVATIONS),
    "alpha": checks.is_number,
    "axis": checks.is_integer,
    "before": _are(checks.is_integer, 1, 2),
    "bits": lambda v: checks.is_integer(v) and 1 <= v <= 8,
    "cropping": _are_margins,
    "axes": lambda v: v in ([2, 2], [2, 1]),
    "dilation": _are_counts,
    "dilation_rate": _are_counts,
    "dims": lambda v: _are(_is_count)(v) and sorted(v) == list(range(1, len(v) + 1)),
    "excess": _are(checks.is_integer, 1, 2),
    "epsilon": lambda v: checks.is_number(v) and v >= 0,
    "keepdims": lambda v: isinstance(v, bool),
    "kernel": _one_of(*kernels.KERNELS, kernels.TFLM),
    "max_value": lambda v: v is None or (checks.is_number(v) and v >= 0),
    "padding": lambda v: _is_window(v) or _are_pair(v) or _are(_are_pair, 1, 2, 3)(v),
    "pool_size": _are_counts,
    "ratios": _are(_are(_is_count, 2), 2),
    "represents": lambda v: v is None or isinstance(v, str),
    "size": lambda v: _is_count(v) or _are_counts(v),  # One number for steps.
    "storage": lambda v: isinstance(v, str),
    "strides": _are_counts,
    "upscale": _is_count,
    "weight_grid": lambda v: isinstance(v, str),
    "weight_high": checks.is_integer,
    "weight_low": checks.is_integer,
    "weight_shape": _are(_is_count),
}


def are_texts(values: Any) -> bool:
    """Whether a value is a list of strings."""
    return _are(lambda v: isinstance(v, str))(values)


def grid(record: Any) -> int8_grids.Grid | None:
    """The grid of a record; None for floats.

    Raises:
        ValueError: For an invalid grid.
    """
    if record is None:
        return None
    made = int8_grids.Grid(**record)
    is_whole = all(map(checks.is_integer, (made.low, made.high, made.zero_point)))
    if not (
        is_whole
        and all(checks.is_number(v) and v > 0 for v in (made.step, made.scale))
        and made.clamp in int8_grids.CLAMPS
    ):
        raise ValueError(f"no tensor can have the grid {record}")
    int8_grids.check(made.step, made.low, made.high)
    return made


def check_record(record: Any) -> None:
    """Raises ValueError for an invalid field of a layer."""
    names = [record["name"], record["type"]]
    if not (are_texts(names) and all(names)):
        raise ValueError(f"name and type must be texts: {record['name']!r}")
    if not are_texts(record["inputs"]):
        raise ValueError(f"{record['name']} must read layers by name")
    if not _are(lambda v: v is None or _is_count(v))(record["shape"]):
        raise ValueError(f"{record['name']} has the shape {record['shape']}")
    for key, value in record.items():
        if key not in COMMON and not _SETTINGS.get(key, lambda v: False)(value):
            raise ValueError(f"{record['name']} has {key}={value!r}")
