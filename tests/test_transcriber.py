"""The transcriber spends what it says, keeps what it promises and can be kept."""

import json

import dp_accounting
import keras
import numpy as np
import pytest
import tensorflow as tf

import dp_transcribe as dpt
from dp_transcribe.generators import MLPGenerator
from dp_transcribe.learning import GradientLearner
from dp_transcribe.mechanisms import (
    ClippedGradient,
    NoisyAnswer,
    NormalizedGradient,
    NormalizedOutputGradient,
    RandomizedResponse,
    SelectiveRandomizedResponse,
)
from dp_transcribe.privacy.units import Unit
from dp_transcribe.queries import FreshQueries, QueryPool
from tests import tiny

POOL = QueryPool(size=64, batch_size=8, updates=10)


def epsilon(model, delta=tiny.DELTA):
    return model.ledger.epsilon(unit=Unit.RESPONSE, delta=delta)


def releases(model):
    return sum(entry.count for entry in model.ledger.entries)


def fit(model, steps=1, *, epochs=1, **kwargs):
    return model.fit(epochs=epochs, steps_per_epoch=steps, verbose=0, **kwargs)


class Watch(keras.callbacks.Callback):
    """Epsilon that is shown beside the ledger's, after every batch and epoch."""

    def __init__(self):
        super().__init__()
        self.batches, self.epochs = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append((logs["epsilon"], epsilon(self.model)))

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append((logs["epsilon"], epsilon(self.model)))


# What it costs.


@pytest.mark.parametrize(
    ("mechanism", "queries"),
    [
        (NormalizedGradient(), None),
        (ClippedGradient(), POOL),
        (NormalizedOutputGradient(), None),
        (NoisyAnswer(), None),
        (RandomizedResponse(), None),
        (SelectiveRandomizedResponse(), None),
    ],
)
def test_a_target_is_reached_and_not_passed(mechanism, queries):
    model = tiny.transcriber(mechanism, queries=queries)
    fit(model, 10, target_epsilon=2.0, delta=tiny.DELTA)
    assert 0.99 * 2.0 < epsilon(model) <= 2.0
    statement = model.privacy_statement()
    assert statement.epsilon <= 2.0 and statement.unit is Unit.RESPONSE
    assert statement.delta in (0.0, tiny.DELTA)
    assert statement.mechanism == mechanism.name


def test_fresh_queries_cost_one_gaussian_whatever_the_steps():
    model = tiny.transcriber(NormalizedGradient(noise_multiplier=4.0))
    fit(model, 3)
    first = epsilon(model)
    fit(model, 5, epochs=2)
    accountant = dp_accounting.rdp.RdpAccountant()
    accountant.compose(dp_accounting.GaussianDpEvent(4.0))
    assert first == epsilon(model)
    assert first == pytest.approx(accountant.get_epsilon(tiny.DELTA), rel=1e-6)
    assert releases(model) == 13


def test_pools_are_renewed_when_used_up_and_cost_as_one():
    model = tiny.transcriber(NormalizedGradient(noise_multiplier=2.0), queries=POOL)
    fit(model, 10)
    one = epsilon(model)
    fit(model, 15)
    groups = {e.spend.group: e.count for e in model.ledger.entries}
    assert groups == {"pool 1": 10, "pool 2": 10, "pool 3": 5}
    assert epsilon(model) == one
    event = model.ledger.entries[0].spend.event
    assert event == dp_accounting.PoissonSampledDpEvent(
        8 / 64, dp_accounting.GaussianDpEvent(2.0)
    )


def test_several_student_updates_are_several_releases_of_gradients():
    model = tiny.transcriber(student_updates=3)
    fit(model, 2)
    assert releases(model) == 6
    model = tiny.transcriber(NoisyAnswer(noise_multiplier=1.0), student_updates=3)
    fit(model, 2)
    assert releases(model) == 2


