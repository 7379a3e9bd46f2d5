"""Finds the quantizers in a model.

Callbacks, calibration, reports and export use it. Only this module reads TF-MOT's
private attributes.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tf_lowbit.compat import is_keras3, keras, tf, tfmot
from tf_lowbit.network import graph, layer_registry, passthrough
from tf_lowbit.quantizers import ACTIVATION, WEIGHT, LowBitQuantizer, ResidualQuantizer

_Wrapper = tfmot.quantization.keras.QuantizeWrapper
# Quantizer variables that only training reads.
_STATE = ("bits", "calibrated")


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """One quantizer in a model, with its variables.

    Attributes:
        layer: Layer of the model: TF-MOT's wrapper.
        role: "weight" or "activation".
        attribute: Name of the weight ("kernel", ...), or "output".
        declared: The quantizer that the rules made.
        variables: Its variables by name; `variables["bits"]` is the current bit-width.
        latent: Float weight variable that is trained; None for an activation.
    """

    layer: keras.layers.Layer
    role: str
    attribute: str
    declared: LowBitQuantizer
    variables: dict
    latent: tf.Variable | None = None

    @property
    def name(self) -> str:
        """Name that is unique in the network, such as `conv1/kernel`."""
        return f"{self.layer.name}/{self.attribute}"

    @property
    def quantizer(self) -> LowBitQuantizer:
        """The quantizer in use; `quantizer.bits` are the bits of the rule.

        It is unsigned if `calibrate` saw no negative value, even if `declared` is
        signed.
        """
        if self.role == WEIGHT:
            return self.declared
        return self.declared.present(self.variables)

    @property
    def bits(self) -> int:
        """The bits that the next step uses."""
        return int(self.variables["bits"].numpy())

    @property
    def is_calibrated(self) -> bool:
        """False if `calibrate` should set the range, but it is still the default."""
        flag = self.variables.get("calibrated")
        return flag is None or bool(flag.numpy()) or self._is_trained()

    def _is_trained(self) -> bool:
        """Tells whether a learned step or clip differs from a new one at these bits."""
        names = [name for name, value in self.variables.items() if value.trainable]
        if not names:
            return False
        fresh = self.quantizer.build(None, "fresh", keras.layers.Layer())
        self.quantizer.assign_bits(fresh, self.bits)
        # Rescaling a step to other bits and back rounds.
        return not all(
            # On replicas a variable is not an array.
            np.allclose(
                self.variables[name].numpy(), fresh[name].numpy(), rtol=1e-5, atol=0.0
            )
            for name in names
        )

    @property
    def is_residual(self) -> bool:
        """Whether it is on a residual stream: 8 bits, independent of the rules."""
        return isinstance(self.declared, ResidualQuantizer)

    @property
    def is_shortcut(self) -> bool:
        """Whether `shortcut_bits` set its bits instead of the rules."""
        return getattr(self.layer.quantize_config, "shortcut", False)

    @property
    def ceiling(self) -> float | None:
        """6.0 if the quantizer replaced a ReLU6, else None."""
        config = getattr(self.layer, "quantize_config", None)
        return 6.0 if getattr(config, "replaces", None) == "relu6" else None

    def assign_bits(self, bits: int) -> None:
        """Sets the bits of the next step, and adapts the range."""
        self.quantizer.assign_bits(self.variables, bits)

    def quantized(self) -> tf.Tensor:
        """Returns the quantized weight: float32, the shape of `latent`.

        Raises:
            ValueError: For an activation, which has no stored value.
        """
        self._needs_latent()
        return self.quantizer(self.latent, False, self.variables)

    def codes(self) -> tf.Tensor:
        """Returns the integer codes of the weight: int32, the shape of `latent`."""
        self._needs_latent()
        return self.quantizer.codes(self.latent, self.variables)

    def _needs_latent(self):
        if self.latent is None:
            raise ValueError(
                "The tensor must be a weight: an activation has no stored value. "
                f"Received: {self.name}"
            )


def networks(model: keras.Model) -> list[keras.Model]:
    """Returns the students of a `LowBitTrainer`, or the network itself in a list.

    Raises:
        ValueError: If it is not a `tf_keras` model.
    """
    if is_keras3(model):
        raise ValueError(
            "model must be a tf_keras Model: tf_lowbit.quantize and "
            "tf_lowbit.from_keras3 convert a Keras 3 model. "
            f"Received: {type(model).__name__} of Keras 3"
        )
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"model must be a tf_keras Model. Received: {type(model).__name__}"
        )
    return list(getattr(model, "students", [model]))


def single_network(model: keras.Model) -> keras.Model:
    """Returns the one network of a model or trainer.

    Raises:
        ValueError: If it is not a `tf_keras` model, or a trainer of several students.
    """
    found = networks(model)
    if len(found) > 1:
        raise ValueError(
            "model must be one network: choose one of trainer.students. "
            f"Received: a trainer of {len(found)}"
        )
    return found[0]


def nonfinite_weight(model: keras.Model) -> str | None:
    """Returns the name of a weight with NaN or infinity; None if all are finite."""
    for layer in model.layers:
        for weight in parameters(layer):
            if weight.dtype.is_floating and not np.isfinite(weight.numpy()).all():
                return weight.name
    return None


def quantized_tensors(model: keras.Model) -> Iterator[QuantizedTensor]:
    """Yields every quantizer of this library in a model, in the layers' order.

    Args:
        model: A model from `quantize`, a model built around its layers, or a
            `LowBitTrainer` for its students.
    """
    for layer in (layer for network in networks(model) for layer in network.layers):
        if not isinstance(layer, _Wrapper):
            continue
        for latent, quantizer, variables in layer._weight_vars:
            if isinstance(quantizer, LowBitQuantizer):
                yield QuantizedTensor(
                    layer, WEIGHT, short_name(latent), quantizer, variables, latent
                )
        for quantizer in layer._output_quantizers[:1]:
            if isinstance(quantizer, LowBitQuantizer):
                yield QuantizedTensor(
                    layer,
                    ACTIVATION,
                    "output",
                    quantizer,
                    layer._output_quantizer_vars,
                )


def require_quantized(model: keras.Model) -> list[QuantizedTensor]:
    """Returns the quantizers of a model; refuses a model without any.

    Raises:
        ValueError: If `quantize` did not make the model, or quantized layers are in a
            nested model, where they would be missed.
    """
    within = [
        layer.name
        for network in networks(model)
        for layer in network.layers
        if isinstance(layer, keras.Model)
        and any(isinstance(part, _Wrapper) for part in layer.submodules)
    ]
    if within:
        raise ValueError(
            "Quantized layers must be the model's own: quantize the whole float model, "
            "which flattens it, or pass each quantized network separately. "
            f"Received: {within} within {model.name!r}"
        )
    found = list(quantized_tensors(model))
    if not found:
        raise ValueError(
            "model must be one that tf_lowbit.quantize made. Received: "
            f"{model.name!r}, in which nothing is quantized"
        )
    return found


def wrapped_layer(layer: keras.layers.Layer) -> keras.layers.Layer:
    """Returns the layer inside TF-MOT's wrapper, or the layer itself."""
    return layer.layer if isinstance(layer, _Wrapper) else layer


