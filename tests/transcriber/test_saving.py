"""A transcription that is kept goes on as if it had never stopped."""

import json
import tracemalloc

import h5py
import keras
import numpy as np
import pytest

import dp_transcribe as dpt
from dp_transcribe.generators import MLPGenerator
from dp_transcribe.mechanisms import (
    ClippedGradient,
    NoisyAnswer,
    NormalizedGradient,
    RandomizedResponse,
    SelectiveRandomizedResponse,
)
from dp_transcribe.queries import FreshQueries
from dp_transcribe.transcriber import answer_learning
from tests import tiny
from tests.tiny import POOL, fit, releases

LEARNERS = [
    pytest.param(NormalizedGradient(noise_multiplier=2.0), None, id="gradient"),
    pytest.param(NoisyAnswer(noise_multiplier=2.0), None, id="answer"),
    pytest.param(SelectiveRandomizedResponse(epsilon=1.0), None, id="response"),
]


def adam_model(mechanism, queries=None, **kwargs):
    keras.utils.set_random_seed(0)
    return tiny.transcriber(
        mechanism,
        queries=queries,
        optimizer=keras.optimizers.Adam(0.01),
        generator=MLPGenerator(tiny.IMAGE, latent_dim=4, units=(8,)),
        generator_batch_size=8,
        **kwargs,
    )


def assert_same(one, other):
    for part in ("student", "generator"):
        np.testing.assert_allclose(
            tiny.flat_weights(getattr(one, part)),
            tiny.flat_weights(getattr(other, part)),
            atol=1e-6,
        )
    for name in ("optimizer", "generator_optimizer"):
        pairs = zip(
            getattr(one, name).variables, getattr(other, name).variables, strict=True
        )
        for a, b in pairs:
            np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-6)
    assert one.ledger == other.ledger
    assert int(one.noise.counter.numpy()) == int(other.noise.counter.numpy())
    assert np.array_equal(one.noise.key.numpy(), other.noise.key.numpy())
    assert one.mechanism == other.mechanism and one.queries == other.queries


