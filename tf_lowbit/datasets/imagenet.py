"""ImageNet, streamed from the records that TensorFlow Datasets prepared.

Russakovsky et al., ImageNet large scale visual recognition challenge, arXiv:1409.0575.
Augmentation is "Inception-style": Szegedy et al., Going deeper with convolutions,
arXiv:1409.4842, section 6.
"""

import functools

import numpy as np

from tf_lowbit.compat import tf
from tf_lowbit.core import checks
from tf_lowbit.datasets import tfds_source
from tf_lowbit.datasets.dataset import Dataset, Normalization, PipelineOptions, batches
from tf_lowbit.datasets.pipeline import epoch_seeds, finish, repeat_epochs

_NAME = "imagenet2012"
_NORMALIZATION = Normalization(255.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Evaluation resizes the shorter side to 256 for a centre crop of 224.
_RESIZE_RATIO = 256 / 224
# A constant, not AUTOTUNE: the order of the examples depends on it.
_FILES_AT_A_TIME = 16
_AREA_RANGE = (0.08, 1.0)
_ASPECT_RATIO_RANGE = (3 / 4, 4 / 3)


def load(
    options: PipelineOptions,
    *,
    data_dir: str | None = None,
    image_size: int = 224,
    shuffle_buffer: int = 16384,
) -> Dataset:
    """Builds the pipelines of ImageNet: 1281167 and 50000 images, 1000 classes.

    `test` is the split that TensorFlow Datasets calls "validation", because the labels
    of the test images were never published. Training examples are shuffled by file,
    then within a buffer, which is filled anew in each epoch. Images are decoded and
    cropped one by one, in parallel.

    Args:
        options: Batch size, seed and so on. `limit` takes the first examples of each
            split. `validation_fraction` holds out the last ones of the training split,
            which TensorFlow Datasets shuffled when it prepared them.
        data_dir: Folder of TensorFlow Datasets; None for its default.
        image_size: Height and width of the images in a batch, at least 1.
        shuffle_buffer: Number of training examples to shuffle among, at least 1. They
            are held encoded, about 110 kB each.

    Raises:
        ImportError: If TensorFlow Datasets is not installed.
        FileNotFoundError: If ImageNet was not prepared.
        ValueError: If an argument is out of range, a split is missing, the records are
            not TFRecord files, or an epoch has no batch `start_step`.
    """
    checks.integer("image_size", image_size, at_least=1)
    checks.integer("shuffle_buffer", shuffle_buffer, at_least=1)
    builder = tfds_source.prepared_builder(_NAME, data_dir)
    tfds_source.require_splits(builder, "train", "validation")
    splits = builder.info.splits
    labelled = options.limited(splits["train"].num_examples)
    held_out = options.held_out(labelled)
    train_size = labelled - held_out
    test_size = options.limited(splits["validation"].num_examples)
    evaluate = functools.partial(
        _evaluation_batches,
        builder,
        image_size=image_size,
        batch_size=options.batch_size,
    )
    return Dataset(
        name=_NAME,
        train=_training_batches(
            builder, train_size, options, image_size, shuffle_buffer
        ),
        test=evaluate(f"validation[:{test_size}]", size=test_size),
        validation=evaluate(f"train[{train_size}:{labelled}]", size=held_out)
        if held_out
        else None,
        input_shape=(image_size, image_size, 3),
        classes=builder.info.features["label"].num_classes,
        train_size=train_size,
        test_size=test_size,
        validation_size=held_out,
        batch_size=options.batch_size,
        normalization=_NORMALIZATION,
    )


def random_resized_crop(
    encoded: tf.Tensor, seed: tf.Tensor, *, image_size: int
) -> tf.Tensor:
    """Decodes a random part of an image, scales it, mirrors it half the time.

    The part has 8 % to 100 % of the area and an aspect ratio of 3:4 to 4:3. Only this
    part of the JPEG is decoded.

    Args:
        encoded: JPEG image, string scalar.
        seed: Integer tensor [2].
        image_size: Height and width of the result.

    Returns:
        Float32 [image_size, image_size, 3], pixels in [0, 255].
    """
    crop_seed, flip_seed = tf.unstack(tf.random.split(seed, 2))
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.io.extract_jpeg_shape(encoded),
        bounding_boxes=tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
        seed=crop_seed,
        min_object_covered=0.0,
        area_range=_AREA_RANGE,
        aspect_ratio_range=_ASPECT_RATIO_RANGE,
    )
    window = tf.concat([begin[:2], extent[:2]], axis=0)
    image = tf.io.decode_and_crop_jpeg(encoded, window, channels=3)
    image = _resize(image, [image_size, image_size])
    return tf.image.stateless_random_flip_left_right(image, flip_seed)


