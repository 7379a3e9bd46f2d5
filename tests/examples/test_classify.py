import re

import numpy as np
import pytest
from PIL import Image

import tf_lowbit as tfl
from examples import experiment
from tests.examples import programs
from tf_lowbit import datasets
from tf_lowbit.compat import keras, tf

LIMIT = 50
# Of each kind of mistake one: the arguments, and what the message must hold.
BAD = {
    "nothing": ([], r"^UsageError: Give a \.tflite file.*Received: \[\]"),
    "no images": (["net.tflite"], r"^UsageError: Give .*Received: \['net\.tflite'\]"),
    "images and data": (
        ["net.tflite", "digit.png", "--dataset=digits"],
        r"^UsageError: Give .*'digit\.png'",
    ),
    "missing file": (["nope.tflite", "digit.png"], r"^FileNotFound.*'nope\.tflite'"),
    "another format": (
        ["notes.txt", "digit.png"],
        r"^ValueError: The file must be a TFLite file\. Received: 'notes\.txt'",
    ),
    "torn file": (
        ["torn.tflite", "digit.png"],
        r"^ValueError: The file must be whole\. Received: 'torn\.tflite'",
    ),
    "grey of no known range": (
        ["net.tflite", "float.tif"],
        r"^ValueError: A picture must have 8 or 16 bits .*'float\.tif' of mode 'F'",
    ),
    "missing image": (["net.tflite", "nope.png"], r"^FileNotFoundError: .*'nope\.png'"),
    "no image": (["net.tflite", "notes.txt"], r"^UnidentifiedImage.*'notes\.txt'"),
    "two channels": (
        ["two.tflite", "digit.png"],
        r"^ValueError: The file must take images of 1 or 3 .*Received: .*\(8, 8, 2\)",
    ),
    "no image file": (
        ["flat.tflite", "digit.png"],
        r"^ValueError: The file must take images .*Received: .*\(64,\)",
    ),
    "classes, no scores": (
        ["chosen.tflite", "digit.png"],
        r"^ValueError: The file must put out a score .*'chosen\.tflite'.* int64",
    ),
    "threads": (["net.tflite", "digit.png", "--threads=0"], r"--threads=0: .*positive"),
    "top": (["net.tflite", "digit.png", "--top=0"], r"--top=0: .*positive"),
    "dataset": (
        ["net.tflite", "--dataset=nope"],
        r"^ValueError: The name of a data set must .*Received: 'nope'",
    ),
    "other images": (
        ["two.tflite", "--dataset=digits"],
        r"^ValueError: The images of digits are \(8, 8, 1\).*Received: .*\(8, 8, 2\)",
    ),
    "limit": (["net.tflite", "--dataset=digits", "--limit=0"], r"Received: limit=0"),
    "idle limit": (
        ["net.tflite", "digit.png", "--limit=3"],
        r"must have an effect.*--limit without --dataset",
    ),
    "idle top": (
        ["net.tflite", "--dataset=digits", "--top=1"],
        r"must have an effect.*--top with --dataset",
    ),
}


def float_file(shape, end=lambda x: x):
    """A file of TensorFlow's converter: it says nothing of pixels."""
    layers = keras.layers
    image = keras.Input(shape)
    logits = layers.Dense(10)(layers.Flatten()(image))
    return experiment.float_tflite(keras.Model(image, end(logits)))


@pytest.fixture(scope="module")
def digits():
    """The test part: inputs and labels."""
    data = datasets.load("digits", batch_size=LIMIT, limit=LIMIT)
    ((images, labels),) = data.test.as_numpy_iterator()
    return images, labels, data.normalization


