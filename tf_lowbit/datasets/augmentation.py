"""Random crops and flips as pure functions of the images and a seed.

The functions take whole batches: one gather per batch is two to three times as fast as
a map over images. Each image is cropped and flipped independently. `images` is a number
tensor [B, H, W, C] and `seed` an integer tensor [2]. The result has the shape and dtype
of `images`.
"""

from collections.abc import Callable

from tf_lowbit.compat import tf

# (images [B, H, W, C], seed int64 [2]) -> images of the same shape and dtype.
Augmentation = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


def random_crop(images: tf.Tensor, seed: tf.Tensor, *, padding: int) -> tf.Tensor:
    """Pads with zeros on all sides, then crops to the original size at random.

    The result is shifted by at most `padding` pixels in each direction. All `(2 *
    padding + 1) ** 2` shifts are equally likely. Zero is black: pad before normalizing.
    """
    count, (height, width) = tf.shape(images)[0], images.shape[1:3]
    padded = tf.pad(images, [[0, 0], [padding, padding], [padding, padding], [0, 0]])
    corners = tf.random.stateless_uniform(
        [2, count], seed, maxval=2 * padding + 1, dtype=tf.int32
    )
    rows = corners[0][:, tf.newaxis] + tf.range(height)
    columns = corners[1][:, tf.newaxis] + tf.range(width)
    cropped = tf.gather(padded, rows, axis=1, batch_dims=1)
    cropped = tf.gather(cropped, columns, axis=2, batch_dims=1)
    return tf.ensure_shape(cropped, images.shape)


def random_flip(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Mirrors each image left to right with probability 1/2."""
    coins = tf.random.stateless_uniform(
        [tf.shape(images)[0], 1, 1, 1], seed, maxval=2, dtype=tf.int32
    )
    return tf.where(coins == 1, tf.reverse(images, axis=[2]), images)


def crop(padding: int) -> Augmentation:
    """Returns the augmentation that shifts by at most `padding` pixels."""

    def augment(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        return random_crop(images, seed, padding=padding)

    return augment


def crop_and_flip(padding: int) -> Augmentation:
    """Returns the augmentation that shifts by at most `padding` pixels and mirrors."""

    def augment(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        crop_seed, flip_seed = tf.unstack(tf.random.split(seed, 2))
        return random_flip(random_crop(images, crop_seed, padding=padding), flip_seed)

    return augment
