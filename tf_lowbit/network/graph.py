"""Walks and rebuilds functional Keras graphs.

Keras gives the nodes of a model no public name; only this module reads them.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from tf_lowbit.compat import KerasTensor, Node, deep_graphs, keras, tf, untraced_calls

# Packages whose layers make all their weights in `build`.
_BUILTIN = {"tf_keras", "tensorflow_model_optimization", "tf_lowbit"}


def nodes(model: keras.Model) -> Iterator:
    """Yields the model's nodes (calls of layers), each after those that it reads."""
    for depth in sorted(model._nodes_by_depth, reverse=True):
        yield from model._nodes_by_depth[depth]


def calls(model: keras.Model) -> Iterator:
    """Returns the nodes without the inputs."""
    return (node for node in nodes(model) if not node.is_input)


def producer(tensor: KerasTensor) -> Node:
    """Returns the node that outputs a Keras tensor."""
    history = tensor._keras_history
    return history.layer._inbound_nodes[history.node_index]


def outputs_of(node: Node) -> list:
    """Returns the output tensors of a node, flat."""
    return tf.nest.flatten(node.outputs)


def readers(model: keras.Model) -> dict[int, list]:
    """Maps the id of each tensor to the nodes that read it, in order and each once."""
    found: dict[int, list] = {}
    for node in calls(model):
        for key in dict.fromkeys(id(tensor) for tensor in node.keras_inputs):
            found.setdefault(key, []).append(node)
    return found


def inputs_of(model: keras.Model, layer: keras.layers.Layer) -> list:
    """Returns the tensors that a layer reads, over all its calls in the model."""
    return [
        tensor
        for node in calls(model)
        if node.layer is layer
        for tensor in node.keras_inputs
    ]


def free_name(name: str, taken: set[str]) -> str:
    """Returns `name`, numbered if it is taken, and adds the result to `taken`."""
    found, count = name, 1
    while found in taken:
        count += 1
        found = f"{name}_{count}"
    taken.add(found)
    return found


def copy_layer(layer: keras.layers.Layer, **changes: Any) -> keras.layers.Layer:
    """Makes a new, unbuilt layer of the same configuration, with changes.

    Raises:
        ValueError: If the class cannot make it from its configuration.
    """
    try:
        config = layer.get_config()
        if "name" not in config:
            raise ValueError("its `get_config` has no `name`")
        config |= {name: value for name, value in changes.items() if name in config}
        return type(layer).from_config(config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            "A layer's class must be able to make it again from `get_config`: give "
            "functions in it, such as an activation, a name (no lambda) and register "
            "them with keras.utils.register_keras_serializable. "
            f"Received: layer {layer.name!r}, {type(layer).__name__}: "
            f"{str(error)[:500]}"
        ) from error


@deep_graphs()
def rebuild(
    model: keras.Model,
    call: Callable,
    edge: Callable | None = None,
    behind: Callable | None = None,
) -> keras.Model:
    """Builds a model of the same topology, with another call at each node.

    Args:
        model: Functional model.
        call: Function (node, args, kwargs) -> outputs, structured as the node's.
        edge: Function (node, old tensor, new tensor) -> new tensor, called for each
            tensor that a node reads. None changes nothing.
        behind: Function (old tensor, new tensor) -> new tensor, called for each output
            of an input or node. All readers, and the model's outputs, get its result.
            None changes nothing.

    Returns:
        The new model, with the same name.
    """
    made: dict[int, object] = {}

    def put_out(old, new):
        made[id(old)] = new if behind is None else behind(old, new)

    def new_input(tensor):
        new = copy_layer(tensor._keras_history.layer).output
        put_out(tensor, new)
        return new

    inputs = tf.nest.map_structure(new_input, model._nested_inputs)
    outputs = run(model, made, call, put_out, edge)
    return keras.Model(inputs, outputs, name=model.name)


