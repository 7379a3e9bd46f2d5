"""Serialization of a trainer's settings."""

from typing import Self

from tf_lowbit.compat import keras


class Settings:
    """Base class of a dataclass of settings, which Keras can serialize."""

    def get_config(self) -> dict:
        """Returns the serialized fields."""
        serialize = keras.saving.serialize_keras_object
        return {name: serialize(value) for name, value in vars(self).items()}

    @classmethod
    def from_config(cls, config: dict) -> Self:
        """Makes settings from the result of `get_config`."""
        deserialize = keras.saving.deserialize_keras_object
        return cls(**{name: deserialize(value) for name, value in config.items()})
