"""Mechanisms of unit RECORD: every release composes with every other."""

import dataclasses

import dp_accounting
import numpy as np
import pytest

import dp_transcribe as dpt
from dp_transcribe.generators import MLPGenerator
from dp_transcribe.guidance import pretrain_by_teacher
from dp_transcribe.mechanisms import NoisyAnswer, NormalizedGradient
from dp_transcribe.mechanisms.inherited import Inherited
from dp_transcribe.privacy.ledger import Ledger
from dp_transcribe.privacy.statement import PrivacyStatement, statement_from_ledger
from dp_transcribe.privacy.units import Relation, Unit
from dp_transcribe.queries import FreshQueries
from dp_transcribe.teachers import Teacher
from tests import tiny
from tests.tiny import fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordAnswer(NoisyAnswer):
    """Each answered query is a release that every record may change."""

    unit = Unit.RECORD


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordGradient(NormalizedGradient):
    """Each update is a release that every record may change."""

    unit = Unit.RECORD


def epsilon(model):
    return model.ledger.epsilon(unit=Unit.RECORD, delta=tiny.DELTA)


class Watch(tiny.Watch):
    def on_train_batch_end(self, batch, logs=None):
        self.batches.append((logs["epsilon"], epsilon(self.model)))

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append((logs["epsilon"], epsilon(self.model)))


@pytest.mark.parametrize(
    ("mechanism", "count"),
    [(RecordAnswer(noise_multiplier=50.0), 3 * 16), (RecordGradient(), 3 * 2)],
    ids=["one per answered query", "one per update"],
)
def test_every_release_is_recorded_and_none_in_parallel(mechanism, count):
    model = tiny.transcriber(mechanism, student_updates=2)
    fit(model, 3, target_epsilon=1.0)
    (entry,) = model.ledger.entries
    assert entry.count == count == model.ledger.releases(Unit.RECORD)
    assert entry.spend.unit is Unit.RECORD and not entry.spend.disjoint
    sigma = model.mechanism.noise_multiplier
    accountant = dp_accounting.rdp.RdpAccountant()
    accountant.compose(dp_accounting.GaussianDpEvent(sigma), count)
    assert epsilon(model) == pytest.approx(accountant.get_epsilon(tiny.DELTA))


@pytest.mark.parametrize("mechanism", [RecordAnswer(), RecordGradient()])
def test_noise_is_calibrated_to_the_whole_run(mechanism):
    model, watch = tiny.transcriber(mechanism), Watch()
    fit(model, 3, epochs=2, target_epsilon=1.0, callbacks=[watch])
    assert len(watch.batches) == 6
    assert 0.99 < epsilon(model) <= 1.0
    for shown, spent in watch.batches + watch.epochs:
        assert spent <= shown + 1e-9 and shown <= 1.0
    statement = model.privacy_statement()
    assert statement.unit is Unit.RECORD
    assert "parallel" not in statement.sampling


def test_training_stops_at_the_last_step_inside_the_budget():
    model, watch = tiny.transcriber(RecordGradient(noise_multiplier=8.0)), Watch()
    fit(model, 5, epochs=10, target_epsilon=2.0, callbacks=[watch])
    spend = model.ledger.entries[-1].spend
    further = model.ledger.epsilon_after(spend, 1, unit=Unit.RECORD, delta=tiny.DELTA)
    assert 0 < len(watch.batches) < 50
    assert epsilon(model) <= 2.0 < further
    spent = epsilon(model)
    with pytest.raises(dpt.BudgetExceededError):
        model.train_on_batch(np.zeros((1,)))
    with pytest.raises(dpt.BudgetExceededError):
        fit(model, 1, target_epsilon=2.0)
    assert epsilon(model) == spent


def test_without_a_target_nothing_stops_the_run():
    model = tiny.transcriber(RecordAnswer(noise_multiplier=10.0))
    fit(model, 3, epochs=2)
    model.train_on_batch(np.zeros((1,)))
    assert model.ledger.releases(Unit.RECORD) == 7 * 16


def test_less_noise_than_one_step_needs_is_refused_before_it():
    model = tiny.transcriber(RecordAnswer(noise_multiplier=4.0))
    weights = tiny.flat_weights(model.student)
    with pytest.raises(dpt.BudgetExceededError, match="RECORD"):
        fit(model, 1, target_epsilon=1.0)
    assert not model.ledger.entries
    assert np.array_equal(weights, tiny.flat_weights(model.student))


