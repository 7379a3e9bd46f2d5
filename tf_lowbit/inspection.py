"""What is quantized in a model: the one reader of TF-MOT's private attributes.

Callbacks, calibration, reports and export all ask here.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tf_lowbit.compat import is_keras3, keras, tf, tfmot
from tf_lowbit.quantizers import (
    ACTIVATION,
    WEIGHT,
    LowBitQuantizer,
    ResidualQuantizer,
)
from tf_lowbit.scheme import graph, passing, registry

_Wrapper = tfmot.quantization.keras.QuantizeWrapper
# Quantizer variables that say how to train and are no part of the network.
_STATE = ("bits", "calibrated")


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """One quantizer in a model, with its variables.

    Attributes:
        layer: the model's layer: TF-MOT's wrapper.
        role: "weight" or "activation".
        attribute: name of the weight ("kernel", ...), or "output".
        declared: the quantizer as the rules made it.
        variables: its variables, by name; `variables["bits"]` is what holds now.
        latent: the float weight variable that is trained; None for an activation.
    """

    layer: keras.layers.Layer
    role: str
    attribute: str
    declared: LowBitQuantizer
    variables: dict
    latent: tf.Variable | None = None

    @property
    def name(self) -> str:
        """A name that is unique in the network, such as `conv1/kernel`."""
        return f"{self.layer.name}/{self.attribute}"

    @property
    def quantizer(self) -> LowBitQuantizer:
        """The quantizer as it is now; `quantizer.bits` is what the rule asked for.

        It has no codes below zero where `declared` has some and `calibrate` saw that
        nothing is negative.
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
        """False for a range that is the default still.

        `calibrate` should set it and has not, and training has not moved it.
        """
        flag = self.variables.get("calibrated")
        return flag is None or bool(flag.numpy()) or self._is_trained()

    def _is_trained(self) -> bool:
        """Whether a learned step or clip is another than a new one of these bits."""
        names = [name for name, value in self.variables.items() if value.trainable]
        if not names:
            return False
        fresh = self.quantizer.build(None, "fresh", keras.layers.Layer())
        self.quantizer.assign_bits(fresh, self.bits)
        # Changing the bits rescales a step by way of other bits: that rounds.
        return not all(
            # On replicas a variable is no array.
            np.allclose(
                self.variables[name].numpy(), fresh[name].numpy(), rtol=1e-5, atol=0.0
            )
            for name in names
        )

    @property
    def is_residual(self) -> bool:
        """Whether it stands on a residual stream, at 8 bits whatever the rules say."""
        return isinstance(self.declared, ResidualQuantizer)

    @property
    def is_shortcut(self) -> bool:
        """Whether `shortcut_bits` set its bits, whatever the rules say."""
        return getattr(self.layer.quantize_config, "shortcut", False)

    @property
    def ceiling(self) -> float | None:
        """The value that the activation in the quantizer's place clips at: a ReLU6."""
        config = getattr(self.layer, "quantize_config", None)
        return 6.0 if getattr(config, "replaces", None) == "relu6" else None

    def assign_bits(self, bits: int) -> None:
        """Sets the bits of the next step, and what depends on them."""
        self.quantizer.assign_bits(self.variables, bits)

    def quantized(self):
        """The quantized weight: float32, the shape of `latent`.

        Raises:
            ValueError: for an activation, which has no value of its own.
        """
        self._needs_latent()
        return self.quantizer(self.latent, False, self.variables)

    def codes(self):
        """The integer codes of the weight: int32, the shape of `latent`."""
        self._needs_latent()
        return self.quantizer.codes(self.latent, self.variables)

    def _needs_latent(self):
        if self.latent is None:
            raise ValueError(
                f"Only weights have values of their own. Received: {self.name}"
            )


def networks(model: keras.Model) -> list[keras.Model]:
    """The low-bitwidth networks that a model trains.

    Args:
        model: a `LowBitTrainer`, whose students they are, or a network itself.

    Raises:
        ValueError: if it is no model of `tf_keras`.
    """
    if is_keras3(model):
        raise ValueError(
            "model must be a tf_keras Model: tf_lowbit.quantize and "
            "tf_lowbit.from_keras3 make one of a Keras 3 model. "
            f"Received: {type(model).__name__} of Keras 3"
        )
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"model must be a tf_keras Model. Received: {type(model).__name__}"
        )
    return list(getattr(model, "students", [model]))


def single_network(model: keras.Model) -> keras.Model:
    """The one network of a model or of a trainer.

    Raises:
        ValueError: if it is no model of `tf_keras`, or a trainer of several students.
    """
    found = networks(model)
    if len(found) > 1:
        raise ValueError(
            "model must be one network: choose one of trainer.students. "
            f"Received: a trainer of {len(found)}"
        )
    return found[0]


def spoilt_weight(model: keras.Model) -> str | None:
    """The name of a weight with a NaN or an infinity; None where all are finite."""
    for layer in model.layers:
        for weight in parameters(layer):
            if weight.dtype.is_floating and not np.isfinite(weight.numpy()).all():
                return weight.name
    return None


