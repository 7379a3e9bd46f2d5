"""Unrolling of recurrent layers into layers that a file can hold.

A cell becomes dense layers, activations, sums and products, which are called once for
each step. All steps share the dense layers, so a file holds their weights once.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from tf_lowbit.compat import KerasTensor, keras
from tf_lowbit.export.lowering import elementwise
from tf_lowbit.export.types import refusal

_layers = keras.layers
# TFLite Micro joins 10 tensors at once, XNNPACK 5.
_JOINED = 5
# From a part of a layer's name to an unused name.
Names = Callable[[str], str]


def require_plain(layer: keras.layers.Layer, inputs: int) -> None:
    """Raises `ExportError` for a recurrent layer of several inputs or a kept state."""
    if inputs != 1 or layer.stateful or layer.time_major:
        raise refusal(
            layer,
            "Recurrent layers must read one series and start from a state of zeros",
            "call it without initial_state, and make it without stateful and "
            "time_major",
            f"with {inputs} inputs, stateful={layer.stateful} and "
            f"time_major={layer.time_major}",
        )
    for function in (layer.activation, layer.recurrent_activation):
        if elementwise.function_name(function) is None:
            raise elementwise.unknown_activation(layer)


def unroll(
    layer: keras.layers.Layer, x: KerasTensor, name: str, free_name: Names
) -> KerasTensor:
    """Computes a recurrent layer by float stock layers, one set for each step.

    Args:
        layer: A built LSTM or GRU.
        x: Keras tensor [batch, steps, features].
        name: Name of the layer that outputs the result.
        free_name: Gives each other new layer its name.

    Returns:
        The layer's output for `x`: [batch, units], or [batch, steps, units].
    """
    steps = x.shape[1]
    cell = (_Lstm if type(layer) is _layers.LSTM else _Gru)(layer, x, free_name)
    order = range(steps)[:: -1 if layer.go_backwards else 1]
    outputs = []
    for step in order:
        crop = (step, steps - 1 - step)
        now = _layers.Cropping1D(crop, name=free_name("step"))(x) if steps > 1 else x
        outputs.append(cell(now))
    if not layer.return_sequences:
        return _layers.Reshape((layer.units,), name=name)(outputs[-1])
    return joined(outputs, 1, name, free_name)


def joined(
    parts: list[KerasTensor], axis: int, name: str, free_name: Names
) -> KerasTensor:
    """Concatenates tensors by layers of at most 5 inputs; the last one has the name."""
    while len(parts) > _JOINED:
        groups = [parts[i : i + _JOINED] for i in range(0, len(parts), _JOINED)]
        parts = [
            joined(group, axis, free_name("joined"), free_name) for group in groups
        ]
    if len(parts) == 1:
        return _layers.Activation("linear", name=name)(parts[0])
    return _layers.Concatenate(axis=axis, name=name)(parts)


class _Cell:
    """The layers of a cell, which is called once for each step."""

    def __init__(self, layer: Any, x: KerasTensor, free_name: Names):
        self._layer, self._free_name = layer, free_name
        cell = layer.cell
        units = layer.units
        self._kernel = cell.kernel.numpy()
        self._recurrent = cell.recurrent_kernel.numpy()
        bias = cell.bias.numpy() if layer.use_bias else np.zeros(self._kernel.shape[1])
        # A GRU with reset_after has two rows: for the input and for the state.
        self._biases = bias.reshape(-1, self._kernel.shape[1])
        self._parts = [slice(i * units, (i + 1) * units) for i in range(4)]
        first = _layers.Dense(
            units, use_bias=False, kernel_initializer="zeros", name=free_name("zeros")
        )
        steps = x.shape[1]
        crop = _layers.Cropping1D((0, steps - 1), name=free_name("first"))
        self._zeros = first(crop(x) if steps > 1 else x)

    def _dense(self, name, kernels, bias):
        """A dense layer of concatenated inputs, with one kernel for each input."""
        kernel = np.concatenate(kernels)
        made = _layers.Dense(self._layer.units, name=self._free_name(name))
        made.build((None, 1, len(kernel)))
        made.set_weights([kernel, bias])
        return made

    def _both(self, name, part):
        """A dense layer of the input concatenated with the state."""
        kernels = self._kernel[:, part], self._recurrent[:, part]
        return self._dense(name, kernels, self._biases[:, part].sum(axis=0))

    def _join(self, *tensors):
        return _layers.Concatenate(name=self._free_name("joined"))(tensors)

    def _add(self, *tensors):
        return _layers.Add(name=self._free_name("sum"))(tensors)

    def _multiply(self, *tensors):
        return _layers.Multiply(name=self._free_name("product"))(tensors)

    def _activated(self, x):
        return _layers.Activation(
            self._layer.activation, name=self._free_name("activation")
        )(x)

    def _gate(self, x):
        return _layers.Activation(
            self._layer.recurrent_activation, name=self._free_name("gate")
        )(x)


class _Lstm(_Cell):
    """`c = f c + i g`, `h = o tanh(c)` (Hochreiter and Schmidhuber, 1997)."""

    def __init__(self, layer: Any, x: KerasTensor, free_name: Names):
        super().__init__(layer, x, free_name)
        names = ("input", "forget", "candidate", "output")
        pairs = zip(names, self._parts, strict=True)
        self._gates = [self._both(name, part) for name, part in pairs]
        self._hidden = self._carry = self._zeros

    def __call__(self, x):
        """Computes one step; returns the hidden state."""
        both = self._join(x, self._hidden)
        i, f, g, o = (gate(both) for gate in self._gates)
        kept = self._multiply(self._gate(f), self._carry)
        self._carry = self._add(kept, self._multiply(self._gate(i), self._activated(g)))
        self._hidden = self._multiply(self._gate(o), self._activated(self._carry))
        return self._hidden


class _Gru(_Cell):
    """`h = z h + (1 - z) g` (arXiv:1406.1078).

    With `reset_after`, Keras's default, r multiplies the product of kernel and state.
    """

    def __init__(self, layer: Any, x: KerasTensor, free_name: Names):
        super().__init__(layer, x, free_name)
        update, reset, new, _ = self._parts
        self._update = self._both("update", update)
        self._reset = self._both("reset", reset)
        self._hidden = self._zeros
        if layer.reset_after:
            bias, state_bias = self._biases[0], self._biases[-1]
            if len(self._biases) == 1:
                state_bias = np.zeros_like(bias)
            self._new = self._dense("candidate", [self._kernel[:, new]], bias[new])
            self._state = self._dense(
                "state", [self._recurrent[:, new]], state_bias[new]
            )
        else:
            self._new = self._both("candidate", new)

    def __call__(self, x):
        """Computes one step; returns the hidden state."""
        both = self._join(x, self._hidden)
        z, r = self._gate(self._update(both)), self._gate(self._reset(both))
        if self._layer.reset_after:
            new = self._add(self._new(x), self._multiply(r, self._state(self._hidden)))
        else:
            new = self._new(self._join(x, self._multiply(r, self._hidden)))
        rest = _layers.Rescaling(-1.0, 1.0, name=self._free_name("rest"))(z)
        self._hidden = self._add(
            self._multiply(z, self._hidden),
            self._multiply(rest, self._activated(new)),
        )
        return self._hidden
