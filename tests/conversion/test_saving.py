"""Every format brings a quantized model back exactly."""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow.core.protobuf import saved_model_pb2
from tf_keras.protobuf import saved_metadata_pb2

from tests.scheme import nets
from tf_lowbit import PrecisionRule, calibrate, load_model, quantize, quantizers
from tf_lowbit.compat import keras, tf
from tf_lowbit.network import inspection

RULES = {
    "dorefa": PrecisionRule(".*", 2, 2),
    "lsq": PrecisionRule(
        ".*", 2, 2, weight_quantizer="lsq", activation_quantizer="lsq", edges=True
    ),
    "per_axis-pact": PrecisionRule(
        ".*",
        3,
        4,
        weight_quantizer=quantizers.LSQWeightQuantizer(per_axis=True),
        activation_quantizer=quantizers.PACTActivationQuantizer(alpha_decay=1e-3),
    ),
    "uniform": PrecisionRule(
        ".*", 4, 4, weight_quantizer="uniform", activation_quantizer="uniform"
    ),
}
FILES = {"keras": "net.keras", "h5": "net.h5", "SavedModel": "net"}
FORMATS = [*FILES, "weights", "checkpoint"]
DATA = Path(__file__).parents[1] / "data"


def build(rule):
    return quantize(nets.chain(l2=1e-3), rule)


@pytest.fixture(scope="module")
def trained():
    """A model for each rule, after a step, with bits that are not the rule's."""
    models = {}
    for name, rule in RULES.items():
        model = build(rule)
        # Momentum: the optimizer has slots to save as well.
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
        nets.train_step(model, nets.images(), nets.labels(), optimizer=optimizer)
        nets.by_name(model)["mid/kernel"].assign_bits(5)
        nets.by_name(model)["relu2/output"].assign_bits(7)
        models[name] = model
    return models


def reload(model, rule, how, folder):
    """Saves the model one way and returns what comes back."""
    if how in FILES:
        model.save(folder / FILES[how])
        return load_model(folder / FILES[how])
    fresh = nets.randomize(build(rule), seed=5)
    if how == "weights":
        model.save_weights(folder / "net.weights.h5")
        fresh.load_weights(folder / "net.weights.h5")
    else:
        path = tf.train.Checkpoint(model=model).write(str(folder / "checkpoint"))
        tf.train.Checkpoint(model=fresh).read(path).assert_existing_objects_matched()
    return fresh


def assert_same(actual, expected):
    assert [w.name for w in actual.weights] == [w.name for w in expected.weights]
    nets.assert_all_equal(actual.get_weights(), expected.get_weights())
    np.testing.assert_array_equal(actual(nets.images()), expected(nets.images()))
    found = {name: (t.quantizer, t.bits) for name, t in nets.by_name(actual).items()}
    assert found == {
        name: (t.quantizer, t.bits) for name, t in nets.by_name(expected).items()
    }


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("name", "how"),
    # A SavedModel takes long to write.
    [(n, h) for n in RULES for h in FORMATS if h != "SavedModel" or "lsq" in n]
    + [("per_axis-pact", "SavedModel")],
)
def test_a_trained_model_comes_back_exactly(name, how, trained, tmp_path):
    model = trained[name]
    assert_same(reload(model, RULES[name], how, tmp_path), model)