@pytest.mark.parametrize("queries", [None, POOL], ids=["fresh", "pool"])
def test_a_release_is_recorded_before_it_is_used(queries, monkeypatch):
    model = tiny.transcriber(queries=queries)
    fit(model)
    before = tiny.flat_weights(model.student)

    def crash(self):
        raise RuntimeError("power cut")

    monkeypatch.setattr(GradientLearner, "step", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(model)
    assert releases(model) == 2
    assert np.array_equal(before, tiny.flat_weights(model.student))


@pytest.mark.parametrize(
    ("student_updates", "per_execution", "updates", "steps"),
    [(1, 1, 10, 4), (1, 1, 8, 13), (3, 1, 10, 5), (1, 3, 10, 7), (2, 3, 16, 4)],
)
def test_epsilon_shown_is_never_below_the_ledgers_and_equal_after_the_epoch(
    student_updates, per_execution, updates, steps
):
    model = tiny.transcriber(
        NormalizedGradient(noise_multiplier=2.0),
        queries=QueryPool(size=64, batch_size=8, updates=updates),
        student_updates=student_updates,
        compile_arguments={"steps_per_execution": per_execution},
    )
    watch = Watch()
    history = fit(model, steps, epochs=3, callbacks=[watch])
    assert len(watch.epochs) == 3
    assert all(shown >= spent for shown, spent in watch.batches)
    assert all(shown == spent for shown, spent in watch.epochs)
    assert history.history["epsilon"] == [spent for _, spent in watch.epochs]


@pytest.mark.parametrize(
    "mechanism", [NormalizedGradient(), NoisyAnswer(), RandomizedResponse()]
)
def test_epsilon_of_fresh_queries_is_shown_from_the_first_step(mechanism):
    model, watch = tiny.transcriber(mechanism), Watch()
    fit(model, 3, epochs=2, target_epsilon=1.5, callbacks=[watch])
    assert {pair for pair in watch.batches} == {(epsilon(model),) * 2}


def test_steps_in_one_execution_are_all_counted():
    model = tiny.transcriber(compile_arguments={"steps_per_execution": 4}, eager=False)
    fit(model, 8)
    assert releases(model) == 8
    assert int(model.noise.counter.numpy()) == 8


def test_epsilon_is_infinite_without_noise_and_the_statement_says_so():
    model = tiny.transcriber(NormalizedGradient(noise_multiplier=0.0))
    history = fit(model)
    assert history.history["epsilon"] == [np.inf]
    assert not model.privacy_statement().is_private


# What it refuses.


def assert_untouched(model, weights):
    assert len(model.ledger) == 0
    assert int(model.noise.counter.numpy()) == 0
    assert np.array_equal(tiny.flat_weights(model.student), weights)


@pytest.mark.parametrize(
    ("mechanism", "queries"),
    [
        (NormalizedGradient(noise_multiplier=1.0), None),
        (NormalizedGradient(noise_multiplier=0.0), None),
        (NormalizedGradient(noise_multiplier=0.3), POOL),
        (NormalizedOutputGradient(noise_multiplier=1.0), None),
        (NoisyAnswer(noise_multiplier=1.0), None),
        (RandomizedResponse(epsilon=1.01), None),
        (SelectiveRandomizedResponse(epsilon=3.0), None),
    ],
)
def test_too_little_noise_is_refused_before_the_first_step(mechanism, queries):
    model = tiny.transcriber(mechanism, queries=queries)
    weights = tiny.flat_weights(model.student)
    with pytest.raises(dpt.BudgetExceededError, match="target_epsilon"):
        fit(model, target_epsilon=1.0)
    assert_untouched(model, weights)


def budget_model(**kwargs):
    """Noise for about half of what a pool is meant to serve."""
    return tiny.transcriber(
        NormalizedGradient(noise_multiplier=1.0),
        queries=QueryPool(size=64, batch_size=8, updates=40),
        **kwargs,
    )


@pytest.mark.parametrize("student_updates", [1, 3])
def test_training_stops_at_the_last_step_inside_the_budget(student_updates):
    model = budget_model(student_updates=student_updates)
    target, watch = 4.0, Watch()
    fit(model, 5, epochs=10, target_epsilon=target, callbacks=[watch])
    spend = model.ledger.entries[-1].spend
    assert epsilon(model) <= target
    assert (
        model.ledger.epsilon_after(
            spend, student_updates, unit=Unit.RESPONSE, delta=tiny.DELTA
        )
        > target
    )
    assert 0 < len(watch.batches) < 40
    assert all(shown <= target for shown, _ in watch.batches)
    assert all(shown >= spent for shown, spent in watch.batches)


def test_another_fit_after_the_budget_is_used_does_not_pass_the_target():
    model = budget_model()
    for _ in range(4):
        fit(model, 5, epochs=10, target_epsilon=4.0)
        assert epsilon(model) <= 4.0
    fit(model, 2, target_epsilon=4.0)
    assert epsilon(model) <= 4.0


def test_single_batches_outside_of_fit_do_not_pass_the_target_either():
    model = budget_model()
    fit(model, 5, epochs=10, target_epsilon=4.0)
    for _ in range(3):
        model.train_on_batch(np.zeros((1,)))
    assert epsilon(model) <= 4.0


@pytest.mark.parametrize(
    ("student_updates", "per_execution"), [(11, 1), (1, 11), (4, 3)]
)
def test_more_releases_at_once_than_a_pool_serves_are_refused(
    student_updates, per_execution
):
    model = tiny.transcriber(
        NormalizedGradient(),
        queries=POOL,
        student_updates=student_updates,
        compile_arguments={"steps_per_execution": per_execution},
    )
    weights = tiny.flat_weights(model.student)
    with pytest.raises(ValueError, match="updates"):
        fit(model, 12, target_epsilon=1.0)
    assert_untouched(model, weights)


def test_a_lower_target_than_what_is_spent_is_refused():
    model = tiny.transcriber(NormalizedGradient())
    fit(model, target_epsilon=2.0)
    count = releases(model)
    with pytest.raises(dpt.BudgetExceededError, match="spent"):
        fit(model, target_epsilon=1.0)
    with pytest.raises(dpt.BudgetExceededError):
        fit(model, target_epsilon=2.0, delta=1e-8)
    assert releases(model) == count
    fit(model, target_epsilon=2.0)


@pytest.mark.parametrize("target", [0, -1.0, np.nan, np.inf, "1"])
def test_a_target_that_is_no_epsilon_is_refused(target):
    model = tiny.transcriber(NormalizedGradient())
    with pytest.raises(ValueError, match="`target_epsilon`"):
        fit(model, target_epsilon=target)
    assert_untouched(model, tiny.flat_weights(tiny.linear_model(0, 0.1)))


@pytest.mark.parametrize("delta", [0, 1, 2.0, -1e-5, np.nan])
def test_a_delta_outside_of_zero_to_one_is_refused(delta):
    model = tiny.transcriber(NormalizedGradient())
    with pytest.raises(ValueError, match="`delta`"):
        fit(model, target_epsilon=1.0, delta=delta)
    assert_untouched(model, tiny.flat_weights(tiny.linear_model(0, 0.1)))


@pytest.mark.parametrize("name", ["epochs", "steps_per_epoch"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_counts_of_fit_are_checked(name, value):
    model = tiny.transcriber(NormalizedGradient())
    with pytest.raises(ValueError, match=f"`{name}`"):
        model.fit(**{name: value}, target_epsilon=1.0)


def test_no_noise_and_no_target_is_refused():
    model = tiny.transcriber(NormalizedGradient())
    with pytest.raises(ValueError, match="target_epsilon"):
        fit(model)
    assert len(model.ledger) == 0


def test_fit_before_compile_is_refused():
    model = tiny.transcriber(NormalizedGradient(), compiled=False)
    with pytest.raises(ValueError, match="compile"):
        fit(model, target_epsilon=1.0)
    assert len(model.ledger) == 0


def batch_norm_student():
    return keras.Sequential(
        [
            keras.layers.Input(tiny.IMAGE),
            keras.layers.Conv2D(4, 3),
            keras.layers.BatchNormalization(name="the_culprit"),
            keras.layers.Flatten(),
            keras.layers.Dense(tiny.CLASSES),
        ]
    )


def half_student():
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Input(tiny.IMAGE),
            layers.Flatten(),
            layers.Dense(tiny.CLASSES, dtype="mixed_float16"),
        ]
    )


def regularized_student():
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Input(tiny.IMAGE),
            layers.Flatten(),
            layers.Dense(tiny.CLASSES, kernel_regularizer="l2"),
        ]
    )


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (batch_norm_student, "the_culprit"),
        (half_student, "float16"),
        (regularized_student, "regular"),
        (lambda: tiny.linear_model(classes=7), "10 logits"),
        (lambda: dpt.students.mlp_student((9, 9, 1), 10), "input shape"),
    ],
)
@pytest.mark.parametrize("mechanism", [NormalizedGradient(), NoisyAnswer()])
def test_students_that_cannot_be_protected_are_refused(student, message, mechanism):
    with pytest.raises(ValueError, match=message):
        tiny.transcriber(mechanism, student=student())


