"""Estimates what the recipes of examples/configs/ cost to train, without any data.

  python examples/recipe_costs.py --tflops=10

The networks are built and their multiply-accumulates (MACs) counted. A training step
is taken as three forward passes, of two floating-point operations a MAC:

  FLOPs = 3 x 2 x MACs x training images x epochs

of each network that is trained: a teacher that is trained counts like the student, one
that is frozen with its forward pass only, and a float training before the quantized
one is added. Evaluation, normalisation, the quantizers' own arithmetic and reading the
data are left out, so this says which recipe costs how many times another one. The
hours are at a sustained speed that is assumed, not measured.
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
    "Flag files of train.py; all of examples/configs/ without this flag.",
)
flags.DEFINE_float(
    "tflops", 10.0, "Assumed sustained speed, in 10^12 floating-point operations a s."
)


@dataclasses.dataclass(frozen=True)
class Source:
    """What is known of a data set that is not here.

    Attributes:
        classes: number of classes.
        input_shape: (height, width, channels) of one image.
        images: number of training images.
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
    """What a recipe costs.

    Attributes:
        name: the flag file's, without its ending.
        parameters: of the network, which is also the teacher's.
        macs: multiply-accumulates of one image's forward pass.
        epochs: float epochs and quantized ones.
        networks: how many are trained together in the quantized epochs.
        flops: floating-point operations of the whole training.
    """

    name: str
    parameters: int
    macs: int
    epochs: tuple[int, int]
    networks: int
    flops: int

    def hours(self, tflops: float) -> float:
        """The time at a sustained speed in 10^12 operations a second."""
        return self.flops / (tflops * 1e12) / 3600


def training_flops(
    macs: int, images: int, float_epochs: int, epochs: int, distill: str = "none"
) -> int:
    """Floating-point operations of a recipe.

    >>> training_flops(1000, 10, 0, 2)
    120000
    >>> training_flops(1000, 10, 1, 2, "joint")
    300000

    Args:
        macs: of one image's forward pass.
        images: in an epoch.
        float_epochs: of the float training.
        epochs: of the quantized training.
        distill: one of `experiment.DISTILLATIONS`.

    Returns:
        The operations, by the module's rule.
    """
    passes = {"none": _PASSES, "frozen": _PASSES + 1}.get(distill, 2 * _PASSES)
    return _FLOPS_PER_MAC * macs * images * (_PASSES * float_epochs + passes * epochs)


@functools.cache
def _network_cost(model: str, width: int | None, source: Source) -> tfl.Cost:
    """The cost of the network of the flags that are set, of which these are two."""
    del model, width  # Read from the flags: many recipes have the same.
    return tfl.cost(recipe.build_model(source))


def recipe_cost(path: Path) -> RecipeCost:
    """The cost of the recipe in a flag file; all flags are what the file says.

    Args:
        path: of the flag file.

    Returns:
        The cost.

    Raises:
        ValueError: if the recipe's data set has no entry in `SOURCES`.
    """
    FLAGS.unparse_flags()
    try:
        FLAGS([train.__name__, f"--flagfile={path}"])
    finally:
        # Whoever shows an error reads flags, too.
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
    """The costs as a Markdown table.

    Args:
        costs: one a row.
        tflops: sustained speed of the last column.

    Returns:
        The table, its lines ending in newlines.
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
    # Read now: each recipe sets all flags anew.
    tflops, recipes = FLAGS.tflops, FLAGS.recipes or []
    if not tflops > 0:
        raise ValueError(f"--tflops must be positive. Received: --tflops={tflops}")
    missing = [name for name in recipes if not Path(name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"--recipes must name files that are there. Received: {missing}"
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