@pytest.mark.quick(1)
@pytest.mark.parametrize("how", FILES)
def test_training_goes_on_as_if_it_had_not_stopped(how, trained, tmp_path):
    model = trained["lsq"]
    again = reload(model, RULES["lsq"], how, tmp_path)
    assert again.optimizer.learning_rate == model.optimizer.learning_rate
    first = quantize(nets.chain(l2=1e-3), RULES["lsq"])
    first.set_weights(model.get_weights())
    for each in (first, again):
        each.compile(
            keras.optimizers.SGD(0.1),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            run_eagerly=True,
        )
        nets.train_step(each, nets.images(), nets.labels())
    assert len(again.trainable_variables) == len(first.trainable_variables)
    for a, b in zip(again.get_weights(), first.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("how", FILES)
def test_a_reloaded_model_can_be_inspected_and_saved_again(how, trained, tmp_path):
    model = reload(trained["per_axis-pact"], None, how, tmp_path)
    sources = inspection.input_activations(model)
    assert sources["mid"][0].name == "relu1/output"
    (tmp_path / "second").mkdir()
    assert_same(reload(model, None, how, tmp_path / "second"), model)


@pytest.mark.quick(1)
@pytest.mark.parametrize("frozen_first", [True, False])
def test_frozen_layers_come_back(frozen_first, tmp_path):
    model = nets.perceptron()
    model.get_layer("mid").trainable = not frozen_first
    model = quantize(model, RULES["lsq"])
    model.get_layer("mid").trainable = False
    model.save(tmp_path / "net.h5")
    again = load_model(tmp_path / "net.h5", compile=False)
    assert not again.get_layer("mid").trainable
    data = nets.images(shape=(5,))
    np.testing.assert_array_equal(again(data), model(data))


@pytest.mark.slow
def test_mobilenet_comes_back(tmp_path):
    model = quantize(nets.randomize(nets.mobilenet_like()), RULES["lsq"])
    model.save(tmp_path / "net.h5")
    again = load_model(tmp_path / "net.h5", compile=False)
    nets.assert_all_equal(again.get_weights(), model.get_weights())
    data = nets.images(shape=(16, 16, 3))
    np.testing.assert_array_equal(again(data), model(data))


@pytest.mark.slow
@pytest.mark.parametrize("how", FILES)
def test_residual_quantizers_come_back(how, tmp_path):
    model = nets.randomize(nets.preactivation())
    model = quantize(model, RULES["lsq"], residual_bits=8)
    calibrate(model, [nets.images()])
    nets.by_name(model)["two_add_residual/output"].assign_bits(32)
    again = reload(model, None, how, tmp_path)
    assert_same(again, model)
    found = [t for t in inspection.quantized_tensors(again) if t.is_residual]
    assert len(found) == 6
    assert all(t.is_calibrated for t in found)
    assert [add.name for add in inspection.residual_adds(again)] == [
        add.name for add in inspection.residual_adds(model)
    ]


@pytest.mark.slow
def test_a_fresh_process_loads_without_scopes(trained, tmp_path):
    for how in FILES:
        reload(trained["lsq"], None, how, tmp_path)
    paths = [str(tmp_path / name) for name in FILES.values()]
    np.save(tmp_path / "inputs.npy", nets.images())
    program = (
        "import sys, numpy as np, tf_lowbit\n"
        "folder = sys.argv[1]\n"
        "x = np.load(folder + '/inputs.npy')\n"
        "for i, path in enumerate(sys.argv[2:]):\n"
        "    model = tf_lowbit.load_model(path)\n"
        "    np.save(f'{folder}/outputs{i}.npy', model(x))\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), *paths],
        check=True,
        capture_output=True,
    )
    expected = trained["lsq"](nets.images()).numpy()
    for i in range(len(paths)):
        outputs = np.load(tmp_path / f"outputs{i}.npy")
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["lsq.h5", "lsq.keras", "lsq.weights.h5"])
def test_a_file_of_an_earlier_version_loads(name):
    """`tests/data/README.md` says how they were written."""
    path = DATA / f"version-0.1-{name}"
    if name.endswith(".weights.h5"):
        model = nets.randomize(build(RULES["lsq"]), seed=5)
        model.load_weights(path)
    else:
        model = load_model(path)
    with np.load(DATA / "version-0.1-lsq.npz") as expected:
        for weight in model.weights:
            saved = expected[weight.name.replace("/", "|")]
            np.testing.assert_array_equal(weight, saved)
        outputs = model(expected["images"])
        np.testing.assert_allclose(outputs, expected["outputs"], rtol=1e-4, atol=1e-5)