def test_a_student_that_shares_weights_with_the_teacher_is_refused():
    shared = tiny.linear_model(5)
    with pytest.raises(ValueError, match="shares no weights"):
        tiny.transcriber(teacher=dpt.Teacher(shared), student=shared)


def test_a_float16_policy_is_refused():
    student = tiny.linear_model(0, 0.1)
    keras.config.set_dtype_policy("mixed_float16")
    try:
        with pytest.raises(ValueError, match="float16"):
            tiny.transcriber(student=student)
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mechanism": NormalizedOutputGradient(), "queries": POOL}, "FreshQueries"),
        ({"mechanism": NoisyAnswer(), "queries": POOL}, "FreshQueries"),
        ({"mechanism": RandomizedResponse(), "queries": POOL}, "FreshQueries"),
        ({"mechanism": SelectiveRandomizedResponse(top_k=11)}, "top_k"),
        ({"mechanism": NoisyAnswer(top_k=11)}, "top_k"),
        ({"mechanism": NormalizedOutputGradient(top_k=11)}, "top_k"),
        ({"mechanism": "gaussian"}, "mechanism"),
        ({"queries": 64}, "queries"),
        ({"generator": tiny.UniformPixels((9, 9, 1))}, "image_shape"),
        (
            {"generator": tiny.UniformPixels(tiny.IMAGE, output_range=(-1, 1))},
            "output_range",
        ),
        ({"public_prior": tiny.UniformPixels((9, 9, 1))}, "public_prior"),
        ({"generator": MLPGenerator(tiny.IMAGE, num_classes=7)}, "classes"),
        ({"student_updates": 0}, "student_updates"),
        ({"generator_updates": -1}, "generator_updates"),
        ({"generator_batch_size": 0}, "generator_batch_size"),
        ({"replay_size": 0}, "replay_size"),
        ({"replay_batch_size": 0}, "replay_batch_size"),
        ({"public_share": 1.1}, "public_share"),
        ({"seed": -1}, "seed"),
    ],
)
def test_parts_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny.transcriber(**arguments)


