"""Carries a list of stages out inside one `model.fit`."""

import itertools
import warnings
from collections.abc import Iterable, Sequence

from tf_lowbit import calibration, inspection
from tf_lowbit.compat import keras, tf
from tf_lowbit.core import checks
from tf_lowbit.core.counters import counter
from tf_lowbit.core.stages import FLOAT_BITS, Stage, stage_at
from tf_lowbit.core.state import unchanged_on_error
from tf_lowbit.observation import require_rereadable
from tf_lowbit.quantized_network import warn_of_open_ranges
from tf_lowbit.quantizers import WEIGHT
from tf_lowbit.scheme.layout import QuantizationWarning

# Batches that the ranges of a stage are measured on, as many as in `calibrate`.
_BATCHES = 8
_RATE_CALLBACKS = (
    keras.callbacks.LearningRateScheduler,
    keras.callbacks.ReduceLROnPlateau,
)


class StagedPrecision(keras.callbacks.Callback):
    """Changes bits, learning rate and optimizer state from stage to stage.

    At a stage's first epoch it assigns the bits (nothing is traced anew), resets the
    optimizer's state (momentum and step count; ours) and sets the learning rate. The
    latent float weights simply carry on. Each quantizer gets
    `max(the stage's bits, its own)`, so that a first layer kept at 8 bits stays there,
    and so do residual quantizers, unless a stage says 16 or 32 ("not rounded").

    Where a stage changes the bits of a quantizer, its range is set anew: a weight's
    learned step from the latent weights, an activation's step or clip from the first 8
    batches of `data`, as `calibrate` does. Without `data` an activation's range, and
    with `keep_ranges` every range, is rescaled: multiplied by the ratio of the ranges
    that normally distributed values have at the new and at the old bits. Ranges of
    quantizers whose bits stay are kept. For a run that resumes exactly, the first
    batches of `data` must be the same each time.

    After each epoch the steps of residual quantizers are tied to the learned steps
    around them (`tie_residuals`), which move in training.

    A `QuantizationWarning` names activation ranges that still wait for `calibrate`, and
    tells where a training ends at other bits than the last stage's, as early stopping
    has it, or the last stage's are more than some quantizers were made for: with bits
    for each layer, its own are the fewest of them. One also tells where a
    `ModelCheckpoint(save_best_only=True)` keeps the file of an epoch at other bits, and
    where a stage's decay or warmup overrules a `LearningRateScheduler` or a
    `ReduceLROnPlateau`. The order of the callbacks does not matter. These need the
    `fit` of what `tf_lowbit.quantize` returned or of a `LowBitTrainer`: Keras's own
    does not tell callbacks of one another.

    A constant learning rate is set where its stage is entered, and is then left to
    others, such as `ReduceLROnPlateau`: a resumed run goes on with the rate that the
    checkpoint holds, and a rate edited in between is that of the next stage at the
    earliest. One with a decay or a warmup is set at each step. Where the number of
    steps in an epoch is not known, a decay falls from epoch to epoch.

    `weight_bits` and `activation_bits`, the lowest in the model (residual quantizers
    apart), are added to the logs: put this callback ahead of loggers such as
    `CSVLogger`.

    The position (stage, epochs done) is in variables that hang on the model as
    `model.staging`, so that `keras.callbacks.BackupAndRestore` and
    `tf.train.Checkpoint(model=...)` save it: a resumed run goes on in mid-stage,
    without a second reset. A SavedModel holds it too, a `.keras` or `.h5` file does
    not. Where the stages are others than those that it was trained by, so that the bits
    change or an earlier stage holds, theirs are the bits and the learning rate, and the
    optimizer's state is reset. Where all epochs were done before, nothing is trained; a
    `QuantizationWarning` tells if that was by other stages.

    Args:
        stages: list of `Stage`; `two_stage`, `progressive` and
            `two_stage_progressive` make such lists. Their epochs must sum to
            the `epochs` of `fit`.
        reset_optimizer: whether each new stage starts with a fresh optimizer state.
        verbose: 1 prints a line at each stage's start.
        data: iterable of batches, `x` or `(x, y)` or `(x, y, weight)`, that can be read
            again from its start; None to rescale the ranges of activations.
        keep_ranges: True rescales the ranges of weights, too, and measures nothing.

    Raises:
        ValueError: in the constructor, if `stages` is no list of stages, `data` are
            arrays or can be read only once, or are given with `keep_ranges`; when
            training begins, if the epochs do not sum up, the model is not quantized,
            the last stage asks for fewer bits than any quantizer was made for, a
            learning rate is to be set and the optimizer follows a schedule of its own,
            the optimizer is to be reset and `from_config` does not make it again, or
            the steps in an epoch are not known to a warmup or to a decay within a
            single epoch.
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
        # Keras hands callbacks with this flag its own logs instead of a copy: that is
        # how the bits reach the progress bar.
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
                    "data must be None where keep_ranges=True: nothing is measured "
                    f"then. Received: data of type {type(data).__name__}"
                )
        self.stages = stages
        self.data = data
        self.keep_ranges = checks.flag("keep_ranges", keep_ranges)
        self.reset_optimizer = checks.flag("reset_optimizer", reset_optimizer)
        self.verbose = verbose
        self._tensors: list[inspection.QuantizedTensor] = []
        self._epoch = 0
        self._is_first_epoch = True
        self._lowest: dict[str, int] = {}
        self._has_warned_of_end = False
        self._checkpoints: list = []
        # Of each: its best value, and the stage in which it was reached, if in one.
        self._best: list = []

    def before_fit(self, callbacks: Sequence[keras.callbacks.Callback]) -> None:
        """Warns of others that set the learning rate, which a stage does itself.

        Args:
            callbacks: all that `fit` has been given.
        """
        self._checkpoints = [
            callback
            for callback in callbacks
            if isinstance(callback, keras.callbacks.ModelCheckpoint)
            and callback.save_best_only
        ]
        self._best = [(callback.best, None) for callback in self._checkpoints]
        moving = [stage for stage in self.stages if _moves_rate(stage)]
        overruled = [
            type(callback).__name__
            for callback in callbacks
            if isinstance(callback, _RATE_CALLBACKS)
        ]
        if moving and overruled:
            warnings.warn(
                "The learning rate must be set by one alone, and a stage with a decay "
                "or a warmup sets it at each step: leave the other callback out, or "
                "give the stages a constant learning_rate and no warmup. "
                f"Received: {', '.join(overruled)} beside a stage of "
                f"decay={moving[0].decay!r}, warmup={moving[0].warmup:g}",
                QuantizationWarning,
                stacklevel=2,
            )

    def after_fit(self) -> None:
        """Checks again the bits at the end, which a later callback may bring back."""
        self._warn_of_end()

    def on_train_begin(self, logs=None):
        """Checks that the stages fit the model and the training."""
        del logs
        self._tensors = inspection.require_quantized(self.model)
        total = sum(stage.epochs for stage in self.stages)
        if self.params.get("epochs") != total:
            raise ValueError(
                f"The stages' epochs must sum to fit's epochs. Received: stages of "
                f"{[stage.epochs for stage in self.stages]} = {total} epochs, "
                f"epochs={self.params.get('epochs')}"
            )
        self._check_reachable()
        self._check_optimizer()
        self._check_steps()
        self._is_first_epoch = True
        self._has_warned_of_end = False
        if not hasattr(self.model, "staging"):
            # A tf.train.Checkpoint is tracked by checkpoints, yet its variables
            # are no weights of the model, whose files keep their format.
            self.model.staging = tf.train.Checkpoint(
                stage=counter(-1), epochs_done=counter()
            )

    def on_epoch_begin(self, epoch, logs=None):
        """Enters the epoch's stage, if it is not the present one."""
        del logs
        if not self._is_first_epoch:
            self._note_best()
        self._epoch = epoch
        index, start = stage_at(self.stages, epoch)
        stage, position = self.stages[index], self.model.staging
        # Having done more epochs than this one's number means a new training.
        is_new_training = position.epochs_done.numpy() > epoch
        is_entered = position.stage.numpy() != index or is_new_training
        if position.epochs_done.numpy() < epoch:
            # The checkpoint was made before this callback ended its epoch.
            self._tie_residuals()
        if is_entered or self._is_first_epoch:
            has_other_bits = self._assign_bits(stage)
            # Where the model was in a stage of this number, but of another list.
            is_new_training |= has_other_bits and not is_entered
            # Later ones; or, of another list, earlier ones. None is -1, as the first.
            is_other = index != max(position.stage.numpy(), 0)
            if self.reset_optimizer and (is_other or is_new_training):
                reset_optimizer(self.model)
            position.stage.assign(index)
            # A resumed run has its rate, unless the optimizer was not in what it is
            # resumed from.
            is_unused = not _innermost(self.model.optimizer).iterations.numpy()
            if is_entered or is_new_training or is_unused:
                self._set_learning_rate(0)
        if self._is_first_epoch:
            # Not before: a checkpoint may have brought the ranges.
            warn_of_open_ranges(self.model)
            self._is_first_epoch = False
        position.epochs_done.assign(epoch)
        self._log(self._lowest)
        if _moves_rate(stage):
            self._set_learning_rate(0)
        if self.verbose and epoch == start:
            print(f"Stage {index + 1}/{len(self.stages)}: {self._description(stage)}")

    def on_train_batch_begin(self, batch, logs=None):
        """Follows the stage's warmup and decay of the learning rate."""
        del logs
        if _moves_rate(self._stage()):
            self._set_learning_rate(batch)

    def on_train_batch_end(self, batch, logs=None):
        """Adds the bits to the progress bar."""
        del batch
        if logs is not None:
            # Not read from the variables: on a device that takes time in each step.
            logs.update(self._lowest)

    def on_epoch_end(self, epoch, logs=None):
        """Adds the bits to the logs, ties steps, and counts the epoch as done."""
        self._tie_residuals()
        self.model.staging.epochs_done.assign(epoch + 1)
        self._log(logs)

    def on_train_end(self, logs=None):
        """Warns where the training ended before the last stage, or did not begin."""
        del logs
        if self._is_first_epoch:
            others = self._with_other_bits(self.stages[-1])
            self._warn_of_no_epoch(is_other=bool(others))
            return
        self._note_best()
        self._warn_of_end()
        self._warn_of_best()

    def _warn_of_end(self):
        """Warns once where the model is not at the last stage's bits."""
        others = self._with_other_bits(self.stages[-1])
        if others and not self._has_warned_of_end and not self._is_first_epoch:
            self._has_warned_of_end = True
            warnings.warn(
                "The training must reach its last stage to have its bits: stop early, "
                "or take the best epoch, within that stage alone. Received: "
                f"{others[0].name} at {others[0].bits} bits, and "
                f"{len(others) - 1} other quantizers not at the last stage's",
                QuantizationWarning,
                stacklevel=2,
            )

    def _note_best(self):
        """Notes the stage of checkpoints that have been written since the last look."""
        self._best = [
            (callback.best, stage if callback.best == best else self._stage())
            for callback, (best, stage) in zip(
                self._checkpoints, self._best, strict=True
            )
        ]

    def _warn_of_best(self):
        """Warns where a checkpoint that is kept as the best is of other bits."""
        last = self.stages[-1]
        earlier = [
            callback.filepath
            for callback, (_, stage) in zip(self._checkpoints, self._best, strict=True)
            if stage is not None
            and any(self._bits(t, stage) != self._bits(t, last) for t in self._tensors)
        ]
        if earlier:
            warnings.warn(
                "The best epoch must be one of the last stage to have its bits: use "
                "ModelCheckpoint(save_best_only=True) in a second fit, of that stage "
                f"alone. Received: {earlier}, written last in an earlier stage",
                QuantizationWarning,
                stacklevel=2,
            )

    def _stage(self) -> Stage:
        return self.stages[stage_at(self.stages, self._epoch)[0]]

    def _check_reachable(self):
        last = self.stages[-1]
        for role, wanted in (
            ("weight", last.weight_bits),
            ("activation", last.activation_bits),
        ):
            own = [t.quantizer.bits for t in self._staged(role)]
            if wanted is not None and own and wanted < min(own):
                raise ValueError(
                    f"The last stage asks for {wanted}-bit {role}s, and no quantizer "
                    f"was made for so few: quantize the model at {wanted} bits. "
                    f"Received: {role} quantizers of {sorted(set(own))} bits"
                )
            if wanted is not None and own and min(own) < wanted <= max(own):
                warnings.warn(
                    f"The last stage should ask for the fewest bits that {role}s are "
                    f"quantized at, or those end with more. Received: {wanted} bits, "
                    f"and quantizers of {sorted(set(own))} bits",
                    QuantizationWarning,
                    stacklevel=2,
                )

    def _warn_of_no_epoch(self, is_other: bool):
        """Warns where a training that had no epoch left was not by these stages."""
        position = self.model.staging
        stage, done = int(position.stage), int(position.epochs_done)
        total = sum(stage.epochs for stage in self.stages)
        if is_other or (stage, done) != (len(self.stages) - 1, total):
            lowest = [self._lowest_bits(role) for role in ("weight", "activation")]
            warnings.warn(
                "Nothing was trained: all epochs of fit were done before, and not by "
                "these stages. To train by these, start without the checkpoint. "
                f"Received: a model after {done} epochs, in its stage {stage + 1}, "
                f"with weights at {lowest[0]} bits and activations at {lowest[1]} bits",
                QuantizationWarning,
                stacklevel=3,
            )

    def _check_steps(self):
        # Progress within the epoch is not known then: the rate would stay at 0, or
        # where it starts to fall from.
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
                "The model must be compiled with a keras.optimizers.Optimizer (not a "
                f"legacy one). Received: {type(optimizer).__name__}"
            )
        sets_rate = any(stage.learning_rate is not None for stage in self.stages)
        rate = _innermost(optimizer).get_config()["learning_rate"]
        if sets_rate and isinstance(rate, dict):
            raise ValueError(
                "A stage's learning_rate needs an optimizer with a plain number as "
                "its own. Received: an optimizer with a LearningRateSchedule"
            )
        if self.reset_optimizer and len(self.stages) > 1:
            _fresh_optimizer(self.model)  # Else found after a stage was trained.

    def _assign_bits(self, stage) -> bool:
        """Gives every quantizer its bits; whether some were others before."""
        others = self._with_other_bits(stage)
        batches = []
        if others and self.data is not None:
            batches = list(itertools.islice(iter(self.data), _BATCHES))
        with unchanged_on_error(v for t in others for v in t.variables.values()):
            for tensor in others:
                tensor.assign_bits(self._bits(tensor, stage))
                if tensor.role == WEIGHT and not self.keep_ranges:
                    tensor.quantizer.initialize(tensor.latent, tensor.variables)
            # Behind all changes of bits: what a quantizer reads depends on them.
            if self.data is not None:
                self._measure(others, batches)
        return bool(others)

    def _measure(self, tensors, batches):
        """Sets the ranges of activation quantizers from data."""
        wanted = {id(t.variables) for t in tensors if t.quantizer.needs_calibration}
        for network in inspection.networks(self.model):
            found = inspection.quantized_tensors(network)
            own = [t for t in found if id(t.variables) in wanted]
            calibration.measure(network, own, batches)

    def _tie_residuals(self):
        if any(tensor.is_residual for tensor in self._tensors):
            calibration.tie_residuals(self.model)

    def _with_other_bits(self, stage) -> list[inspection.QuantizedTensor]:
        return [t for t in self._tensors if t.bits != self._bits(t, stage)]

    @staticmethod
    def _bits(tensor, stage) -> int:
        """What a stage asks of a quantizer."""
        is_weight = tensor.role == "weight"
        wanted = stage.weight_bits if is_weight else stage.activation_bits
        return max(wanted or 0, tensor.quantizer.bits)

    def _set_learning_rate(self, batch):
        index, start = stage_at(self.stages, self._epoch)
        stage = self.stages[index]
        within = batch / self.params["steps"] if self.params.get("steps") else 0.0
        progress = (self._epoch - start + within) / stage.epochs
        rate = stage.learning_rate_at(progress)
        if rate is not None:
            _innermost(self.model.optimizer).learning_rate = rate

    def _log(self, logs):
        if logs is not None:
            for role in ("weight", "activation"):
                logs[f"{role}_bits"] = self._lowest_bits(role)

    def _lowest_bits(self, role) -> int:
        bits = [tensor.bits for tensor in self._staged(role)]
        return min(bits, default=FLOAT_BITS)

    def _staged(self, role) -> list[inspection.QuantizedTensor]:
        """The quantizers that rules have made; what is at 8 bits always is not."""
        return [t for t in self._tensors if t.role == role and not t.is_residual]

    def _description(self, stage) -> str:
        text = (
            f"weights at {self._lowest_bits('weight')} bits, activations at "
            f"{self._lowest_bits('activation')} bits, {stage.epochs} epochs"
        )
        if stage.learning_rate is not None:
            text += f", learning rate {stage.learning_rate:g} ({stage.decay})"
        return text