def test_a_sample_of_queries_hides_no_record():
    with pytest.raises(ValueError, match="FreshQueries"):
        tiny.transcriber(RecordGradient(), queries=tiny.POOL)


def test_several_steps_per_execution_are_accounted_together():
    model = tiny.transcriber(
        RecordGradient(),
        queries=FreshQueries(batch_size=8),
        eager=False,
        compile_arguments={"steps_per_execution": 2},
    )
    fit(model, 4, target_epsilon=1.0)
    assert model.ledger.releases(Unit.RECORD) == 4
    assert 0.99 < epsilon(model) <= 1.0


def private_teacher():
    """A teacher that is said to be private; its own fit is tested elsewhere."""
    statement = statement_from_ledger(
        Ledger(),
        unit=Unit.RECORD,
        relation=Relation.REPLACE_SPECIAL,
        delta=tiny.DELTA,
        accountant="rdp",
        mechanism="PrivateTraining",
        covered=["teacher"],
    )
    statement = dataclasses.replace(statement, epsilon=3.0)
    return Teacher(tiny.linear_model(5), outputs="logits", statement=statement)


def test_answers_of_a_private_teacher_have_two_guarantees(tmp_path):
    model = tiny.transcriber(NormalizedGradient(), teacher=private_teacher())
    fit(model, 2, target_epsilon=1.0)
    answers, records = model.privacy_statements()
    assert answers.to_dict() == model.privacy_statement().to_dict()
    assert (answers.unit, records.unit) == (Unit.RESPONSE, Unit.RECORD)
    assert (answers.epsilon <= 1.0, records.epsilon) == (True, 3.0)
    assert set(records.covered) == {"teacher", "student", "generator"}
    assert records.inherited_from == "the teacher"
    extra = dpt.export_student(model, tmp_path / "1") / "assets.extra"
    read = [(extra / f"statement{name}.json") for name in ("", ".record")]
    for path, statement in zip(read, (answers, records), strict=True):
        assert PrivacyStatement.from_json(path.read_text()) == statement
    text = (extra / "statement.txt").read_text()
    assert text.startswith(answers.to_text()) and text.endswith(records.to_text())
    assert "never added" in " ".join(text.split())


def test_of_an_ordinary_or_asked_without_noise_teacher_there_is_one():
    ordinary = tiny.transcriber(NormalizedGradient(noise_multiplier=1.0))
    assert ordinary.privacy_statements() == (ordinary.privacy_statement(),)
    teacher = private_teacher()
    free = tiny.transcriber(Inherited(teacher.statement), teacher=teacher)
    assert free.privacy_statements() == (free.privacy_statement(),)


def test_a_generator_that_is_not_covered_is_not_by_the_teachers_guarantee_either():
    model = tiny.transcriber(
        NormalizedGradient(), teacher=private_teacher(), generator_covered=False
    )
    fit(model, 2, target_epsilon=1.0)
    for statement in model.privacy_statements():
        assert "generator" in statement.not_covered
        assert "generator" not in statement.covered


def guided_by(*teachers):
    generator = MLPGenerator(tiny.IMAGE, latent_dim=4, units=(8,))
    for teacher in teachers:
        pretrain_by_teacher(generator, teacher, steps=1, batch_size=4)
    return MLPGenerator.from_config(generator.get_config())


def test_no_guarantee_is_passed_on_where_another_teacher_guided_the_generator():
    """Its images carry what the other one remembers, unnoised."""
    teacher, other = private_teacher(), tiny.linear_teacher(9)
    for guides, units in (
        ([teacher], [Unit.RESPONSE, Unit.RECORD]),
        ([other], [Unit.RESPONSE]),
        ([teacher, other], [Unit.RESPONSE]),
    ):
        model = tiny.transcriber(
            NormalizedGradient(noise_multiplier=2.0),
            teacher=teacher,
            generator=guided_by(*guides),
            generator_covered=False,
        )
        assert [s.unit for s in model.privacy_statements()] == units
    free = Inherited(teacher.statement)
    tiny.transcriber(free, teacher=teacher, generator=guided_by(teacher))
    with pytest.raises(ValueError, match="`generator`.*no other teacher guided"):
        tiny.transcriber(free, teacher=teacher, generator=guided_by(other))
