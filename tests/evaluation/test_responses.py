"""Canary audits of unit RESPONSE: no false alarm, and every planted bug is flagged."""

import pytest
import tensorflow as tf

from dp_transcribe.evaluation import audit_responses
from dp_transcribe.mechanisms import (
    ClippedGradient,
    NoisyAnswer,
    NormalizedGradient,
    NormalizedOutputGradient,
    RandomizedResponse,
    SelectiveRandomizedResponse,
    noise,
    noisy_answer,
    randomized_response,
)
from dp_transcribe.mechanisms.base import Released
from dp_transcribe.mechanisms.clipping.bound import Bound
from dp_transcribe.mechanisms.noise import NoiseSource
from dp_transcribe.privacy import Unit
from dp_transcribe.queries import FreshQueries, QueryPool, dequantize
from dp_transcribe.transcriber import gradient_learning
from dp_transcribe.transcriber.answer_learning import AnswerLearner

POOL = QueryPool(size=500, batch_size=50, updates=30)
AUDITED = {
    "normalized": (NormalizedGradient(), FreshQueries()),
    "clipped": (ClippedGradient(), FreshQueries()),
    "output": (NormalizedOutputGradient(), FreshQueries()),
    "pool": (NormalizedGradient(), POOL),
    "noisy answer": (NoisyAnswer(), FreshQueries()),
    "response": (RandomizedResponse(), FreshQueries()),
    "selective": (SelectiveRandomizedResponse(smoothing=0.5), FreshQueries()),
}


def audit(name, **kwargs):
    mechanism, queries = AUDITED[name]
    settings = {"canaries": 4000, "confidence": 0.99, "seed": 2, **kwargs}
    return audit_responses(mechanism, queries, **settings)


@pytest.mark.parametrize("name", AUDITED)
def test_correct_code_is_not_flagged_and_the_bound_is_not_zero(name):
    result = audit(name, target_epsilon=4.0)
    assert not result.flagged, result
    assert result.unit is Unit.RESPONSE
    assert result.claimed_epsilon <= 4.0
    found = max(result.epsilon_lower_bound, result.gaussian_lower_bound or 0.0)
    assert found > (0.3 if name == "pool" else 1.0)


@pytest.mark.parametrize("name", AUDITED)
def test_correct_code_is_not_flagged_as_mutants_are(name):
    assert not audit(name).flagged


def test_a_pure_mechanism_is_audited_without_delta_and_tightly():
    result = audit("response", target_epsilon=1.0)
    assert result.delta == 0.0
    assert result.gaussian_lower_bound is None
    assert 0.5 < result.epsilon_lower_bound <= 1.0


def test_a_pool_keeps_its_sampling_probability_and_its_claim():
    method = QueryPool(size=100_000, batch_size=1000, updates=200)
    mechanism = NormalizedGradient()
    result = audit_responses(mechanism, method, canaries=400, seed=1)
    assert result.canaries % 400 == 0
    assert 0.98 <= result.claimed_epsilon <= 1.0


def test_noise_that_is_too_small_for_the_claim_is_told_from_more_noise():
    """The bound follows the noise: power, whatever the claim says."""
    bounds = []
    for multiplier in (8.0, 2.0, 0.5):
        mechanism = NormalizedGradient(noise_multiplier=multiplier)
        result = audit_responses(mechanism, target_epsilon=None, canaries=2000, seed=3)
        assert not result.flagged
        bounds.append(result.gaussian_lower_bound)
    # The truth at delta 1e-5: 0.46, 2.1 and 10.6.
    assert bounds[0] < 0.46
    assert 0.3 < bounds[1] < 2.1 < bounds[2]


def without_noise(monkeypatch):
    scale_noise(monkeypatch, 0.0)


def weak_noise(monkeypatch):
    scale_noise(monkeypatch, 0.3)


def scale_noise(monkeypatch, factor):
    drawn = noise.standard_normal
    for module in (gradient_learning, noise, noisy_answer):
        monkeypatch.setattr(module, "standard_normal", lambda *a: factor * drawn(*a))


