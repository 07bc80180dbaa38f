"""Reference teachers, trained without privacy: what there is to be transcribed.

Any classifier can be a teacher. These are what the examples train, and
`train_wavelet_teacher` also turns a teacher that is hard to transcribe into one that is
easy to.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe.students import split_frozen
from dp_transcribe.wavelets import wavelet_student, whitening_images

_ROWS = 500


@dataclasses.dataclass(frozen=True)
class ConvRecipe:
    """How a reference teacher is built and trained.

    Attributes:
        filters: Convolution filters, one block of convolution, batch normalisation,
            ReLU and 2 x 2 pooling for each.
        units: Width of the hidden dense layer.
        dropout: Rate before and after the hidden dense layer.
        epochs: Passes over the training images.
        min_steps: A small data set is passed over more often, up to this many steps.
        batch_size: Images in a step.
        learning_rate: Peak of the schedule: a quarter of linear warm-up, then cosine.
        shift: Largest random translation in pixels.
        flip: Whether images are mirrored left to right at random.
    """

    filters: tuple[int, ...] = (32, 64, 128)
    units: int = 128
    dropout: float = 0.3
    epochs: int = 8
    min_steps: int = 1200
    batch_size: int = 128
    learning_rate: float = 4e-3
    shift: int = 2
    flip: bool = False


CONV_RECIPES = {
    "mnist": ConvRecipe(),
    "fashion_mnist": ConvRecipe(epochs=12, flip=True),
    "cifar10": ConvRecipe(
        filters=(32, 64, 128, 256), units=256, epochs=12, shift=4, flip=True
    ),
}


def conv_teacher(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    recipe: ConvRecipe = CONV_RECIPES["mnist"],
) -> keras.Model:
    """A convolutional classifier with batch normalisation, ending in logits.

    Args:
        input_shape: `(height, width, channels)`.
        num_classes: Number of logits.
        recipe: Its widths and dropout.

    Returns:
        An untrained model `[batch, h, w, c] -> [batch, num_classes]`.
    """
    layers = keras.layers
    model = keras.Sequential([layers.Input(tuple(input_shape))], name="teacher")
    for filters in recipe.filters:
        model.add(layers.Conv2D(filters, 3, padding="same", use_bias=False))
        model.add(layers.BatchNormalization())
        model.add(layers.ReLU())
        model.add(layers.MaxPooling2D())
    model.add(layers.Flatten())
    model.add(layers.Dropout(recipe.dropout))
    model.add(layers.Dense(recipe.units, activation="relu"))
    model.add(layers.Dropout(recipe.dropout))
    model.add(layers.Dense(num_classes, name="logits"))
    return model


def train_conv_teacher(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int,
    recipe: ConvRecipe = CONV_RECIPES["mnist"],
    seed: int = 0,
    verbose: Any = 0,
) -> keras.Model:
    """Trains a reference teacher, without privacy, on private images.

    Args:
        images: float32 `[n, height, width, channels]` in 0..1.
        labels: int `[n]`.
        num_classes: Number of classes.
        recipe: Architecture and training; `CONV_RECIPES[name]` for a data set.
        seed: For weights, order, augmentation and dropout. Sets the global seeds of
            Python, NumPy and TensorFlow.
        verbose: As in `keras.Model.fit`.

    Returns:
        The trained model, ending in logits.

    **Privacy**: none. The model remembers its training data; wrap it in `Teacher` and
    release only what a mechanism lets through.
    """
    keras.utils.set_random_seed(seed)
    model = conv_teacher(images.shape[1:], num_classes, recipe=recipe)
    dataset = _augmented(images, labels, recipe, seed)
    steps_per_epoch = int(dataset.cardinality())
    epochs = max(recipe.epochs, math.ceil(recipe.min_steps / steps_per_epoch))
    schedule = _schedule(recipe, steps=epochs * steps_per_epoch)
    model.compile(
        optimizer=keras.optimizers.Adam(schedule),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,  # XLA slows convolutions several times on a CPU
    )
    model.fit(dataset, epochs=epochs, shuffle=False, verbose=verbose)
    return model


@dataclasses.dataclass(frozen=True)
class WaveletRecipe:
    """How a teacher of fixed wavelets and a learning head is built and trained.

    Attributes:
        directions: Principal directions of the wavelets' features that the head sees.
        units: Widths of its hidden layers.
        dropout: Rate after each of them.
        weight_decay: Of AdamW.
        epochs: Passes over the training images.
        min_steps: A small data set is passed over more often, up to this many steps.
        batch_size: Images in a step.
        learning_rate: Peak of the schedule: a quarter of linear warm-up, then cosine.
        flip: Whether images are learnt from together with their mirror images.
    """

    directions: int = 600
    units: tuple[int, ...] = (512,)
    dropout: float = 0.5
    weight_decay: float = 0.1
    epochs: int = 60
    min_steps: int = 1200
    batch_size: int = 512
    learning_rate: float = 1e-3
    flip: bool = False


WAVELET_RECIPES = {
    "mnist": WaveletRecipe(),
    "fashion_mnist": WaveletRecipe(epochs=30, flip=True),
    "cifar10": WaveletRecipe(epochs=30, flip=True),
}


def train_wavelet_teacher(
    images: np.ndarray,
    answers: np.ndarray,
    *,
    num_classes: int,
    prior: Any,
    recipe: WaveletRecipe = WAVELET_RECIPES["mnist"],
    seed: int = 0,
    verbose: Any = 0,
) -> keras.Model:
    """Trains a teacher that is easy to transcribe, without privacy, on private images.

    A network that learnt its filters answers random images by what it never had to
    learn, and a student that imitates those answers learns little about real ones. One
    that sees with fixed wavelets answers both alike, and a `wavelet_student` sees what
    it sees.

    Give it labels, or what a teacher that you have answers to the same images. In the
    second case it is that teacher's *assistant*, to be transcribed in its place:

        assistant = train_wavelet_teacher(images, teacher.predict(images), ...)

    Args:
        images: float32 `[n, height, width, channels]` in the range of `prior`.
        answers: int `[n]`, or probabilities `[n, num_classes]`.
        num_classes: Number of classes.
        prior: A `ProceduralGenerator`, best the one that the queries will come from:
            the features are whitened by its images.
        recipe: Architecture and training; `WAVELET_RECIPES[name]` for a data set.
        seed: For weights, order and dropout. Sets the global seeds of Python, NumPy and
            TensorFlow.
        verbose: As in `keras.Model.fit`.

    Returns:
        The trained model, a `wavelet_student` ending in logits.

    Raises:
        ValueError: the answers do not fit the images, or the images the prior.

    **Privacy**: none. The model remembers its training data; wrap it in `Teacher` and
    release only what a mechanism lets through.

    References:
        Mirzadeh et al. 2020, "Improved Knowledge Distillation via Teacher Assistant",
        arXiv:1902.03393.
    """
    targets = _as_probabilities(answers, len(images), num_classes)
    keras.utils.set_random_seed(seed)
    model = wavelet_student(
        images.shape[1:],
        num_classes,
        public_images=whitening_images(prior),
        directions=recipe.directions,
        units=recipe.units,
        dropout=recipe.dropout,
    )
    parts = split_frozen(model)
    assert parts is not None  # a wavelet student is frozen wavelets and a head
    front, head = parts
    views = [images, images[:, :, ::-1]] if recipe.flip else [images]
    # What is frozen is computed once.
    features = np.concatenate(
        [front.predict(view, batch_size=_ROWS, verbose=verbose) for view in views]
    )
    steps_per_epoch = math.ceil(len(features) / recipe.batch_size)
    epochs = max(recipe.epochs, math.ceil(recipe.min_steps / steps_per_epoch))
    head.compile(
        optimizer=keras.optimizers.AdamW(
            _schedule(recipe, steps=epochs * steps_per_epoch),
            weight_decay=recipe.weight_decay,
            use_ema=True,
            ema_momentum=0.98,
        ),
        loss=keras.losses.CategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,
    )
    head.fit(
        features,
        np.concatenate([targets] * len(views)),
        batch_size=recipe.batch_size,
        epochs=epochs,
        verbose=verbose,
    )
    return model


def _as_probabilities(answers: np.ndarray, count: int, num_classes: int) -> np.ndarray:
    """Labels or probabilities as float32 `[count, num_classes]`, checked."""
    answers = np.asarray(answers)
    labels = answers.shape == (count,) and np.issubdtype(answers.dtype, np.integer)
    if labels and count and 0 <= answers.min() <= answers.max() < num_classes:
        return np.eye(num_classes, dtype=np.float32)[answers]
    if answers.shape == (count, num_classes) and np.all(answers >= 0.0):
        rows = answers.astype(np.float32)
        if np.allclose(rows.sum(axis=1), 1.0, atol=1e-3):
            return rows
    expected = (
        f"a label 0..{num_classes - 1} or {num_classes} probabilities for each of "
        f"{count} images"
    )
    got = f"(withheld: private) {answers.dtype} {answers.shape}"
    raise _validate.invalid("answers", got, expected)


def _schedule(
    recipe: ConvRecipe | WaveletRecipe, *, steps: int
) -> keras.optimizers.schedules.LearningRateSchedule:
    warmup = max(1, steps // 4)
    return keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=recipe.learning_rate / 40.0,
        decay_steps=max(1, steps - warmup),
        alpha=1e-3,
        warmup_target=recipe.learning_rate,
        warmup_steps=warmup,
    )


def _augmented(
    images: np.ndarray, labels: np.ndarray, recipe: ConvRecipe, seed: int
) -> tf.data.Dataset:
    """Shuffled, shifted and mirrored batches of one size."""
    height, width = images.shape[1:3]
    shift = recipe.shift

    def augment(batch: tf.Tensor, targets: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        batch = tf.pad(batch, [[0, 0], [shift, shift], [shift, shift], [0, 0]])
        # One shift for the whole batch: as good as one for each image, and far cheaper.
        corner = tf.random.uniform([2], 0, 2 * shift + 1, tf.int32)
        top, left = corner[0], corner[1]
        batch = batch[:, top : top + height, left : left + width]
        if recipe.flip:
            mirrored = tf.random.uniform([tf.shape(batch)[0], 1, 1, 1]) < 0.5
            batch = tf.where(mirrored, batch[:, :, ::-1], batch)
        return batch, targets

    dataset = tf.data.Dataset.from_tensor_slices((images, labels))
    dataset = dataset.shuffle(len(images), seed=seed)
    batch_size = min(recipe.batch_size, len(images))
    dataset = dataset.batch(batch_size, drop_remainder=True)
    return dataset.map(augment, num_parallel_calls=2, deterministic=True).prefetch(2)
