"""Every public name, registered once: what kind of thing it is, and how it is made.

A name that is in an `__all__` and not here fails `test_table.py`; a row of a kind runs
through all checks of that kind, so that a new quantizer, callback or trainer has them
by one line.
"""

import dataclasses
from collections.abc import Callable

import tf_lowbit as tfl
from tf_lowbit import quantizers

WEIGHT, ACTIVATION = "weight quantizer", "activation quantizer"
RESIDUAL = "residual quantizer"
QUANTIZERS = (WEIGHT, ACTIVATION, RESIDUAL)
CALLBACK, TRAINER, SETTING = "callback", "trainer", "setting"
# Their own tests say what they do; here they are read for their documentation.
FUNCTION, CLASS, MODULE, CONSTANT = "function", "class", "module", "constant"
KINDS = (*QUANTIZERS, CALLBACK, TRAINER, SETTING, FUNCTION, CLASS, MODULE, CONSTANT)


@dataclasses.dataclass(frozen=True)
class Row:
    """A public name.

    Attributes:
        kind: one of `KINDS`.
        variants: for the kinds that are made: a name of its own -> function that makes
            one. Of a callback, function (folder, batches); of a trainer, function
            (student, teacher).
    """

    kind: str
    variants: dict[str, Callable] = dataclasses.field(default_factory=dict)


STAGES = [tfl.Stage(1, 4, 32), tfl.Stage(1, 2, 2)]
LOSSES = tfl.JointDistillation(hints=["relu_0"])
DRAWS = tfl.StochasticPrecision(seed=5, tail=0.5)

