"""Transcribing an ensemble: budget, refusals, checkpoints, replicas, units."""

import copy
import pickle

import dp_accounting
import keras
import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe import reporting
from dp_transcribe.ensembles import TeacherEnsemble
from dp_transcribe.mechanisms import EnsembleGradient, NoisyVotes, NormalizedGradient
from dp_transcribe.privacy.ledger import Ledger
from dp_transcribe.privacy.statement import statement_from_ledger
from dp_transcribe.privacy.units import Relation, Unit
from dp_transcribe.queries import FreshQueries, uncertain_rows
from dp_transcribe.shards import RidgeFit, train_shard_teachers
from dp_transcribe.transcriber.budget import BudgetExceededError
from tests import tiny
from tests.tiny import fit

SHARDS, DELTA = 6, tiny.DELTA


def member():
    return tiny.linear_model(0, 0.1)


@pytest.fixture(scope="module")
def ensemble():
    random = np.random.default_rng(0)
    labels = random.integers(0, tiny.CLASSES, 240)
    images = random.uniform(size=(240, *tiny.IMAGE)).astype(np.float32)
    images.reshape(240, -1)[np.arange(240), labels] += 1.0
    return train_shard_teachers(member, (images, labels), shards=SHARDS, fit=RidgeFit())


def mechanisms(**kwargs):
    return [
        NoisyVotes(num_teachers=SHARDS, **kwargs),
        EnsembleGradient(num_teachers=SHARDS, **kwargs),
    ]


def epsilon(model):
    return model.ledger.epsilon(unit=Unit.RECORD, delta=DELTA)


@pytest.mark.parametrize("mechanism", mechanisms(), ids=lambda m: m.name)
def test_the_budget_is_spent_on_all_releases_and_never_passed(ensemble, mechanism):
    model = tiny.transcriber(mechanism, teacher=ensemble)
    fit(model, 3, epochs=2, target_epsilon=1.0, delta=DELTA)
    assert 0.99 < epsilon(model) <= 1.0
    releases = 6 * 16 if isinstance(mechanism, NoisyVotes) else 6
    assert model.ledger.releases(Unit.RECORD) == releases
    accountant = dp_accounting.rdp.RdpAccountant(
        neighboring_relation=Relation.REPLACE_ONE
    )
    event = dp_accounting.GaussianDpEvent(model.mechanism.noise_multiplier)
    accountant.compose(event, releases)
    assert epsilon(model) == pytest.approx(accountant.get_epsilon(DELTA))


@pytest.mark.parametrize("mechanism", mechanisms(), ids=lambda m: m.name)
def test_the_statement_is_for_records_and_says_replace_one(ensemble, mechanism):
    model = tiny.transcriber(mechanism, teacher=ensemble)
    fit(model, 2, target_epsilon=2.0, delta=DELTA)
    statement = model.privacy_statement()
    assert statement.unit is Unit.RECORD
    assert statement.relation is Relation.REPLACE_ONE
    text = statement.to_text()
    assert "per unit RECORD" in text and "parallel" not in text
    assert "generator" in statement.covered and "teacher" in statement.not_covered


def test_a_mixture_of_units_has_a_statement_each_and_no_sum(ensemble):
    ledger = Ledger()
    votes = NoisyVotes(num_teachers=SHARDS, noise_multiplier=20.0)
    answers = NormalizedGradient(noise_multiplier=6.0)
    alone = []
    for mechanism, count in ((votes, 40), (answers, 7)):
        spend = FreshQueries().spend(mechanism, 0)
        ledger.record(spend, count)
        single = Ledger()
        single.record(spend, count)
        alone.append(single.epsilon(unit=mechanism.unit, delta=DELTA))
    assert ledger.units() == {Unit.RECORD, Unit.RESPONSE}
    for unit, expected in zip((Unit.RECORD, Unit.RESPONSE), alone, strict=True):
        statement = statement_from_ledger(ledger, unit=unit, delta=DELTA, tighter=False)
        assert statement.epsilon == pytest.approx(expected)
        assert f"per unit {unit.value}" in statement.to_text()
        assert statement.epsilon < sum(alone)
    with pytest.raises(TypeError):
        ledger.epsilon(delta=DELTA)
    with pytest.raises(ValueError, match="unit"):
        spend = FreshQueries().spend(votes, 0)
        ledger.epsilon_after(spend, 1, unit=Unit.RESPONSE, delta=DELTA)


