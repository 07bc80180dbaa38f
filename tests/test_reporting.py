import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe import mechanisms, reporting
from tests import tiny

HISTORY = {
    "epoch": [1, 2, 3],
    "test_accuracy": [0.2, 0.5, 0.9],
    "agreement": [1.3, None, 0.7],
    "epsilon": [1.0, "inf", 1.0],
    "student_loss": [2.0, 1.0, 0.5],
}
IMAGES = np.random.default_rng(0).random((30, *tiny.IMAGE), np.float32)
LABELS = np.arange(30) % tiny.CLASSES


def averaging(**kwargs):
    """A transcriber whose student is released with averaged weights."""
    optimizer = keras.optimizers.SGD(1.0, use_ema=True, ema_momentum=0.9)
    return tiny.transcriber(optimizer=optimizer, **kwargs)


def fit(model, recorder, epochs=1):
    model.fit(
        epochs=epochs,
        steps_per_epoch=2,
        target_epsilon=8.0,
        initial_epoch=recorder.epochs_done,
        callbacks=[recorder],
        verbose=0,
    )


def png(path):
    return tf.io.decode_png(path.read_bytes(), channels=3).numpy()


def test_recorder_measures_the_weights_that_are_released():
    model, recorder = averaging(), reporting.Recorder(IMAGES, LABELS)
    fit(model, recorder)
    classes = reporting.predict_classes(model.student, IMAGES)
    assert recorder.history["test_accuracy"] == [np.mean(classes == LABELS)]
    assert recorder.history["epoch"] == [1]
    assert all(np.isfinite(recorder.history[name]) for name in reporting.MEASURED)


def test_released_weights_are_lent():
    model = averaging()
    model.fit(epochs=1, steps_per_epoch=3, target_epsilon=8.0, verbose=0)
    model.student.set_weights([w + 1.0 for w in model.student.get_weights()])
    before = tiny.flat_weights(model.student)
    with pytest.raises(KeyboardInterrupt), reporting.released_weights(model):
        average = model.optimizer._model_variables_moving_average
        expected = np.concatenate([np.ravel(v) for v in average])
        np.testing.assert_array_equal(tiny.flat_weights(model.student), expected)
        assert np.abs(expected - before).max() > 0.5
        raise KeyboardInterrupt
    np.testing.assert_array_equal(tiny.flat_weights(model.student), before)


def test_measuring_changes_nothing(tmp_path):
    plain, measured = averaging(seed=3), averaging(seed=3)
    plain.fit(epochs=2, steps_per_epoch=2, target_epsilon=8.0, verbose=0)
    fit(measured, reporting.Recorder(IMAGES, LABELS, folder=tmp_path), epochs=2)
    np.testing.assert_array_equal(
        tiny.flat_weights(plain.student), tiny.flat_weights(measured.student)
    )


def test_checkpoint_goes_on_where_it_was(tmp_path):
    whole = averaging(seed=3)
    fit(whole, reporting.Recorder(IMAGES, LABELS), epochs=2)
    first = reporting.Recorder(IMAGES, LABELS, folder=tmp_path, facts={"a": 1})
    fit(averaging(seed=3), first)
    model, progress = reporting.load_checkpoint(tmp_path)
    assert progress["facts"] == {"a": 1}
    assert 0 < progress["seconds"] <= first.seconds
    second = reporting.Recorder(IMAGES, LABELS, **progress)
    assert second.seconds >= progress["seconds"]
    fit(model, second, epochs=2)
    assert second.history["epoch"] == [1, 2]
    assert model.ledger == whole.ledger
    np.testing.assert_allclose(
        tiny.flat_weights(model.student), tiny.flat_weights(whole.student), atol=1e-6
    )


@pytest.mark.parametrize("broken", [None, "checkpoint.keras", "checkpoint.json"])
def test_missing_or_damaged_checkpoints_are_refused(tmp_path, broken):
    if broken:
        fit(averaging(), reporting.Recorder(IMAGES, LABELS, folder=tmp_path))
        (tmp_path / broken).write_bytes(b"{")
    with pytest.raises(ValueError, match=r"checkpoint\.keras"):
        reporting.load_checkpoint(tmp_path)


