"""The sum over teachers: its sensitivity, its noise, and that it is the gradient."""

import math

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from dp_transcribe.mechanisms import EnsembleGradient
from dp_transcribe.mechanisms.base import MAX_LOSS, Batch
from dp_transcribe.mechanisms.ensemble_gradient import SPACES
from dp_transcribe.privacy.units import Relation, Unit
from tests import tiny

TEACHERS, ROWS = 6, 8


def answers(seed=0, scale=4.0, teachers=TEACHERS):
    logits = np.random.default_rng(seed).normal(
        0, scale, (ROWS, teachers, tiny.CLASSES)
    )
    return tf.nn.softmax(tf.constant(logits, tf.float32)).numpy()


def images():
    random = np.random.default_rng(7)
    return tf.constant(random.uniform(size=(ROWS, *tiny.IMAGE)), tf.float32)


def mechanism(**kwargs):
    arguments = {"num_teachers": TEACHERS, "noise_multiplier": 0.0, "l2_norm": 0.1}
    return EnsembleGradient(**{**arguments, **kwargs})


def no_noise(shape):
    return tf.zeros(shape)


def summed(what, given, student=None, noise=no_noise):
    batch = Batch(images(), tf.constant(given), tf.ones([ROWS]))
    return what.summed(student or tiny.linear_model(0, 0.1), batch, noise)


class Rows(tf.Module):
    """A student whose only weights are its logits: gradients are rows of logits."""

    def __init__(self):
        self.logits = tf.Variable(np.random.default_rng(3).normal(size=(ROWS, 10)))
        self.logits = tf.Variable(tf.cast(self.logits, tf.float32))

    @property
    def trainable_variables(self):
        return [self.logits]

    def __call__(self, queries, training):
        return tf.identity(self.logits)


def contribution(what, release):
    """What was released in the units of the bound, as one vector."""
    scale = math.sqrt(ROWS) if what.space == "logits" else 1.0
    parts = [np.ravel(g) * scale for g in release.gradients]
    return np.concatenate([*parts, release.statistics])


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("broken", [None, np.nan, np.inf, 1e30])
def test_a_replaced_teacher_moves_the_release_by_at_most_the_sensitivity(space, broken):
    what = mechanism(space=space, monitor_share=0.3)
    given, other = answers(), answers()
    # One teacher that is sure of what the others doubt, and its opposite.
    given[:, 2] = np.eye(tiny.CLASSES)[np.zeros(ROWS, int)]
    other[:, 2] = np.eye(tiny.CLASSES)[np.ones(ROWS, int)]
    if broken is not None:
        other[3, 2, 5] = broken
    one, two = (
        contribution(what, summed(what, tf.cast(a, tf.float32), Rows()))
        for a in (given, other)
    )
    assert np.all(np.isfinite(two))
    assert what.sensitivity == 2 * what.l2_norm
    moved = np.linalg.norm(one - two)
    assert 0.3 * what.sensitivity < moved <= what.sensitivity * (1 + 1e-5)


@pytest.mark.parametrize("space", SPACES)
def test_without_bound_and_noise_it_is_the_mean_gradient(space):
    what, given = mechanism(space=space, l2_norm=1e6), answers()
    student = tiny.conv_model()
    release = summed(what, given, student)
    with tf.GradientTape() as tape:
        log_probabilities = tf.nn.log_softmax(student(images()))[:, None]
        losses = -tf.reduce_sum(given * log_probabilities, -1)
        loss = tf.reduce_mean(losses)
    expected = tape.gradient(loss, student.trainable_variables)
    for sum_, mean in zip(release.gradients, expected, strict=True):
        assert np.allclose(sum_ / what.divisor(ROWS), mean, atol=1e-6)
    agreement, shown = what.progress(release, ROWS)
    agree = np.argmax(student(images()), -1)[:, None] == np.argmax(given, -1)
    assert float(agreement) == pytest.approx(np.mean(agree), abs=1e-5)
    bounded = np.clip(losses.numpy() / MAX_LOSS, 0, 1) * MAX_LOSS
    assert float(shown) == pytest.approx(np.mean(bounded), rel=1e-4)


@pytest.mark.parametrize("space", SPACES)
def test_clipping_bounds_each_teacher_by_itself(space):
    what = mechanism(space=space)
    whole = contribution(what, summed(what, answers(), Rows()))[:-2]
    singly = 0.0
    for teacher in range(TEACHERS):
        alone = answers()[:, teacher : teacher + 1]
        part = contribution(what, summed(what, alone, Rows()))[:-2]
        assert np.linalg.norm(part) == pytest.approx(what.gradient_norm, rel=1e-4)
        singly = singly + part
    assert np.allclose(whole, singly, atol=1e-5)


def test_rows_of_logits_carry_the_stated_noise():
    what = mechanism(noise_multiplier=4.0)
    assert what.stddev == pytest.approx(4.0 * 2 * 0.1)

    def released(noise):
        return contribution(what, summed(what, answers(), Rows(), noise=noise))[:-2]

    quiet = released(no_noise)
    draws = [
        released(lambda shape, seed=seed: tf.random.stateless_normal(shape, [1, seed]))
        for seed in range(30)
    ]
    noise = np.ravel(draws - quiet)
    assert stats.kstest(noise, "norm", (0, what.stddev)).pvalue > 1e-3
    for factor in (2 / 3, 1.5):
        wrong = (0, factor * what.stddev)
        assert stats.kstest(noise, "norm", wrong).pvalue < 1e-6
    assert what.shared_stddevs == (0.0, what.stddev)
    weights = mechanism(noise_multiplier=4.0, space="weights")
    assert weights.shared_stddevs == (weights.stddev, weights.stddev)


def test_it_protects_records_and_composes_over_updates():
    what = mechanism(noise_multiplier=5.0)
    assert what.unit is Unit.RECORD and what.relation is Relation.REPLACE_ONE
    assert what.event().noise_multiplier == 5.0
    assert what.releases_per_batch(1000) == 1


@pytest.mark.parametrize(
    "arguments", [{"num_teachers": 1}, {"space": "images"}, {"l2_norm": 0.0}]
)
def test_impossible_parameters_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        mechanism(**arguments)
