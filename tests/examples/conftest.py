"""What the tests of several programs share: one network, trained for deployment."""

import pytest

from tests.examples import programs

TRAINED_WITH = {
    "dataset": "digits",
    "model": "preact_resnet8",
    "width": 2,
    "limit": 40,
    "batch_size": 20,
    "float_epochs": 0,
    "epochs": 1,
    "weight_quantizer": "lsq",
    "activation_quantizer": "lsq",
    "first_last_bits": 8,
    "residual_bits": 8,
}


@pytest.fixture(scope="session")
def trained_for_deployment(tmp_path_factory):
    """The flags, and the folder of a run whose residual sums were trained at 8 bits."""
    folder = tmp_path_factory.mktemp("trained")
    flags = [f"--{name}={value}" for name, value in TRAINED_WITH.items()]
    done = programs.run("train.py", *flags, "--output_dir=run", folder=folder)
    assert done.returncode == 0, done.stderr
    return TRAINED_WITH, folder / "run"
