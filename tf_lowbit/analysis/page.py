"""`report`: a self-contained HTML page about a low-bitwidth network."""

import dataclasses
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tf_lowbit.analysis import plots
from tf_lowbit.analysis.cost import cost
from tf_lowbit.analysis.environment import environment
from tf_lowbit.compat import is_keras3, keras, tf
from tf_lowbit.core import checks
from tf_lowbit.core.files import replace_file, replaced
from tf_lowbit.export import Export, Report
from tf_lowbit.network import inspection, output_names, predictions
from tf_lowbit.network.keras3 import from_keras3
from tf_lowbit.network.observation import batches_for, require_end, require_rereadable
from tf_lowbit.network.tensor_statistics import statistics
from tf_lowbit.training.stages import Stage

_TITLES = {
    "bit_map": "Bit map: the layers' bytes and bits",
    "operations": "Operations of the layers",
    "confusion": "True against predicted classes",
    "sqnr": "Ratio of signal to quantization noise (SQNR) of the tensors",
    "weight_levels": "Weights over their levels, in steps",
    "activation_levels": "Activations over their levels, in steps",
    "stages": "Stages",
    "history": "Training",
}
_DOTS_PER_INCH = 300


def report(
    model: keras.Model,
    dataset: Iterable[Any] | None = None,
    path: str | os.PathLike[str] = "report.html",
    *,
    batches: int = 4,
    history: Mapping | None = None,
    stages: Sequence[Stage] | None = None,
    exported: Export | None = None,
    verified: Report | None = None,
    float_model: keras.Model | None = None,
    figures: str | os.PathLike[str] | None = None,
) -> Path:
    """Writes a page about a low-bitwidth network as one self-contained HTML file.

    It shows, as far as the arguments allow: accuracy, size and operations of the
    network and of each layer, beside those of the float network; the confusion of up to
    20 classes; histograms of weights and activations over their levels; stages and
    curves of the training; and the results of an export and its verification. Figures
    show values under the mouse. The page follows the reader's light or dark setting.

    Args:
        model: Quantized model, or a `LowBitTrainer` of one student.
        dataset: Finite iterable of batches, `x` or `(x, y)`; `y` are integer labels or
            probabilities of the classes. For several outputs `y` is a tuple or dict, of
            which the first output's counts. If labels are classes, the accuracy is
            measured on the whole dataset. One unit is a binary classifier: class 1 is
            above 0, or above 0.5 behind a sigmoid. None skips accuracy and activations.
        path: Path of the page. An existing file is replaced once the page is complete.
        batches: Number of batches to measure activations on.
        history: Name -> value at each epoch, as `fit(...).history`.
        stages: Stages of the training, as for `StagedPrecision`.
        exported: Result of `tf_lowbit.export.to_tflite`.
        verified: Result of `tf_lowbit.export.verify`.
        float_model: The network before `quantize`, of `tf_keras` or Keras 3, for
            comparison.
        figures: Folder for each figure as a PNG file, 300 dots per inch; created if
            missing.

    Returns:
        The page's path.

    Raises:
        ValueError: If nothing in the model is quantized, a trainer has several
            students, a value is NaN or infinite, or the dataset is empty, endless or
            can be read only once.
        ImportError: Without matplotlib and Jinja (`pip install '.[report]'`).
        FileNotFoundError: If the page's folder does not exist.
        OSError: If the page or the folder cannot be written.
    """
    try:
        import jinja2
        import matplotlib as mpl
    except ImportError as error:
        raise ImportError(
            "report needs matplotlib and Jinja: pip install '.[report]'"
        ) from error
    inspection.require_quantized(model)
    model = inspection.single_network(model)
    path = Path(checks.path("path", path))
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"The page's folder must exist. Received: {str(path.parent)!r}"
        )
    if dataset is not None:
        require_rereadable(dataset)
        require_end(dataset)
    if is_keras3(float_model):
        float_model = from_keras3(float_model)
    _check_parts(history, stages, exported, verified, float_model)
    if figures is not None:
        figures = checks.path("figures", figures)
    whole = cost(model)
    measured = statistics(model, dataset, batches)
    found = None if dataset is None else _accuracy(model, dataset)
    confusion = None if found is None else found.confusion
    baseline = None
    if found is not None and float_model is not None:
        baseline = _accuracy(float_model, dataset)
    # SVG with text as text and reproducible ids.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tf_lowbit"}):
        drawn = plots.figures(whole, measured, confusion, history, stages)
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
        kernels=[layer for layer in whole.layers if layer.weight_bits],
        others=[layer for layer in whole.layers if not layer.weight_bits],
        found=found,
        baseline=baseline,
        file_bytes=exported.size if exported else verified and verified.size,
        statistics=measured,
        palette=plots.PALETTE,
        pictures=[(_TITLES[name], svg) for name, svg in pictures.items()],
        stages=list(stages or []),
        exported=exported and str(exported),
        verified=verified,
        environment=environment(),
    )
    return replace_file(path, page)


def _check_parts(history, stages, exported, verified, float_model) -> None:
    """Refuses what is not what the functions that make these return."""
    for name, value, kind in (
        ("history", history, Mapping),
        ("stages", stages, Sequence),
        ("exported", exported, Export),
        ("verified", verified, Report),
        ("float_model", float_model, keras.Model),
    ):
        if value is not None:
            checks.instance(name, value, kind)
    for stage in stages or ():
        checks.instance("stages", stage, Stage, remedy="a list of them")


@dataclasses.dataclass(frozen=True)
class _Accuracy:
    """Predictions against labels.

    Attributes:
        percent: Top-1 accuracy.
        examples: Number of examples.
        confusion: int64 [classes, classes], rows are true classes; None for too many
            classes.
    """

    percent: float
    examples: int
    confusion: np.ndarray | None


def _accuracy(model, dataset) -> _Accuracy | None:
    """The accuracy on the whole dataset; None if labels are missing or not classes."""
    hits = examples = 0
    limit = predictions.threshold(model)
    end = model.outputs[0]
    classes = max(predictions.class_count(end) or 0, 2)
    confusion = None
    if classes <= plots.MOST_CLASSES:
        confusion = np.zeros((classes, classes), np.int64)
    forward = tf.function(lambda x: tf.nest.flatten(model(x, training=False))[0])
    for batch in batches_for(model, dataset, None):
        if not isinstance(batch, tuple) or len(batch) < 2:
            return None
        outputs = forward(batch[0]).numpy()
        outputs = predictions.scores(model.outputs[0], outputs)
        labels = predictions.labels(batch[1], outputs, output_names.of_labels(model))
        if labels is None:
            return None
        predicted = predictions.classes(outputs, limit)
        hits += int((predicted == labels).sum())
        examples += len(labels)
        if confusion is not None:
            np.add.at(confusion, (labels, predicted), 1)
    return _Accuracy(100.0 * hits / examples, examples, confusion)


def _as_svg(figure) -> str:
    """A figure as SVG for the page, with the page's colors and with tips."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"#000000\b", "currentColor", text)
    # matplotlib gives text no color, which would make it black.
    text = text.replace("<text ", '<text fill="currentColor" ')
    for name, (light, _) in plots.PALETTE.items():
        text = text.replace(light, f"var(--{name})")
    text = re.sub(rf'<g id="{plots.TIP}([^"]*)">', r"<g><title>\1</title>", text)
    # Without a size, it fills the width of the page.
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt" ', "", text, count=1)