def run(
    model: keras.Model,
    made: dict[int, Any],
    call: Callable[[Node, tuple, dict[str, Any]], Any],
    put_out: Callable[[KerasTensor, Any], object],
    edge: Callable[[Node, KerasTensor, Any], Any] | None = None,
) -> Any:
    """Calls a function at each node; returns the replacements of the model's outputs.

    Args:
        model: Functional model.
        made: Id of a tensor -> its replacement; holds those of the inputs.
        call: As in `rebuild`.
        put_out: Function (old tensor, new tensor) that records it in `made`.
        edge: As in `rebuild`.
    """
    for node in calls(model):
        # Keras pops one tensor for each place where the node reads it.
        read: dict[str, list] = {}
        for tensor in node.keras_inputs:
            new = made[id(tensor)]
            new = new if edge is None else edge(node, tensor, new)
            read.setdefault(str(id(tensor)), []).append(new)
        args, kwargs = node.map_arguments(read)
        result = call(node, args, kwargs)
        for old, new in zip(outputs_of(node), tf.nest.flatten(result), strict=True):
            put_out(old, new)
    return tf.nest.map_structure(lambda t: made[id(t)], model._nested_outputs)


def call_copy(
    copy: keras.layers.Layer, node: Node, args: tuple, kwargs: dict[str, Any]
) -> Any:
    """Calls a layer whose outputs have the shapes of a node's outputs.

    Args:
        copy: Copy of the node's layer, or an identity that replaces it.
        node: Node with the shapes of the outputs.
        args: Arguments of the call.
        kwargs: Keyword arguments of the call.

    Returns:
        Keras tensors, structured as the node's outputs.
    """
    with untraced_calls(lambda layer: _outputs(layer, node) if layer is copy else None):
        return copy(*args, **kwargs)


@contextlib.contextmanager
def copied_by_name(model: keras.Model) -> Iterator[None]:
    """A context in which copies of a model's layers are called as fast as they can be.

    A copy has the name of its layer; either may be inside a wrapper of Keras or TF-MOT.
    Its outputs have the shapes of the layer's, as with `call_copy`.
    """
    by_name: dict[str, list[Node]] = {}
    # An own layer may make a model of its own, with any names, when it is copied.
    is_plain = all(
        is_builtin(_unwrapped(layer)) or not _parts(layer) for layer in model.layers
    )
    for node in calls(model) if is_plain else ():
        by_name.setdefault(_unwrapped(node.layer).name, []).append(node)

    def known(layer):
        found = by_name.get(_unwrapped(layer).name, [])
        return _outputs(layer, found[0]) if len(found) == 1 else None

    with untraced_calls(known):
        yield


def _outputs(copy, node):
    """The node's outputs if they tell of the copy's what must be known, or None."""
    inner = _unwrapped(copy)
    # Other layers may make weights in a call, or output another dtype.
    is_known = (
        is_builtin(inner)
        and not _parts(inner)
        and "call" not in vars(inner)
        and copy.compute_dtype == node.layer.compute_dtype
    )
    return node.outputs if is_known else None


def _parts(layer) -> list:
    """The layers inside a layer."""
    return list(layer._flatten_layers(include_self=False))


def _unwrapped(layer):
    """What is inside the wrappers of Keras and TF-MOT."""
    while isinstance(layer, keras.layers.Wrapper) and is_builtin(layer):
        layer = layer.layer
    return layer


def is_builtin(layer: keras.layers.Layer) -> bool:
    """Tells whether a layer is of Keras, TF-MOT or this library."""
    return type(layer).__module__.partition(".")[0] in _BUILTIN


def is_movable(layer: keras.layers.Layer) -> bool:
    """Tells whether a layer can leave its model for another one.

    Layers of users may keep tensors, counts or losses of their calls, as may parts of
    a layer; a regularizer's loss belongs to a call.
    """
    has_loss = getattr(layer, "activity_regularizer", None) is not None
    return is_builtin(layer) and not _parts(layer) and not has_loss


def nested_models(model: keras.Model) -> list[keras.Model]:
    """Returns the models among the model's own layers."""
    return [layer for layer in model.layers if isinstance(layer, keras.Model)]


