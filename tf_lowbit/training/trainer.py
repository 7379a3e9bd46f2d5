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
    trained together with them: all see each batch once, in one step, and the teacher
    has its own optimizer. `evaluate` and `predict` are the student's, fully quantized;
    the network to be deployed is `trainer.student`. Staging callbacks work on a trainer
    as on a network. `save` writes networks, optimizers and counters to a `.keras` file,
    which `tf_lowbit.load_model` reads.

    Logged: `loss`, the student's whole loss, and the compiled metrics. With a teacher
    also the terms `task_loss`, `distillation_loss` and `hint_loss`, without their
    weights, and the same of the teacher, as far as it has them, under `teacher_`. In
    evaluation `loss` is the compiled loss and the regularisation only, so that with a
    teacher `val_loss` compares with `task_loss`. With stochastic precision
    `quantized_share`, the share of units that were quantized, and
    `quantization_probability`, the p that they were drawn with. Sample and class
    weights count in every term, as in the compiled loss.

    On several replicas the losses are means over the global batch, also where it does
    not divide evenly.

    Args:
        student: what `tf_lowbit.quantize` made; or a dict of several, by name, which
            learn from one teacher, with one optimizer. The first is the one that
            `predict` means; the others' logs have `<name>_` in front.
        teacher: a built Sequential or Functional float model; where only outputs are
            matched it may be of any architecture. One of Keras 3 is converted
            (`from_keras3`): `trainer.teacher` is then a copy.
        distillation: the losses; None for `JointDistillation()` if there is a teacher.
        stochastic_precision: None quantizes the whole network at every step. It must
            know the number of steps: data of unknown length need `steps_per_epoch` in
            `fit`, or its `steps`.
        name: of the model.

    Attributes:
        students: the low-bitwidth networks.
        teacher: the teacher, or None.
        progress: checkpointed counters: `step`, the steps done since epoch 0 of the
            present training, from which the draws come, and `total_steps`.

    Raises:
        ValueError: if a student is not quantized or its name is taken in the logs,
            networks share variables, teacher and student differ in inputs or outputs
            or do not put out logits [batch, units] or a sigmoid's values of them, or
            hints or units cannot be found.
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
        self._present = participants  # Those that are in the present stage's steps.
        self._role: str | None = None
        self._distiller = distiller
        self._sampler = None
        if stochastic_precision is not None:
            self._sampler = Sampler(stochastic_precision, students)
        self._count = StepCount(stochastic_precision)
        self.progress = self._count.progress
        self.built = True
        self.output_names = self.student.output_names
        # Logs are results of metrics, the same on all replicas: Keras's default would
        # add them up over the workers.
        self.distribute_reduction_method = "first"

    @property
    def student(self) -> keras.Model:
        """The low-bitwidth network; the first, if there are several."""
        return self.students[0]

    @property
    def student_names(self) -> list[str]:
        """Of the students, in their order; "student" for a single one without."""
        return list(self._names)

    @property
    def trains_teacher(self) -> bool:
        """Whether there is a teacher whose weights move, with its own optimizer."""
        return self._distiller is not None and self._distiller.settings.trains_teacher

    def assign_teacher(self, role: str | None) -> None:
        """Sets what the teacher does from the next step on, which is traced anew.

        `StagedPrecision` calls it at each stage.

        Args:
            role: `Stage.teacher`: None for what `distillation` says, or "frozen", or
                "absent".

        Raises:
            ValueError: if there is no teacher.
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
        """The student's outputs."""
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
            optimizer: of the students.
            loss: the task's loss, of students and teacher alike.
            metrics: of each network.
            loss_weights: as in Keras.
            weighted_metrics: of each network.
            teacher_optimizer: of the teacher, not the same object. It keeps its state
                over the stages of `StagedPrecision`, which sets the students' learning
                rate only: a schedule of `keras.optimizers.schedules` goes in here.
            **arguments: others of `keras.Model.compile`.

        Raises:
            ValueError: if there is a teacher to train and no optimizer for it, or an
                optimizer and no such teacher; or a teacher and an optimizer that
                averages weights; or a teacher and a loss that reads logits where the
                networks put out probabilities, or the reverse.
        """
        is_same = teacher_optimizer is optimizer and not isinstance(optimizer, str)
        if self.trains_teacher and (teacher_optimizer is None or is_same):
            raise ValueError(
                "compile must be given a teacher_optimizer, another object than the "
                f"optimizer, for the teacher is trained. Received: {teacher_optimizer}"
            )
        if self.trains_teacher and not self.teacher.trainable_variables:
            raise ValueError(
                'The teacher must have weights to train, or be "frozen" in '
                f"JointDistillation. Received: {self.teacher.name!r} without any"
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
                    "Optimizers must not average weights (use_ema) where there is a "
                    "teacher: Keras would look for both networks' in one of them. "
                    f"Received: {averaging}"
                )
            self._distiller.compile(loss)
        super().compile(
            optimizer, loss, metrics, loss_weights, weighted_metrics, **arguments
        )
        with self.distribute_strategy.scope():
            _build_optimizer(self.optimizer, self._student_variables())
            if self.trains_teacher:
                # By name, and with a loss scale in float16, as Keras has the other.
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
        """Keras's: what is reset at an epoch's start."""
        if not self._is_compiled:
            return []
        of_networks = [m for each in self._participants for m in each.metrics]
        return of_networks + (self._sampler.metrics if self._sampler else [])

    @property
    def metrics_names(self) -> list[str]:
        """Keras's: the order of what `evaluate` returns, if not as a dict."""
        students = self._participants[: len(self.students)] if self._is_compiled else []
        return [metric.name for each in students for metric in each.evaluated]

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        """One step of all networks on one batch; Keras calls it.

        With CE the compiled loss, R the regularisation, and D and H the distances of
        `JointDistillation`, for which the other network is a constant:

            loss of a student = task_weight CE + R
                + distillation_weight D(teacher, student) + hint_weight H
            loss of the teacher = teacher_task_weight CE + R
                + teacher_distillation_weight D(student, teacher) + hint_weight H

        The students round as `StochasticPrecision` draws by seed and step. In a stage
        with an absent teacher, the loss of a student is CE + R.

        Args:
            data: `x`, `(x, y)` or `(x, y, sample_weight)`.

        Returns:
            The logs.
        """
        batch, networks = Batch(data), self._present
        has_teacher = len(networks) > len(self.students)
        moves_teacher = has_teacher and self._distiller.present.trains_teacher
        share = batch.share()
        with tf.control_dependencies(tf.nest.flatten(batch.x)):
            # Where the data have ended there is no step, and nothing is counted.
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
            # From the students' outputs before their update: they are on the tape.
            self.teacher_optimizer.minimize(
                objectives[-1], self.teacher.trainable_variables, tape=tape
            )
        self.progress.step.assign(step + 1)
        logs: dict[str, tf.Tensor] = {}
        for network, terms, put_out in zip(networks, losses, outputs, strict=True):
            logs |= network.record(terms, put_out, batch)
        return logs | (self._sampler.logs() if self._sampler else {})

    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Measures the students on one batch, fully quantized; Keras calls it."""
        batch = Batch(data)
        logs: dict[str, tf.Tensor] = {}
        for student, network in zip(self.students, self._participants, strict=False):
            outputs = student(batch.x, training=False)
            losses = network.task_losses(batch, outputs)
            losses = {TOTAL: tf.add_n(list(losses.values()))}
            logs |= network.record(losses, outputs, batch)
        return logs

    def _drawn(self, step):
        """A context in which the students round as drawn for a step."""
        if self._sampler is None:
            return contextlib.nullcontext()
        if not self._count.is_known:
            raise ValueError(
                "StochasticPrecision must know how many steps the training has: train "
                "with fit, or give it steps=. Received: steps=None, outside of fit"
            )
        return self._sampler.sampled(step, self.progress.total_steps)

    def save(self, filepath: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Saves networks, settings, optimizers and counters; see `keras.Model.save`.

        Args:
            filepath: of a `.keras` file. A single network may have another format:
                `trainer.student.save(path)`.
            *args: as in Keras.
            **kwargs: likewise.

        Raises:
            ValueError: for another kind of file.
        """
        if not os.fspath(filepath).endswith(".keras"):
            raise ValueError(
                "A LowBitTrainer is saved to a .keras file; its networks, such as "
                "trainer.student, to any format. "
                f"Received: filepath={os.fspath(filepath)!r}"
            )
        super().save(filepath, *args, **kwargs)

    def save_weights(
        self, filepath: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        """Saves the networks' weights and optimizers; see `keras.Model.save_weights`.

        Args:
            filepath: of a `.weights.h5` file, or the prefix of a checkpoint; where the
                networks have names of their own, also of a `.h5` file.
            *args: as in Keras.
            **kwargs: likewise.

        Raises:
            ValueError: for a file of Keras's older HDF5 format, which cannot hold two
                networks of one name.
        """
        path, names = os.fspath(filepath), [layer.name for layer in self.layers]
        is_hdf5 = path.endswith((".h5", ".hdf5", ".keras"))
        is_hdf5 = is_hdf5 or kwargs.get("save_format") in ("h5", "hdf5")
        is_older = is_hdf5 and not path.endswith(".weights.h5")
        if is_older and len(set(names)) < len(names):
            raise ValueError(
                "The weights of networks of one name are saved to a .weights.h5 file. "
                f"Received: filepath={path!r} of {names}"
            )
        super().save_weights(filepath, *args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, serialized."""
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
        """The trainer that `get_config` wrote; its weights are new."""
        with keras.utils.custom_object_scope(custom_objects or {}):
            deserialize = keras.saving.deserialize_keras_object
            return cls(**{name: deserialize(value) for name, value in config.items()})

    def get_compile_config(self) -> dict[str, Any] | None:
        """What `compile` was given, serialized; None if it was not called."""
        config = super().get_compile_config()
        if config is not None:
            config["teacher_optimizer"] = keras.saving.serialize_keras_object(
                self.teacher_optimizer
            )
        return config

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles as `get_compile_config` says."""
        self.compile(**keras.saving.deserialize_keras_object(config))

    def save_own_variables(self, store: Any) -> None:
        """Keras's: writes what is neither a network's nor an optimizer's."""
        for name, counted in self._count.variables().items():
            store[name] = counted.numpy()

    def load_own_variables(self, store: Any) -> None:
        """Keras's: reads it; older files of weights have none of it."""
        if store.keys():
            for name, counted in self._count.variables().items():
                counted.assign(store[name][()])

    def _student_variables(self):
        return [v for network in self.students for v in network.trainable_variables]


def _policy(networks) -> str | None:
    """mixed_float16 where a layer computes in it, for Keras then scales the loss."""
    layers = (layer for network in networks for layer in network.layers)
    dtypes = {inspection.wrapped_layer(layer).compute_dtype for layer in layers}
    return "mixed_float16" if "float16" in dtypes else "float32"


def _averages(optimizer) -> bool:
    """Whether Keras puts averaged weights in place when `fit` ends."""
    return getattr(getattr(optimizer, "inner_optimizer", optimizer), "use_ema", False)


def _build_optimizer(optimizer, variables):
    # Slots exist from the start, in the order of the variables: a checkpoint that is
    # restored before the first step finds them. Legacy optimizers make them later.
    if hasattr(optimizer, "build"):
        optimizer.build(variables)
