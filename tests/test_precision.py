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


def fit_transcriber():
    model = tiny.transcriber()
    try:
        tiny.fit(model)
    finally:
        fit_transcriber.releases = tiny.releases(model)


def fit_linear_model():
    model = PrivateLinearModel(2)
    try:
        features = np.eye(4, 3, dtype=np.float32)
        labels = np.array([0, 1, 0, 1])
        model.fit(features, labels, target_epsilon=1.0, delta=1e-5)
    finally:
        fit_linear_model.releases = tiny.releases(model)


FITS = [fit_transcriber, fit_linear_model]


@pytest.mark.parametrize("fit", FITS)
def test_tensor_float_32_is_off_before_anything_is_bounded(fit, tensor_float_32):
    fit()
    assert not tensor_float_32()


@pytest.mark.parametrize("fit", FITS)
def test_automatic_mixed_precision_is_refused(fit, mixed_precision):
    with pytest.raises(ValueError, match="auto_mixed_precision"):
        fit()
    assert fit.releases == 0


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TF_ENABLE_AUTO_MIXED_PRECISION", "1"),
        ("TF_SET_ONEDNN_FPMATH_MODE", "BF16"),
        ("ONEDNN_DEFAULT_FPMATH_MODE", "any"),
    ],
)
def test_a_variable_that_lowers_precision_is_refused(fit, name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name}.*Unset"):
        fit()
    assert fit.releases == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TF_ENABLE_AUTO_MIXED_PRECISION", "0"),
        ("ONEDNN_DEFAULT_FPMATH_MODE", "strict"),
    ],
)
def test_variables_that_ask_for_full_precision_are_fine(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    fit_linear_model()
    assert fit_linear_model.releases
