"""TF-MOT's wrapper, made to honour `trainable = False` and to reload from `.keras`."""

from tf_lowbit.compat import keras, tf, tfmot
from tf_lowbit.scheme import graph

_QuantizeWrapper = tfmot.quantization.keras.QuantizeWrapperV2


@keras.utils.register_keras_serializable(package="tf_lowbit")
class LowBitWrapper(_QuantizeWrapper):
    """TF-MOT's lists latent weights and learned steps as trainable even if frozen.

    And its wrapped layer, built before the wrapper when a `.keras` file is read, gets
    its weights in another order; this one's are saved and read by name.
    """

    def __init__(self, layer, quantize_config, **kwargs):
        super().__init__(layer, quantize_config, **kwargs)
        # TF-MOT calls the layer's `call`, around which Keras would add this loss.
        self._activity_regularizer = getattr(layer, "activity_regularizer", None)

    def add_weight(self, *args, **kwargs):
        """As Keras's; TF-MOT's step counter, too, is one and the same everywhere."""
        if kwargs.get("trainable") is False:
            same = tf.VariableAggregation.ONLY_FIRST_REPLICA
            kwargs.setdefault("aggregation", same)
        return super().add_weight(*args, **kwargs)

    def build(self, input_shape):
        """Builds thawed: the order of the weights must not hang on the flag."""
        trainable, self.trainable = self.trainable, True
        super().build(input_shape)
        self.trainable = trainable
        # With one, a SavedModel would trace the layer apart from this wrapper, which
        # hands it the quantized weights.
        self.layer.input_spec = None

    def compute_output_shape(self, input_shape):
        """That of the wrapped layer: quantization changes no shape."""
        return self.layer.compute_output_shape(input_shape)

    @property
    def trainable_weights(self):
        """None while the layer is frozen."""
        return super().trainable_weights if self.trainable else []

    @property
    def non_trainable_weights(self):
        """State, and all weights while the layer is frozen."""
        state = super().non_trainable_weights
        if self.trainable:
            return state
        return self._dedup_weights(super().trainable_weights + state)

    def get_config(self):
        """As TF-MOT's, but for the shape that the wrapped layer was built for."""
        config = super().get_config()
        # The wrapper builds it: built before, its weights had other names and places.
        config["layer"].pop("build_config", None)
        return config

    def get_build_config(self):
        """None: a call builds the layer, as in `quantize`, and scopes its weights."""
        return None

    def save_own_variables(self, store):
        """Writes all weights, the wrapped layer's among them, by name."""
        for name, weight in self._named_weights().items():
            store[name] = weight.numpy()

    def load_own_variables(self, store):
        """Reads what `save_own_variables` wrote, or Keras's in an older file.

        Raises:
            ValueError: if the file's weights are not this layer's.
        """
        if "0" in store.keys():
            # By number, without those of the wrapped layer: Keras wrote them so.
            super().load_own_variables(store)
            return
        weights = self._named_weights()
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        found = {name: tuple(store[name].shape) for name in store.keys()}
        if found != shapes:
            raise ValueError(
                f"The weights in the file must be those of layer {self.name!r}, "
                f"{shapes}. Received: {found}"
            )
        for name, weight in weights.items():
            weight.assign(store[name])

    def _named_weights(self) -> dict:
        """The weights by the last part of their name, numbered where it is taken."""
        taken: set[str] = set()
        return {
            graph.free_name(self._weight_name(weight.name), taken): weight
            for weight in self.weights
        }
