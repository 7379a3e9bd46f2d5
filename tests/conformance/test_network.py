"""All registered quantizers in one network, through all that a network goes through.

A branch for each: what is done to the network (traced, compiled by XLA, saved, trained
on replicas) is done once, and each quantizer's branch is looked at by itself.
"""

import functools

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.conformance import table
from tf_lowbit.compat import keras, tf

pytestmark = pytest.mark.slow

layers = keras.layers
BATCH, CLASSES = 8, 3
BRANCHES = table.variants(*table.QUANTIZERS)
NAMES = {case: case.replace(": ", "_").replace(" ", "_") for case in BRANCHES}
TRAINERS = table.variants(table.TRAINER)
CALLBACKS = table.variants(table.CALLBACK)
MOST = "trainer: both"  # With all that a trainer can have.
every_quantizer = pytest.mark.parametrize("case", BRANCHES)


def branch(image, case):
    """A ReLU and a convolution, quantized by the rule of `rules`; or a residual sum."""
    name = NAMES[case]
    x = layers.ReLU(name=f"relu_{name}")(image)
    x = y = layers.Conv2D(2, 3, padding="same", name=f"conv_{name}")(x)
    if case.startswith(table.RESIDUAL):
        x = layers.ReLU(name=f"relu2_{name}")(x)
        x = layers.Conv2D(2, 1, name=f"conv2_{name}")(x)
        x = layers.Add(name=f"add_{name}")([x, y])
        x = layers.ReLU(name=f"relu3_{name}")(x)
        x = layers.Conv2D(2, 1, name=f"conv3_{name}")(x)
    x = layers.GlobalAveragePooling2D(name=f"pool_{name}")(x)
    return layers.Dense(CLASSES, name=f"head_{name}")(x)


def rules():
    found = []
    for case, make in BRANCHES.items():
        weights = make() if case.startswith(table.WEIGHT) else "dorefa"
        activations = make() if case.startswith(table.ACTIVATION) else "dorefa"
        found.append(
            tfl.PrecisionRule(f"conv.*_{NAMES[case]}", 2, 2, weights, activations)
        )
    return found


def images(count=BATCH):
    rng = np.random.default_rng(1)
    return rng.normal(0.5, 0.5, (count, 6, 6, 2)).astype(np.float32)


def labels(count=BATCH):
    return np.random.default_rng(2).integers(0, CLASSES, count)


def made():
    """Float weights, ranges and all are the same whenever it is made."""
    keras.utils.set_random_seed(7)
    image = keras.Input((6, 6, 2), name="image")
    model = keras.Model(image, [branch(image, case) for case in BRANCHES])
    model = tfl.quantize(model, rules(), residual_bits=8)
    tfl.calibrate(model, [images()])
    return model


@functools.cache
def shared():
    """For what does not change it."""
    return made()


def network():
    """A copy of it: quicker than quantizing again."""
    model = shared()
    copy = type(model).from_config(model.get_config())
    copy.set_weights(model.get_weights())
    return copy


def compiled(model, **options):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss, **options)
    return model


def tensors_of(model, case):
    """The quantizers of a branch; of a residual branch the residual ones."""
    found = [
        t for t in tfl.inspection.quantized_tensors(model) if NAMES[case] in t.name
    ]
    if case.startswith(table.RESIDUAL):
        return [t for t in found if t.is_residual]
    role = "weight" if case.startswith(table.WEIGHT) else "activation"
    return [t for t in found if t.role == role]


@functools.cache
def outputs(how):
    """What the network, or what it has become, puts out for all branches."""
    model, x = shared(), tf.constant(images())
    if how == "eager":
        found = model(x)
    elif how == "traced":
        found = tf.function(model)(x)
    elif how == "xla":
        found = tf.function(model, jit_compile=True)(x)
    return dict(zip(BRANCHES, [y.numpy() for y in found], strict=True))


@every_quantizer
def test_the_quantizer_is_where_the_rule_says(case):
    found = tensors_of(shared(), case)
    assert found
    expected = BRANCHES[case]()
    for tensor in found:
        assert type(tensor.quantizer) is type(expected)
        assert tensor.is_calibrated
        assert tensor.bits == (8 if tensor.is_residual else 2)


