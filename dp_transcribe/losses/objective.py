"""The weighted sum of generator objectives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from dp_transcribe._validate import non_negative
from dp_transcribe.losses import generator


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratorObjective:
    """Weights of the generator's objectives; 0 leaves one out.

    Attributes:
        one_hot: Weight of `one_hot`.
        information_entropy: Weight of `information_entropy`, the class balance; of
            both students' predictions together if there are two.
        activation: Weight of `activation`.
        adversarial: Weight of `adversarial`.
        student_disagreement: Weight of `student_disagreement`.
        batch_norm_statistics: Weight of `BatchNormStatistics`; teacher-guided only.

    **Privacy**: a positive `batch_norm_statistics` reads the teacher, so the generator
    is no longer covered; the others are as private as what they are computed from.

    References:
        DAFL arXiv:1904.01186, DFAD arXiv:1912.11006, DeepInversion arXiv:1912.08795,
        DisGUIDE AAAI 2023.
    """

    one_hot: float = 1.0
    information_entropy: float = 5.0
    activation: float = 0.0
    adversarial: float = 0.0
    student_disagreement: float = 0.0
    batch_norm_statistics: float = 0.0

    def __post_init__(self) -> None:
        """Refuses weights that are negative, NaN or infinite."""
        for field in dataclasses.fields(self):
            non_negative(field.name, getattr(self, field.name))

    @property
    def reads_teacher(self) -> bool:
        """Whether a term needs the teacher's private statistics."""
        return self.batch_norm_statistics > 0

    def __call__(
        self,
        logits: tf.Tensor,
        *,
        second_logits: tf.Tensor | None = None,
        features: tf.Tensor | None = None,
        released: tf.Tensor | None = None,
        statistics: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """The weighted sum for one batch, to be minimised by the generator.

        Args:
            logits: The discriminator's, float32 `[batch, classes]`.
            second_logits: A second student's, for `student_disagreement`.
            features: The discriminator's, `[batch, ...]`, for `activation`.
            released: Released answers `[batch, classes]`, for `adversarial`.
            statistics: What `BatchNormStatistics` returned for the batch, scalar.

        Returns:
            Scalar.

        Raises:
            ValueError: if a term has a weight and its tensor is missing.
        """
        both = [logits] if second_logits is None else [logits, second_logits]
        terms: dict[str, tuple[Callable[..., tf.Tensor], list[Any]]] = {
            "one_hot": (generator.one_hot, [logits]),
            "information_entropy": (
                generator.information_entropy,
                [tf.concat(both, axis=0)],
            ),
            "activation": (generator.activation, [features]),
            "adversarial": (generator.adversarial, [logits, released]),
            "student_disagreement": (
                generator.student_disagreement,
                [logits, second_logits],
            ),
            "batch_norm_statistics": (tf.identity, [statistics]),
        }
        total = tf.zeros([])
        for name, (function, tensors) in terms.items():
            weight = getattr(self, name)
            if weight == 0:
                continue
            if any(tensor is None for tensor in tensors):
                raise _missing(name)
            total += weight * function(*tensors)
        return total


_NEEDS = {
    "activation": "features",
    "adversarial": "released",
    "student_disagreement": "second_logits",
    "batch_norm_statistics": "statistics",
}


def _missing(term: str) -> ValueError:
    return ValueError(
        f"Invalid value for argument `{_NEEDS[term]}`. Expected a tensor, since "
        f"`{term}` has a weight. Received: {_NEEDS[term]}=None. Pass it or set the "
        "weight to 0."
    )
