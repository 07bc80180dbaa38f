"""Model inversion: it finds what a class looks like where there is something."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe.evaluation import Inversion, invert, recognised
from dp_transcribe.evaluation.inversion import linear_classifier, save_grid
from dp_transcribe.teachers import Teacher

IMAGE = (6, 6, 1)
CLASSES = 3
QUICK = Inversion(images_per_class=2, steps=40, learning_rate=0.1)


def patterns():
    """A bright pair of rows for each class, float32 `[classes, 6, 6, 1]`."""
    images = np.zeros((CLASSES, *IMAGE), np.float32)
    for label in range(CLASSES):
        images[label, 2 * label : 2 * label + 2] = 1.0
    return images


def classifier(scale, bounds=(0.0, 1.0)):
    """Logits are likenesses to the patterns."""
    model = keras.Sequential(
        [keras.layers.Input(IMAGE), keras.layers.Flatten(), keras.layers.Dense(CLASSES)]
    )
    kernel = scale * patterns().reshape(CLASSES, -1).T
    model.set_weights([kernel, np.zeros(CLASSES, np.float32)])
    return Teacher(model, outputs="logits", input_range=bounds)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0)])
def test_what_the_classes_look_like_is_found(bounds):
    images, labels = invert(classifier(1.0, bounds), QUICK)
    assert images.shape == (6, *IMAGE)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert images.min() >= bounds[0]
    assert images.max() <= bounds[1]
    unit = (images - bounds[0]) / (bounds[1] - bounds[0])

    def likeness(images):
        return np.einsum("nhwc,khwc->nk", images, patterns())

    assert recognised(likeness, unit, labels) == 1.0


def test_a_model_that_knows_nothing_shows_nothing():
    images, labels = invert(classifier(0.0), QUICK)
    spread = images.reshape(len(images), -1).std(axis=1)
    assert spread.max() < 0.2  # the prior alone: dark and smooth


def test_the_seed_decides():
    first, second = (invert(classifier(1.0), QUICK)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_an_independent_classifier_learns_the_patterns():
    random = np.random.default_rng(0)
    labels = np.arange(90) % CLASSES
    images = patterns()[labels] + random.normal(0, 0.2, (90, *IMAGE))
    classify = linear_classifier(images, labels)
    assert recognised(classify, patterns(), np.arange(CLASSES)) == 1.0
    assert recognised(classify, patterns(), (np.arange(CLASSES) + 1) % CLASSES) == 0.0


def test_the_grid_has_a_column_for_each_class(tmp_path):
    path = tmp_path / "grid.png"
    labels = np.repeat(np.arange(CLASSES), 2)
    save_grid(path, patterns()[labels], labels)
    pixels = tf.io.decode_png(path.read_bytes()).numpy()
    assert pixels.shape == (12, 18, 1)
    np.testing.assert_array_equal(pixels[:6, 6:12, 0] // 255, patterns()[1, ..., 0])


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="`steps`"):
        Inversion(steps=0)