def short_name(variable: tf.Variable) -> str:
    """Returns the last part of a variable's name: "kernel" for `conv1/kernel:0`."""
    return variable.name.split(":")[0].split("/")[-1]


def parameters(layer: keras.layers.Layer) -> list[tf.Variable]:
    """Returns the weights that inference needs, with latent for quantized weights.

    Bits, flags and TF-MOT's step counter are training state and left out. Learned steps
    and clips are included.
    """
    state = set()
    if isinstance(layer, _Wrapper):
        state.add(layer.optimizer_step.ref())
        tables = [variables for _, _, variables in layer._weight_vars]
        tables += [layer._output_quantizer_vars] if layer._output_quantizers else []
        state |= {table[k].ref() for table in tables for k in _STATE if k in table}
    return [weight for weight in layer.weights if weight.ref() not in state]


def learned_ranges(model: keras.Model) -> list[tf.Variable]:
    """Returns the trained steps and clips, such as those of LSQ and PACT.

    To keep an optimizer's weight decay off them, call before its first step:
    `optimizer.exclude_from_weight_decay(var_list=learned_ranges(model))`.

    Args:
        model: A model from `quantize`, or a `LowBitTrainer` for its students.
    """
    return [
        variable
        for tensor in quantized_tensors(model)
        for variable in tensor.variables.values()
        if variable.trainable
    ]


