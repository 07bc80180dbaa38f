import keras
import numpy as np
import pytest

from dp_transcribe.schedules import DelayedCosineDecay


def test_waits_then_decays_as_keras_does():
    ours = DelayedCosineDecay(0.5, 100, delay=0.6, alpha=0.1)
    stock = keras.optimizers.schedules.CosineDecay(0.5, 40, alpha=0.1)
    assert all(float(ours(step)) == 0.0 for step in range(60))
    np.testing.assert_allclose(
        [float(ours(60 + step)) for step in (0, 10, 39, 40, 70)],
        [float(stock(step)) for step in (0, 10, 39, 40, 70)],
        rtol=1e-5,
    )


def test_without_delay_it_is_keras_own():
    ours = DelayedCosineDecay(0.5, 100, delay=0.0, alpha=0.0)
    stock = keras.optimizers.schedules.CosineDecay(0.5, 100)
    for step in (0, 1, 50, 100):
        np.testing.assert_allclose(float(ours(step)), float(stock(step)), atol=1e-6)


def test_is_kept_with_its_optimizer():
    optimizer = keras.optimizers.Adam(DelayedCosineDecay(0.5, 100))
    kept = keras.saving.serialize_keras_object(optimizer)
    loaded = keras.saving.deserialize_keras_object(kept)
    assert loaded.get_config() == optimizer.get_config()


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("learning_rate", {"learning_rate": 0.0}),
        ("total_steps", {"total_steps": 0}),
        ("delay", {"delay": 1.0}),
        ("delay", {"delay": -0.1}),
        ("alpha", {"alpha": 1.1}),
    ],
)
def test_bad_arguments_are_refused_by_name(name, kwargs):
    with pytest.raises(ValueError, match=name):
        DelayedCosineDecay(**{"learning_rate": 0.1, "total_steps": 10, **kwargs})
