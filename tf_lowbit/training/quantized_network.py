"""The class of quantized networks. Its `fit` and `evaluate` warn of mistakes."""

import contextlib
import functools
import inspect
from typing import Any

from tf_lowbit.calibration import batch_norm
from tf_lowbit.compat import keras, tf
from tf_lowbit.core import user_warnings
from tf_lowbit.network import inspection, keras3
from tf_lowbit.network.output_names import NamedOutputs
from tf_lowbit.scheme.layout import QuantizationWarning

# Statistics of fewer steps are mostly noise: those of 10 batches of 32 values have an
# error of 0.07 standard deviations, about half of a notable lag.
_FEWEST_STEPS = 10


def _metric(given):
    """`keras.metrics.get`, which leaves the name "auc" to the metric of training."""
    # Keras numbers metrics within a graph: the next one would be "auc_1".
    with tf.Graph().as_default():
        return keras.metrics.get(given)


_FOUND_BY_NAME = {
    "optimizer": keras.optimizers.get,
    "loss": keras.losses.get,
    "metrics": _metric,
    "weighted_metrics": _metric,
}
# Metrics that Keras finds by the loss, in lower or upper case.
_OF_ANY_LOSS = ("accuracy", "acc", "crossentropy", "ce")


class CheckedTraining:
    """Mixin of a `keras.Model` whose `fit` and `evaluate` warn of common mistakes.

    Training itself does not change. A `QuantizationWarning` reports

    - activation ranges that are not calibrated: once for each range, in `fit` and
      `evaluate`;
    - moving statistics of batch normalization that lag behind the weights: at the end
      of `fit`.

    Callbacks such as `StagedPrecision` can have methods `before_fit(callbacks)` and
    `after_fit()`. `fit` calls the first with the list of all callbacks, and the second
    after the last `on_train_end`, or after the error that ended the training.
    """

    # Every `fit` calls these before the given callbacks.
    _own_callbacks = ()

    @functools.wraps(keras.Model.compile)
    def compile(self, *args: Any, **kwargs: Any) -> None:  # noqa: D102 (Keras's own)
        with self.distribute_strategy.scope():
            args, kwargs = keras3.as_tf_keras((args, kwargs))
        given = inspect.signature(super().compile).bind(*args, **kwargs).arguments
        for name, find in _FOUND_BY_NAME.items():
            _require_known(name, given.get(name), find)
        super().compile(*args, **kwargs)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles from a saved file.

        Keras does not do this for a class that overrides `compile`.
        """
        self.compile(**keras.saving.deserialize_keras_object(config))
        if isinstance(self.optimizer, keras.optimizers.Optimizer) and self.built:
            # Loading needs the optimizer's variables.
            self.optimizer.build(self.trainable_variables)

    @functools.wraps(keras.Model.fit)
    def fit(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 (Keras's own)
        given = inspect.signature(super().fit).bind(*args, **kwargs)
        callbacks = given.arguments.get("callbacks")
        keras3.require_callbacks(callbacks)
        watched = _watched(self, callbacks)
        with _explained(self), watched as given.arguments["callbacks"]:
            return super().fit(*given.args, **given.kwargs)

    @functools.wraps(keras.Model.evaluate)
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 (Keras's own)
        keras3.require_callbacks(kwargs.get("callbacks"))
        warn_of_open_ranges(self)
        with _explained(self):
            return super().evaluate(*args, **kwargs)


@keras.utils.register_keras_serializable(package="tf_lowbit")
class QuantizedNetwork(CheckedTraining, NamedOutputs):
    """A Functional model from `quantize`, with the output names of the float model.

    `fit` and `evaluate` warn as in `CheckedTraining`.
    """


# HDF5 and JSON store a model's class without its package.
for _kind in (NamedOutputs, QuantizedNetwork):
    keras.utils.get_custom_objects()[_kind.__name__] = _kind


def _require_known(name, given, find) -> None:
    """Refuses what Keras would refuse at the first step, in a long trace."""
    is_metric = find is _metric
    for one in tf.nest.flatten(given):
        if one is None or (is_metric and str(one).lower() in _OF_ANY_LOSS):
            continue
        try:
            found = find(one)
        except (TypeError, ValueError):
            found = None
        # `keras.metrics.get` returns an unknown name as it is.
        if found is None or isinstance(found, str):
            raise ValueError(
                f"{name} must be of Keras: an object, a function or the name of one. "
                f"Received: {name}={one!r}"
            )


def warn_of_open_ranges(model: keras.Model) -> None:
    """Warns of activation ranges that are not calibrated, once for each range.

    Args:
        model: A quantized network or a `LowBitTrainer`.
    """
    tensors = inspection.quantized_tensors(model)
    waiting = [tensor.name for tensor in tensors if not tensor.is_calibrated]
    is_new = set(waiting) - getattr(model, "_ranges_told", frozenset())
    # Not a list, which Keras would track for checkpoints.
    model._ranges_told = frozenset(waiting)
    if is_new:
        user_warnings.warn(
            "Call tf_lowbit.calibrate(model, data) before training: the range of "
            f"{len(waiting)} activation quantizers is still the default: {waiting}",
            QuantizationWarning,
        )


@contextlib.contextmanager
def _explained(model):
    """A context that explains the error of a kernel that got a step of NaN."""
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        spoilt = inspection.nonfinite_weight(model)
        if "Invalid range: input_min" not in str(error) or spoilt is None:
            raise
        raise ValueError(
            "Steps and clips must be finite: look for NaN in the data, lower the "
            "learning rate, or load weights from before the training diverged. "
            f"Received: NaN or infinity in {spoilt}"
        ) from error


@contextlib.contextmanager
def _watched(model, callbacks):
    """Yields the callbacks of `fit`: `_Watch`, the model's own, then the given ones."""
    watch = _Watch()
    own = [watch, *model._own_callbacks]
    is_list = isinstance(callbacks, keras.callbacks.CallbackList)
    others = callbacks.callbacks if is_list else tf.nest.flatten(callbacks or [])
    others = list(others)
    for callback in others:
        if hasattr(callback, "before_fit"):
            callback.before_fit(others)
    if is_list:
        # `fit` takes a CallbackList as it is, so set here what Keras would set.
        for callback in own:
            callback.set_model(model)
            callback.set_params(callbacks.params)
        callbacks.callbacks[:0] = own
    try:
        yield callbacks if is_list else [*own, *others]
    finally:
        if is_list:
            for callback in own:
                callbacks.callbacks.remove(callback)
        for callback in others:
            if hasattr(callback, "after_fit"):
                callback.after_fit()
    watch.warn_of_lag()


