"""`python -m dp_transcribe audit`: its files, what it says, and what it refuses."""

import dataclasses
import functools
import json
import math
import runpy
import sys
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.special import expit

from dp_transcribe import auditing, cli
from dp_transcribe.data import ImageDataset
from dp_transcribe.ensembles import TeacherEnsemble
from dp_transcribe.evaluation import Inversion, claims, invert
from dp_transcribe.evaluation.report import table
from dp_transcribe.export import export_student
from dp_transcribe.mechanisms import (
    EnsembleGradient,
    NoisyVotes,
    NormalizedGradient,
)
from dp_transcribe.programs import EXIT_FLAGGED, EXIT_REFUSED
from dp_transcribe.queries import QueryPool
from dp_transcribe.teachers import Teacher
from dp_transcribe.transcriber import DPTranscriber
from tests import tiny
from tests.evaluation.test_claims import audited

POOL = QueryPool(size=200, batch_size=20, updates=12)


@pytest.fixture
def small(monkeypatch):
    """A data set of 8 x 8 noise, and an inversion of few steps."""
    random = np.random.default_rng(0)

    def part(count):
        images = random.random((count, *tiny.IMAGE)).astype(np.float32)
        return images, np.arange(count, dtype=np.int32) % tiny.CLASSES

    dataset = ImageDataset("mnist", *part(80), *part(60), tiny.CLASSES, "noise")
    monkeypatch.setattr(auditing, "load_dataset", lambda name, data_dir: dataset)
    few = Inversion(images_per_class=1, steps=2)
    monkeypatch.setattr(auditing, "invert", lambda model, settings: invert(model, few))
    return dataset


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A saved teacher and an exported student with its statement."""
    folder = tmp_path_factory.mktemp("models")
    teacher = tiny.linear_teacher()
    teacher.model.save(folder / "teacher.keras")
    transcriber = tiny.transcriber(
        NormalizedGradient(), teacher=teacher, queries=POOL, seed=None
    )
    tiny.fit(transcriber, 2, target_epsilon=2.0, delta=1e-5)
    export_student(transcriber, folder / "student" / "1")
    return folder


def command(models, tmp_path, *more):
    return [
        "audit",
        f"--teacher={models / 'teacher.keras'}",
        f"--output_dir={tmp_path}",
        "--canaries=200",
        "--seed=1",
        *more,
    ]


def statement_beside(models):
    return models / "student" / "1" / "assets.extra" / "statement.json"


def test_an_exported_student_is_audited_by_its_own_statement(
    small, models, tmp_path, capsys
):
    arguments = command(models, tmp_path, f"--student={models / 'student' / '1'}")
    assert cli.main(arguments) == 0
    report = json.loads((tmp_path / "audit.json").read_text())
    assert report["unit"] == "RESPONSE"
    assert report["mechanism"] == "NormalizedGradient"
    told = json.loads(statement_beside(models).read_text())
    assert report["claimed_epsilon"] == told["epsilon"]
    assert 0.0 <= report["epsilon_lower_bound"] <= report["claimed_epsilon"]
    assert report["confidence"] == 0.95
    for name in ("teacher", "student"):
        found = report["membership"][name]
        assert {"auc", "tpr_at_1e-3", "tpr_at_1e-2"} <= found.keys()
        assert 0.3 < found["auc"] < 0.85  # noise that nobody was trained on
        assert 0.0 <= report["inversion"][name]["recognised"] <= 1.0
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {"audit.png", "inversion_teacher.png", "inversion_student.png"}
    said = capsys.readouterr().out + (tmp_path / "audit.json").read_text()
    assert "lower bound" in said
    assert "proof" not in said and "proves" not in said


def test_without_a_student_the_method_transcribes_one(
    small, models, tmp_path, monkeypatch
):
    def build(teacher, prior, *, seed):
        assert prior.image_shape == tiny.IMAGE
        return tiny.transcriber(
            NormalizedGradient(), teacher=teacher, queries=POOL, seed=seed
        )

    monkeypatch.setitem(auditing.METHODS, "dpdfd", build)
    arguments = command(models, tmp_path, "--epochs=1", "--epsilon=1.5")
    monkeypatch.setattr(
        DPTranscriber,
        "fit",
        functools.partialmethod(DPTranscriber.fit, steps_per_epoch=1, verbose=0),
    )
    # The audit's own run has a number of steps that it must keep.
    monkeypatch.setattr(claims, "audit_responses", lambda *_, **__: audited())
    assert cli.main(arguments) == 0
    assert (tmp_path / "audit.json").exists()


def test_a_bound_above_the_claim_is_an_exit_status(
    small, models, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(claims, "audit_responses", lambda *_, **__: audited(1.5))
    arguments = command(models, tmp_path, f"--student={models / 'student' / '1'}")
    assert cli.main(arguments) == EXIT_FLAGGED
    assert "FLAGGED" in capsys.readouterr().out
    assert json.loads((tmp_path / "audit.json").read_text())["flagged"]


def test_a_student_without_its_statement_is_refused(small, models, tmp_path, capsys):
    bare = tmp_path / "bare"
    model = tiny.linear_model()
    tf.saved_model.save(
        model,
        str(bare),
        signatures=tf.function(
            lambda image: {"logits": model(image)},
            input_signature=[tf.TensorSpec((None, *tiny.IMAGE), tf.float32, "image")],
        ),
    )
    arguments = command(models, tmp_path, f"--student={bare}")
    assert cli.main(arguments) == EXIT_REFUSED
    assert "statement.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "named"),
    [("--canaries=0", "canaries"), ("--delta=2", "delta"), ("--epsilon=-1", "epsilon")],
)
def test_values_out_of_range_are_refused(models, tmp_path, capsys, flag, named):
    assert cli.main(command(models, tmp_path, flag)) == EXIT_REFUSED
    assert f"`{named}`" in capsys.readouterr().err


def test_the_table_marks_what_is_flagged_and_says_infinite_claims():
    claimed_nothing = dataclasses.replace(audited(), claimed_epsilon=math.inf)
    lines = table(
        [("fine", audited()), ("broken", audited(2.0)), ("bare", claimed_nothing)]
    ).splitlines()
    assert [("FLAGGED" in line) for line in lines] == [False, False, True, False]
    assert claimed_nothing.to_dict()["claimed_epsilon"] == "inf"


def test_shadow_models_find_what_difficulty_hides(small):
    """Pixel 0 is how hard an image is, pixel 1 whether the teacher saw it."""
    random = np.random.default_rng(0)

    def part(count, seen):
        images = np.zeros((count, *tiny.IMAGE), np.float32)
        images[:, 0, 0, 0], images[:, 0, 1, 0] = random.normal(0, 4, count), seen
        return images, np.zeros(count, np.int32)

    dataset = ImageDataset("mnist", *part(600, 1), *part(600, 0), 2, "made")
    config = auditing.AuditConfig(teacher="unused")

    def model(gain):
        def predict(images):
            logits = images[:, 0, 0, 0] + gain * images[:, 0, 1, 0]
            logits = logits + random.normal(0, 1, len(images))
            return expit(np.stack([logits, -logits], 1))

        return SimpleNamespace(predict=predict)

    models = {"teacher": model(3.0), "student": model(0.0)}
    plain = auditing.membership_of(models, dataset, config)
    found = auditing.membership_of(
        models, dataset, config, [model(0.0) for _ in range(4)]
    )
    assert found.keys() == plain.keys() == models.keys()
    assert found["teacher"].attack == "LiRA, 4 shadow models"
    assert found["teacher"].auc > plain["teacher"].auc + 0.1
    assert abs(found["student"].auc - 0.5) < 0.06


def test_the_command_takes_shadow_models(small, models, tmp_path, capsys):
    paths = [tmp_path / f"shadow_{seed}.keras" for seed in (1, 2)]
    for seed, path in enumerate(paths):
        tiny.linear_model(seed).save(path)
    arguments = command(models, tmp_path, f"--student={models / 'student' / '1'}")
    assert cli.main([*arguments, "--shadows", *map(str, paths)]) == 0
    report = json.loads((tmp_path / "audit.json").read_text())
    assert report["shadows"] == 2
    assert report["membership"].keys() == {"teacher", "student"}
    assert cli.main([*arguments, "--shadows", str(paths[0])]) == EXIT_REFUSED
    assert "`shadows`" in capsys.readouterr().err
    tiny.linear_model(classes=3).save(paths[1])
    assert cli.main([*arguments, "--shadows", *map(str, paths)]) == EXIT_REFUSED
    assert "`shadows`" in capsys.readouterr().err


@pytest.fixture
def ensemble():
    """Six linear teachers."""
    weights = [tiny.linear_model(seed).get_weights() for seed in range(6)]
    stacked = [np.stack(arrays) for arrays in zip(*weights, strict=True)]
    return TeacherEnsemble(tiny.linear_model(), stacked)


@pytest.mark.parametrize("mechanism", [NoisyVotes, EnsembleGradient])
def test_students_of_teachers_on_shards_are_attacked(
    small, ensemble, tmp_path, monkeypatch, mechanism
):
    transcriber = tiny.transcriber(mechanism(num_teachers=6), teacher=ensemble)
    tiny.fit(transcriber, 2, target_epsilon=2.0, delta=1e-5)
    export_student(transcriber, tmp_path / "student" / "1")
    transcriber.save_checkpoint(tmp_path / "checkpoint.keras")
    monkeypatch.setitem(claims.RECORD_AUDITS, mechanism.__name__, lambda **_: audited())
    checkpoint = ["audit", f"--teacher={tmp_path / 'checkpoint.keras'}"]
    arguments = [*checkpoint, f"--output_dir={tmp_path / 'out'}"]
    assert cli.main([*arguments, f"--student={tmp_path / 'student' / '1'}"]) == 0
    report = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert report["membership"].keys() == {"teacher", "student"}
    assert report["inversion"].keys() == {"student"}
    votes = ensemble.predict(small.train_images)
    asked = []
    monkeypatch.setattr(
        auditing, "ask", lambda predict, *_: asked.append(predict(small.train_images))
    )
    monkeypatch.setattr(auditing, "strongest_attack", lambda *_: sys.exit("asked"))
    with pytest.raises(SystemExit, match="asked"):
        cli.main([*arguments, f"--student={tmp_path / 'student' / '1'}"])
    np.testing.assert_allclose(asked[0], votes, atol=1e-6)


def test_teachers_on_shards_need_their_student(small, ensemble, tmp_path, capsys):
    transcriber = tiny.transcriber(NoisyVotes(num_teachers=6), teacher=ensemble)
    transcriber.save_checkpoint(tmp_path / "checkpoint.keras")
    arguments = ["audit", f"--teacher={tmp_path / 'checkpoint.keras'}"]
    arguments.append(f"--output_dir={tmp_path / 'out'}")
    assert cli.main(arguments) == EXIT_REFUSED
    assert "`student`" in capsys.readouterr().err
    assert cli.main([*arguments, "--teacher_range=0,255"]) == EXIT_REFUSED
    assert "`teacher_range`" in capsys.readouterr().err
    damaged = (tmp_path / "checkpoint.keras").read_bytes()[:3000]
    (tmp_path / "checkpoint.keras").write_bytes(damaged)
    assert cli.main(arguments) == EXIT_REFUSED
    assert "`teacher`" in capsys.readouterr().err


def test_teacher_and_student_are_attacked_in_their_range(small, models, tmp_path):
    plain = tiny.linear_teacher()
    layers = [keras.layers.Input(tiny.IMAGE), keras.layers.Rescaling(1 / 255)]
    model = keras.Sequential([*layers, *plain.model.layers])
    model.save(tmp_path / "bytes.keras")
    generator = tiny.UniformPixels(tiny.IMAGE, output_range=(0, 255))
    transcriber = tiny.transcriber(
        NormalizedGradient(),
        teacher=Teacher(model, input_range=(0, 255)),
        generator=generator,
        queries=POOL,
        seed=None,
    )
    tiny.fit(transcriber, 2, target_epsilon=2.0, delta=1e-5)
    export_student(transcriber, tmp_path / "student")
    arguments = command(models, tmp_path / "out", f"--student={tmp_path / 'student'}")
    arguments[1] = f"--teacher={tmp_path / 'bytes.keras'}"
    assert cli.main([*arguments, "--teacher_range=0,255"]) == 0
    found = json.loads((tmp_path / "out" / "audit.json").read_text())["membership"]
    config = auditing.AuditConfig(teacher="unused")
    expected = auditing.membership_of({"teacher": plain}, small, config)["teacher"]
    assert found["teacher"]["auc"] == pytest.approx(expected.auc)
    student = Teacher(transcriber.student, outputs="logits")
    wide = small.in_range((0.0, 255.0))
    expected = auditing.membership_of({"student": student}, wide, config)["student"]
    assert found["student"]["auc"] == pytest.approx(expected.auc, abs=1e-3)


def test_the_command_says_its_defaults(capsys):
    with pytest.raises(SystemExit):
        cli.main(["audit", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(auditing.AuditConfig):
        assert f"--{field.name} " in shown
        if isinstance(field.default, (str, float, int)):
            assert f"(default: {field.default})" in shown, field.name
    assert "default: None" not in shown


def test_it_is_a_module_that_can_be_run(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dp_transcribe", "audit", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("dp_transcribe", run_name="__main__")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "--canaries" in shown and "--student" in shown
