"""What a transcription costs is what the ledger and the progress bar say."""

import dp_accounting
import numpy as np
import pytest

from dp_transcribe.mechanisms import (
    ClippedGradient,
    NoisyAnswer,
    NormalizedGradient,
    NormalizedOutputGradient,
    RandomizedResponse,
    SelectiveRandomizedResponse,
)
from dp_transcribe.privacy.units import Unit
from dp_transcribe.queries import QueryPool
from dp_transcribe.transcriber.gradient_learning import GradientLearner
from tests import tiny
from tests.tiny import POOL, Watch, epsilon, fit, releases


@pytest.mark.parametrize(
    ("mechanism", "queries"),
    [
        (NormalizedGradient(), None),
        (ClippedGradient(), POOL),
        (NormalizedOutputGradient(), None),
        (NoisyAnswer(), None),
        (RandomizedResponse(), None),
        (SelectiveRandomizedResponse(), None),
    ],
)
def test_a_target_is_reached_and_not_passed(mechanism, queries):
    model = tiny.transcriber(mechanism, queries=queries)
    fit(model, 10, target_epsilon=2.0, delta=tiny.DELTA)
    assert 0.99 * 2.0 < epsilon(model) <= 2.0
    statement = model.privacy_statement()
    assert statement.epsilon <= 2.0 and statement.unit is Unit.RESPONSE
    assert statement.delta in (0.0, tiny.DELTA)
    assert statement.mechanism == mechanism.name


def test_fresh_queries_cost_one_gaussian_whatever_the_steps():
    model = tiny.transcriber(NormalizedGradient(noise_multiplier=4.0))
    fit(model, 3)
    first = epsilon(model)
    fit(model, 5, epochs=2)
    accountant = dp_accounting.rdp.RdpAccountant()
    accountant.compose(dp_accounting.GaussianDpEvent(4.0))
    assert first == epsilon(model)
    assert first == pytest.approx(accountant.get_epsilon(tiny.DELTA), rel=1e-6)
    assert releases(model) == 13


def test_pools_are_renewed_when_used_up_and_cost_as_one():
    model = tiny.transcriber(NormalizedGradient(noise_multiplier=2.0), queries=POOL)
    fit(model, 10)
    one = epsilon(model)
    fit(model, 15)
    groups = {e.spend.group: e.count for e in model.ledger.entries}
    assert groups == {"pool 1": 10, "pool 2": 10, "pool 3": 5}
    assert epsilon(model) == one
    event = model.ledger.entries[0].spend.event
    assert event == dp_accounting.PoissonSampledDpEvent(
        8 / 64, dp_accounting.GaussianDpEvent(2.0)
    )


def test_several_student_updates_are_several_releases_of_gradients():
    model = tiny.transcriber(student_updates=3)
    fit(model, 2)
    assert releases(model) == 6
    model = tiny.transcriber(NoisyAnswer(noise_multiplier=1.0), student_updates=3)
    fit(model, 2)
    assert releases(model) == 2


@pytest.mark.parametrize("queries", [None, POOL], ids=["fresh", "pool"])
def test_a_release_is_recorded_before_it_is_used(queries, monkeypatch):
    model = tiny.transcriber(queries=queries)
    fit(model)
    before = tiny.flat_weights(model.student)

    def crash(self):
        raise RuntimeError("power cut")

    monkeypatch.setattr(GradientLearner, "step", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(model)
    assert releases(model) == 2
    assert np.array_equal(before, tiny.flat_weights(model.student))


@pytest.mark.parametrize(
    ("student_updates", "per_execution", "updates", "steps"),
    [(1, 1, 10, 4), (1, 1, 8, 13), (3, 1, 10, 5), (1, 3, 10, 7), (2, 3, 16, 4)],
)
def test_epsilon_shown_is_never_below_the_ledgers_and_equal_after_the_epoch(
    student_updates, per_execution, updates, steps
):
    model = tiny.transcriber(
        NormalizedGradient(noise_multiplier=2.0),
        queries=QueryPool(size=64, batch_size=8, updates=updates),
        student_updates=student_updates,
        compile_arguments={"steps_per_execution": per_execution},
    )
    watch = Watch()
    history = fit(model, steps, epochs=3, callbacks=[watch])
    assert len(watch.epochs) == 3
    assert all(shown >= spent for shown, spent in watch.batches)
    assert all(shown == spent for shown, spent in watch.epochs)
    assert history.history["epsilon"] == [spent for _, spent in watch.epochs]


@pytest.mark.parametrize(
    "mechanism", [NormalizedGradient(), NoisyAnswer(), RandomizedResponse()]
)
def test_epsilon_of_fresh_queries_is_shown_from_the_first_step(mechanism):
    model, watch = tiny.transcriber(mechanism), Watch()
    fit(model, 3, epochs=2, target_epsilon=1.5, callbacks=[watch])
    assert {pair for pair in watch.batches} == {(epsilon(model),) * 2}


def test_steps_in_one_execution_are_all_counted():
    model = tiny.transcriber(compile_arguments={"steps_per_execution": 4}, eager=False)
    fit(model, 8)
    assert releases(model) == 8
    assert int(model.noise.counter.numpy()) == 8


def test_epsilon_is_infinite_without_noise_and_the_statement_says_so():
    model = tiny.transcriber(NormalizedGradient(noise_multiplier=0.0))
    history = fit(model)
    assert history.history["epsilon"] == [np.inf]
    assert not model.privacy_statement().is_private


def test_the_tighter_accountant_needs_less_noise_and_keeps_its_target():
    noise = {}
    for accountant in ("rdp", "pld"):
        transcriber = tiny.transcriber(
            NormalizedGradient(),
            queries=QueryPool(size=64, batch_size=16, updates=8),
        )
        transcriber.fit(
            epochs=2,
            steps_per_epoch=4,
            target_epsilon=1.0,
            delta=tiny.DELTA,
            accountant=accountant,
            verbose=0,
        )
        noise[accountant] = transcriber.mechanism.noise_multiplier
        statement = transcriber.privacy_statement()
        assert statement.accountant == accountant
        assert statement.epsilon <= 1.0
    assert noise["pld"] < 0.97 * noise["rdp"]
