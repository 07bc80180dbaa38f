"""Exported folders hold the released model and its statement, and nothing else."""

import stat
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from dp_accounting import GaussianDpEvent

from dp_transcribe import export
from dp_transcribe.privacy.events import PureDpEvent
from dp_transcribe.privacy.ledger import Ledger, Spend
from dp_transcribe.privacy.statement import PrivacyStatement, statement_from_ledger
from dp_transcribe.privacy.units import Relation, Unit

layers = keras.layers


@dataclass
class Transcribed:
    """What the exporter reads of a transcriber."""

    student: keras.Model
    generator: Any
    generator_covered: bool
    statement: PrivacyStatement

    def privacy_statements(self) -> tuple[PrivacyStatement, ...]:
        return (self.statement,)


def make_student(name: str = "student") -> keras.Model:
    student = keras.Sequential(
        [
            layers.Input((12, 12, 1)),
            layers.Conv2D(4, 3, activation="tanh"),
            layers.GroupNormalization(2),
            layers.Dropout(0.5),
            layers.Flatten(),
            layers.Dense(5),
        ],
        name=name,
    )
    student.compile(optimizer="adam", loss="mse")
    return student


class LatentGenerator(keras.Model):
    """A trainable generator of 12x12 images."""

    latent_dim = 3
    output_range = (0.0, 1.0)

    def __init__(self, num_classes: int | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.image_shape = (12, 12, 1)
        self.dense = layers.Dense(144, activation="sigmoid")

    def call(self, latents, labels=None):
        if self.num_classes:
            labels = tf.one_hot(labels, self.num_classes)
            latents = tf.concat([latents, labels], axis=1)
        return tf.reshape(self.dense(latents), (-1, 12, 12, 1))


class Procedural:
    """A random process: nothing in it was learned."""


def make_statement(event, unit=Unit.RESPONSE) -> PrivacyStatement:
    spend = Spend(
        unit=unit,
        relation=Relation.REPLACE_SPECIAL,
        event=event,
        mechanism="RandomizedResponse",
    )
    ledger = Ledger()
    ledger.record(spend)
    return statement_from_ledger(ledger, unit=unit, delta=1e-5)


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(7)


@pytest.fixture
def statement():
    """The statement of one randomised response."""
    return make_statement(PureDpEvent(1.0))


@pytest.fixture
def images():
    return np.random.default_rng(0).random((6, 12, 12, 1), np.float32)


def transcribed(statement, *, covered=True, num_classes=None) -> Transcribed:
    generator = LatentGenerator(num_classes)
    labels = None if num_classes is None else np.zeros(1, np.int64)
    generator(np.zeros((1, 3), np.float32), labels)
    return Transcribed(make_student(), generator, covered, statement)


def served(folder):
    return tf.saved_model.load(str(folder)).signatures["serving_default"]


def stored_variables(folder) -> dict[str, np.ndarray]:
    """Every value of the checkpoint inside a SavedModel, by key."""
    reader = tf.train.load_checkpoint(str(folder / "variables" / "variables"))
    keys = reader.get_variable_to_shape_map()
    return {
        key: reader.get_tensor(key)
        for key in sorted(keys)
        if key != "_CHECKPOINTABLE_OBJECT_GRAPH"
    }


def all_bytes(folder) -> bytes:
    return b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())


def snapshot(folder) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones included."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_signature_answers_like_predict_for_any_batch_size(tmp_path, statement, images):
    source = transcribed(statement)
    folder = export.export_student(source, tmp_path / "student" / "1")
    function = served(folder)

    for batch in (images, images[:1]):
        outputs = function(image=tf.constant(batch))
        logits = source.student.predict(batch, verbose=0)
        np.testing.assert_allclose(outputs["logits"], logits, atol=1e-5)
        np.testing.assert_allclose(
            outputs["probabilities"], tf.nn.softmax(logits), atol=1e-5
        )
        np.testing.assert_array_equal(outputs["class"], logits.argmax(-1))
    assert function(image=tf.zeros((0, 12, 12, 1)))["class"].shape == (0,)


def test_signature_names_and_types(tmp_path, statement):
    function = served(export.export_student(transcribed(statement), tmp_path / "1"))
    _, inputs = function.structured_input_signature
    assert inputs == {"image": tf.TensorSpec((None, 12, 12, 1), tf.float32, "image")}
    assert {name: s.dtype for name, s in function.structured_outputs.items()} == {
        "logits": tf.float32,
        "probabilities": tf.float32,
        "class": tf.int64,
    }


