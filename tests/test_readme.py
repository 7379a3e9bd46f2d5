import re
from pathlib import Path

import numpy as np

from tf_lowbit.compat import keras, tf

README = Path(__file__).resolve().parent.parent / "README.md"


def float_model():
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Conv2D(4, 3, activation="relu", input_shape=(8, 8, 1), name="conv1"),
            layers.Conv2D(8, 3, use_bias=False, name="conv2"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, name="head"),
        ]
    )


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    """The block as it stands there, on a small network and random data."""
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 20
    rng = np.random.default_rng(0)
    images = rng.normal(size=(16, 8, 8, 1)).astype("f")
    data = tf.data.Dataset.from_tensor_slices((images, np.arange(16) % 3)).batch(8)
    names = {"float_model": float_model(), "train_data": data, "test_data": data}
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), names)
    np.testing.assert_array_equal(
        names["again"].predict(images, verbose=0),
        names["model"].predict(images, verbose=0),
    )
    printed = capsys.readouterr().out
    assert "Stage 2/2: weights at 2 bits, activations at 2 bits" in printed
    assert "conv2" in printed
    assert "BOPs" in printed