def test_slow_checkpoints_are_seldom_and_the_last_word_is_kept(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(reporting.time, "monotonic", lambda: now[0])
    saved_at = []

    class SlowToSave:
        stop_training = False

        def save_checkpoint(self, path):
            path.write_bytes(b"")
            saved_at.append(now[0])
            now[0] += 30.0

    recorder = reporting.Recorder(IMAGES, LABELS, folder=tmp_path)
    recorder.set_model(SlowToSave())
    recorder.set_params({"epochs": 12})
    monkeypatch.setattr(recorder, "_test_accuracy", lambda: 0.5)
    for epoch in range(12):
        now[0] += 60.0
        recorder.on_epoch_end(epoch, {})
    assert saved_at == [60.0, 60.0 + 30.0 + 300.0, 390.0 + 330.0, 720.0 + 90.0]
    kept = json.loads((tmp_path / reporting.PROGRESS).read_text())
    assert kept["history"]["epoch"] == list(range(1, 13))


def test_samples_of_answers_are_the_released_ones():
    mechanism = mechanisms.SelectiveRandomizedResponse()
    model = tiny.transcriber(mechanism)
    model.fit(epochs=1, steps_per_epoch=5, target_epsilon=8.0, verbose=0)
    replay = model._run.learner.replay  # 64 rows, 80 written: 16 are overwritten
    samples = reporting.draw_samples(model, 20)
    rows = np.arange(60, 80) % 64
    np.testing.assert_allclose(
        samples.images, replay.codes.numpy()[rows] / 255.0, atol=1e-6
    )
    released = replay.released.numpy()[rows, 0].argmax(-1)
    np.testing.assert_array_equal(samples.labels, released)
    assert "label released" in samples.caption and "Covered" in samples.caption


def test_samples_are_at_most_what_there_is():
    model = tiny.transcriber(mechanisms.NoisyAnswer())
    model.fit(epochs=1, steps_per_epoch=1, target_epsilon=8.0, verbose=0)
    assert len(reporting.draw_samples(model, 50).images) == 16


def test_samples_without_answers_are_labelled_by_the_student_alone(monkeypatch):
    model = tiny.transcriber(generator_covered=False)
    model.fit(epochs=1, steps_per_epoch=1, target_epsilon=8.0, verbose=0)

    def refuse(*args):
        raise AssertionError("the teacher was asked")

    monkeypatch.setattr(model.teacher, "probabilities", refuse)
    samples = reporting.draw_samples(model, 7)
    classes = reporting.predict_classes(model.student, samples.images)
    np.testing.assert_array_equal(samples.labels, classes)
    assert samples.images.shape == (7, *tiny.IMAGE)
    assert "by the student" in samples.caption
    assert "NOT covered" in samples.caption


@pytest.mark.parametrize(("count", "channels"), [(0, 1), (1, 1), (13, 3)])
def test_grid_of_samples(tmp_path, count, channels):
    images = np.ones((count, 8, 8, channels), np.float32)
    samples = reporting.Samples(images, np.arange(count), "caption")
    reporting.plot_samples(tmp_path / "samples.png", samples, columns=10)
    assert png(tmp_path / "samples.png").std() > 0


def test_curve_shows_what_was_recorded(tmp_path):
    flat = {**HISTORY, "test_accuracy": [0.2] * 3}
    empty = {name: [] for name in HISTORY}
    pictures = []
    for name, history in (("a", HISTORY), ("b", flat), ("c", empty)):
        path = tmp_path / f"{name}.png"
        reporting.plot_curve(path, history, teacher_accuracy=0.99)
        pictures.append(png(path))
    assert all(p.shape == pictures[0].shape for p in pictures)
    assert not np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[1], pictures[2])


def test_files_are_never_half_written(tmp_path):
    path = tmp_path / "report.json"
    reporting.write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        reporting.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