@pytest.mark.parametrize("mechanism", mechanisms(), ids=lambda m: m.name)
def test_another_number_of_teachers_is_refused(ensemble, mechanism):
    other = type(mechanism)(num_teachers=SHARDS + 1)
    with pytest.raises(ValueError, match="TeacherEnsemble"):
        tiny.transcriber(other, teacher=ensemble)


@pytest.mark.parametrize("mechanism", mechanisms(), ids=lambda m: m.name)
def test_a_generator_that_the_teachers_guided_is_refused(ensemble, mechanism):
    with pytest.raises(ValueError, match="generator_covered"):
        tiny.transcriber(mechanism, teacher=ensemble, generator_covered=False)


@pytest.mark.parametrize("mechanism", mechanisms(), ids=lambda m: m.name)
def test_a_checkpoint_goes_on_where_it_stopped(ensemble, mechanism, tmp_path):
    whole = tiny.transcriber(mechanism, teacher=ensemble)
    fit(whole, 2, epochs=2, target_epsilon=1.0)
    first = tiny.transcriber(mechanism, teacher=ensemble)
    first.schedule = (2, 2)
    first.fit(
        epochs=2,
        steps_per_epoch=2,
        target_epsilon=1.0,
        verbose=0,
        callbacks=[Stop(tmp_path / "half.keras")],
    )
    second = keras.saving.load_model(tmp_path / "half.keras")
    second.run_eagerly = True
    fit(second, 2, epochs=2, target_epsilon=1.0, initial_epoch=1)
    assert second.ledger == whole.ledger
    assert np.allclose(
        tiny.flat_weights(second.student), tiny.flat_weights(whole.student), atol=1e-5
    )
    images = np.random.default_rng(0).uniform(size=(5, *tiny.IMAGE)).astype("float32")
    assert np.array_equal(second.teacher.votes(images), ensemble.votes(images))


@pytest.mark.parametrize("mechanism", mechanisms(), ids=lambda m: m.name)
def test_weights_of_before_the_first_run_forget_no_release(
    ensemble, mechanism, tmp_path
):
    model = tiny.transcriber(mechanism, teacher=ensemble)
    model.save_weights(tmp_path / "first.weights.h5")
    fit(model, 2, target_epsilon=1.0)
    spent = model.ledger.to_json()
    model.load_weights(tmp_path / "first.weights.h5")
    assert model.ledger.to_json() == spent
    with pytest.raises(BudgetExceededError):
        fit(model, 2, target_epsilon=1.0)
    fit(model, 2, target_epsilon=2.0)
    assert 1.0 < epsilon(model) <= 2.0


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_copy_does_not_repeat_the_noise_of_the_original(ensemble, copied):
    """Equal sums of one step, so that noise which comes twice gives equal weights."""
    mechanism = EnsembleGradient(num_teachers=SHARDS, noise_multiplier=3.0)
    model = tiny.transcriber(mechanism, teacher=ensemble, seed=None)
    fit(model, 1)
    other = copied(model)
    assert other.ledger == model.ledger
    np.testing.assert_array_equal(
        tiny.flat_weights(other.student), tiny.flat_weights(model.student)
    )
    other.run_eagerly = True
    for each in (model, other):
        fit(each, 1)
    moved = tiny.flat_weights(other.student) - tiny.flat_weights(model.student)
    assert np.std(moved) > 1e-2


def test_the_student_chooses_half_of_the_queries_by_its_doubt():
    logits = np.zeros((40, tiny.CLASSES), np.float32)
    doubts = np.random.default_rng(0).permutation(40)
    logits[np.arange(40), 3] = doubts
    rows = uncertain_rows(tf.constant(logits), 9).numpy()
    assert len(set(rows)) == 9
    assert set(rows[:4]) == set(np.argsort(doubts)[:4])
    rest = [row for row in range(40) if row not in rows[:4]]
    assert list(rows[4:]) == rest[:5]