def test_a_keras_file_needs_no_loader_of_ours(trained, tmp_path):
    trained["lsq"].save(tmp_path / "net.keras")
    assert_same(keras.models.load_model(tmp_path / "net.keras"), trained["lsq"])


def test_an_archive_is_read_from_start_to_end(trained, tmp_path, monkeypatch):
    """Going back within a ZIP is reading it anew."""
    trained["lsq"].save(tmp_path / "net.keras")

    seeks, seek = [], zipfile.ZipExtFile.seek

    def counted(self, *arguments):
        seeks.append(arguments)
        return seek(self, *arguments)

    monkeypatch.setattr(zipfile.ZipExtFile, "seek", counted)
    assert_same(load_model(tmp_path / "net.keras"), trained["lsq"])
    assert not seeks
    # Keras itself is as it was.
    keras.models.load_model(tmp_path / "net.keras")
    assert seeks


@pytest.mark.parametrize("name", ["absent.keras", "absent.h5", "absent"])
def test_a_missing_file_is_an_error(name, tmp_path):
    with pytest.raises(OSError, match="absent"):
        load_model(tmp_path / name)


@pytest.mark.quick(1)
@pytest.mark.parametrize("how", ["keras", "h5"])
def test_a_corrupt_file_is_an_error(how, tmp_path, trained):
    path = tmp_path / FILES[how]
    path.write_bytes(b"no such format")
    with pytest.raises((OSError, ValueError)):
        load_model(path)
    trained["dorefa"].save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises((OSError, ValueError)):
        load_model(path)


WITH_A_FUNCTION = {
    "layer": keras.layers.Lambda,
    "cell": lambda function: keras.layers.RNN(
        tf.nn.RNNCellResidualWrapper(keras.layers.GRUCell(3), residual_fn=function)
    ),
}


@pytest.mark.quick(2)
@pytest.mark.parametrize("kind", WITH_A_FUNCTION)
@pytest.mark.parametrize("name", ["net.keras", "net.h5", "net"])
def test_a_lambda_runs_only_in_files_that_are_trusted(kind, name, tmp_path):
    """What a stranger's lambda does is seen by a file that it writes."""
    mark = str(tmp_path / "ran")
    image = keras.Input((4, 3))
    function = lambda x, more=None: [x * 1.0, open(mark, "a").close()][0]  # noqa: E731
    model = keras.Model(image, WITH_A_FUNCTION[kind](function)(image))
    model.save(tmp_path / name)
    (tmp_path / "ran").unlink()
    if (name, kind) == ("net", "layer"):  # Keras takes the traced graph instead.
        load_model(tmp_path / name)
    else:
        # A SavedModel's layer of cells has no graph that Keras can take.
        reason = "Unable to restore" if name == "net" else "safe_mode=False"
        with pytest.raises(ValueError, match=reason):
            load_model(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_an_archive_that_is_damaged_within_is_a_value_error(trained, tmp_path):
    path = tmp_path / "net.keras"
    trained["dorefa"].save(path)
    content = bytearray(path.read_bytes())
    place = content.index(b"config.json") + 200
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"whole \.keras or \.h5 file.*Received.*net\.keras"
    ):
        load_model(path)


def test_a_keras_file_that_would_fill_the_disk_is_refused(tmp_path):
    path = tmp_path / "net.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.weights.h5", bytes(2**27))
    with pytest.raises(ValueError, match=r"200 times its size.*Received"):
        load_model(path)


@pytest.fixture(scope="module")
def whole_file(trained, tmp_path_factory):
    """A `.keras` file, its content, and the weights that are in it."""
    path = tmp_path_factory.mktemp("whole") / "net.keras"
    trained["lsq"].save(path)
    return path, path.read_bytes(), trained["lsq"].get_weights()


