"""The channel is exactly the stated one, and its epsilon is what it costs."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from dp_transcribe.mechanisms import RandomizedResponse, SelectiveRandomizedResponse
from dp_transcribe.mechanisms.base import Released
from dp_transcribe.privacy.events import PureDpEvent
from dp_transcribe.privacy.units import Relation

ROWS = 20_000
CLASSES = 5
EPSILON = 1.3
PRIOR = np.array([0.1, 0.4, 0.05, 0.3, 0.15], np.float32)
NAN = np.full(CLASSES, np.nan, np.float32)


def one_hot(label):
    return np.eye(CLASSES, dtype=np.float32)[label]


def frequencies(mechanism, answer, prior=PRIOR, seed=1):
    """How often each class comes out for one answer and prior, `[classes]` counts."""
    rows = (ROWS, CLASSES)
    released = mechanism.release(
        tf.constant(np.broadcast_to(answer, rows)),
        tf.constant(np.broadcast_to(prior, rows)),
        tf.constant([seed, 7], tf.int64),
    )
    answers = released.answers.numpy()
    assert np.all(answers.sum(-1) == 1) and set(np.unique(answers)) <= {0.0, 1.0}
    return answers.sum(0)


def exact(epsilon, label, members):
    """Definition of randomised response among `members`, `[classes]`."""
    k = len(members)
    total = np.exp(epsilon) + k - 1
    probabilities = np.zeros(CLASSES)
    for member in members:
        probabilities[member] = (
            (np.exp(epsilon) if member == label else 1.0) / total
            if label in members
            else 1.0 / k
        )
    return probabilities


def p_value(counts, probabilities):
    inside = probabilities > 0
    assert counts[~inside].sum() == 0
    return stats.chisquare(counts[inside], ROWS * probabilities[inside]).pvalue


CASES = [
    pytest.param(RandomizedResponse(epsilon=EPSILON), 2, range(5), id="plain"),
    pytest.param(
        SelectiveRandomizedResponse(epsilon=EPSILON, top_k=3), 3, [1, 3, 4], id="in"
    ),
]


@pytest.mark.parametrize(("mechanism", "label", "members"), CASES)
def test_probabilities_are_exact_when_the_truth_is_a_candidate(
    mechanism, label, members
):
    counts = frequencies(mechanism, one_hot(label))
    assert p_value(counts, exact(EPSILON, label, members)) > 1e-3
    for wrong in (EPSILON * 2 / 3, EPSILON * 3 / 2):
        assert p_value(counts, exact(wrong, label, members)) < 1e-6


@pytest.mark.parametrize(
    "answer", [one_hot(0), NAN, np.full(CLASSES, np.inf, np.float32)]
)
def test_truth_outside_of_the_candidates_or_broken_gives_a_uniform_answer(answer):
    mechanism = SelectiveRandomizedResponse(epsilon=EPSILON, top_k=3)
    counts = frequencies(mechanism, answer)
    assert p_value(counts, exact(EPSILON, None, [1, 3, 4])) > 1e-3


def test_a_broken_answer_to_the_plain_mechanism_is_uniform():
    counts = frequencies(RandomizedResponse(epsilon=EPSILON), NAN)
    assert p_value(counts, exact(EPSILON, None, range(5))) > 1e-3


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_broken_score_breaks_the_whole_answer(value):
    """NaN must not decide the label by how argmax happens to treat it."""
    answer = one_hot(1)
    answer[3] = value
    counts = frequencies(RandomizedResponse(epsilon=8.0), answer)
    assert p_value(counts, exact(8.0, None, range(5))) > 1e-3


def test_two_draws_of_one_seed_are_equal_and_of_two_seeds_independent():
    mechanism = RandomizedResponse(epsilon=EPSILON)
    first, again = (frequencies(mechanism, one_hot(1)) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, frequencies(mechanism, one_hot(1), seed=2))


def channel(mechanism, prior):
    """P(release | true class) `[true, released]` from the definition."""
    members = np.flatnonzero(mechanism.candidates(tf.constant(prior[None])).numpy()[0])
    return np.array(
        [exact(mechanism.epsilon, y, members) for y in [*range(CLASSES), None]]
    )


MECHANISMS = [
    RandomizedResponse(epsilon=EPSILON),
    SelectiveRandomizedResponse(epsilon=EPSILON),
    SelectiveRandomizedResponse(epsilon=0.2, min_k=1),
    *(SelectiveRandomizedResponse(epsilon=EPSILON, top_k=k) for k in range(1, 6)),
]


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=repr)
def test_no_output_tells_two_labels_apart_by_more_than_epsilon(mechanism):
    """All pairs of labels, and of a label and no label, under one public prior."""
    rows = channel(mechanism, PRIOR)
    worst = 0.0
    for one, other in itertools.permutations(rows, 2):
        possible = (one > 0) | (other > 0)
        worst = max(worst, np.log(one[possible] / other[possible]).max())
    assert worst <= mechanism.epsilon * (1 + 1e-9)
    assert mechanism.event() == PureDpEvent(mechanism.epsilon)
    assert mechanism.relation is Relation.REPLACE_ONE


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=repr)
def test_likelihood_is_the_channels_up_to_a_constant_of_the_row(mechanism):
    prior = tf.constant(np.broadcast_to(PRIOR, (CLASSES, CLASSES)))
    keep = mechanism.candidates(prior)
    members = np.flatnonzero(keep.numpy()[0])
    outputs = Released(tf.gather(tf.eye(CLASSES), members), tf.gather(keep, members))
    found = mechanism.log_likelihood(outputs).numpy()
    expected = np.log(channel(mechanism, PRIOR)[:CLASSES, members]).T
    offset = (found - expected)[:, :1]
    np.testing.assert_allclose(found - offset, expected, atol=1e-5)


@pytest.mark.parametrize("mechanism", MECHANISMS[:2] + MECHANISMS[5:], ids=repr)
def test_likelihood_on_the_exact_channel_is_best_at_the_truth(mechanism):
    """Expected loss over releases, as a function of one row of logits."""
    truth = 1
    prior = tf.constant(np.broadcast_to(PRIOR, (CLASSES, CLASSES)))
    outputs = Released(tf.eye(CLASSES), mechanism.candidates(prior))
    weights = tf.constant(channel(mechanism, PRIOR)[truth], tf.float32)
    logits = tf.Variable(tf.zeros([CLASSES]))
    for _ in range(60):
        with tf.GradientTape() as tape:
            row = tf.broadcast_to(logits, (CLASSES, CLASSES))
            losses = mechanism.loss(outputs, row)
            expected = tf.reduce_sum(tf.where(weights > 0, weights * losses, 0.0))
        logits.assign_sub(10.0 * tape.gradient(expected, logits))
    assert float(tf.nn.softmax(logits)[truth]) > 0.95


def test_what_lies_outside_of_the_candidates_gains_nothing_by_an_answer():
    """A release says nothing of the other classes: their total stays at the prior."""
    mechanism = SelectiveRandomizedResponse(epsilon=EPSILON, top_k=2)
    members, k = np.array([1, 3]), 2
    keep = mechanism.candidates(tf.constant(PRIOR[None]))
    assert np.flatnonzero(keep.numpy()[0]).tolist() == members.tolist()
    posterior = np.zeros(CLASSES)
    rows = channel(mechanism, PRIOR)[:CLASSES]
    for member in members:
        released = Released(tf.constant(one_hot(member)[None]), keep)
        likelihood = np.exp(mechanism.log_likelihood(released).numpy()[0])
        joint = PRIOR * likelihood
        marginal = float(PRIOR @ rows[:, member])
        posterior += marginal * joint / joint.sum()
    np.testing.assert_allclose(posterior, PRIOR, atol=1e-5)
    assert k == keep.numpy().sum()


def brute_force_k(epsilon, prior, min_k):
    """RRWithPrior by definition: k with the largest probability of the truth."""
    ordered = np.sort(prior.astype(np.float64))[::-1]
    truth = {
        k: np.exp(epsilon) / (np.exp(epsilon) + k - 1) * ordered[:k].sum()
        for k in range(min_k, len(prior) + 1)
    }
    return max(truth, key=truth.get)


@pytest.mark.parametrize("epsilon", [0.1, 0.5, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("min_k", [1, 2, 3])
def test_k_is_that_of_rr_with_prior(epsilon, min_k):
    random = np.random.default_rng(0)
    priors = random.dirichlet(np.full(CLASSES, 0.4), 300).astype(np.float32)
    mechanism = SelectiveRandomizedResponse(epsilon=epsilon, min_k=min_k)
    keep = mechanism.candidates(tf.constant(priors)).numpy()
    expected = [brute_force_k(epsilon, prior, min_k) for prior in priors]
    assert keep.sum(-1).astype(int).tolist() == expected
    lowest_kept = np.where(keep > 0, priors, 2.0).min(-1)
    highest_left = np.where(keep > 0, -1.0, priors).max(-1)
    assert np.all(lowest_kept >= highest_left)


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=repr)
def test_candidates_come_from_the_prior_alone(mechanism):
    prior = tf.constant(np.broadcast_to(PRIOR, (CLASSES + 1, CLASSES)))
    answers = tf.constant(np.vstack([np.eye(CLASSES, dtype=np.float32), NAN]))
    seed = tf.constant([1, 2], tf.int64)
    keep = mechanism.release(answers, prior, seed).candidates.numpy()
    assert np.all(keep == keep[0])


@pytest.mark.parametrize("epsilon", [50.0, 100.0, 1000.0])
@pytest.mark.parametrize("top_k", [None, 3])
def test_a_huge_epsilon_tells_the_truth_and_stays_finite(epsilon, top_k):
    mechanism = SelectiveRandomizedResponse(epsilon=epsilon, top_k=top_k)
    prior = tf.constant(PRIOR[None])
    answer, seed = tf.constant(one_hot(3)[None]), tf.constant([1, 2], tf.int64)
    released = mechanism.release(answer, prior, seed)
    assert int(mechanism.labels(released)[0]) == 3
    assert released.candidates.numpy().sum() == (top_k or CLASSES)
    assert np.all(np.isfinite(mechanism.log_likelihood(released)))
    sure = tf.constant(20 * one_hot(3)[None])
    assert float(mechanism.loss(released, sure)[0]) < 1e-3


@pytest.mark.parametrize("prior", [np.eye(5)[1], np.zeros(5), np.full(5, 0.2)])
def test_a_prior_that_is_sure_or_says_nothing_is_no_trouble(prior):
    mechanism = SelectiveRandomizedResponse(epsilon=EPSILON)
    keep = mechanism.candidates(tf.constant(prior[None], tf.float32)).numpy()
    assert 2 <= keep.sum() <= CLASSES


def test_a_prior_that_is_not_a_number_still_gives_candidates():
    """A student that diverged must not switch the noise off."""
    mechanism = SelectiveRandomizedResponse(epsilon=EPSILON, top_k=3)
    counts = frequencies(mechanism, one_hot(1), prior=NAN)
    assert (counts > 0).sum() == 3
    chosen = SelectiveRandomizedResponse(epsilon=EPSILON)
    counts = frequencies(chosen, one_hot(1), prior=NAN)
    assert (counts > 0).sum() >= 2


@pytest.mark.parametrize("kind", [RandomizedResponse, SelectiveRandomizedResponse])
def test_calibrated_takes_the_target_as_epsilon(kind):
    mechanism = kind().calibrated(0.7, 1e-5, lambda event: event)
    assert mechanism.event() == PureDpEvent(0.7)
    assert mechanism.is_calibrated and not kind().is_calibrated
    with pytest.raises(ValueError, match="not known yet"):
        kind().event()


@pytest.mark.parametrize("kind", [RandomizedResponse, SelectiveRandomizedResponse])
@pytest.mark.parametrize("epsilon", [0, -1.0, np.nan, np.inf])
def test_an_epsilon_that_is_none_is_refused(kind, epsilon):
    with pytest.raises(ValueError, match="`epsilon`"):
        kind(epsilon=epsilon)


@pytest.mark.parametrize("top_k", [0, 6, 1.5])
def test_k_outside_of_one_to_classes_is_refused(top_k):
    with pytest.raises(ValueError, match="`top_k`"):
        SelectiveRandomizedResponse(top_k=top_k).check(CLASSES)


@pytest.mark.parametrize("min_k", [0, 6])
def test_least_k_outside_of_one_to_classes_is_refused(min_k):
    with pytest.raises(ValueError, match="`min_k`"):
        SelectiveRandomizedResponse(min_k=min_k).check(CLASSES)
