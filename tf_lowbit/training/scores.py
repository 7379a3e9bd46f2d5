"""A batch, and what networks are measured by on it: losses, their parts, metrics."""

import dataclasses

from tf_lowbit.compat import LossesContainer, MetricsContainer, keras, tf

# Names in the logs.
TOTAL, TASK, DISTILLATION, HINT = "loss", "task_loss", "distillation_loss", "hint_loss"
SHARE, PROBABILITY = "quantized_share", "quantization_probability"
TEACHER = "teacher_"
# No part of the logs.
REGULARIZATION = "regularization_loss"


@dataclasses.dataclass(frozen=True)
class Batch:
    """One replica's part of a global batch.

    Attributes:
        x: inputs.
        y: targets, or None.
        sample_weight: as Keras hands it over, or None.
        examples: how many examples are here, int32 scalar; none, at times, in a
            small last batch.
        share: the examples' share of the global batch, float32 scalar; None on a
            single replica, and in evaluation.
    """

    x: object
    y: object
    sample_weight: object
    examples: tf.Tensor
    share: tf.Tensor | None

    @classmethod
    def of(cls, data, *, in_training: bool) -> "Batch":
        """The batch that Keras hands to `train_step` or `test_step`."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        examples = tf.shape(tf.nest.flatten(x)[0])[0]
        share = None
        if in_training and replicas() > 1:
            local = tf.cast(examples, tf.float32)
            context = tf.distribute.get_replica_context()
            share = local / context.all_reduce(tf.distribute.ReduceOp.SUM, local)
        return cls(x, y, sample_weight, examples, share)

    def mean(self, losses):
        """The mean over this replica's examples, with their weights.

        Args:
            losses: float32 tensor [batch].

        Returns:
            `sum(weight * loss) / examples`, as Keras averages: float32 scalar.
        """
        if self.sample_weight is not None:
            (weights,) = tf.nest.flatten(self.sample_weight)
            losses *= tf.reshape(tf.cast(weights, tf.float32), [-1])
        return tf.math.divide_no_nan(
            tf.reduce_sum(losses), tf.cast(self.examples, tf.float32)
        )


class Scores:
    """What one network is measured by, under names of its own.

    Args:
        network: the model.
        prefix: put in front of every name in the logs; "" for the student.
        losses: Keras's container of the compiled loss.
        metrics: Keras's container of the compiled metrics.
        weights: name of each part of the training loss -> its weight.
    """

    def __init__(self, network, prefix: str, losses, metrics, weights: dict):
        self.network = network
        self._prefix = prefix
        self._losses = losses
        self._metrics = metrics
        self._weights = weights
        self._named: set[int] = set()
        # The task's loss alone is the whole loss but for regularisation.
        parts = weights if len(weights) > 1 else ()
        self._means = {
            name: keras.metrics.Mean(prefix + name) for name in (TOTAL, *parts)
        }

    @classmethod
    def like(cls, model, network, prefix: str, arguments, weights: dict) -> "Scores":
        """Scores of a network by copies of what a model was compiled with.

        Args:
            model: the compiled model.
            network: the network to be measured.
            prefix: as above.
            arguments: the `loss`, `loss_weights`, `metrics` and `weighted_metrics`
                of `compile`.
            weights: as above.
        """
        loss, loss_weights, metrics, weighted_metrics = arguments
        outputs = getattr(model, "output_names", None)
        return cls(
            network,
            prefix,
            LossesContainer(loss, loss_weights, output_names=outputs),
            MetricsContainer(
                _copies(metrics), _copies(weighted_metrics), output_names=outputs
            ),
            weights,
        )

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """Everything that is reset at an epoch's start."""
        return self.shown(in_training=True)

    def parts(self, batch: Batch, outputs) -> dict:
        """The compiled loss, and the regularisation losses if there are any.

        Args:
            batch: this replica's part.
            outputs: what the network makes of it.

        Returns:
            `TASK` -> mean over this replica's examples, `REGULARIZATION` -> sum of the
            network's losses: float32 scalars.

        Raises:
            ValueError: if there is no loss or no target, or the loss is no scalar.
        """
        value = self._losses(batch.y, outputs, batch.sample_weight)
        if value is None:
            raise ValueError(
                "compile must be given a loss, and the data must have targets. "
                f"Received: targets {batch.y}"
            )
        if value.shape.rank != 0:
            raise ValueError(
                "The loss must be one number, for other parts are added to it: give it "
                'reduction="sum_over_batch_size". '
                f"Received: a loss of shape {value.shape}"
            )
        # Keras has divided by the number of replicas.
        value = tf.cast(value, tf.float32) * replicas()
        if replicas() > 1:
            # The mean over no examples is not a number.
            value = tf.where(batch.examples > 0, value, 0.0)
        parts = {TASK: value}
        losses = [tf.cast(loss, tf.float32) for loss in self.network.losses]
        return parts | ({REGULARIZATION: tf.add_n(losses)} if losses else {})

    def add_total(self, parts: dict, *, in_training: bool) -> None:
        """Adds the whole loss, `TOTAL`, to its parts.

        Args:
            parts: name -> mean over this replica's examples.
            in_training: False counts the task's loss with weight 1.
        """
        weighted = self._weighted(parts) if in_training else parts
        parts[TOTAL] = tf.add_n(list(weighted.values()))

    def objective(self, parts: dict, batch: Batch):
        """What this replica adds to the global loss, whose gradients are summed.

        Args:
            parts: as in `add_total`, which it follows.
            batch: this replica's part.

        Returns:
            Float32 scalar.
        """
        if batch.share is None:
            return parts[TOTAL]
        return tf.add_n(
            [
                value * self._share(name, batch)
                for name, value in self._weighted(parts).items()
            ]
        )

    def record(self, parts: dict, outputs, batch: Batch) -> None:
        """Adds a batch to the logged means and the compiled metrics.

        Args:
            parts: with `TOTAL`; in evaluation some others are missing.
            outputs: the network's.
            batch: this replica's part.
        """
        for name, mean in self._means.items():
            if name in parts:
                mean.update_state(parts[name], sample_weight=batch.examples)
        self._metrics.update_state(batch.y, outputs, batch.sample_weight)
        for metric in self._of_keras():
            # Made by the container just now, and named as those of all networks are.
            if id(metric) not in self._named:
                self._named.add(id(metric))
                metric._name = self._prefix + metric.name

    def logs(self, *, in_training: bool) -> dict:
        """The present results by their names in the logs."""
        found = {}
        for metric in self.shown(in_training=in_training):
            result = metric.result()
            if isinstance(result, dict):
                found.update({self._prefix + n: value for n, value in result.items()})
            else:
                found[metric.name] = result
        return found

    def shown(self, *, in_training: bool) -> list[keras.metrics.Metric]:
        """What is in the logs, in their order."""
        parts = self._of_parts() if in_training else []
        return [self._means[TOTAL], *self._of_keras(), *parts]

    def _of_keras(self):
        # The first of the container's is its own total.
        return [*self._losses.metrics[1:], *self._metrics.metrics]

    def _of_parts(self):
        return [mean for name, mean in self._means.items() if name != TOTAL]

    def _weighted(self, parts):
        return {
            name: value * self._weights.get(name, 1.0)
            for name, value in parts.items()
            if name != TOTAL
        }

    def _share(self, name, batch):
        # Keras takes a loss that is a sum over the examples as a sum over replicas.
        kinds = {x.reduction for x in tf.nest.flatten(self._losses._losses) if x}
        is_sum = name == TASK and kinds == {keras.losses.Reduction.SUM}
        is_of_batch = name != REGULARIZATION and not is_sum
        return batch.share if is_of_batch else 1.0 / replicas()