def test_choosing_asks_no_more_queries(ensemble):
    model = tiny.transcriber(
        NoisyVotes(num_teachers=SHARDS, noise_multiplier=30.0),
        teacher=ensemble,
        candidates_per_query=4,
    )
    fit(model, 2)
    assert model.ledger.releases(Unit.RECORD) == 2 * 16
    assert model.get_config()["candidates_per_query"] == 4


class Stop(keras.callbacks.Callback):
    """Saves after the first epoch and stops."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def on_epoch_end(self, epoch, logs=None):
        self.model.save_checkpoint(self.path)
        self.model.stop_training = True


class AgreementShown(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.last = logs["agreement"]


@pytest.mark.parametrize("released", ["votes", "label"])
def test_a_query_that_misses_the_threshold_is_no_answer(ensemble, released):
    """Its zeros are not class 0: neither in pictures nor in the agreement."""
    mechanism = NoisyVotes(
        num_teachers=SHARDS, noise_multiplier=1e-3, threshold=3.5, released=released
    )
    model = tiny.transcriber(
        mechanism, teacher=ensemble, optimizer=keras.optimizers.SGD(0.0)
    )
    shown = AgreementShown()
    fit(model, 3, callbacks=[shown])
    rows = model._run.learner.replay.released.numpy()[:48]
    images = model._run.learner.replay.codes.numpy()[:48]
    passed = ensemble.votes(images / np.float32(255)).numpy().max(-1) > 3.5
    assert 0 < passed.sum() < 48
    assert model.ledger.releases(Unit.RECORD) == 48
    codes, answers = model.answered_queries()
    np.testing.assert_array_equal(codes, images[passed])
    np.testing.assert_array_equal(answers, rows[passed, 0])
    samples = reporting.draw_samples(model, 48)
    np.testing.assert_array_equal(samples.labels, answers.argmax(-1))
    assert samples.images.shape == codes.shape
    agree = model.student(codes / np.float32(255)).numpy().argmax(-1) == samples.labels
    steps = np.split(passed, 3)
    found = np.split(agree, np.cumsum([step.sum() for step in steps])[:-1])
    means = [step.mean() if len(step) else 0.0 for step in found]
    assert shown.last == pytest.approx(np.mean(means), abs=1e-6)


def test_a_threshold_that_nothing_reaches_shows_no_agreement():
    mechanism = NoisyVotes(num_teachers=SHARDS, noise_multiplier=1e-3, threshold=6.0)
    student = tiny.linear_model(0, 0.0)  # says class 0
    model = tiny.transcriber(mechanism, teacher=quarrel(), student=student)
    shown = AgreementShown()
    fit(model, 1, callbacks=[shown])
    assert shown.last == 0.0
    assert not len(model.answered_queries()[0])
    assert not len(reporting.draw_samples(model, 8).images)


def quarrel():
    """Each of six teachers says a class of its own to every image."""
    weights = [
        np.zeros((SHARDS, tiny.PIXELS, tiny.CLASSES), np.float32),
        np.eye(SHARDS, tiny.CLASSES, dtype=np.float32),
    ]
    return TeacherEnsemble(member(), weights)


def test_votes_teach_a_student(ensemble):
    model = tiny.transcriber(
        NoisyVotes(num_teachers=SHARDS, noise_multiplier=0.05),
        teacher=ensemble,
        optimizer=keras.optimizers.Adam(0.02),
        queries=FreshQueries(batch_size=64),
        replay_size=2048,
        replay_batch_size=128,
        student_updates=4,
        eager=False,
    )
    random = np.random.default_rng(2)
    images = random.uniform(size=(500, *tiny.IMAGE)).astype(np.float32)
    before = agreement(model, ensemble, images)
    fit(model, 40)
    assert agreement(model, ensemble, images) > before + 0.2


def agreement(model, ensemble, images):
    by_student = np.argmax(model.student(images), -1)
    return np.mean(by_student == np.argmax(ensemble.votes(images), -1))
