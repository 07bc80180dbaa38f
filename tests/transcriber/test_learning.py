"""The path from protected answers to the student's weights, with its noise."""

import itertools
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from dp_transcribe.mechanisms import (
    ClippedGradient,
    NoisyAnswer,
    NormalizedGradient,
    NormalizedOutputGradient,
    RandomizedResponse,
    SelectiveRandomizedResponse,
)
from dp_transcribe.mechanisms.base import MAX_LOSS
from dp_transcribe.mechanisms.noise import QUERIES, SAMPLING
from dp_transcribe.queries import FreshQueries, QueryPool, dequantize
from dp_transcribe.transcriber import learning
from dp_transcribe.transcriber.run import learner_for
from tests import tiny

SIGMA, NORM, BATCH = 1.8, 0.7, 64
GRADIENTS = (ClippedGradient, NormalizedGradient, NormalizedOutputGradient)


def silent(kind=ClippedGradient, *, queries=None, seed=1, optimizer=None, **kwargs):
    """A transcription in which no answer contributes: what moves is the noise."""
    return tiny.transcriber(
        kind(noise_multiplier=SIGMA, l2_norm=NORM, **kwargs),
        teacher=tiny.silent_teacher(),
        generator=tiny.SinglePixels(tiny.IMAGE),
        queries=queries or FreshQueries(batch_size=BATCH),
        seed=seed,
        optimizer=optimizer,
    )


def steps(model, count):
    """Movement of the student's kernel in each of several steps."""
    movements = []
    for _ in range(count):
        before = model.student.get_weights()[0]
        model.fit(epochs=1, steps_per_epoch=1, verbose=0)
        movements.append((model.student.get_weights()[0] - before).ravel())
    return movements


def assert_deviation(sample, deviation):
    """The sample is N(0, deviation²), and a test with this power says so."""

    def p_value(scaled):
        squares = float(np.sum(np.square(scaled, dtype=np.float64)))
        below = stats.chi2.cdf(squares, scaled.size)
        return min(below, 1 - below)

    unit = sample / deviation
    assert stats.kstest(unit, "norm").pvalue > 1e-6
    assert p_value(unit) > 1e-6
    assert p_value(unit * 2 / 3) < 1e-9
    assert p_value(unit * 3 / 2) < 1e-9


@pytest.mark.parametrize("kind", GRADIENTS)
def test_noise_of_an_update_is_sigma_times_sensitivity_over_the_batch_size(kind):
    (movement,) = steps(silent(kind), 1)
    assert movement.size == 640
    assert_deviation(movement, SIGMA * NORM / BATCH)


@pytest.mark.parametrize("batch_size", [4, 32])
def test_a_pools_noise_is_divided_by_the_configured_batch_size(batch_size):
    """And not by the sample's, whose size is secret."""
    queries = QueryPool(size=BATCH, batch_size=batch_size, updates=20)
    (movement,) = steps(silent(queries=queries), 1)
    assert_deviation(movement, SIGMA * NORM / batch_size)


@pytest.mark.parametrize("kind", GRADIENTS)
def test_consecutive_updates_have_independent_noise(kind):
    first, second, third = steps(silent(kind), 3)
    for a, b in [(first, second), (second, third), (first, third)]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(640)
    assert_deviation(first - second, SIGMA * NORM / BATCH * np.sqrt(2))


@pytest.mark.parametrize("kind", GRADIENTS)
def test_a_seed_repeats_the_noise_and_no_seed_never_does(kind):
    (one,), (same,) = (steps(silent(kind, seed=5), 1) for _ in range(2))
    (other,) = steps(silent(kind, seed=6), 1)
    (secret,), (secret_too,) = (steps(silent(kind, seed=None), 1) for _ in range(2))
    assert np.array_equal(one, same)
    for a, b in [(one, other), (one, secret), (secret, secret_too)]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(640)
    assert_deviation(secret, SIGMA * NORM / BATCH)


@pytest.mark.parametrize("kind", GRADIENTS[1:])
def test_what_is_shown_carries_noise_of_the_same_scale(kind):
    model = silent(kind)
    model._run.prepare()
    unit = model.mechanism.statistics_norm / np.sqrt(2) * BATCH
    agreement, loss = np.array([model._run.learner.update() for _ in range(100)]).T
    assert_deviation(
        np.concatenate([agreement * unit, loss * unit / MAX_LOSS]), SIGMA * NORM
    )
    assert abs(np.corrcoef(agreement, loss)[0, 1]) < 0.4