@pytest.mark.parametrize("objective", ["adversarial", "batch_norm_statistics"])
def test_an_objective_the_student_cannot_serve_is_refused_before_any_spending(
    objective,
):
    with pytest.raises(ValueError, match=objective):
        model = tiny.transcriber(
            generator=MLPGenerator(tiny.IMAGE, latent_dim=4, units=(8,)),
            objective=dpt.GeneratorObjective(**{objective: 1.0}),
        )
        try:
            fit(model)
        finally:
            assert len(model.ledger) == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mechanism", NormalizedGradient(noise_multiplier=100.0)),
        ("queries", FreshQueries(batch_size=999)),
        ("student_updates", 1),
    ],
)
def test_what_the_accounting_reads_cannot_be_changed_under_a_traced_step(name, value):
    """The step has the old noise and number of updates built in."""
    model = tiny.transcriber(student_updates=2, eager=False)
    fit(model)
    with pytest.raises(AttributeError):
        setattr(model, name, value)


# What it shows.


def test_metrics_of_gradients_come_from_the_noisy_release_alone():
    """Same queries, student and teacher: only the noise tells two runs apart."""

    def first_logs(seed, noise):
        model = tiny.transcriber(
            NormalizedGradient(noise_multiplier=noise),
            generator=tiny.SinglePixels(tiny.IMAGE),
            seed=seed,
        )
        history = fit(model).history
        assert set(history) == {"agreement", "student_loss", "epsilon"}
        return np.array([history["agreement"][0], history["student_loss"][0]])

    assert np.array_equal(first_logs(1, 0.0), first_logs(2, 0.0))
    assert np.all(np.abs(first_logs(1, 4.0) - first_logs(2, 4.0)) > 1e-3)


