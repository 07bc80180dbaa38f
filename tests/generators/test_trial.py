"""Sources that would ask the same queries again are refused."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe.generators.base import ProceduralGenerator
from dp_transcribe.generators.conv_generator import ConvGenerator
from dp_transcribe.generators.priors import DOMAINS, default_prior
from dp_transcribe.generators.trial import check_draws
from tests import tiny

RNG = np.random.default_rng(0)


class Source:
    """Asked through `make(n, seed)`."""

    image_shape, output_range = tiny.IMAGE, (0.0, 1.0)

    def __init__(self, make):
        self.make = make

    def sample(self, n, seed):
        return self.make(n, seed)


def uniform(n, seed):
    return tf.random.stateless_uniform([n, *tiny.IMAGE], seed)


def of_numpy(n, seed):
    """As many as any n may be, so that the graph takes them."""
    return tf.constant(RNG.uniform(size=(64, *tiny.IMAGE)), tf.float32)[:n]


def in_python(n, seed):
    return uniform(n, tf.constant(RNG.integers(1000, size=2), tf.int32))


@pytest.mark.parametrize(
    "make",
    [
        of_numpy,
        in_python,
        lambda n, seed: uniform(n, [1, 2]),
        lambda n, seed: tf.repeat(uniform(1, seed), n, 0),
        lambda n, seed: uniform(n, seed) / 1e4,
    ],
    ids=["numpy", "seed from Python", "seed ignored", "one image", "too alike"],
)
def test_images_that_do_not_follow_from_the_seed_are_refused(make):
    with pytest.raises(ValueError, match="`generator`.*seed"):
        tiny.transcriber(generator=Source(make))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda n, seed: uniform(n, seed)[:, 1:], "shape"),
        (lambda n, seed: uniform(n, seed) * 2.0, r"within 0\.0\.\.1\.0"),
        (lambda n, seed: uniform(n, seed) * np.nan, "finite"),
        (lambda n, seed: uniform(int(n), seed), "graph"),
        (lambda n, seed: RNG.uniform(size=(n, *tiny.IMAGE)), "graph"),
    ],
    ids=["shape", "range", "NaN", "no graph", "NumPy of n"],
)
def test_images_that_cannot_be_asked_about_are_refused(make, words):
    with pytest.raises(ValueError, match=f"`public_prior`.*{words}"):
        tiny.transcriber(generator=ConvGenerator(tiny.IMAGE), public_prior=Source(make))


class Lists(keras.Model):
    """A generator of one's own whose inputs are a list."""

    image_shape, output_range = tiny.IMAGE, (0.0, 1.0)

    def __init__(self, kind=list):
        super().__init__()
        self.kind = kind
        self.dense = keras.layers.Dense(64, activation="sigmoid")

    def call(self, latents):
        return tf.reshape(self.dense(latents), (-1, *tiny.IMAGE))

    def draw_inputs(self, n, seed):
        return self.kind([tf.random.stateless_normal([n, 4], seed)])

    def sample(self, n, seed):
        return self(*self.draw_inputs(n, seed))


def test_inputs_of_a_generator_that_learns_are_a_tuple():
    with pytest.raises(ValueError, match="`generator`.*tuple.*list"):
        tiny.transcriber(generator=Lists())


def test_a_generator_that_was_never_called_is_built():
    generator = Lists(tuple)
    before = tiny.transcriber(generator=generator)
    assert len(generator.trainable_variables) == 2
    assert before.generator_optimizer.built


@pytest.mark.parametrize("domain", DOMAINS)
def test_priors_of_the_library_pass(domain):
    shape = (32, 32, 3) if domain == "natural" else (28, 28, 1)
    check_draws("prior", default_prior(shape, domain=domain))


def test_who_vouches_for_a_source_is_believed():
    class Fixed(ProceduralGenerator):
        asked_once = True

        def draw(self, draws):
            return tf.zeros([draws.n, *self.image_shape])

    check_draws("prior", Fixed(tiny.IMAGE))
