"""Names of a model's outputs, to which losses, metrics and targets refer.

Keras takes them from the output layers. A quantized network may have another output
layer, which would change the names.
"""

from typing import Any

from tf_lowbit.compat import keras


@keras.utils.register_keras_serializable(package="tf_lowbit")
class NamedOutputs(keras.Model):
    """A Functional model whose outputs have their own names.

    Attributes:
        output_names: The names, in the order of the outputs.
    """

    def get_config(self) -> dict[str, Any]:
        """Returns Keras's configuration with the names."""
        return {**super().get_config(), "output_names": list(self.output_names)}

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> "NamedOutputs":
        """Makes the model from its configuration, without weights."""
        others = {k: v for k, v in config.items() if k != "output_names"}
        model = super().from_config(others, custom_objects)
        # In place: Keras would track a newly assigned list in checkpoints.
        model.output_names[:] = config["output_names"]
        return model

    @classmethod
    def of(cls, network: keras.Model, names: list[str]) -> keras.Model:
        """Makes one from a Functional model's layers and new names."""
        model = cls(network._nested_inputs, network._nested_outputs, name=network.name)
        model.output_names[:] = names
        return model


def of_labels(model: keras.Model) -> list[str]:
    """Returns the names that labels have: the keys of a dict of outputs, or else names.

    They are in the order of the outputs.
    """
    nested = model._nested_outputs
    # Keras flattens a dict by its sorted keys.
    return sorted(nested) if isinstance(nested, dict) else list(model.output_names)


def kept(source: keras.Model, target: keras.Model) -> keras.Model:
    """Returns the target with the source's output names.

    Both are Functional models with outputs in the same order. If the names differ, the
    result is a new model of the target's layers.
    """
    if target.output_names == source.output_names:
        return target
    return NamedOutputs.of(target, source.output_names)
