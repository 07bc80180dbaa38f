"""What cannot be kept private is refused before anything is spent."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import dp_transcribe as dpt
from dp_transcribe.generators import MLPGenerator
from dp_transcribe.guidance import pretrain_by_teacher
from dp_transcribe.mechanisms import (
    NoisyAnswer,
    NormalizedGradient,
    NormalizedOutputGradient,
    RandomizedResponse,
    SelectiveRandomizedResponse,
)
from dp_transcribe.mechanisms.clipping import PlaceError, RowMixingError
from dp_transcribe.privacy.units import Unit
from dp_transcribe.queries import FreshQueries, QueryPool
from dp_transcribe.transcriber.compatibility import check_queries
from tests import tiny
from tests.tiny import POOL, Watch, epsilon, fit, releases


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


def test_a_refused_run_fixes_neither_noise_nor_delta():
    model = tiny.transcriber(NormalizedGradient(), queries=POOL, student_updates=4)
    with pytest.raises(ValueError, match="updates"):
        model.compile("sgd", steps_per_execution=3, run_eagerly=True)
        fit(model, target_epsilon=0.1, delta=1e-9)
    assert not model.mechanism.is_calibrated
    assert model.budget.delta is None
    model.compile("sgd", run_eagerly=True)

    class Fails(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            raise OSError

    with pytest.raises(OSError):
        fit(model, target_epsilon=0.1, callbacks=[Fails()])
    fit(model, target_epsilon=2.0)
    assert 0.1 < model.privacy_statement().epsilon <= 2.0
    chosen = model.mechanism
    fit(model, target_epsilon=3.0)
    assert model.mechanism == chosen


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
@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True])
def test_counts_of_fit_are_checked(name, value):
    model = tiny.transcriber(NormalizedGradient())
    with pytest.raises(ValueError, match=f"`{name}`"):
        model.fit(**{name: value}, target_epsilon=1.0)
    assert_untouched(model, tiny.flat_weights(model.student))


@pytest.mark.parametrize("value", [-1, 3, 0.5, None])
def test_an_initial_epoch_outside_of_the_run_is_refused(value):
    model = tiny.transcriber()
    with pytest.raises(ValueError, match="`initial_epoch`.*0 to 2"):
        fit(model, epochs=2, initial_epoch=value)
    assert len(model.ledger) == 0
    fit(model, epochs=2, initial_epoch=2)
    assert len(model.ledger) == 0


@pytest.mark.parametrize("data", [(np.zeros(3), np.zeros(3)), (10,)])
def test_data_by_place_are_refused(data):
    model = tiny.transcriber()
    with pytest.raises(ValueError, match=r"`x.*its own queries.*fit\(epochs=10"):
        model.fit(*data)
    with pytest.raises(TypeError, match="`epoch`"):
        model.fit(epoch=3)
    assert len(model.ledger) == 0


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


def layers_on_images(*layers):
    flatten = keras.layers.Flatten()
    dense = keras.layers.Dense(tiny.CLASSES)
    return keras.Sequential([keras.layers.Input(tiny.IMAGE), *layers, flatten, dense])


def mixing_student():
    return layers_on_images(keras.layers.UnitNormalization(axis=0))


def dropout_student():
    return layers_on_images(keras.layers.Dropout(0.5, name="the_culprit"))


@pytest.mark.parametrize("mechanism", [NormalizedGradient(), NoisyAnswer()])
def test_students_that_mix_rows_are_refused(mechanism):
    with pytest.raises(RowMixingError, match="one by one"):
        tiny.transcriber(mechanism, student=mixing_student())


def test_random_layers_are_refused_with_a_pool():
    """Their draws go by the place in the batch, so they show who was sampled."""
    with pytest.raises(PlaceError, match="the_culprit.*FreshQueries"):
        check_queries(POOL, NormalizedGradient(), 1, dropout_student())
    check_queries(POOL, NormalizedGradient(), 1, tiny.conv_model())
    check_queries(FreshQueries(), NormalizedGradient(), 1, dropout_student())


def test_a_transcriber_refuses_random_layers_with_a_pool():
    with pytest.raises(PlaceError, match="the_culprit.*FreshQueries"):
        tiny.transcriber(NormalizedGradient(), queries=POOL, student=dropout_student())


@pytest.mark.parametrize("mechanism", [NormalizedGradient(), NoisyAnswer()])
def test_random_layers_learn_from_fresh_queries(mechanism):
    model = tiny.transcriber(mechanism, student=dropout_student(), eager=False)
    seeds = [v for v in model.student.variables if "seed" in v.path]
    first = [v.numpy() for v in seeds]
    assert [v.numpy()[1] for v in seeds] == [0]  # nothing was drawn yet
    fit(model, target_epsilon=2.0)
    assert not np.array_equal(first, [v.numpy() for v in seeds])


def test_under_a_strategy_students_are_refused_and_accepted_alike():
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        generator = tiny.UniformPixels(tiny.IMAGE)
        with pytest.raises(RowMixingError):
            tiny.transcriber(student=mixing_student(), generator=generator)
        tiny.transcriber(student=dropout_student(), generator=generator)


def private_teacher(model):
    random = np.random.default_rng(0)
    images = random.uniform(size=(24, *tiny.IMAGE)).astype(np.float32)
    labels = random.integers(0, tiny.CLASSES, 24)
    training = dpt.PrivateTraining(epochs=1, batch_size=8, rows=8, accountant="rdp")
    return dpt.fit_private_teacher(
        model,
        images,
        labels,
        target_epsilon=2.0,
        delta=1e-5,
        training=training,
        seed=1,
        verbose=0,
    )


def adapted_student():
    layer = keras.layers.Normalization(name="the_culprit")
    layer.adapt(np.random.default_rng(0).random((9, *tiny.IMAGE)))
    return layers_on_images(layer)


def binned_student():
    layer = keras.layers.Discretization(num_bins=3, name="the_culprit")
    layer.adapt(np.random.default_rng(0).random((9, *tiny.IMAGE)))
    return layers_on_images(layer)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (mixing_student, "one by one"),
        (dropout_student, "the_culprit.*records are sampled"),
        (adapted_student, r"`adapt`.*the_culprit.*Normalization\(mean="),
        (binned_student, "`adapt`.*the_culprit"),
    ],
)
def test_models_that_let_records_out_are_refused_for_a_private_teacher(model, message):
    model = model()
    weights = tiny.flat_weights(model)
    with pytest.raises(ValueError, match=message):
        private_teacher(model)
    assert np.array_equal(tiny.flat_weights(model), weights)


def test_public_constants_are_no_statistics_of_records():
    known = keras.layers.Normalization(mean=0.5, variance=0.1)
    bins = keras.layers.Discretization(bin_boundaries=[0.0, 1.0])
    teacher = private_teacher(layers_on_images(known, bins))
    assert teacher.statement.epsilon <= 2.0


def test_a_student_that_starts_with_the_teachers_weights_is_refused():
    with pytest.raises(ValueError, match="not the teacher's"):
        tiny.transcriber(
            teacher=dpt.Teacher(tiny.linear_model(5)), student=tiny.linear_model(5)
        )


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
        ("generator_updates", 0),
        ("candidates_per_query", 3),
    ],
)
def test_what_the_accounting_reads_cannot_be_changed_under_a_traced_step(name, value):
    """The step has the old noise and number of updates built in."""
    model = tiny.transcriber(student_updates=2, eager=False)
    fit(model)
    with pytest.raises(AttributeError):
        setattr(model, name, value)


class NoSample:
    image_shape, output_range = tiny.IMAGE, (0.0, 1.0)


@keras.saving.register_keras_serializable("tests")
class NoInputs(keras.Model):
    """Has samples, but nothing that an update could draw."""

    image_shape, output_range = tiny.IMAGE, (0.0, 1.0)

    def sample(self, n, seed):
        return tiny.UniformPixels(tiny.IMAGE).sample(n, seed)


@pytest.mark.parametrize(
    ("generator", "method"), [(NoSample(), "sample"), (NoInputs(), "draw_inputs")]
)
def test_a_generator_that_cannot_be_asked_is_refused(generator, method):
    with pytest.raises(ValueError, match=f"`generator`.*the method `{method}`"):
        dpt.DPTranscriber(
            tiny.linear_teacher(),
            tiny.linear_model(),
            generator,
            mechanism=NormalizedGradient(noise_multiplier=1.0),
        )


def mlp_generator():
    return MLPGenerator(tiny.IMAGE, latent_dim=4, units=(8,))


def built_for_others():
    optimizer = keras.optimizers.SGD()
    optimizer.build(tiny.linear_model(3).trainable_variables)
    return optimizer


def with_loss_scale():
    return keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())


@pytest.mark.parametrize("name", ["student_optimizer", "generator_optimizer"])
@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda: None, "`Optimizer`"),
        (with_loss_scale, "without loss scaling"),
        (lambda: keras.optimizers.SGD(loss_scale_factor=8.0), "without loss scaling"),
        (built_for_others, "not built for other variables"),
    ],
)
def test_optimizers_that_would_fail_in_a_step_are_refused(name, optimizer, message):
    model = tiny.transcriber(generator=mlp_generator(), compiled=False)
    weights = tiny.flat_weights(model.student)
    with pytest.raises(ValueError, match=f"`{name}`.*{message}"):
        model.compile(**{name: optimizer()})
    assert_untouched(model, weights)
    assert not model.compiled


def test_a_generator_that_does_not_learn_needs_no_optimizer(tmp_path):
    model = tiny.transcriber(compile_arguments={"generator_optimizer": None})
    fit(model)
    model.save_checkpoint(tmp_path / "kept.keras")
    restored = keras.saving.load_model(tmp_path / "kept.keras")
    assert restored.generator_optimizer is None
    scaled = {"generator_optimizer": with_loss_scale()}
    with pytest.raises(ValueError, match="`generator_optimizer`"):
        tiny.transcriber(compile_arguments=scaled)


def test_one_optimizer_for_two_models_is_refused():
    model = tiny.transcriber(NormalizedGradient(noise_multiplier=1.0))
    shared = keras.optimizers.Adam()
    with pytest.raises(ValueError, match="`generator_optimizer`"):
        model.compile(student_optimizer=shared, generator_optimizer=shared)
    model.compile(student_optimizer="adam", generator_optimizer="adam")
    model.compile(student_optimizer=model.student_optimizer)
    other = tiny.transcriber(compiled=False)
    with pytest.raises(ValueError, match="`student_optimizer`.*other variables"):
        other.compile(student_optimizer=model.student_optimizer)


def test_weights_that_learn_anew_need_another_compile():
    student = tiny.frozen_front_model()
    model = tiny.transcriber(NoisyAnswer(noise_multiplier=50.0), student=student)
    student.layers[0].trainable = True
    weights = tiny.flat_weights(student)
    with pytest.raises(ValueError, match="`student_optimizer`.*`compile`"):
        fit(model)
    with pytest.raises(ValueError, match="`student_optimizer`.*`compile`"):
        model.train_on_batch(np.zeros(1))
    assert_untouched(model, weights)
    model.compile(run_eagerly=True)
    fit(model)


@pytest.mark.parametrize(
    "arguments",
    [
        {"metrics": [keras.metrics.SparseCategoricalAccuracy(name="epsilon")]},
        {"metrics": ["accuracy", keras.metrics.Mean(name="loss")]},
        {"weighted_metrics": [keras.metrics.Mean(name="agreement")]},
        {"loss": {"a": "mse"}},
        {"steps_per_execution": 0},
    ],
)
def test_measures_that_nothing_could_report_are_refused(arguments):
    name = "metrics" if "weighted_metrics" in arguments else [*arguments][0]
    with pytest.raises(ValueError, match=f"`{name}`"):
        tiny.transcriber(compile_arguments=arguments)


@pytest.mark.parametrize("name", ["input", "output"])
def test_a_student_with_two_inputs_or_outputs_is_refused(name):
    images = keras.layers.Input(tiny.IMAGE)
    logits = keras.layers.Dense(10)(keras.layers.Flatten()(images))
    inputs = {"a": images, "b": keras.layers.Input(())} if name == "input" else images
    outputs = {"a": logits} if name == "output" else logits
    student = keras.Model(inputs, outputs)
    with pytest.raises(ValueError, match="`student`.*one tensor"):
        dpt.DPTranscriber(
            tiny.linear_teacher(),
            student,
            tiny.UniformPixels(tiny.IMAGE),
            mechanism=NormalizedGradient(noise_multiplier=1.0),
        )


def test_a_teacher_that_no_graph_can_hold_costs_nothing():
    teacher = dpt.Teacher(
        lambda x: np.asarray(x).reshape(-1, 64)[:, :10], input_shape=tiny.IMAGE
    )
    model = tiny.transcriber(NormalizedGradient(noise_multiplier=50.0), teacher=teacher)
    model.compile(student_optimizer="sgd", run_eagerly=False)
    weights = tiny.flat_weights(model.student)
    with pytest.raises(ValueError, match="`teacher`.*numpy_function"):
        fit(model, target_epsilon=8.0)
    assert_untouched(model, weights)


def _guided():
    generator = mlp_generator()
    pretrain_by_teacher(generator, tiny.linear_teacher(), steps=1, batch_size=4)
    return generator


@pytest.mark.parametrize("name", ["generator", "public_prior"])
def test_a_generator_that_a_teacher_guided_is_covered_nowhere_else(name):
    guided = _guided()
    restored = MLPGenerator.from_config(guided.get_config())
    free = mlp_generator()
    for source in (guided, restored):
        parts = {"generator": free} | {name: source}
        with pytest.raises(ValueError, match=f"`{name}`.*no teacher guided"):
            tiny.transcriber(NormalizedGradient(noise_multiplier=1.0), **parts)
    tiny.transcriber(
        NormalizedGradient(noise_multiplier=1.0),
        generator=guided,
        generator_covered=False,
    )


@pytest.mark.parametrize("kind", ["function", "SavedModel"])
def test_weights_are_known_behind_a_function_and_a_saved_model(kind, tmp_path):
    model = tiny.linear_model(5)
    if kind == "function":
        teacher = dpt.Teacher(lambda x: model(x), input_shape=tiny.IMAGE)
    else:
        model.export(str(tmp_path / "teacher"), verbose=False)
        teacher = dpt.load_teacher(tmp_path / "teacher")
    with pytest.raises(ValueError, match="`student`"):
        dpt.DPTranscriber(
            teacher,
            model,
            tiny.UniformPixels(tiny.IMAGE),
            mechanism=NormalizedGradient(noise_multiplier=1.0),
        )


def test_a_checkpoint_of_tensorflow_turns_no_counter_back(tmp_path):
    model = tiny.transcriber(NormalizedGradient(noise_multiplier=50.0))
    fit(model, 1)
    kept = tf.train.Checkpoint(model=model)
    path = kept.write(str(tmp_path / "kept"))
    fit(model, 1)
    taken = int(model.noise.counter.numpy())
    kept.read(path)
    assert int(model.noise.counter.numpy()) == taken
    names = [name for name, _ in tf.train.list_variables(path)]
    assert not [name for name in names if "counter" in name or "noise" in name]
