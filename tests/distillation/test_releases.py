"""Releases depend on noisy sums alone, and the epsilon stated is within the target."""

import dp_accounting
import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe.distillation import (
    DPKIP,
    KIPTraining,
    LinearTraining,
    MeanMatching,
    PrivateLinearModel,
    RBFKernel,
    ScatteringKernel,
    distill_means,
)
from dp_transcribe.distillation.class_means import (
    PublicDirections,
    release_class_means,
)
from dp_transcribe.distillation.releases import RecordSums
from dp_transcribe.mechanisms.noise import NoiseSource
from dp_transcribe.privacy import Unit
from tests.distillation.bars import Bars

SCATTERING = ScatteringKernel((8, 8, 1), groups=1, scale=1, orientations=2)
BARS = Bars(16)
START = np.random.default_rng(0).random((2, 8, 8, 1))


def linear_model(seed=1, accountant="rdp", sampling=0.3, data=1):
    """Weights and centre of a linear model, and its statement."""
    plan = LinearTraining(
        steps=3, sampling_probability=sampling, mean_noise=4.0, accountant=accountant
    )
    rng = np.random.default_rng(data)
    model = PrivateLinearModel(3, plan, seed=seed)
    labels = rng.integers(0, 3, 50)
    model.fit(rng.normal(size=(50, 20)), labels, target_epsilon=1.0, delta=1e-5)
    return [model.weights, model.centre], model.privacy_statement()


def dpkip(bounded, seed=1, accountant="rdp", sampling=0.3, data=1):
    """Support images of DP-KIP, and their statement."""
    plan = KIPTraining(
        steps=3,
        sampling_probability=sampling,
        bounded=bounded,
        accountant=accountant,
    )
    kernel = SCATTERING if bounded == "features" else RBFKernel()
    rng = np.random.default_rng(data)
    model = DPKIP(kernel, START, 2, plan, seed=seed)
    images, labels = rng.random((50, 8, 8, 1)), rng.integers(0, 2, 50)
    model.fit(images, labels, target_epsilon=1.0, delta=1e-5)
    return [model.support.numpy()], model.privacy_statement()


def class_means(seed=1, accountant="rdp", sampling=1.0, data=1):
    """Class means with their counts, and their statement."""
    assert sampling == 1.0, "All records are in the one sum of the class means."
    rng = np.random.default_rng(data)
    directions = PublicDirections.from_public(SCATTERING, np.random.default_rng(9)
        .random((30, 8, 8, 1)), 10)  # fmt: skip
    released = release_class_means(
        rng.random((50, 8, 8, 1)),
        rng.integers(0, 2, 50).astype(np.int32),
        directions,
        num_classes=2,
        target_epsilon=1.0,
        delta=1e-5,
        l2_norm=0.6,
        count_share=0.05,
        accountant=accountant,
        seed=seed,
    )
    return [released.means, released.counts], released.statement


WAYS = {
    "linear": linear_model,
    "pixels": lambda **kwargs: dpkip("pixels", **kwargs),
    "features": lambda **kwargs: dpkip("features", **kwargs),
    "means": lambda **kwargs: class_means(**{"sampling": 1.0, **kwargs}),
}


def made_up_sums(_, totals):
    """Noisy sums in which no record has a part."""
    return [0.5 + 40.0 * tf.ones_like(total) for total in totals]


# Other records, other sizes of samples and classes, the same noisy sums.
@pytest.mark.parametrize("way", WAYS)
def test_what_is_released_depends_on_the_noisy_sums_alone(monkeypatch, way):
    monkeypatch.setattr(RecordSums, "add_joint_noise", made_up_sums)
    results = [WAYS[way](seed=number, data=number)[0] for number in (1, 2, 3)]
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(found, expected)


def test_images_of_class_means_depend_on_the_noisy_sums_alone(monkeypatch):
    def random_sums(_, totals):
        rng = np.random.default_rng(5)
        return [tf.constant(rng.random(t.shape), tf.float32) for t in totals]

    monkeypatch.setattr(RecordSums, "add_joint_noise", random_sums)
    settings = MeanMatching(
        images_per_class=2, networks=1, filters=4, public_images=30, directions=10,
        candidates=50, damping_rank=3, steps=2, accountant="rdp",
    )  # fmt: skip
    made = []
    for number in (1, 2):
        images, labels = BARS.draw(50, seed=number)
        distilled = distill_means(
            images, labels, num_classes=2, source=BARS, target_epsilon=1.0,
            delta=1e-5, settings=settings,
        )  # fmt: skip
        made.append(distilled.images)
    np.testing.assert_array_equal(*made)


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
@pytest.mark.parametrize("way", WAYS)
def test_the_epsilon_stated_is_that_of_the_accountant_calibrated_by(way, accountant):
    _, statement = WAYS[way](accountant=accountant, sampling=1.0)
    assert statement.accountant == accountant and statement.unit is Unit.RECORD
    assert 0.99 < statement.epsilon <= 1.0
    multiplier = statement.details["noise_multiplier"]
    by = {
        "rdp": dp_accounting.rdp.RdpAccountant,
        "pld": dp_accounting.pld.PLDAccountant,
    }[accountant]()
    steps = 1 if way == "means" else 3
    by.compose(dp_accounting.GaussianDpEvent(multiplier), steps)
    if way == "linear":
        mean = 4.0 * multiplier / np.sqrt(3)
        by.compose(dp_accounting.GaussianDpEvent(mean))
    assert statement.epsilon == pytest.approx(by.get_epsilon(1e-5), rel=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_no_two_draws_of_a_fit_share_their_random_bits(monkeypatch, way):
    seeds, stream = [], NoiseSource.stream

    def kept(self, number, purpose):
        seeds.append(tuple(stream(self, number, purpose).numpy()))
        return stream(self, number, purpose)

    monkeypatch.setattr(NoiseSource, "stream", kept)
    WAYS[way](seed=4)
    # Three steps of a sample and its noise each; the linear model has a mean besides.
    assert len(seeds) == {"linear": 7, "means": 1}.get(way, 6)
    assert len(set(seeds)) == len(seeds)


def test_the_largest_seed_serves_all_sums():
    linear_model(seed=2**63 - 1)
