"""Made-up results of the accuracy sweep."""

import dataclasses

from benchmarks.accuracy import plan as sweep

SETTINGS = sweep.Settings()
MACHINE = {"processor": "x86_64", "cpus": 2, "instructions": ["avx2"]}


def put(folder, run, accuracy, cpu_seconds=100.0, settings=SETTINGS, **more):
    """Adds a run's result as the sweep does, with made-up figures."""
    sweep.write(
        folder,
        run,
        {
            **{f.name: getattr(run, f.name) for f in dataclasses.fields(run)},
            "measured_on": "held-out" if run.is_held_out else "test",
            "accuracy": accuracy,
            "cpu_seconds": cpu_seconds,
            "weight_bytes": 1000,
            "bops": 10**6,
            "diverged": None if accuracy is not None else "a loss of nan",
            "settings": settings.as_json(),
            "machine": MACHINE,
            **more,
        },
    )


def low_bit(method, seed, bits=(2, 2), purpose="equal", epochs=SETTINGS.epochs):
    return sweep.Run(purpose, "preact_resnet8", method, bits, seed, epochs, 0.03)
