"""The record-level calls for ensembles, and the public features of their teachers."""

import functools

import dp_accounting
import keras
import numpy as np
import pytest
import tensorflow as tf

import dp_transcribe as dpt
from dp_transcribe.distillation.features import scattering_features
from dp_transcribe.generators import SmoothNoise
from dp_transcribe.privacy.units import Relation, Unit
from dp_transcribe.shards import RidgeFit, linear_member
from tests import tiny

SHARDS, RANK = 5, 12


@pytest.fixture(scope="module")
def ensemble():
    random = np.random.default_rng(0)
    images = random.uniform(size=(100, *tiny.IMAGE)).astype(np.float32)
    flatten = keras.Sequential([keras.layers.Input(tiny.IMAGE), keras.layers.Flatten()])
    return dpt.train_shard_teachers(
        functools.partial(linear_member, tiny.PIXELS, tiny.CLASSES),
        (images, random.integers(0, tiny.CLASSES, 100)),
        shards=SHARDS,
        features=flatten,
        fit=RidgeFit(),
    )


CALLS = {
    "votes": (dpt.pate, dpt.NoisyVotes, 512),
    "label": (functools.partial(dpt.pate, release="label"), dpt.NoisyVotes, 512),
    "gradient": (dpt.pate_gradient, dpt.EnsembleGradient, 1),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_gives_a_transcriber_that_fits_by_its_own_schedule(name, ensemble):
    call, mechanism, releases = CALLS[name]
    transcriber = call(
        ensemble,
        SmoothNoise(tiny.IMAGE),
        student=tiny.linear_model(0, 0.1),
        epochs=1,
        steps_per_epoch=1,
        seed=1,
    )
    transcriber.fit(target_epsilon=1.0, delta=tiny.DELTA, verbose=0)
    assert isinstance(transcriber.mechanism, mechanism)
    assert transcriber.ledger.releases(Unit.RECORD) == releases
    assert 0.99 < transcriber.ledger.epsilon(unit=Unit.RECORD, delta=tiny.DELTA) <= 1
    assert transcriber.generator_covered


def test_a_threshold_costs_a_check_for_every_query_asked(ensemble):
    transcriber = dpt.pate(
        ensemble,
        SmoothNoise(tiny.IMAGE),
        release="label",
        threshold=3.0,
        threshold_ratio=1.5,
        student=tiny.linear_model(0, 0.1),
        epochs=1,
        steps_per_epoch=1,
        seed=1,
    )
    transcriber.fit(target_epsilon=1.0, delta=tiny.DELTA, verbose=0)
    noise = transcriber.mechanism.noise_multiplier
    accountant = dp_accounting.rdp.RdpAccountant(
        neighboring_relation=Relation.REPLACE_ONE
    )
    for multiplier in (noise, 1.5 * noise):
        accountant.compose(dp_accounting.GaussianDpEvent(multiplier), 512)
    found = transcriber.privacy_statement().epsilon
    assert found == pytest.approx(accountant.get_epsilon(tiny.DELTA))
    assert 0.99 < found <= 1.0


@pytest.mark.parametrize("threshold", [0.6, 1, SHARDS + 0.5, float("nan")])
def test_a_threshold_of_other_than_votes_is_refused(ensemble, threshold):
    with pytest.raises(ValueError, match="`threshold`"):
        dpt.pate(ensemble, SmoothNoise(tiny.IMAGE), threshold=threshold)


@pytest.mark.parametrize("call", [dpt.pate, dpt.pate_gradient])
def test_one_teacher_is_refused(call):
    with pytest.raises(ValueError, match="TeacherEnsemble"):
        call(tiny.linear_teacher(), SmoothNoise(tiny.IMAGE))


def test_features_are_centred_whitened_and_saved(tmp_path):
    source = SmoothNoise(tiny.IMAGE)
    features = scattering_features(
        source, tiny.IMAGE, rank=RANK, damping_rank=4, images=40
    )
    public = source.sample(40, tf.constant([0, 0]))
    rows = features(public).numpy()
    assert rows.shape == (40, RANK)
    assert np.allclose(rows.mean(0), 0, atol=1e-3)
    assert np.mean(np.sum(rows**2, -1)) == pytest.approx(1.0, rel=1e-2)
    covariance = rows.T @ rows / 40
    assert np.allclose(covariance, np.diag(np.diag(covariance)), atol=1e-3)
    features.save(tmp_path / "features.keras")
    loaded = keras.saving.load_model(tmp_path / "features.keras")
    assert np.allclose(loaded(public), rows, atol=1e-6)