def test_noise_of_the_output_gradient_is_drawn_for_every_row():
    """The bias gets the sum of 64 rows, each with noise of its own."""
    model = silent(NormalizedOutputGradient)
    model._run.prepare()
    sums = []
    for _ in range(30):
        before = model.student.get_weights()
        model._run.learner.update()
        after = model.student.get_weights()
        np.testing.assert_allclose(
            (after[0] - before[0]).sum(0), after[1] - before[1], atol=1e-4
        )
        sums.append(after[1] - before[1])
    assert_deviation(np.ravel(sums), SIGMA * NORM / BATCH * 8)


def test_the_signal_is_there_beside_the_noise():
    """Difference of a run with the teacher's answers and the same run without."""
    model = tiny.transcriber(
        ClippedGradient(noise_multiplier=SIGMA, l2_norm=NORM),
        teacher=tiny.linear_teacher(),
        generator=tiny.SinglePixels(tiny.IMAGE),
        queries=FreshQueries(batch_size=BATCH),
    )
    (with_answers,), (without,) = steps(model, 1), steps(silent(), 1)
    difference = with_answers - without
    assert 0 < np.linalg.norm(difference) <= NORM
    batch = model._run.learner._batch(tf.constant(0, tf.int64))
    fresh = tiny.linear_model(0, 0.1)
    release = model.mechanism.summed(fresh, batch, None)
    expected = -release.gradients[0].numpy().ravel() / BATCH
    np.testing.assert_allclose(difference, expected, atol=1e-5)


@pytest.mark.parametrize("queries", [FreshQueries(batch_size=32), None])
def test_without_noise_and_bound_an_update_is_the_plain_keras_step(queries):
    """σ = 0 and C beyond reach, two steps of Adam."""
    queries = queries or QueryPool(size=100, batch_size=32, updates=10)
    model = tiny.transcriber(
        ClippedGradient(noise_multiplier=0.0, l2_norm=1e6),
        student=tiny.conv_model(),
        queries=queries,
        optimizer=keras.optimizers.Adam(0.01),
    )
    plain = tiny.conv_model()
    plain.compile(keras.optimizers.Adam(0.01))
    for update in range(2):
        number = int(model.noise.counter.numpy())
        if isinstance(queries, QueryPool) and update == 0:
            number += 1  # the first was taken to fill the pool
        model.fit(epochs=1, steps_per_epoch=1, verbose=0)
        batch = model._run.learner._batch(tf.constant(number, tf.int64))
        with tf.GradientTape() as tape:
            logits = plain(batch.queries)
            divergences = keras.losses.KLDivergence(reduction=None)(
                batch.answers, tf.nn.softmax(logits)
            )
            loss = tf.reduce_sum(divergences * batch.mask) / 32
        variables = plain.trainable_variables
        plain.optimizer.apply_gradients(
            zip(tape.gradient(loss, variables), variables, strict=True)
        )
    np.testing.assert_allclose(
        tiny.flat_weights(model.student), tiny.flat_weights(plain), atol=2e-5
    )


def test_an_empty_poisson_batch_is_noised_and_counted():
    queries = QueryPool(size=40, batch_size=1, updates=40)
    model = silent(queries=queries, seed=2)
    empty = 0
    for _ in range(8):
        before = model.student.get_weights()[0]
        model.fit(epochs=1, steps_per_epoch=1, verbose=0)
        number = model.noise.counter - 1
        if int(tf.reduce_sum(model._run.learner._batch(number).mask)) == 0:
            empty += 1
            moved = (model.student.get_weights()[0] - before).ravel()
            assert_deviation(moved, SIGMA * NORM)
    assert empty >= 1
    assert sum(entry.count for entry in model.ledger.entries) == 8


def test_a_masked_row_contributes_nothing():
    """Every sample ends in a masked copy of row 0; its answer must not count twice."""
    model = tiny.transcriber(
        ClippedGradient(noise_multiplier=0.0, l2_norm=1e6),
        generator=tiny.SinglePixels(tiny.IMAGE),
        queries=QueryPool(size=64, batch_size=64, updates=3),
    )
    before = model.student.get_weights()[1]
    model.fit(epochs=1, steps_per_epoch=1, verbose=0)
    images = tiny.SinglePixels(tiny.IMAGE).sample(64, tf.constant([0, 0]))
    logits = tiny.linear_model(0, 0.1)(images)
    answers = model.teacher.probabilities(images)
    expected = -tf.reduce_mean(tf.nn.softmax(logits) - answers, 0)
    moved = model.student.get_weights()[1] - before
    np.testing.assert_allclose(moved, expected, atol=1e-6)


