"""Checkpoints that are whole or absent, and a `model.fit` that goes on from them."""

import contextlib
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tf_lowbit.callbacks import checkpoint_files
from tf_lowbit.compat import keras, tf
from tf_lowbit.core import checks

_NAME = "epoch-{:05d}-step-{:07d}"
_PARTIAL = ".partial-"
_VARIABLES = "variables"


class Position(NamedTuple):
    """Where a training goes on. Tuples compare as positions do.

    Attributes:
        epoch: the epoch to go on with, from 0.
        step: how many of its steps are done, in [0, steps per epoch).
    """

    epoch: int
    step: int


class Recovery(keras.callbacks.Callback):
    """Saves a training, and makes an interrupted one go on, in mid-epoch too.

    When training begins, the newest intact checkpoint in the folder is restored, and
    `fit` goes on at its epoch and step, whatever its `initial_epoch`. Without one,
    `fit` starts as ever. What cannot be moved from here is the data, so start them at
    `position`, as an endless stream with `steps_per_epoch`:

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

    Put it last in the list, so that it saves what the others have done. Saved is all
    that the model tracks: weights, optimizer state, the position of `StagedPrecision`.
    Not saved are the metrics, which in a resumed epoch are over its remaining steps,
    the random draws of layers such as Dropout, and what other callbacks remember.
    Everything else goes on bit for bit, as far as the device computes so; but of what
    replicas keep each for itself, such as BatchNormalization's moving statistics,
    the mean is saved, so that they differ by rounding.

    If the checkpoint is at or past the `epochs` of `fit`, the model is restored and
    not trained: `fit` returns an empty history.

    While a variable holds NaN or infinity, nothing is saved, so that the checkpoints
    from before stay; a warning, one in a `fit`, names the variable. Weights, moving
    statistics and the optimizer's state are looked at: in `mixed_float16` a batch that
    overflows leaves the weights alone, but spoils the statistics.

    A checkpoint is a folder, named by its position, whose manifest holds the size and
    the SHA-256 of each file. It is written under a hidden name, flushed to the disk
    and then renamed, so that it is there whole or not at all, whenever the program is
    killed. One that is not intact all the same (a disk's fault, a copy broken off)
    is reported by a warning and skipped. Only one training at a time may use a folder.

    With several workers, all take part in a save and the chief alone keeps what it
    wrote; the folder must be one that all of them see.

    Args:
        folder: where the checkpoints go, a path in the file system; made if absent.
        every: None saves at the end of each epoch. A number also saves within an
            epoch, each time that so many more of its steps are done (with
            `steps_per_execution`, after the execution that gets there), and where
            `stop_training` cuts an epoch short.
        keep: how many intact checkpoints stay; older ones are deleted after a save.
        verbose: 1 prints a line where a training goes on, or is found to be done.

    Raises:
        ValueError: in the constructor, if an argument is out of range; when training
            begins, if the checkpoint is of another network, of other quantizers (the
            bits of a stage aside) or optimizer, does not fit the epochs of `fit`, or
            was made within an epoch of another number of steps, if `every` is given
            and the steps per epoch are not known, or if `BackupAndRestore` is used as
            well. What a checkpoint of an earlier version does not tell, its quantizers
            and its steps per epoch, is not compared.
        OSError: if the folder cannot be written, when training begins or at a save.
            The earlier checkpoints stay.
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
        # The logs are not read: without this flag Keras would wait for them and
        # fetch them from the device after each step.
        self._supports_tf_logs = True
        self._torn: set[Position] = set()
        self._epoch = 0
        self._steps_before = 0
        self._is_epoch_whole = False
        self._has_warned = False

    @property
    def position(self) -> Position:
        """Where `fit` will go on: after the newest intact checkpoint, else at (0, 0).

        Needs neither model nor data. Reads the checkpoint in full.
        """
        return self._newest_intact() or Position(0, 0)

    def on_train_begin(self, logs=None):
        """Restores the newest intact checkpoint, and has `fit` go on from there."""
        del logs
        if self.every is not None and self.params.get("steps") is None:
            raise ValueError(
                "every needs to know where an epoch ends: give fit steps_per_epoch. "
                f"Received: every={self.every}, steps_per_epoch=None"
            )
        _require_no_other(self.model)
        if self._is_chief():
            for leftover in self.folder.glob(f"{_PARTIAL}*"):
                shutil.rmtree(leftover, ignore_errors=True)
        with self._partial_folder():
            pass  # An unwritable folder is found now, not after an epoch.
        self._has_warned = False
        position, steps = self._newest_intact(), None
        if position is not None:
            self._restore(position)
            steps = checkpoint_files.steps_of(self._path(position))
            if self.verbose:
                print(self._announcement(position))
        self.model._training_state = _Start(self.model, self.params, position, steps)

    def on_epoch_begin(self, epoch, logs=None):
        """Checks that nothing else has moved the start of the training."""
        del logs
        _require_no_other(self.model)
        self._epoch = epoch
        self._is_epoch_whole = False

    def on_train_batch_begin(self, batch, logs=None):
        """Notes how many steps are done."""
        del logs
        self._steps_before = batch

    def on_train_batch_end(self, batch, logs=None):
        """Saves, if it is time."""
        del logs
        # With steps_per_execution, the batch of the begin hook is the first step of
        # the execution and this one its last.
        done, steps = batch + 1, self.params.get("steps")
        is_stopped = self.model.stop_training
        self._is_epoch_whole = not is_stopped if steps is None else done == steps
        if self.every is None or self._is_epoch_whole:
            return
        if is_stopped or done // self.every > self._steps_before // self.every:
            self._save(Position(self._epoch, done))

    def on_epoch_end(self, epoch, logs=None):
        """Saves, unless `stop_training` or a lack of data has cut the epoch short."""
        del logs
        if self._is_epoch_whole:
            self._save(Position(epoch + 1, 0))

    def _is_chief(self) -> bool:
        return self.model.distribute_strategy.extended.should_checkpoint

    def _announcement(self, position: Position) -> str:
        if position.epoch >= self.params["epochs"]:
            return f"Nothing is trained: {position.epoch} epochs are done"
        return f"Going on at epoch {position.epoch}, step {position.step}"

    def _path(self, position: Position) -> Path:
        return self.folder / _NAME.format(*position)

    def _positions(self) -> list[Position]:
        """Positions of all checkpoints, torn ones too, in rising order."""
        if not self.folder.is_dir():
            return []
        found = map(_position_of, self.folder.iterdir())
        return sorted(position for position in found if position is not None)

    def _newest_intact(self) -> Position | None:
        for position in reversed(self._positions()):
            flaw = checkpoint_files.flaw(self._path(position), position)
            if not flaw:
                return position
            if position not in self._torn:
                self._torn.add(position)
                warnings.warn(
                    "A checkpoint that is not intact is skipped: "
                    f"{self._path(position)}: {flaw}",
                    stacklevel=3,
                )
        return None

    def _restore(self, position: Position):
        model, folder = self.model, self._path(position)

        def error(what):
            return ValueError(
                "The checkpoint must be of the network and the optimizer that are "
                f"trained; use another folder or delete it. Received: {folder}: {what}"
            )

        if model.built:
            if checkpoint_files.has_plain_optimizer(model):
                model.optimizer.build(model.trainable_variables)
            # A restoration that fails has changed a part of the model already.
            difference = checkpoint_files.difference(model, folder)
            if difference:
                raise error(difference)
        try:
            status = tf.train.Checkpoint(model=model).read(str(folder / _VARIABLES))
            # What does not exist yet is restored when it is made.
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
            # Reading a variable can take all workers: each of them writes.
            tf.train.Checkpoint(model=self.model).write(str(partial / _VARIABLES))
            if not self._is_chief():
                return
            checkpoint_files.write_identity(self.model, partial)
            checkpoint_files.write_manifest(partial, position, self.params.get("steps"))
            if final.exists():  # Torn, else the training had gone on from it.
                shutil.rmtree(final)
            partial.rename(final)
            checkpoint_files.flush(self.folder)
        self._torn.discard(position)
        self._delete_before(position)

    def _warn_of_non_finite(self, name: str):
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "Weights, statistics and optimizer state must be finite to be saved: "
                "no checkpoint is made, and those from before stay. Look for NaN in "
                "the data, and go on from the last checkpoint; moving statistics alone "
                "are mended by tf_lowbit.recalibrate_batch_norm. "
                f"Received: NaN or infinity in {name}",
                stacklevel=3,
            )

    def _delete_before(self, newest: Position):
        """Deletes what `keep` does not cover; torn ones do not count."""
        # Torn ones ahead are left until the training has passed them.
        passed = [position for position in self._positions() if position <= newest]
        intact = [position for position in passed if position not in self._torn]
        for position in set(passed) - set(intact[-self.keep :]):
            with self._partial_folder() as partial:
                # Renamed first: a program killed in here leaves no torn one.
                self._path(position).rename(partial)

    @contextlib.contextmanager
    def _partial_folder(self) -> Iterator[Path]:
        """Makes a hidden folder in the folder, and deletes it if it is still there."""
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


class _Start:
    """Tells `fit` where to start.

    Keras has no public way. `Model.fit` asks the object at `model._training_state`,
    if there is one, between `on_train_begin` and the first epoch; that is how
    `keras.callbacks.BackupAndRestore` does it.
    """

    def __init__(
        self,
        model: keras.Model,
        params: dict,
        position: Position | None,
        steps: int | None,
    ):
        self._model = model
        self._params = params
        self._position = position
        self._steps = steps

    def maybe_load_initial_counters_from_ckpt(
        self, steps_per_epoch, initial_epoch, mode
    ):
        """Returns the epoch and the step to start with; Keras chose the name."""
        del mode
        # Asked once: it must not move the start of a later `fit`, even if this one
        # fails and does not get to `on_train_end`.
        self._model._training_state = None
        # One `fit` gives all its callbacks the same parameters. Others than ours mean
        # that it is a later one: ours failed before it got here.
        history = getattr(self._model, "history", None)
        is_later = history is not None and history.params is not self._params
        if self._position is None or is_later:
            return initial_epoch, 0
        epoch, step = self._position
        if initial_epoch > epoch:
            raise ValueError(
                "initial_epoch must not be past the checkpoint, which would be lost; "
                "use another folder or delete it. "
                f"Received: initial_epoch={initial_epoch}, a checkpoint at {epoch}"
            )
        if step and steps_per_epoch is not None:
            # Earlier versions did not write the number down.
            is_known = self._steps is not None
            if steps_per_epoch != self._steps if is_known else step >= steps_per_epoch:
                raise ValueError(
                    "The steps per epoch must be those that the checkpoint was made "
                    f"with. Received: {steps_per_epoch} steps, a checkpoint at step "
                    f"{step}" + (f" of {self._steps}" if is_known else "")
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
    """The position that a path is the checkpoint of, or None if it is none."""
    parts = path.name.split("-")
    if len(parts) != 4 or not (parts[1].isdecimal() and parts[3].isdecimal()):
        return None
    position = Position(int(parts[1]), int(parts[3]))
    return position if path.name == _NAME.format(*position) else None


def _non_finite(model) -> str | None:
    """The name of a variable in which not all is finite."""
    # Those of metrics start anew at each epoch, and may hold a loss that overflowed.
    measured = {id(v) for metric in model.metrics for v in metric.variables}
    own = [v for v in model.variables if id(v) not in measured]
    for variable in (*own, *_optimizer_state(model)):
        is_float = variable.dtype.is_floating
        if is_float and not tf.reduce_all(tf.math.is_finite(variable)):
            return variable.name
    return None


def _optimizer_state(model) -> list:
    """The optimizers' variables, as far as they are made."""
    names = ("optimizer", "teacher_optimizer")
    optimizers = [getattr(model, name, None) for name in names]
    states = [getattr(optimizer, "variables", ()) for optimizer in optimizers]
    # Of a legacy optimizer it is a method.
    return [v for state in states for v in (state() if callable(state) else state)]
