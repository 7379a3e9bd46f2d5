"""Low-bit networks of other libraries, made of a float network of ours.

The same tensors are quantized as by `tf_lowbit.quantize` with a rule for all layers:
the kernels of all convolutions but the first, and the ReLUs that they read; first and
last layer stay float. Weights are copied from the float network. The peers are imported
where they are used: they are no requirements of this library.
"""

from collections.abc import Callable

import numpy as np

import tf_lowbit as tfl
from tf_lowbit.compat import keras, tf, tfmot
from tf_lowbit.network import graph

_LayerFactory = Callable[[keras.layers.Layer], keras.layers.Layer]


def build(peer: str, model: keras.Model, bits: tuple[int, int]) -> keras.Model:
    """A peer's low-bit network.

    Args:
        peer: A key of `peers_plan.PEERS`.
        model: The float network; it is not changed.
        bits: Of weights and activations.

    Returns:
        A Keras model with the float network's weights.

    Raises:
        ValueError: If there is no such peer.
        Exception: Whatever the peer raises on a network that it does not take.
    """
    if peer == "tfmot":
        return _tfmot(model, _annotation_of_the_guide(model), bits)
    if peer == "tfmot_by_hand":
        return _tfmot(model, _annotation_by_hand(model, bits), bits)
    return _rebuilt(model, *_factories(peer, bits))


def float_difference(peer: str, model: keras.Model) -> float:
    """How far a peer's layers are from Keras's when they quantize nothing.

    Args:
        peer: A key of `peers_plan.PEERS`.
        model: The float network.

    Returns:
        The largest difference of logits on random images, relative to the largest
        logit. 0 for TF-MOT, which wraps Keras's own layers.

    Raises:
        ValueError: If there is no such peer, or a difference is more than rounding.
    """
    if peer.startswith("tfmot"):
        return 0.0
    convolution, _ = _factories(peer, None)
    other = _rebuilt(model, convolution, _same)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, *model.input_shape[1:])).astype(np.float32)
    expected = model(x).numpy()
    difference = abs(other(x).numpy() - expected).max() / abs(expected).max()
    if not difference < 1e-4:
        raise ValueError(
            "A peer's network must compute what the float one does when nothing is "
            f"quantized. Received: a difference of {difference} with {peer}"
        )
    return float(difference)


def quantized_names(model: keras.Model) -> tuple[set[str], set[str]]:
    """Names of the layers whose kernel, and of those whose output, is quantized."""
    quantized = tfl.quantize(model, [tfl.PrecisionRule(".*", 2, 2)])
    names: dict[str, set[str]] = {"weight": set(), "activation": set()}
    for tensor in tfl.inspection.quantized_tensors(quantized):
        names[tensor.role].add(tfl.inspection.wrapped_layer(tensor.layer).name)
    return names["weight"], names["activation"]


def _same(layer):
    return layer.__class__.from_config(layer.get_config())


def _rebuilt(model, convolution: _LayerFactory, activation: _LayerFactory):
    """A clone with other layers in some places, and the same weights by name."""
    kernels, activations = quantized_names(model)

    def made(layer):
        if layer.name in kernels:
            return convolution(layer)
        return activation(layer) if layer.name in activations else _same(layer)

    clone = keras.models.clone_model(model, clone_function=made)
    values = {weight.name: weight for weight in model.weights}
    for weight in clone.weights:
        weight.assign(values.pop(weight.name))
    if values:
        raise ValueError(
            f"All weights must have a place in the clone. Received: {sorted(values)}"
        )
    return clone


def _factories(peer, bits) -> tuple[_LayerFactory, _LayerFactory]:
    """What makes a peer's convolution, and its activation in a ReLU's place.

    Args:
        peer: "qkeras" or "larq".
        bits: Of weights and activations; None for convolutions that are not quantized.
    """
    if peer == "larq":
        return _larq(bits)
    if peer == "qkeras":
        return _qkeras(bits)
    raise ValueError(f"A peer must be one that is known. Received: {peer!r}")


