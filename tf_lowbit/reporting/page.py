"""A report on a low-bitwidth network: one page that needs nothing else."""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tf_lowbit import inspection, predictions
from tf_lowbit.compat import keras, tf
from tf_lowbit.core import checks
from tf_lowbit.core.files import replace_file, replaced
from tf_lowbit.core.stages import Stage
from tf_lowbit.observation import batches_for, require_end, require_rereadable
from tf_lowbit.reporting import plots
from tf_lowbit.reporting.cost import cost
from tf_lowbit.reporting.environment import environment
from tf_lowbit.tensor_statistics import statistics

_TITLES = {
    "cost": "Size and operations of the layers",
    "sqnr": "How near the values on the grid are to the exact ones",
    "weight_levels": "Weights over their levels, in steps",
    "activation_levels": "Activations over their levels, in steps",
    "stages": "Stages",
    "history": "Training",
}
_DOTS_PER_INCH = 300


def report(
    model: keras.Model,
    dataset=None,
    path="report.html",
    *,
    batches: int = 4,
    history: Mapping | None = None,
    stages: Sequence[Stage] | None = None,
    exported=None,
    verified=None,
    figures=None,
) -> Path:
    """Writes a page about a low-bitwidth network: one HTML file, nothing beside it.

    It has the accuracy, size and operations of the network and of each layer, how the
    weights and activations lie over their levels, the stages of the training and its
    curves, and what an export and its verification said; as far as they are given. It
    follows the reader's light or dark setting and fetches nothing.

    Args:
        model: what `tf_lowbit.quantize` made.
        dataset: finite iterable of batches, `x` or `(x, y)`, `y` integer labels or
            probabilities of the classes, of a network with several outputs a tuple or
            dict of which those of the first one count: the accuracy is measured on all
            of it, unless they are no classes. One unit is a binary classifier's: class
            1 above 0, or behind a sigmoid above 0.5. None leaves accuracy and
            activations out.
        path: of the page. A file that is there is replaced when the page is complete.
        batches: how many batches the activations are measured on.
        history: name -> value at each epoch, as `fit(...).history`.
        stages: of the training, as `StagedPrecision` had them.
        exported: what `tf_lowbit.export.to_tflite` returned.
        verified: what `tf_lowbit.export.verify` returned.
        figures: folder where each figure is written besides as a PNG file for print,
            300 dots per inch; made if it is not there.

    Returns:
        The page's path.

    Raises:
        ValueError: if nothing in the model is quantized, it is no single network, a
            value is NaN or infinite, or the dataset is empty, endless or can be read
            once only.
        ImportError: without matplotlib and Jinja (`pip install '.[report]'`).
        FileNotFoundError: if the page's folder is not there.
        OSError: if the page or the folder cannot be written.
    """
    try:
        import jinja2
        import matplotlib as mpl
    except ImportError as error:
        raise ImportError(
            "report needs matplotlib and Jinja: pip install '.[report]'"
        ) from error
    inspection.require_quantized(model)
    path = Path(checks.path("path", path))
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"The page's folder must exist. Received: {str(path.parent)!r}"
        )
    if dataset is not None:
        require_rereadable(dataset)
        require_end(dataset)
    whole = cost(model)
    measured = statistics(model, dataset, batches)
    accuracy, examples = (None, 0) if dataset is None else _accuracy(model, dataset)
    # Text as text, and the same names for the same drawing.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tf_lowbit"}):
        drawn = plots.figures(whole, measured, history, stages)
        pictures = {name: _as_svg(figure) for name, figure in drawn.items()}
        if figures is not None:
            folder = Path(figures)
            folder.mkdir(parents=True, exist_ok=True)
            for name, figure in drawn.items():
                with replaced(folder / f"{name}.png") as picture:
                    figure.savefig(picture, dpi=_DOTS_PER_INCH, facecolor="white")
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("page.html.jinja")
    page = template.render(
        cost=whole,
        accuracy=accuracy,
        examples=examples,
        statistics=measured,
        pictures=[(_TITLES[name], svg) for name, svg in pictures.items()],
        stages=list(stages or []),
        exported=exported and str(exported),
        verified=verified,
        environment=environment(),
    )
    return replace_file(path, page)


def _accuracy(model, dataset) -> tuple[float | None, int]:
    """Top-1 accuracy in percent and the number of examples; None without classes."""
    hits = examples = 0
    limit = predictions.threshold(model)
    forward = tf.function(lambda x: tf.nest.flatten(model(x, training=False))[0])
    for batch in batches_for(model, dataset, None):
        if not isinstance(batch, tuple) or len(batch) < 2:
            return None, 0
        outputs = forward(batch[0]).numpy()
        labels = predictions.labels(batch[1], outputs, model.output_names)
        if labels is None:
            return None, 0
        hits += int((predictions.classes(outputs, limit) == labels).sum())
        examples += len(labels)
    return 100.0 * hits / examples, examples


def _as_svg(figure) -> str:
    """A drawing to be set into a page, whose text has the page's colour."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"#000000\b", "currentColor", text)
    # matplotlib writes no colour for text, which then is black.
    text = text.replace("<text ", '<text fill="currentColor" ')
    # As wide as there is room.
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt" ', "", text, count=1)