@dataclasses.dataclass(frozen=True)
class Board:
    """All that is logged.

    Attributes:
        of_students: the students' scores.
        of_teacher: the teacher's, or None.
        share: mean of the quantized share of units.
        probability: mean of the probability that they were drawn with.
    """

    of_students: list[Scores]
    of_teacher: Scores | None
    share: keras.metrics.Mean | None
    probability: keras.metrics.Mean | None

    @classmethod
    def of(cls, trainer, names, plan, arguments) -> "Board":
        """The board of a compiled trainer.

        Args:
            trainer: the `LowBitTrainer`.
            names: of its students.
            plan: its `Plan`.
            arguments: as in `Scores.like`.
        """
        losses = plan.distillation
        weights = losses.student_weights() if losses else {TASK: 1.0}
        first, *others = trainer.students
        own = Scores(
            first, "", trainer.compiled_loss, trainer.compiled_metrics, weights
        )
        of_students = [own] + [
            Scores.like(trainer, network, f"{name}_", arguments, weights)
            for network, name in zip(others, names[1:], strict=True)
        ]
        of_teacher = losses and Scores.like(
            trainer, trainer.teacher, TEACHER, arguments, losses.teacher_weights()
        )
        means = (None, None)
        if plan.sampler:
            means = (keras.metrics.Mean(SHARE), keras.metrics.Mean(PROBABILITY))
        return cls(of_students, of_teacher, *means)

    @property
    def scores(self) -> list[Scores]:
        """Of the students, and last of the teacher if there is one."""
        return [*self.of_students, *([self.of_teacher] if self.of_teacher else [])]

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """Everything that is reset at an epoch's start."""
        return [m for scores in self.scores for m in scores.metrics] + self._sampling()

    def logs(self, *, in_training: bool) -> dict:
        """The present results; in evaluation only the students' own."""
        measured = self.scores if in_training else self.of_students
        logs = {}
        for scores in measured:
            logs.update(scores.logs(in_training=in_training))
        if in_training:
            logs.update({mean.name: mean.result() for mean in self._sampling()})
        return logs

    def _sampling(self):
        return [mean for mean in (self.share, self.probability) if mean is not None]


def replicas() -> int:
    """The number of replicas of the present strategy."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def _copies(metrics):
    """The metrics of `compile` anew: a metric object holds one network's state."""

    def copy(metric):
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

    return tf.nest.map_structure(copy, metrics)