class _Watch(keras.callbacks.Callback):
    """Checks ranges and moving statistics in training; must be the first callback.

    As the first, it reads the statistics before callbacks re-estimate them at the end
    of an epoch or before a validation. It starts in `on_epoch_begin`, after callbacks
    have restored the model in `on_train_begin`.
    """

    def __init__(self):
        super().__init__()
        # Without this flag, Keras would copy its logs for all callbacks.
        self._supports_tf_logs = True
        self._norms = None
        # (steps done, statistics): at the start of the last epochs, and at the end.
        self._starts = []
        self._end = None

    def on_epoch_begin(self, epoch, logs=None):
        """Checks the ranges once, and stores the statistics."""
        if self._norms is None:
            warn_of_open_ranges(self.model)
            self._norms = batch_norm.named_norms(self.model)
        start = self._present()
        # Of the starts that are long enough ago, only the last is needed.
        count = len(self._long_before(start[0]))
        self._starts = [*self._starts[max(count - 1, 0) :], start]
        self._end = None

    def on_test_begin(self, logs=None):
        """Stores the statistics at the end of the epoch's training."""
        if self._end is None:
            self._end = self._present()

    def on_epoch_end(self, epoch, logs=None):
        """Stores the statistics if there was no validation."""
        self.on_test_begin(logs)

    def warn_of_lag(self):
        """Warns of statistics that lag behind, judged by the last steps."""
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
            # Skips statistics that changed after the last step, as by re-estimation.
            if all(
                (a == b).all() for a, b in zip(now[name], statistics[name], strict=True)
            )
        }
        late = {n: lag for n, lag in lags.items() if lag > batch_norm.NOTABLE_LAG}
        if late:
            where = f"at the end of training, by their last {end - start} steps"
            message = batch_norm.lag_message(late, where)
            user_warnings.warn(message, QuantizationWarning)

    def _present(self):
        """Returns the number of steps of this `fit`, and each layer's statistics."""
        of = batch_norm.statistics_of
        values = {name: of(layer) for name, layer in self._norms.items()}
        return int(self.model._train_counter.numpy()), values

    def _long_before(self, steps):
        """Returns the epoch starts at least `_FEWEST_STEPS` before a step."""
        return [start for start in self._starts if steps - start[0] >= _FEWEST_STEPS]