@pytest.fixture(scope="module")
def exported(trained_for_deployment, tmp_path_factory):
    """A trained network's file and what the export found, by the type of its input."""
    _, run = trained_for_deployment
    model = tfl.load_model(run / "quantized" / "model.keras", compile=False)
    data = datasets.load("digits", batch_size=LIMIT, limit=LIMIT)
    info = experiment.deployment_info(data)
    folder = tmp_path_factory.mktemp("exported")
    float_input = tfl.export.to_tflite(
        model, folder / "float32.tflite", info=info, verbose=0
    )
    # With names for the classes.
    names = {"classes": [f"digit {c}" for c in range(10)]}
    tfl.export.to_tflite(
        model,
        folder / "int8.tflite",
        input_type="int8",
        info=info | names,
        verbose=0,
    )
    tfl.export.to_tflite(
        model,
        folder / "logits.tflite",
        data.test,
        output_type="int8",
        info=info,
        verbose=0,
    )
    ((images, labels),) = data.test.as_numpy_iterator()
    classes = float_input.twin(images, training=False).numpy().argmax(-1)
    return folder, int((classes == labels).sum())


@pytest.fixture(scope="module")
def runs(exported, digits, tmp_path_factory):
    """Runs of the program: from name to exit code, error and output; the folder.

    First pictures, then data sets: what the program imports for a picture counts.
    """
    files, _ = exported
    folder = tmp_path_factory.mktemp("runs")
    content = (files / "float32.tflite").read_bytes()
    for name, data in {
        "net.tflite": content,
        "codes.tflite": (files / "int8.tflite").read_bytes(),
        "logits.tflite": (files / "logits.tflite").read_bytes(),
        "torn.tflite": content[: len(content) // 2],
        "foreign.tflite": float_file((8, 8, 1)),
        "two.tflite": float_file((8, 8, 2)),
        "flat.tflite": float_file((64,)),
        "chosen.tflite": float_file((8, 8, 1), lambda x: tf.argmax(x, axis=-1)),
        "notes.txt": b"No picture, and no network.",
    }.items():
        (folder / name).write_bytes(data)
    images, _, normalization = digits
    pixels = images[0, ..., 0] * normalization.deviation[0] + normalization.mean[0]
    picture = Image.fromarray(np.rint(pixels * 255).astype(np.uint8))
    picture.save(folder / "digit.png")
    picture.convert("RGB").save(folder / "colour.png")
    picture.resize((16, 24)).save(folder / "large.png")
    picture.convert("F").save(folder / "float.tif")
    # As near to the 8-bit picture as to be it, when rounded.
    noise = np.random.RandomState(0).randint(-128, 129, (8, 8))
    deep = np.clip(257 * np.asarray(picture, int) + noise, 0, 65535).astype(np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    pictures = {
        "pictures": ["net.tflite", "digit.png", "colour.png", "large.png"],
        "one class": ["net.tflite", "digit.png", "--top=1"],
        "all classes": ["net.tflite", "digit.png", "--top=99"],
        "codes": ["codes.tflite", "digit.png", "--threads=2"],
        "logits": ["logits.tflite", "digit.png"],
        "foreign": ["foreign.tflite", "digit.png"],
        "16 bits": ["net.tflite", "deep.png"],
    }
    data = {
        f"data, {name}": [
            *(f"{name}.tflite", "--dataset=digits", f"--limit={LIMIT}"),
            # Without a folder: the default, as with train.py.
            *("--batch_size=16", "--data_dir="),
        ]
        for name in ("net", "codes", "foreign")
    }
    bad = {name: arguments for name, (arguments, _) in BAD.items()}

    def run(cases):
        return programs.run_each(
            "classify", {name: (folder, each) for name, each in cases.items()}
        )

    found, has_imported = run(pictures)
    assert not has_imported, "for pictures LiteRT must do"
    found |= run(data | bad)[0]

    def of(name):
        code, error, shown = found[name]
        if name not in BAD:
            assert (code, error) == (0, "")
        return code, error, shown

    return of, folder


def expected(path, picture, normalization=None, top=3):
    """The line of a picture: computed another way."""
    with Image.open(picture) as image:
        pixels = np.asarray(image, np.float64)[np.newaxis, ..., np.newaxis] / 255
    if normalization is not None:
        pixels = (pixels - normalization.mean) / normalization.deviation
    runner = tfl.export.Runner(path.read_bytes())
    (logits,) = runner(pixels.astype(np.float32)).values()
    if logits.dtype == np.int8:
        scale, zero_point = runner.outputs[0]["quantization"]
        logits = scale * (logits.astype(np.float64) - zero_point)
    exponents = np.exp(logits[0].astype(np.float64))
    shares = 100 * exponents / exponents.sum()
    best = sorted(range(10), key=lambda c: -shares[c])[:top]
    return f"{picture.name}: {', '.join(f'{c} {shares[c]:.1f} %' for c in best)}\n"


def test_prints_the_likeliest_classes_of_a_picture(runs, digits):
    of, folder = runs
    *_, normalization = digits
    _, _, shown = of("pictures")
    line = expected(folder / "net.tflite", folder / "digit.png", normalization)
    first, second, note, third = shown.splitlines(keepends=True)
    assert first == line
    assert second == line.replace("digit.png", "colour.png")
    assert note == "large.png: resized from 16x24\n"
    assert re.fullmatch(r"large\.png: (\d \d+\.\d %(, )?){3}\n", third)


def test_a_picture_of_16_bits_is_scaled_to_8(runs, digits):
    of, folder = runs
    *_, normalization = digits
    line = expected(folder / "net.tflite", folder / "digit.png", normalization)
    assert of("16 bits")[2] == line.replace("digit.png", "deep.png")


@pytest.mark.parametrize(("name", "top"), [("one class", 1), ("all classes", 10)])
def test_prints_as_many_classes_as_asked_for(runs, digits, name, top):
    of, folder = runs
    *_, normalization = digits
    path = folder / "net.tflite"
    line = expected(path, folder / "digit.png", normalization, top)
    assert of(name)[2] == line


def test_names_the_classes_and_feeds_codes_where_the_file_says_so(runs, digits):
    of, folder = runs
    *_, normalization = digits
    line = expected(folder / "net.tflite", folder / "digit.png", normalization)
    # The file takes codes: those that the float file makes itself.
    assert of("codes")[2] == re.sub(r"(\d) (\d+\.\d %)", r"digit \1 \2", line)


def test_codes_that_a_file_puts_out_are_turned_into_logits(runs, digits):
    of, folder = runs
    *_, normalization = digits
    path = folder / "logits.tflite"
    assert tfl.export.Runner(path.read_bytes()).outputs[0]["dtype"] == np.int8
    line = expected(path, folder / "digit.png", normalization)
    assert of("logits")[2] == line


def test_a_file_of_another_program_gets_pixels_from_0_to_1(runs):
    of, folder = runs
    line = expected(folder / "foreign.tflite", folder / "digit.png")
    assert of("foreign")[2] == line


@pytest.mark.parametrize("name", ["net", "codes"])
def test_the_accuracy_on_a_data_set_is_the_twins(runs, exported, name):
    of, _ = runs
    _, right = exported
    share = 100 * right / LIMIT
    line = f"digits: {right} of {LIMIT} right, {share:.2f} %\n"
    assert of(f"data, {name}")[2] == line


def test_the_accuracy_of_a_file_of_another_program(runs, digits):
    of, folder = runs
    images, labels, _ = digits
    runner = tfl.export.Runner((folder / "foreign.tflite").read_bytes())
    (logits,) = runner(images).values()
    right = int((logits.argmax(-1) == labels).sum())
    assert of("data, foreign")[2].startswith(f"digits: {right} of {LIMIT} right")


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_a_reason(runs, name):
    of, _ = runs
    code, error, shown = of(name)
    assert code == 1
    assert re.search(BAD[name][1], error), error
    assert shown == ""
