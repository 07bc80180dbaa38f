import dataclasses

import numpy as np
import pytest

from dp_transcribe import wavelets
from dp_transcribe.generators.priors import default_prior
from dp_transcribe.reference_teachers import (
    CONV_RECIPES,
    WAVELET_RECIPES,
    ConvRecipe,
    WaveletRecipe,
    conv_teacher,
    train_conv_teacher,
    train_wavelet_teacher,
)
from dp_transcribe.teachers import Teacher

TINY = ConvRecipe(filters=(8,), units=8, epochs=1, min_steps=1)
NARROW = WaveletRecipe(
    directions=300, units=(64,), epochs=1, min_steps=200, batch_size=64
)


@pytest.fixture(autouse=True)
def few_public_images(monkeypatch):
    monkeypatch.setattr(wavelets, "PUBLIC_IMAGES", 400)


def test_recipe_learns_real_digits_from_500_images(mnist_small):
    chosen = np.random.default_rng(0).permutation(4000)[:500]
    recipe = dataclasses.replace(
        CONV_RECIPES["mnist"], filters=(16, 32), batch_size=32, min_steps=500
    )
    model = train_conv_teacher(
        mnist_small.train_images[chosen],
        mnist_small.train_labels[chosen],
        num_classes=10,
        recipe=recipe,
    )
    teacher = Teacher(model)
    assert teacher.accuracy(mnist_small.test_images, mnist_small.test_labels) > 0.85


def test_training_repeats_with_its_seed(mnist_small):
    def train(seed):
        model = train_conv_teacher(
            mnist_small.train_images[::100],
            mnist_small.train_labels[::100],
            num_classes=10,
            recipe=dataclasses.replace(TINY, flip=True),
            seed=seed,
        )
        return model.get_weights()[0]

    first = train(1)
    np.testing.assert_array_equal(first, train(1))
    assert np.abs(first - train(2)).max() > 1e-3


def test_recipes_are_for_the_supported_data_sets():
    assert set(CONV_RECIPES) == set(WAVELET_RECIPES)
    assert set(CONV_RECIPES) == {"mnist", "fashion_mnist", "cifar10"}
    for name, shape in (("mnist", (28, 28, 1)), ("cifar10", (32, 32, 3))):
        model = conv_teacher(shape, 10, recipe=CONV_RECIPES[name])
        assert model.output_shape == (None, 10)


def _digits(dataset, count):
    chosen = np.random.default_rng(0).permutation(4000)[:count]
    return dataset.train_images[chosen], dataset.train_labels[chosen]


def _train(images, answers, **kwargs):
    prior = default_prior((28, 28, 1), domain="strokes")
    settings = {"recipe": NARROW, **kwargs}
    model = train_wavelet_teacher(
        images, answers, num_classes=10, prior=prior, **settings
    )
    return Teacher(model)


def test_wavelets_learn_real_digits_from_500_images(mnist_small):
    teacher = _train(*_digits(mnist_small, 500))
    assert teacher.accuracy(mnist_small.test_images, mnist_small.test_labels) > 0.9


def test_an_assistant_learns_what_another_teacher_says_not_what_is_true(mnist_small):
    images, labels = _digits(mnist_small, 500)
    # A teacher that takes every digit for the next one.
    says = np.eye(10, dtype=np.float32)[(labels + 1) % 10]
    assistant = _train(images, says)
    truth = mnist_small.test_labels
    assert assistant.accuracy(mnist_small.test_images, (truth + 1) % 10) > 0.9


def test_probabilities_of_the_classes_are_equal_to_labels(mnist_small):
    images, labels = _digits(mnist_small, 64)
    recipe = dataclasses.replace(NARROW, min_steps=5, flip=True)
    teachers = [
        _train(images, answers, recipe=recipe, seed=3)
        for answers in (labels, np.eye(10)[labels])
    ]
    first, second = (teacher.predict(images) for teacher in teachers)
    np.testing.assert_allclose(first, second, atol=1e-5)


def test_the_wavelets_of_a_teacher_are_fixed_and_public(mnist_small):
    images, labels = _digits(mnist_small, 64)
    recipe = dataclasses.replace(NARROW, min_steps=5)
    one = _train(images, labels, recipe=recipe).model
    other = _train(images[::-1] * 0.5, labels, recipe=recipe, seed=1).model
    frozen = [
        [v for v in model.weights if not v.trainable and "seed" not in v.path]
        for model in (one, other)
    ]
    assert len(frozen[0]) > 2
    for ours, theirs in zip(*frozen, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "answers",
    [
        np.full(8, 10),
        np.full(8, -1),
        np.zeros(7, int),
        np.zeros(8),
        np.full((8, 10), 0.2),
        np.full((8, 9), 1 / 9),
        np.full((8, 10), np.nan),
        np.tile([1.5, -0.5] + [0.0] * 8, (8, 1)),
    ],
)
def test_answers_that_fit_nothing_are_refused_and_not_shown(answers):
    with pytest.raises(ValueError, match="`answers`.*withheld"):
        _train(np.zeros((8, 28, 28, 1), np.float32), answers)


def test_images_must_be_of_the_kind_of_the_prior():
    with pytest.raises(ValueError, match="public_images"):
        _train(np.zeros((8, 32, 32, 1), np.float32), np.zeros(8, int))
