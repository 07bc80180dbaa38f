"""A linear classifier on public features, fitted with record-level privacy."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import dp_accounting
import numpy as np
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe.distillation.progress import counted
from dp_transcribe.distillation.releases import (
    RELATION,
    RecordSums,
    sampling_rate,
    sum_event,
)
from dp_transcribe.privacy.calibration import noise_multiplier_for
from dp_transcribe.privacy.ledger import Ledger
from dp_transcribe.privacy.statement import PrivacyStatement

# Records read at once: their features stay in the processor's cache.
_CHUNK = 128
_SHORTEST = 1e-6


@dataclasses.dataclass(frozen=True)
class LinearTraining:
    """How a linear model is fitted; public, chosen without the private data.

    Attributes:
        steps: number of gradient steps, each one release.
        learning_rate: of the gradient divided by the number of records and by
            `l2_norm`.
        momentum: of heavy-ball gradient descent.
        l2_norm: bound of one record's gradient.
        sampling_probability: probability with which a step takes each record; 1 is
            full-batch gradient descent.
        averaged: the share of the last steps whose weights are averaged; 0 keeps
            the last weights.
        mean_noise: noise of the release of the features' mean, relative to that of
            all steps together, so that it takes `1 / mean_noise**2` of the budget.
            The features are then centred and brought to norm one. None leaves them
            as they are.
        accountant: `"pld"` or `"rdp"`.
    """

    steps: int = 160
    learning_rate: float = 8.0
    momentum: float = 0.9
    l2_norm: float = 1.0
    sampling_probability: float = 1.0
    averaged: float = 0.25
    mean_noise: float | None = 10.0
    accountant: str = "pld"

    def __post_init__(self) -> None:
        """Checks the attributes."""
        _validate.positive_int("steps", self.steps)
        _validate.positive_finite("learning_rate", self.learning_rate)
        _validate.probability("momentum", self.momentum)
        _validate.positive_finite("l2_norm", self.l2_norm)
        sampling_rate(self.sampling_probability)
        _validate.probability("averaged", self.averaged)
        if self.mean_noise is not None:
            _validate.positive_finite("mean_noise", self.mean_noise)
        _validate.one_of("accountant", self.accountant, ("rdp", "pld"))

    def mean_multiplier(self, multiplier: float) -> float:
        """Noise multiplier of the mean's release for one of the steps'."""
        alike = multiplier / math.sqrt(self.steps) / self.sampling_probability
        return alike * (self.mean_noise or 0.0)

    def event(self, multiplier: float) -> dp_accounting.DpEvent:
        """Everything that a fit releases with this noise multiplier."""
        step = sum_event(multiplier, self.sampling_probability)
        steps = dp_accounting.SelfComposedDpEvent(step, self.steps)
        if self.mean_noise is None:
            return steps
        mean = dp_accounting.GaussianDpEvent(self.mean_multiplier(multiplier))
        return dp_accounting.ComposedDpEvent([mean, steps])


class PrivateLinearModel:
    """Multinomial logistic regression by noisy gradient descent.

    Args:
        num_classes: number of classes.
        training: how it is fitted.
        seed: None for secret noise; an int makes runs repeatable, for tests.

    Attributes:
        weights: float32 `[features, classes]`, None before `fit`. Zero at the start.
        centre: float32 `[features]`, the noisy mean of the features, or zeros.

    **Privacy**: unit `RECORD`, zero-out. First the mean of the features, each of
    norm at most one, is released once and cheaply.
    The gradient of one record is the outer
    product of its features and its residual (probabilities minus one-hot label), so
    its norm is the product of their norms, and clipping costs nothing: no gradient
    of a single record is ever built. The sum of clipped gradients moves by at most
    `l2_norm` and is released once per step. The features must be a public function
    of each record alone: no statistic of the private data may be in them.
    """

    def __init__(
        self,
        num_classes: int,
        training: LinearTraining | None = None,
        *,
        seed: int | None = None,
    ) -> None:
        self.num_classes = _validate.num_classes("num_classes", num_classes)
        self.training = training or LinearTraining()
        self.seed = _validate.optional_seed("seed", seed)
        self.weights: np.ndarray | None = None
        self.centre: np.ndarray | None = None
        self._releases: RecordSums | None = None
        self._delta = 0.0

    def fit(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        *,
        target_epsilon: float,
        delta: float,
        on_step: Callable[[int, np.ndarray], None] | None = None,
        verbose: int = 1,
    ) -> PrivateLinearModel:
        """Fits the model and spends the whole budget.

        Args:
            features: float `[records, features]`, each row from one record alone.
            labels: int `[records]`.
            target_epsilon: the epsilon per record that is not passed.
            delta: strictly between 0 and 1.
            on_step: called with each step's number and noisy weights.
            verbose: 1 shows a bar with the epsilon so far, 0 nothing.

        Returns:
            The model.

        Raises:
            ValueError: an argument is out of range or the labels do not fit.
            RuntimeError: the model was fitted before.
        """
        if self._releases is not None:
            raise RuntimeError(
                "This model was fitted before, and a second fit would spend a second "
                "budget on the same records. Make a new model and add up both "
                "statements' epsilons."
            )
        if np.ndim(features) != 2:
            expected = "features of shape (records, features)"
            raise _validate.invalid("features", np.shape(features), expected)
        labels = check_labels(labels, len(features), self.num_classes)
        plan = self.training
        multiplier = noise_multiplier_for(
            target_epsilon, delta, plan.event, RELATION, plan.accountant
        )
        self._delta = delta
        self._releases = RecordSums(
            mechanism="PrivateLinearModel",
            l2_norm=plan.l2_norm,
            noise_multiplier=multiplier,
            sampling_probability=plan.sampling_probability,
            seed=self.seed,
        )
        self.centre = self._noisy_mean(features)
        self.weights = self._descend(features, labels, on_step, verbose)
        return self

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Scores of the classes, float32 `[n, classes]`.

        Raises:
            RuntimeError: the model was not fitted.
            ValueError: the features are not as wide as those of `fit`.
        """
        weights = self._fitted_weights()
        if np.ndim(features) != 2 or np.shape(features)[1] != len(weights):
            expected = f"features of shape (n, {len(weights)})"
            raise _validate.invalid("features", np.shape(features), expected)
        outputs = [np.zeros((0, self.num_classes), np.float32)]
        for start in range(0, len(features), _CHUNK):
            batch = tf.cast(features[start : start + _CHUNK], tf.float32)
            outputs.append(centred_logits(batch, self.centre, weights).numpy())
        return np.concatenate(outputs)

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Most likely classes, int `[n]`."""
        return self.logits(features).argmax(axis=1)

    def score(self, features: np.ndarray, labels: np.ndarray) -> float:
        """Share of correct predictions."""
        return float(np.mean(self.predict(features) == np.asarray(labels)))

    @property
    def ledger(self) -> Ledger:
        """What was released."""
        return Ledger() if self._releases is None else self._releases.ledger

    def privacy_statement(
        self, *, covered: tuple[str, ...] = ("linear model", "distilled data set")
    ) -> PrivacyStatement:
        """The guarantee of the weights and of all that is computed from them.

        Args:
            covered: what was computed from them.

        Raises:
            RuntimeError: the model was not fitted.
        """
        self._fitted_weights()
        return self._open_releases().statement(
            delta=self._delta,
            accountant=self.training.accountant,
            covered=covered,
            steps=self.training.steps,
        )

    def _noisy_mean(self, features: np.ndarray) -> np.ndarray:
        """Releases the mean of the features, or returns zeros without a release."""
        width, plan = features.shape[1], self.training
        if plan.mean_noise is None:
            return np.zeros(width, np.float32)
        releases = self._open_releases()
        sums = RecordSums(
            mechanism="NoisyMean",
            l2_norm=1.0,
            noise_multiplier=plan.mean_multiplier(releases.noise_multiplier),
            seed=None if self.seed is None else (self.seed + 1) % 2**63,
            ledger=releases.ledger,
        )
        sums.begin()
        total = tf.zeros([width])
        for start in range(0, len(features), _CHUNK):
            batch = tf.cast(features[start : start + _CHUNK], tf.float32)
            total += clipped_sum(batch)
        return (sums.add_noise(total) / len(features)).numpy()

    def _open_releases(self) -> RecordSums:
        if self._releases is None:
            raise RuntimeError("The model has released nothing. Call `fit` first.")
        return self._releases

    def _descend(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        on_step: Callable[[int, np.ndarray], None] | None,
        verbose: int,
    ) -> np.ndarray:
        """Heavy-ball gradient descent; returns the averaged weights."""
        plan, releases = self.training, self._open_releases()
        weights = tf.zeros([features.shape[1], self.num_classes])
        velocity, total = tf.zeros_like(weights), tf.zeros_like(weights)
        last = max(1, math.ceil(plan.averaged * plan.steps))
        expected = plan.sampling_probability * len(features) * plan.l2_norm
        spent = functools.partial(
            releases.epsilon, delta=self._delta, accountant=plan.accountant
        )
        for step in counted(plan.steps, verbose=verbose, epsilon=spent):
            releases.begin()
            chosen = releases.sample(len(features)).numpy()
            gradient = self._clipped_sum(features, labels, chosen, weights)
            velocity = (
                plan.momentum * velocity + releases.add_noise(gradient) / expected
            )
            weights = weights - plan.learning_rate * velocity
            if step >= plan.steps - last:
                total = total + weights / last
            if on_step is not None:
                on_step(step, weights.numpy())
        return total.numpy()

    def _clipped_sum(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        chosen: np.ndarray,
        weights: tf.Tensor,
    ) -> tf.Tensor:
        """Sum of the clipped gradients of the chosen records."""
        total = tf.zeros_like(weights)
        whole = len(chosen) == len(features)
        for start in range(0, len(chosen), _CHUNK):
            rows = (
                slice(start, start + _CHUNK)
                if whole
                else chosen[start : start + _CHUNK]
            )
            total += clipped_gradient_sum(
                tf.cast(features[rows], tf.float32),
                tf.constant(labels[rows]),
                weights,
                self.centre,
                l2_norm=self.training.l2_norm,
            )
        return total

    def _fitted_weights(self) -> np.ndarray:
        if self.weights is None:
            raise RuntimeError("The model has no weights yet. Call `fit` first.")
        return self.weights


@tf.function(reduce_retracing=True)
def clipped_gradient_sum(
    features: tf.Tensor,
    labels: tf.Tensor,
    weights: tf.Tensor,
    centre: tf.Tensor,
    *,
    l2_norm: float,
) -> tf.Tensor:
    """Sum of the records' clipped cross-entropy gradients.

    Args:
        features: float32 `[n, features]`.
        labels: int `[n]`.
        weights: float32 `[features, classes]`.
        centre: float32 `[features]`, what is taken off the features before they are
            brought to norm one; all zero leaves them as they are.
        l2_norm: bound of one record's gradient.

    Returns:
        float32 `[features, classes]`. A record with a NaN or infinite feature counts
        as zero.

    **Privacy**: moves by at most `l2_norm` if one record is left out.
    """
    offsets = _finite(features - centre)
    lengths = tf.norm(offsets, axis=1)
    scales = _scales(lengths, centre)
    probabilities = tf.nn.softmax(scales[:, None] * tf.matmul(offsets, weights))
    residuals = probabilities - tf.one_hot(labels, tf.shape(weights)[1])
    # Scaling the residuals instead of the features gives the same outer products.
    norms = scales * lengths * tf.norm(residuals, axis=1)
    factors = scales * tf.math.divide_no_nan(tf.minimum(norms, l2_norm), norms)
    usable = tf.math.is_finite(norms)[:, None]
    clipped = tf.where(usable, residuals * factors[:, None], 0.0)
    return tf.matmul(offsets, clipped, transpose_a=True)


@tf.function(reduce_retracing=True)
def clipped_sum(features: tf.Tensor) -> tf.Tensor:
    """Sum of features `[n, features]`, each clipped to norm one.

    **Privacy**: moves by at most 1 if one record is left out; a record with a NaN or
    infinite feature counts as zero.
    """
    return tf.reduce_sum(tf.clip_by_norm(_finite(features), 1.0, axes=[1]), axis=0)


@tf.function(reduce_retracing=True)
def centred_logits(
    features: tf.Tensor, centre: tf.Tensor, weights: tf.Tensor
) -> tf.Tensor:
    """Scores of the classes by a fitted `PrivateLinearModel`.

    Args:
        features: float32 `[n, features]`.
        centre: float32 `[features]`; all zero leaves the features as they are.
        weights: float32 `[features, classes]`.

    Returns:
        float32 `[n, classes]`.
    """
    offsets = features - centre
    scales = _scales(tf.norm(offsets, axis=1), centre)
    return scales[:, None] * tf.matmul(offsets, weights)


def _scales(lengths: tf.Tensor, centre: tf.Tensor) -> tf.Tensor:
    """One over the lengths of centred features; one if nothing was taken off."""
    inverse = 1.0 / tf.maximum(lengths, _SHORTEST)
    return tf.where(tf.reduce_any(centre != 0.0), inverse, tf.ones_like(lengths))


def _finite(features: tf.Tensor) -> tf.Tensor:
    """Puts zeros in place of every row that is not finite."""
    finite = tf.reduce_all(tf.math.is_finite(features), axis=1, keepdims=True)
    return tf.where(finite, features, 0.0)


def check_labels(labels: np.ndarray, num_records: int, num_classes: int) -> np.ndarray:
    """Checks labels against the records and the classes, before any release.

    Args:
        labels: int `[records]`.
        num_records: number of records.
        num_classes: number of classes.

    Returns:
        int32 `[records]`.

    Raises:
        ValueError: there is no record, or not one whole number from 0 to
            `num_classes - 1` per record. The message does not quote the labels, which
            are private.
    """
    if not num_records:
        raise _validate.invalid("labels", np.shape(labels), "one record or more")
    values = np.asarray(labels)
    whole = np.issubdtype(values.dtype, np.integer)
    if values.shape != (num_records,) or not whole:
        expected = f"one whole number per record, of shape ({num_records},)"
        raise _validate.invalid("labels", (values.dtype.name, values.shape), expected)
    if not 0 <= values.min() <= values.max() < num_classes:
        expected = f"whole numbers from 0 to {num_classes - 1}"
        mend = "Number the classes from 0, or raise `num_classes`."
        raise _validate.invalid("labels", "(withheld: private)", expected, mend)
    return values.astype(np.int32)
