"""Atomic checkpoints, and a `model.fit` that continues from them."""

import contextlib
import dataclasses
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from tf_lowbit.callbacks import checkpoint_files
from tf_lowbit.callbacks.checkpoint_files import Position
from tf_lowbit.compat import Logs, keras, tf
from tf_lowbit.core import checks, user_warnings
from tf_lowbit.core.files import flush

_NAME = "epoch-{:05d}-step-{:07d}"
_PARTIAL = ".partial-"
_VARIABLES = "variables"


class Recovery(keras.callbacks.Callback):
    """Saves a training, and continues an interrupted one, also within an epoch.

    When training begins, the newest intact checkpoint in the folder is restored, and
    `fit` continues at its epoch and step, whatever its `initial_epoch`. Without a
    checkpoint, `fit` starts as usual. The callback cannot move the data, so start them
    at `position`, as an endless stream with `steps_per_epoch`:

    ```python
    recovery = tfl.callbacks.Recovery("checkpoints", every=500)
    epoch, step = recovery.position
    data = datasets.load(name, batch_size=64, start_epoch=epoch, start_step=step)
    model.fit(
        data.train,
        steps_per_epoch=data.steps_per_epoch,
        epochs=90,
        callbacks=[tfl.callbacks.StagedPrecision(stages), recovery],
    )
    ```

    Put it last in the list, so that it saves the effects of the other callbacks. It
    saves all that the model tracks: weights, optimizer state, the position of
    `StagedPrecision`. It does not save metrics, which in a resumed epoch cover its
    remaining steps, random draws of layers such as Dropout, and the state of other
    callbacks. The rest continues bit for bit, as far as the device is deterministic.
    But for variables that each replica has for itself, such as moving statistics of
    BatchNormalization, the mean is saved, so they differ by rounding.

    If the checkpoint is at or past the `epochs` of `fit`, the model is restored and
    not trained: `fit` returns an empty history.

    Nothing is saved while a weight, a moving statistic or the optimizer's state holds
    NaN or infinity, so earlier checkpoints stay. One warning in each `fit` names the
    variable. In `mixed_float16`, a batch that overflows does not change the weights,
    but it makes the statistics infinite.

    A checkpoint is a folder, named by its position, whose manifest holds the size and
    the SHA-256 of each file. It is written under a hidden name, flushed to the disk and
    then renamed, so it is never partial, even if the program is killed. A damaged one
    (a disk error, an interrupted copy) is reported by a warning and skipped. Only one
    training at a time may use a folder.

    With several workers, all take part in a save, and only the chief's files are kept.
    All workers must see the same folder.

    Args:
        folder: Path of the folder, in the file system; created if missing.
        every: None saves at the end of each epoch. A number also saves within an epoch,
            after each so many steps (with `steps_per_execution`, after the execution
            that reaches them), and when `stop_training` ends an epoch early.
        keep: Number of intact checkpoints to keep; older ones are deleted after a save.
        verbose: 1 prints a line when a training continues, or is done already.

    Raises:
        ValueError: In the constructor, if an argument is out of range; when training
            begins, if the checkpoint has another network, other quantizers (except for
            the bits of a stage) or another optimizer, does not fit the epochs of `fit`,
            or was made within an epoch with another number of steps, if `every` is
            given and the steps per epoch are unknown, or together with
            `BackupAndRestore`. Checkpoints of earlier versions lack quantizers and
            steps per epoch, which are then not compared.
        OSError: If the folder cannot be written, when training begins or at a save.
            Earlier checkpoints stay.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        every: int | None = None,
        keep: int = 2,
        verbose: int = 0,
    ):
        super().__init__()
        if "://" in checks.path("folder", folder):
            raise ValueError(
                "folder must be a path in the file system, where a rename is atomic. "
                f"Received: folder={folder!r}"
            )
        if every is not None:
            checks.integer("every", every, at_least=1)
        checks.integer("keep", keep, at_least=1)
        self.folder = Path(folder)
        self.every = every
        self.keep = keep
        self.verbose = verbose
        # Without this flag, Keras would fetch the logs from the device after each step.
        self._supports_tf_logs = True
        self._damaged: set[Position] = set()
        self._epoch = 0
        self._steps_before = 0
        self._is_epoch_whole = False
        self._has_warned = False

    @property
    def position(self) -> Position:
        """Where `fit` will start: after the newest intact checkpoint, else at (0, 0).

        It needs neither model nor data, but reads the whole checkpoint.
        """
        return self._newest_intact() or Position(0, 0)

    def on_train_begin(self, logs: Logs = None) -> None:
        """Restores the newest intact checkpoint, and makes `fit` continue there."""
        if self.every is not None and self.params.get("steps") is None:
            raise ValueError(
                "every needs the number of steps in an epoch: give fit "
                f"steps_per_epoch. Received: every={self.every}, steps_per_epoch=None"
            )
        _require_no_other(self.model)
        if self._is_chief():
            for leftover in self.folder.glob(f"{_PARTIAL}*"):
                shutil.rmtree(leftover, ignore_errors=True)
        with self._partial_folder():
            pass  # Finds an unwritable folder now, not after an epoch.
        self._has_warned = False
        position, steps = self._newest_intact(), None
        if position is not None:
            self._restore(position)
            steps = checkpoint_files.steps_of(self._path(position))
            if self.verbose:
                print(self._announcement(position))
        self.model._training_state = _Start(self.model, self.params, position, steps)

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Checks that no other callback has moved the start of the training."""
        _require_no_other(self.model)
        self._epoch = epoch
        self._is_epoch_whole = False

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        """Stores the number of steps that are done."""
        self._steps_before = batch

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        """Saves after each `every` steps."""
        # With steps_per_execution, this batch is the last step of an execution, and
        # that of the begin hook is the first.
        done, steps = batch + 1, self.params.get("steps")
        is_stopped = self.model.stop_training
        self._is_epoch_whole = not is_stopped if steps is None else done == steps
        if self.every is None or self._is_epoch_whole:
            return
        if is_stopped or done // self.every > self._steps_before // self.every:
            self._save(Position(self._epoch, done))

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Saves, unless `stop_training` or a lack of data ended the epoch early."""
        if self._is_epoch_whole:
            self._save(Position(epoch + 1, 0))

    def _is_chief(self) -> bool:
        return self.model.distribute_strategy.extended.should_checkpoint

    def _announcement(self, position: Position) -> str:
        if position.epoch >= self.params["epochs"]:
            return f"Nothing to train: {position.epoch} epochs are done"
        return f"Continuing at epoch {position.epoch}, step {position.step}"

    def _path(self, position: Position) -> Path:
        return self.folder / _NAME.format(*position)

    def _positions(self) -> list[Position]:
        """Positions of all checkpoints, also damaged ones, in ascending order."""
        if not self.folder.is_dir():
            return []
        found = map(_position_of, self.folder.iterdir())
        return sorted(position for position in found if position is not None)

    def _newest_intact(self) -> Position | None:
        for position in reversed(self._positions()):
            flaw = checkpoint_files.flaw(self._path(position), position)
            if not flaw:
                return position
            if position not in self._damaged:
                self._damaged.add(position)
                user_warnings.warn(
                    f"A damaged checkpoint is skipped: {self._path(position)}: {flaw}",
                )
        return None

    def _restore(self, position: Position):
        model, folder = self.model, self._path(position)

        def error(what):
            return ValueError(
                "The checkpoint must have the network and the optimizer of the "
                "training; use another folder or delete it. "
                f"Received: {folder}: {what}"
            )

        if model.built:
            if checkpoint_files.has_plain_optimizer(model):
                model.optimizer.build(model.trainable_variables)
            # Checked first, because a failed restoration changes a part of the model.
            difference = checkpoint_files.difference(model, folder)
            if difference:
                raise error(difference)
        try:
            status = tf.train.Checkpoint(model=model).read(str(folder / _VARIABLES))
            # Missing variables are restored when they are made.
            status.assert_existing_objects_matched()
        except (ValueError, AssertionError, tf.errors.OpError) as failure:
            raise error(failure) from failure

    def _save(self, position: Position):
        broken = _non_finite(self.model)
        if broken is not None:
            self._warn_of_non_finite(broken)
            return
        final = self._path(position)
        with self._partial_folder() as partial:
            # Each worker writes, because reading a variable can need all of them.
            tf.train.Checkpoint(model=self.model).write(str(partial / _VARIABLES))
            if not self._is_chief():
                return
            checkpoint_files.write_identity(self.model, partial)
            checkpoint_files.write_manifest(partial, position, self.params.get("steps"))
            if final.exists():  # Damaged, else the training had continued from it.
                shutil.rmtree(final)
            partial.rename(final)
            flush(self.folder)
        self._damaged.discard(position)
        self._delete_before(position)

    def _warn_of_non_finite(self, name: str):
        if not self._has_warned:
            self._has_warned = True
            user_warnings.warn(
                "Weights, statistics and optimizer state must be finite to be saved: "
                "no checkpoint is made, and earlier ones stay. Look for NaN in the "
                "data, and continue from the last checkpoint; for moving statistics "
                "alone, tf_lowbit.recalibrate_batch_norm is enough. "
                f"Received: NaN or infinity in {name}",
            )

    def _delete_before(self, newest: Position):
        """Deletes old checkpoints; damaged ones do not count for `keep`."""
        # Later damaged ones stay until the training has passed them.
        passed = [position for position in self._positions() if position <= newest]
        intact = [position for position in passed if position not in self._damaged]
        for position in set(passed) - set(intact[-self.keep :]):
            with self._partial_folder() as partial:
                # Renamed first, so that a killed program leaves no partial checkpoint.
                self._path(position).rename(partial)

    @contextlib.contextmanager
    def _partial_folder(self) -> Iterator[Path]:
        """Makes a hidden folder in the folder, and deletes it unless it was renamed."""
        partial = self.folder / f"{_PARTIAL}{uuid.uuid4().hex}"
        try:
            partial.mkdir(parents=True)
            yield partial
        except (OSError, tf.errors.OpError) as error:
            raise OSError(
                "The folder must be writable, with room for another checkpoint "
                f"({error}). Received: {str(self.folder)!r}"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@dataclasses.dataclass
class _Start:
    """Tells `fit` where to start.

    Keras has no public way. `Model.fit` asks the object at `model._training_state`, if
    there is one, between `on_train_begin` and the first epoch, as for
    `keras.callbacks.BackupAndRestore`.
    """

    model: keras.Model
    params: dict
    position: Position | None
    steps: int | None

    def maybe_load_initial_counters_from_ckpt(
        self, steps_per_epoch, initial_epoch, mode
    ):
        """The epoch and the step to start with; Keras chose the name."""
        # Removed at once, so that it does not move the start of a later `fit` if this
        # one fails.
        self.model._training_state = None
        # A `fit` gives all its callbacks the same parameters. Other parameters mean a
        # later `fit`, because ours failed before this call.
        history = getattr(self.model, "history", None)
        is_later = history is not None and history.params is not self.params
        if self.position is None or is_later:
            return initial_epoch, 0
        epoch, step = self.position
        if initial_epoch > epoch:
            raise ValueError(
                "initial_epoch must not be past the checkpoint, which would be lost; "
                "use another folder or delete it. "
                f"Received: initial_epoch={initial_epoch}, a checkpoint at {epoch}"
            )
        if step and steps_per_epoch is not None:
            # Earlier versions did not store the number.
            is_known = self.steps is not None
            if steps_per_epoch != self.steps if is_known else step >= steps_per_epoch:
                raise ValueError(
                    "The steps per epoch must be those that the checkpoint was made "
                    f"with. Received: {steps_per_epoch} steps, a checkpoint at step "
                    f"{step}" + (f" of {self.steps}" if is_known else "")
                )
        return epoch, step


def _require_no_other(model):
    state = getattr(model, "_training_state", None)
    if state is not None and not isinstance(state, _Start):
        raise ValueError(
            "Recovery must be the only callback that moves the start of a training: "
            "use it without BackupAndRestore. "
            f"Received: a model with a {type(state).__name__}"
        )


def _position_of(path: Path) -> Position | None:
    """The position of the checkpoint at a path, or None for another path."""
    parts = path.name.split("-")
    if len(parts) != 4 or not (parts[1].isdecimal() and parts[3].isdecimal()):
        return None
    position = Position(int(parts[1]), int(parts[3]))
    return position if path.name == _NAME.format(*position) else None


def _non_finite(model) -> str | None:
    """The name of a variable with NaN or infinity, or None."""
    # Metrics are reset at each epoch, and may hold a loss that overflowed.
    measured = {id(v) for metric in model.metrics for v in metric.variables}
    own = [v for v in model.variables if id(v) not in measured]
    for variable in (*own, *_optimizer_state(model)):
        is_float = variable.dtype.is_floating
        if is_float and not tf.reduce_all(tf.math.is_finite(variable)):
            return variable.name
    return None


def _optimizer_state(model) -> list:
    """The optimizers' variables that exist already."""
    names = ("optimizer", "teacher_optimizer")
    optimizers = [getattr(model, name, None) for name in names]
    states = [getattr(optimizer, "variables", ()) for optimizer in optimizers]
    # A legacy optimizer has a method `variables`.
    return [v for state in states for v in (state() if callable(state) else state)]
