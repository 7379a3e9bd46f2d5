"""How settings go into a saved trainer and come back."""

import dataclasses

from tf_lowbit.compat import keras


class Settings:
    """A dataclass of settings that Keras can serialize."""

    def get_config(self) -> dict:
        """The fields, serialized."""
        return {
            field.name: keras.saving.serialize_keras_object(getattr(self, field.name))
            for field in dataclasses.fields(self)
        }

    @classmethod
    def from_config(cls, config: dict):
        """The settings that `get_config` wrote."""
        deserialize = keras.saving.deserialize_keras_object
        return cls(**{name: deserialize(value) for name, value in config.items()})
