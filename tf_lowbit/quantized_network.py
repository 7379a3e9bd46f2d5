"""The class of quantized networks: `fit` and `evaluate` that tell what is wrong."""

import contextlib
import functools
import inspect
import warnings

from tf_lowbit import batch_norm, inspection, keras3
from tf_lowbit.compat import keras, tf
from tf_lowbit.scheme.layout import QuantizationWarning
from tf_lowbit.scheme.output_names import NamedOutputs

# Statistics of fewer steps are mostly chance: 10 batches of 32 values are 0.07
# standard deviations off, about half of what counts as a lag.
_FEWEST_STEPS = 10


class CheckedTraining:
    """Mixin of a `keras.Model` whose `fit` and `evaluate` warn of common mistakes.

    Training itself does not change. A `QuantizationWarning` tells of

    - activation ranges that still wait for `tf_lowbit.calibrate`, in `fit` and
      `evaluate`, once for each range;
    - moving statistics of batch normalisation that lag, when `fit` ends;
    - what callbacks with methods `before_fit(callbacks)` and `after_fit()` find, such
      as `StagedPrecision`. `fit` calls the first with the list of all callbacks, and
      the second when the last `on_train_end` is done.
    """

    @functools.wraps(keras.Model.compile)
    def compile(self, *args, **kwargs):  # noqa: D102 (Keras's own)
        with self.distribute_strategy.scope():
            args, kwargs = keras3.as_tf_keras((args, kwargs))
        super().compile(*args, **kwargs)

    def compile_from_config(self, config):
        """Compiles as a file says: Keras does so only where `compile` is its own."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if isinstance(self.optimizer, keras.optimizers.Optimizer) and self.built:
            self.optimizer.build(self.trainable_variables)  # Then they can be read.

    @functools.wraps(keras.Model.fit)
    def fit(self, *args, **kwargs):  # noqa: D102 (Keras's own)
        given = inspect.signature(super().fit).bind(*args, **kwargs)
        callbacks = given.arguments.get("callbacks")
        keras3.require_callbacks(callbacks)
        with _watched(self, callbacks) as given.arguments["callbacks"]:
            return super().fit(*given.args, **given.kwargs)

    @functools.wraps(keras.Model.evaluate)
    def evaluate(self, *args, **kwargs):  # noqa: D102 (Keras's own)
        keras3.require_callbacks(kwargs.get("callbacks"))
        warn_of_open_ranges(self)
        return super().evaluate(*args, **kwargs)


@keras.utils.register_keras_serializable(package="tf_lowbit")
class QuantizedNetwork(CheckedTraining, NamedOutputs):
    """A Functional model that `quantize` made.

    It warns as `CheckedTraining` says, and its outputs have the float model's names.
    """


# HDF5 and JSON name the class of a model without its package.
for _kind in (NamedOutputs, QuantizedNetwork):
    keras.utils.get_custom_objects()[_kind.__name__] = _kind


def warn_of_open_ranges(model: keras.Model) -> None:
    """Warns of activation ranges that wait for `calibrate`; once for each range.

    Args:
        model: a quantized network or a `LowBitTrainer`.
    """
    tensors = inspection.quantized_tensors(model)
    waiting = [tensor.name for tensor in tensors if not tensor.is_calibrated]
    is_new = set(waiting) - getattr(model, "_ranges_told", frozenset())
    # A frozenset: Keras would make a set or a list a part of checkpoints.
    model._ranges_told = frozenset(waiting)
    if is_new:
        warnings.warn(
            "Call tf_lowbit.calibrate(model, data) before training: the range of "
            f"{len(waiting)} activation quantizers is a mere default: {waiting}",
            QuantizationWarning,
            stacklevel=3,
        )


@contextlib.contextmanager
def _watched(model, callbacks):
    """A context for `fit`: yields the callbacks, with one that watches in front."""
    watch = _Watch()
    is_list = isinstance(callbacks, keras.callbacks.CallbackList)
    others = callbacks.callbacks if is_list else tf.nest.flatten(callbacks or [])
    others = list(others)
    for callback in others:
        if hasattr(callback, "before_fit"):
            callback.before_fit(others)
    if is_list:
        # `fit` takes the list as it is, which has told its callbacks these already.
        watch.set_model(model)
        watch.set_params(callbacks.params)
        callbacks.callbacks.insert(0, watch)
    try:
        yield callbacks if is_list else [watch, *others]
    finally:
        if is_list:
            callbacks.callbacks.remove(watch)
    watch.warn_of_lag()
    for callback in others:
        if hasattr(callback, "after_fit"):
            callback.after_fit()


class _Watch(keras.callbacks.Callback):
    """Sees the training between the callbacks: it must be the first of them.

    In an epoch's beginning it comes after what restores the model, which is done in
    `on_train_begin`; in an epoch's end and ahead of validations it comes before what
    measures the statistics anew.
    """

    def __init__(self):
        super().__init__()
        # Without the flag, Keras would hand all callbacks copies of its logs.
        self._supports_tf_logs = True
        self._norms = None
        self._starts = []  # (steps done, statistics), of the latest epochs.
        self._end = None

    def on_epoch_begin(self, epoch, logs=None):
        """Looks at the ranges, and keeps the statistics."""
        del epoch, logs
        if self._norms is None:
            warn_of_open_ranges(self.model)
            self._norms = batch_norm.named_norms(self.model)
        start = self._present()
        # Of those that are long enough ago, the latest one will do.
        count = len(self._long_before(start[0]))
        self._starts = [*self._starts[max(count - 1, 0) :], start]
        self._end = None

    def on_test_begin(self, logs=None):
        """Keeps the statistics at the epoch's end."""
        del logs
        if self._end is None:
            self._end = self._present()

    def on_epoch_end(self, epoch, logs=None):
        """Likewise, where there is no validation."""
        del epoch
        self.on_test_begin(logs)

    def warn_of_lag(self):
        """Warns of statistics that lag, as far as the training tells."""
        if self._end is None:
            return  # No epoch was trained.
        end, statistics = self._end
        old = self._long_before(end)
        if not old:
            return
        start, before = old[-1]
        now = self._present()[1]
        lags = {
            name: batch_norm.estimated_lag(
                layer, before[name], statistics[name], end - start
            )
            for name, layer in self._norms.items()
            # What others have set since, as re-estimation does, is not judged.
            if all(
                (a == b).all() for a, b in zip(now[name], statistics[name], strict=True)
            )
        }
        late = {n: lag for n, lag in lags.items() if lag > batch_norm.NOTABLE_LAG}
        if late:
            where = f"at the end of training, by their last {end - start} steps"
            message = batch_norm.lag_message(late, where)
            warnings.warn(message, QuantizationWarning, stacklevel=4)

    def _present(self):
        """The steps that this fit has done, and the statistics of each layer."""
        of = batch_norm.statistics_of
        values = {name: of(layer) for name, layer in self._norms.items()}
        return int(self.model._train_counter.numpy()), values

    def _long_before(self, steps):
        """The starts of epochs that are enough steps ago."""
        return [start for start in self._starts if steps - start[0] >= _FEWEST_STEPS]
