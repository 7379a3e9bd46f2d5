"""The model whose `train_step` runs stochastic precision and joint distillation."""

import inspect
import os
from collections.abc import Mapping

from tf_lowbit import inspection, keras3
from tf_lowbit.compat import is_keras3, keras, tf
from tf_lowbit.core import checks
from tf_lowbit.quantized_network import CheckedTraining
from tf_lowbit.training import distillation as distilling
from tf_lowbit.training.distillation import JointDistillation
from tf_lowbit.training.plan import Plan
from tf_lowbit.training.scores import DISTILLATION, HINT, TASK, Batch, Board
from tf_lowbit.training.step_count import CountSteps, StepCount
from tf_lowbit.training.stochastic_precision import StochasticPrecision


@keras.utils.register_keras_serializable(package="tf_lowbit")
class LowBitTrainer(CheckedTraining, keras.Model):
    """Trains low-bitwidth networks as the method has it.

    `fit` trains the students, plainly or with stochastic precision, and with a teacher
    jointly with it: both see each batch once, in one step, and each has its own
    optimizer. `evaluate` and `predict` are the student's, fully quantized; the network
    to be deployed is `trainer.student`. Staging callbacks work on a trainer as on a
    network. `save` writes all of it to a `.keras` file, networks, optimizers and
    counters, and `tf_lowbit.load_model` reads it.

    Logged: `loss`, the student's whole loss, and the compiled metrics; with a teacher
    also the parts `task_loss`, `distillation_loss` and `hint_loss`, without their
    weights, and the same of the teacher, as far as it has them, under `teacher_`. In
    evaluation `loss` is the compiled loss and the regularisation only, so that with a
    teacher `val_loss` compares with `task_loss`. With stochastic precision
    `quantized_share`, the share of units that were quantized, and
    `quantization_probability`, the p that they were drawn with. Sample and class
    weights count in every part, as in the compiled loss.

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
        stochastic_precision: None quantizes the whole network at every step.
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
        student,
        teacher: keras.Model | None = None,
        *,
        distillation: JointDistillation | None = None,
        stochastic_precision: StochasticPrecision | None = None,
        name: str | None = None,
    ):
        named = dict(student) if isinstance(student, Mapping) else {"student": student}
        _check_names(named)
        networks = list(named.values())
        if distillation is not None:
            checks.instance("distillation", distillation, JointDistillation)
        if stochastic_precision is not None:
            checks.instance(
                "stochastic_precision", stochastic_precision, StochasticPrecision
            )
        if is_keras3(teacher):
            teacher = keras3.from_keras3(teacher)
        plan = Plan.of(networks, teacher, distillation, stochastic_precision)
        everyone = networks if teacher is None else [*networks, teacher]
        # Inputs are cast by the networks' own layers, as without a trainer.
        super().__init__(name=name, dtype=_policy(everyone), autocast=False)
        self._plan = plan
        self._names = list(named)
        self._precision = stochastic_precision
        self.students = networks
        self.teacher = teacher
        self.teacher_optimizer = None
        self._count = StepCount(
            stochastic_precision and stochastic_precision.steps,
            is_needed=plan.sampler is not None,
        )
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
        return self._plan.trains_teacher

    def call(self, inputs, training=None, mask=None):
        """The student's outputs."""
        return self.student(inputs, training=training, mask=mask)

    def compile(
        self,
        optimizer="rmsprop",
        loss=None,
        metrics=None,
        loss_weights=None,
        weighted_metrics=None,
        *,
        teacher_optimizer=None,
        **arguments,
    ):
        """Configures the training; see `keras.Model.compile`.

        Args:
            optimizer: of the students.
            loss: the task's loss, of students and teacher alike.
            metrics: of each network.
            loss_weights: as Keras has them.
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
        with self.distribute_strategy.scope():
            optimizer, teacher_optimizer = keras3.as_tf_keras(
                (optimizer, teacher_optimizer)
            )
            loss, metrics, weighted_metrics = keras3.as_tf_keras(
                (loss, metrics, weighted_metrics)
            )
        averaging = [o for o in (optimizer, teacher_optimizer) if _averages(o)]
        if self.teacher is not None and averaging:
            raise ValueError(
                "Optimizers must not average weights (use_ema) where there is a "
                "teacher: Keras would look for both networks' in one of them. "
                f"Received: {averaging}"
            )
        units = None if self.teacher is None else self.teacher.output_shape[-1]
        self._outputs = self._plan.outputs(loss, units)
        super().compile(
            optimizer, loss, metrics, loss_weights, weighted_metrics, **arguments
        )
        with self.distribute_strategy.scope():
            _build_optimizer(self.optimizer, self._student_variables())
            if self.trains_teacher:
                # By name, and with a loss scale in float16, as Keras has the other.
                self.teacher_optimizer = self._get_optimizer(teacher_optimizer)
                _build_optimizer(
                    self.teacher_optimizer, self.teacher.trainable_variables
                )
            arguments = (loss, loss_weights, metrics, weighted_metrics)
            self._board = Board.of(self, self._names, self._plan, arguments)

    @property
    def metrics(self):
        """Keras's: what is reset at an epoch's start."""
        return self._board.metrics if self._is_compiled else []

    @property
    def metrics_names(self):
        """Keras's: the order of what `evaluate` returns, if not as a dict."""
        scores = self._board.of_students if self._is_compiled else []
        return [m.name for own in scores for m in own.shown(in_training=False)]

    def fit(self, *args, **kwargs):
        """Trains; see `keras.Model.fit`.

        Raises:
            ValueError: besides Keras's own, where stochastic precision cannot know the
                number of steps: data of unknown length, and no `steps_per_epoch`.
        """
        given = inspect.signature(super().fit).bind(*args, **kwargs)
        callbacks = given.arguments.get("callbacks")
        counting = CountSteps(self._count)
        if isinstance(callbacks, keras.callbacks.CallbackList):
            counting.set_model(self)
            counting.set_params(callbacks.params)
            callbacks.append(counting)
        else:
            others = tf.nest.flatten(callbacks) if callbacks else []
            given.arguments["callbacks"] = [counting, *others]
        return super().fit(*given.args, **given.kwargs)

    def train_step(self, data):
        """One step of all networks on one batch; Keras calls it.

        Args:
            data: `x`, `(x, y)` or `(x, y, sample_weight)`.

        Returns:
            The logs.
        """
        batch = Batch.of(data, in_training=True)
        with tf.control_dependencies(tf.nest.flatten(batch.x)):
            # Where the data have ended there is no step, and nothing is counted.
            step = tf.identity(self.progress.step)
        is_quantized = self._draw(step)
        with (
            self._plan.sampled(is_quantized),
            tf.GradientTape(persistent=self.trains_teacher) as tape,
        ):
            seen = [see(batch.x, training=True) for see in self._plan.students]
            teacher = None
            if self._plan.teacher is not None:
                teacher = self._plan.teacher(batch.x, training=self.trains_teacher)
            parts = self._parts(batch, seen, teacher)
            objectives = []
            for scores, own in zip(self._board.scores, parts, strict=True):
                scores.add_total(own, in_training=True)
                objectives.append(scores.objective(own, batch))
            student_loss = tf.add_n(objectives[: len(seen)])
        self.optimizer.minimize(student_loss, self._student_variables(), tape=tape)
        if self.trains_teacher:
            # From the students' outputs before their update: they are on the tape.
            self.teacher_optimizer.minimize(
                objectives[-1], self.teacher.trainable_variables, tape=tape
            )
        self.progress.step.assign(step + 1)
        everyone = [*seen, teacher] if teacher is not None else seen
        for scores, own, one in zip(self._board.scores, parts, everyone, strict=True):
            scores.record(own, one.outputs, batch)
        return self._board.logs(in_training=True)

    def test_step(self, data):
        """Measures the students on one batch, fully quantized; Keras calls it.

        Args:
            data: as in `train_step`.

        Returns:
            The logs.
        """
        batch = Batch.of(data, in_training=False)
        for see, scores in zip(
            self._plan.students, self._board.of_students, strict=True
        ):
            outputs = see(batch.x, training=False).outputs
            parts = scores.parts(batch, outputs)
            scores.add_total(parts, in_training=False)
            scores.record(parts, outputs, batch)
        return self._board.logs(in_training=False)

    def save(self, filepath, *args, **kwargs):
        """Saves networks, settings, optimizers and counters; see `keras.Model.save`.

        Args:
            filepath: of a `.keras` file. A single network may have another format:
                `trainer.student.save(path)`.
            *args: as Keras has them.
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

    def save_weights(self, filepath, *args, **kwargs):
        """Saves the networks' weights and optimizers; see `keras.Model.save_weights`.

        Args:
            filepath: of a `.weights.h5` file, or the prefix of a checkpoint; where the
                networks have names of their own, also of a `.h5` file.
            *args: as Keras has them.
            **kwargs: likewise.

        Raises:
            ValueError: for a file of Keras's older HDF5 format, which cannot hold two
                networks of one name.
        """
        name = os.fspath(filepath)
        is_older = kwargs.get("save_format") in ("h5", "hdf5") or name.endswith(
            (".h5", ".hdf5", ".keras")
        )
        names = [layer.name for layer in self.layers]
        is_older = is_older and not name.endswith(".weights.h5")
        if is_older and len(set(names)) < len(names):
            raise ValueError(
                "The weights of networks of one name are saved to a .weights.h5 file. "
                f"Received: filepath={name!r} of {names}"
            )
        super().save_weights(filepath, *args, **kwargs)

    def get_config(self):
        """The constructor's arguments, serialized."""
        arguments = {
            "student": dict(zip(self._names, self.students, strict=True)),
            "teacher": self.teacher,
            "distillation": self._plan.distillation,
            "stochastic_precision": self._precision,
            "name": self.name,
        }
        serialize = keras.saving.serialize_keras_object
        return {name: serialize(value) for name, value in arguments.items()}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """The trainer that `get_config` wrote; its weights are new."""
        with keras.utils.custom_object_scope(custom_objects or {}):
            deserialize = keras.saving.deserialize_keras_object
            return cls(**{name: deserialize(value) for name, value in config.items()})

    def get_compile_config(self):
        """What `compile` was given, serialized; None if it was not called."""
        config = super().get_compile_config()
        if config is not None:
            config["teacher_optimizer"] = keras.saving.serialize_keras_object(
                self.teacher_optimizer
            )
        return config

    def compile_from_config(self, config):
        """Compiles as `get_compile_config` says."""
        self.compile(**keras.saving.deserialize_keras_object(config))

    def save_own_variables(self, store):
        """Keras's: writes what is neither a network's nor an optimizer's."""
        for name, counted in self._count.variables().items():
            store[name] = counted.numpy()

    def load_own_variables(self, store):
        """Keras's: reads it; older files of weights have none of it."""
        if store.keys():
            for name, counted in self._count.variables().items():
                counted.assign(store[name][()])

    def _draw(self, step):
        """Draws the units to be quantized in this step, and logs their share."""
        sampler = self._plan.sampler
        if sampler is None:
            return None
        if not self._count.is_known:
            raise ValueError(
                "StochasticPrecision must know how many steps the training has: train "
                "with fit, or give it steps=. Received: steps=None, outside of fit"
            )
        is_quantized, probability = sampler.draw(step, self.progress.total_steps)
        self._board.share.update_state(tf.cast(is_quantized, tf.float32))
        self._board.probability.update_state(probability)
        return is_quantized

    def _parts(self, batch, seen, teacher) -> list[dict]:
        """The parts of the loss of each student, and last of the teacher."""
        everyone = [*seen, teacher] if teacher is not None else seen
        parts = [
            scores.parts(batch, one.outputs)
            for scores, one in zip(self._board.scores, everyone, strict=True)
        ]
        losses, hints = self._plan.distillation, self._plan.hints
        if losses is not None:
            for own, student, student_hints in zip(parts, seen, hints, strict=False):
                own.update(
                    distilling.student_parts(
                        losses, self._outputs, student_hints, student, teacher, batch
                    )
                )
            parts[-1].update(
                distilling.teacher_parts(
                    losses, self._outputs, hints, seen, teacher, batch
                )
            )
        return parts

    def _student_variables(self):
        return [v for network in self.students for v in network.trainable_variables]


def _check_names(named):
    taken = {"", "teacher", "val"} | {
        part.removesuffix("_loss") for part in (TASK, DISTILLATION, HINT)
    }
    clashes = [n for n in named if not isinstance(n, str) or n in taken]
    if not named or clashes:
        raise ValueError(
            "Students must have names that the logs do not use otherwise. "
            f"Received: {clashes or 'no students'}"
        )


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