@pytest.mark.parametrize(("mechanism", "queries"), LEARNERS)
@pytest.mark.parametrize("done", [1, 2])
def test_resuming_equals_the_uninterrupted_run(mechanism, queries, done, tmp_path):
    whole = adam_model(mechanism, queries)
    fit(whole, 3)
    part = adam_model(mechanism, queries)
    fit(part, done)
    part.save_checkpoint(tmp_path / "part.keras")
    resumed = keras.saving.load_model(tmp_path / "part.keras")
    assert_same(resumed, part)
    fit(resumed, 3 - done)
    assert_same(resumed, whole)
    if not isinstance(mechanism, NormalizedGradient):
        replays = [m._run.learner.get_replay() for m in (resumed, whole)]
        for a, b in zip(*replays, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("answers", [1, 2])
def test_a_replay_is_saved_in_pieces_and_is_whole_again(answers, monkeypatch, tmp_path):
    monkeypatch.setattr(answer_learning, "PIECE_BYTES", 1000)
    model = adam_model(RandomizedResponse(epsilon=1.0))
    fit(model, answers)
    pieces = list(model._run.learner.replay_pieces())
    assert len(pieces) > answers
    assert all(codes.nbytes + rows.nbytes <= 1000 for codes, rows in pieces)
    model.save_checkpoint(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for kept, saved in zip(
        loaded._run.learner.get_replay(), model._run.learner.get_replay(), strict=True
    ):
        assert saved.shape[1] == 16 * answers and np.array_equal(kept, saved)


def test_a_replay_is_never_in_memory_a_second_time(monkeypatch, tmp_path):
    """What saving allocates are pieces; a replay of 37 MB would show."""
    monkeypatch.setattr(answer_learning, "PIECE_BYTES", 2**20)
    count = 2**18
    model = adam_model(RandomizedResponse(epsilon=1.0), replay_size=count)
    learner = model._run.make_learner()
    codes = np.arange(count * tiny.PIXELS).astype(np.uint8)
    codes = codes.reshape(1, count, *tiny.IMAGE)
    released = np.ones((1, count, 2, tiny.CLASSES), np.float32)
    learner.set_replay(np.array([count]), [(codes, released)])
    # A slice of a variable reads all of it; TensorFlow keeps what that took.
    whole, kind = set(), type(learner.replay.codes)
    read = kind.value
    monkeypatch.setattr(kind, "value", lambda v: whole.add(tuple(v.shape)) or read(v))
    tracemalloc.start()
    model.save_checkpoint(tmp_path / "model.keras")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**23
    assert not {shape for shape in whole if shape[:1] == (count,)}
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert not {shape for shape in whole if shape[:1] == (count,)}
    for kept, saved in zip(
        loaded._run.learner.get_replay(), (codes, released), strict=True
    ):
        assert np.array_equal(kept, saved)


@pytest.mark.parametrize("how", ["save_checkpoint", "save", "keras.saving.save_model"])
@pytest.mark.parametrize("weights_only", [False, True])
def test_every_file_of_a_model_holds_the_replay(how, weights_only, tmp_path):
    model, path = adam_model(RandomizedResponse(epsilon=1.0)), tmp_path / "m.keras"
    fit(model, 2)
    if how.startswith("keras"):
        keras.saving.save_model(model, path)
    else:
        getattr(model, how)(path)
    if weights_only:
        loaded = adam_model(RandomizedResponse(epsilon=1.0), seed=9)
        loaded.load_weights(path)
    else:
        loaded = keras.saving.load_model(path)
    assert_same(loaded, model)
    for kept, saved in zip(
        loaded._run.learner.get_replay(), model._run.learner.get_replay(), strict=True
    ):
        assert len(saved[0]) == 32 and np.array_equal(kept, saved)


def test_a_replay_of_an_earlier_version_is_not_left_out_without_a_word(tmp_path):
    model, path = adam_model(RandomizedResponse(epsilon=1.0)), tmp_path / "m.weights.h5"
    fit(model)
    model.save_weights(path)
    with h5py.File(path, "a") as file:
        file["vars"]["replay_0"] = np.zeros(3)
    used = adam_model(RandomizedResponse(epsilon=1.0))
    with pytest.raises(ValueError, match="earlier version"):
        used.load_weights(path)
    assert len(used.ledger) == 0


def weak_and_strong(kind, **kwargs):
    """Transcribers with a large epsilon, `kind`'s, and a small one."""
    weak = tiny.transcriber(kind(), eager=False, **kwargs)
    fit(weak, 3, target_epsilon=100.0)
    strong = tiny.transcriber(NoisyAnswer(), eager=False)
    fit(strong, 6, target_epsilon=1.0)
    return weak, strong


def assert_of_no_use(model, path):
    """No statement, export, fit or file of it can be had."""
    for use in (
        model.privacy_statement,
        model.privacy_statements,
        lambda: dpt.export_student(model, path / "served"),
        lambda: fit(model, 1, target_epsilon=200.0),
        lambda: model.save_checkpoint(path / "again.keras"),
    ):
        with pytest.raises(RuntimeError, match="do not belong together"):
            use()
    assert not (path / "served" / "saved_model.pb").exists()
    assert not (path / "again.keras").exists()


def test_a_refused_file_leaves_no_student_under_another_ledger(tmp_path):
    weak, strong = weak_and_strong(NormalizedGradient)
    weak.save_checkpoint(tmp_path / "weak.keras")
    strong.save_checkpoint(tmp_path / "strong.keras")
    with pytest.raises(ValueError, match="a transcriber with NoisyAnswer"):
        strong.load_weights(tmp_path / "weak.keras")
    assert_of_no_use(strong, tmp_path)
    strong.load_weights(tmp_path / "strong.keras")
    assert strong.privacy_statement().epsilon <= 1.0
    fit(strong, 1)


def test_a_damaged_ledger_leaves_no_student_under_another(tmp_path):
    weak, strong = weak_and_strong(NoisyAnswer)
    path = tmp_path / "weak.weights.h5"
    weak.save_weights(path)
    with h5py.File(path, "r+") as file:
        ledger = file["vars"]["ledger"][()]
        del file["vars"]["ledger"]
        file["vars"]["ledger"] = ledger[:-3]
    with pytest.raises(ValueError):
        strong.load_weights(path)
    assert_of_no_use(strong, tmp_path)


def test_a_ledger_is_not_taken_without_its_student(tmp_path):
    weak, strong = weak_and_strong(NoisyAnswer, student=tiny.conv_model(1))
    path = tmp_path / "strong.weights.h5"
    strong.save_weights(path)
    with pytest.raises(ValueError, match="skip_mismatch"):
        weak.load_weights(path, skip_mismatch=True)
    assert weak.privacy_statement().epsilon > 99.0
    with pytest.raises(ValueError, match="could not be loaded"):
        weak.load_weights(path)
    assert_of_no_use(weak, tmp_path)


def test_a_file_of_a_mechanism_with_the_same_settings_is_refused(tmp_path):
    clipped = tiny.transcriber(ClippedGradient(), eager=False)
    fit(clipped, 2, target_epsilon=3.0)
    clipped.save_weights(tmp_path / "m.weights.h5")
    other = tiny.transcriber(NormalizedGradient(), eager=False)
    with pytest.raises(ValueError, match="with NormalizedGradient"):
        other.load_weights(tmp_path / "m.weights.h5")


@pytest.mark.parametrize("done", [1, 2, 3])
def test_resuming_before_in_and_after_a_rest(done, tmp_path):
    def made():
        return adam_model(RandomizedResponse(epsilon=1.0), rests=[(16, 48)])

    whole, part = made(), made()
    fit(whole, 4)
    fit(part, done)
    part.save_checkpoint(tmp_path / "part.keras")
    resumed = keras.saving.load_model(tmp_path / "part.keras")
    fit(resumed, 4 - done)
    assert_same(resumed, whole)


@pytest.mark.parametrize("weights_only", [False, True])
def test_features_of_a_frozen_front_are_computed_anew(weights_only, tmp_path):
    def made(seed):
        student = tiny.frozen_front_model(seed)
        return adam_model(RandomizedResponse(epsilon=1.0), student=student)

    whole, part = made(0), made(0)
    fit(whole, 3)
    fit(part, 2)
    if weights_only:
        part.save_weights(tmp_path / "part.weights.h5")
        resumed = made(3)  # of another front, which must not be used
        resumed.load_weights(tmp_path / "part.weights.h5")
    else:
        part.save_checkpoint(tmp_path / "part.keras")
        resumed = keras.saving.load_model(tmp_path / "part.keras")
    fit(resumed, 1)
    assert resumed._run.learner.front is not None
    np.testing.assert_allclose(
        resumed._run.learner.replay.features.numpy()[:48],
        whole._run.learner.replay.features.numpy()[:48],
        atol=2e-3,
    )
    assert_same(resumed, whole)


def test_a_checkpoint_holds_the_calibrated_noise_and_the_delta(tmp_path):
    model = adam_model(NormalizedGradient())
    fit(model, 2, target_epsilon=1.0, delta=1e-6)
    model.save_checkpoint(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert loaded.mechanism == model.mechanism and loaded.mechanism.is_calibrated
    assert loaded.privacy_statement() == model.privacy_statement()
    images = np.random.default_rng(0).random((5, *tiny.IMAGE)).astype(np.float32)
    np.testing.assert_allclose(
        loaded.predict(images, verbose=0), model.predict(images, verbose=0), atol=1e-6
    )
    fit(loaded, 1, target_epsilon=1.0, delta=1e-6)
    with pytest.raises(dpt.BudgetExceededError):
        fit(loaded, 1, target_epsilon=0.9, delta=1e-6)


@pytest.mark.parametrize(("mechanism", "queries"), LEARNERS[:2])
def test_weights_files_hold_the_whole_state_too(mechanism, queries, tmp_path):
    whole, part = adam_model(mechanism, queries), adam_model(mechanism, queries)
    fit(whole, 3)
    fit(part, 2)
    part.save_weights(tmp_path / "part.weights.h5")
    resumed = adam_model(mechanism, queries, seed=9)
    resumed.load_weights(tmp_path / "part.weights.h5")
    assert_same(resumed, part)
    fit(resumed, 1)
    assert_same(resumed, whole)
    assert resumed.privacy_statement().noise_seed == 1


def test_without_a_seed_the_key_is_kept_and_the_counter_goes_on(tmp_path):
    model = tiny.transcriber(seed=None)
    fit(model, 3)
    model.save_checkpoint(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert int(loaded.noise.counter.numpy()) == 3
    fit(loaded)
    assert int(loaded.noise.counter.numpy()) == 4
    assert loaded.privacy_statement().noise_seed is None


def test_a_new_pool_begins_after_resuming_and_the_ledger_only_grows(tmp_path):
    model = adam_model(NormalizedGradient(noise_multiplier=2.0), POOL)
    fit(model, 4)
    model.save_checkpoint(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert loaded.ledger == model.ledger
    fit(loaded, 3)
    groups = {e.spend.group: e.count for e in loaded.ledger.entries}
    assert groups == {"pool 1": 4, "pool 2": 3}
    assert releases(loaded) > releases(model)


def test_raw_answers_are_in_no_checkpoint(tmp_path):
    model = adam_model(NormalizedGradient(noise_multiplier=2.0), POOL)
    fit(model, 2)
    path = tmp_path / "m.weights.h5"
    model.save_weights(path)
    raw = model._run.learner.pool.answers.numpy()[:3].tobytes()
    content = path.read_bytes()
    assert raw[:40] not in content
    assert model.student.get_weights()[0].tobytes()[:40] in content


def test_loading_into_a_used_model_takes_the_loaded_noise_and_a_new_pool(tmp_path):
    """The traced step must not go on with the noise it was traced with."""
    strong = tiny.transcriber(
        ClippedGradient(noise_multiplier=500.0), queries=POOL, eager=False
    )
    fit(strong, 2)
    strong.save_weights(tmp_path / "strong.weights.h5")
    used = tiny.transcriber(
        ClippedGradient(noise_multiplier=1e-3), queries=POOL, eager=False
    )
    fit(used, 4)
    used.load_weights(tmp_path / "strong.weights.h5")
    assert used.mechanism.noise_multiplier == 500.0
    before = tiny.flat_weights(used.student)
    fit(used, 1)
    moved = np.std(tiny.flat_weights(used.student) - before)
    assert 0.8 < moved / (500.0 / POOL.batch_size) < 1.2
    groups = {e.spend.group: e.count for e in used.ledger.entries}
    assert groups == {"pool 1": 2, "pool 2": 1}


def test_backup_and_restore_resumes_and_keeps_the_ledger(tmp_path):
    class PowerCut(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise RuntimeError("power cut")

    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path / "backup")

    whole, cut = adam_model(LEARNERS[0].values[0]), adam_model(LEARNERS[0].values[0])
    fit(whole, 2, epochs=3)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(cut, 2, epochs=3, callbacks=[backup(), PowerCut()])
    resumed = adam_model(LEARNERS[0].values[0])
    fit(resumed, 2, epochs=3, callbacks=[backup()])
    assert_same(resumed, whole)


def test_a_save_that_is_cut_short_leaves_the_old_file(tmp_path, monkeypatch):
    model, path = tiny.transcriber(), tmp_path / "m.keras"
    fit(model)
    model.save_checkpoint(path)
    old = path.read_bytes()

    def crash(self, filepath, **_):
        filepath.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model), "save", crash)
    with pytest.raises(KeyboardInterrupt):
        model.save_checkpoint(path)
    assert path.read_bytes() == old
    monkeypatch.undo()
    fit(model)
    model.save_checkpoint(path)
    assert keras.saving.load_model(path).ledger == model.ledger
    assert [p.name for p in tmp_path.iterdir()] == ["m.keras"]
    assert path.stat().st_mode & 0o077 == 0


def test_a_save_that_is_cut_short_at_the_replay_leaves_the_old_file(
    tmp_path, monkeypatch
):
    model, path = adam_model(RandomizedResponse(epsilon=1.0)), tmp_path / "m.keras"
    fit(model)
    model.save_checkpoint(path)
    old, pieces = path.read_bytes(), model._run.learner.replay_pieces

    def crash():
        yield from pieces()
        raise KeyboardInterrupt

    monkeypatch.setattr(model._run.learner, "replay_pieces", crash)
    with pytest.raises(KeyboardInterrupt):
        model.save_checkpoint(path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["m.keras"]
    monkeypatch.undo()
    fit(model)
    model.save_checkpoint(path)
    assert_same(keras.saving.load_model(path), model)
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m.h5", "ends in .keras"),
        ("", "ends in .keras"),
        (None, "`str` or `PathLike`"),
        ("file/m.keras", "writable folder"),
    ],
)
def test_a_checkpoint_that_cannot_be_written_there_is_refused(tmp_path, name, message):
    (tmp_path / "file").touch()
    path = str(tmp_path / name) if name else name
    with pytest.raises(ValueError, match=f"`path`.*{message}"):
        tiny.transcriber().save_checkpoint(path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_checkpoint_makes_its_folder(tmp_path):
    tiny.transcriber().save_checkpoint(tmp_path / "new" / "m.keras")
    assert (tmp_path / "new" / "m.keras").is_file()


def test_export_names_what_exports_the_student_alone(tmp_path):
    model = tiny.transcriber()
    model(np.zeros((1, *tiny.IMAGE), np.float32))
    with pytest.raises(ValueError, match="`dpt.export_student"):
        model.export(str(tmp_path / "served"))
    assert not any(tmp_path.iterdir())


def test_config_round_trip():
    model = adam_model(
        SelectiveRandomizedResponse(epsilon=1.0, top_k=3),
        FreshQueries(batch_size=8),
        public_prior=tiny.UniformPixels(tiny.IMAGE),
        public_share=0.5,
    )
    copy = type(model).from_config(model.get_config())
    assert copy.mechanism == model.mechanism and copy.queries == model.queries
    assert copy.public_share == 0.5 and copy.seed == 1
    assert isinstance(copy.public_prior, tiny.UniformPixels)
    assert copy.objective == model.objective
    json.dumps(keras.saving.serialize_keras_object(model))


def test_equal_initial_weights_of_teacher_and_student_do_not_stop_a_load(tmp_path):
    def seeded():
        inputs = keras.layers.Input(tiny.IMAGE)
        start = keras.initializers.GlorotUniform(seed=3)
        dense = keras.layers.Dense(10, kernel_initializer=start)
        return keras.Model(inputs, dense(keras.layers.Flatten()(inputs)))

    taught = seeded()
    taught.set_weights(tiny.linear_model(5).get_weights())
    teacher = dpt.Teacher(taught, outputs="logits")
    model = tiny.transcriber(teacher=teacher, student=seeded())
    fit(model, 1)
    model.save_checkpoint(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    for one, other in zip(
        loaded.teacher.get_weights(), taught.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(one, other)
