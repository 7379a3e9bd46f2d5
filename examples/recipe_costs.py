"""Estimates what the recipes of examples/configs/ cost to train, without any data.

  python examples/recipe_costs.py --tflops=10

The program builds each network and counts its multiply-accumulates (MACs). A training
step costs as much as three forward passes, with two floating-point operations per MAC:

  FLOPs = 3 x 2 x MACs x training images x epochs

This is counted for each trained network, teachers included. A frozen teacher counts one
forward pass. A float training before the quantized one is added. Evaluation,
normalization, the quantizers' arithmetic and reading the data are left out, so the
numbers compare recipes with each other. The hours assume a sustained speed, which was
not measured.
"""

import dataclasses
import functools
from pathlib import Path

import quiet_start  # noqa: F401 (before TensorFlow)

# isort: split
import command_line
import recipe
import train
from absl import app, flags

import tf_lowbit as tfl

FLAGS = flags.FLAGS
CONFIGS = Path(__file__).resolve().parent / "configs"

flags.DEFINE_list(
    "recipes",
    None,
    "Flag files of train.py; by default all of examples/configs/.",
)
flags.DEFINE_float(
    "tflops", 10.0, "Assumed sustained speed, in 10^12 floating-point operations per s."
)


@dataclasses.dataclass(frozen=True)
class Source:
    """Facts about a data set that need not be on this machine.

    Attributes:
        classes: Number of classes.
        input_shape: (height, width, channels) of one image.
        images: Number of training images.
    """

    classes: int
    input_shape: tuple[int, int, int]
    images: int


SOURCES = {
    "cifar10": Source(10, (32, 32, 3), 50_000),
    "cifar100": Source(100, (32, 32, 3), 50_000),
    "imagenet2012": Source(1000, (224, 224, 3), 1_281_167),
}
_FLOPS_PER_MAC = 2
# Forward, and backward to the activations and to the weights.
_PASSES = 3


@dataclasses.dataclass(frozen=True)
class RecipeCost:
    """The training cost of a recipe.

    Attributes:
        name: Name of the flag file, without its ending.
        parameters: Parameters of the network; a teacher has as many.
        macs: Multiply-accumulates of one image's forward pass.
        epochs: Numbers of float and of quantized epochs.
        networks: Number of networks that are trained in the quantized epochs.
        flops: Floating-point operations of the whole training.
    """

    name: str
    parameters: int
    macs: int
    epochs: tuple[int, int]
    networks: int
    flops: int

    def hours(self, tflops: float) -> float:
        """Returns the hours at a sustained speed in 10^12 operations per second."""
        return self.flops / (tflops * 1e12) / 3600


def training_flops(
    macs: int, images: int, float_epochs: int, epochs: int, distill: str = "none"
) -> int:
    """Returns the floating-point operations of a recipe.

    >>> training_flops(1000, 10, 0, 2)
    120000
    >>> training_flops(1000, 10, 1, 2, "joint")
    300000

    Args:
        macs: Multiply-accumulates of one image's forward pass.
        images: Images in an epoch.
        float_epochs: Epochs of the float training.
        epochs: Epochs of the quantized training.
        distill: One of `experiment.DISTILLATIONS`.

    Returns:
        The operations, by the formula of this module.
    """
    passes = {"none": _PASSES, "frozen": _PASSES + 1}.get(distill, 2 * _PASSES)
    return _FLOPS_PER_MAC * macs * images * (_PASSES * float_epochs + passes * epochs)


@functools.cache
def _network_cost(model: str, width: int | None, source: Source) -> tfl.Cost:
    """Returns the cost of the network of the current flags."""
    del model, width  # Keys of the cache; `build_model` reads the flags.
    return tfl.cost(recipe.build_model(source))


def recipe_cost(path: Path) -> RecipeCost:
    """Returns the cost of the recipe in a flag file; sets all flags from the file.

    Args:
        path: Path of the flag file.

    Raises:
        ValueError: If the recipe's data set has no entry in `SOURCES`.
    """
    FLAGS.unparse_flags()
    try:
        FLAGS([train.__name__, f"--flagfile={path}"])
    finally:
        # Code that shows an error reads flags, too.
        FLAGS.mark_as_parsed()
    if FLAGS.dataset not in SOURCES:
        raise ValueError(
            f"--dataset must be one of {', '.join(SOURCES)}. "
            f"Received: --dataset={FLAGS.dataset} in {path.name}"
        )
    source = SOURCES[FLAGS.dataset]
    cost = _network_cost(FLAGS.model, FLAGS.width, source)
    float_epochs = 0 if FLAGS.float_checkpoint is not None else FLAGS.float_epochs
    return RecipeCost(
        name=path.stem,
        parameters=cost.parameters,
        macs=cost.macs,
        epochs=(float_epochs, FLAGS.epochs),
        networks=2 if FLAGS.distill in ("joint", "task") else 1,
        flops=training_flops(
            cost.macs, source.images, float_epochs, FLAGS.epochs, FLAGS.distill
        ),
    )


def table(costs: list[RecipeCost], tflops: float) -> str:
    """Formats costs as a Markdown table.

    Args:
        costs: One for each row.
        tflops: Sustained speed for the last column.

    Returns:
        The table, with a newline after each line.
    """
    lines = [
        "| recipe | parameters | MACs per image | epochs, float + quantized "
        f"| networks trained | training FLOPs | hours at {tflops:g} TFLOP/s |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for cost in costs:
        float_epochs, epochs = cost.epochs
        lines.append(
            f"| `{cost.name}` | {cost.parameters:,} | {cost.macs:,} "
            f"| {float_epochs} + {epochs} | {cost.networks} | {cost.flops:.2e} "
            f"| {cost.hours(tflops):,.2f} |"
        )
    return "".join(f"{line}\n" for line in lines)


def main(argv):
    """Prints the table of all recipes."""
    if len(argv) > 1:
        raise app.UsageError(f"Received: arguments that are no flags: {argv[1:]}")
    # Read now, because each recipe sets all flags.
    tflops, recipes = FLAGS.tflops, FLAGS.recipes or []
    if not tflops > 0:
        raise ValueError(f"--tflops must be positive. Received: --tflops={tflops}")
    missing = [name for name in recipes if not Path(name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"--recipes must name files that exist. Received: {missing}"
        )
    of_train = FLAGS.get_key_flags_for_module(train.__name__)
    given = [f"--{flag.name}" for flag in of_train if flag.present]
    if given:
        raise ValueError(
            "Flags of train.py must be in the files that --recipes names. "
            f"Received: {', '.join(given)}"
        )
    paths = [Path(name) for name in recipes] if recipes else CONFIGS.glob("*.flags")
    print(table([recipe_cost(path) for path in sorted(paths)], tflops), end="")


if __name__ == "__main__":
    command_line.run(main)
