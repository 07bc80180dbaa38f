"""Images by the class means of random ConvNets: bound, release, matching, refusals."""

import dataclasses
import math
from unittest import mock

import dp_accounting
import numpy as np
import pytest

from dp_transcribe.distillation import (
    ClassMeans,
    KernelRidgeClassifier,
    MeanMatching,
    RandomConvNets,
    ScatteringKernel,
    distill_means,
    embed_in_batches,
    images_of_means,
)
from dp_transcribe.distillation.class_means import (
    PublicDirections,
    class_sums,
    release_class_means,
)
from dp_transcribe.distillation.matching import discriminants, first_images, herd
from dp_transcribe.distillation.releases import RecordSums
from dp_transcribe.privacy import Unit
from tests.distillation.bars import Bars

SETTINGS = MeanMatching(
    images_per_class=8,
    networks=4,
    filters=16,
    public_images=100,
    directions=40,
    candidates=300,
    damping_rank=10,
    steps=60,
    accountant="rdp",
)
SUMS = {"num_classes": 3, "l2_norm": 0.7, "count_share": 0.1}
SHAPE = (16, 16, 1)
BARS = Bars(16)


def distil(images, labels, **kwargs):
    arguments = {"source": BARS, "settings": SETTINGS, "seed": 3, **kwargs}
    arguments = {"num_classes": 2, **arguments}
    return distill_means(images, labels, target_epsilon=1.0, delta=1e-5, **arguments)


@pytest.fixture(scope="module")
def records():
    images, labels = BARS.draw(4000, seed=1)
    images[7, 3, 3] = np.nan
    return images, labels


@pytest.fixture(scope="module")
def distilled(records):
    return distil(*records)


@pytest.fixture(scope="module")
def directions():
    kernel = RandomConvNets(SHAPE, networks=2, filters=16)
    return PublicDirections.from_public(kernel, BARS.draw(100, seed=5)[0], 40)


@pytest.mark.parametrize("size", [0.01, 0.7, 1e4, np.inf, np.nan])
def test_leaving_one_record_out_moves_the_sums_by_at_most_the_bound(size):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(20, 6)).astype(np.float32)
    rows[4] *= size / np.linalg.norm(rows[4])
    labels = rng.integers(0, 3, 20).astype(np.int32)
    without = np.arange(20) != 4
    change = class_sums(rows, labels, **SUMS) - class_sums(
        rows[without], labels[without], **SUMS
    )
    moved = np.linalg.norm(change)
    assert moved <= 0.7 * (1 + 1e-5)
    if not np.isfinite(size):
        assert moved == 0.0
    elif size >= 0.7:
        # The bound is used up: the count takes its share and the coordinates theirs.
        np.testing.assert_allclose(moved, 0.7, rtol=1e-5)


@pytest.mark.parametrize(("size", "moves"), [(1e18, 5.0), (1e38, 0.0), (3e38, 0.0)])
def test_a_bound_above_one_holds_for_the_largest_coordinates(size, moves):
    rows = np.full((2, 4), 0.1, np.float32)
    labels, bounds = np.zeros(2, np.int32), {**SUMS, "l2_norm": 5.0}
    rest = class_sums(rows[1:], labels[1:], **bounds)
    rows[0, 0] = size
    moved = np.linalg.norm(class_sums(rows, labels, **bounds) - rest)
    assert moved == pytest.approx(moves, rel=1e-5)


def test_sums_are_those_of_the_classes():
    rows = np.array([[0.1, 0.2], [0.3, -0.1], [0.2, 0.2]], np.float32)
    sums = class_sums(rows, np.array([2, 0, 2], np.int32), **SUMS)
    coordinates = np.array([[0.3, -0.1], [0.0, 0.0], [0.3, 0.4]]) * math.sqrt(0.9)
    counts = np.array([1, 0, 2]) * 0.7 * math.sqrt(0.1)
    np.testing.assert_allclose(sums, np.c_[coordinates, counts], rtol=1e-5, atol=1e-7)


def test_one_gaussian_release_is_calibrated_and_stated(distilled):
    statement = distilled.statement
    assert statement.unit is Unit.RECORD
    event = dp_accounting.GaussianDpEvent(statement.details["noise_multiplier"])
    accountant = dp_accounting.rdp.RdpAccountant(
        neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_SPECIAL
    )
    spent = accountant.compose(event).get_epsilon(1e-5)
    np.testing.assert_allclose(statement.epsilon, spent, rtol=1e-6)
    assert 0.99 < statement.epsilon <= 1.0


def test_means_and_counts_are_near_the_true_ones(records, directions):
    images, labels = records
    released = release(images, labels, directions, target_epsilon=1e3)
    usable = np.isfinite(images).all(axis=(1, 2, 3))
    truth = [
        directions.embed(images[usable & (labels == label)]).numpy().mean(axis=0)
        for label in (0, 1)
    ]
    np.testing.assert_allclose(released.means, truth, atol=0.01)
    np.testing.assert_allclose(
        released.counts, np.bincount(labels[usable]), atol=2, rtol=0
    )