def reset_optimizer(model: keras.Model) -> None:
    """Puts a compiled model's optimizer back to its first state.

    Step count, momenta and every other state take the values of a fresh optimizer of
    the same configuration; the learning rate stays.

    Args:
        model: compiled model with a `keras.optimizers.Optimizer`. A `LowBitTrainer`'s
            teacher keeps its own.

    Raises:
        ValueError: if `from_config` does not make the optimizer again.
    """
    optimizer = _innermost(model.optimizer)
    networks = inspection.networks(model)
    variables = [v for network in networks for v in network.trainable_variables]
    fresh = _fresh_optimizer(model)
    with model.distribute_strategy.scope():
        fresh.build(variables)
        optimizer.build(variables)
    for old, new in zip(optimizer.variables, fresh.variables, strict=True):
        if old is not optimizer.learning_rate:
            old.assign(new)


def _fresh_optimizer(model: keras.Model):
    """An optimizer of the same configuration, not built."""
    optimizer = _innermost(model.optimizer)
    try:
        with model.distribute_strategy.scope():
            return type(optimizer).from_config(optimizer.get_config())
    except Exception as error:  # A user's class fails in ways of its own.
        raise ValueError(
            "The optimizer must be one that from_config makes again from get_config, "
            "for a stage resets its state; or pass reset_optimizer=False. "
            f"Received: {type(optimizer).__name__}: {error}"
        ) from error


def _moves_rate(stage: Stage) -> bool:
    """Whether the stage changes the learning rate from step to step."""
    return stage.decay != "constant" or stage.warmup > 0


def _innermost(optimizer):
    """The optimizer itself, where a loss scale (mixed_float16) wraps it."""
    return getattr(optimizer, "inner_optimizer", optimizer)
