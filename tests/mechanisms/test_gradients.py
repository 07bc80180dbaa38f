"""What one answer can move is at most what the noise is scaled from."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe.mechanisms import (
    ClippedGradient,
    NormalizedGradient,
    NormalizedOutputGradient,
)
from dp_transcribe.mechanisms.base import Batch, Release
from dp_transcribe.mechanisms.candidates import top_candidates
from dp_transcribe.mechanisms.output_gradient import normalized_rows
from tests import tiny

ROWS = 12
BOUND = 1.7
MECHANISMS = [
    NormalizedGradient(l2_norm=BOUND),
    NormalizedGradient(l2_norm=BOUND, monitor_share=0.5),
    ClippedGradient(l2_norm=BOUND),
    ClippedGradient(l2_norm=BOUND, microbatches=3, monitor_share=0.9),
    NormalizedOutputGradient(noise_multiplier=1.0, l2_norm=BOUND),
    NormalizedOutputGradient(
        noise_multiplier=1.0, l2_norm=BOUND, top_k=3, monitor_share=0.3
    ),
]


def no_noise(shape):
    return tf.zeros(shape)


def sharp_answers(seed=3, rows=ROWS, scale=4.0):
    logits = np.random.default_rng(seed).normal(0, scale, (rows, tiny.CLASSES))
    return tf.nn.softmax(tf.constant(logits, tf.float32)).numpy()


def pixel_batch(answers):
    """Row i of a linear student's kernel is then the gradient at answer i's logits."""
    queries = tiny.SinglePixels(tiny.IMAGE).sample(len(answers), tf.constant([0, 0]))
    return Batch(queries, tf.constant(answers), tf.ones([len(answers)]))


def joint(mechanism, student, batch):
    """Everything that leaves the mechanism, in one vector, before the noise.

    For the output gradient that is the rows at the logits, which a linear student's
    kernel shows, with the statistics; the bias repeats the rows' sum.
    """
    release = mechanism.summed(student, batch, no_noise)
    parts = [np.ravel(t) for t in release.tensors()]
    if isinstance(mechanism, NormalizedOutputGradient):
        parts.pop(1)
    return np.concatenate(parts).astype(np.float64)


def measured(mechanism, student, answers):
    """Largest movement of the joint vector when one answer is taken away."""
    with_all = joint(mechanism, student, pixel_batch(answers))
    moved = []
    for row in range(len(answers)):
        without = answers.copy()
        without[row] = np.nan
        rest = joint(mechanism, student, pixel_batch(without))
        moved.append(np.linalg.norm(with_all - rest))
    return np.array(moved)


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=repr)
def test_no_answer_moves_the_joint_release_by_more_than_the_sensitivity(mechanism):
    moved = measured(mechanism, tiny.linear_model(0, 0.3), sharp_answers())
    assert mechanism.sensitivity == BOUND
    assert moved.max() <= mechanism.sensitivity * (1 + 1e-5)


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=repr)
def test_the_sensitivity_is_reached(mechanism):
    """The student agrees with no answer and is far off: the bound is not idle."""
    student = tiny.linear_model(0, 3.0)
    wrong = np.argmin(student(pixel_batch(sharp_answers()).queries), -1)
    moved = measured(mechanism, student, np.eye(tiny.CLASSES, dtype=np.float32)[wrong])
    # Full gradient and loss, no agreement: half of the statistics' squared share.
    least = np.sqrt(1 - mechanism.monitor_share / 2)
    assert moved.min() >= mechanism.sensitivity * least * 0.999


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=repr)
@pytest.mark.parametrize("scale", [1e3, 1e6, 1e18, 1e30])
def test_adversarial_weights_do_not_widen_the_bound(mechanism, scale):
    student = tiny.linear_model(1, scale)
    moved = measured(mechanism, student, sharp_answers(rows=4))
    assert np.all(np.isfinite(moved))
    assert moved.max() <= mechanism.sensitivity * (1 + 1e-5)


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=repr)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38, -3.0])
def test_an_answer_that_is_no_distribution_stays_within_the_bound(mechanism, value):
    """A broken answer counts as zero, or as a bounded gradient like any other."""
    student, answers = tiny.linear_model(0, 0.3), sharp_answers(rows=4)
    broken, gone = answers.copy(), answers.copy()
    broken[1, 2], gone[1] = value, np.nan
    difference = joint(mechanism, student, pixel_batch(broken)) - joint(
        mechanism, student, pixel_batch(gone)
    )
    assert np.all(np.isfinite(difference))
    assert np.linalg.norm(difference) <= mechanism.sensitivity * (1 + 1e-5)


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=repr)
def test_taking_an_answer_away_and_masking_its_row_are_the_same(mechanism):
    student, answers = tiny.linear_model(0, 0.3), sharp_answers()
    batch = pixel_batch(answers)
    mask = tf.constant([1.0] * 5 + [0.0] + [1.0] * (ROWS - 6))
    masked = Batch(batch.queries, batch.answers, mask)
    gone = answers.copy()
    gone[5] = np.nan
    np.testing.assert_allclose(
        joint(mechanism, student, masked),
        joint(mechanism, student, pixel_batch(gone)),
        atol=1e-5,
    )


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=repr)
def test_an_empty_or_masked_batch_releases_zeros(mechanism):
    student, batch = tiny.linear_model(), pixel_batch(sharp_answers(rows=2))
    masked = Batch(batch.queries, batch.answers, tf.zeros([2]))
    assert np.all(joint(mechanism, student, masked) == 0.0)


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=repr)
def test_a_student_that_already_answers_the_same_gives_a_tiny_bounded_gradient(
    mechanism,
):
    student = tiny.linear_model(2)
    batch = pixel_batch(sharp_answers(rows=4))
    same = tf.nn.softmax(student(batch.queries)).numpy()
    moved = measured(mechanism, student, same)
    assert moved.max() <= mechanism.sensitivity * (1 + 1e-5)


@pytest.mark.parametrize("kind", [ClippedGradient, NormalizedGradient])
def test_weight_gradients_of_a_convolution_are_bounded_over_all_variables(kind):
    mechanism, student = kind(l2_norm=0.01), tiny.conv_model()
    random = tf.random.stateless_uniform([6, *tiny.IMAGE], [1, 2])
    answers = sharp_answers(rows=6)
    for row in range(6):
        only = np.eye(6, dtype=np.float32)[row]
        batch = Batch(random, tf.constant(answers), tf.constant(only))
        norm = np.linalg.norm(joint(mechanism, student, batch))
        assert 0.98 * 0.01 < norm <= 0.01 * (1 + 1e-5)


@pytest.mark.parametrize("loss", ["kl_divergence", "cross_entropy"])
def test_losses_have_one_gradient(loss):
    student, batch = tiny.linear_model(0, 0.3), pixel_batch(sharp_answers())
    kinds = [ClippedGradient(distillation_loss=n) for n in (loss, "kl_divergence")]
    a, b = (k.summed(student, batch, no_noise).gradients[0] for k in kinds)
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_clipping_leaves_short_gradients_and_normalising_does_not():
    student, batch = tiny.linear_model(0, 0.3), pixel_batch(sharp_answers(rows=3))
    with tf.GradientTape() as tape:
        losses = ClippedGradient().losses(batch.answers, student(batch.queries))
        total = tf.reduce_sum(losses)
    plain = tape.gradient(total, student.trainable_variables)
    clipped = ClippedGradient(l2_norm=1e4).summed(student, batch, no_noise)
    for a, b in zip(plain, clipped.gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    one = Batch(batch.queries, batch.answers, tf.constant([1.0, 0.0, 0.0]))
    normal = NormalizedGradient(l2_norm=1e4).summed(student, one, no_noise)
    norm = np.sqrt(sum(float(tf.reduce_sum(g**2)) for g in normal.gradients))
    np.testing.assert_allclose(norm, 1e4 * np.sqrt(0.98), rtol=1e-5)


def test_statistics_are_agreement_and_bounded_loss_of_the_batch():
    mechanism = ClippedGradient(l2_norm=2.0, monitor_share=0.3)
    student, batch = tiny.linear_model(0, 1.0), pixel_batch(sharp_answers(rows=40))
    release = mechanism.summed(student, batch, no_noise)
    agreement, loss = mechanism.progress(release, 40)
    logits = student(batch.queries)
    losses = mechanism.losses(batch.answers, logits).numpy()
    agree = np.argmax(logits, -1) == np.argmax(batch.answers, -1)
    np.testing.assert_allclose(agreement, agree.mean(), atol=1e-5)
    np.testing.assert_allclose(loss, np.minimum(losses, 4.0).mean(), rtol=1e-5)
    assert losses.max() > 4.0


def test_progress_is_divided_by_the_configured_batch_size():
    """The size of a Poisson sample is secret."""
    mechanism = ClippedGradient()
    release = Release([], tf.constant([0.5, 0.5]))
    small, large = (mechanism.progress(release, size)[0] for size in (10, 20))
    np.testing.assert_allclose(small, 2 * large)


def test_output_gradient_touches_only_the_students_top_classes():
    mechanism = NormalizedOutputGradient(noise_multiplier=1.0, top_k=3)
    student, batch = tiny.linear_model(0, 0.3), pixel_batch(sharp_answers())

    def noise(shape):
        return tf.random.stateless_normal(shape, [1, 2])

    rows = mechanism.summed(student, batch, noise).gradients[0].numpy()[:ROWS]
    top = top_candidates(student(batch.queries), 3).numpy()
    assert np.all((rows != 0) == (top == 1))


def test_candidates_of_the_output_gradient_do_not_depend_on_the_answers():
    mechanism = NormalizedOutputGradient(noise_multiplier=1.0, top_k=3)
    student = tiny.linear_model(0, 0.3)
    support = [
        mechanism.summed(student, pixel_batch(sharp_answers(s)), no_noise)
        .gradients[0]
        .numpy()
        != 0
        for s in (1, 2)
    ]
    assert np.array_equal(*support)


def test_normalized_rows_hold_for_every_scale():
    scales = np.array([0, 1e-38, 1e-20, 1e-13, 1e-6, 1, 1e10, 1e18, 3e38], np.float32)
    rows = scales[:, None] * np.array([[1.0, -1.0, 0.5]], np.float32)
    norms = np.linalg.norm(normalized_rows(tf.constant(rows)).numpy(), axis=-1)
    assert np.all(norms <= 1 + 1e-5)
    np.testing.assert_allclose(norms[4:8], 1.0, rtol=1e-5)


def test_one_bad_row_leaves_the_others_alone():
    rows = np.ones((3, 4), np.float32)
    rows[1, 0] = np.nan
    out = normalized_rows(tf.constant(rows)).numpy()
    np.testing.assert_allclose(out, [[0.5] * 4, [0.0] * 4, [0.5] * 4], rtol=1e-6)


def test_ties_among_candidates_go_to_the_lower_class():
    scores = tf.constant([[1.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    expected = [[0, 1, 1, 0], [1, 1, 0, 0]]
    assert top_candidates(scores, 2).numpy().tolist() == expected
    by_row = top_candidates(scores, tf.constant([1, 3])).numpy().tolist()
    assert by_row == [[0, 1, 0, 0], [1, 1, 1, 0]]
    assert top_candidates(scores, None).numpy().sum() == 8


KINDS = (ClippedGradient, NormalizedGradient, NormalizedOutputGradient)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *itertools.product(["noise_multiplier"], [-1.0, np.nan, np.inf]),
        *itertools.product(["l2_norm"], [0.0, -1.0, np.nan, np.inf]),
        *itertools.product(["monitor_share"], [0.0, 1.0, -0.1, np.nan]),
        ("distillation_loss", "mse"),
    ],
)
def test_parameters_out_of_range_are_refused(kind, argument, value):
    with pytest.raises(ValueError, match=f"`{argument}`"):
        kind(**{argument: value})


@pytest.mark.parametrize("top_k", [0, -1, 1.5])
def test_a_k_that_is_no_number_of_classes_is_refused(top_k):
    with pytest.raises(ValueError, match="`top_k`"):
        NormalizedOutputGradient(top_k=top_k)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_and_event_come_from_the_same_number(kind):
    mechanism = kind(noise_multiplier=3.0, l2_norm=0.5)
    assert mechanism.event().noise_multiplier == 3.0
    assert mechanism.shared_stddevs[1] == 3.0 * mechanism.sensitivity == 1.5
    with pytest.raises(AttributeError):
        mechanism.noise_multiplier = 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_noise_that_is_not_known_yet_is_an_error_and_never_zero(kind):
    mechanism = kind()
    assert not mechanism.is_calibrated
    for use in (lambda: mechanism.event(), lambda: mechanism.shared_stddevs):
        with pytest.raises(ValueError, match="not known yet"):
            use()


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=repr)
def test_config_round_trip(mechanism):
    assert type(mechanism).from_config(mechanism.get_config()) == mechanism


def test_summed_works_inside_a_function_with_a_dynamic_batch():
    mechanism, student = NormalizedGradient(), tiny.linear_model()

    @tf.function(reduce_retracing=True)
    def run(queries, answers):
        mask = tf.ones(tf.shape(answers)[:1])
        batch = Batch(queries, answers, mask)
        return mechanism.summed(student, batch, no_noise).tensors()

    batch = pixel_batch(sharp_answers())
    for rows in (ROWS, 3, 1):
        graph = run(batch.queries[:rows], batch.answers[:rows])
        eager = joint(mechanism, student, pixel_batch(batch.answers[:rows].numpy()))
        flat = np.concatenate([np.ravel(t) for t in graph])
        np.testing.assert_allclose(flat, eager, atol=1e-5)


def test_dropout_is_one_draw_for_norm_and_sum():
    keras.utils.set_random_seed(0)
    student = keras.Sequential(
        [
            keras.layers.Input(tiny.IMAGE),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(32),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(tiny.CLASSES),
        ]
    )
    mechanism = NormalizedGradient(l2_norm=1.0)
    image = tf.random.stateless_uniform([1, *tiny.IMAGE], [1, 2])
    batch = Batch(image, tf.constant(sharp_answers(rows=1)), tf.ones([1]))
    for _ in range(5):
        assert np.linalg.norm(joint(mechanism, student, batch)) <= 1 + 1e-5
