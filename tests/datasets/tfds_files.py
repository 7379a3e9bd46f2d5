"""Writes small data sets in the format of TensorFlow Datasets."""

import numpy as np
import tensorflow_datasets as tfds

from tf_lowbit.compat import tf


def write(name: str, data_dir, splits: dict[str, list[dict]], shards: int = 2):
    """Prepares a data set with given examples, as `tfds build` would.

    Args:
      name: a name that TensorFlow Datasets knows.
      data_dir: the folder of TensorFlow Datasets to write to.
      splits: the examples of each split, with all features of the data set.
      shards: the number of files of a split.
    """
    builder = tfds.builder(name, data_dir=str(data_dir))
    features = builder.info.features
    builder.data_path.mkdir(parents=True)
    infos = []
    for split, examples in splits.items():
        template = tfds.core.ShardedFileTemplate(
            dataset_name=builder.name,
            data_dir=builder.data_path,
            split=split,
            filetype_suffix="tfrecord",
        )
        parts = [examples[shard::shards] for shard in range(shards)]
        size = 0
        for shard, part in enumerate(parts):
            path = template.sharded_filepath(shard_index=shard, num_shards=shards)
            with tf.io.TFRecordWriter(str(path)) as writer:
                for example in part:
                    record = features.serialize_example(
                        features.encode_example(example)
                    )
                    writer.write(record)
                    size += len(record)
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(part) for part in parts],
                num_bytes=size,
                filename_template=template,
            )
        )
    builder.info.set_splits(tfds.core.SplitDict(infos))
    builder.info.write_to_directory(builder.data_path)


def images_with_labels(count: int, classes: int, shape, seed: int) -> list[dict]:
    """Returns examples with noise as images and labels 0, 1, 2, ... in turn."""
    random = np.random.RandomState(seed)
    return [
        {
            "image": random.randint(0, 256, shape, np.uint8),
            "label": index % classes,
        }
        for index in range(count)
    ]