def test_only_the_students_weights_are_stored(tmp_path, statement, images):
    source = transcribed(statement)
    # Adam's moments, the dropout seed and the metrics exist from here on.
    source.student.fit(images, np.zeros((6, 5)), verbose=0)
    folder = export.export_student(source, tmp_path / "1")

    stored = sorted(value.tobytes() for value in stored_variables(folder).values())
    weights = [np.asarray(weight) for weight in source.student.weights]
    assert stored == sorted(weight.tobytes() for weight in weights)

    data = folder / "variables" / "variables.data-00000-of-00001"
    assert data.stat().st_size < sum(weight.nbytes for weight in weights) + 4096


def test_nothing_of_teacher_generator_or_optimizer_is_inside(
    tmp_path, statement, images
):
    source = transcribed(statement)
    source.student.fit(images, np.zeros((6, 5)), verbose=0)
    source.teacher = make_student(name="recognisable_teacher")
    folder = export.export_student(source, tmp_path / "1")

    content = all_bytes(folder)
    assert source.student.weights[0].numpy().tobytes() in content
    foreign = [
        *source.teacher.trainable_weights,
        *source.generator.weights,
        *source.student.optimizer.variables[1:],
    ]
    for variable in foreign:
        value = variable.numpy()
        if np.ptp(value) > 0:  # a constant says nothing about where it came from
            assert value.tobytes() not in content, variable.path
    for word in (b"recognisable_teacher", b"adam", b"momentum", b"seed_generator"):
        assert word not in content


def test_statement_lies_beside_the_student(tmp_path, statement):
    folder = export.export_student(transcribed(statement), tmp_path / "1")
    extra = folder / "assets.extra"
    assert (extra / "statement.txt").read_text() == statement.to_text()
    written = (extra / "statement.json").read_text()
    assert PrivacyStatement.from_json(written) == statement


def test_a_student_without_a_guarantee_is_exported_with_a_warning(tmp_path, caplog):
    exposed = make_statement(GaussianDpEvent(0.0))
    export.export_student(make_student(), tmp_path / "1", statement=exposed)
    assert "no privacy guarantee" in caplog.text


def test_a_bare_student_needs_a_statement(tmp_path, statement):
    with pytest.raises(ValueError, match="`statement`.*Received: statement=None"):
        export.export_student(make_student(), tmp_path / "1")
    assert not (tmp_path / "1").exists()

    folder = export.export_student(make_student(), tmp_path / "1", statement=statement)
    assert (folder / "assets.extra" / "statement.json").exists()


def test_a_bare_student_takes_a_statement_of_each_unit(tmp_path, statement):
    people = make_statement(PureDpEvent(2.0), Unit.RECORD)
    folder = export.export_student(
        make_student(), tmp_path / "1", statement=(statement, people)
    )
    text = (folder / "assets.extra" / "statement.txt").read_text()
    assert statement.to_text() in text
    assert people.to_text() in text
    written = (folder / "assets.extra" / "statement.record.json").read_text()
    assert PrivacyStatement.from_json(written) == people


@pytest.mark.parametrize("count", [0, 2])
def test_no_statement_and_two_of_one_unit_are_refused(tmp_path, statement, count):
    with pytest.raises(ValueError, match="`statement`"):
        export.export_student(
            make_student(), tmp_path / "1", statement=[statement] * count
        )
    assert not (tmp_path / "1").exists()


def test_vector_student_and_bfloat16_policy_serve_float32(tmp_path, statement):
    student = keras.Sequential(
        [
            layers.Input((4,)),
            layers.Dense(8, activation="relu", dtype="mixed_bfloat16"),
            layers.Dense(3, dtype="mixed_bfloat16"),
        ]
    )
    folder = export.export_student(student, tmp_path / "1", statement=statement)
    outputs = served(folder)(image=tf.ones((2, 4)))
    assert outputs["logits"].dtype == tf.float32
    np.testing.assert_allclose(tf.reduce_sum(outputs["probabilities"], 1), 1, atol=1e-6)
    assert all(v.dtype == np.float32 for v in stored_variables(folder).values())


def two_inputs() -> keras.Model:
    first, second = keras.Input((4,)), keras.Input((4,))
    return keras.Model([first, second], layers.Dense(3)(first + second))


