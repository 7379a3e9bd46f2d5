"""A network in training: its losses and metrics on a batch."""

from collections.abc import Iterable
from typing import Any

from tf_lowbit.compat import (
    LossesContainer,
    MetricsContainer,
    deep_graphs,
    keras,
    tf,
)
from tf_lowbit.training.batch import Batch, replicas

# Names in the logs.
TOTAL, TASK, DISTILLATION, HINT = "loss", "task_loss", "distillation_loss", "hint_loss"
# Not logged.
REGULARIZATION = "regularization_loss"


class Participant:
    """A network in training, with losses and metrics under its own names.

    Losses are dicts: name of the term -> mean over this replica's examples, a float32
    scalar.

    Args:
        network: the model.
        prefix: prefix of its names in the logs; "" for the first student.
        weights: name of each loss term -> weight. Regularization has weight 1.
        layers: names of the layers whose features distillation reads.
        is_trained: False for a frozen teacher.

    Attributes:
        weights: as above; those of the present stage.
        is_trained: likewise.

    Raises:
        ValueError: if `layers` are given and some layer leads to no output.
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
        """Takes Keras's containers of losses and metrics, and makes the mean losses."""
        self._losses, self._metrics = losses, metrics
        self._is_named = self._prefix == ""
        self._total = keras.metrics.Mean(self._prefix + TOTAL)
        # A single term equals the total, up to regularization.
        terms = self.weights if len(self.weights) > 1 else ()
        self._terms = {name: keras.metrics.Mean(self._prefix + name) for name in terms}

    @property
    def evaluated(self) -> list[keras.metrics.Metric]:
        """The total loss and the compiled metrics, in the order of the logs."""
        # The first metric of the loss container is its own total.
        return [self._total, *self._losses.metrics[1:], *self._metrics.metrics]

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """All metrics that are reset at the start of an epoch."""
        return [*self.evaluated, *self._terms.values()]

    def see(self, x: Any) -> tuple:
        """The forward pass in training: (outputs, layer name -> features)."""
        if self._with_features is None:
            return self._network(x, training=self.is_trained), {}
        return self._with_features(x, training=self.is_trained)

    def task_losses(self, batch: Batch, outputs: Any) -> dict:
        """CE, the compiled loss, and R, the regularization loss if there is one.

        Raises:
            ValueError: without a loss or targets, or if the loss is not a scalar.
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
        # Keras has divided by the number of replicas.
        losses = {TASK: tf.cast(loss, tf.float32) * replicas()}
        if replicas() > 1:
            # The mean over no examples is NaN.
            losses[TASK] = tf.where(batch.examples > 0, losses[TASK], 0.0)
        penalties = [tf.cast(penalty, tf.float32) for penalty in self._network.losses]
        if penalties:
            losses[REGULARIZATION] = tf.add_n(penalties)
        return losses

    def objective(self, losses: dict, share: tf.Tensor) -> tf.Tensor:
        """The weighted sum of the terms, which is also added to `losses` as `TOTAL`.

        On several replicas it returns this replica's part of the global batch's loss,
        from its `share` of the batch, because gradients are summed over replicas.
        """
        terms = {name: x * self.weights.get(name, 1.0) for name, x in losses.items()}
        losses[TOTAL] = tf.add_n(list(terms.values()))
        if share is None:
            return losses[TOTAL]
        shares = dict.fromkeys(terms, share) | {REGULARIZATION: 1.0 / replicas()}
        # Keras sums a loss with reduction SUM over the replicas, too.
        kinds = {x.reduction for x in tf.nest.flatten(self._losses._losses) if x}
        if kinds == {keras.losses.Reduction.SUM}:
            shares[TASK] = 1.0 / replicas()
        return tf.add_n([x * shares[name] for name, x in terms.items()])

    def record(self, losses: dict, outputs: Any, batch: Batch) -> dict:
        """Adds a batch to the mean losses and to the compiled metrics.

        Returns:
            Name in the logs -> present result.
        """
        terms = {name: mean for name, mean in self._terms.items() if name in losses}
        for name, mean in {TOTAL: self._total, **terms}.items():
            mean.update_state(losses[name], sample_weight=batch.examples)
        self._metrics.update_state(batch.y, outputs, batch.sample_weight)
        if not self._is_named:
            # The containers made them just now, with the same names in each network.
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
    """New Keras containers of losses and of metrics, from the arguments of `compile`.

    Raises:
        ValueError: if a metric cannot be copied by its configuration.
    """
    metrics, weighted_metrics = tf.nest.map_structure(
        _copy, (metrics, weighted_metrics)
    )
    return (
        LossesContainer(loss, loss_weights, output_names=output_names),
        MetricsContainer(metrics, weighted_metrics, output_names=output_names),
    )


def _copy(metric):
    """A copy of a metric, because a metric holds the state of one network."""
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
