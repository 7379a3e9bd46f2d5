"""A training step as `fit` runs it, and ratios of what steps take."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import flags

import tf_lowbit as tfl
from tf_lowbit.analysis import environment
from tf_lowbit.compat import keras, tf
from tf_lowbit.core.files import replace_file


def step_function(
    model: keras.Model, batch_size: int, shape: tuple[int, ...] = (32, 32, 3)
) -> Callable:
    """Compiles a classifier and returns its step on one fixed batch.

    Args:
        model: A network with at least 10 logits, or a `LowBitTrainer`.
        batch_size: Images in the batch, of random pixels and labels.
        shape: Of one image.

    Returns:
        A function that runs the model's own `train_function`, metrics included, and
        returns its logs.
    """
    arguments = {}
    if isinstance(model, tfl.LowBitTrainer) and model.trains_teacher:
        arguments["teacher_optimizer"] = keras.optimizers.SGD(0.01, momentum=0.9)
    model.compile(
        keras.optimizers.SGD(0.01, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        **arguments,
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch_size, *shape)).astype("float32")
    y = rng.integers(10, size=batch_size)
    batches = iter(tf.data.Dataset.from_tensors((x, y)).cache().repeat())
    function = model.make_train_function()
    return lambda: function(batches)


def cpu_seconds(step: Callable, count: int) -> float:
    """CPU time of some steps, over all threads of the process."""
    start = time.process_time()
    for _ in range(count):
        step()["loss"].numpy()
    return time.process_time() - start


def take_turns(steps: dict[str, Callable], rounds: int, count: int) -> list[dict]:
    """CPU seconds of each step by name, round by round, after one round to warm up.

    Steps take turns, so that the machine's drift hits all of them.
    """
    return [
        {name: cpu_seconds(step, count) for name, step in steps.items()}
        for _ in range(rounds + 1)
    ][1:]


def compare(rounds: list[dict], name: str, other: str) -> dict:
    """Statistics of the ratio of two steps of the same round."""
    ratios = np.array([taken[name] / taken[other] for taken in rounds])
    return {
        "step": name,
        "relative to": other,
        "median": round(float(np.median(ratios)), 3),
        "least": round(float(ratios.min()), 3),
        "largest": round(float(ratios.max()), 3),
    }


def write(path: str, figures: dict, module: str) -> None:
    """Writes figures with the program's flags, versions and machine beside them.

    Args:
        path: Of the JSON file; its folder is made.
        figures: JSON-ready.
        module: The program's `__name__`, whose flags are written.
    """
    own = flags.FLAGS.get_key_flags_for_module(module)
    # Folders are of the machine, not of what was measured.
    settings = {
        flag.name: flag.value
        for flag in own
        if flag.name != "output" and not flag.name.endswith("_dir")
    }
    result = {**figures, "settings": settings, **environment()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(result, indent=2) + "\n")
