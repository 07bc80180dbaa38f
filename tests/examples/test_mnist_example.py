"""examples/mnist.py: its files, refusals, Ctrl-C and resuming, in small sizes."""

import dataclasses
import functools
import importlib.util
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import dp_transcribe as dpt
from dp_transcribe import methods, programs, wavelets
from dp_transcribe.distillation import (
    Distillation,
    LinearTraining,
    MirroredKernel,
    ScatteringKernel,
)
from dp_transcribe.privacy import Relation

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FILES = {"report.json", "statement.txt", "samples.png", "curve.png", "student"}
KEPT = {"checkpoint.keras", "checkpoint.json"}
RECORD_STATEMENT = dpt.PrivacyStatement(
    unit=dpt.Unit.RECORD,
    relation=Relation.REPLACE_ONE,
    epsilon=1.0,
    epsilon_pld=None,
    delta=1e-5,
    accountant="rdp",
    mechanism="ClippedGradient",
    covered=("teacher",),
    not_covered=(),
    sampling="Poisson samples of records.",
    noise_seed=None,
)


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


small = load("small_mnist", HERE / "small_mnist.py")
example = load("mnist_example", small.EXAMPLE)


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory, mnist_small):
    """A linear teacher."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Input((28, 28, 1)), keras.layers.Flatten()]
    model = keras.Sequential([*layers, keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss)
    model.fit(mnist_small.train_images, mnist_small.train_labels, epochs=3, verbose=0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.keras"
    model.save(path)
    return path


@pytest.fixture(scope="module")
def make_config(prepared, teacher_file):
    """Makes a config that runs for a few seconds in a given folder."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in small.SIZES.items():
            patch.setattr(methods, name, value)
        patch.setattr(wavelets, "PUBLIC_IMAGES", small.PUBLIC_IMAGES)

        def make(folder, **values):
            paths = {
                "data_dir": str(prepared),
                "teacher": str(teacher_file),
                "output_dir": str(folder / "out"),
                "cache_dir": str(folder / "cache"),
            }
            schedule = {"epochs": 1, "steps_per_epoch": 2}
            return example.ExampleConfig(**{**schedule, **paths, **values})

        yield make


@pytest.fixture
def config(make_config, tmp_path):
    """As `make_config`, in the test's own folder."""
    return functools.partial(make_config, tmp_path)


@pytest.fixture(scope="module")
def finished(make_config, tmp_path_factory):
    """A finished run with a secret seed: its config and report."""
    asked = make_config(tmp_path_factory.mktemp("finished"))
    return asked, example.run(asked)


@pytest.fixture
def copied(finished, config):
    """The finished run's folder, copied into the test's own; makes configs for it."""
    shutil.copytree(finished[0].folder, config().folder)
    return config