def test_agreement_with_answers_is_with_the_released_ones():
    """At a tiny epsilon even a perfect student agrees with one answer in ten."""
    model = tiny.transcriber(
        RandomizedResponse(epsilon=1e-3),
        student=tiny.linear_model(5),
        queries=FreshQueries(batch_size=512),
        optimizer=keras.optimizers.SGD(0.0),
    )
    assert 0.05 < fit(model).history["agreement"][0] < 0.16


def test_validation_evaluates_the_student():
    model = tiny.transcriber(compile_arguments={"metrics": ["accuracy"]}, eager=False)
    images = np.random.default_rng(0).random((20, *tiny.IMAGE)).astype(np.float32)
    labels = np.argmax(model.student.predict(images, verbose=0), -1)
    results = model.evaluate(images, labels, verbose=0, return_dict=True)
    assert set(results) == {"loss", "accuracy"} and results["accuracy"] == 1.0
    history = fit(model, 2, validation_data=(images, labels)).history
    assert {"val_loss", "val_accuracy"} <= set(history)
    np.testing.assert_allclose(
        model.predict(images, verbose=0), model.student.predict(images, verbose=0)
    )


def test_the_teacher_is_never_trained_or_listed():
    teacher = tiny.linear_teacher()
    before = [w.copy() for w in teacher.get_weights()]
    model = tiny.transcriber(teacher=teacher)
    fit(model, 3)
    for old, new in zip(before, teacher.get_weights(), strict=True):
        assert np.array_equal(old, new)
    ours = {id(v) for v in model.variables}
    assert not ours & {id(v) for v in teacher.model.variables}


def test_the_generator_learns_from_the_student_and_never_asks_the_teacher():
    asked = []

    def answer(images):
        asked.append(len(images))
        return tiny.linear_model(5)(images)

    teacher = dpt.Teacher(answer, input_shape=tiny.IMAGE, outputs="logits")
    model = tiny.transcriber(
        teacher=teacher,
        generator=MLPGenerator(tiny.IMAGE, latent_dim=4, units=(8,)),
        generator_updates=3,
        generator_batch_size=24,
    )
    asked.clear()
    before = tiny.flat_weights(model.generator)
    history = fit(model, 2).history
    assert asked == [16, 16]
    assert not np.array_equal(before, tiny.flat_weights(model.generator))
    assert np.all(np.isfinite(history["generator_loss"]))
    assert releases(model) == 2


def test_a_public_prior_makes_its_share_of_the_queries():
    model = tiny.transcriber(
        generator=MLPGenerator(tiny.IMAGE, latent_dim=4, units=(8,)),
        public_prior=tiny.SinglePixels(tiny.IMAGE),
        public_share=0.75,
    )
    images = model.draw_queries(16, tf.constant([1, 2])).numpy()
    assert images.shape == (16, *tiny.IMAGE)
    assert np.sum(images.sum((1, 2, 3)) == 1) == 12
    fit(model)


