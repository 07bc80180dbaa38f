"""Images of two classes that tests of distillation share."""

import numpy as np
import tensorflow as tf


class Bars:
    """Noisy horizontal (class 0) or vertical (class 1) bars, or either.

    `side` is that of the images, and the larger the pace the narrower the bars.
    """

    def __init__(self, side, pace=2.0):
        self.side, self.pace = side, pace

    def draw(self, n, seed):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 2, n)
        places = np.arange(self.side) * self.pace
        wave = 0.5 + 0.5 * np.sin(places + rng.uniform(0, 6, (n, 1)))
        images = np.repeat(wave[:, :, None], self.side, axis=2)
        images[labels == 1] = images[labels == 1].transpose(0, 2, 1)
        images += 0.1 * rng.normal(size=images.shape)
        return np.clip(images, 0.0, 1.0)[..., None].astype(np.float32), labels

    def sample(self, n, seed):
        return tf.constant(self.draw(n, np.asarray(seed))[0])
