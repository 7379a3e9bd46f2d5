"""The cost of a network as a table of text."""

import dataclasses
import io
import textwrap

import rich.box
import rich.console
import rich.table
import rich.text

from tf_lowbit import inspection, keras3
from tf_lowbit.compat import is_keras3, keras
from tf_lowbit.reporting.cost import Cost, LayerCost, cost

_COLUMNS = (
    "layer",
    "type",
    "output",
    "parameters",
    "weight bits",
    "activation bits",
    "weight bytes",
    "MACs",
    "BOPs",
)
_TEXT_COLUMNS = 3
# The table is as wide as its contents; the console must not make it narrower.
_WIDTH = 1_000_000


@dataclasses.dataclass(frozen=True)
class Summary:
    """A cost that prints as a table.

    Attributes:
        cost: the numbers: `summary.cost.layers`, `summary.cost.bops`,
            `summary.cost.as_dict()`.
        uncalibrated: activation quantizers whose range is a mere default.
    """

    cost: Cost
    uncalibrated: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The table, without colours, as wide as it must be."""
        stream = io.StringIO()
        console = rich.console.Console(file=stream, width=_WIDTH, color_system=None)
        console.print(self.__rich__(), crop=False)
        lines = (line.rstrip() for line in stream.getvalue().splitlines())
        return textwrap.dedent("\n".join(lines)).strip("\n")

    def __rich__(self):
        """The table for a rich console."""
        table = _table(self.cost)
        if self.uncalibrated:
            # Text, not str: a name such as net[v1] is no markup.
            table.caption = rich.text.Text(
                f"{table.caption}\n{len(self.uncalibrated)} ranges are mere defaults: "
                f"call tf_lowbit.calibrate ({', '.join(self.uncalibrated)})"
            )
        return table


def summary(model: keras.Model) -> Summary:
    """What each layer of a network costs at the bits that it has now.

    Args:
        model: functional or sequential model, quantized or float.

    Returns:
        A `Summary`: `print` it, or read the numbers from `.cost`.

    Raises:
        ValueError: if the model is subclassed or not built.
    """
    if is_keras3(model):
        model = keras3.from_keras3(model)
    tensors = inspection.quantized_tensors(model)
    waiting = tuple(tensor.name for tensor in tensors if not tensor.is_calibrated)
    return Summary(cost(model), waiting)


def _table(total: Cost) -> rich.table.Table:
    share = total.weight_bytes / max(total.float_bytes, 1)
    table = rich.table.Table(
        title=rich.text.Text(total.name),
        box=rich.box.SIMPLE_HEAD,
        show_footer=True,
        caption=f"{share:.3f} of the {total.float_bytes:,} bytes at float32",
    )
    footers = (
        "total",
        "",
        "",
        _number(total.parameters),
        "",
        "",
        _number(total.weight_bytes),
        _number(total.macs),
        _number(total.bops),
    )
    for index, (column, footer) in enumerate(zip(_COLUMNS, footers, strict=True)):
        justify = "left" if index < _TEXT_COLUMNS else "right"
        table.add_column(column, footer=footer, justify=justify, no_wrap=True)
    for layer in total.layers:
        # Text, not str: a name such as net[v1] is no markup.
        table.add_row(*map(rich.text.Text, _row(layer)))
    return table


def _row(layer: LayerCost) -> tuple[str, ...]:
    has_kernels = bool(layer.weight_bits)
    return (
        layer.name,
        layer.kind,
        " x ".join("?" if size is None else str(size) for size in layer.output_shape),
        _number(layer.parameters),
        _bits(layer.weight_bits),
        _bits(layer.activation_bits),
        _number(layer.weight_bytes),
        _number(layer.macs) if has_kernels else "",
        _number(layer.bops) if has_kernels else "",
    )


def _bits(bits: tuple[int, ...]) -> str:
    distinct = bits[:1] if len(set(bits)) == 1 else bits
    return "/".join("float" if b > 8 else str(b) for b in distinct)


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"
