"""The generator's updates against the student."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import dp_transcribe as dpt
from dp_transcribe.generators import MLPGenerator
from dp_transcribe.students import last_features
from tests import tiny

EXCITE = dpt.GeneratorObjective(one_hot=0.0, information_entropy=0.0, activation=1.0)


def transcriber(**arguments):
    generator = MLPGenerator(tiny.IMAGE, latent_dim=4, units=(16,))
    return tiny.transcriber(
        generator=generator,
        objective=EXCITE,
        eager=False,
        compile_arguments={"generator_optimizer": keras.optimizers.Adam(0.01)},
        **arguments,
    )


def test_a_generator_learns_to_excite_the_features_of_the_student():
    model = transcriber(student=tiny.conv_model(), optimizer=keras.optimizers.SGD(0.0))
    look, seed = last_features(model.student), tf.constant([1, 2])
    before = np.abs(look(model.generator.sample(200, seed))[0]).mean()
    history = model.fit(epochs=2, steps_per_epoch=40, verbose=0).history
    after = np.abs(look(model.generator.sample(200, seed))[0]).mean()
    assert after > 1.5 * before
    assert history["generator_loss"][1] < history["generator_loss"][0]


def test_a_student_without_features_is_refused():
    class Subclassed(keras.Model):
        def call(self, inputs):
            return inputs

    with pytest.raises(ValueError, match="`activation`"):
        last_features(Subclassed())
    # Features of a model inside are no tensor of the student.
    nested = keras.Sequential([keras.layers.Input(tiny.IMAGE), tiny.conv_model()])
    with pytest.raises(ValueError, match="`activation`"):
        transcriber(student=nested)