@every_quantizer
def test_values_in_the_network_are_levels(case):
    model = shared()
    for tensor in tensors_of(model, case):
        step = np.asarray(tensor.quantizer.step(tensor.latent, tensor.variables))
        if tensor.latent is None:
            seen = keras.Model(model.input, tensor.layer.output)
            values = seen(images()).numpy()
        else:
            values = tensor.quantized().numpy()
        codes = values / step
        np.testing.assert_allclose(codes, np.rint(codes), atol=1e-4)
        levels = tensor.quantizer.level_codes(tensor.bits)
        assert set(np.rint(codes).astype(int).ravel()) <= set(levels)
        assert len(np.unique(np.rint(codes))) > 1


@pytest.mark.parametrize("how", ["traced", "xla"])
@every_quantizer
def test_a_compiled_network_puts_out_the_same(case, how):
    np.testing.assert_allclose(
        outputs(how)[case], outputs("eager")[case], rtol=1e-4, atol=1e-5
    )


# --- files


@pytest.fixture(scope="module")
def from_files(tmp_path_factory):
    """Outputs of the network from a file of each kind, and the networks."""
    folder = tmp_path_factory.mktemp("files")
    model, found = shared(), {}
    for name in ("net.keras", "saved"):
        model.save(folder / name)
        again = tfl.load_model(folder / name)
        found[name] = again, dict(zip(BRANCHES, again(images()), strict=True))
    serving = tf.saved_model.load(str(folder / "saved"))
    results = serving.signatures["serving_default"](tf.constant(images()))
    names = [f"head_{NAMES[case]}" for case in BRANCHES]
    values = [results[name] for name in names]
    found["served"] = None, dict(zip(BRANCHES, values, strict=True))
    return found


@pytest.mark.parametrize("kind", ["net.keras", "saved", "served"])
@every_quantizer
def test_a_file_brings_the_quantizer_back(case, kind, from_files):
    model, found = from_files[kind]
    np.testing.assert_allclose(found[case], outputs("eager")[case], rtol=1e-6)
    if model is None:
        return
    pairs = zip(tensors_of(model, case), tensors_of(shared(), case), strict=True)
    for tensor, expected in pairs:
        assert tensor.quantizer == expected.quantizer
        assert tensor.variables.keys() == expected.variables.keys()
        for name, variable in tensor.variables.items():
            np.testing.assert_array_equal(variable, expected.variables[name])
            assert variable.trainable == expected.variables[name].trainable


@every_quantizer
def test_the_quantizer_is_data_and_back(case):
    quantizer = BRANCHES[case]()
    data = tfl.quantizers.serialize(quantizer)
    assert tfl.quantizers.deserialize(data) == quantizer


# --- training


def train(model, steps=2, bits=None):
    for step in range(steps):
        if bits is not None:
            for tensor in tfl.inspection.quantized_tensors(model):
                if not tensor.is_residual:
                    tensor.assign_bits(bits[step])
        model.train_on_batch(images(), [labels()] * len(BRANCHES))
    return model


def traces(model):
    return model.train_function.experimental_get_tracing_count()


@pytest.fixture(scope="module")
def trained():
    """Before and after steps at 4, 2 and 1 bits, and how often it was traced."""
    model = compiled(network())
    before = {v.name: v.numpy() for v in model.trainable_variables}
    train(model, 1, bits=(4,))
    counts = [traces(model)]
    train(model, 2, bits=(2, 1))
    return model, before, [*counts, traces(model)]


@every_quantizer
def test_gradients_reach_weights_and_ranges(case, trained):
    model, before, _ = trained
    for tensor in tensors_of(model, case):
        learned = [v for v in tensor.variables.values() if v.trainable]
        for variable in [*learned, tensor.latent]:
            if variable is not None:
                after = variable.numpy()
                assert np.isfinite(after).all()
                assert not np.array_equal(after, before[variable.name]), variable.name


def test_a_change_of_bits_is_not_traced_anew(trained):
    model, _, counts = trained
    assert counts[1] == counts[0]
    assert {t.bits for t in tfl.inspection.quantized_tensors(model)} == {1, 8}


@pytest.fixture(scope="module")
def on_devices(mirrored):
    """The same two steps on one device and on two."""
    found = []
    for replicas in (1, 2):
        with mirrored(replicas).scope():
            found.append(train(compiled(network())))
    return found


