"""Random small networks and rules for them, as hypothesis strategies."""

import dataclasses
import math

from hypothesis import strategies as st

import tf_lowbit as tfl
from tf_lowbit.compat import keras, tf

layers = keras.layers
KINDS = (
    *("conv", "pointwise", "depthwise", "grouped"),
    *("residual", "branches", "gated", "scaled"),
    *("transposed", "interpolated", "moved"),
)
ACTIVATIONS = {
    "relu": layers.ReLU,
    "relu6": lambda name: layers.ReLU(6.0, name=name),
    "leaky_relu": layers.LeakyReLU,
    "prelu": lambda name: layers.PReLU("random_normal", name=name),
    "swish": lambda name: layers.Activation("swish", name=name),
    "tanh": lambda name: layers.Activation("tanh", name=name),
    "none": lambda name: layers.Activation("linear", name=name),
}
# Of a weight layer itself.
OWN = {"own": "relu", "own_swish": "swish", "own_tanh": "tanh", "own_gelu": "gelu"}
POOLS = {
    "max": layers.MaxPooling2D,
    "average": layers.AveragePooling2D,
    "same": lambda size, name: layers.AveragePooling2D(size, padding="same", name=name),
}


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of a network: its layers' names start with its own."""

    kind: str
    filters: int
    strides: int
    batch_norm: bool
    activation: str
    pool: str | None


@dataclasses.dataclass(frozen=True)
class Graph:
    """A network and its quantization; printed by hypothesis where something fails."""

    size: int
    channels: int
    blocks: tuple[Block, ...]
    head: str
    hidden: str | None
    classes: int
    weight_bits: int
    activation_bits: int
    weight_quantizer: str
    activation_quantizer: str
    edges: bool
    residual_bits: int | None
    nested: bool
    chosen: bool

    def model(self) -> keras.Model:
        """The float network."""
        image = keras.Input((self.size, self.size, self.channels), name="image")
        x = image
        for index, block in enumerate(self.blocks):
            x = _block(x, block, f"block{index}")
        if self.nested:
            x = keras.Model(image, x, name="backbone")(image)
        x = {
            "average": layers.GlobalAveragePooling2D,
            "max": layers.GlobalMaxPooling2D,
            "flatten": layers.Flatten,
        }[self.head](name="pool")(x)
        if self.hidden is not None:
            x = layers.Dense(5, activation=self.hidden, name="hidden")(x)
        return keras.Model(image, layers.Dense(self.classes, name="head")(x))

    def ended(self, model: keras.Model) -> keras.Model:
        """A trained network, or one that puts out its classes."""
        if not self.chosen:
            return model
        return keras.Model(model.inputs, tf.argmax(model.outputs[0], axis=-1))

    def rules(self) -> list[tfl.PrecisionRule]:
        """One rule for all layers."""
        return [
            tfl.PrecisionRule(
                ".*",
                self.weight_bits,
                self.activation_bits,
                self.weight_quantizer,
                self.activation_quantizer,
                edges=self.edges,
            )
        ]


def _conv(x, block, name, kind="conv", strides=1, active=True):
    own = OWN.get(block.activation) if active else None
    options = {"padding": "same", "activation": own, "name": name}
    if kind == "depthwise":
        layer = layers.DepthwiseConv2D(3, strides=strides, **options)
    else:
        size = 1 if kind == "pointwise" else 3
        groups = math.gcd(x.shape[-1], block.filters) if kind == "grouped" else 1
        layer = layers.Conv2D(
            block.filters, size, strides=strides, groups=groups, **options
        )
    x = layer(x)
    if block.batch_norm:
        x = layers.BatchNormalization(name=f"{name}_bn")(x)
    return _activated(x, block, f"{name}_relu") if active else x


def _activated(x, block, name):
    return ACTIVATIONS.get(block.activation, ACTIVATIONS["none"])(name=name)(x)


