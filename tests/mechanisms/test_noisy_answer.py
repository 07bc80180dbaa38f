"""A noisy answer is bounded, noised once, and its likelihood is the true one."""

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from dp_transcribe.mechanisms import NoisyAnswer
from dp_transcribe.mechanisms.base import Released
from dp_transcribe.mechanisms.candidates import top_candidates

CLASSES = 6
SEED = tf.constant([3, 4], tf.int64)
BOUND = 2.5


def random_rows(rows, seed=0, scale=3.0):
    logits = np.random.default_rng(seed).normal(0, scale, (rows, CLASSES))
    return tf.nn.softmax(tf.constant(logits, tf.float32)).numpy()


def released(mechanism, answers, prior=None, seed=SEED):
    prior = random_rows(len(answers), 9) if prior is None else prior
    return mechanism.release(tf.constant(answers), tf.constant(prior), seed)


@pytest.mark.parametrize("top_k", [None, 2, 4])
def test_an_answer_moves_its_row_by_at_most_the_sensitivity(top_k):
    mechanism = NoisyAnswer(noise_multiplier=0.0, l2_norm=BOUND, top_k=top_k)
    answers = random_rows(200)
    norms = np.linalg.norm(released(mechanism, answers).answers, axis=-1)
    assert mechanism.sensitivity == BOUND
    assert np.all(norms <= BOUND * (1 + 1e-5))
    assert np.median(norms) > 0.999 * BOUND


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38, 1e-38, -5.0])
def test_a_broken_answer_stays_within_the_bound_and_in_its_row(value):
    mechanism = NoisyAnswer(noise_multiplier=0.0, l2_norm=BOUND)
    answers = random_rows(3)
    whole = released(mechanism, answers).answers.numpy()
    answers[1, 2] = value
    rows = released(mechanism, answers).answers.numpy()
    assert np.all(np.isfinite(rows))
    assert np.linalg.norm(rows[1]) <= BOUND * (1 + 1e-5)
    assert np.array_equal(rows[[0, 2]], whole[[0, 2]])


def test_no_answer_and_an_answer_without_direction_release_noise_alone():
    mechanism = NoisyAnswer(noise_multiplier=0.0)
    rows = np.array([[np.nan] * CLASSES, [1 / CLASSES] * CLASSES], np.float32)
    assert np.all(released(mechanism, rows).answers.numpy() == 0)


@pytest.mark.parametrize("top_k", [None, 3])
def test_noise_has_the_stated_deviation_on_the_candidates_and_nothing_else(top_k):
    mechanism = NoisyAnswer(noise_multiplier=1.5, l2_norm=BOUND, top_k=top_k)
    out = released(mechanism, np.full((1000, CLASSES), np.nan, np.float32))
    keep = out.candidates.numpy() > 0
    noise = out.answers.numpy()
    assert np.all(noise[~keep] == 0)
    sample = noise[keep] / (1.5 * BOUND)
    assert stats.kstest(sample, "norm").pvalue > 1e-3
    assert stats.kstest(sample * 2 / 3, "norm").pvalue < 1e-6
    assert stats.kstest(sample * 3 / 2, "norm").pvalue < 1e-6


def test_noise_is_another_for_another_seed():
    mechanism, answers = NoisyAnswer(noise_multiplier=1.0), random_rows(500)
    one, same = (released(mechanism, answers).answers.numpy() for _ in range(2))
    other = released(mechanism, answers, seed=SEED + 1).answers.numpy()
    assert np.array_equal(one, same)
    clean = released(NoisyAnswer(noise_multiplier=0.0), answers).answers.numpy()
    correlation = np.corrcoef((one - clean).ravel(), (other - clean).ravel())[0, 1]
    assert abs(correlation) < 0.08


def test_candidates_come_from_the_prior_alone():
    mechanism = NoisyAnswer(noise_multiplier=1.0, top_k=3)
    prior = random_rows(20, 5)
    kept = [
        released(mechanism, random_rows(20, s), prior).candidates.numpy()
        for s in (1, 2)
    ]
    assert np.array_equal(kept[0], top_candidates(tf.constant(prior), 3).numpy())
    assert np.array_equal(*kept)