def certain_response(monkeypatch):
    monkeypatch.setattr(
        randomized_response,
        "_stateless_choice",
        lambda logits, seed: tf.argmax(logits, -1),
    )


def without_clipping(monkeypatch):
    def factors(self, squared_norms, mask=None):
        finite = tf.math.is_finite(squared_norms)
        kept = tf.where(finite, tf.ones_like(squared_norms), 0.0)
        return kept if mask is None else kept * mask

    monkeypatch.setattr(Bound, "factors", factors)


def reused_noise(monkeypatch):
    drawn = NoiseSource.normal_like
    first = tf.zeros([], tf.int64)
    monkeypatch.setattr(
        NoiseSource,
        "normal_like",
        lambda self, tensors, *, number: drawn(self, tensors, number=first),
    )


def reused_stream(monkeypatch):
    """As `reused_noise`, for noise of rows and of answers."""
    drawn, first = NoiseSource.stream, tf.zeros([], tf.int64)
    monkeypatch.setattr(
        NoiseSource,
        "stream",
        lambda self, number, *a, **kwargs: drawn(self, first, *a, **kwargs),
    )


def labels_drawn_again(monkeypatch):
    """Before every update the stored queries are answered anew."""
    update = AnswerLearner.update

    def redraw(self):
        owner, replay = self.owner, self.replay
        images = dequantize(replay.codes, self.output_range)
        answers = owner.teacher.probabilities(images)
        prior = tf.nn.softmax(owner.student(images))
        seed = owner.noise.stream(owner.noise.advance(), 1)
        released = self.mechanism.release(answers, prior, seed)
        replay.released.assign(tf.stack([released.answers, released.candidates], 1))
        return update(self)

    monkeypatch.setattr(AnswerLearner, "update", redraw)


def candidates_of_the_teacher(monkeypatch):
    """Candidates are chosen from the scores that they are to protect."""
    release = RandomizedResponse.release

    def from_scores(self, answers, prior, seed):
        released = release(self, answers, answers, seed)
        return Released(released.answers, released.candidates)

    monkeypatch.setattr(SelectiveRandomizedResponse, "release", from_scores)


MUTANTS = [
    ("normalized", without_noise),
    ("normalized", weak_noise),
    ("normalized", without_clipping),
    ("normalized", reused_noise),
    ("clipped", without_noise),
    ("clipped", weak_noise),
    ("clipped", without_clipping),
    ("clipped", reused_noise),
    ("output", without_noise),
    ("output", weak_noise),
    ("output", reused_stream),
    ("noisy answer", without_noise),
    ("noisy answer", weak_noise),
    ("noisy answer", reused_stream),
    ("response", certain_response),
    ("response", reused_stream),
    ("selective", certain_response),
    ("selective", reused_stream),
    ("selective", candidates_of_the_teacher),
    ("pool", without_noise),
    ("pool", weak_noise),
    ("pool", without_clipping),
    ("pool", reused_noise),
]


@pytest.mark.parametrize(("name", "mutant"), MUTANTS)
def test_a_planted_bug_is_flagged(name, mutant, monkeypatch):
    mutant(monkeypatch)
    result = audit(name)
    assert result.claimed_epsilon <= 1.0  # it still claims what it always did
    assert result.flagged, result


@pytest.mark.parametrize("name", ["response", "selective", "noisy answer"])
def test_labels_drawn_again_are_flagged(name, monkeypatch):
    labels_drawn_again(monkeypatch)
    mechanism, queries = AUDITED[name]
    result = audit_responses(mechanism, queries, canaries=1000, seed=2)
    assert result.flagged, result


def test_many_looks_at_stored_labels_show_no_more_than_one():
    mechanism, queries = AUDITED["response"]
    result = audit_responses(mechanism, queries, canaries=1000, seed=2)
    assert not result.flagged, result


@pytest.mark.slow
@pytest.mark.parametrize("name", ["response", "normalized"])
def test_false_alarms_are_as_rare_as_promised(name):
    flagged = [
        audit(name, canaries=1000, confidence=0.9, seed=seed).flagged
        for seed in range(40)
    ]
    assert sum(flagged) <= 9  # 4 expected at most; 9 or less in 99 % of the cases
