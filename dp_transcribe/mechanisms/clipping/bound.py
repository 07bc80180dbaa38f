"""What bounds one example's contribution: the clip norm and how it is applied."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import tensorflow as tf

# Under normalisation a gradient shorter than this counts as zero: squaring it in
# float32 loses bits, and a norm that is too small would break the bound.
SMALLEST_NORM = 1e-12


class ClippedSum(NamedTuple):
    """The sum of bounded per-example gradients, before any noise.

    Attributes:
        gradients: one float32 tensor per trainable variable, in the order of
            `model.trainable_variables`; the sum over the batch, never the mean.
        norms: `[batch]` float32, gradient norms before bounding; not finite where
            an example was dropped.
        losses: `[batch]` float32, per-example losses.
        outputs: the model's outputs, `[batch, classes]` logits for a student.
    """

    gradients: list[tf.Tensor]
    norms: tf.Tensor
    losses: tf.Tensor
    outputs: tf.Tensor


@dataclasses.dataclass(frozen=True)
class Bound:
    """The clip norm of one example's gradient, and whether to normalise to it.

    Attributes:
        l2_norm: the clip norm C; `float("inf")` leaves every gradient as it is.
        normalize: scale every gradient *to* C instead of *down to* C.
    """

    l2_norm: float
    normalize: bool = False

    def __post_init__(self) -> None:
        """Refuses a clip norm that bounds nothing, or that cannot be scaled to."""
        if not self.l2_norm > 0:
            raise ValueError(
                "Invalid value for argument `l2_norm`. Expected a number above "
                f"zero. Received: l2_norm={self.l2_norm}"
            )
        if self.normalize and self.l2_norm == float("inf"):
            raise ValueError(
                "Invalid value for argument `l2_norm`. Expected a finite number with "
                "`normalize=True`; nothing can be scaled to infinity. Received: "
                f"l2_norm={self.l2_norm}"
            )

    def factors(
        self, squared_norms: tf.Tensor, mask: tf.Tensor | None = None
    ) -> tf.Tensor:
        """Returns the factor that bounds each example's gradient.

        Args:
            squared_norms: `[batch]` float32, squared gradient norms.
            mask: `[batch]`, 1 for an example that counts and 0 for padding.

        Returns:
            `[batch]` float32, finite and at least zero; zero for a masked example,
            and for one whose norm is not finite.

        **Privacy**: factor times norm is at most `l2_norm` for every example, up to
        float32 rounding, so under zero-out the sum moves by at most `l2_norm`.
        """
        norms = tf.sqrt(squared_norms)
        if self.normalize:
            scale = self.l2_norm / tf.maximum(norms, SMALLEST_NORM)
            factors = tf.where(norms < SMALLEST_NORM, 0.0, scale)
        else:
            factors = self.l2_norm / tf.maximum(norms, self.l2_norm)
            if self.l2_norm == float("inf"):
                factors = tf.ones_like(norms)
        factors = tf.where(tf.math.is_finite(squared_norms), factors, 0.0)
        return factors if mask is None else factors * tf.cast(mask, tf.float32)


def row_mask(keep: tf.Tensor, tensor: tf.Tensor) -> tf.Tensor:
    """Reshapes `keep` `[batch]` so that it selects rows of `tensor`."""
    return tf.reshape(keep, [-1] + [1] * (tensor.shape.rank - 1))


def zero_rows(keep: tf.Tensor, tensor: tf.Tensor) -> tf.Tensor:
    """Zeroes the rows of `tensor` `[batch, ...]` that `keep` `[batch]` leaves out."""
    return tf.where(row_mask(keep, tensor), tensor, tf.zeros([], tensor.dtype))