def input_activations(model: keras.Model) -> dict[str, list[QuantizedTensor | None]]:
    """Maps each weight layer's name to the activation quantizers of its inputs.

    Pooling, padding, concatenation and the like may be in between. None means a float
    input. The functional model need not be quantized.
    """
    model = single_network(model)
    by_layer = _activations_by_layer(model)
    found: dict[str, list] = {}
    for node in graph.calls(model):
        if layer_registry.kernels(wrapped_layer(node.layer)):
            sources = found.setdefault(node.layer.name, [])
            for source in _sources(node.keras_inputs[0], by_layer):
                if source not in sources:
                    sources.append(source)
    return found


def _activations_by_layer(model) -> dict[str, QuantizedTensor]:
    return {
        tensor.layer.name: tensor
        for tensor in quantized_tensors(model)
        if tensor.role == ACTIVATION
    }


def _sources(tensor, by_layer) -> Iterator[QuantizedTensor | None]:
    # Paths fork and join, but each tensor is needed once.
    waiting, seen = [tensor], set()
    while waiting:
        tensor = waiting.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        node = graph.producer(tensor)
        if node.layer.name in by_layer:
            yield by_layer[node.layer.name]
        elif node.is_input or not passthrough.is_transparent(node):
            yield None
        else:
            waiting += reversed(passthrough.sources(node))


class ResidualAdd(NamedTuple):
    """An Add whose inputs or output are on a grid.

    Attributes:
        name: Name of the layer.
        inputs: For each input tensor, the quantizer of its grid; None if it has none.
        output: The residual quantizer behind it, or the quantized ReLU that is its only
            reader, or None.
    """

    name: str
    inputs: tuple[QuantizedTensor | None, ...]
    output: QuantizedTensor | None


def residual_adds(model: keras.Model) -> Iterator[ResidualAdd]:
    """Yields the Adds that have a residual quantizer, in the graph's order."""
    model = single_network(model)
    by_layer = _activations_by_layer(model)
    readers = graph.readers(model)
    outputs = {id(tensor) for tensor in model.outputs}
    for node in graph.calls(model):
        if not layer_registry.is_add(node.layer):
            continue
        (output,) = graph.outputs_of(node)
        behind = {reader.layer.name for reader in readers.get(id(output), ())}
        is_read_once = len(behind) == 1 and id(output) not in outputs
        target = by_layer.get(*behind) if is_read_once else None
        inputs = tuple(_grid_of(tensor, by_layer) for tensor in node.keras_inputs)
        if any(t is not None and t.is_residual for t in (*inputs, target)):
            yield ResidualAdd(node.layer.name, inputs, target)


def _grid_of(tensor, by_layer) -> QuantizedTensor | None:
    node = graph.producer(tensor)
    if node.layer.name in by_layer:
        return by_layer[node.layer.name]
    if node.is_input or not passthrough.keeps_grid(node):
        return None
    return _grid_of(passthrough.sources(node)[0], by_layer)


def initialize_weight_ranges(model: keras.Model) -> None:
    """Sets learned weight steps from the model's current weights."""
    for tensor in quantized_tensors(model):
        if tensor.role == WEIGHT:
            tensor.quantizer.initialize(tensor.latent, tensor.variables)