@pytest.mark.parametrize("top_k", [None, 2, 4])
def test_likelihood_is_the_gaussian_one_around_each_class(top_k):
    """Against the density of N(C·d_y, σ²C²) on the candidates, by definition."""
    mechanism = NoisyAnswer(noise_multiplier=2.0, l2_norm=BOUND, top_k=top_k)
    out = released(mechanism, random_rows(10))
    found = mechanism.log_likelihood(out).numpy()
    for row in range(10):
        members = np.flatnonzero(out.candidates.numpy()[row])
        values = out.answers.numpy()[row, members].astype(np.float64)
        density = []
        for member in members:
            direction = (members == member) - 1 / len(members)
            center = BOUND * direction / np.linalg.norm(direction)
            density.append(stats.norm.logpdf(values, center, 2.0 * BOUND).sum())
        expected = np.array(density) - np.mean(density)
        np.testing.assert_allclose(found[row, members], expected, atol=1e-4)
        outside = np.setdiff1d(np.arange(CLASSES), members)
        assert np.all(found[row, outside] == 0)


def test_likelihood_on_one_hot_answers_finds_the_truth():
    mechanism = NoisyAnswer(noise_multiplier=2.0)
    rows, truth = 4000, 2
    answers = np.eye(CLASSES, dtype=np.float32)[[truth] * rows]
    out = released(mechanism, answers, random_rows(rows, 1))
    logits = tf.Variable(tf.zeros([CLASSES]))
    for _ in range(200):
        with tf.GradientTape() as tape:
            row = tf.broadcast_to(logits, (rows, CLASSES))
            loss = tf.reduce_mean(mechanism.loss(out, row))
        logits.assign_sub(2.0 * tape.gradient(loss, logits))
    assert float(tf.nn.softmax(logits)[truth]) > 0.9


def test_likelihood_without_noise_is_finite():
    mechanism = NoisyAnswer(noise_multiplier=0.0)
    out = released(mechanism, random_rows(5))
    assert np.all(np.isfinite(mechanism.loss(out, tf.zeros([5, CLASSES]))))


def test_labels_point_to_the_largest_coordinate():
    rows = Released(tf.constant([[0.1, 0.7, -1.0]]), tf.ones([1, 3]))
    assert int(NoisyAnswer().labels(rows)[0]) == 1


def test_event_and_calibration():
    mechanism = NoisyAnswer().calibrated(1.0, 1e-5, lambda event: event)
    assert 4.0 < mechanism.event().noise_multiplier < 4.1
    with pytest.raises(ValueError, match="not known yet"):
        NoisyAnswer().event()
    with pytest.raises(ValueError, match="not known yet"):
        released(NoisyAnswer(), random_rows(2))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *[("noise_multiplier", v) for v in (-1.0, np.nan, np.inf)],
        *[("l2_norm", v) for v in (0.0, -1.0, np.nan, np.inf)],
        *[("top_k", v) for v in (0, 1, 2.5)],
    ],
)
def test_parameters_out_of_range_are_refused(argument, value):
    with pytest.raises(ValueError, match=f"`{argument}`"):
        NoisyAnswer(**{argument: value})


def test_k_above_the_number_of_classes_is_refused():
    with pytest.raises(ValueError, match="`top_k`"):
        NoisyAnswer(top_k=CLASSES + 1).check(CLASSES)


def test_candidates_are_two_where_the_prior_is_sure_and_all_where_it_is_not():
    mechanism = NoisyAnswer(noise_multiplier=1.0, smoothing=0.3)
    sure = np.full(10, 0.002)
    sure[[3, 7]] = 0.7, 0.284
    prior = tf.constant(np.stack([np.full(10, 0.1), sure]), tf.float32)
    answers = tf.one_hot([1, 7], 10)
    released = mechanism.release(answers, prior, tf.constant([1, 2], tf.int64))
    np.testing.assert_array_equal(released.candidates[0], np.ones(10))
    np.testing.assert_array_equal(np.flatnonzero(released.candidates[1]), [3, 7])


def test_k_is_fixed_or_chosen_but_not_both():
    with pytest.raises(ValueError, match="argument `smoothing`"):
        NoisyAnswer(top_k=3, smoothing=0.3)
