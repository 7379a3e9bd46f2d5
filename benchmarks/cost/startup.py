"""Start-up: CPU time from an empty process to the first training step, by part.

  python -m benchmarks.cost.startup --output=benchmarks/results/startup.json

A fresh process for each: the float network, the W2A2 network, and the trainer with
stochastic precision and a teacher. Import, building (and quantizing), the first step
(which traces), and a second one. Medians over the rounds, in which they take turns. The
time of the import includes the collection of its garbage.
"""

import gc
import json
import os
import subprocess
import sys
import time

import numpy as np
from absl import app, flags

FLAGS = flags.FLAGS
# Its own name, which a process of it has not.
MODULE = "benchmarks.cost.startup"

flags.DEFINE_integer("depth", 20, "Depth of the CIFAR pre-activation ResNet, 6n+2.")
flags.DEFINE_integer("batch_size", 32, "Images in a batch.")
flags.DEFINE_integer("rounds", 5, "Processes of each kind.")
flags.DEFINE_string("output", None, "JSON file to write the figures to.")
flags.DEFINE_enum("kind", None, ("float", "W2A2", "SP+JKD"), "Only this, one process.")

KINDS = ("float", "W2A2", "SP+JKD")
PARTS = ("import", "build", "first step", "second step")


def once(kind: str) -> dict[str, float]:
    """CPU seconds of each part, in this process."""
    times = [time.process_time()]
    import tf_lowbit as tfl
    from benchmarks.cost import stepping
    from tf_lowbit import models

    gc.collect()
    times.append(time.process_time())
    model = models.preact_resnet(FLAGS.depth)
    if kind != "float":
        teacher = model
        model = tfl.quantize(teacher, [tfl.PrecisionRule(".*", 2, 2)])
    if kind == "SP+JKD":
        precision = tfl.StochasticPrecision(steps=1000)
        model = tfl.LowBitTrainer(model, teacher, stochastic_precision=precision)
    step = stepping.step_function(model, FLAGS.batch_size)
    times.append(time.process_time())
    for _ in range(2):
        stepping.cpu_seconds(step, 1)
        times.append(time.process_time())
    return dict(zip(PARTS, np.diff(times).tolist(), strict=True))


def in_process(kind: str) -> dict[str, float]:
    """`once`, in a fresh process."""
    flag_values = [f"--{n}={getattr(FLAGS, n)}" for n in ("depth", "batch_size")]
    done = subprocess.run(
        [sys.executable, "-m", MODULE, f"--kind={kind}", *flag_values],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(argv):
    """Measures, prints and writes."""
    if len(argv) > 1:
        raise app.UsageError(f"Received: arguments that are no flags: {argv[1:]}")
    if FLAGS.kind:
        print(json.dumps(once(FLAGS.kind)))
        return
    rounds = [{kind: in_process(kind) for kind in KINDS} for _ in range(FLAGS.rounds)]
    # TensorFlow is imported here only now: the processes above have both cores.
    import rich.console
    import rich.table

    from benchmarks.cost import stepping

    table = rich.table.Table(title="Start-up in CPU seconds, and relative to float")
    for column in ("network", *PARTS, "to the first step", "relative"):
        table.add_column(column)
    figures = []
    for kind in KINDS:
        parts = {p: float(np.median([r[kind][p] for r in rounds])) for p in PARTS}
        totals = [{k: sum(r[k][p] for p in PARTS[:3]) for k in KINDS} for r in rounds]
        compared = stepping.compare(totals, kind, "float")
        total = float(np.median([t[kind] for t in totals]))
        figures.append({"cpu_seconds": parts, "to_first_step": total, **compared})
        cells = [*parts.values(), total, compared["median"]]
        table.add_row(kind, *(f"{cell:.2f}" for cell in cells))
    rich.console.Console().print(table)
    if FLAGS.output:
        stepping.write(FLAGS.output, {"startup": figures}, __name__)


if __name__ == "__main__":
    app.run(main)
