"""Votes: sensitivity, noise, accounting of every query, and what a student learns."""

import math

import dp_accounting
import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from dp_transcribe.mechanisms import NoisyVotes
from dp_transcribe.mechanisms.base import Released
from dp_transcribe.mechanisms.noise import ANSWERS, NoiseSource, standard_normal
from dp_transcribe.mechanisms.noisy_votes import answer_confidently, check_seed
from dp_transcribe.privacy.events import leaves
from dp_transcribe.privacy.ledger import Ledger
from dp_transcribe.privacy.units import Relation, Unit
from dp_transcribe.queries import FreshQueries
from tests import tiny

TEACHERS, CLASSES, DELTA = 50, 10, 1e-5
SEED = tf.constant([3, 4], tf.int64)


def votes(rows, seed=0):
    """One vote of each teacher, `[rows, teachers]`."""
    return np.random.default_rng(seed).integers(0, CLASSES, (rows, TEACHERS))


def shares(ballots):
    counts = np.eye(CLASSES)[ballots].sum(1)
    return (counts / TEACHERS).astype(np.float32)


def release(mechanism, rows, prior=None, seed=SEED):
    prior = shares(votes(len(rows), 9)) if prior is None else prior
    return mechanism.release(tf.constant(rows), tf.constant(prior), seed)


@pytest.mark.parametrize("top_k", [None, 2, 4])
def test_a_neighbouring_shard_moves_the_counts_by_at_most_the_sensitivity(top_k):
    mechanism = NoisyVotes(num_teachers=TEACHERS, noise_multiplier=0.0, top_k=top_k)
    ballots = votes(300)
    other = ballots.copy()
    other[:, 7] = votes(300, 1)[:, 7]
    one, two = (release(mechanism, shares(b)).answers.numpy() for b in (ballots, other))
    moved = np.linalg.norm(one - two, axis=-1) * TEACHERS
    assert mechanism.sensitivity == math.sqrt(2)
    assert moved.max() == pytest.approx(mechanism.sensitivity, rel=1e-5)
    largest = [np.round(shares(b) * TEACHERS).max(-1) for b in (ballots, other)]
    moved = np.abs(largest[0] - largest[1]).max()
    assert moved == mechanism.threshold_sensitivity == 1.0


def test_noise_has_the_stated_deviation_on_the_candidates_and_nothing_else():
    mechanism = NoisyVotes(num_teachers=TEACHERS, noise_multiplier=3.0, top_k=4)
    assert mechanism.stddev == pytest.approx(3.0 * math.sqrt(2))
    rows = shares(votes(2000))
    out = release(mechanism, rows)
    keep = out.candidates.numpy() > 0
    assert np.all(keep.sum(-1) == 4)
    assert np.all(out.answers.numpy()[~keep] == 0)
    noise = ((out.answers.numpy() - rows) * TEACHERS)[keep]
    assert stats.kstest(noise, "norm", (0, mechanism.stddev)).pvalue > 1e-3
    for factor in (2 / 3, 1.5):
        wrong = (0, factor * mechanism.stddev)
        assert stats.kstest(noise, "norm", wrong).pvalue < 1e-6


def test_a_label_is_the_class_of_the_largest_noisy_count():
    kinds = ("votes", "label")
    noisy, label = (
        release(
            NoisyVotes(num_teachers=TEACHERS, noise_multiplier=2.0, released=kind),
            shares(votes(500)),
        ).answers.numpy()
        for kind in kinds
    )
    assert np.array_equal(noisy.argmax(-1), label.argmax(-1))
    assert np.all(np.sort(label, -1)[:, :-1] == 0) and np.all(label.max(-1) == 1)


def test_candidates_come_from_the_prior_alone():
    mechanism = NoisyVotes(num_teachers=TEACHERS, noise_multiplier=1.0, top_k=3)
    prior = shares(votes(40, 5))
    one, two = (release(mechanism, shares(votes(40, s)), prior) for s in (1, 2))
    assert np.array_equal(one.candidates, two.candidates)


def gaussian_epsilon(multiplier, count, relation=Relation.REPLACE_ONE):
    accountant = dp_accounting.rdp.RdpAccountant(neighboring_relation=relation)
    accountant.compose(dp_accounting.GaussianDpEvent(multiplier), count)
    return accountant.get_epsilon(DELTA)