@every_quantizer
def test_two_replicas_train_as_one_device_does(case, on_devices):
    one, two = (
        [v for t in tensors_of(model, case) for v in (*t.variables.values(), t.latent)]
        for model in on_devices
    )
    assert one
    for variable, other in zip(one, two, strict=True):
        if variable is not None:
            np.testing.assert_allclose(
                other, variable, rtol=1e-4, atol=1e-5, err_msg=variable.name
            )


@pytest.fixture(scope="module")
def in_bfloat16():
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = compiled(made())
        train(model)
        yield model
    finally:
        keras.mixed_precision.set_global_policy("float32")


@every_quantizer
def test_mixed_precision_keeps_grids_in_float32(case, in_bfloat16):
    for tensor in tensors_of(in_bfloat16, case):
        assert tensor.layer.compute_dtype == "bfloat16"
        for name, variable in tensor.variables.items():
            assert variable.dtype in (tf.int32, tf.float32), name
            assert np.isfinite(variable).all()
        if tensor.latent is not None:
            codes = tensor.codes().numpy()
            assert set(codes.ravel()) <= set(tensor.quantizer.level_codes(2))
            assert tensor.latent.numpy().dtype == np.float32


# --- trainers and callbacks


def small(name):
    keras.utils.set_random_seed(3)
    x = image = keras.Input((6, 6, 2), name="image")
    for i in range(2):
        x = layers.Conv2D(3, 3, name=f"conv_{i}")(x)
        x = layers.ReLU(name=f"relu_{i}")(x)
    x = layers.Dense(CLASSES, name="head")(layers.Flatten(name="flat")(x))
    return keras.Model(image, x, name=name)


def trainer_of(case="trainer: plain", **options):
    rule = tfl.PrecisionRule(".*", 2, 2, "lsq", "lsq", edges=True)
    trainer = TRAINERS[case](tfl.quantize(small("student"), rule), small("teacher"))
    tfl.calibrate(trainer, batches())
    if trainer.teacher is not None:
        options["teacher_optimizer"] = keras.optimizers.SGD(0.1)
    return compiled(trainer, metrics=["accuracy"], **options)


def batches():
    return tf.data.Dataset.from_tensor_slices((images(16), labels(16))).batch(BATCH)


def values_of(model):
    return {f"{i} {v.name}": v.numpy() for i, v in enumerate(model.trainable_variables)}


@pytest.mark.parametrize(
    ("case", "jit_compile"), [*((c, False) for c in TRAINERS), (MOST, True)]
)
def test_a_trainer_moves_all_it_trains_and_is_traced_once(case, jit_compile):
    trainer = trainer_of(case, jit_compile=jit_compile)
    before, counts = values_of(trainer), set()
    for bits in (4, 2, 32):
        for tensor in tfl.inspection.quantized_tensors(trainer):
            tensor.assign_bits(bits)
        history = trainer.fit(batches(), verbose=0).history
        assert all(np.isfinite(v).all() for v in history.values())
        counts.add(traces(trainer))
    for name, value in values_of(trainer).items():
        assert not np.array_equal(value, before[name]), name
    assert len(counts) == 1


def test_a_trainer_comes_back_from_its_file_and_goes_on_alike(tmp_path):
    trainer = trainer_of(MOST)
    trainer.fit(batches(), verbose=0)
    trainer.save(tmp_path / "trainer.keras")
    again = tfl.load_model(tmp_path / "trainer.keras")
    for model in (trainer, again):
        model.fit(batches(), verbose=0)
    expected, found = values_of(trainer), values_of(again)
    for value, other in zip(expected.values(), found.values(), strict=True):
        np.testing.assert_array_equal(value, other)


@pytest.mark.parametrize("case", CALLBACKS)
def test_a_callback_serves_networks_and_trainers(case, tmp_path):
    for name, model in {
        "network": compiled(tfl.quantize(small("net"), None)),
        "trainer": trainer_of(),
    }.items():
        callback = CALLBACKS[case](tmp_path / name, batches())
        counts = set()
        count = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda *_, model=model, counts=counts: counts.add(
                traces(model)
            )
        )
        before = values_of(model)
        model.fit(batches(), epochs=2, callbacks=[count, callback], verbose=0)
        assert len(counts) == 1
        for key, value in values_of(model).items():
            assert not np.array_equal(value, before[key]), key
