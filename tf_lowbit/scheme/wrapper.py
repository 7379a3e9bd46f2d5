"""TF-MOT's wrapper, made to honour `trainable = False`."""

from tf_lowbit.compat import keras, tf, tfmot

_QuantizeWrapper = tfmot.quantization.keras.QuantizeWrapperV2


@keras.utils.register_keras_serializable(package="tf_lowbit")
class LowBitWrapper(_QuantizeWrapper):
    """TF-MOT lists latent weights and learned steps as trainable even if frozen."""

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
