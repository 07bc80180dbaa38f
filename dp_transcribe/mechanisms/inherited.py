"""A differentially private teacher's answers, handed on as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import dp_accounting
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe.losses.distillation import kl_divergence
from dp_transcribe.mechanisms.base import AnswerMechanism, Released
from dp_transcribe.privacy.events import Event
from dp_transcribe.privacy.inheritance import check_inheritable
from dp_transcribe.privacy.statement import PrivacyStatement
from dp_transcribe.privacy.units import Unit

# Below this a probability is as good as zero; its logarithm must stay finite.
_LEAST = 1e-12


@dataclasses.dataclass(frozen=True)
class Inherited(AnswerMechanism):
    """Releases soft answers without noise: the teacher's own guarantee is inherited.

    Args:
        statement: of the teacher, unit `RECORD`.
        temperature: both sides of the loss are softened by it; below 1 sharpens a
            teacher that is less sure than it is right.

    **Privacy**: unit `RECORD`. The teacher is itself differentially private, so
    whatever is computed from its answers is post-processing: nothing is spent, any
    number of answers may be used any number of times, and the generator may be guided
    by the teacher. Epsilon, delta and relation are those of `statement`.

    Raises:
        ValueError: the statement is not of the form that `check_inheritable` wants.

    References:
        Dwork and Roth 2014, proposition 2.1 (post-processing); Hinton et al. 2015,
        arXiv:1503.02531 (temperature).
    """

    unit: ClassVar[Unit] = Unit.RECORD

    statement: PrivacyStatement
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Checks the parameters."""
        check_inheritable(self.statement)
        _validate.positive_finite("temperature", self.temperature)

    @property
    def is_calibrated(self) -> bool:
        """True: there is no noise to fix."""
        return True

    def event(self) -> Event:
        """Nothing: the teacher was paid for when it was trained."""
        return dp_accounting.NoOpDpEvent()

    def releases_per_batch(self, batch_size: int) -> int:
        """None."""
        return 0

    def calibrated(
        self,
        target_epsilon: float,
        delta: float,
        schedule: Callable[[Event], Event],
        accountant: str = "rdp",
    ) -> Inherited:
        """The mechanism itself."""
        return self

    def keeps(self, target_epsilon: float, delta: float) -> bool:
        """Whether the teacher's guarantee is within a target."""
        spent = self.statement
        return spent.epsilon <= target_epsilon and spent.delta <= delta

    def check(self, num_classes: int) -> None:
        """Fits any number of classes."""

    def check_teacher(self, teacher: Any) -> None:
        """Refuses a teacher that does not carry the statement it is to pass on."""
        own = getattr(teacher, "statement", None)
        if own is not None and own.to_json() == self.statement.to_json():
            return
        expected = "a teacher with the privacy statement that `Inherited` was given"
        mend = "Train it with `fit_private_teacher`, or give `load_teacher` its file."
        raise _validate.invalid("teacher", own, expected, mend)

    def release(
        self, answers: tf.Tensor, prior: tf.Tensor, seed: tf.Tensor
    ) -> Released:
        """The answers; a row that is not finite becomes uniform."""
        finite = tf.reduce_all(tf.math.is_finite(answers), -1, keepdims=True)
        everything = tf.ones_like(answers)
        uniform = everything / float(answers.shape[-1])
        return Released(tf.where(finite, answers, uniform), everything)

    def log_likelihood(self, released: Released) -> tf.Tensor:
        """The teacher's log probabilities, softened."""
        return tf.nn.log_softmax(_logarithm(released.answers) / self.temperature)

    def loss(self, released: Released, logits: tf.Tensor) -> tf.Tensor:
        """Divergence of the student from the teacher, both softened.

        Args:
            released: the teacher's answers.
            logits: `[batch, classes]` of the student.

        Returns:
            `[batch]`, times the squared temperature, so that gradients keep their
            size.
        """
        targets = tf.exp(self.log_likelihood(released))
        divergence = kl_divergence(targets, logits / self.temperature)
        return self.temperature**2 * divergence

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments as plain values."""
        return {
            "statement": self.statement.to_dict(),
            "temperature": self.temperature,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Inherited:
        """Makes the mechanism that `get_config` described."""
        statement = PrivacyStatement.from_dict(config["statement"])
        return cls(statement, config["temperature"])


def _logarithm(probabilities: tf.Tensor) -> tf.Tensor:
    return tf.math.log(tf.clip_by_value(probabilities, _LEAST, 1.0))
