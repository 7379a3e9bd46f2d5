"""What TensorBoard is told."""

import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator

import tf_lowbit as tfl
from tests.scheme import nets
from tf_lowbit.compat import keras, tf

RULE = tfl.PrecisionRule(".*", 2, 2)


def compiled(model, **options):
    model.compile(
        keras.optimizers.SGD(0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        run_eagerly=True,
        **options,
    )
    return model


def fit(model, *callbacks, epochs=2):
    return model.fit(
        nets.images(8),
        nets.labels(8),
        batch_size=4,
        epochs=epochs,
        verbose=0,
        callbacks=list(callbacks),
    )


def written(folder):
    """Tag -> step -> value; and tags of histograms."""
    found = event_accumulator.EventAccumulator(
        str(folder / "quantization"), size_guidance={"tensors": 0}
    ).Reload()
    tags = found.Tags()["tensors"]
    return {
        tag: {e.step: tf.make_ndarray(e.tensor_proto) for e in found.Tensors(tag)}
        for tag in tags
    }


def test_every_tensor_and_every_part_of_the_loss(tmp_path):
    student = tfl.quantize(nets.randomize(nets.chain()), RULE)
    trainer = tfl.LowBitTrainer(
        student,
        nets.chain(),
        stochastic_precision=tfl.StochasticPrecision(start=0.5),
    )
    compiled(trainer, teacher_optimizer=keras.optimizers.SGD(0.1))
    data = [nets.images()]
    stages = [tfl.Stage(1, 4, 4), tfl.Stage(1, 2, 2)]
    history = fit(
        trainer,
        tfl.callbacks.StagedPrecision(stages),
        tfl.callbacks.OscillationFreezing(),
        tfl.callbacks.QuantizationMonitor(tmp_path, data),
    ).history
    found = written(tmp_path)
    for tensor in tfl.statistics(student, data):
        for what in ("bits", "step", "sqnr", "clip_rate", "entropy"):
            steps = found[f"{what}/{tensor.name}"]
            assert set(steps) == {0, 1}
            np.testing.assert_allclose(steps[1], getattr(tensor, what), rtol=1e-6)
        for what in ("oscillating", "frozen"):
            assert (f"{what}/{tensor.name}" in found) == (tensor.role == "weight")
        assert list(found[f"bits/{tensor.name}"].values()) == [4, 2]
        # The histogram's buckets: left, right, count.
        counts = found[f"levels/{tensor.name}"][1][:, 2]
        np.testing.assert_allclose(
            counts[counts > 0] / 1000,
            [share for share in tensor.occupancy if share >= 5e-4],
            atol=1e-3,
        )
    measured = tfl.statistics(student, data)
    for what, expected in (
        ("sqnr", np.mean([tensor.sqnr for tensor in measured])),
        ("lowest_sqnr", min(tensor.sqnr for tensor in measured)),
        ("clip_rate", np.mean([tensor.clip_rate for tensor in measured])),
    ):
        np.testing.assert_allclose(found[f"overview/{what}"][1], expected, rtol=1e-6)
    # Codes of 4 bits are not compared with those of 2.
    assert "overview/changed_codes" not in found
    for name, values in history.items():
        logged = found[f"training/{name}"]
        np.testing.assert_allclose([logged[0], logged[1]], values, rtol=1e-6)
    assert {
        "training/distillation_loss",
        "training/quantized_share",
        "training/teacher_loss",
        "training/weight_bits",
    } <= set(found)


def test_the_share_of_weights_whose_codes_have_changed(tmp_path):
    model = compiled(tfl.quantize(nets.randomize(nets.chain()), RULE))
    weights = [t for t in tfl.inspection.quantized_tensors(model) if t.role == "weight"]
    seen = []

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            codes = [t.quantizer.codes(t.latent, t.variables) for t in weights]
            seen.append(np.concatenate([np.ravel(own) for own in codes]))

    fit(model, Look(), tfl.callbacks.QuantizationMonitor(tmp_path), epochs=3)
    found = written(tmp_path)["overview/changed_codes"]
    assert set(found) == {1, 2}
    for epoch in (1, 2):
        changed = np.mean(seen[epoch] != seen[epoch - 1])
        np.testing.assert_allclose(found[epoch], changed, rtol=1e-6)
    assert max(found.values()) > 0


def test_weights_alone_every_other_epoch(tmp_path):
    model = compiled(tfl.quantize(nets.randomize(nets.chain()), RULE))
    monitor = tfl.callbacks.QuantizationMonitor(tmp_path, every=2)
    fit(model, monitor, epochs=3)
    found = written(tmp_path)
    assert set(found["training/loss"]) == {0, 1, 2}
    assert set(found["sqnr/mid/kernel"]) == {1}
    assert not any("output" in tag for tag in found)


def test_several_students_are_told_apart(tmp_path):
    students = {
        name: tfl.quantize(nets.randomize(nets.chain()), RULE) for name in ("a", "b")
    }
    trainer = compiled(tfl.LowBitTrainer(students))
    assert trainer.student_names == ["a", "b"]
    fit(trainer, tfl.callbacks.QuantizationMonitor(tmp_path), epochs=1)
    tags = set(written(tmp_path))
    assert {"a/sqnr/mid/kernel", "b/sqnr/mid/kernel"} <= tags
    assert {"a/overview/sqnr", "b/overview/sqnr"} <= tags


def test_values_that_are_not_finite_are_left_out_and_end_no_training(tmp_path):
    model = compiled(tfl.quantize(nets.randomize(nets.chain()), RULE))
    data = [np.full_like(nets.images(), np.nan)]

    class Mend(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                data[:] = [nets.images()]

    monitor = tfl.callbacks.QuantizationMonitor(tmp_path, data)
    with pytest.warns(UserWarning, match=r"not written in this epoch: .* NaN"):
        fit(model, monitor, Mend())
    found = written(tmp_path)
    assert set(found["training/loss"]) == {0, 1}
    assert set(found["bits/mid/kernel"]) == set(found["bits/relu1/output"]) == {1}


@pytest.mark.slow
def test_other_errors_of_a_measurement_are_not_swallowed(tmp_path):
    model = compiled(tfl.quantize(nets.randomize(nets.chain()), RULE))
    with pytest.raises(ValueError, match="at least one batch"):
        fit(model, tfl.callbacks.QuantizationMonitor(tmp_path, []))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be an integer of at least 1. Received: every=0"),
        (
            {"batches": 0},
            "batches must be an integer of at least 1. Received: .*0",
        ),
        ({"dataset": (nets.images(), nets.labels())}, "iterable of batches.*tuple"),
        ({"dataset": iter([nets.images()])}, "once. Received: list_iterator"),
        ({"dataset": iter(tf.data.Dataset.range(3))}, "once. Received: OwnedIterator"),
        ({"dataset": (x for x in [nets.images()])}, "once. Received: generator"),
    ],
    ids=["every", "batches", "arrays", "iterator", "tf.data iterator", "generator"],
)
def test_refuses_before_training_what_it_cannot_read(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        tfl.callbacks.QuantizationMonitor(tmp_path, **options)


@pytest.mark.slow
def test_what_cannot_be_watched(tmp_path):
    with pytest.raises(ValueError, match="nothing is quantized"):
        fit(compiled(nets.chain()), tfl.callbacks.QuantizationMonitor(tmp_path))
