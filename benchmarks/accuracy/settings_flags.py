"""The flags that say what a sweep's settings are, for the programs that run one."""

from absl import flags

from benchmarks.accuracy import plan as sweep

FLAGS = flags.FLAGS
_DEFAULTS = sweep.Settings()

flags.DEFINE_string("data_dir", None, "Folder of the data; empty for the default.")
flags.DEFINE_string("dataset", _DEFAULTS.dataset, "What to train on.")
flags.DEFINE_integer("limit", _DEFAULTS.limit, "Use only so many examples.")
flags.DEFINE_integer("width", _DEFAULTS.width, "Channels of the first stage.")
flags.DEFINE_integer("float_epochs", _DEFAULTS.float_epochs, "Of the float networks.")
flags.DEFINE_integer("epochs", _DEFAULTS.epochs, "Of the low-bit ones, in total.")


def settings() -> sweep.Settings:
    """The settings that the flags say."""
    return sweep.Settings(
        dataset=FLAGS.dataset,
        limit=FLAGS.limit,
        width=FLAGS.width,
        float_epochs=FLAGS.float_epochs,
        epochs=FLAGS.epochs,
    )