def quantized_tensors(model: keras.Model) -> Iterator[QuantizedTensor]:
    """Yields every quantizer of this library in a model, in the layers' order.

    Args:
        model: a model that `quantize` made, one built around such layers, or a
            `LowBitTrainer`, for those of its students.
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
    """The quantizers of a model, or an error where there is none.

    Raises:
        ValueError: if the model was not made by `quantize`, or has quantizers in a
            model among its layers, where they would be passed over.
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
            "which is flattened then, or hand each quantized network over by itself. "
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
    """The user's layer: what TF-MOT's wrapper holds, or the layer itself."""
    return layer.layer if isinstance(layer, _Wrapper) else layer


def short_name(variable: tf.Variable) -> str:
    """The last part of a variable's name: "kernel" of `conv1/kernel:0`."""
    return variable.name.split(":")[0].split("/")[-1]


def parameters(layer: keras.layers.Layer) -> list[tf.Variable]:
    """The layer's weights that inference needs, latent ones for quantized ones.

    Bits, flags and TF-MOT's step counter are state of the training and left out;
    learned steps and clips are in.
    """
    state = set()
    if isinstance(layer, _Wrapper):
        state.add(layer.optimizer_step.ref())
        tables = [variables for _, _, variables in layer._weight_vars]
        tables += [layer._output_quantizer_vars] if layer._output_quantizers else []
        state |= {table[k].ref() for table in tables for k in _STATE if k in table}
    return [weight for weight in layer.weights if weight.ref() not in state]


def learned_ranges(model: keras.Model) -> list[tf.Variable]:
    """The steps and clips that are trained, such as those of LSQ and PACT.

    To keep an optimizer's weight decay off them, before its first step:
    `optimizer.exclude_from_weight_decay(var_list=learned_ranges(model))`.

    Args:
        model: what `quantize` made; or a `LowBitTrainer`, for its students.
    """
    return [
        variable
        for tensor in quantized_tensors(model)
        for variable in tensor.variables.values()
        if variable.trainable
    ]


def input_activations(model: keras.Model) -> dict[str, list[QuantizedTensor | None]]:
    """Which activation quantizers stand in front of each weight layer.

    Args:
        model: a functional model, quantized or not.

    Returns:
        Layer name -> the quantizers that its inputs come from, behind pooling,
        padding, concatenation and the like; None for an input that is float.
    """
    model = single_network(model)
    by_layer = {
        tensor.layer.name: tensor
        for tensor in quantized_tensors(model)
        if tensor.role == ACTIVATION
    }
    found: dict[str, list] = {}
    for node in graph.calls(model):
        if registry.kernels(wrapped_layer(node.layer)):
            sources = found.setdefault(node.layer.name, [])
            for source in _sources(node.keras_inputs[0], by_layer):
                if source not in sources:
                    sources.append(source)
    return found


def _sources(tensor, by_layer) -> Iterator[QuantizedTensor | None]:
    # Each tensor once: paths part and join again.
    waiting, seen = [tensor], set()
    while waiting:
        tensor = waiting.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        node = graph.producer(tensor)
        if node.layer.name in by_layer:
            yield by_layer[node.layer.name]
        elif node.is_input or not passing.is_transparent(node):
            yield None
        else:
            waiting += reversed(passing.sources(node))


class ResidualAdd(NamedTuple):
    """An Add between grids.

    Attributes:
        name: the layer's name.
        inputs: for each tensor that it reads, the quantizer whose grid it is on; None
            for one on no grid.
        output: the residual quantizer behind it, or the quantized ReLU that alone
            reads it; None for neither.
    """

    name: str
    inputs: tuple[QuantizedTensor | None, ...]
    output: QuantizedTensor | None


def residual_adds(model: keras.Model) -> Iterator[ResidualAdd]:
    """Yields the Adds that have a residual quantizer, in the graph's order.

    Args:
        model: a functional model, quantized or not.
    """
    model = single_network(model)
    by_layer = {
        tensor.layer.name: tensor
        for tensor in quantized_tensors(model)
        if tensor.role == ACTIVATION
    }
    readers = graph.readers(model)
    outputs = {id(tensor) for tensor in model.outputs}
    for node in graph.calls(model):
        if not registry.is_add(node.layer):
            continue
        (output,) = graph.outputs_of(node)
        behind = {reader.layer.name for reader in readers.get(id(output), ())}
        (reader,) = behind if len(behind) == 1 else (None,)
        target = None if id(output) in outputs else by_layer.get(reader)
        inputs = tuple(_grid_of(tensor, by_layer) for tensor in node.keras_inputs)
        if any(t is not None and t.is_residual for t in (*inputs, target)):
            yield ResidualAdd(node.layer.name, inputs, target)


def _grid_of(tensor, by_layer) -> QuantizedTensor | None:
    node = graph.producer(tensor)
    if node.layer.name in by_layer:
        return by_layer[node.layer.name]
    if node.is_input or not passing.keeps_grid(node):
        return None
    return _grid_of(passing.sources(node)[0], by_layer)


def initialize_weight_ranges(model: keras.Model) -> None:
    """Starts learned weight steps from the weights that the model has now."""
    for tensor in quantized_tensors(model):
        if tensor.role == WEIGHT:
            tensor.quantizer.initialize(tensor.latent, tensor.variables)
