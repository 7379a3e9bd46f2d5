"""Resets the state of a compiled model's optimizer."""

from tf_lowbit.compat import keras
from tf_lowbit.network import inspection


def reset_optimizer(model: keras.Model) -> None:
    """Resets step count, momenta and all other state, except the learning rate.

    Args:
        model: Compiled model with a `keras.optimizers.Optimizer`. The teacher's
            optimizer of a `LowBitTrainer` is not reset.

    Raises:
        ValueError: If `from_config` cannot copy the optimizer.
    """
    optimizer, fresh = innermost(model.optimizer), fresh_optimizer(model)
    networks = inspection.networks(model)
    variables = [v for network in networks for v in network.trainable_variables]
    with model.distribute_strategy.scope():
        fresh.build(variables)
        optimizer.build(variables)
    for old, new in zip(optimizer.variables, fresh.variables, strict=True):
        if old is not optimizer.learning_rate:
            old.assign(new)


def fresh_optimizer(model: keras.Model) -> keras.optimizers.Optimizer:
    """A new optimizer with the same configuration, not built.

    Raises:
        ValueError: If `from_config` cannot copy the optimizer.
    """
    optimizer = innermost(model.optimizer)
    try:
        with model.distribute_strategy.scope():
            return type(optimizer).from_config(optimizer.get_config())
    except Exception as error:  # A user's class can fail in any way.
        raise ValueError(
            "The optimizer must be one that from_config copies from get_config, "
            "because a stage resets its state; or pass reset_optimizer=False. "
            f"Received: {type(optimizer).__name__}: {error}"
        ) from error


def innermost(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """The optimizer without the wrapper of loss scaling (mixed_float16)."""
    return getattr(optimizer, "inner_optimizer", optimizer)
