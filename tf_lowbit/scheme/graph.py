"""Walking and rebuilding a functional Keras graph.

Keras gives the nodes of a model no public name; this module alone reads them.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator

from tf_lowbit.compat import deep_graphs, keras, tf


def nodes(model: keras.Model) -> Iterator:
    """The model's nodes (calls of layers), each after those that it reads."""
    for depth in sorted(model._nodes_by_depth, reverse=True):
        yield from model._nodes_by_depth[depth]


def calls(model: keras.Model) -> Iterator:
    """The nodes without the inputs."""
    return (node for node in nodes(model) if not node.is_input)


def producer(tensor):
    """The node that puts a Keras tensor out."""
    history = tensor._keras_history
    return history.layer._inbound_nodes[history.node_index]


def outputs_of(node) -> list:
    """The tensors that a node puts out, flat."""
    return tf.nest.flatten(node.outputs)


def readers(model: keras.Model) -> dict[int, list]:
    """Id of a tensor -> the nodes that read it, in order; each once."""
    found: dict[int, list] = {}
    for node in calls(model):
        for key in dict.fromkeys(id(tensor) for tensor in node.keras_inputs):
            found.setdefault(key, []).append(node)
    return found


def inputs_of(model: keras.Model, layer: keras.layers.Layer) -> list:
    """The tensors that a layer reads, at each of its calls in the model."""
    return [
        tensor
        for node in calls(model)
        if node.layer is layer
        for tensor in node.keras_inputs
    ]


def free_name(name: str, taken: set[str]) -> str:
    """`name`, or with the first number that makes it new; added to `taken`."""
    found, count = name, 1
    while found in taken:
        count += 1
        found = f"{name}_{count}"
    taken.add(found)
    return found


def copy_layer(layer: keras.layers.Layer, **changes) -> keras.layers.Layer:
    """A new layer of the same configuration but for some changes, not built yet.

    Raises:
        ValueError: if its class cannot make it of its configuration.
    """
    try:
        config = layer.get_config()
        config |= {name: value for name, value in changes.items() if name in config}
        return type(layer).from_config(config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            "A layer must be one that its class makes again of `get_config`; functions "
            "within, such as an activation, must have names and be registered with "
            "keras.utils.register_keras_serializable, and be no lambdas. "
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
    """Builds a model of the same topology, calling something else at each node.

    Args:
        model: a functional model.
        call: function (node, args, kwargs) -> outputs, of the node's structure.
        edge: function (node, old tensor, new tensor) -> new tensor, asked for each
            tensor that a node reads. None leaves them.
        behind: function (old tensor, new tensor) -> new tensor, asked for each tensor
            that an input or a node puts out: all its readers, the model's outputs
            among them, get what it returns. None leaves them.

    Returns:
        The new model, under the same name.
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


def run(model, made, call, put_out, edge=None):
    """Calls something at each node; gives what then stands for the model's outputs.

    Args:
        model: a functional model.
        made: id of a tensor -> what stands for it; that of the inputs is there.
        call: as in `rebuild`.
        put_out: function (old tensor, new tensor) that sets it in `made`.
        edge: as in `rebuild`.
    """
    for node in calls(model):
        # Keras pops one tensor for each place in which the node reads it.
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


def nested_models(model: keras.Model) -> list[keras.Model]:
    """The models among the model's own layers."""
    return [layer for layer in model.layers if isinstance(layer, keras.Model)]


def flatten(model: keras.Model) -> keras.Model:
    """A copy with weights, in which models among the layers are their layers.

    A layer keeps its name where that is free, else the name of the model that it is in
    goes in front. A model that is called with `training` hands it on to its layers, but
    for those that were called with one of their own.

    Args:
        model: a functional model; it is not changed.

    Returns:
        A functional model without models among its layers, of the same function, with
        the layers' `trainable` flags and the outputs' names; the given one where there
        is none in it.

    Raises:
        ValueError: if a model within has no graph that can be read.
    """
    if not nested_models(model):
        return model
    copies: dict[int, tuple] = {}
    thawed: set[int] = set()  # What is called in no model that is frozen.
    taken = {layer.name for layer in model.layers} - {
        within.name for within in nested_models(model)
    }

    def copied(layer, owner, is_frozen):
        if not is_frozen:
            thawed.add(id(layer))
        if id(layer) not in copies:
            name = layer.name
            if owner is not None:
                name = free_name(f"{owner}_{name}" if name in taken else name, taken)
            copies[id(layer)] = layer, copy_layer(layer, name=name)
        return copies[id(layer)][1]

    def caller(owner, training, is_frozen):
        def call(node, args, kwargs):
            layer = node.layer
            is_open = kwargs.get("training") is None and _takes_training(layer)
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
        take_flags(layer, copy)
        if key not in thawed:
            copy.trainable = False
    flat.output_names[:] = model.output_names  # Not those of layers within.
    return flat


def _takes_training(layer) -> bool:
    return "training" in inspect.signature(layer.call).parameters


def take_flags(source: keras.layers.Layer, target: keras.layers.Layer) -> None:
    """Gives a layer what another has and its copy has not."""
    pairs = list(source._flatten_layers()), list(target._flatten_layers())
    target.trainable = source.trainable
    if len(pairs[0]) == len(pairs[1]):
        # Layers within the layer may have flags of their own.
        for layer, copy in zip(*pairs, strict=True):
            copy._trainable = layer._trainable
    if getattr(source, "synchronized", False):
        # Keras leaves it out of the configuration, so that no copy has it.
        target.synchronized, target.fused = True, False


def set_weights(source: keras.layers.Layer, target: keras.layers.Layer) -> None:
    """Gives a layer the weights of another, whichever of the layers within are frozen.

    Keras lists the weights that train before the others.
    """
    if not source.weights:
        return
    with contextlib.ExitStack() as stack:
        for layer in (source, target):
            stack.enter_context(_thawed(layer))
        target.set_weights(source.get_weights())


@contextlib.contextmanager
def _thawed(layer):
    """A context in which a layer and all that is in it are trainable."""
    flags = [(within, within._trainable) for within in layer._flatten_layers()]
    try:
        for within, _ in flags:
            within._trainable = True
        yield
    finally:
        for within, flag in flags:
            within._trainable = flag


def copy_weights(source: keras.Model, target: keras.Model) -> None:
    """Copies the weights of all layers of `source` to those of the same name."""
    for layer in source.layers:
        set_weights(layer, target.get_layer(layer.name))


def clone(model: keras.Model, copy=copy_layer) -> keras.Model:
    """A copy with weights, in which each layer has only the calls of this model.

    TF-MOT hands layers on from one intermediate model to the next, after which
    `layer.output` is ambiguous; a copy has it back.

    Args:
        model: functional model.
        copy: function layer -> new layer with the same weights in the same order.

    Returns:
        The copy, under the same name.
    """
    copies = {layer.name: copy(layer) for layer in model.layers}
    result = rebuild(model, lambda n, a, k: copies[n.layer.name](*a, **k))
    # Not by name: a copy may have one of its own (TF-MOT's annotation has).
    for layer in model.layers:
        set_weights(layer, copies[layer.name])
    return result
