"""Names of a model's outputs, by which losses, metrics and targets are given.

Keras takes them from the layers that put the outputs out. Where a quantized network
has another layer at an output, its losses would be asked for under another name.
"""

from tf_lowbit.compat import keras


@keras.utils.register_keras_serializable(package="tf_lowbit")
class NamedOutputs(keras.Model):
    """A Functional model whose outputs have names of their own.

    Attributes:
        output_names: the names, in the order of the outputs.
    """

    def get_config(self):
        """As Keras's, with the names."""
        return {**super().get_config(), "output_names": list(self.output_names)}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """The model of a configuration, without weights."""
        others = {k: v for k, v in config.items() if k != "output_names"}
        model = super().from_config(others, custom_objects)
        # In place: a list that is set anew becomes a part of checkpoints.
        model.output_names[:] = config["output_names"]
        return model

    @classmethod
    def of(cls, network: keras.Model, names: list[str]) -> keras.Model:
        """A model of this class, of a Functional model's layers and other names."""
        model = cls(network._nested_inputs, network._nested_outputs, name=network.name)
        model.output_names[:] = names
        return model


def kept(source: keras.Model, target: keras.Model) -> keras.Model:
    """The target, with the names that the source's outputs have.

    Args:
        source: Functional model.
        target: Functional model with as many outputs, in the same order.

    Returns:
        The target itself, where it has them already; else a model of its layers.
    """
    if target.output_names == source.output_names:
        return target
    return NamedOutputs.of(target, source.output_names)
