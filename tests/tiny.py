"""A whole transcription small enough to run hundreds of times in a test."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

from dp_transcribe import mechanisms
from dp_transcribe.generators.base import ProceduralGenerator
from dp_transcribe.privacy.units import Unit
from dp_transcribe.queries import FreshQueries, QueryPool
from dp_transcribe.teachers import Teacher
from dp_transcribe.transcriber import DPTranscriber

IMAGE = (8, 8, 1)
PIXELS = 64
CLASSES = 10
DELTA = 1e-5
POOL = QueryPool(size=64, batch_size=8, updates=10)


@keras.saving.register_keras_serializable("tests")
class UniformPixels(ProceduralGenerator):
    """Every pixel by itself."""

    def draw(self, draws):
        return draws.uniform(*self.image_shape)


@keras.saving.register_keras_serializable("tests")
class SinglePixels(ProceduralGenerator):
    """Image i has pixel i alone, whatever the seed: row i of a kernel is answer i's."""

    asked_once = True

    def draw(self, draws):
        pixels = tf.one_hot(tf.range(draws.n) % PIXELS, PIXELS)
        return tf.reshape(pixels, (-1, *IMAGE))


def linear_model(seed=0, scale=1.0, classes=CLASSES):
    """Flatten and Dense, `[batch, 8, 8, 1]` to logits."""
    random = np.random.default_rng(seed)
    model = keras.Sequential(
        [keras.layers.Input(IMAGE), keras.layers.Flatten(), keras.layers.Dense(classes)]
    )
    kernel = random.normal(0, scale, (PIXELS, classes))
    model.set_weights([kernel, random.normal(0, scale, classes)])
    return model


def conv_model(seed=0):
    """A convolution and a dense layer, weights fixed by the seed."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.layers.Input(IMAGE),
            keras.layers.Conv2D(4, 3, 2, activation="tanh"),
            keras.layers.Flatten(),
            keras.layers.Dense(CLASSES),
        ]
    )


def frozen_front_model(seed=0):
    """A frozen convolution before the dense layer that learns."""
    model = conv_model(seed)
    model.layers[0].trainable = False
    return model


def linear_teacher(seed=5):
    return Teacher(linear_model(seed))


def silent_teacher():
    """Finite on the probe of random images, NaN on every `SinglePixels` image."""
    model = linear_model(5)

    def answer(images):
        is_query = tf.reduce_sum(images, (1, 2, 3)) < 1.5
        return tf.where(is_query[:, None], np.nan, model(images))

    return Teacher(answer, input_shape=IMAGE, outputs="logits")


def transcriber(
    mechanism=None,
    *,
    teacher=None,
    student=None,
    generator=None,
    queries=None,
    optimizer=None,
    compiled=True,
    eager=True,
    seed=1,
    compile_arguments=None,
    **kwargs,
):
    """A compiled transcriber of tiny parts; runs eagerly unless told otherwise."""
    model = DPTranscriber(
        teacher if teacher is not None else linear_teacher(),
        student if student is not None else linear_model(0, 0.1),
        generator if generator is not None else UniformPixels(IMAGE),
        mechanism=mechanism or mechanisms.NormalizedGradient(noise_multiplier=4.0),
        queries=queries or FreshQueries(batch_size=16),
        seed=seed,
        **{"replay_size": 64, "replay_batch_size": 16, **kwargs},
    )
    if compiled:
        model.compile(
            optimizer or keras.optimizers.SGD(1.0),
            run_eagerly=eager,
            **(compile_arguments or {}),
        )
    return model


def flat_weights(model):
    """All weights of a model in one vector."""
    return np.concatenate([np.ravel(w) for w in model.get_weights()])


def epsilon(model, delta=DELTA):
    return model.ledger.epsilon(unit=Unit.RESPONSE, delta=delta)


def releases(model):
    return sum(entry.count for entry in model.ledger.entries)


def fit(model, steps=1, *, epochs=1, **kwargs):
    return model.fit(epochs=epochs, steps_per_epoch=steps, verbose=0, **kwargs)


class Watch(keras.callbacks.Callback):
    """Epsilon that is shown beside the ledger's, after every batch and epoch."""

    def __init__(self):
        super().__init__()
        self.batches, self.epochs = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append((logs["epsilon"], epsilon(self.model)))

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append((logs["epsilon"], epsilon(self.model)))