def flatten(model: keras.Model) -> keras.Model:
    """Copies a model with its weights; nested models are replaced by their layers.

    A layer keeps its name if the name is free; otherwise it gets the name of its nested
    model as prefix. The argument `training` of a nested model's call is passed to its
    layers, except to those that were called with their own.

    Args:
        model: Functional model; it is not changed.

    Returns:
        A functional model of the same function without nested models, with the layers'
        `trainable` flags and the names of the outputs. The given model itself if it has
        no nested ones.

    Raises:
        ValueError: If a nested model has no readable graph.
    """
    if not nested_models(model):
        return model
    copies: dict[int, tuple] = {}
    open_calls: set[int] = set()  # Layers with a call outside all frozen models.
    taken = {layer.name for layer in model.layers} - {
        within.name for within in nested_models(model)
    }

    def copied(layer, owner, is_frozen):
        if not is_frozen:
            open_calls.add(id(layer))
        if id(layer) not in copies:
            name = layer.name
            if owner is not None:
                name = free_name(f"{owner}_{name}" if name in taken else name, taken)
            copies[id(layer)] = layer, copy_layer(layer, name=name)
        return copies[id(layer)][1]

    def caller(owner, training, is_frozen):
        def call(node, args, kwargs):
            layer = node.layer
            takes_training = "training" in inspect.signature(layer.call).parameters
            is_open = takes_training and kwargs.get("training") is None
            if training is not None and is_open:
                kwargs = {**kwargs, "training": training}
            if isinstance(layer, keras.Model):
                hidden = is_frozen or not layer.trainable
                return inlined(layer, args[0], kwargs.get("training"), hidden)
            return copied(layer, owner, is_frozen)(*args, **kwargs)

        return call

    def inlined(within, inputs, training, is_frozen):
        if not within._is_graph_network:
            raise ValueError(
                "Models among the layers must be Sequential or Functional: the graph "
                f"of a subclassed one cannot be read. Received: {within.name!r}, "
                f"{type(within).__name__}"
            )
        news = within._flatten_to_reference_inputs(inputs)
        made = dict(zip(map(id, within.inputs), news, strict=True))
        call = caller(within.name, training, is_frozen)
        return run(within, made, call, lambda old, new: made.update({id(old): new}))

    flat = rebuild(model, caller(None, None, False))
    for key, (layer, copy) in copies.items():
        set_weights(layer, copy)
        copy_flags(layer, copy)
        if key not in open_calls:
            copy.trainable = False
    flat.output_names[:] = model.output_names  # Keras would name nested layers.
    return flat


def copy_flags(source: keras.layers.Layer, target: keras.layers.Layer) -> None:
    """Copies `trainable` flags, also those of inner layers, and `synchronized`."""
    pairs = list(source._flatten_layers()), list(target._flatten_layers())
    target.trainable = source.trainable
    if len(pairs[0]) == len(pairs[1]):
        # Inner layers may have their own flags.
        for layer, copy in zip(*pairs, strict=True):
            copy._trainable = layer._trainable
    if getattr(source, "synchronized", False):
        # Keras leaves it out of the configuration.
        target.synchronized, target.fused = True, False


def set_weights(source: keras.layers.Layer, target: keras.layers.Layer) -> None:
    """Copies the weights of a layer to another, even if inner layers are frozen.

    Keras lists trainable weights first, so both layers are trainable during the copy.
    """
    if not source.weights:
        return
    with contextlib.ExitStack() as stack:
        for layer in (source, target):
            stack.enter_context(thawed(layer))
        target.set_weights(source.get_weights())


@contextlib.contextmanager
def thawed(layer: keras.layers.Layer) -> Iterator[None]:
    """A context in which a layer and its inner layers are trainable."""
    flags = [(within, within._trainable) for within in layer._flatten_layers()]
    try:
        for within, _ in flags:
            within._trainable = True
        yield
    finally:
        for within, flag in flags:
            within._trainable = flag


def clone(
    model: keras.Model,
    copy: Callable[[keras.layers.Layer], keras.layers.Layer] = copy_layer,
) -> keras.Model:
    """Copies a model with its weights; each new layer is called by this model only.

    TF-MOT shares layers between its intermediate models, so that `layer.output` is
    ambiguous. In the copy it is not.

    Args:
        model: Functional model.
        copy: Function layer -> new layer with the same weights in the same order; or
            the layer itself, which `model` then loses.
    """
    # Not by name: a copy may have another name, such as TF-MOT's annotation.
    layers = dict.fromkeys(node.layer for node in calls(model))
    pairs = [(layer, copy(layer)) for layer in layers]
    for layer, new in pairs:
        if new is layer:
            layer._inbound_nodes, layer._outbound_nodes = [], []
    copies = {layer.name: new for layer, new in pairs}
    result = rebuild(model, lambda n, a, k: call_copy(copies[n.layer.name], n, a, k))
    for layer, new in pairs:
        if new is not layer:
            set_weights(layer, new)
    return result
