"""DP-SGD of a Keras classifier: bound, sampling, ledger, resuming."""

import dp_accounting
import keras
import numpy as np
import pytest

from dp_transcribe.privacy.units import Relation, Unit
from dp_transcribe.private_teachers import PrivateTraining, fit_private_teacher
from dp_transcribe.private_teachers import descent as descent_module
from dp_transcribe.teachers import load_teacher
from tests import tiny

PLAN = PrivateTraining(
    epochs=2, batch_size=16, rows=8, learning_rate=0.5, accountant="rdp"
)
RECORDS = 48


def data(seed=0, records=RECORDS):
    random = np.random.default_rng(seed)
    images = random.uniform(size=(records, *tiny.IMAGE)).astype(np.float32)
    return images, random.integers(0, tiny.CLASSES, records)


def train(model=None, *, arrays=None, **kwargs):
    images, labels = arrays or data()
    arguments = {
        "target_epsilon": 2.0,
        "delta": 1e-5,
        "training": PLAN,
        "seed": 3,
        "verbose": 0,
        **kwargs,
    }
    return fit_private_teacher(
        model or tiny.linear_model(1, 0.1), images, labels, **arguments
    )


def a_descent(plan=PLAN, *, model=None, records=RECORDS):
    return descent_module._Descent(
        model or tiny.linear_model(1, 0.1),
        plan,
        records,
        noise_multiplier=1.5,
        delta=1e-5,
        seed=3,
    )


def test_the_statement_is_of_every_record_and_keeps_the_target():
    statement = train().statement
    assert statement.unit is Unit.RECORD
    assert statement.relation is Relation.REPLACE_SPECIAL
    assert 1.98 < statement.epsilon <= 2.0
    assert statement.covered == ("teacher",)
    assert statement.noise_seed == 3
    assert "Poisson" in statement.sampling and "0.333333" in statement.sampling
    sigma = statement.details["noise_multiplier"]
    accountant = dp_accounting.rdp.RdpAccountant()
    step = dp_accounting.PoissonSampledDpEvent(
        16 / 48, dp_accounting.GaussianDpEvent(sigma)
    )
    accountant.compose(step, 6)
    assert statement.details["releases"] == 6
    assert statement.epsilon == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-6)


def test_a_record_moves_a_step_by_at_most_the_bound():
    """Also a record of enormous pixels, and one that is not finite."""
    images, labels = data()
    descent = a_descent()
    everyone = np.arange(RECORDS)
    for number, factor in ((0, 1.0), (7, 1e4), (40, np.nan)):
        images[number] *= factor
    labels[7] = tiny.linear_model(1, 0.1)(images[7:8]).numpy().argmin()
    whole = descent._sum(images, labels, everyone)
    for number in (0, 7, 40):
        without = descent._sum(images, labels, np.delete(everyone, number))
        moved = np.sqrt(
            sum(
                np.sum((a - b) ** 2, dtype=np.float64)
                for a, b in zip(whole, without, strict=True)
            )
        )
        assert moved <= PLAN.l2_norm * (1 + 1e-4)
        assert moved < 1e-5 if number == 40 else moved > 0.1