def start(*arguments):
    """The program in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(HERE / "small_mnist.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def flags_of(config):
    """The command line that says the same as a config."""
    names = ("data_dir", "teacher", "output_dir", "cache_dir", "method", "epochs")
    values = [f"--{name}={getattr(config, name)}" for name in names]
    return [*values, f"--steps_per_epoch={config.steps_per_epoch}"]


def names_in(folder):
    return {path.name for path in Path(folder).iterdir()}


def check_results(asked, returned):
    """All files are there and the report has all keys, with likely values."""
    folder = asked.folder
    assert names_in(folder) == FILES | KEPT
    report = json.loads((folder / "report.json").read_text())
    assert report == json.loads(json.dumps(returned))
    assert (report["dataset"], report["dataset_source"]) == ("mnist", "tfds")
    assert (report["method"], report["seed"]) == (asked.way, asked.seed)
    assert report["interrupted"] is False
    seconds = report["seconds"]
    assert seconds["total"] == seconds["teacher"] + seconds["transcribe"] > 0
    assert {"tensorflow", "keras", "dp-accounting"} <= set(report["versions"])
    assert report["schedule"] == {"epochs": 1, "steps_per_epoch": 2}
    assert {name: len(v) for name, v in report["history"].items()} == dict.fromkeys(
        ("epoch", "test_accuracy", "agreement", "epsilon", "student_loss"), 1
    )
    assert (folder / "statement.txt").read_text().startswith("Differential privacy")
    for picture in ("samples.png", "curve.png"):
        assert tf.io.decode_png((folder / picture).read_bytes()).shape[0] > 100


def check_statement(asked, statement, mechanism):
    assert statement["mechanism"] == mechanism
    pure = mechanism == "SelectiveRandomizedResponse"
    relation = "REPLACE_ONE" if pure else "REPLACE_SPECIAL"
    assert (statement["unit"], statement["relation"]) == ("RESPONSE", relation)
    assert statement["delta"] == (0.0 if pure else 1e-5)
    assert 0.5 * asked.epsilon < statement["epsilon"] <= asked.epsilon
    assert statement["accountant"] == "rdp"
    assert statement["noise_seed"] == asked.seed


def test_a_run_leaves_all_files(finished):
    asked, report = finished
    check_results(asked, report)
    check_statement(asked, report["statement"], "NormalizedGradient")
    assert "generator" in report["statement"]["covered"]
    checkpoint = asked.folder / "checkpoint.keras"
    assert stat.S_IMODE(checkpoint.stat().st_mode) == 0o600


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "mechanism", "covered"),
    [
        ("srr", "SelectiveRandomizedResponse", False),
        ("dpsd_data", "NoisyAnswer", True),
        ("dpsd_label", "SelectiveRandomizedResponse", True),
    ],
)
def test_other_methods_leave_all_files(config, method, mechanism, covered):
    asked = config(method=method, epsilon=2.0, seed=3)
    report = example.run(asked)
    check_results(asked, report)
    check_statement(asked, report["statement"], mechanism)
    assert ("generator" in report["statement"]["covered"]) is covered


@pytest.fixture
def small_teacher(monkeypatch):
    """Private teachers of few steps and few public images."""
    settings = Distillation(
        training=LinearTraining(steps=3, accountant="rdp"),
        public_images=250,
        damping_rank=20,
    )
    monkeypatch.setattr(Distillation, "for_domain", lambda domain: settings)


def test_a_private_teacher_gives_a_guarantee_for_people(config, small_teacher):
    asked = config(unit="record", teacher=None, epsilon=3.0)
    report = example.run(asked)
    check_results(asked, report)
    statement = report["statement"]
    assert (report["unit"], statement["unit"]) == ("RECORD", "RECORD")
    assert 2.5 < statement["epsilon"] <= 3.0
    assert {"teacher", "student", "generator"} <= set(statement["covered"])
    text = example.summary(report, asked.folder)
    assert "unit RECORD" in text and "Inherited from the teacher" in (
        " ".join((asked.folder / "statement.txt").read_text().split())
    )
    data = example.load_dataset("mnist", asked.data_dir)
    kept, source = example.private_teacher(asked, data)
    assert source == "cached", "training it again would spend again"
    assert kept.statement.epsilon == statement["epsilon"]
    other = dataclasses.replace(asked, epsilon=2.0)
    assert example.private_teacher(other, data)[1] == "trained"
    for file in (Path(asked.cache_dir) / "teachers").glob("*.keras"):
        file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="a second budget on the same records"):
        example.private_teacher(asked, data)


def test_a_private_teacher_of_another_kernel_is_another_one(
    config, small_teacher, monkeypatch
):
    data = example.load_dataset("mnist", config().data_dir)
    fitted, places = [], []

    def fit(*_, kernel, **__):
        fitted.append(kernel)
        raise KeyboardInterrupt

    monkeypatch.setattr(dpt, "fit_scattering_teacher", fit)
    monkeypatch.setattr(
        example, "cached_teacher", lambda path, **_: places.append(path)
    )
    plain = ScatteringKernel(data.image_shape)
    for kernel in (plain, MirroredKernel(plain)):
        monkeypatch.setattr(example, "kernel_for_domain", lambda *_, k=kernel: k)
        with pytest.raises(KeyboardInterrupt):
            example.private_teacher(config(unit="record", teacher=None), data)
    assert fitted == [plain, MirroredKernel(plain)]
    assert places[0] != places[1]


def test_a_teacher_without_a_statement_gives_none(config, nothing_starts):
    with pytest.raises(example.RefusedError, match="statement"):
        example.run(config(unit="record"))


def of_bytes(model):
    """The same classifier, for pixels from 0 to 255."""
    layers = [keras.layers.Input((28, 28, 1)), keras.layers.Rescaling(1 / 255)]
    return keras.Sequential([*layers, *model.layers])


@pytest.mark.parametrize("unit", ["response", "record"])
def test_a_teacher_of_other_pixels_is_asked_about_such_ones(
    config, teacher_file, tmp_path, unit
):
    plain, path = keras.saving.load_model(teacher_file), tmp_path / "bytes.keras"
    statement = RECORD_STATEMENT if unit == "record" else None
    dpt.Teacher(of_bytes(plain), input_range=(0, 255), statement=statement).save(path)
    asked = config(unit=unit, teacher=str(path), teacher_range="0,255")
    report = example.run(asked)
    data = example.load_dataset("mnist", asked.data_dir)
    accuracy = dpt.Teacher(plain).accuracy(data.test_images, data.test_labels)
    assert report["teacher"]["test_accuracy"] == pytest.approx(accuracy)
    served = tf.saved_model.load(str(asked.folder / "student" / "1"))
    answers = served.signatures["serving_default"](image=255 * data.test_images)
    hits = answers["class"].numpy() == data.test_labels
    assert report["student"]["test_accuracy"] == pytest.approx(np.mean(hits))


def test_an_assistant_asks_about_the_teachers_pixels(
    config, teacher_file, quick_wavelets, tmp_path
):
    plain, path = keras.saving.load_model(teacher_file), tmp_path / "bytes.keras"
    of_bytes(plain).save(path)
    asked = config(assistant=True, teacher=str(path), teacher_range="0,255")
    run = example.begin(asked)
    test = run.dataset.test_images, np.asarray(run.dataset.test_labels)
    accuracy = dpt.Teacher(plain).accuracy(*test)
    said = run.recorder.facts["teacher"]
    assert said["assisted_test_accuracy"] == pytest.approx(accuracy)
    assert run.transcriber.teacher.input_range == (0.0, 1.0)


def test_a_teacher_of_whole_numbers_asks_for_its_range(
    config, nothing_starts, tmp_path
):
    inputs = keras.layers.Input((28, 28, 1), dtype="uint8")
    flat = keras.layers.Flatten()(inputs)
    path = tmp_path / "whole.keras"
    keras.Model(inputs, keras.layers.Dense(10)(flat)).save(path)
    with pytest.raises(example.RefusedError, match="teacher_range.*uint8.*255"):
        example.run(config(teacher=str(path)))


def test_reported_figures_are_those_of_the_exported_student(finished, teacher_file):
    asked, report = finished
    data = example.load_dataset("mnist", asked.data_dir)
    model = tf.saved_model.load(str(asked.folder / "student" / "1"))
    serve = model.signatures["serving_default"]
    by_student = serve(image=tf.constant(data.test_images))["class"].numpy()
    by_teacher = dpt.load_teacher(teacher_file).predict(data.test_images).argmax(-1)
    accuracy = np.mean(by_student == data.test_labels)
    assert report["student"] == pytest.approx(
        {
            "test_accuracy": accuracy,
            "agreement": np.mean(by_student == by_teacher),
        }
    )
    assert report["history"]["test_accuracy"][-1] == pytest.approx(accuracy)
    of_teacher = np.mean(by_teacher == data.test_labels)
    assert of_teacher > 0.7
    assert report["teacher"]["test_accuracy"] == pytest.approx(of_teacher)
    assert report["teacher"]["source"] == str(teacher_file)


def test_summary_says_what_is_not_protected_and_what_to_release(finished):
    asked, report = finished
    text = example.summary(report, asked.folder)
    headline, protection = text.split("\n\n")[:2]
    assert "RESPONSE" in headline and "epsilon = " in headline
    assert "does NOT protect a" in protection and "record-level" in protection
    assert "NOT for release" not in text
    assert "the noise follows from seed 7" in example.summary(
        {**report, "seed": 7}, asked.folder
    )


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"epsilon": float("inf")}, "epsilon"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"accountant": "abacus"}, "accountant"),
        ({"method": "magic"}, "method"),
        ({"unit": "person"}, "unit"),
        ({"route": "detour"}, "route"),
        ({"dataset": "imagenet"}, "dataset"),
        ({"epochs": 0}, "epochs"),
        ({"steps_per_epoch": -1}, "steps_per_epoch"),
        ({"seed": -1}, "seed"),
        ({"teacher_network": "clockwork", "teacher": None}, "teacher_network"),
        ({"teacher_network": "wavelets"}, "teacher_network"),
        (
            {"teacher_network": "wavelets", "teacher": None, "unit": "record"},
            "teacher_network",
        ),
        ({"assistant": True, "unit": "record"}, "assistant"),
        ({"teacher_range": "0;255"}, "teacher_range"),
        ({"teacher_range": "255,0"}, "teacher_range"),
        ({"teacher_range": "0,255", "teacher": None}, "teacher_range"),
        ({"route": "dp_teacher"}, "route"),
        ({"route": "votes", "method": "srr"}, "route"),
        ({"unit": "record", "method": "srr", "teacher": None}, "method"),
        ({"unit": "record", "route": "votes"}, "teacher"),
        ({"unit": "record", "shards": 10, "teacher": None}, "shards"),
        ({"shards": 10}, "shards"),
    ],
)
def test_values_out_of_range_are_refused(config, values, named):
    with pytest.raises(ValueError, match=f"Invalid value for argument `{named}`"):
        config(**values)


@pytest.fixture
def nothing_starts(monkeypatch):
    """Fails as soon as a teacher is trained or a transcriber is made."""

    def refuse(*args, **kwargs):
        raise AssertionError("too late to refuse")

    monkeypatch.setattr(example, "train_conv_teacher", refuse)
    monkeypatch.setattr(example, "build", refuse)


def bad_paths(tmp_path):
    a_file = tmp_path / "file"
    a_file.write_text("not a folder, not a model")
    damaged = tmp_path / "damaged.keras"
    damaged.write_bytes(b"PK\x03\x04 cut off")
    wide = tmp_path / "wide.keras"
    keras.Sequential([keras.layers.Input((8, 8, 1)), keras.layers.Flatten()]).save(wide)
    return {
        "output_dir": (a_file / "below", "output_dir"),
        "cache_dir": (a_file / "below", "cache_dir"),
        "data_dir": (tmp_path / "empty", "data_dir"),
        "damaged": (damaged, "damaged"),
        "missing": (tmp_path / "no.keras", "Nothing is there"),
        "wide": (wide, "28, 28, 1"),
    }


@pytest.mark.parametrize(
    "kind", ["output_dir", "cache_dir", "data_dir", "damaged", "missing", "wide"]
)
def test_bad_paths_are_refused_before_anything_starts(
    config, nothing_starts, tmp_path, kind
):
    path, said = bad_paths(tmp_path)[kind]
    values = {kind: str(path)} if kind.endswith("_dir") else {"teacher": str(path)}
    if kind == "cache_dir":
        values["teacher"] = None
    with pytest.raises(example.RefusedError, match=said):
        example.run(config(**values))


def test_the_teacher_is_trained_once(config, monkeypatch):
    recipe = example.CONV_RECIPES["mnist"]
    tiny = type(recipe)(filters=(4,), units=8, epochs=1, min_steps=1)
    monkeypatch.setitem(example.CONV_RECIPES, "mnist", tiny)
    asked = config(teacher=None)
    data = example.load_dataset("mnist", asked.data_dir)
    first, source = example.own_teacher(asked, data)
    assert source == "trained"
    second, source = example.own_teacher(asked, data)
    assert source == "cached"
    images = data.test_images[:5]
    np.testing.assert_allclose(first.predict(images), second.predict(images), atol=1e-6)
    (kept,) = (Path(asked.cache_dir) / "teachers").iterdir()
    kept.write_bytes(b"damaged")
    assert example.own_teacher(asked, data)[1] == "trained"
    bigger = type(recipe)(filters=(4,), units=9, epochs=1, min_steps=1)
    monkeypatch.setitem(example.CONV_RECIPES, "mnist", bigger)
    assert example.own_teacher(asked, data)[1] == "trained"


@pytest.fixture
def quick_wavelets(monkeypatch):
    """A recipe for wavelets of few updates."""
    recipe = type(example.WAVELET_RECIPES["mnist"])(
        directions=100, units=(8,), epochs=1, min_steps=1
    )
    monkeypatch.setitem(example.WAVELET_RECIPES, "mnist", recipe)


def test_the_teacher_may_see_with_wavelets(config, quick_wavelets):
    asked = config(teacher=None, teacher_network="wavelets")
    data = example.load_dataset("mnist", asked.data_dir)
    teacher, source = example.own_teacher(asked, data)
    assert source == "trained"
    assert "whitening" in [layer.name for layer in teacher.model.layers]
    assert example.own_teacher(asked, data)[1] == "cached"


def test_an_assistant_is_transcribed_in_the_teachers_place(config, quick_wavelets):
    asked = config(assistant=True)
    run = example.begin(asked)
    teacher = run.transcriber.teacher
    assert "whitening" in [layer.name for layer in teacher.model.layers]
    said = run.recorder.facts["teacher"]
    given = dpt.load_teacher(asked.teacher)
    test = run.dataset.test_images, np.asarray(run.dataset.test_labels)
    assert said["assisted_test_accuracy"] == pytest.approx(given.accuracy(*test))
    assert said["source"] == f"assistant, {asked.teacher}"


def test_resuming_needs_a_checkpoint(config):
    with pytest.raises(example.RefusedError, match=r"checkpoint\.keras"):
        example.run(config(resume=True))


def test_resuming_needs_the_same_command(copied):
    with pytest.raises(example.RefusedError, match="`epsilon`.*1.0, as before"):
        example.run(copied(resume=True, epsilon=8.0))


def test_a_damaged_checkpoint_is_refused(copied):
    checkpoint = copied().folder / "checkpoint.keras"
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    with pytest.raises(example.RefusedError, match="unharmed"):
        example.run(copied(resume=True))


def test_a_resumed_run_goes_on_where_it_was(finished, copied):
    first, more = finished[1], example.run(copied(epochs=2, resume=True))
    assert more["history"]["epoch"] == [1, 2]
    for name, values in first["history"].items():
        assert more["history"][name][:1] == values
    releases = [r["statement"]["details"]["releases"] for r in (first, more)]
    assert releases[1] == 2 * releases[0]
    assert more["statement"]["epsilon"] <= 1.0
    assert more["seconds"]["transcribe"] > first["seconds"]["transcribe"]


def test_ctrl_c_leaves_a_usable_state_and_resume_goes_on(config):
    asked = config(method="dpsd_label", epochs=100_000)
    process = start(*flags_of(asked))
    deadline = time.monotonic() + 300
    while not (asked.folder / "checkpoint.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == programs.EXIT_INTERRUPTED, errors
    assert "Traceback" not in errors
    assert "--resume" in output and "does NOT protect a" in output
    assert names_in(asked.folder) == FILES | KEPT
    report = json.loads((asked.folder / "report.json").read_text())
    assert report["interrupted"] is True
    assert report["statement"]["epsilon"] <= 1.0
    done = len(report["history"]["epoch"])
    assert done >= 1
    resumed = example.run(config(method="dpsd_label", epochs=done + 1, resume=True))
    assert resumed["interrupted"] is False
    assert resumed["history"]["epoch"] == list(range(1, done + 2))
    assert resumed["statement"]["epsilon"] <= 1.0
    releases = [r["statement"]["details"]["releases"] for r in (report, resumed)]
    assert releases[1] == releases[0] + 2


def test_ctrl_c_before_the_first_step_releases_nothing(config, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(dpt.DPTranscriber, "fit", interrupt)
    asked = config()
    with pytest.raises(KeyboardInterrupt):
        example.run(asked)
    assert names_in(asked.folder) == set()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--epsilon=nan"], "Invalid value for argument `epsilon`"),
        pytest.param(["--method=magic"], "--method=magic", marks=pytest.mark.slow),
        pytest.param(["--epochs=2.5"], "--epochs=2.5", marks=pytest.mark.slow),
        pytest.param(["--epsilom=1"], "epsilom", marks=pytest.mark.slow),
        pytest.param(["mnist"], "Unknown arguments", marks=pytest.mark.slow),
    ],
)
def test_the_command_line_refuses_without_a_traceback(arguments, said):
    process = start(*arguments)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == programs.EXIT_REFUSED
    assert said in errors
    assert "Traceback" not in errors and output == ""


@pytest.mark.slow
@pytest.mark.parametrize("method", example.BUILDERS)
def test_the_program_ends_well_with_every_method(config, method):
    asked = config(method=method)
    process = start(*flags_of(asked))
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert names_in(asked.folder) == FILES | KEPT
    assert str(asked.folder / "student" / "1") in output