@pytest.mark.parametrize(
    ("student", "complaint"),
    [
        (lambda: keras.Sequential([layers.Dense(3)]), "a built Functional"),
        (two_inputs, "a built Functional"),
        (
            lambda: keras.Sequential([layers.Input((4, 4, 1)), layers.Conv2D(2, 2)]),
            "a built Functional",
        ),
        (
            lambda: keras.Sequential([layers.Input((4,)), layers.Dense(3, "softmax")]),
            "ends in logits",
        ),
        (
            lambda: keras.Sequential([layers.Input((4,)), layers.Softmax()]),
            "ends in logits",
        ),
        (lambda: "student.keras", "a DPTranscriber"),
    ],
)
def test_what_is_no_student_is_refused(tmp_path, statement, student, complaint):
    with pytest.raises(ValueError, match=complaint):
        export.export_student(student(), tmp_path / "1", statement=statement)
    assert not list(tmp_path.iterdir())


def test_existing_exports_are_replaced_only_on_request(tmp_path, statement):
    first = transcribed(statement)
    folder = export.export_student(first, tmp_path / "1")
    before = snapshot(tmp_path)
    second = transcribed(statement)
    with pytest.raises(ValueError, match="overwrite=True"):
        export.export_student(second, folder)
    assert snapshot(tmp_path) == before

    export.export_student(second, folder, overwrite=True)
    kernel = second.student.weights[0].numpy().tobytes()
    assert kernel in all_bytes(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_an_empty_folder_is_used(tmp_path, statement):
    (tmp_path / "1").mkdir()
    export.export_student(transcribed(statement), tmp_path / "1")
    assert (tmp_path / "1" / "saved_model.pb").exists()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_export_is_never_overwritten(tmp_path, statement, kind):
    target = tmp_path / "1"
    kept = target if kind == "file" else target / "thesis.txt"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("years of work")
    with pytest.raises(ValueError, match="never overwritten"):
        export.export_student(transcribed(statement), target, overwrite=True)
    assert snapshot(tmp_path) == {str(kept.relative_to(tmp_path)): b"years of work"}


@pytest.mark.parametrize("failing", ["statement", "rename"])
def test_a_failed_export_leaves_everything_as_it_was(
    tmp_path, statement, failing, monkeypatch
):
    folder = export.export_student(transcribed(statement), tmp_path / "1")
    before = snapshot(tmp_path)
    name = "write_text" if failing == "statement" else "rename"
    original = getattr(type(folder), name)

    def fail(self, *args, **kwargs):
        if self.name == "statement.json" or self.name.endswith(".new"):
            raise OSError("disk full")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(folder), name, fail)
    with pytest.raises(OSError, match="disk full"):
        export.export_student(transcribed(statement), folder, overwrite=True)
    assert snapshot(tmp_path) == before


def test_a_path_that_cannot_be_written_is_refused(tmp_path, statement):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="`path`.*writable folder"):
        export.export_student(transcribed(statement), tmp_path / "file" / "1")


def test_the_server_may_read_what_was_written(tmp_path, statement):
    folder = export.export_student(transcribed(statement), tmp_path / "1")
    (tmp_path / "plain").mkdir()
    default = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        assert stat.S_IMODE(path.stat().st_mode) == default


@pytest.mark.parametrize("num_classes", [None, 5])
def test_a_covered_generator_is_exported(tmp_path, statement, num_classes):
    source = transcribed(statement, num_classes=num_classes)
    folder = export.export_generator(source, tmp_path / "1")
    latents = tf.random.normal((4, 3))
    labels = {} if num_classes is None else {"label": tf.range(4, dtype=tf.int64)}
    produced = served(folder)(latent=latents, **labels)["image"]
    expected = source.generator(latents, *labels.values())
    np.testing.assert_allclose(produced, expected, atol=1e-6)
    assert len(stored_variables(folder)) == len(source.generator.weights)
    assert (folder / "assets.extra" / "statement.txt").exists()


def test_a_generator_guided_by_the_teacher_is_refused(tmp_path, statement):
    source = transcribed(statement, covered=False)
    with pytest.raises(export.GeneratorNotPrivateError, match="guided by the teacher"):
        export.export_generator(source, tmp_path / "1")
    assert not list(tmp_path.iterdir())
    export.export_student(source, tmp_path / "1")


def test_a_random_process_has_nothing_to_export(tmp_path, statement):
    source = Transcribed(make_student(), Procedural(), True, statement)
    with pytest.raises(ValueError, match="get_config"):
        export.export_generator(source, tmp_path / "1")