def center_crop(encoded: tf.Tensor, *, image_size: int) -> tf.Tensor:
    """Decodes an image, scales its shorter side, and crops its center.

    The shorter side becomes `image_size * 256 / 224`. Arguments and result are as in
    `random_resized_crop`.
    """
    image = tf.io.decode_jpeg(encoded, channels=3)
    sides = tf.shape(image)[:2]
    shorter = tf.cast(tf.reduce_min(sides), tf.float64)
    target = round(image_size * _RESIZE_RATIO)
    scaled = tf.cast(tf.round(tf.cast(sides, tf.float64) * target / shorter), tf.int32)
    image = _resize(image, scaled)
    top, left = tf.unstack((scaled - image_size) // 2)
    image = image[top : top + image_size, left : left + image_size]
    return tf.ensure_shape(image, [image_size, image_size, 3])


def _resize(image: tf.Tensor, size) -> tf.Tensor:
    # Most images are scaled down: without antialiasing, pixels would be skipped.
    return tf.image.resize(image, size, method="bilinear", antialias=True)


def _training_batches(
    builder,
    size: int,
    options: PipelineOptions,
    image_size: int,
    shuffle_buffer: int,
) -> tf.data.Dataset:
    # TFDS shuffles files by a Python integer, fixed when a pipeline is built. The order
    # must depend on the epoch, a tensor. So the list of files is shuffled here.
    files = _file_instructions(builder, f"train[:{size}]")

    def epoch_pipeline(epoch, start_step):
        order_seed, augmentation_seed = epoch_seeds(options.seed, epoch)
        file_seed, record_seed = tf.unstack(tf.random.split(order_seed, 2))
        order = tf.random.experimental.stateless_shuffle(
            tf.range(len(files[0])), seed=file_seed
        )
        records = tf.data.Dataset.from_tensor_slices(
            tuple(tf.gather(column, order) for column in files)
        ).interleave(
            _read_file,
            cycle_length=_FILES_AT_A_TIME,
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        )
        # shuffle() also uses the global seed, on which the order must not depend. This
        # fixes the seed of the graph that this function is traced into, not that of the
        # program.
        tf.compat.v1.set_random_seed(1)
        records = records.shuffle(
            shuffle_buffer, seed=record_seed[0], reshuffle_each_iteration=False
        )
        # Skipped before decoding, which would take more time.
        records = records.enumerate().skip(start_step * options.batch_size)
        images = records.map(
            functools.partial(decode, augmentation_seed),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
        return images.batch(options.batch_size)

    def decode(augmentation_seed, index, record):
        encoded, label = _parse(builder, record)
        if options.augment:
            seed = tf.random.fold_in(augmentation_seed, index)
            return random_resized_crop(encoded, seed, image_size=image_size), label
        return center_crop(encoded, image_size=image_size), label

    steps = batches(size, options.batch_size)
    dataset = repeat_epochs(epoch_pipeline, steps, options)
    return finish(dataset.map(_normalize, num_parallel_calls=tf.data.AUTOTUNE))


def _evaluation_batches(
    builder, split: str, *, size: int, image_size: int, batch_size: int
) -> tf.data.Dataset:
    tfds = tfds_source.import_tfds()
    dataset = builder.as_dataset(
        split=split,
        as_supervised=True,
        shuffle_files=False,
        decoders={"image": tfds.decode.SkipDecoding()},
    )

    def decode(encoded, label):
        return center_crop(encoded, image_size=image_size), label

    dataset = dataset.map(decode, num_parallel_calls=tf.data.AUTOTUNE)
    dataset = dataset.batch(batch_size).map(_normalize)
    return finish(
        dataset.apply(
            tf.data.experimental.assert_cardinality(batches(size, batch_size))
        )
    )


def _normalize(images, labels):
    return _NORMALIZATION(images), labels


def _file_instructions(builder, split: str) -> tuple[np.ndarray, ...]:
    """Returns the files of a split: paths, examples to skip, examples to take."""
    file_format = builder.info.file_format.value
    if file_format != "tfrecord":
        raise ValueError(
            f"{_NAME} must be prepared as TFRecord files: "
            f"tfds build {_NAME} --file_format=tfrecord. Received: {file_format}"
        )
    instructions = builder.info.splits[split].file_instructions
    return (
        np.array([str(each.filename) for each in instructions]),
        np.array([each.skip for each in instructions], np.int64),
        np.array([each.take for each in instructions], np.int64),
    )


def _read_file(path, skip, take) -> tf.data.Dataset:
    return tf.data.TFRecordDataset(path).skip(skip).take(take)


def _parse(builder, record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the encoded image, string scalar, and the label, int64 scalar."""
    tfds = tfds_source.import_tfds()
    example = builder.info.features.deserialize_example(
        record, decoders={"image": tfds.decode.SkipDecoding()}
    )
    return example["image"], example["label"]