def test_student_updates_ask_new_queries_every_time():
    model = silent(optimizer=keras.optimizers.SGD(0.0))
    model._run.prepare()
    asked = []
    draw = model.draw_queries

    def recorded(count, seed):
        asked.append(tuple(seed.numpy()))
        return draw(count, seed)

    model.draw_queries = recorded
    for _ in range(10):
        model._run.learner.update()
    assert len(set(asked)) == 10


def test_two_pools_hold_different_queries():
    model = tiny.transcriber(queries=QueryPool(size=30, batch_size=10, updates=3))
    model._run.prepare()
    model._run.learner.renew_pool()
    first = model._run.learner.pool.codes.numpy()
    model._run.learner.renew_pool()
    second = model._run.learner.pool.codes.numpy()
    rows = [tuple(row.ravel()) for row in np.concatenate([first, second])]
    assert len(set(rows)) == 60


def test_a_pools_answers_are_the_teachers_to_its_quantised_queries():
    model = tiny.transcriber(queries=QueryPool(size=30, batch_size=10, updates=3))
    model._run.prepare()
    model._run.learner.renew_pool()
    pool = model._run.learner.pool
    images = dequantize(pool.codes.value(), (0.0, 1.0))
    np.testing.assert_allclose(
        pool.answers.numpy(), model.teacher.probabilities(images), atol=1e-6
    )


def test_queries_and_samples_never_use_the_bits_of_the_noise():
    model = silent()
    noise = model.noise
    number = tf.constant(3, tf.int64)
    (drawn,) = noise.normal_like([tf.zeros([500])], number=number)
    for purpose in (QUERIES, SAMPLING):
        seed = noise.stream(number, purpose)
        other = tf.random.stateless_normal([500], seed).numpy()
        assert abs(np.corrcoef(drawn, other)[0, 1]) < 0.2


# Private answers.


@pytest.mark.parametrize(
    "mechanism", [NoisyAnswer(noise_multiplier=1.0), RandomizedResponse(epsilon=1.0)]
)
def test_every_query_is_answered_once_and_never_again(mechanism):
    asked = []

    def answer(images):
        asked.append(images.numpy())
        return tiny.linear_model(5)(images)

    teacher = tiny.Teacher(answer, input_shape=tiny.IMAGE, outputs="logits")
    asked.clear()
    model = tiny.transcriber(mechanism, teacher=teacher, student_updates=5)
    model.fit(epochs=1, steps_per_epoch=4, verbose=0)
    rows = [tuple(row.ravel()) for row in np.concatenate(asked)]
    assert len(rows) == len(set(rows)) == 4 * 16
    assert sum(entry.count for entry in model.ledger.entries) == 4


def test_learning_from_the_replay_leaves_ledger_and_replay_alone():
    model = tiny.transcriber(NoisyAnswer(noise_multiplier=1.0))
    model.fit(epochs=1, steps_per_epoch=2, verbose=0)
    entries, replay = model.ledger.entries, model._run.learner.get_replay()
    before = tiny.flat_weights(model.student)
    for _ in range(5):
        model._run.learner.update()
    assert not np.array_equal(before, tiny.flat_weights(model.student))
    assert model.ledger.entries == entries
    for old, new in zip(replay, model._run.learner.get_replay(), strict=True):
        assert np.array_equal(old, new)


def test_a_frozen_front_is_computed_once_and_changes_nothing():
    """The same run with a second student, which keeps queries alone in the replay."""

    def run(**kwargs):
        student = tiny.frozen_front_model()
        model = tiny.transcriber(
            NoisyAnswer(noise_multiplier=1.0), student=student, **kwargs
        )
        tiny.fit(model, 3)
        return model

    split, whole = run(), run(second_student=tiny.linear_model(3))
    assert split._run.learner.front is not None and whole._run.learner.front is None
    codes, _ = split._run.learner.get_replay()
    images = dequantize(tf.constant(codes[0]), (0.0, 1.0))
    kept = split._run.learner.replay.features.numpy()[:48]
    np.testing.assert_allclose(kept, split._run.learner.front(images), atol=2e-3)
    np.testing.assert_allclose(
        tiny.flat_weights(split.student), tiny.flat_weights(whole.student), atol=2e-3
    )
    assert not np.array_equal(
        split.student.layers[-1].kernel, tiny.conv_model().layers[-1].kernel
    )


