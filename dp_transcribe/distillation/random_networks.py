"""Features of images in ConvNets with random weights."""

from __future__ import annotations

import math

import keras
import numpy as np
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe.distillation.kernels import InnerProductKernel
from dp_transcribe.students import conv_student

# What the seed of a network begins with, so that no other public draw repeats it.
_NETWORKS = 1


class RandomConvNets(InnerProductKernel):
    """Features of images in ConvNets with random weights, which nothing ever trains.

    Args:
        image_shape: `(height, width, colours)`, 8 x 8 pixels or more.
        networks: number of networks.
        filters: channels of each of their three blocks.
        seed: of the weights, which are public.

    **Privacy**: a public function of each image alone; every embedding has norm one.

    References:
        Zhao, Bilen: Dataset Condensation with Distribution Matching,
        arXiv:2110.04181. Its networks are drawn anew for every step; here the
        statistics of a few are released once.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        *,
        networks: int = 10,
        filters: int = 64,
        seed: int = 0,
    ) -> None:
        if min(image_shape[:2]) < 8:
            expected = "images of 8 x 8 pixels or more"
            raise _validate.invalid("image_shape", image_shape, expected)
        self.networks = [
            _random_network(image_shape, filters, (seed, _NETWORKS, number))
            for number in range(networks)
        ]
        self._embed = tf.function(self._all_networks, reduce_retracing=True)

    def embed(self, inputs: tf.Tensor) -> tf.Tensor:
        """Features of all networks beside each other, float32 `[n, features]`."""
        return self._embed(tf.cast(inputs, tf.float32))

    def by_network(self, number: int, images: tf.Tensor) -> tf.Tensor:
        """The part of the embedding that is one network's."""
        features = self.networks[number](images, training=False)
        return tf.math.l2_normalize(features, axis=1) / math.sqrt(len(self.networks))

    def _all_networks(self, images: tf.Tensor) -> tf.Tensor:
        numbers = range(len(self.networks))
        return tf.concat([self.by_network(n, images) for n in numbers], axis=1)


def _random_network(
    image_shape: tuple[int, int, int], filters: int, seed: tuple[int, ...]
) -> keras.Model:
    """Three blocks of convolution, instance normalisation, ReLU and mean pooling."""
    model = conv_student(
        image_shape, 2, filters=(filters,) * 3, units=None, groups=-1, pooling="average"
    )
    random = np.random.default_rng(seed)
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D):
            rows, columns, inputs, outputs = layer.kernel.shape
            limit = math.sqrt(6.0 / (rows * columns * (inputs + outputs)))
            layer.kernel.assign(random.uniform(-limit, limit, layer.kernel.shape))
    return keras.Model(model.inputs[0], model.layers[-2].output, trainable=False)