def test_averaged_weights_take_the_students_place_at_the_end():
    optimizer = keras.optimizers.SGD(1.0, use_ema=True, ema_momentum=0.5)
    model = tiny.transcriber(optimizer=optimizer)
    plain = tiny.transcriber(optimizer=keras.optimizers.SGD(1.0))
    fit(model, 4)
    fit(plain, 4)
    average = optimizer._model_variables_moving_average[0].numpy()
    np.testing.assert_allclose(model.student.get_weights()[0], average)
    assert not np.allclose(average, plain.student.get_weights()[0])


# What the teacher may be.


def test_a_saved_model_teacher_and_export_of_the_student(tmp_path):
    teacher = tiny.linear_model(5)
    module = tf.Module()
    module.model = teacher
    serve = tf.function(
        lambda image: {"logits": teacher(image)},
        input_signature=[tf.TensorSpec((None, *tiny.IMAGE), tf.float32, "image")],
    )
    tf.saved_model.save(module, str(tmp_path / "teacher"), {"serving_default": serve})
    model = tiny.transcriber(teacher=str(tmp_path / "teacher"), eager=False)
    same = tiny.transcriber(teacher=teacher, eager=False)
    for each in (model, same):
        fit(each, 3)
    np.testing.assert_allclose(
        tiny.flat_weights(model.student), tiny.flat_weights(same.student), atol=1e-5
    )
    folder = dpt.export_student(model, tmp_path / "served" / "1")
    images = np.random.default_rng(0).random((5, *tiny.IMAGE)).astype(np.float32)
    served = tf.saved_model.load(str(folder)).signatures["serving_default"]
    out = served(image=tf.constant(images))
    np.testing.assert_allclose(out["logits"], model.predict(images, verbose=0), 1e-5)
    written = json.loads((folder / "assets.extra" / "statement.json").read_text())
    assert written["unit"] == "RESPONSE"
    assert written["epsilon"] == pytest.approx(epsilon(model))


def test_a_callable_teacher_of_probabilities():
    def answer(images):
        return tf.nn.softmax(tiny.linear_model(5)(images))

    teacher = dpt.Teacher(answer, input_shape=tiny.IMAGE)
    model, same = tiny.transcriber(teacher=teacher), tiny.transcriber()
    for each in (model, same):
        fit(each, 2)
    np.testing.assert_allclose(
        tiny.flat_weights(model.student), tiny.flat_weights(same.student), atol=1e-4
    )
    with pytest.raises(ValueError, match="Keras model"):
        model.get_config()


def test_a_bfloat16_student_gets_float32_noise():
    student = keras.Sequential(
        [
            keras.layers.Input(tiny.IMAGE),
            keras.layers.Flatten(),
            keras.layers.Dense(tiny.CLASSES, dtype="mixed_bfloat16"),
        ]
    )
    model = tiny.transcriber(student=student)
    fit(model, 2)
    assert np.all(np.isfinite(tiny.flat_weights(model.student)))


# How it is kept.

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
        replays = [m._learner.get_replay() for m in (resumed, whole)]
        for a, b in zip(*replays, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


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
    raw = model._learner.pool.answers.numpy()[:3].tobytes()
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


# Statement.


def test_the_statement_covers_the_student_and_names_the_seed():
    model = tiny.transcriber(seed=77)
    fit(model)
    statement = model.privacy_statement()
    assert "student" in statement.covered and "generator" in statement.covered
    assert any("teacher" in name for name in statement.not_covered)
    assert statement.noise_seed == 77 and "77" in statement.to_text()
    assert "fresh" in statement.sampling
    assert tiny.transcriber(seed=None).privacy_statement().noise_seed is None


def test_a_generator_the_teacher_guided_is_not_covered_and_not_exported(tmp_path):
    model = adam_model(
        NormalizedGradient(noise_multiplier=4.0), generator_covered=False
    )
    fit(model)
    assert "generator" in model.privacy_statement().not_covered
    with pytest.raises(ValueError, match="guided by the teacher"):
        dpt.export_generator(model, tmp_path / "g")


def test_a_statement_before_any_release_says_zero():
    assert tiny.transcriber().privacy_statement().epsilon == 0.0