def _gated(x, block, name):
    gate = layers.GlobalAveragePooling2D(keepdims=True, name=f"{name}_squeeze")(x)
    gate = layers.Conv2D(2, 1, activation="swish", name=f"{name}_reduce")(gate)
    channels = x.shape[-1]
    gate = layers.Conv2D(channels, 1, activation="sigmoid", name=f"{name}_gate")(gate)
    return layers.Multiply(name=f"{name}_product")([x, gate])


def _block(x, block, name):
    if block.kind == "residual":
        x = _conv(x, block, f"{name}_in")
        y = _conv(x, block, f"{name}_out", active=False)
        x = layers.Add(name=f"{name}_add")([x, y])
        x = _activated(x, block, f"{name}_relu")
    elif block.kind == "branches":
        y = _conv(x, block, f"{name}_left", "pointwise")
        z = _conv(x, block, f"{name}_right")
        x = layers.Concatenate(name=f"{name}_concat")([y, z])
    elif block.kind == "gated":
        x = _gated(_conv(x, block, name), block, name)
    elif block.kind == "transposed":
        x = layers.Conv2DTranspose(
            block.filters, 3, block.strides, padding="same", name=name
        )(x)
        x = layers.BatchNormalization(name=f"{name}_bn")(x) if block.batch_norm else x
        x = _activated(x, block, f"{name}_relu")
    elif block.kind == "interpolated":
        size = (block.strides, 1 + block.filters % 2)
        up = layers.UpSampling2D(size, interpolation="bilinear", name=f"{name}_up")
        x = _conv(up(x), block, name)
    elif block.kind == "moved":
        x = tf.pad(x, [[0, 0], [1, 0], [0, block.strides], [0, 0]])
        x = _conv(tf.transpose(x[:, 1:], (0, 2, 1, 3)), block, name)
    elif block.kind == "scaled":
        x = 1.0 - _conv(0.5 * x + 0.25, block, name) / 4.0
    else:
        x = _conv(x, block, name, block.kind, block.strides)
    if block.pool is not None and x.shape[1] >= 2:
        x = POOLS[block.pool](2, name=f"{name}_pool")(x)
    return x


def blocks() -> st.SearchStrategy[Block]:
    """All kinds of them."""
    return st.builds(
        Block,
        kind=st.sampled_from(KINDS),
        filters=st.integers(1, 4),
        strides=st.integers(1, 2),
        batch_norm=st.booleans(),
        # Most networks have ReLUs, and not all a pooling.
        activation=st.sampled_from(("relu", "relu", *OWN, *ACTIVATIONS)),
        pool=st.sampled_from((None, None, *POOLS)),
    )


@st.composite
def graphs(draw) -> Graph:
    """Networks that can be quantized and exported."""
    weight_quantizer = draw(st.sampled_from(("dorefa", "lsq", "uniform")))
    inside = draw(st.lists(blocks(), min_size=1, max_size=3))
    # A linear layer gives the head floats of a signed grid.
    hidden = draw(st.sampled_from(("relu", "linear", None)))
    # Of a block and the head, most have nothing but a first and a last layer.
    is_bare = len(inside) == 1 and inside[0].kind not in ("residual", "gated")
    return Graph(
        size=draw(st.integers(4, 8)),
        channels=draw(st.integers(1, 3)),
        blocks=tuple(inside),
        head=draw(st.sampled_from(("average", "max", "flatten"))),
        hidden=hidden,
        classes=draw(st.integers(1, 4)),
        # 8-bit DoReFa weights do not fit into int8; a signed activation needs 2 bits.
        weight_bits=draw(st.integers(1, 7 if weight_quantizer == "dorefa" else 8)),
        activation_bits=draw(st.integers(2, 8)),
        weight_quantizer=weight_quantizer,
        activation_quantizer=draw(
            st.sampled_from(("dorefa", "lsq", "pact", "uniform"))
        ),
        edges=draw(st.booleans()) or (is_bare and hidden is None),
        residual_bits=draw(st.sampled_from((8, None))),
        nested=draw(st.booleans()),
        chosen=draw(st.booleans()),
    )
