"""Kills a training again and again, and compares its end with an undisturbed one.

  python -m benchmarks.faults --kills=20 --epochs=12 \
      --output=benchmarks/results/fault_run.json

`examples/train.py` trains a 2-bit network with learned steps by stochastic precision
and joint distillation with hints. One run is left alone. The other is killed
(SIGKILL) so many times, each time after a random number of further checkpoints
and a random moment later, and goes on with --resume. Both must end with the same
networks, optimizers and counters, bit for bit.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from absl import app, flags

from tf_lowbit.analysis import environment
from tf_lowbit.callbacks import Recovery
from tf_lowbit.compat import tf

FLAGS = flags.FLAGS

flags.DEFINE_integer("kills", 20, "How many times the training is killed.")
flags.DEFINE_integer("epochs", 16, "Epochs of the quantized training.")
flags.DEFINE_integer("seed", 0, "Of the kills' moments.")
flags.DEFINE_string("output", None, "JSON file to write the outcome to.")

PROGRAM = Path(__file__).resolve().parent.parent / "examples" / "train.py"
SAVE_EVERY = 2
TRAINING = (
    "--dataset=digits",
    "--model=preact_resnet8",
    "--width=4",
    "--limit=512",
    "--batch_size=32",
    "--float_epochs=1",
    "--weight_quantizer=lsq",
    "--activation_quantizer=lsq",
    "--method=sp",
    "--distill=joint",
    "--hints",
    "--strategy=one",
    f"--save_every={SAVE_EVERY}",
)
# A kill comes after one to so many checkpoints more, and up to so many seconds later.
MOST_CHECKPOINTS = 6
LONGEST_DELAY = 0.2


def command(folder: Path) -> list[str]:
    """The training as a command line; it goes on where it was."""
    own = [f"--epochs={FLAGS.epochs}", f"--output_dir={folder}", "--resume"]
    return [sys.executable, str(PROGRAM), *TRAINING, *own]


def names(folder: Path) -> set[str]:
    """The quantized training's checkpoints."""
    return {path.name for path in folder.glob("quantized/checkpoints/epoch-*")}


def killed_once(folder: Path, chance: random.Random) -> dict:
    """Starts the training and kills it; where it was then.

    Raises:
        RuntimeError: If the training ends by itself.
    """
    awaited = chance.randint(1, MOST_CHECKPOINTS)
    seen = names(folder)
    with subprocess.Popen(
        command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        while awaited > 0:
            new = names(folder) - seen
            seen |= new
            awaited -= len(new)
            if process.poll() is not None:
                raise RuntimeError(
                    "The training must outlast the kills: give it more --epochs. "
                    f"Received: its end, with code {process.returncode}: "
                    f"{process.stderr.read()[-2000:]}"
                )
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, LONGEST_DELAY))
        process.send_signal(signal.SIGKILL)
    left = list(folder.glob("quantized/checkpoints/.partial-*"))
    position = Recovery(folder / "quantized" / "checkpoints").position
    return {**position._asdict(), "within a save": bool(left)}


def saved(folder: Path) -> dict[str, np.ndarray]:
    """All that the last checkpoint holds: networks, optimizers, counters."""
    last = sorted((folder / "quantized" / "checkpoints").glob("epoch-*"))[-1]
    reader = tf.train.load_checkpoint(str(last / "variables"))
    return {
        name: reader.get_tensor(name)
        for name in reader.get_variable_to_shape_map()
        if not name.startswith("_CHECKPOINTABLE") and "save_counter" not in name
    }


def main(argv):
    """Runs, kills, compares and writes."""
    if len(argv) > 1:
        raise app.UsageError(f"Received: arguments that are no flags: {argv[1:]}")
    chance = random.Random(FLAGS.seed)
    with tempfile.TemporaryDirectory() as temporary:
        whole, disturbed = Path(temporary, "whole"), Path(temporary, "disturbed")
        subprocess.run(command(whole), check=True, stdout=subprocess.DEVNULL)
        # The kills are the quantized training's.
        shutil.copytree(whole / "float", disturbed / "float")
        kills = []
        for count in range(FLAGS.kills):
            kills.append(killed_once(disturbed, chance))
            print(f"Kill {count + 1}: newest intact checkpoint {kills[-1]}", flush=True)
        subprocess.run(command(disturbed), check=True, stdout=subprocess.DEVNULL)
        expected, found = saved(whole), saved(disturbed)
    different = sorted(
        name
        for name in expected.keys() | found.keys()
        if name not in expected
        or name not in found
        or not np.array_equal(expected[name], found[name])
    )
    print(f"{len(expected)} saved tensors, {len(different)} different: {different[:5]}")
    if FLAGS.output:
        result = {
            "kills": kills,
            "tensors": len(expected),
            "different": different,
            "training": list(TRAINING),
            "settings": {"epochs": FLAGS.epochs, "seed": FLAGS.seed},
            **environment(),
        }
        Path(FLAGS.output).parent.mkdir(parents=True, exist_ok=True)
        Path(FLAGS.output).write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    app.run(main)
