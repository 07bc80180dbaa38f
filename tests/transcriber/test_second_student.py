"""Two students learn from the same private answers; the generator pits them."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe import mechanisms
from dp_transcribe.generators import ConvGenerator
from dp_transcribe.losses import GeneratorObjective
from tests import tiny

ANSWERS = mechanisms.RandomizedResponse(epsilon=8.0)
DISAGREE = GeneratorObjective(
    one_hot=0.0, information_entropy=0.0, student_disagreement=1.0
)


def _generator():
    keras.utils.set_random_seed(4)
    return ConvGenerator(tiny.IMAGE, latent_dim=8)


def _model(**kwargs):
    settings = {
        "generator": _generator(),
        "second_student": tiny.linear_model(1, 0.1),
        "objective": DISAGREE,
        "optimizer": keras.optimizers.Adam(0.01),
        "eager": False,
    }
    return tiny.transcriber(ANSWERS, **{**settings, **kwargs})


def test_both_learn_and_the_second_costs_nothing():
    model = _model(generator=tiny.UniformPixels(tiny.IMAGE), objective=None)
    alone = _model(second_student=None, generator=tiny.UniformPixels(tiny.IMAGE))
    before = tiny.flat_weights(model.second_student)
    tiny.fit(model, 20)
    tiny.fit(alone, 20)
    assert np.abs(tiny.flat_weights(model.second_student) - before).max() > 0.01
    assert model.ledger.to_json() == alone.ledger.to_json()
    np.testing.assert_array_equal(
        tiny.flat_weights(model.student), tiny.flat_weights(alone.student)
    )


def test_the_generator_seeks_what_the_two_disagree_about():
    def disagreement(updates):
        model = _model(
            optimizer=keras.optimizers.SGD(0.0), generator_updates=max(updates, 1)
        )
        if updates:
            tiny.fit(model, 20)
        images = model.generator.sample(256, tf.constant([1, 2]))
        students = model.student, model.second_student
        first, second = (tf.nn.softmax(s(images)).numpy() for s in students)
        return np.abs(first - second).mean()

    assert disagreement(5) > 1.1 * disagreement(0)


def test_a_checkpoint_keeps_the_second_student(tmp_path):
    model = _model()
    tiny.fit(model, 3)
    model.save_checkpoint(tmp_path / "run.keras")
    loaded = keras.saving.load_model(tmp_path / "run.keras")
    for name in ("student", "second_student"):
        kept, own = getattr(loaded, name), getattr(model, name)
        np.testing.assert_array_equal(tiny.flat_weights(kept), tiny.flat_weights(own))
    tiny.fit(model, 3)
    loaded.run_eagerly = False
    tiny.fit(loaded, 3)
    np.testing.assert_allclose(
        tiny.flat_weights(loaded.second_student),
        tiny.flat_weights(model.second_student),
        atol=1e-6,
    )


def test_refusals():
    with pytest.raises(ValueError, match="argument `second_student`"):
        tiny.transcriber(second_student=tiny.linear_model(1))  # a gradient mechanism
    student = tiny.linear_model(0, 0.1)
    with pytest.raises(ValueError, match="shares no weights"):
        _model(student=student, second_student=student)
    with pytest.raises(ValueError, match="student_disagreement=0"):
        _model(second_student=None)
