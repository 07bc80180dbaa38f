"""Per-record gradients of DP-KIP for kernels that are inner products, in closed form.

With support features S, kernel matrix M = S Sᵀ + penalty · mean diagonal, solution
A = M⁻¹ Y and a record's features e, the loss ½ · mean square of Aᵀ S e − y has, with
u = A · residual / classes and v = M⁻¹ S e, the gradient

    u (e − Sᵀ v)ᵀ − v (Sᵀ u)ᵀ − (2 · penalty / n) (u · v) S

with respect to S. No gradient of a single record has to be built to know its norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from dp_transcribe.distillation.jacobians import EmbeddingJacobian
from dp_transcribe.distillation.ridge import ridge_solve


def feature_gradient_sum(
    support: tf.Tensor,
    embedded: tf.Tensor,
    support_targets: tf.Tensor,
    targets: tf.Tensor,
    *,
    penalty: float,
    l2_norm: float,
) -> tf.Tensor:
    """Sum of gradients with respect to the support's features, clipped there.

    Args:
        support: float32 `[n, features]`.
        embedded: float32 `[records, features]`, finite.
        support_targets: float32 `[n, classes]`.
        targets: float32 `[records, classes]`.
        penalty: as in `KernelRidgeClassifier`.
        l2_norm: bound of one record's gradient.

    Returns:
        float32 `[n, features]`.

    **Privacy**: moves by at most `l2_norm` if one record is left out. The norms are
    summed in double precision, since their terms may cancel.
    """
    support, embedded, support_targets, targets = (
        tf.cast(x, tf.float64) for x in (support, embedded, support_targets, targets)
    )
    u, v, tilt = _factors(support, embedded, support_targets, targets, penalty)
    left, right = embedded - v @ support, u @ support
    squares = (
        _dot(u, u) * _dot(left, left)
        + _dot(v, v) * _dot(right, right)
        + tilt**2 * tf.reduce_sum(support**2)
        - 2.0 * _dot(u, v) * _dot(left, right)
        - 2.0 * tilt * _dot(left, right)
        + 2.0 * tilt * _dot(v @ support, right)
    )
    factors = _clip_factors(squares, l2_norm)[:, None]
    total = (
        tf.matmul(factors * u, left, transpose_a=True)
        - tf.matmul(factors * v, right, transpose_a=True)
        - tf.reduce_sum(factors[:, 0] * tilt) * support
    )
    return tf.cast(total, tf.float32)


def pixel_gradient_sum(
    support: tf.Tensor,
    jacobians: Sequence[EmbeddingJacobian],
    embedded: tf.Tensor,
    support_targets: tf.Tensor,
    targets: tf.Tensor,
    *,
    penalty: float,
    l2_norm: float,
) -> tf.Tensor:
    """Sum of gradients with respect to the support's pixels, clipped there.

    Args:
        support: float32 `[n, features]`.
        jacobians: one for each support image.
        embedded: float32 `[records, features]`, finite.
        support_targets: float32 `[n, classes]`.
        targets: float32 `[records, classes]`.
        penalty: as in `KernelRidgeClassifier`.
        l2_norm: bound of one record's gradient over all images together.

    Returns:
        float32 `[n, pixels]`.

    **Privacy**: moves by at most `l2_norm` if one record is left out.
    """
    u, v, tilt = _factors(support, embedded, support_targets, targets, penalty)
    gradients = []
    for index, jacobian in enumerate(jacobians):
        moved = jacobian.pulled(support)
        left = jacobian.pulled(embedded) - v @ moved
        gradients.append(
            u[:, index, None] * left
            - v[:, index, None] * (u @ moved)
            - tilt[:, None] * moved[index]
        )
    squares = tf.add_n([_dot(gradient, gradient) for gradient in gradients])
    usable = tf.math.is_finite(squares)
    factors = tf.where(usable, _clip_factors(squares, l2_norm), 0.0)[:, None]
    rows = [
        tf.reduce_sum(tf.where(usable[:, None], gradient * factors, 0.0), axis=0)
        for gradient in gradients
    ]
    return tf.stack(rows)


def _factors(
    support: tf.Tensor,
    embedded: tf.Tensor,
    support_targets: tf.Tensor,
    targets: tf.Tensor,
    penalty: float,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The vectors u and v of each record, `[records, n]`, and the factor of S."""
    gram = tf.matmul(support, support, transpose_b=True)
    products = tf.matmul(embedded, support, transpose_b=True)
    right_sides = tf.concat([support_targets, tf.transpose(products)], axis=1)
    solved = ridge_solve(gram, right_sides, penalty)
    classes = support_targets.shape[1]
    solution, v = solved[:, :classes], tf.transpose(solved[:, classes:])
    residuals = products @ solution - targets
    u = tf.matmul(residuals, solution, transpose_b=True) / classes
    tilt = 2.0 * penalty / support.shape[0] * _dot(u, v)
    return u, v, tilt


def _clip_factors(squares: tf.Tensor, l2_norm: float) -> tf.Tensor:
    """Factors that bring gradients of these squared norms to at most `l2_norm`."""
    norms = tf.sqrt(tf.maximum(squares, 0.0))
    bound = tf.cast(l2_norm, norms.dtype)
    return tf.math.divide_no_nan(tf.minimum(norms, bound), norms)


def _dot(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    """Inner products of rows, `[n]`."""
    return tf.reduce_sum(left * right, axis=1)
