"""One network of a training, with its losses and metrics."""

from collections.abc import Iterable
from typing import Any

from tf_lowbit.compat import LossesContainer, MetricsContainer, deep_graphs, keras, tf
from tf_lowbit.training.batch import Batch, replicas

# Names in the logs.
TOTAL, TASK, DISTILLATION, HINT = "loss", "task_loss", "distillation_loss", "hint_loss"
# Not logged.
REGULARIZATION = "regularization_loss"


class Participant:
    """One network of a training, with its losses and metrics.

    A dict of losses maps the name of a term to its mean over this replica's examples, a
    float32 scalar.

    Args:
        network: The model.
        prefix: Prefix of its names in the logs; "" for the first student.
        weights: Name of each loss term -> weight. Regularization has weight 1.
        layers: Names of the layers whose features distillation reads.
        is_trained: False for a frozen teacher.

    Attributes:
        weights: The weights of the current stage.
        is_trained: Whether the network is trained in the current stage.

    Raises:
        ValueError: If `layers` are given and a layer of the network leads to no output.
    """

    @deep_graphs()
    def __init__(
        self,
        network: keras.Model,
        prefix: str,
        weights: dict[str, float],
        layers: Iterable[str] = (),
        is_trained: bool = True,
    ):
        self._network, self._prefix, self.weights = network, prefix, weights
        self.is_trained = is_trained
        self._with_features = None
        features = {name: network.get_layer(name).output for name in layers}
        if features:
            model = keras.Model(network.input, [network.output, features])
            unused = {x.name for x in network.layers} - {x.name for x in model.layers}
            if unused:
                raise ValueError(
                    "Hints need a network whose layers all lead to its output "
                    "(add_loss with a tensor makes one that does not). Received: "
                    f"{network.name!r} with {sorted(unused)}"
                )
            self._with_features = model

    def compile(self, losses: Any, metrics: Any) -> None:
        """Stores Keras's containers of losses and metrics, and makes mean losses."""
        self._losses, self._metrics = losses, metrics
        self._is_named = self._prefix == ""
        self._total = keras.metrics.Mean(self._prefix + TOTAL)
        # A single term is not logged: it is the total, up to regularization.
        terms = self.weights if len(self.weights) > 1 else ()
        self._terms = {name: keras.metrics.Mean(self._prefix + name) for name in terms}

    @property
    def evaluated(self) -> list[keras.metrics.Metric]:
        """The total loss and the compiled metrics, in the order of the logs."""
        # The first metric of the loss container is its own total.
        return [self._total, *self._losses.metrics[1:], *self._metrics.metrics]

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """All metrics, which Keras resets at the start of an epoch."""
        return [*self.evaluated, *self._terms.values()]

    def see(self, x: Any) -> tuple:
        """Runs the forward pass; returns (outputs, layer name -> features)."""
        if self._with_features is None:
            return self._network(x, training=self.is_trained), {}
        return self._with_features(x, training=self.is_trained)

    def task_losses(self, batch: Batch, outputs: Any) -> dict:
        """Returns CE, the compiled loss, and R, the regularization loss if any.

        Raises:
            ValueError: If the loss or the targets are missing, or the loss is not a
                scalar.
        """
        loss = self._losses(batch.y, outputs, batch.sample_weight)
        if loss is None:
            raise ValueError(
                "compile must be given a loss, and the data must have targets. "
                f"Received: targets {batch.y}"
            )
        if loss.shape.rank != 0:
            raise ValueError(
                "The loss must be one number, because other terms are added to it: "
                'give it reduction="sum_over_batch_size". '
                f"Received: a loss of shape {loss.shape}"
            )
        # Undoes Keras's division by the number of replicas.
        losses = {TASK: tf.cast(loss, tf.float32) * replicas()}
        if replicas() > 1:
            # Without examples the mean is NaN.
            losses[TASK] = tf.where(batch.examples > 0, losses[TASK], 0.0)
        penalties = [tf.cast(penalty, tf.float32) for penalty in self._network.losses]
        if penalties:
            losses[REGULARIZATION] = tf.add_n(penalties)
        return losses

    def objective(self, losses: dict, share: tf.Tensor | None) -> tf.Tensor:
        """Computes the weighted sum of the terms, and stores it in `losses[TOTAL]`.

        Args:
            losses: The terms; changed in place.
            share: This replica's share of the global batch; None on a single replica.

        Returns:
            The sum. On several replicas, this replica's part of the loss of the global
            batch, because gradients are summed over replicas.
        """
        terms = {name: x * self.weights.get(name, 1.0) for name, x in losses.items()}
        losses[TOTAL] = tf.add_n(list(terms.values()))
        if share is None:
            return losses[TOTAL]
        shares = dict.fromkeys(terms, share) | {REGULARIZATION: 1.0 / replicas()}
        # With reduction SUM, Keras sums over the examples of all replicas: no share.
        kinds = {x.reduction for x in tf.nest.flatten(self._losses._losses) if x}
        if kinds == {keras.losses.Reduction.SUM}:
            shares[TASK] = 1.0 / replicas()
        return tf.add_n([x * shares[name] for name, x in terms.items()])

    def record(self, losses: dict, outputs: Any, batch: Batch) -> dict:
        """Updates the mean losses and the compiled metrics.

        Returns:
            Name in the logs -> result so far.
        """
        terms = {name: mean for name, mean in self._terms.items() if name in losses}
        for name, mean in {TOTAL: self._total, **terms}.items():
            mean.update_state(losses[name], sample_weight=batch.examples)
        self._metrics.update_state(batch.y, outputs, batch.sample_weight)
        if not self._is_named:
            # The containers make their metrics at the first update, under the same
            # names in each network.
            self._is_named = True
            for metric in self.evaluated[1:]:
                metric._name = self._prefix + metric.name
        logs: dict[str, tf.Tensor] = {}
        for metric in [*self.evaluated, *terms.values()]:
            result = metric.result()
            if isinstance(result, dict):
                logs |= {self._prefix + name: value for name, value in result.items()}
            else:
                logs[metric.name] = result
        return logs


def containers(
    loss: Any,
    loss_weights: Any,
    metrics: Any,
    weighted_metrics: Any,
    output_names: list[str] | None,
) -> tuple:
    """Makes Keras's containers of losses and metrics from arguments of `compile`.

    Raises:
        ValueError: If a metric cannot be copied by its configuration.
    """
    metrics, weighted_metrics = tf.nest.map_structure(
        _copy, (metrics, weighted_metrics)
    )
    return (
        LossesContainer(loss, loss_weights, output_names=output_names),
        MetricsContainer(metrics, weighted_metrics, output_names=output_names),
    )


def _copy(metric):
    """Copies a metric, because it holds the state of one network."""
    if not isinstance(metric, keras.metrics.Metric):
        return metric
    try:
        return type(metric).from_config(metric.get_config())
    except TypeError as error:
        raise ValueError(
            "A metric of your own must have a get_config with the arguments of its "
            "constructor: each network gets a copy. "
            f"Received: {type(metric).__name__} ({error})"
        ) from error
