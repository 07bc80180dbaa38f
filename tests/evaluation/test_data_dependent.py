"""What the votes themselves say of a run's cost, and that it stays apart."""

import functools

import keras
import numpy as np
import pytest

import dp_transcribe as dpt
from dp_transcribe.ensembles import TeacherEnsemble
from dp_transcribe.evaluation import data_dependent_cost
from dp_transcribe.generators import MLPGenerator
from dp_transcribe.privacy import gnmax
from dp_transcribe.privacy.units import Unit
from tests import tiny

TEACHERS = 40
VOTES = functools.partial(dpt.NoisyVotes, num_teachers=TEACHERS, released="label")


def ensemble(spread):
    """Linear teachers around one; the larger the spread, the less they agree."""
    random = np.random.default_rng(0)
    kernel = random.normal(size=(tiny.PIXELS, tiny.CLASSES))
    kernels = kernel + spread * random.normal(size=(TEACHERS, *kernel.shape))
    weights = [kernels.astype(np.float32), np.zeros((TEACHERS, tiny.CLASSES))]
    return TeacherEnsemble(tiny.linear_model(), [np.float32(w) for w in weights])


def transcribed(teacher, mechanism=None, **arguments):
    model = tiny.transcriber(mechanism or VOTES(), teacher=teacher, seed=3, **arguments)
    target = 2.0 if model.mechanism.noise_multiplier is None else None
    tiny.fit(model, 2, target_epsilon=target)
    return model


def test_agreement_is_cheap_and_quarrel_costs_what_the_ledger_says():
    found = {}
    for spread in (0.0, 100.0):
        model = transcribed(ensemble(spread), VOTES(noise_multiplier=3.0))
        found[spread] = cost = data_dependent_cost(model)
        assert cost.queries == model.ledger.releases(Unit.RECORD) == 32
        told = model.privacy_statement().epsilon
        assert cost.epsilon_data_independent == pytest.approx(told, rel=1e-6)
        assert cost.delta == tiny.DELTA and "not private" in cost.to_text()
    assert found[0.0].epsilon < 0.5 * found[0.0].epsilon_data_independent
    quarrel = found[100.0]
    assert quarrel.epsilon == pytest.approx(quarrel.epsilon_data_independent)


def test_it_is_of_the_queries_that_were_answered(tmp_path):
    teacher = ensemble(0.3)
    model = transcribed(teacher)
    codes, answers = model.answered_queries()
    assert codes.shape == (32, *tiny.IMAGE) and codes.dtype == np.uint8
    assert answers.shape == (32, tiny.CLASSES)
    votes = teacher.votes(codes / np.float32(255)).numpy()
    by_hand = gnmax.data_dependent_epsilon(
        votes, stddev=model.mechanism.stddev, delta=tiny.DELTA
    )
    assert data_dependent_cost(model).epsilon == pytest.approx(by_hand.epsilon)
    model.save_checkpoint(tmp_path / "run.keras")
    loaded = keras.saving.load_model(tmp_path / "run.keras")
    assert data_dependent_cost(loaded).epsilon == pytest.approx(by_hand.epsilon)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"mechanism": VOTES(released="votes")}, "transcriber"),
        ({"mechanism": VOTES(threshold=20.0)}, "mechanism.threshold"),
        ({"mechanism": VOTES(top_k=3)}, "mechanism.top_k"),
        ({"candidates_per_query": 2}, "candidates_per_query"),
        (
            {"generator": MLPGenerator(tiny.IMAGE, latent_dim=4, units=(8,))},
            "generator_updates",
        ),
        ({"replay_size": 16}, "transcriber"),
    ],
)
def test_what_the_analysis_does_not_hold_for_is_refused(arguments, named):
    model = transcribed(ensemble(0.0), **arguments)
    with pytest.raises(ValueError, match=f"Invalid value for argument `{named}`"):
        data_dependent_cost(model)


def test_a_refusal_is_not_got_round_after_the_run():
    """The queries were chosen, whatever is set later."""
    generator = MLPGenerator(tiny.IMAGE, latent_dim=4, units=(8,))
    for name, value, arguments in (
        ("candidates_per_query", 1, {"candidates_per_query": 2}),
        ("generator_updates", 0, {"generator": generator}),
    ):
        model = transcribed(ensemble(0.0), VOTES(noise_multiplier=3.0), **arguments)
        with pytest.raises(AttributeError, match=name):
            setattr(model, name, value)
        with pytest.raises(ValueError, match=f"`{name}`"):
            data_dependent_cost(model)


def test_answers_are_asked_for():
    model = tiny.transcriber(dpt.NormalizedGradient(noise_multiplier=1.0))
    with pytest.raises(ValueError, match="`mechanism`.*releases answers"):
        model.answered_queries()