def test_blocks_and_padding_change_nothing():
    images, labels = data()
    chosen = np.array([1, 5, 6, 7, 9, 20, 21, 30, 31, 40, 47])
    one = a_descent(PrivateTraining(rows=16, batch_size=16))
    many = a_descent(PrivateTraining(rows=4, batch_size=16))
    for a, b in zip(
        one._sum(images, labels, chosen), many._sum(images, labels, chosen), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_an_empty_sample_is_noised_and_counted(monkeypatch):
    descent = a_descent()
    nobody = tiny.tf.zeros([0], tiny.tf.int64)
    monkeypatch.setattr(descent.releases, "sample", lambda number: nobody)
    before = tiny.flat_weights(descent.model)
    descent.run_epoch(*data())
    assert descent.releases.ledger.releases(Unit.RECORD) == 3
    moved = tiny.flat_weights(descent.model) - before
    assert np.all(moved != 0.0) and 0.01 < np.std(moved) < 10.0


def test_the_noise_is_as_large_as_stated(monkeypatch):
    """On one plain step from an empty sample nothing but noise is left."""
    plan = PrivateTraining(
        epochs=1, batch_size=16, learning_rate=1.0, momentum=0.0, l2_norm=0.5
    )
    descent = a_descent(plan, model=tiny.linear_model(1, 0.1, classes=50), records=16)
    nobody = tiny.tf.zeros([0], tiny.tf.int64)
    monkeypatch.setattr(descent.releases, "sample", lambda number: nobody)
    before = tiny.flat_weights(descent.model)
    images, labels = data(records=16)
    descent.run_epoch(images, labels)
    moved = (tiny.flat_weights(descent.model) - before) * plan.batch_size
    assert np.std(moved) == pytest.approx(1.5 * 0.5, rel=0.06)


def test_samples_are_poisson():
    descent = a_descent()
    sizes = []
    for _ in range(300):
        descent.releases.begin()
        sizes.append(len(descent.releases.sample(RECORDS)))
    assert np.mean(sizes) == pytest.approx(16.0, abs=0.8)
    assert np.var(sizes) == pytest.approx(48 * (1 / 3) * (2 / 3), rel=0.3)


def test_a_resumed_training_equals_the_uninterrupted_one(tmp_path, monkeypatch):
    whole = train()
    path = tmp_path / "training.npz"
    run_epoch = descent_module._Descent.run_epoch

    def crash(self, images, labels):
        if self.epochs_done == 1:
            raise KeyboardInterrupt
        run_epoch(self, images, labels)

    monkeypatch.setattr(descent_module._Descent, "run_epoch", crash)
    with pytest.raises(KeyboardInterrupt):
        train(checkpoint=path)
    monkeypatch.undo()
    assert path.stat().st_mode & 0o077 == 0
    resumed = train(checkpoint=path)
    np.testing.assert_array_equal(
        tiny.flat_weights(whole.model), tiny.flat_weights(resumed.model)
    )
    assert resumed.statement == whole.statement


def test_every_step_shows_the_iterate_that_the_teacher_averages():
    seen = {}
    teacher = train(on_step=seen.__setitem__)
    assert list(seen) == list(range(6))
    averaged = seen[0]
    for weights in seen.values():
        kept = PLAN.ema_momentum
        averaged = [
            kept * a + (1.0 - kept) * w for a, w in zip(averaged, weights, strict=True)
        ]
    for mine, own in zip(averaged, teacher.model.get_weights(), strict=True):
        np.testing.assert_allclose(own, mine, atol=1e-5)


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    path = tmp_path / "training.npz"
    train(checkpoint=path)
    with pytest.raises(ValueError, match="checkpoint"):
        train(checkpoint=path, target_epsilon=1.0)
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="checkpoint"):
        train(checkpoint=path)


@pytest.mark.parametrize("part", [0, 1])
def test_a_checkpoint_of_other_records_is_refused(tmp_path, part):
    """Its noise was added to other sums: the difference of both would be bare."""
    path = tmp_path / "training.npz"
    train(checkpoint=path)
    arrays = [array.copy() for array in data()]
    arrays[part][5] = arrays[part][6] = arrays[part][7]
    before, model = path.read_bytes(), tiny.linear_model(1, 0.1)
    weights = tiny.flat_weights(model)
    with pytest.raises(ValueError, match="`checkpoint`.*these images") as refused:
        train(model, arrays=arrays, checkpoint=path)
    with np.load(path) as stored:
        assert len(str(stored["records"])) == 64
        assert str(stored["records"]) not in str(refused.value)
    assert path.read_bytes() == before
    np.testing.assert_array_equal(tiny.flat_weights(model), weights)


def test_a_checkpoint_of_another_model_of_the_same_shapes_is_refused(tmp_path):
    """The same noise on the sums of two models would cancel between them."""

    def squashed(activation):
        layers = keras.layers
        return keras.Sequential(
            [
                layers.Input(tiny.IMAGE),
                layers.Flatten(),
                layers.Dense(5, activation=activation),
                layers.Dense(tiny.CLASSES),
            ]
        )

    path = tmp_path / "training.npz"
    with pytest.raises(KeyboardInterrupt):
        train(squashed("tanh"), checkpoint=path, on_step=interrupt)
    with pytest.raises(ValueError, match="checkpoint"):
        train(squashed("relu"), checkpoint=path)
    train(squashed("tanh"), checkpoint=path)