def test_every_query_is_a_gaussian_of_the_stated_multiplier():
    mechanism = NoisyVotes(num_teachers=TEACHERS, noise_multiplier=40.0)
    assert mechanism.unit is Unit.RECORD
    assert mechanism.relation is Relation.REPLACE_ONE
    ledger, spend = Ledger(), FreshQueries(batch_size=8).spend(mechanism, 0)
    ledger.record(spend, 3 * mechanism.releases_per_batch(8))
    epsilon = ledger.epsilon(unit=Unit.RECORD, delta=DELTA)
    assert epsilon == pytest.approx(gaussian_epsilon(40.0, 24))
    assert epsilon == pytest.approx(
        gaussian_epsilon(mechanism.stddev / mechanism.sensitivity, 24)
    )


@pytest.mark.parametrize("threshold", [None, 30.0])
def test_calibration_spends_the_target_on_all_queries(threshold):
    queries = 500
    mechanism = NoisyVotes(num_teachers=TEACHERS, threshold=threshold).calibrated(
        1.0, DELTA, lambda e: dp_accounting.SelfComposedDpEvent(e, queries)
    )
    ledger = Ledger()
    ledger.record(FreshQueries().spend(mechanism, 0), queries)
    assert 0.99 < ledger.epsilon(unit=Unit.RECORD, delta=DELTA) <= 1.0


def test_a_check_costs_an_event_of_its_own():
    mechanism = NoisyVotes(
        num_teachers=TEACHERS, noise_multiplier=10.0, threshold=30, threshold_ratio=3.0
    )
    gaussians = [event.noise_multiplier for event, _ in leaves(mechanism.event())]
    assert sorted(gaussians) == [10.0, 30.0]
    assert mechanism.threshold_stddev == pytest.approx(30.0)
    assert mechanism.stddev == pytest.approx(10.0 * math.sqrt(2))


def test_the_check_has_a_seed_of_126_bits_that_no_vote_noise_tells(monkeypatch):
    used = []
    monkeypatch.setattr(
        NoisyVotes, "passes", lambda _, counts, seed: used.append(seed) or counts[:, 0]
    )
    source = NoiseSource(None)
    seed = source.stream(source.advance(), ANSWERS)
    mechanism = NoisyVotes(num_teachers=TEACHERS, noise_multiplier=1.0, threshold=9.0)
    release(mechanism, shares(votes(64)), seed=seed)
    (check,) = used
    assert check.dtype == tf.int64
    bits = [
        tf.random.stateless_uniform([10_000], seed, None, None, kind).numpy()
        for kind in (tf.int32, tf.int64)
    ]
    assert not np.intersect1d(check, np.concatenate(bits)).size
    # Nothing of the key is lost: both words lead back to the seed.
    np.testing.assert_array_equal(check_seed(check), seed)
    assert np.all(check.numpy() >= 0) and np.any(check.numpy() != seed.numpy())


def test_no_replica_draws_from_the_stream_of_a_check():
    source = NoiseSource(5)
    streams = {
        tuple(source.stream(number, purpose, part=part).numpy())
        for number in range(3)
        for purpose in range(4)
        for part in (*range(20), 10**6)
    }
    checks = {tuple(check_seed(tf.constant(s, tf.int64)).numpy()) for s in streams}
    assert len(checks) == len(streams) and not checks & streams


def test_the_noise_of_the_check_is_independent_of_that_of_the_votes():
    source, pairs = NoiseSource(5), []
    for number in range(200):
        seed = source.stream(tf.constant(number, tf.int64), ANSWERS)
        noise = standard_normal([50, CLASSES], seed)
        pairs.append(np.c_[standard_normal([50], check_seed(seed)), noise])
    correlations = np.corrcoef(np.concatenate(pairs), rowvar=False)[0, 1:]
    assert np.abs(correlations).max() < 4.5 / math.sqrt(200 * 50)


CONFIDENT = NoisyVotes(
    num_teachers=TEACHERS,
    noise_multiplier=2.0,
    threshold=30.0,
    threshold_ratio=2.0,
    released="label",
)


