"""No ordinary use of Keras makes the ledger forget or the noise come twice."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe import queries
from dp_transcribe.mechanisms import NormalizedGradient, RandomizedResponse
from dp_transcribe.teachers import Teacher
from tests import tiny
from tests.tiny import POOL, fit, releases


def counter(model):
    return int(model.noise.counter.numpy())


def key(model):
    return model.noise.key.numpy().tolist()


@pytest.mark.parametrize("traced", [False, True])
def test_a_step_of_its_own_is_refused(traced):
    model = tiny.transcriber()
    step = (lambda: model.train_step(None)) if not traced else None
    step = step or tf.function(lambda: model.train_step(None))
    before = tiny.flat_weights(model.student)
    with pytest.raises(RuntimeError, match="not accounted for"):
        step()
    fit(model, 1)
    with pytest.raises(RuntimeError, match="not accounted for"):
        step()
    assert releases(model) == counter(model) == 1
    assert not np.array_equal(tiny.flat_weights(model.student), before)


def test_a_batch_of_its_own_is_accounted():
    model = tiny.transcriber()
    fit(model, 1)
    model.train_on_batch(np.zeros([1]))
    assert releases(model) == counter(model) == 2


def test_a_pool_that_was_not_filled_is_never_used(monkeypatch):
    monkeypatch.setattr(queries, "CHUNK", 16)
    fails, calls = [], []
    linear = tiny.linear_model(5)

    def answer(images):
        calls.append(1)
        if fails and len(calls) > 2:
            raise KeyboardInterrupt
        return linear(images)

    teacher = Teacher(answer, input_shape=tiny.IMAGE, outputs="logits")
    model = tiny.transcriber(teacher=teacher, queries=POOL)
    tf.config.run_functions_eagerly(True)
    try:
        fit(model, POOL.updates)
        first = {row.tobytes() for row in model._run.learner.pool.codes.numpy()}
        fails.append(True)
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            fit(model, 1)
        fails.clear()
        fit(model, 1)
    finally:
        tf.config.run_functions_eagerly(False)
    now = {row.tobytes() for row in model._run.learner.pool.codes.numpy()}
    assert not first & now
    groups = {e.spend.group: e.count for e in model.ledger.entries}
    assert groups == {"pool 1": POOL.updates, "pool 2": 1, "pool 3": 1}


def test_putting_weights_back_does_not_bring_noise_back():
    model = tiny.transcriber()
    fit(model, 2)
    weights = model.get_weights()
    fit(model, 2)
    model.set_weights(weights)  # as EarlyStopping does
    fit(model, 1)
    assert counter(model) == releases(model) == 5


def test_the_key_is_no_weight_of_the_model_or_its_layers():
    model = tiny.transcriber(seed=None)
    fit(model, 1)
    holders = [model, *model.layers]
    values = [np.ravel(w) for holder in holders for w in holder.get_weights()]
    assert not np.isin(key(model), np.concatenate(values)).any()


def test_a_copy_without_the_ledger_states_nothing_and_spends_nothing():
    model = tiny.transcriber()
    fit(model, 3)
    copy = type(model).from_config(model.get_config())
    copy.compile(keras.optimizers.SGD(1.0), run_eagerly=True)
    copy.set_weights(model.get_weights())
    for call in (copy.privacy_statement, lambda: fit(copy, 1)):
        with pytest.raises(RuntimeError, match="3 releases and the ledger knows of 0"):
            call()
    assert releases(copy) == 0


def test_other_steps_per_execution_are_counted():
    arguments = {"steps_per_execution": 5}
    model = tiny.transcriber(eager=False, compile_arguments=arguments)
    fit(model, 5)
    model.steps_per_execution = 1
    fit(model, 5)
    assert releases(model) == counter(model) == 10


@pytest.mark.parametrize("pooled", [True, False])
def test_a_pool_that_is_resumed_has_noise_of_its_own(pooled, tmp_path):
    model = tiny.transcriber(queries=POOL if pooled else None, seed=None)
    fit(model, 2)
    model.save_checkpoint(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert key(loaded) == key(model)
    fit(loaded, 1)
    fit(model, 1)
    # Other queries than those of the run that goes on, so other noise; with fresh
    # queries both are the same.
    assert (key(loaded) != key(model)) == pooled


@pytest.mark.parametrize(
    "mechanism",
    [NormalizedGradient(noise_multiplier=4.0), RandomizedResponse(epsilon=1.0)],
)
def test_going_back_to_a_checkpoint_forgets_no_release(mechanism, tmp_path):
    model = tiny.transcriber(mechanism)
    fit(model, 2)
    model.save_weights(tmp_path / "early.weights.h5")
    early = tiny.flat_weights(model.student)
    fit(model, 3)
    model.load_weights(tmp_path / "early.weights.h5")
    np.testing.assert_array_equal(tiny.flat_weights(model.student), early)
    assert releases(model) == 5
    fit(model, 1)
    assert releases(model) == 6


@pytest.mark.parametrize("name", ["teacher", "student", "generator_covered", "seed"])
def test_what_was_checked_is_fixed(name):
    model = tiny.transcriber()
    with pytest.raises(AttributeError):
        setattr(model, name, None)
    assert model.privacy_statement().noise_seed == 1