def interrupt(step, weights):
    if step == 4:
        raise KeyboardInterrupt


def test_a_model_is_not_trained_twice():
    model = tiny.linear_model(1, 0.1)
    with pytest.raises(ValueError, match="delta"):
        train(model, delta=1.0)  # nothing was spent
    with pytest.raises(KeyboardInterrupt):
        train(model, on_step=interrupt)
    again = keras.Model(model.inputs, model.outputs)
    for same in (model, again):
        moved = tiny.flat_weights(same)
        with pytest.raises(RuntimeError, match="Make a new model"):
            train(same)
        np.testing.assert_array_equal(tiny.flat_weights(same), moved)
    train(keras.models.clone_model(model))


def test_a_teacher_with_a_statement_is_not_trained_on(tmp_path):
    """A budget was spent on it, by whatever route; a second statement would omit it."""
    train().save(tmp_path / "teacher.keras")
    loaded = load_teacher(tmp_path / "teacher.keras")
    before = tiny.flat_weights(loaded.model)
    with pytest.raises(RuntimeError, match="Make a new model"):
        train(loaded.model)
    np.testing.assert_array_equal(tiny.flat_weights(loaded.model), before)


def test_a_model_goes_on_from_its_checkpoint_and_no_further(tmp_path):
    whole, model = train(), tiny.linear_model(1, 0.1)
    path = tmp_path / "training.npz"
    with pytest.raises(KeyboardInterrupt):
        train(model, checkpoint=path, on_step=interrupt)
    resumed = train(model, checkpoint=path)
    np.testing.assert_array_equal(
        tiny.flat_weights(whole.model), tiny.flat_weights(model)
    )
    assert resumed.statement == whole.statement
    loaded = tiny.linear_model(1, 0.1)
    train(loaded, checkpoint=path)  # the file's training was finished
    for trained in (model, loaded):
        with pytest.raises(RuntimeError, match="Make a new model"):
            train(trained, checkpoint=tmp_path / "another.npz")
    assert not (tmp_path / "another.npz").exists()


def test_noise_is_secret_without_a_seed():
    one, two = (train(seed=None) for _ in range(2))
    assert one.statement.noise_seed is None
    assert np.std(tiny.flat_weights(one.model) - tiny.flat_weights(two.model)) > 1e-3


def test_a_saved_teacher_answers_as_before(tmp_path):
    teacher = train()
    teacher.save(tmp_path / "teacher.keras")
    loaded = load_teacher(tmp_path / "teacher.keras")
    images, _ = data(1)
    np.testing.assert_array_equal(teacher.predict(images), loaded.predict(images))
    assert loaded.statement.to_json() == teacher.statement.to_json()


def test_with_hardly_any_privacy_it_learns():
    random = np.random.default_rng(0)
    labels = random.integers(0, tiny.CLASSES, 600)
    images = random.uniform(size=(600, *tiny.IMAGE)).astype(np.float32)
    images.reshape(600, -1)[np.arange(600), labels] = 4.0
    plan = PrivateTraining(
        epochs=12, batch_size=60, rows=64, accountant="rdp", l2_norm=3.0
    )
    teacher = train(arrays=(images, labels), target_epsilon=200.0, training=plan)
    assert teacher.accuracy(images, labels) > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arrays": (data()[0], data()[1] + 1)}, "labels"),
        ({"arrays": (data()[0][:, :4], data()[1])}, "model"),
        ({"training": PrivateTraining(batch_size=49)}, "batch_size"),
        ({"target_epsilon": 0.0}, "target_epsilon"),
        ({"delta": 1.0}, "delta"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        train(**change)


def test_models_whose_records_mix_are_refused():
    layers = keras.layers
    mixing = keras.Sequential(
        [
            layers.Input(tiny.IMAGE),
            layers.Flatten(),
            layers.BatchNormalization(),
            layers.Dense(tiny.CLASSES),
        ]
    )
    with pytest.raises(ValueError, match="BatchNormalization"):
        train(mixing)
    squashed = keras.Sequential(
        [
            layers.Input(tiny.IMAGE),
            layers.Flatten(),
            layers.Dense(tiny.CLASSES, activation="softmax"),
        ]
    )
    with pytest.raises(ValueError, match="softmax"):
        train(squashed)
