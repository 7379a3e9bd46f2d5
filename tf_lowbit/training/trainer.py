"""The model whose `train_step` runs stochastic precision and joint distillation."""

import contextlib
import os
from collections.abc import Mapping
from typing import Any

from tf_lowbit.compat import is_keras3, keras, tf
from tf_lowbit.core import checks
from tf_lowbit.network import inspection, keras3
from tf_lowbit.training.batch import Batch
from tf_lowbit.training.distillation import Distiller, JointDistillation
from tf_lowbit.training.network_checks import check_networks
from tf_lowbit.training.participant import TASK, TOTAL, Participant, containers
from tf_lowbit.training.quantized_network import CheckedTraining
from tf_lowbit.training.stages import ROLES
from tf_lowbit.training.step_count import StepCount
from tf_lowbit.training.stochastic_precision import Sampler, StochasticPrecision


@keras.utils.register_keras_serializable(package="tf_lowbit")
class LowBitTrainer(CheckedTraining, keras.Model):
    """Trains low-bitwidth networks, alone or together with a teacher.

    `fit` trains the students, plainly or with stochastic precision. A teacher is
    trained in the same step, on the same batch, by its own optimizer. `evaluate` and
    `predict` use the fully quantized student. To deploy, export `trainer.student`.
    Staging callbacks work on a trainer as on a network. `save` writes networks,
    optimizers and counters to a `.keras` file, and `tf_lowbit.load_model` reads it.

    The logs have

    - `loss`, the student's whole loss, and the compiled metrics. In evaluation it is
      the compiled loss and the regularization only, so that with a teacher `val_loss`
      compares with `task_loss`;
    - with a teacher: the terms `task_loss`, `distillation_loss` and `hint_loss`,
      without their weights; and the loss, metrics and own terms of the teacher, with
      the prefix `teacher_`;
    - with stochastic precision: `quantized_share`, the share of quantized units, and
      `quantization_probability`, the p of their draw.

    Sample and class weights count in every term, as in the compiled loss. On several
    replicas the losses are means over the global batch, even if it does not divide
    evenly.

    Args:
        student: Model from `tf_lowbit.quantize`. Or a dict, name -> model, of several
            students with one teacher and one optimizer: `predict` uses the first, and
            the logs of the others have the prefix `<name>_`.
        teacher: A built Sequential or Functional float model. Without hints it may have
            any architecture. A Keras 3 model is converted (`from_keras3`), so that
            `trainer.teacher` is a copy.
        distillation: The losses; None for `JointDistillation()` if there is a teacher.
        stochastic_precision: None quantizes the whole network at every step. Stochastic
            precision needs the number of steps: if the length of the data is unknown,
            give `fit` its `steps_per_epoch`, or `StochasticPrecision` its `steps`.
        name: Name of the model.

    Attributes:
        students: The low-bitwidth networks.
        teacher: The teacher, or None.
        progress: Counters in checkpoints: `step`, the steps since epoch 0 of the
            current training, by which units are drawn, and `total_steps`.

    Raises:
        ValueError: If a student is not quantized, its name has another meaning in the
            logs, networks share variables, teacher and student differ in inputs or
            outputs, the outputs are neither logits [batch, units] nor a sigmoid's
            values, or hints or units cannot be found.
    """

    def __init__(
        self,
        student: keras.Model | Mapping[str, keras.Model],
        teacher: keras.Model | None = None,
        *,
        distillation: JointDistillation | None = None,
        stochastic_precision: StochasticPrecision | None = None,
        name: str | None = None,
    ):
        named = dict(student) if isinstance(student, Mapping) else {"student": student}
        if distillation is not None:
            checks.instance("distillation", distillation, JointDistillation)
        if stochastic_precision is not None:
            checks.instance(
                "stochastic_precision", stochastic_precision, StochasticPrecision
            )
        if is_keras3(teacher):
            teacher = keras3.from_keras3(teacher)
        check_networks(named, teacher)
        if teacher is None and distillation is not None:
            raise ValueError(
                "distillation needs a teacher. "
                f"Received: distillation={distillation!r}, teacher=None"
            )
        names, students = list(named), list(named.values())
        prefixes = ["", *(f"{name}_" for name in names[1:])]
        if teacher is None:
            distiller, networks = None, students
            pairs = zip(students, prefixes, strict=True)
            participants = [Participant(s, p, {TASK: 1.0}) for s, p in pairs]
        else:
            distiller = Distiller(
                distillation or JointDistillation(), students, teacher
            )
            networks = [*students, teacher]
            participants = distiller.participants(prefixes)
        # Inputs are cast by the networks' own layers, as without a trainer.
        super().__init__(name=name, dtype=_policy(networks), autocast=False)
        self.students = students
        self.teacher = teacher
        self.teacher_optimizer = None
        self._names = names
        self._participants = participants  # The teacher is the last.
        self._present = participants  # Those of the current stage.
        self._role: str | None = None
        self._distiller = distiller
        self._sampler = None
        if stochastic_precision is not None:
            self._sampler = Sampler(stochastic_precision, students)
        self._count = StepCount(stochastic_precision)
        self.progress = self._count.progress
        self.built = True
        self.output_names = self.student.output_names
        # Logs are results of metrics, equal on all replicas. Keras would add them over
        # the workers.
        self.distribute_reduction_method = "first"

    @property
    def student(self) -> keras.Model:
        """The low-bitwidth network; the first of several."""
        return self.students[0]

    @property
    def student_names(self) -> list[str]:
        """The students' names, in order; a single student is named "student"."""
        return list(self._names)

    @property
    def trains_teacher(self) -> bool:
        """Whether there is a teacher that is trained, by its own optimizer."""
        return self._distiller is not None and self._distiller.settings.trains_teacher

    def assign_teacher(self, role: str | None) -> None:
        """Sets the teacher's role, and retraces the training step.

        `StagedPrecision` calls it at each stage.

        Args:
            role: As `Stage.teacher`: None for the role in `distillation`, "frozen" or
                "absent".

        Raises:
            ValueError: If there is no teacher, or the role is another one.
        """
        checks.choice("role", role, ROLES)
        if role == self._role:
            return
        if self._distiller is None:
            raise ValueError(
                "A role needs a LowBitTrainer with a teacher. "
                f"Received: role={role!r}, teacher=None"
            )
        self._role, self._present = role, self._distiller.assign_role(role)
        if self.train_function is not None:
            self.make_train_function(force=True)

    @property
    def _own_callbacks(self):
        return (self._count,)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Returns the student's outputs."""
        return self.student(inputs, training=training, mask=mask)

    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        metrics: Any = None,
        loss_weights: Any = None,
        weighted_metrics: Any = None,
        *,
        teacher_optimizer: Any = None,
        **arguments: Any,
    ) -> None:
        """Configures the training; see `keras.Model.compile`.

        Args:
            optimizer: Optimizer of the students.
            loss: Task loss of each network.
            metrics: Metrics of each network.
            loss_weights: As in Keras.
            weighted_metrics: Metrics of each network that use the sample weights.
            teacher_optimizer: Optimizer of the teacher, another object. It keeps its
                state over the stages of `StagedPrecision`, which sets the students'
                learning rate only. To change the teacher's, use a schedule of
                `keras.optimizers.schedules`.
            **arguments: Other arguments of `keras.Model.compile`.

        Raises:
            ValueError: If the teacher is trained without a `teacher_optimizer` or
                without trainable weights, or a `teacher_optimizer` is given and no
                teacher is trained. With a teacher: if an optimizer averages weights, or
                `from_logits` of the loss contradicts the networks' outputs.
        """
        is_same = teacher_optimizer is optimizer and not isinstance(optimizer, str)
        if self.trains_teacher and (teacher_optimizer is None or is_same):
            raise ValueError(
                "compile must be given a teacher_optimizer to train the teacher: "
                f"another object than optimizer. Received: {teacher_optimizer}"
            )
        if self.trains_teacher and not self.teacher.trainable_variables:
            raise ValueError(
                "The teacher must have trainable weights: without them, use "
                'JointDistillation(teacher="frozen"). '
                f"Received: {self.teacher.name!r} without any"
            )
        if teacher_optimizer is not None and not self.trains_teacher:
            raise ValueError(
                "teacher_optimizer must be None where no teacher is trained. "
                f"Received: {teacher_optimizer}"
            )
        self.assign_teacher(None)
        given = (optimizer, teacher_optimizer, loss, metrics, weighted_metrics)
        with self.distribute_strategy.scope():
            given = keras3.as_tf_keras(given)
        optimizer, teacher_optimizer, loss, metrics, weighted_metrics = given
        if self._distiller is not None:
            averaging = [o for o in (optimizer, teacher_optimizer) if _averages(o)]
            if averaging:
                raise ValueError(
                    "Optimizers must not average weights (use_ema) if there is a "
                    "teacher: Keras looks for the averages of all networks in one "
                    f"optimizer. Received: {averaging}"
                )
            self._distiller.compile(loss)
        super().compile(
            optimizer, loss, metrics, loss_weights, weighted_metrics, **arguments
        )
        with self.distribute_strategy.scope():
            _build_optimizer(self.optimizer, self._student_variables())
            if self.trains_teacher:
                # As for the optimizer: resolves a name, and scales the loss in float16.
                self.teacher_optimizer = self._get_optimizer(teacher_optimizer)
                variables = self.teacher.trainable_variables
                _build_optimizer(self.teacher_optimizer, variables)
            if self._sampler is not None:
                self._sampler.compile()
            first, *others = self._participants
            first.compile(self.compiled_loss, self.compiled_metrics)
            given = (loss, loss_weights, metrics, weighted_metrics, self.output_names)
            for participant in others:
                participant.compile(*containers(*given))

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """All metrics, which Keras resets at the start of an epoch."""
        if not self._is_compiled:
            return []
        of_networks = [m for each in self._participants for m in each.metrics]
        return of_networks + (self._sampler.metrics if self._sampler else [])

    @property
    def metrics_names(self) -> list[str]:
        """Names of the values that `evaluate` returns, in order."""
        students = self._participants[: len(self.students)] if self._is_compiled else []
        return [metric.name for each in students for metric in each.evaluated]

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Trains all networks for one step on one batch; Keras calls it.

        CE is the compiled loss, R the regularization. D and H are the distances of
        `JointDistillation`, which take the other network as a constant:

            loss of a student = task_weight CE + R
                + distillation_weight D(teacher, student) + hint_weight H
            loss of the teacher = teacher_task_weight CE + R
                + teacher_distillation_weight D(student, teacher) + hint_weight H

        `StochasticPrecision` draws by seed and step which units round. If the teacher
        is absent in this stage, the loss of a student is CE + R.

        Args:
            data: `x`, `(x, y)` or `(x, y, sample_weight)`.
        """
        batch, networks = Batch(data), self._present
        has_teacher = len(networks) > len(self.students)
        moves_teacher = has_teacher and self._distiller.present.trains_teacher
        share = batch.share()
        with tf.control_dependencies(tf.nest.flatten(batch.x)):
            # The step is read after the data, so at their end no step is counted.
            step = tf.identity(self.progress.step)
        with self._drawn(step), tf.GradientTape(persistent=moves_teacher) as tape:
            seen = (network.see(batch.x) for network in networks)
            outputs, features = zip(*seen, strict=True)
            losses = [
                network.task_losses(batch, put_out)
                for network, put_out in zip(networks, outputs, strict=True)
            ]
            if has_teacher:
                distances = self._distiller.losses(outputs, features, batch.mean)
                losses = [a | b for a, b in zip(losses, distances, strict=True)]
            objectives = [
                network.objective(terms, share)
                for network, terms in zip(networks, losses, strict=True)
            ]
            student_loss = tf.add_n(objectives[: len(self.students)])
        self.optimizer.minimize(student_loss, self._student_variables(), tape=tape)
        if moves_teacher:
            # The tape holds the students' outputs from before their update.
            self.teacher_optimizer.minimize(
                objectives[-1], self.teacher.trainable_variables, tape=tape
            )
        self.progress.step.assign(step + 1)
        logs: dict[str, tf.Tensor] = {}
        for network, terms, put_out in zip(networks, losses, outputs, strict=True):
            logs |= network.record(terms, put_out, batch)
        return logs | (self._sampler.logs() if self._sampler else {})

    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Evaluates the fully quantized students on one batch; Keras calls it."""
        batch = Batch(data)
        logs: dict[str, tf.Tensor] = {}
        for student, network in zip(self.students, self._participants, strict=False):
            outputs = student(batch.x, training=False)
            losses = network.task_losses(batch, outputs)
            losses = {TOTAL: tf.add_n(list(losses.values()))}
            logs |= network.record(losses, outputs, batch)
        return logs

    def _drawn(self, step):
        """Returns a context in which only the units drawn for a step round."""
        if self._sampler is None:
            return contextlib.nullcontext()
        if not self._count.is_known:
            raise ValueError(
                "StochasticPrecision must know the number of steps: train with fit, or "
                "give it steps=. Received: steps=None, outside of fit"
            )
        return self._sampler.sampled(step, self.progress.total_steps)

    def save(self, filepath: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Saves networks, settings, optimizers and counters; see `keras.Model.save`.

        Args:
            filepath: Path of a `.keras` file. For another format, save a single
                network: `trainer.student.save(path)`.
            *args: As in Keras.
            **kwargs: As in Keras.

        Raises:
            ValueError: If the file is of another format.
        """
        if not os.fspath(filepath).endswith(".keras"):
            raise ValueError(
                "A LowBitTrainer must be saved to a .keras file: for another format, "
                "save a network, such as trainer.student. "
                f"Received: filepath={os.fspath(filepath)!r}"
            )
        super().save(filepath, *args, **kwargs)

    def save_weights(
        self, filepath: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        """Saves the networks' weights and optimizers; see `keras.Model.save_weights`.

        Args:
            filepath: Path of a `.weights.h5` file, or prefix of a checkpoint. If the
                networks have different names, also path of a `.h5` file.
            *args: As in Keras.
            **kwargs: As in Keras.

        Raises:
            ValueError: If networks have the same name and the file is of Keras's older
                HDF5 format, which cannot hold both.
        """
        path, names = os.fspath(filepath), [layer.name for layer in self.layers]
        is_hdf5 = path.endswith((".h5", ".hdf5", ".keras"))
        is_hdf5 = is_hdf5 or kwargs.get("save_format") in ("h5", "hdf5")
        is_older = is_hdf5 and not path.endswith(".weights.h5")
        if is_older and len(set(names)) < len(names):
            raise ValueError(
                "Networks with the same name must be saved to a .weights.h5 file. "
                f"Received: filepath={path!r} of {names}"
            )
        super().save_weights(filepath, *args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """Returns the serialized arguments of the constructor."""
        arguments = {
            "student": dict(zip(self._names, self.students, strict=True)),
            "teacher": self.teacher,
            "distillation": self._distiller and self._distiller.settings,
            "stochastic_precision": self._sampler and self._sampler.settings,
            "name": self.name,
        }
        serialize = keras.saving.serialize_keras_object
        return {name: serialize(value) for name, value in arguments.items()}

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> "LowBitTrainer":
        """Makes a trainer from the result of `get_config`, with new weights."""
        with keras.utils.custom_object_scope(custom_objects or {}):
            deserialize = keras.saving.deserialize_keras_object
            return cls(**{name: deserialize(value) for name, value in config.items()})

    def get_compile_config(self) -> dict[str, Any] | None:
        """Returns the serialized arguments of `compile`; None before `compile`."""
        config = super().get_compile_config()
        if config is not None:
            config["teacher_optimizer"] = keras.saving.serialize_keras_object(
                self.teacher_optimizer
            )
        return config

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles with the result of `get_compile_config`."""
        self.compile(**keras.saving.deserialize_keras_object(config))

    def save_own_variables(self, store: Any) -> None:
        """Writes the counters; Keras saves networks and optimizers itself."""
        for name, counted in self._count.variables().items():
            store[name] = counted.numpy()

    def load_own_variables(self, store: Any) -> None:
        """Reads the counters, which older files of weights lack."""
        if store.keys():
            for name, counted in self._count.variables().items():
                counted.assign(store[name][()])

    def _student_variables(self):
        return [v for network in self.students for v in network.trainable_variables]


def _policy(networks) -> str | None:
    """Returns "mixed_float16" if a layer computes in float16: Keras scales the loss."""
    layers = (layer for network in networks for layer in network.layers)
    dtypes = {inspection.wrapped_layer(layer).compute_dtype for layer in layers}
    return "mixed_float16" if "float16" in dtypes else "float32"


def _averages(optimizer) -> bool:
    """Tells whether Keras assigns averaged weights when `fit` ends."""
    return getattr(getattr(optimizer, "inner_optimizer", optimizer), "use_ema", False)


def _build_optimizer(optimizer, variables):
    # A checkpoint that is restored before the first step needs the optimizer's
    # variables. Legacy optimizers have no `build`.
    if hasattr(optimizer, "build"):
        optimizer.build(variables)
