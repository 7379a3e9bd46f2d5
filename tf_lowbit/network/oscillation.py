"""Finds and freezes weights whose codes oscillate between two levels.

Nagel et al., Overcoming Oscillations in Quantization-Aware Training, arXiv:2203.11086.
"""

from collections.abc import Iterable

from tf_lowbit.compat import keras, tf
from tf_lowbit.core import grid
from tf_lowbit.network import inspection
from tf_lowbit.network.inspection import QuantizedTensor
from tf_lowbit.quantizers import WEIGHT

# Tensors of more bits are not watched, as in the authors' code: between fine levels
# most weights oscillate, with little harm.
MOST_BITS = 4
# A weight that flips in a larger share of the steps counts as oscillating.
OSCILLATING = 0.005
_ATTRIBUTE = "oscillation"


class WeightOscillation:
    """The flips of each weight of one tensor, and the frozen weights.

    A flip is a change of the code against the direction of its last change.

    Attributes:
        tensor: The quantized weight.
        weights: Its latent float variable.
        frequency: Float32 variable in the weight's shape, in [0, 1]: the moving average
            of "flipped in this step".
        frozen: Bool variable in the weight's shape.
    """

    def __init__(self, tensor: QuantizedTensor, state: tf.train.Checkpoint):
        self.tensor = tensor
        self.weights: tf.Variable = tensor.latent
        self.frequency: tf.Variable = state.frequency
        self.frozen: tf.Variable = state.frozen
        self._state = state

    def oscillating_share(self) -> float:
        """Share of the weights that flip in more than 0.5 % of the steps, in [0, 1]."""
        return _share(self.frequency > OSCILLATING)

    def frozen_share(self) -> float:
        """Share of the weights that are frozen, in [0, 1]."""
        return _share(self.frozen)

    def start_anew_if_moved(self) -> None:
        """Forgets its state if the weights are no longer those of the last `look`."""
        if tf.reduce_any(self.weights != self._state.held):
            self._state.bits.assign(0)

    def look(self, threshold: tf.Tensor, momentum: float) -> None:
        """Updates the statistics after a step, and freezes weights that flip.

        `c` are the codes, `d` the direction of their last change, and `m` is the
        momentum:

            flipped = sign(c - c_before) d = -1
            frequency = m flipped + (1 - m) frequency
            frozen = frozen or frequency > threshold
            average = m c + (1 - m) average

        A weight that freezes is set to the level of its rounded `average`, and set back
        after each later step. If the bits have changed since the last call, everything
        starts anew.

        Args:
            threshold: Scalar float32.
            momentum: In (0, 1).
        """
        state, quantizer = self._state, self.tensor.quantizer
        variables, weights = self.tensor.variables, self.weights
        bits = tf.convert_to_tensor(variables["bits"])
        is_new, is_watched = bits != state.bits, bits <= MOST_BITS
        frozen = self.frozen & ~is_new
        latent = tf.where(frozen, state.held, weights)
        codes = tf.cast(quantizer.codes(latent, variables), tf.float32)
        before = tf.where(is_new, codes, tf.cast(state.codes, tf.float32))
        direction = tf.where(is_new, 0.0, tf.cast(state.direction, tf.float32))
        average = tf.where(is_new, codes, state.average)

        change = tf.sign(codes - before)
        flipped = tf.cast((change * direction < 0) & ~frozen, tf.float32)
        frequency = tf.where(is_new, 0.0, self.frequency)
        frequency = momentum * flipped + (1.0 - momentum) * frequency
        frequency = tf.where(is_watched, frequency, 0.0)
        freezes = (frequency > threshold) & ~frozen
        # The code of a frozen weight does not change, even if the step does.
        kept = tf.where(freezes, _nearest_level(quantizer, average, bits), before)
        is_off = freezes | (frozen & (codes != before))
        latent = tf.where(is_off, quantizer.latent(kept, latent, variables), latent)
        frozen |= freezes

        weights.assign(latent)
        state.held.assign(latent)
        self.frozen.assign(frozen)
        self.frequency.assign(frequency)
        state.average.assign(momentum * codes + (1.0 - momentum) * average)
        state.direction.assign(
            tf.cast(tf.where(change != 0, change, direction), tf.int8)
        )
        state.codes.assign(tf.cast(tf.where(frozen, kept, codes), tf.int8))
        state.bits.assign(bits)


def track(network: keras.Model) -> list[WeightOscillation]:
    """Returns the state of a network's weights, and makes it if there is none.

    It is an attribute of the network, so that checkpoints save it. Quantizers of rules
    with more than 4 bits have none. Where weights were loaded or trained since the last
    `look`, the measurement starts anew and nothing is frozen.

    Args:
        network: A model from `quantize`.
    """
    if not hasattr(network, _ATTRIBUTE):
        with network.distribute_strategy.scope():
            # A Checkpoint, so that its variables are not weights of the model's files.
            tensors = [_first_state(tensor) for tensor in _tracked_tensors(network)]
            setattr(network, _ATTRIBUTE, tf.train.Checkpoint(tensors=tensors))
    found = tracked(network)
    for own in found:
        own.start_anew_if_moved()
    return found


def tracked(network: keras.Model) -> list[WeightOscillation]:
    """Returns the state of a network's weights; empty if they are not tracked."""
    state = getattr(network, _ATTRIBUTE, None)
    if state is None:
        return []
    pairs = zip(_tracked_tensors(network), state.tensors, strict=True)
    return [WeightOscillation(tensor, own) for tensor, own in pairs]


def _tracked_tensors(network) -> Iterable[QuantizedTensor]:
    return [
        tensor
        for tensor in inspection.quantized_tensors(network)
        if tensor.role == WEIGHT and tensor.quantizer.bits <= MOST_BITS
    ]


def _first_state(tensor) -> tf.train.Checkpoint:
    """Makes the variables of a tensor; 0 bits make the first `look` start anew."""

    def zeros(dtype, shape=tensor.latent.shape):
        return tf.Variable(
            tf.zeros(shape, dtype),
            trainable=False,
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )

    return tf.train.Checkpoint(
        bits=zeros(tf.int32, ()),
        codes=zeros(tf.int8),
        direction=zeros(tf.int8),
        frequency=zeros(tf.float32),
        average=zeros(tf.float32),
        frozen=zeros(tf.bool),
        held=zeros(tf.float32),
    )


def _nearest_level(quantizer, codes, bits):
    """Returns the nearest code to each value."""
    levels = [quantizer.level_codes(bits) for bits in range(1, grid.MAX_BITS + 1)]
    index = tf.minimum(bits, grid.MAX_BITS) - 1
    first = tf.gather(tf.constant([float(own[0]) for own in levels]), index)
    gap = tf.gather(tf.constant([float(own.step) for own in levels]), index)
    return first + gap * tf.round((codes - first) / gap)


def _share(flags) -> float:
    return float(tf.reduce_mean(tf.cast(flags, tf.float32)))
