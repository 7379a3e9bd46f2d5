"""A wrapper for TF-MOT that respects `trainable = False` and `.keras` files."""

from typing import Any

from tf_lowbit.compat import KerasTensor, keras, tf, tfmot
from tf_lowbit.network import graph


@keras.utils.register_keras_serializable(package="tf_lowbit")
class LowBitWrapper(tfmot.quantization.keras.QuantizeWrapperV2):
    """A wrapper that can be frozen and loaded like the layer inside it.

    TF-MOT's wrapper lists latent weights and learned steps as trainable even if the
    layer is frozen. When it is loaded from a `.keras` file, the layer is built before
    the wrapper, so that the weights change their order. This one saves and loads
    weights by name.
    """

    trainable: bool

    def __init__(
        self,
        layer: keras.layers.Layer,
        quantize_config: tfmot.quantization.keras.QuantizeConfig,
        **kwargs: Any,
    ):
        super().__init__(layer, quantize_config, **kwargs)
        # TF-MOT calls the layer's `call` directly, where Keras does not add this loss.
        self._activity_regularizer = getattr(layer, "activity_regularizer", None)

    def add_weight(self, *args: Any, **kwargs: Any) -> tf.Variable:
        """Adds a weight; a non-trainable one is the same on every replica."""
        if kwargs.get("trainable") is False:
            same = tf.VariableAggregation.ONLY_FIRST_REPLICA
            kwargs.setdefault("aggregation", same)
        return super().add_weight(*args, **kwargs)

    def build(self, input_shape: Any) -> None:
        """Builds as if trainable: the flag must not change the weights' order."""
        trainable, self.trainable = self.trainable, True
        super().build(input_shape)
        self.trainable = trainable
        # A call puts tensors in the places of weights, which takes these off the list
        # of the layer. The list must not depend on whether there was a call.
        places = [
            KerasTensor(tf.TensorSpec(weight.shape, weight.dtype))
            for weight, _, _ in self._weight_vars
        ]
        self.quantize_config.set_quantize_weights(self.layer, places)
        # With an input_spec, SavedModel traces the layer without this wrapper, and so
        # without quantized weights.
        self.layer.input_spec = None

    def call(self, inputs: Any, training: Any = None, **kwargs: Any) -> Any:
        """Calls the layer with quantized weights; TF-MOT's method does it."""
        call = super().call
        # AutoGraph is for layers of users. To convert TF-MOT's method takes half the
        # time of a trace.
        if graph.is_builtin(self.layer):
            call = tf.autograph.experimental.do_not_convert(call)
        return call(inputs, training=training, **kwargs)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Returns the wrapped layer's output shape."""
        return self.layer.compute_output_shape(input_shape)

    @property
    def trainable_weights(self) -> list[tf.Variable]:
        """Empty while the layer is frozen."""
        return super().trainable_weights if self.trainable else []

    @property
    def non_trainable_weights(self) -> list[tf.Variable]:
        """The state, and all weights while the layer is frozen."""
        state = super().non_trainable_weights
        if self.trainable:
            return state
        return self._dedup_weights(super().trainable_weights + state)

    def get_config(self) -> dict[str, Any]:
        """Returns TF-MOT's config without the wrapped layer's `build_config`."""
        config = super().get_config()
        # The wrapper must build the layer, or its weights get other names and places.
        config["layer"].pop("build_config", None)
        return config

    def get_build_config(self) -> None:
        """Returns None: a call builds the layer and scopes its weights."""
        return None

    def save_own_variables(self, store: Any) -> None:
        """Writes all weights, including those of the wrapped layer, by name."""
        for name, weight in self._named_weights().items():
            store[name] = weight.numpy()

    def load_own_variables(self, store: Any) -> None:
        """Reads weights that `save_own_variables` wrote, or numbered ones from Keras.

        Raises:
            ValueError: If the file's weights are not those of this layer.
        """
        if "0" in store.keys():
            # Keras numbered them, without those of the wrapped layer.
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
        """Returns weights by the last part of their names, numbered if it is taken."""
        taken: set[str] = set()
        return {
            graph.free_name(self._weight_name(weight.name), taken): weight
            for weight in self.weights
        }
