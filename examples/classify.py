"""Classifies images, or a data set, with a TFLite file.

  python examples/classify.py runs/w2a2/tflite/network.tflite one.png two.jpg
  python examples/classify.py runs/w2a2/tflite/network.tflite --dataset=digits

export_tflite.py stores in the file how pixels are normalized. To classify images,
LiteRT (`ai-edge-litert`), NumPy and Pillow are enough, as on a small device. Without
LiteRT, TensorFlow runs the file.
"""

import json
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from absl import app, flags

try:
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.interpreter import Interpreter
except ImportError:
    from tensorflow.lite import Interpreter
    from tensorflow.lite.python import schema_py_generated as schema

FLAGS = flags.FLAGS

flags.DEFINE_string("dataset", None, "A data set to classify, instead of images.")
flags.DEFINE_string("data_dir", None, "Folder of the data, as in train.py.")
flags.DEFINE_integer("limit", None, "Largest number of images of the data set.")
flags.DEFINE_integer("batch_size", 100, "Images of the data set in a batch.")
flags.DEFINE_integer("threads", 1, "Threads of the interpreter.", lower_bound=1)
flags.DEFINE_integer("top", 3, "Classes to print for each image.", lower_bound=1)


class Classifier:
    """A TFLite file that classifies normalized images.

    Args:
        path: Path of the file.
        threads: Number of threads of the interpreter.
    """

    def __init__(self, path: Path, threads: int):
        data = path.read_bytes()
        if data[4:8] != b"TFL3":
            raise ValueError(f"The file must be a TFLite file. Received: {str(path)!r}")
        try:
            self._interpreter = Interpreter(model_content=data, num_threads=threads)
        except ValueError as error:
            raise ValueError(
                f"The file must be whole. Received: {str(path)!r} ({error})"
            ) from error
        self.info = read_info(data)
        self._input = self._interpreter.get_input_details()[0]
        self._output = self._interpreter.get_output_details()[0]
        dtype = self._output["dtype"].__name__
        if dtype not in ("float32", "int8", "uint8"):
            raise ValueError(
                "The file must put out a score for each class, as a network without an "
                f"argmax does. Received: {str(path)!r}, which puts out {dtype}"
            )
        self._batch = None

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Height, width and channels."""
        return tuple(int(size) for size in self._input["shape"][1:])

    def __call__(self, images) -> np.ndarray:
        """Returns the logits, float32 [N, classes], of float32 images [N, H, W, C]."""
        if len(images) != self._batch:
            self._interpreter.resize_tensor_input(self._input["index"], images.shape)
            self._interpreter.allocate_tensors()
            self._batch = len(images)
        self._interpreter.set_tensor(self._input["index"], self._fed(images))
        self._interpreter.invoke()
        values = self._interpreter.get_tensor(self._output["index"])
        if values.dtype == np.float32:
            return values
        scale, zero_point = self._output["quantization"]
        return (values.astype(np.float32) - zero_point) * np.float32(scale)

    def _fed(self, images):
        dtype = self._input["dtype"]
        if dtype == np.float32:
            return images.astype(np.float32)
        scale, zero_point = self._input["quantization"]
        codes = np.rint(images.astype(np.float32) * (np.float32(1) / np.float32(scale)))
        limits = np.iinfo(dtype)
        return np.clip(codes + zero_point, limits.min, limits.max).astype(dtype)


def read_info(data: bytes) -> dict:
    """Returns the `info` of the export; empty if another program wrote the file."""
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    for entry in model.metadata or []:
        if entry.name == b"tf_lowbit":
            return json.loads(bytes(model.buffers[entry.buffer].data))["info"]
    return {}


def read_image(path: str, shape, info: dict) -> np.ndarray:
    """Reads a picture as input of the network: float32 [H, W, C], normalized."""
    from PIL import Image

    if len(shape) != 3 or shape[-1] not in (1, 3):
        raise ValueError(
            "The file must take images of 1 or 3 channels. "
            f"Received: a file that takes {shape}"
        )
    height, width, channels = shape
    with Image.open(path) as image:
        if image.mode.startswith("I;16"):
            # Pillow would clip, and most of the picture would be white.
            image = Image.fromarray(in_8_bits(np.asarray(image)))
        if image.mode in ("I", "F"):
            raise ValueError(
                "A picture must have 8 or 16 bits per channel, because only these have "
                f"a known range. Received: {path!r} of mode {image.mode!r}"
            )
        image = image.convert({1: "L", 3: "RGB"}[channels])
        if image.size != (width, height):
            print(f"{path}: resized from {image.size[0]}x{image.size[1]}")
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(image, np.float64).reshape(shape) / 255.0
    normalization = info.get("normalization")
    if normalization is None:
        return pixels.astype(np.float32)
    mean, deviation = normalization["mean"], normalization["deviation"]
    return ((pixels - mean) / deviation).astype(np.float32)


def in_8_bits(pixels: np.ndarray) -> np.ndarray:
    """Rounds 16-bit pixels to 8 bits: 65535 is 257 times 255."""
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def classify_images(classifier: Classifier, paths: list[str]) -> None:
    """Prints the likeliest classes of each picture."""
    names = classifier.info.get("classes")
    for path in paths:
        image = read_image(path, classifier.image_shape, classifier.info)
        logits = classifier(image[np.newaxis])[0].astype(np.float64)
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        best = np.argsort(-shares, kind="stable")[: FLAGS.top]
        shown = ", ".join(
            f"{names[c] if names else c} {100 * shares[c]:.1f} %" for c in best
        )
        print(f"{path}: {shown}")


def classify_dataset(classifier: Classifier, name: str) -> None:
    """Prints the accuracy on a data set's test part."""
    from tf_lowbit import datasets

    data = datasets.load(
        name,
        batch_size=FLAGS.batch_size,
        data_dir=FLAGS.data_dir or None,
        limit=FLAGS.limit,
    )
    if data.input_shape != classifier.image_shape:
        raise ValueError(
            f"The images of {name} are {data.input_shape}. "
            f"Received: a file that takes {classifier.image_shape}"
        )
    right = count = 0
    for images, labels in data.test.as_numpy_iterator():
        right += int((classifier(images).argmax(axis=-1) == labels).sum())
        count += len(labels)
    print(f"{name}: {right:,} of {count:,} right, {100 * right / count:.2f} %")


def main(argv):
    """Classifies images or a data set."""
    if len(argv) < 2 or (FLAGS.dataset is None) == (len(argv) == 2):
        raise app.UsageError(
            f"Give a .tflite file, and images or --dataset. Received: {argv[1:]}"
        )
    idle = ("data_dir", "limit", "batch_size") if FLAGS.dataset is None else ("top",)
    for name in idle:
        if FLAGS[name].present:
            raise ValueError(
                "A flag must have an effect. "
                f"Received: --{name} {'without' if name != 'top' else 'with'} --dataset"
            )
    classifier = Classifier(Path(argv[1]), FLAGS.threads)
    if FLAGS.dataset is not None:
        classify_dataset(classifier, FLAGS.dataset)
    else:
        classify_images(classifier, argv[2:])


if __name__ == "__main__":
    app.run(main)