@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(-1, 7))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_a_damaged_keras_file_never_loads_silently_wrong(share, bit, whole_file):
    """A flipped bit, or (-1) the end is missing."""
    path, content, weights = whole_file
    place = int(share * len(content))
    damaged = bytearray(content)
    if bit < 0:
        del damaged[place:]
    else:
        damaged[place] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        loaded = load_model(path)
    except Exception:  # Of zipfile, h5py, JSON or Keras: loud is what counts.
        return
    for value, expected in zip(loaded.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.slow
def test_weights_of_another_network_are_refused(trained, tmp_path):
    trained["lsq"].save_weights(tmp_path / "net.weights.h5")
    other = quantize(nets.chain(width=5), RULES["lsq"])
    with pytest.raises(ValueError):
        other.load_weights(tmp_path / "net.weights.h5")


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["Conv2DTranspose", "SeparableConv2D"])
def test_saved_model_of_layers_with_an_input_spec(kind, tmp_path):
    """Keras traces such a layer by itself, where it knows no quantized weights."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            getattr(keras.layers, kind)(4, 3, name="special"),
            keras.layers.Flatten(),
            keras.layers.Dense(2),
        ]
    )
    model = quantize(model, PrecisionRule("special", 2, None))
    model.save(tmp_path / "saved")
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype("float32")
    np.testing.assert_array_equal(load_model(tmp_path / "saved")(x), model(x))


@pytest.mark.slow
def test_a_quantized_network_within_another_loads_from_hdf5(tmp_path):
    model = keras.Sequential([quantize(nets.chain()), keras.layers.Dense(3)])
    model.save(tmp_path / "model.h5")
    x = np.random.default_rng(0).normal(size=(2, *model.input_shape[1:]))
    np.testing.assert_array_equal(load_model(tmp_path / "model.h5")(x), model(x))


@pytest.mark.quick(1)
@pytest.mark.parametrize("file", ["net.keras", "net.h5"])
def test_the_layers_of_convnext(tmp_path, file):
    """Which Keras alone saves and cannot load; of a SavedModel it cannot trace them."""
    own = sys.modules[keras.applications.ConvNeXtTiny.__module__]
    image = keras.Input(nets.IMAGE)
    x = keras.layers.Conv2D(4, 3, activation="relu", name="stem")(image)
    x = own.StochasticDepth(0.1, name="depth")(own.LayerScale(0.5, 4, name="scale")(x))
    x = keras.layers.Conv2D(4, 3, activation="relu", name="mid")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    model = keras.Model(image, keras.layers.Dense(3, name="head")(x))
    quantized = quantize(nets.randomize(model), RULES["dorefa"])
    quantized.save(tmp_path / file)
    again = load_model(tmp_path / file)
    np.testing.assert_array_equal(again(nets.images()), quantized(nets.images()))


def test_a_saved_model_of_before_tensorflow_2_5(tmp_path):
    """Its layers' settings stand in the graph's own file."""
    x = np.ones((2, 3), np.float32)
    model = keras.Sequential([keras.layers.Dense(2, input_shape=(3,))])
    model.save(tmp_path / "net", save_format="tf")
    graph_file = tmp_path / "net" / "saved_model.pb"
    settings_file = tmp_path / "net" / "keras_metadata.pb"
    graph = saved_model_pb2.SavedModel.FromString(graph_file.read_bytes())
    settings = saved_metadata_pb2.SavedMetadata.FromString(settings_file.read_bytes())
    objects = graph.meta_graphs[0].object_graph_def.nodes
    for node in settings.nodes:
        objects[node.node_id].user_object.identifier = node.identifier
        objects[node.node_id].user_object.metadata = node.metadata
        version = objects[node.node_id].user_object.version
        version.producer = node.version.producer
        version.min_consumer = node.version.min_consumer
    graph_file.write_bytes(graph.SerializeToString())
    settings_file.unlink()
    again = load_model(tmp_path / "net", compile=False)
    assert isinstance(again, keras.Sequential)
    np.testing.assert_array_equal(again(x), model(x))
