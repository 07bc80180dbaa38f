"""Arithmetic that a bound can be trusted to: float32 where the code says float32."""

from __future__ import annotations

import logging
import os

import tensorflow as tf

from dp_transcribe import _validate

_LOGGER = logging.getLogger(__name__)
# What makes TensorFlow, cuDNN or oneDNN round float32 products to fewer bits.
_VARIABLES = {
    "TF_ENABLE_AUTO_MIXED_PRECISION": ("", "0"),
    "TF_ENABLE_AUTO_MIXED_PRECISION_GRAPH_REWRITE": ("", "0"),
    "TF_SET_ONEDNN_FPMATH_MODE": ("", "FP32"),
    "ONEDNN_DEFAULT_FPMATH_MODE": ("", "STRICT"),
}


def require_float32() -> None:
    """Sees to it that products of float32 numbers are computed as such.

    A norm and the sum that it bounds are computed from the same numbers by different
    products. If these round to ten bits or fewer, each in its own way, an example may
    contribute more than its bound. TensorFloat-32, which TensorFlow uses on recent
    GPUs by default, is turned off for the whole process; bfloat16 as a Keras policy is
    fine, since it rounds the numbers themselves.

    Raises:
        ValueError: TensorFlow was told to choose lower precision by itself.

    **Privacy**: without it, bounds hold to about 1e-3 of themselves, and not even that
    where the terms of a gradient cancel.
    """
    options = tf.config.optimizer.get_experimental_options()
    for name, value in options.items():
        if name.startswith("auto_mixed_precision") and value:
            mend = f"Take `{name}` out of `tf.config.optimizer`'s options."
            expected = "no automatic mixed precision"
            raise _validate.invalid(name, value, expected, mend)
    for name, harmless in _VARIABLES.items():
        value = os.environ.get(name, "")
        if value.upper() not in harmless:
            mend = f"Unset the environment variable {name} and start again."
            raise _validate.invalid(name, value, "full precision", mend)
    if tf.config.experimental.tensor_float_32_execution_enabled():
        tf.config.experimental.enable_tensor_float_32_execution(False)
        if tf.config.list_physical_devices("GPU"):
            _LOGGER.warning(
                "TensorFloat-32 is turned off in this process: it would round the "
                "gradients that are bounded for privacy."
            )