@pytest.mark.parametrize(
    "queries",
    [QueryPool(size=40, batch_size=20, updates=4), FreshQueries(batch_size=16)],
)
def test_gradients_behind_a_frozen_front_are_those_of_the_whole_student(
    queries, monkeypatch
):
    def run():
        student = tiny.frozen_front_model()
        model = tiny.transcriber(
            NormalizedGradient(noise_multiplier=1.0), student=student, queries=queries
        )
        tiny.fit(model, 3)
        return model

    split = run()
    monkeypatch.setattr(learning, "split_frozen", lambda student: None)
    whole = run()
    assert split._run.learner.front is not None and whole._run.learner.front is None
    np.testing.assert_allclose(
        tiny.flat_weights(split.student), tiny.flat_weights(whole.student), atol=2e-3
    )
    if split._run.learner.pool is not None:
        images = dequantize(whole._run.learner.pool.codes.value(), (0.0, 1.0))
        kept = split._run.learner.pool.features.numpy()
        np.testing.assert_allclose(kept, split._run.learner.front(images), atol=2e-3)


def test_the_replay_holds_released_answers_and_no_raw_ones():
    model = tiny.transcriber(RandomizedResponse(epsilon=0.5))
    model.fit(epochs=1, steps_per_epoch=4, verbose=0)
    codes, released = model._run.learner.get_replay()
    assert model._run.learner.replay_written()[0] == 64
    labels = released[0, :, 0]
    assert np.all((labels == 0) | (labels == 1)) and np.all(labels.sum(-1) == 1)
    images = dequantize(tf.constant(codes[0]), (0.0, 1.0))
    truth = np.argmax(model.teacher.probabilities(images), -1)
    told = np.mean(labels.argmax(-1) == truth)
    assert abs(told - np.exp(0.5) / (np.exp(0.5) + 9)) < 4 * np.sqrt(0.15 * 0.85 / 64)


def test_the_prior_is_the_student_and_not_the_teacher():
    """One candidate per query: the student's own prediction, whatever the answer."""
    model = tiny.transcriber(
        SelectiveRandomizedResponse(epsilon=8.0, top_k=1),
        student_updates=1,
        optimizer=keras.optimizers.SGD(0.0),
    )
    model.fit(epochs=1, steps_per_epoch=2, verbose=0)
    codes, released = model._run.learner.get_replay()
    logits = model.student(dequantize(tf.constant(codes[0, :32]), (0.0, 1.0)))
    assert np.array_equal(released[0, :32, 1].argmax(-1), np.argmax(logits, -1))


def test_the_student_rests_while_so_many_queries_are_answered():
    """16 queries a step: it rests in steps 0 and 3; answers come in throughout."""
    model = tiny.transcriber(
        NoisyAnswer(noise_multiplier=1.0), rests=[(0, 16), (48, 64)]
    )
    weights = [tiny.flat_weights(model.student)]
    keep = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: weights.append(
            tiny.flat_weights(model.student)
        )
    )
    history = model.fit(epochs=1, steps_per_epoch=5, verbose=0, callbacks=[keep])
    moved = [not np.array_equal(a, b) for a, b in itertools.pairwise(weights)]
    assert moved == [False, True, True, False, True]
    assert sum(entry.count for entry in model.ledger.entries) == 5
    assert model._run.learner.replay_written()[0] == 80
    assert np.isfinite(history.history["student_loss"][0])


@pytest.mark.parametrize(
    "rests",
    [[(5, 5)], [(8, 4)], [(0, 8), (4, 9)], [(-1, 4)], [(1, 2, 3)], ["ab"], 5],
)
def test_rests_that_are_no_rests_are_refused(rests):
    with pytest.raises(ValueError, match="`rests`"):
        tiny.transcriber(NoisyAnswer(noise_multiplier=1.0), rests=rests)


def test_rests_of_a_mechanism_without_answers_are_refused():
    with pytest.raises(ValueError, match="releases no answers"):
        tiny.transcriber(ClippedGradient(noise_multiplier=1.0), rests=[(0, 4)])


def test_the_replay_of_another_size_is_refused():
    small = tiny.transcriber(NoisyAnswer(noise_multiplier=1.0), replay_size=64)
    large = tiny.transcriber(NoisyAnswer(noise_multiplier=1.0), replay_size=128)
    tiny.fit(small, 5)  # 80 queries: the oldest of 64 are overwritten
    large._run.prepare()
    with pytest.raises(ValueError, match="replay_size"):
        large._run.learner.set_replay(
            small._run.learner.replay_written(), small._run.learner.replay_pieces()
        )


def test_a_mechanism_nobody_can_learn_from_is_refused():
    with pytest.raises(TypeError, match="No way to learn"):
        learner_for(types.SimpleNamespace(mechanism=object()))