def release(images, labels, directions, *, target_epsilon=1.0, seed=3, classes=2):
    return release_class_means(
        images,
        labels.astype(np.int32),
        directions,
        num_classes=classes,
        target_epsilon=target_epsilon,
        delta=1e-5,
        l2_norm=SETTINGS.l2_norm,
        count_share=SETTINGS.count_share,
        accountant=SETTINGS.accountant,
        seed=seed,
    )


def test_noise_has_the_stated_deviation(records, directions):
    images, labels = records
    loud = release(images[:600], labels[:600], directions)
    quiet = release(images[:600], labels[:600], directions, target_epsilon=1e4)
    sigma = loud.statement.details["noise_multiplier"] * SETTINGS.l2_norm
    scale = math.sqrt(1.0 - SETTINGS.count_share)
    sums = [r.means * r.counts[:, None] * scale for r in (loud, quiet)]
    found = np.std(sums[0] - sums[1]) / sigma
    # 80 entries: 8 % standard error; two thirds and one and a half are 4 errors off.
    assert 0.75 < found < 1.25


def test_a_class_without_records_gives_finite_means(records, directions):
    released = release(*records, directions, classes=3)
    assert np.isfinite(released.means).all() and released.counts.min() >= 1.0


def test_discriminants_tell_public_images_apart(records, directions):
    images, labels = BARS.draw(500, seed=9)
    means = release(*records, directions).means
    weights, offsets = discriminants(means, directions.variances, 10)
    scores = directions.embed(images).numpy() @ weights - offsets
    assert np.mean(scores.argmax(axis=1) == labels) > 0.95


def test_discriminants_are_those_of_gaussian_classes():
    rng = np.random.default_rng(0)
    means, variances = rng.normal(size=(3, 5)), np.arange(5.0, 0.0, -1.0)
    weights, offsets = discriminants(means, variances, damping_rank=3)
    rows = rng.normal(size=(50, 5))
    densities = -0.5 * ((rows[:, None] - means) ** 2 / (variances + 2.0)).sum(axis=2)
    expected = densities - densities.mean(axis=1, keepdims=True)
    scores = rows @ weights - offsets
    np.testing.assert_allclose(scores - scores.mean(axis=1, keepdims=True), expected)


def test_herding_takes_each_row_once_and_beats_chance():
    rng = np.random.default_rng(0)
    rows, mean = rng.normal(size=(200, 5)), np.full(5, 0.5)
    chosen = herd(rows, mean, 20)
    assert len(set(chosen)) == 20
    first = np.argmin(((rows - mean) ** 2).sum(axis=1))
    assert chosen[0] == first
    distance = np.linalg.norm(rows[chosen].mean(axis=0) - mean)
    by_chance = [
        np.linalg.norm(rows[rng.choice(200, 20)].mean(axis=0) - mean) for _ in range(50)
    ]
    assert distance < 0.5 * min(by_chance)
    assert sorted(herd(rows[:4], mean, 4)) == [0, 1, 2, 3]


def test_first_images_are_of_their_class_and_enough_even_if_few_are(
    records, directions
):
    images, labels = BARS.draw(300, seed=9)
    few = np.r_[np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)[:2]]
    released = release(*records, directions)
    chosen = first_images(released, directions, images[few], SETTINGS)
    assert (labels[few][chosen[:8]] == 0).all()
    assert len(set(chosen[8:])) == 8 and (labels[few][chosen[8:]] == 1).sum() == 2


def test_a_classifier_of_the_images_classifies_real_ones(distilled):
    images, labels = BARS.draw(300, seed=2)
    kernel = ScatteringKernel(SHAPE, groups=1, scale=1, orientations=4)
    ridge = KernelRidgeClassifier(kernel).fit(distilled.images, distilled.labels)
    assert ridge.score(images, labels) > 0.95
    np.testing.assert_array_equal(distilled.labels, np.repeat([0, 1], 8))
    assert distilled.images.min() >= 0.0 and distilled.images.max() <= 1.0


def test_the_means_approach_the_private_ones_in_networks_never_used():
    images, labels = Bars(16, pace=1.0).draw(4000, seed=1)
    kernel = RandomConvNets(SHAPE, networks=2, filters=16, seed=77)
    private = class_means(kernel, images, labels)
    distances = []
    for steps in (1, 200):
        # The first images are the surest of their class, not herded: those are near
        # already, and how near hangs on the noise.
        settings = dataclasses.replace(
            SETTINGS, networks=16, directions=90, steps=steps, herded=8
        )
        made = distil(images, labels, settings=settings)
        means = class_means(kernel, made.images, made.labels)
        distances.append(np.linalg.norm(means - private))
    assert distances[1] < 0.95 * distances[0]


def class_means(kernel, images, labels):
    embedded = embed_in_batches(kernel, images)
    return np.stack([embedded[labels == label].mean(axis=0) for label in (0, 1)])


