import keras
import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe import mechanisms
from dp_transcribe.queries import FreshQueries, QueryPool, balanced_rows
from dp_transcribe.teachers import Teacher
from tests import tiny

# The teacher's class is the sign of the first pixel's distance from 0.9: one tenth of
# uniform pixels are of class 1.
RARE = 0.1


def _skewed_teacher():
    model = tiny.linear_model(classes=2)
    kernel = np.zeros((tiny.PIXELS, 2))
    kernel[0, 1] = 40.0
    model.set_weights([kernel, np.array([0.0, -40.0 * (1 - RARE)])])
    return Teacher(model)


def _optimizer(mechanism):
    if isinstance(mechanism, mechanisms.NormalizedGradient):
        return keras.optimizers.SGD(0.3, momentum=0.9)  # 1.0 follows the noise
    return keras.optimizers.Adam(0.003)


def _transcriber(mechanism, balance, **kwargs):
    return tiny.transcriber(
        mechanism,
        teacher=_skewed_teacher(),
        student=tiny.linear_model(0, 0.01, classes=2),
        optimizer=_optimizer(mechanism),
        balance_classes=balance,
        eager=False,
        **kwargs,
    )


def _recall_of_the_rare_class(model):
    random = np.random.default_rng(3)
    images = random.uniform(size=(2000, *tiny.IMAGE)).astype(np.float32)
    images[:, 0, 0, 0] = random.uniform(1 - RARE, 1.0, 2000)
    return (model.predict(images, verbose=0).argmax(-1) == 1).mean()


MECHANISMS = {
    "pool": (
        mechanisms.NormalizedGradient(noise_multiplier=0.5),
        {"queries": QueryPool(size=4000, batch_size=256, updates=200)},
    ),
    "answers": (
        mechanisms.RandomizedResponse(epsilon=1.0),
        {
            "queries": FreshQueries(batch_size=256),
            "replay_size": 20_000,
            "replay_batch_size": 256,
        },
    ),
    "noisy answers": (
        mechanisms.NoisyAnswer(noise_multiplier=2.0),
        {
            "queries": FreshQueries(batch_size=256),
            "replay_size": 20_000,
            "replay_batch_size": 256,
            "candidates_per_query": 2,
        },
    ),
}


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_class_that_is_rare_among_the_queries_is_learnt(name):
    mechanism, settings = MECHANISMS[name]

    def recall(balance):
        model = _transcriber(mechanism, balance, **settings)
        tiny.fit(model, 300)
        return _recall_of_the_rare_class(model)

    assert recall(True) > max(recall(False) + 0.1, 0.6)


def test_the_frequencies_are_those_the_student_sees_and_are_kept(tmp_path):
    mechanism, settings = MECHANISMS["answers"]
    model = _transcriber(mechanism, True, **settings)
    np.testing.assert_allclose(model.class_frequencies, [0.5, 0.5])
    tiny.fit(model, 300)
    frequencies = np.asarray(model.class_frequencies)
    assert 0.5 * RARE < frequencies[1] < 3 * RARE
    path = tmp_path / "checkpoint.keras"
    model.save_checkpoint(path)
    loaded = keras.saving.load_model(path)
    np.testing.assert_array_equal(loaded.class_frequencies, frequencies)
    assert loaded.balance_classes


def test_without_balancing_the_frequencies_stay_equal():
    model = tiny.transcriber()
    tiny.fit(model, 3)
    np.testing.assert_allclose(model.class_frequencies, 1 / tiny.CLASSES)


def test_balanced_rows_take_as_many_of_every_class_as_there_are():
    predicted = np.array([0] * 20 + [1] * 3 + [2] * 7)
    logits = tf.one_hot(np.random.default_rng(0).permutation(predicted), 3)
    rows = balanced_rows(logits, 12).numpy()
    assert len(set(rows)) == 12
    chosen = np.argmax(logits.numpy()[rows], -1)
    np.testing.assert_array_equal(np.bincount(chosen), [5, 3, 4])


def test_balanced_rows_of_one_class_are_the_first_ones():
    np.testing.assert_array_equal(balanced_rows(tf.ones([6, 3]), 4), range(4))
