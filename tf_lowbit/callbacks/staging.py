"""Runs a list of stages inside one `model.fit`."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tf_lowbit.callbacks.optimizer_state import (
    fresh_optimizer,
    innermost,
    reset_optimizer,
)
from tf_lowbit.callbacks.staged_bits import StagedBits
from tf_lowbit.compat import Logs, keras, tf
from tf_lowbit.core import checks, user_warnings
from tf_lowbit.network.observation import require_rereadable
from tf_lowbit.quantizers import ACTIVATION, WEIGHT
from tf_lowbit.scheme.layout import QuantizationWarning
from tf_lowbit.training.counters import counter
from tf_lowbit.training.quantized_network import warn_of_open_ranges
from tf_lowbit.training.stages import Stage, stage_at
from tf_lowbit.training.trainer import LowBitTrainer

_RATE_CALLBACKS = (
    keras.callbacks.LearningRateScheduler,
    keras.callbacks.ReduceLROnPlateau,
)


class StagedPrecision(keras.callbacks.Callback):
    """Changes bits, learning rate, optimizer state and teacher from stage to stage.

    At a stage's first epoch it assigns the bits (without a retrace), resets the
    optimizer's state (momentum and step count) and sets the learning rate. The latent
    float weights carry over. Each quantizer gets `max(the stage's bits, its own)`. So a
    first layer with 8 bits, or a residual quantizer, keeps its bits, except in a stage
    of 16 or 32 bits ("not rounded").

    If a stage changes the bits of a quantizer, its range is set again: a weight's
    learned step from the latent weights, an activation's step or clip from the first 8
    batches of `data`, as in `calibrate`. Without `data` the ranges of activations, and
    with `keep_ranges` all ranges, are rescaled instead: multiplied by the ratio of the
    ranges for normally distributed values at the new and at the old bits. Other
    quantizers keep their ranges. For a run that resumes exactly, the first batches of
    `data` must be the same each time.

    If a stage changes the role of the teacher of a `LowBitTrainer`, the training step
    is traced again. The role depends on the epoch alone, so a resumed run continues in
    its phase. After `fit`, also after one that is interrupted, the role is again that
    of `JointDistillation`.

    After each epoch the steps of residual quantizers are tied to the learned steps
    around them (`tie_residuals`), which change in training.

    A `QuantizationWarning` reports that

    - activation ranges are not calibrated;
    - the training ends at other bits than the last stage's, for example after early
      stopping;
    - the last stage has more bits than some rules: if layers differ in bits, give the
      last stage the fewest of them;
    - a `ModelCheckpoint(save_best_only=True)` keeps the file of an epoch at other bits;
    - a stage's decay or warmup overrides a `LearningRateScheduler` or a
      `ReduceLROnPlateau`.

    The order of the callbacks does not matter. The last two need the `fit` of a model
    from `tf_lowbit.quantize` or of a `LowBitTrainer`, because the `fit` of Keras does
    not give callbacks the list of the others.

    A constant learning rate is set at the start of its stage. After that, callbacks
    such as `ReduceLROnPlateau` may change it, and a resumed run continues with the rate
    of the checkpoint. A rate with a decay or a warmup is set at each step. If the
    number of steps in an epoch is unknown, a decay changes the rate once per epoch.

    `weight_bits` and `activation_bits`, the lowest in the model without residual
    quantizers, are added to the logs: put this callback before loggers such as
    `CSVLogger`.

    The position (stage, epochs done) is in variables at `model.staging`, so that
    `keras.callbacks.BackupAndRestore` and `tf.train.Checkpoint(model=...)` save it. A
    resumed run continues within its stage, without a second reset. A SavedModel has the
    position, too, but a `.keras` or `.h5` file has not. If a model is trained further
    by other stages, these set bits and learning rate, and the optimizer's state is
    reset. If all epochs were done before, nothing is trained; a `QuantizationWarning`
    reports if that was by other stages.

    Args:
        stages: List of `Stage`, for example from `two_stage`, `progressive` or
            `two_stage_progressive`. Their epochs must sum to the `epochs` of `fit`.
        reset_optimizer: Whether each new stage starts with a fresh optimizer state.
        verbose: 1 prints a line at each stage's start.
        data: Iterable of batches, `x` or `(x, y)` or `(x, y, weight)`, that can be read
            again from its start; None to rescale the ranges of activations.
        keep_ranges: True rescales the ranges of weights, too, and measures nothing.

    Raises:
        ValueError: In the constructor, if `stages` is not a list of stages, `data` are
            arrays or can be read only once, or are given with `keep_ranges`; when
            training begins, if the epochs do not sum up, the model is not quantized,
            the last stage has fewer bits than every rule, a stage sets a teacher's role
            without a teacher, a stage sets the learning rate of an optimizer with a
            schedule, `from_config` cannot copy an optimizer that is reset, or a warmup,
            or a decay within one epoch, does not know the steps in an epoch.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        reset_optimizer: bool = True,
        verbose: int = 0,
        data: Iterable | None = None,
        keep_ranges: bool = False,
    ):
        super().__init__()
        # With this flag, Keras passes its own logs, not a copy, so that the bits reach
        # the progress bar.
        self._supports_tf_logs = True
        stages = list(stages) if isinstance(stages, Sequence) else stages
        is_list = isinstance(stages, list) and bool(stages)
        if not is_list or not all(isinstance(stage, Stage) for stage in stages):
            raise ValueError(
                f"stages must be a list of at least one Stage. Received: {stages!r}"
            )
        if data is not None:
            require_rereadable(data)
            if keep_ranges:
                raise ValueError(
                    "data must be None with keep_ranges=True, which measures nothing. "
                    f"Received: data of type {type(data).__name__}"
                )
        self.stages = stages
        self.data = data
        self.keep_ranges = checks.flag("keep_ranges", keep_ranges)
        self.reset_optimizer = checks.flag("reset_optimizer", reset_optimizer)
        self.verbose = verbose
        self._best = _BestFiles(())
        self._epoch = 0
        self._is_first_epoch = True
        self._end_is_unchecked = False

    def before_fit(self, callbacks: Sequence[keras.callbacks.Callback]) -> None:
        """Warns of other callbacks that set the learning rate, if a stage sets it.

        Args:
            callbacks: All callbacks of `fit`.
        """
        self._best = _BestFiles(callbacks)
        moving = [stage for stage in self.stages if _moves_rate(stage)]
        overruled = [
            type(callback).__name__
            for callback in callbacks
            if isinstance(callback, _RATE_CALLBACKS)
        ]
        if moving and overruled:
            _warn(
                "Only one callback must set the learning rate, but a stage with a "
                "decay or a warmup sets it at each step: remove the other callback, or "
                "give the stages a constant learning_rate and no warmup. "
                f"Received: {', '.join(overruled)} beside a stage with "
                f"decay={moving[0].decay!r}, warmup={moving[0].warmup:g}"
            )

    def after_fit(self) -> None:
        """Resets the role, and checks bits that a later callback may have changed."""
        if isinstance(self.model, LowBitTrainer):
            self.model.assign_teacher(None)
        self._warn_of_end()
        self._end_is_unchecked = False

    def on_train_begin(self, logs: Logs = None) -> None:
        """Checks that the stages fit the model and the training."""
        self._bits = StagedBits(self.model, self.data, self.keep_ranges)
        total = sum(stage.epochs for stage in self.stages)
        if self.params.get("epochs") != total:
            raise ValueError(
                f"The stages' epochs must sum to fit's epochs. Received: stages of "
                f"{[stage.epochs for stage in self.stages]} = {total} epochs, "
                f"epochs={self.params.get('epochs')}"
            )
        self._bits.check_reachable(self.stages[-1])
        self._check_optimizer()
        self._check_steps()
        self._check_teacher()
        self._is_first_epoch = True
        self._end_is_unchecked = False
        if not hasattr(self.model, "staging"):
            # In a tf.train.Checkpoint, so that checkpoints save it, but files of the
            # model keep their format.
            self.model.staging = tf.train.Checkpoint(
                stage=counter(-1), epochs_done=counter()
            )

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Enters the epoch's stage, if it is not the present one."""
        if not self._is_first_epoch:
            self._best.note(self._stage())
        self._epoch = epoch
        index, start = stage_at(self.stages, epoch)
        stage, done = self.stages[index], self.model.staging.epochs_done
        if done.numpy() < epoch:
            # The checkpoint was made before `on_epoch_end` of this callback.
            self._bits.tie_residuals()
        if isinstance(self.model, LowBitTrainer):
            self.model.assign_teacher(stage.teacher)
        # If more epochs are done than this one's number, it is a new training.
        self._enter(index, epoch == start, is_new_training=done.numpy() > epoch)
        if self._is_first_epoch:
            # Not earlier, because a checkpoint may have restored the ranges.
            warn_of_open_ranges(self.model)
            self._is_first_epoch = False
        done.assign(epoch)
        self._lowest = self._lowest_bits()
        if _moves_rate(stage):
            self._set_learning_rate(0)
        if self.verbose and epoch == start:
            print(f"Stage {index + 1}/{len(self.stages)}: {self._description(stage)}")

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        """Follows the stage's warmup and decay of the learning rate."""
        if _moves_rate(self._stage()):
            self._set_learning_rate(batch)

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        """Adds the bits to the progress bar."""
        if logs is not None:
            # Not read from the variables, which would cost time in each step.
            logs.update(self._lowest)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Adds the bits to the logs, ties steps, and counts the epoch as done."""
        self._bits.tie_residuals()
        self.model.staging.epochs_done.assign(epoch + 1)
        if logs is not None:
            logs.update(self._lowest_bits())

    def on_train_end(self, logs: Logs = None) -> None:
        """Warns if the training ended before the last stage, or did not begin."""
        if self._is_first_epoch:
            self._warn_of_no_epoch()
            return
        self._best.note(self._stage())
        self._end_is_unchecked = True
        self._warn_of_end()
        last = self.stages[-1]
        earlier = self._best.paths(lambda stage: self._bits.differ(stage, last))
        if earlier:
            _warn(
                "The best epoch must be one of the last stage to have its bits: use "
                "ModelCheckpoint(save_best_only=True) in a second fit, of that stage "
                f"alone. Received: {earlier}, last written in an earlier stage"
            )

    def _enter(self, index: int, is_start: bool, is_new_training: bool):
        """Sets bits, optimizer state and learning rate, unless they are set already."""
        present = int(self.model.staging.stage.numpy())
        is_entered = present != index or is_new_training
        if not is_entered and not self._is_first_epoch:
            return
        # Other bits in a stage of the same number mean another list of stages.
        has_other_bits = self._bits.assign(self.stages[index])
        is_new_training |= has_other_bits and not is_entered
        # The position is unknown, -1, before the first stage, and in a run that goes on
        # from a file of the model.
        is_other = index != present if present >= 0 else is_start
        is_used = bool(innermost(self.model.optimizer).iterations.numpy())
        if self.reset_optimizer and is_used and (is_other or is_new_training):
            reset_optimizer(self.model)
        self.model.staging.stage.assign(index)
        # Within a stage, a resumed run has its rate, unless the checkpoint lacked the
        # optimizer.
        if is_entered or is_new_training or is_start or not is_used:
            self._set_learning_rate(0)

    def _stage(self) -> Stage:
        return self.stages[stage_at(self.stages, self._epoch)[0]]

    def _set_learning_rate(self, batch):
        index, start = stage_at(self.stages, self._epoch)
        stage = self.stages[index]
        within = batch / self.params["steps"] if self.params.get("steps") else 0.0
        progress = (self._epoch - start + within) / stage.epochs
        rate = stage.learning_rate_at(progress)
        if rate is not None:
            innermost(self.model.optimizer).learning_rate = rate

    def _lowest_bits(self) -> dict[str, int]:
        return {f"{r}_bits": self._bits.lowest(r) for r in (WEIGHT, ACTIVATION)}

    def _description(self, stage) -> str:
        text = (
            f"weights at {self._bits.lowest(WEIGHT)} bits, activations at "
            f"{self._bits.lowest(ACTIVATION)} bits, {stage.epochs} epochs"
        )
        if stage.learning_rate is not None:
            text += f", learning rate {stage.learning_rate:g} ({stage.decay})"
        return text

    def _check_teacher(self):
        roles = [stage.teacher for stage in self.stages if stage.teacher is not None]
        if roles and getattr(self.model, "teacher", None) is None:
            raise ValueError(
                "A stage that says what the teacher does needs a LowBitTrainer with a "
                f"teacher. Received: a stage of teacher={roles[0]!r} and "
                f"{self.model.name!r} without one"
            )

    def _check_steps(self):
        # Without the number of steps, progress within an epoch is unknown, and the rate
        # would not change.
        needs_steps = any(
            stage.warmup or (stage.decay != "constant" and stage.epochs == 1)
            for stage in self.stages
        )
        if needs_steps and not self.params.get("steps"):
            raise ValueError(
                "A warmup, and a decay in a stage of one epoch, need the number of "
                "steps in an epoch: give fit steps_per_epoch. "
                "Received: data of unknown length"
            )

    def _check_optimizer(self):
        optimizer = self.model.optimizer
        if not isinstance(optimizer, keras.optimizers.Optimizer):
            raise ValueError(
                "The model must be compiled with a keras.optimizers.Optimizer, not a "
                f"legacy one. Received: {type(optimizer).__name__}"
            )
        sets_rate = any(stage.learning_rate is not None for stage in self.stages)
        rate = innermost(optimizer).get_config()["learning_rate"]
        if sets_rate and isinstance(rate, dict):
            raise ValueError(
                "A stage's learning_rate needs an optimizer whose learning rate is a "
                "number. Received: an optimizer with a LearningRateSchedule"
            )
        is_used = bool(innermost(optimizer).iterations.numpy())
        if self.reset_optimizer and (is_used or len(self.stages) > 1):
            fresh_optimizer(self.model)  # An error should not come after a stage.

    def _warn_of_end(self):
        """Warns once, after a whole training, of bits other than the last stage's."""
        if not self._end_is_unchecked:
            return
        others = self._bits.at_other_bits(self.stages[-1])
        if others:
            self._end_is_unchecked = False
            _warn(
                "The training must reach its last stage to have its bits: stop early, "
                "or take the best epoch, within that stage alone. Received: "
                f"{others[0].name} at {others[0].bits} bits, and "
                f"{len(others) - 1} other quantizers not at the last stage's"
            )

    def _warn_of_no_epoch(self):
        """Warns if no epoch was left, but the training was not by these stages."""
        position = self.model.staging
        stage = int(position.stage.numpy())
        done = int(position.epochs_done.numpy())
        end = len(self.stages) - 1, sum(stage.epochs for stage in self.stages)
        if self._bits.at_other_bits(self.stages[-1]) or (stage, done) != end:
            _warn(
                "Nothing was trained: all epochs of fit were done before, but not by "
                "these stages. To train by these, start without the checkpoint. "
                f"Received: a model after {done} epochs, in its stage {stage + 1}, "
                f"with weights at {self._bits.lowest(WEIGHT)} bits and activations at "
                f"{self._bits.lowest(ACTIVATION)} bits"
            )


class _BestFiles:
    """The files that `ModelCheckpoint(save_best_only=True)` keeps, and their stages."""

    def __init__(self, callbacks: Iterable[keras.callbacks.Callback]):
        checkpoints = keras.callbacks.ModelCheckpoint
        # Callback, its best value, and the stage that reached it, if any.
        self._kept: list[tuple[Any, Any, Stage | None]] = [
            (callback, callback.best, None)
            for callback in callbacks
            if isinstance(callback, checkpoints) and callback.save_best_only
        ]

    def note(self, present: Stage) -> None:
        """Stores the stage of files that were written since the last call."""
        self._kept = [
            (callback, callback.best, stage if callback.best == best else present)
            for callback, best, stage in self._kept
        ]

    def paths(self, is_wanted: Callable[[Stage], bool]) -> list[str]:
        """The paths of the files from wanted stages."""
        return [
            callback.filepath
            for callback, _, stage in self._kept
            if stage is not None and is_wanted(stage)
        ]


def _moves_rate(stage: Stage) -> bool:
    """Whether the stage changes the learning rate at each step."""
    return stage.decay != "constant" or stage.warmup > 0


def _warn(message: str) -> None:
    user_warnings.warn(message, QuantizationWarning)
