"""Nothing is bounded in fewer bits than float32 has."""

import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe.distillation import PrivateLinearModel
from tests import tiny


@pytest.fixture
def tensor_float_32():
    """The state in which TensorFlow starts."""
    config = tf.config.experimental
    config.enable_tensor_float_32_execution(True)
    yield config.tensor_float_32_execution_enabled
    config.enable_tensor_float_32_execution(False)


@pytest.fixture
def mixed_precision():
    options = tf.config.optimizer.set_experimental_options
    options({"auto_mixed_precision": True})
    yield
    options({"auto_mixed_precision": False})


def linear_model():
    return PrivateLinearModel(2)


def fit_linear_model(model):
    features, labels = np.eye(4, 3, dtype=np.float32), np.array([0, 1, 0, 1])
    model.fit(features, labels, target_epsilon=1.0, delta=1e-5, verbose=0)


FITS = [
    pytest.param(tiny.transcriber, tiny.fit, id="transcriber"),
    pytest.param(linear_model, fit_linear_model, id="linear model"),
]


@pytest.mark.parametrize(("make", "fit"), FITS)
def test_tensor_float_32_is_off_before_anything_is_bounded(make, fit, tensor_float_32):
    fit(make())
    assert not tensor_float_32()


@pytest.mark.parametrize(("make", "fit"), FITS)
def test_automatic_mixed_precision_is_refused(make, fit, mixed_precision):
    model = make()
    with pytest.raises(ValueError, match="auto_mixed_precision"):
        fit(model)
    assert tiny.releases(model) == 0


@pytest.mark.parametrize(("make", "fit"), FITS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TF_ENABLE_AUTO_MIXED_PRECISION", "1"),
        ("TF_SET_ONEDNN_FPMATH_MODE", "BF16"),
        ("ONEDNN_DEFAULT_FPMATH_MODE", "any"),
    ],
)
def test_a_variable_that_lowers_precision_is_refused(
    make, fit, name, value, monkeypatch
):
    model = make()
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name}.*Unset"):
        fit(model)
    assert tiny.releases(model) == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TF_ENABLE_AUTO_MIXED_PRECISION", "0"),
        ("ONEDNN_DEFAULT_FPMATH_MODE", "strict"),
    ],
)
def test_variables_that_ask_for_full_precision_are_fine(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    model = linear_model()
    fit_linear_model(model)
    assert tiny.releases(model)