TABLE = {
    # Quantizers.
    "quantizers.DoReFaWeightQuantizer": Row(
        WEIGHT,
        {
            "dorefa": quantizers.DoReFaWeightQuantizer,
            "dorefa_fixed": lambda: quantizers.DoReFaWeightQuantizer(
                max_gradient=False
            ),
        },
    ),
    "quantizers.LSQWeightQuantizer": Row(
        WEIGHT,
        {
            "lsq": quantizers.LSQWeightQuantizer,
            "lsq_standardized": lambda: quantizers.LSQWeightQuantizer(
                standardize=True, initialization="paper", gradient_factor=0.5
            ),
            "lsq_channels": lambda: quantizers.LSQWeightQuantizer(
                per_axis=True, narrow_range=True
            ),
        },
    ),
    "quantizers.UniformWeightQuantizer": Row(
        WEIGHT,
        {
            "uniform": quantizers.UniformWeightQuantizer,
            "uniform_standardized": lambda: quantizers.UniformWeightQuantizer(
                standardize=True
            ),
            "uniform_tensor": lambda: quantizers.UniformWeightQuantizer(per_axis=False),
        },
    ),
    "quantizers.DoReFaActivationQuantizer": Row(
        ACTIVATION, {"dorefa": quantizers.DoReFaActivationQuantizer}
    ),
    "quantizers.LSQActivationQuantizer": Row(
        ACTIVATION, {"lsq": quantizers.LSQActivationQuantizer}
    ),
    "quantizers.PACTActivationQuantizer": Row(
        ACTIVATION, {"pact": quantizers.PACTActivationQuantizer}
    ),
    "quantizers.UniformActivationQuantizer": Row(
        ACTIVATION, {"uniform": quantizers.UniformActivationQuantizer}
    ),
    "quantizers.StatsQWeightQuantizer": Row(
        WEIGHT, {"statsq": quantizers.StatsQWeightQuantizer}
    ),
    "quantizers.ResidualQuantizer": Row(
        RESIDUAL, {"residual": quantizers.ResidualQuantizer}
    ),
    # Callbacks.
    "callbacks.StagedPrecision": Row(
        CALLBACK, {"staged": lambda folder, data: tfl.callbacks.StagedPrecision(STAGES)}
    ),
    "callbacks.Recovery": Row(
        CALLBACK,
        {"recovery": lambda folder, data: tfl.callbacks.Recovery(folder / "saved")},
    ),
    "callbacks.QuantizationMonitor": Row(
        CALLBACK,
        {
            "monitor": lambda folder, data: tfl.callbacks.QuantizationMonitor(
                folder / "logs", data
            )
        },
    ),
    "callbacks.BatchNormReestimation": Row(
        CALLBACK,
        {
            "reestimation": lambda folder, data: tfl.callbacks.BatchNormReestimation(
                data
            )
        },
    ),
    "callbacks.OscillationFreezing": Row(
        CALLBACK,
        {"freezing": lambda folder, data: tfl.callbacks.OscillationFreezing()},
    ),
    # Trainers, and what they are told.
    "LowBitTrainer": Row(
        TRAINER,
        {
            "plain": lambda student, teacher: tfl.LowBitTrainer(student),
            "sampled": lambda student, teacher: tfl.LowBitTrainer(
                student, stochastic_precision=DRAWS
            ),
            "joint": lambda student, teacher: tfl.LowBitTrainer(
                student, teacher, distillation=LOSSES
            ),
            "both": lambda student, teacher: tfl.LowBitTrainer(
                student, teacher, distillation=LOSSES, stochastic_precision=DRAWS
            ),
        },
    ),
    "JointDistillation": Row(SETTING, {"joint": lambda: LOSSES}),
    "StochasticPrecision": Row(SETTING, {"sampled": lambda: DRAWS}),
    "LinearRamp": Row(SETTING, {"ramp": lambda: tfl.LinearRamp(0.25, 0.1)}),
    "PrecisionRule": Row(
        SETTING,
        {
            "rule": lambda: tfl.PrecisionRule(
                "conv.*", 2, 3, quantizers.LSQWeightQuantizer(per_axis=True)
            )
        },
    ),
    "Stage": Row(SETTING, {"stage": lambda: tfl.Stage(3, 4, 32, learning_rate=0.1)}),
    # The rest.
    **dict.fromkeys(
        [
            "allocate_bits",
            "calibrate",
            "cost",
            "from_keras3",
            "load_model",
            "progressive",
            "quantize",
            "recalibrate_batch_norm",
            "register_layer",
            "report",
            "requantize",
            "sensitivity",
            "split_epochs",
            "split_separable",
            "statistics",
            "strip",
            "summary",
            "three_phase",
            "tie_residuals",
            "to_keras3",
            "two_stage",
            "two_stage_progressive",
            "weight_decay_at_bits",
            "export.check",
            "export.compare_qonnx",
            "export.gzip_bytes",
            "export.latencies",
            "export.load_archive",
            "export.read_info",
            "export.save_archive",
            "export.snap",
            "export.to_qonnx",
            "export.to_tflite",
            "export.verify",
            "recipes.low_bit",
            "quantizers.deserialize",
            "quantizers.find",
            "quantizers.get",
            "quantizers.names",
            "quantizers.serialize",
            "models.alexnet",
            "models.get",
            "models.mobilenet_v2",
            "models.names",
            "models.plain_cnn",
            "models.postact_resnet",
            "models.preact_resnet",
            "models.preact_resnet18",
            "models.resnet18",
            "models.resnet50",
            "datasets.load",
            "datasets.names",
        ],
        Row(FUNCTION),
    ),
    **dict.fromkeys(
        [
            "Cost",
            "LowBitScheme",
            "QuantizationWarning",
            "Sensitivity",
            "Summary",
            "TensorStatistics",
            "callbacks.Position",
            "datasets.Dataset",
            "datasets.Normalization",
            "export.Archive",
            "export.ArchivedLayer",
            "export.Check",
            "export.Export",
            "export.ExportError",
            "export.MicroRunner",
            "export.Note",
            "export.Problem",
            "export.QonnxAgreement",
            "export.Report",
            "export.Runner",
            "export.Snapped",
            "export.Target",
            "quantizers.ActivationQuantizer",
            "quantizers.LowBitQuantizer",
            "quantizers.WeightQuantizer",
            "recipes.Recipe",
        ],
        Row(CLASS),
    ),
    **dict.fromkeys(
        ["callbacks", "export", "inspection", "quantizers", "recipes"], Row(MODULE)
    ),
    **dict.fromkeys(
        ["__version__", "export.TARGETS", "quantizers.ACTIVATION", "quantizers.WEIGHT"],
        Row(CONSTANT),
    ),
}


def variants(*kinds: str) -> dict[str, Callable]:
    """Kind and variant -> function that makes one, such as "callback: staged"."""
    return {
        f"{row.kind}: {name}": make
        for row in TABLE.values()
        if row.kind in kinds
        for name, make in row.variants.items()
    }
