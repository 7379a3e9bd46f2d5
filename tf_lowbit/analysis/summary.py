"""The cost of a network as a text table."""

import dataclasses

import rich.text

from tf_lowbit.analysis.cost import Cost, cost
from tf_lowbit.compat import is_keras3, keras
from tf_lowbit.core import tables
from tf_lowbit.network import inspection, keras3


@dataclasses.dataclass(frozen=True)
class Summary(tables.Table):
    """A cost that prints as a table.

    Attributes:
        cost: The numbers: `summary.cost.layers`, `summary.cost.bops`,
            `summary.cost.as_dict()`.
        uncalibrated: Activation quantizers whose range is still the default.
    """

    cost: Cost
    uncalibrated: tuple[str, ...] = ()

    def __rich__(self):
        """The table for a rich console."""
        table = self.cost.__rich__()
        if self.uncalibrated:
            # Text, not str: a name such as net[v1] is not markup.
            table.caption = rich.text.Text(
                f"{table.caption}\n{len(self.uncalibrated)} ranges are defaults: "
                f"call tf_lowbit.calibrate ({', '.join(self.uncalibrated)})"
            )
        return table


def summary(model: keras.Model) -> Summary:
    """Computes the cost of each layer of a network at its present bits.

    Args:
        model: Functional or sequential model, quantized or float.

    Returns:
        A `Summary`: `print` it, or read the numbers from `.cost`.

    Raises:
        ValueError: If the model is subclassed or not built.
    """
    if is_keras3(model):
        model = keras3.from_keras3(model)
    tensors = inspection.quantized_tensors(model)
    waiting = tuple(tensor.name for tensor in tensors if not tensor.is_calibrated)
    return Summary(cost(model), waiting)
