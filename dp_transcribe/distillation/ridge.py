"""Kernel ridge regression on a distilled data set, as a classifier."""

from __future__ import annotations

import numpy as np
import tensorflow as tf
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from dp_transcribe import _validate
from dp_transcribe.distillation.kernels import Kernel

_BATCH = 500


class KernelRidgeClassifier(ClassifierMixin, BaseEstimator):
    """Classifies by kernel ridge regression to centred one-hot labels.

    The regularisation is `penalty` times the mean of the kernel matrix's diagonal, as
    in DP-KIP, so that it does not depend on the scale of the kernel. A scikit-learn
    estimator: it can be cloned, stand at the end of a pipeline and be searched over.

    Args:
        kernel: the kernel.
        penalty: strength of the regularisation, relative to the kernel.

    Attributes:
        classes_: int `[classes]`, the labels seen by `fit`.
        coefficients_: float32 `[support, classes]`, one row per embedding.
        support_: the embeddings of the inputs of `fit`.

    **Privacy**: computed from the support alone, and so as private as the support.
    """

    def __init__(self, kernel: Kernel, *, penalty: float = 1e-3) -> None:
        _validate.positive_finite("penalty", penalty)
        self.kernel = kernel
        self.penalty = penalty

    def fit(self, inputs: np.ndarray, labels: np.ndarray) -> KernelRidgeClassifier:
        """Solves for the coefficients.

        Args:
            inputs: float `[support, ...]`.
            labels: int `[support]`, or float `[support, classes]` regression targets.

        Returns:
            The classifier.

        Raises:
            ValueError: there is no input, one is not finite, or there is not one label
                per input.
        """
        _check_inputs(inputs)
        labels = np.asarray(labels)
        if len(labels) != len(inputs) or labels.ndim not in (1, 2):
            expected = f"one label per input, {len(inputs)} in all"
            raise _validate.invalid("labels", labels.shape, expected)
        if labels.ndim == 1:
            self.classes_ = np.unique(labels)
            labels = centred_one_hot(
                np.searchsorted(self.classes_, labels), len(self.classes_)
            )
        else:
            self.classes_ = np.arange(labels.shape[1])
        self._shape = np.shape(inputs)[1:]
        self.support_ = self.kernel.embed(tf.cast(inputs, tf.float32))
        gram = self.kernel.between(self.support_, self.support_)
        self.coefficients_ = ridge_solve(
            gram, tf.cast(labels, tf.float32), self.penalty
        ).numpy()
        return self

    def decision_function(self, inputs: np.ndarray) -> np.ndarray:
        """Regression outputs, float32 `[n, classes]`.

        Raises:
            ValueError: the inputs are of another shape than those of `fit`.
        """
        check_is_fitted(self)
        if np.shape(inputs)[1:] != self._shape:
            expected = f"inputs of shape {self._shape} each, as in `fit`"
            raise _validate.invalid("inputs", np.shape(inputs), expected)
        outputs = [np.zeros((0, self.coefficients_.shape[1]), np.float32)]
        for start in range(0, len(inputs), _BATCH):
            batch = tf.cast(inputs[start : start + _BATCH], tf.float32)
            gram = self.kernel.between(self.kernel.embed(batch), self.support_)
            outputs.append((gram @ self.coefficients_).numpy())
        return np.concatenate(outputs)

    def linear_weights(self) -> np.ndarray:
        """The regression as weights of the kernel's embeddings, `[features, classes]`.

        Scores are embeddings times weights where the kernel is an inner product.
        """
        check_is_fitted(self)
        if not self.kernel.is_inner_product:
            expected = "a kernel that is an inner product"
            raise _validate.invalid("kernel", self.kernel, expected)
        return self.support_.numpy().T @ self.coefficients_

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """Most likely labels, `[n]`."""
        scores = self.decision_function(inputs)
        return self.classes_[scores.argmax(axis=1)]


def _check_inputs(inputs: np.ndarray) -> None:
    """Refuses what no regression can be solved for."""
    if not len(inputs):
        raise _validate.invalid("inputs", np.shape(inputs), "at least one input")
    if not np.all(np.isfinite(inputs)):
        raise _validate.invalid("inputs", "NaN or infinite ones", "finite numbers")


def centred_one_hot(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """One-hot labels less their mean `1 / num_classes`, float32 `[n, classes]`."""
    return np.eye(num_classes, dtype=np.float32)[labels] - np.float32(1 / num_classes)


def ridge_solve(gram: tf.Tensor, targets: tf.Tensor, penalty: float) -> tf.Tensor:
    """Solves the regularised system; differentiable.

    Args:
        gram: float32 `[support, support]`, the kernel matrix of the support.
        targets: float32 `[support, classes]`.
        penalty: strength relative to the mean of the diagonal of `gram`.

    Returns:
        float32 `[support, classes]`.

    References:
        Vinaroz, Park: Differentially Private Kernel Inducing Points, arXiv:2301.13389.
    """
    size = tf.shape(gram)[0]
    scale = tf.linalg.trace(gram) / tf.cast(size, gram.dtype)
    damped = gram + penalty * scale * tf.eye(size, dtype=gram.dtype)
    return tf.linalg.solve(damped, targets)