@pytest.mark.parametrize("agreeing", [0, 25, 60])
@pytest.mark.parametrize(("limit", "paid"), [(None, 60), (30, 30), (10, 10), (99, 60)])
def test_confident_answers_cost_what_was_fixed_before(limit, paid, agreeing):
    ballots = votes(60)
    ballots[:agreeing] = 3
    ledger = Ledger()
    out = answer_confidently(
        CONFIDENT,
        tf.constant(shares(ballots)),
        ledger,
        noise=NoiseSource(0),
        limit=limit,
    )
    answered = out.answered.numpy()
    expected = min(agreeing, paid)
    assert answered[:expected].all() and not answered[expected:].any()
    assert np.all(out.answers.numpy()[:expected].argmax(-1) == 3)
    assert [entry.count for entry in ledger.entries] == [60, paid]
    assert ledger.mechanisms(Unit.RECORD) == (
        "NoisyVotes (check)",
        "NoisyVotes (votes)",
    )
    accountant = dp_accounting.rdp.RdpAccountant(
        neighboring_relation=Relation.REPLACE_ONE
    )
    accountant.compose(dp_accounting.GaussianDpEvent(4.0), 60)
    accountant.compose(dp_accounting.GaussianDpEvent(2.0), paid)
    epsilon = ledger.epsilon(unit=Unit.RECORD, delta=DELTA)
    assert epsilon == pytest.approx(accountant.get_epsilon(DELTA))


def test_a_crash_in_the_check_has_been_paid_for(monkeypatch):
    def crash(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(NoisyVotes, "passes", crash)
    ledger = Ledger()
    with pytest.raises(KeyboardInterrupt):
        answer_confidently(
            CONFIDENT, tf.constant(shares(votes(9))), ledger, noise=NoiseSource(0)
        )
    assert ledger.releases(Unit.RECORD) == 18


def test_a_limit_below_one_is_refused():
    ledger = Ledger()
    with pytest.raises(ValueError, match="limit"):
        answer_confidently(
            CONFIDENT,
            tf.constant(shares(votes(3))),
            ledger,
            noise=NoiseSource(0),
            limit=0,
        )
    assert not ledger.entries


def test_a_confident_answer_needs_a_threshold():
    ledger, mechanism = Ledger(), NoisyVotes(num_teachers=TEACHERS)
    with pytest.raises(ValueError, match="threshold"):
        answer_confidently(
            mechanism, tf.constant(shares(votes(3))), ledger, noise=NoiseSource(0)
        )
    assert not ledger.entries


@pytest.mark.parametrize("released", ["votes", "label"])
def test_the_loss_is_least_for_the_class_that_was_voted_for(released):
    mechanism = NoisyVotes(
        num_teachers=TEACHERS, noise_multiplier=4.0, released=released
    )
    ballots = np.full((200, TEACHERS), 2)
    out = release(mechanism, shares(ballots))
    logits = 5.0 * tf.eye(CLASSES)
    losses = [
        float(tf.reduce_mean(mechanism.loss(out, tf.repeat(row[None], 200, 0))))
        for row in logits
    ]
    assert np.argmin(losses) == 2
    assert losses[2] < np.delete(losses, 2).min() - 0.5


def test_a_query_without_an_answer_teaches_nothing():
    mechanism = NoisyVotes(num_teachers=TEACHERS, noise_multiplier=1.0, threshold=9.0)
    nothing = Released(tf.zeros([4, CLASSES]), tf.zeros([4, CLASSES]))
    logits = tf.constant(np.random.default_rng(0).normal(size=(4, CLASSES)), tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = mechanism.loss(nothing, logits)
    assert np.allclose(tape.gradient(loss, logits), 0, atol=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_teachers": 1},
        {"num_teachers": 5, "noise_multiplier": -1.0},
        {"num_teachers": 5, "released": "gradients"},
        {"num_teachers": 5, "threshold": 0.0},
        {"num_teachers": 5, "top_k": 1},
    ],
    ids=lambda arguments: list(arguments)[-1],
)
def test_impossible_parameters_are_refused(arguments):
    with pytest.raises(ValueError, match=list(arguments)[-1]):
        NoisyVotes(**arguments)


def test_more_candidates_than_classes_are_refused():
    with pytest.raises(ValueError, match="top_k"):
        NoisyVotes(num_teachers=5, top_k=11).check(10)


def test_one_teacher_is_no_ensemble():
    with pytest.raises(ValueError, match="TeacherEnsemble"):
        tiny.transcriber(NoisyVotes(num_teachers=5))