def test_a_seed_repeats_a_run_and_no_seed_does_not(records, distilled):
    np.testing.assert_array_equal(distil(*records).images, distilled.images)
    secret = [distil(*records, seed=None) for _ in range(2)]
    assert secret[0].statement.details == secret[1].statement.details
    assert not np.array_equal(secret[0].images, secret[1].images)


def test_a_seed_out_of_range_is_refused_and_a_large_one_is_not(records):
    with pytest.raises(ValueError, match="`seed`"):
        distil(*records, seed=-1)
    settings = dataclasses.replace(SETTINGS, steps=1)
    assert len(distil(*records, seed=2**40, settings=settings)) == 16


def test_embeddings_have_norm_one_and_one_part_per_network(directions):
    images = BARS.draw(5, seed=0)[0]
    whole = directions.kernel.embed(images)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1.0, rtol=1e-5)
    parts = [directions.kernel.by_network(number, images) for number in range(2)]
    np.testing.assert_allclose(whole, np.concatenate(parts, axis=1), atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"steps": 0}, "steps"),
        ({"l2_norm": 0.0}, "l2_norm"),
        ({"count_share": 1.0}, "count_share"),
        ({"directions": 101}, "directions"),
        ({"damping_rank": 40}, "damping_rank"),
        ({"images_per_class": 301}, "images_per_class"),
        ({"public_images": 301}, "public_images"),
        ({"accountant": "guess"}, "accountant"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(changed, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        dataclasses.replace(SETTINGS, **changed)


@pytest.mark.parametrize(
    ("images", "labels", "name"),
    [
        (np.zeros((4, *SHAPE)), np.array([0, 1, 2, 0]), "labels"),
        (np.zeros((4, 16, 16)), np.array([0, 1, 1, 0]), "images"),
        (np.zeros((4, 9, 9, 1)), np.array([0, 1, 1, 0]), "source"),
        (np.zeros((0, *SHAPE)), np.zeros(0, int), "labels"),
        (np.full((4, *SHAPE), 255), np.array([0, 1, 1, 0]), "pixel_range"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_spent(
    monkeypatch, images, labels, name
):
    spent = mock.Mock()
    monkeypatch.setattr(RecordSums, "begin", spent)
    with pytest.raises(ValueError, match=f"`{name}`"):
        distil(images, labels)
    spent.assert_not_called()


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("step", ["first_images", "_match"])
def test_a_failure_after_the_release_hands_the_means_over(
    monkeypatch, records, step, error
):
    images, labels = (part[:200] for part in records)
    target = f"dp_transcribe.distillation.matching.{step}"
    monkeypatch.setattr(target, mock.Mock(side_effect=error))
    with pytest.raises(error) as failed:
        distil(images, labels)
    assert failed.value.released.means.shape == (2, SETTINGS.directions)
    assert 0.99 < failed.value.released.statement.epsilon <= 1.0


def test_images_are_made_of_kept_means_at_no_cost(records, monkeypatch, tmp_path):
    images, labels = (part[:200] for part in records)
    whole = distil(images, labels, on_release=lambda means: means.save(tmp_path))
    spent = mock.Mock()
    monkeypatch.setattr(RecordSums, "begin", spent)
    kept = ClassMeans.load(tmp_path)
    made = images_of_means(kept, BARS, settings=SETTINGS, seed=3)
    spent.assert_not_called()
    np.testing.assert_array_equal(made.images, whole.images)
    np.testing.assert_array_equal(made.labels, whole.labels)
    assert made.statement == whole.statement
    for change in ({"directions": 39}, {"filters": 8}, {"networks": 3}):
        other = dataclasses.replace(SETTINGS, **change)
        with pytest.raises(ValueError, match="`released`.*that it was released with"):
            images_of_means(kept, BARS, settings=other, seed=3)
    with pytest.raises(ValueError, match="`released`"):
        images_of_means(kept, BARS, settings=SETTINGS)
    with pytest.raises(ValueError, match="`pixel_range`"):
        narrow = dataclasses.replace(SETTINGS, pixel_range=(0.4, 0.6))
        images_of_means(kept, BARS, settings=narrow, seed=3)


def test_small_images_and_a_single_class_are_refused():
    with pytest.raises(ValueError, match="`image_shape`"):
        distil(*Bars(4).draw(4, seed=1), source=Bars(4))
    with pytest.raises(ValueError, match="`num_classes`"):
        distil(np.zeros((4, *SHAPE)), np.zeros(4, int), num_classes=1)


def test_images_that_do_not_fit_are_refused_before_any_release(monkeypatch):
    monkeypatch.setattr(RecordSums, "begin", mock.Mock())
    settings = dataclasses.replace(
        SETTINGS, images_per_class=20_000, candidates=20_000, filters=64
    )
    refused = r"`images_per_class`.*at most \d+, which take 4 GiB"
    with pytest.raises(ValueError, match=refused):
        distil(*BARS.draw(10, seed=1), settings=settings)
    RecordSums.begin.assert_not_called()