def _larq(bits):
    import larq

    def quantizer(role, mode, **arguments):
        return larq.quantizers.DoReFa(k_bit=bits[role], mode=mode, **arguments)

    def convolution(layer):
        kernel = quantizer(0, "weights") if bits else None
        return larq.layers.QuantConv2D.from_config(
            {**layer.get_config(), "kernel_quantizer": kernel}
        )

    # An `input_quantizer` would do the same, but once for each convolution that reads
    # the tensor, and would leave identity shortcuts float. DoReFa's clip at 0 is the
    # ReLU.
    return convolution, lambda layer: quantizer(1, "activations", name=layer.name)


def _qkeras(bits):
    import qkeras

    # Weights: alpha is left to QConv2D, which sets "auto_po2" with symmetric levels
    # ({-1, 0, 1} and -7..7 times a power of two for each channel). AutoQKeras' defaults
    # with alpha=1, "quantized_bits(2,1,1)" and "quantized_bits(4,0,1)", are for weights
    # in [-1, 1], and round those of a trained network to 0.
    # Activations: AutoQKeras' defaults are "quantized_relu(3,1)" and
    # "quantized_relu(4,2)", two bits or one and a half below the point; (2,1) goes on.
    integer = {2: 1, 3: 1, 4: 2}

    def convolution(layer):
        kernel = qkeras.quantized_bits(bits[0], 0) if bits else None
        return qkeras.QConv2D.from_config(
            {**layer.get_config(), "kernel_quantizer": kernel}
        )

    def activation(layer):
        relu = qkeras.quantized_relu(bits[1], integer[bits[1]])
        return qkeras.QActivation(relu, name=layer.name)

    return convolution, activation


def _scheme():
    return tfmot.quantization.keras.experimental.default_n_bit


def _convolution_config():
    """The scheme's class for convolutions, which has no public name of its own."""
    registry = _scheme().DefaultNBitQuantizeRegistry()
    return type(registry.get_quantize_config(keras.layers.Conv2D(1, 1)))


def _tfmot(model, annotate: _LayerFactory, bits):
    annotated = keras.models.clone_model(model, clone_function=annotate)
    annotated.set_weights(model.get_weights())
    config = _convolution_config()
    # The registry keeps its bits in the class: the newest scheme's count.
    scheme = _scheme().DefaultNBitQuantizeScheme(
        num_bits_weight=bits[0], num_bits_activation=bits[1]
    )
    with tfmot.quantization.keras.quantize_scope({config.__name__: config}):
        return tfmot.quantization.keras.quantize_apply(annotated, scheme)


def _annotation_of_the_guide(model) -> _LayerFactory:
    """Annotates all layers from behind the first to before the last.

    The first convolution's BatchNormalization stays out with it, and so does the
    pooling before the dense layer, whose output would be rounded. Unlike ours, the last
    ReLU is quantized: TF-MOT takes convolution, BatchNormalization and ReLU together.
    """
    kernels, _ = quantized_names(model)
    edges = {
        layer.name
        for layer in model.layers
        if hasattr(layer, "kernel") and layer.name not in kernels
    }

    def is_left_out(layer):
        if isinstance(
            layer, keras.layers.InputLayer | keras.layers.GlobalAveragePooling2D
        ):
            return True
        is_norm = isinstance(layer, keras.layers.BatchNormalization)
        before = {graph.producer(x).layer.name for x in tf.nest.flatten(layer.input)}
        return layer.name in edges or (is_norm and bool(before & edges))

    def annotate(layer):
        same = _same(layer)
        if is_left_out(layer):
            return same
        return tfmot.quantization.keras.quantize_annotate_layer(same)

    return annotate


def _annotation_by_hand(model, bits) -> _LayerFactory:
    """Annotates the tensors that ours quantizes, and no other.

    By itself the scheme's convolution rounds its output as well: no activation is named
    in the configuration here.
    """
    kernels, activations = quantized_names(model)
    config = _convolution_config()

    def annotate(layer):
        same = _same(layer)
        if layer.name in kernels:
            own = config(
                ["kernel"],
                [],
                False,
                num_bits_weight=bits[0],
                num_bits_activation=bits[1],
            )
            return tfmot.quantization.keras.quantize_annotate_layer(same, own)
        if layer.name in activations:
            return tfmot.quantization.keras.quantize_annotate_layer(same)
        return same

    return annotate
