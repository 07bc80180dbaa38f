"""What every mechanism states of itself: its cost and how its noise is chosen."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeAlias, TypeVar

import dp_accounting
import keras
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe.losses.distillation import cross_entropy, kl_divergence
from dp_transcribe.privacy.calibration import noise_multiplier_for
from dp_transcribe.privacy.events import Event
from dp_transcribe.privacy.units import Relation, Unit

MechanismT = TypeVar("MechanismT", bound="Mechanism")
GradientT = TypeVar("GradientT", bound="GradientMechanism")
Noise: TypeAlias = Callable[[Sequence[Any]], tf.Tensor]

# Cut-off of the loss that is shown; ln(10) is a student at chance on ten classes.
MAX_LOSS = 4.0
LOSSES = {"kl_divergence": kl_divergence, "cross_entropy": cross_entropy}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanism(abc.ABC):
    """A release of what the teacher answers, with a stated cost.

    A mechanism is a frozen value: its noise is scaled from its own sensitivity and
    by nothing else, and `event` is computed from the same numbers.
    """

    unit: ClassVar[Unit] = Unit.RESPONSE
    relation: ClassVar[Relation] = Relation.REPLACE_SPECIAL

    @property
    def name(self) -> str:
        """The class's name, for ledger and statement."""
        return type(self).__name__

    @property
    @abc.abstractmethod
    def is_calibrated(self) -> bool:
        """Whether the noise is fixed; `fit` fixes it from a target epsilon."""

    @abc.abstractmethod
    def event(self) -> Event:
        """Cost of one release to one answer that enters it."""

    def releases_per_batch(self, batch_size: int) -> int:
        """Releases to one unit from one batch of queries.

        Under unit `RESPONSE` an answer is in one release. Under unit `RECORD` nothing
        composes in parallel, since one record can change every answer: a mechanism
        that releases each answer by itself makes `batch_size` releases.

        Args:
            batch_size: queries in the batch, over all replicas.

        Returns:
            How often `event` is recorded for the batch.
        """
        return 1

    def ask(self, teacher: Any, images: tf.Tensor) -> tf.Tensor:
        """What the mechanism needs of the teacher, before any noise.

        Args:
            teacher: a `Teacher`.
            images: `[batch, height, width, channels]`.

        Returns:
            Protected answers, by default probabilities `[batch, classes]`.
        """
        return teacher.probabilities(images)

    def check_teacher(self, teacher: Any) -> None:
        """Refuses a teacher that the cost is not stated for; takes any by default."""
        del teacher

    @abc.abstractmethod
    def calibrated(
        self: MechanismT,
        target_epsilon: float,
        delta: float,
        schedule: Callable[[Event], Event],
        accountant: str = "rdp",
    ) -> MechanismT:
        """A copy with the least noise that keeps a target.

        Args:
            target_epsilon: the epsilon to keep.
            delta: strictly between 0 and 1.
            schedule: turns the cost of one release into what an answer bears over
                the whole run; it comes from the sampler of the queries.
            accountant: `"rdp"` or `"pld"`, which is tighter: less noise.

        Returns:
            The copy; its epsilon never exceeds the target.
        """

    @abc.abstractmethod
    def check(self, num_classes: int) -> None:
        """Refuses parameters that do not fit the number of classes."""

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Mechanism:
        """Makes the mechanism that `get_config` described."""
        return cls(**config)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Queries with the teacher's answers, before any noise.

    Attributes:
        queries: what the student takes, `[batch, height, width, channels]` in the
            teacher's input range, or features of that by its frozen part.
        answers: `[batch, classes]` probabilities of the teacher. Protected.
        mask: `[batch]` float32, 0 for padding.
        log_frequencies: of the classes among the queries, `[classes]`; public. What a
            student of equally frequent classes says of the queries is its logits
            plus these.
    """

    queries: tf.Tensor
    answers: tf.Tensor
    mask: tf.Tensor
    log_frequencies: tf.Tensor | float = 0.0

    def adjusted(self, logits: tf.Tensor) -> tf.Tensor:
        """The student's logits for these queries, float32 `[batch, classes]`."""
        return tf.cast(logits, tf.float32) + self.log_frequencies


@dataclasses.dataclass(frozen=True)
class Release:
    """What a gradient mechanism hands on: sums over a batch.

    Attributes:
        gradients: float32, one per trainable variable of the student.
        statistics: `[2]` float32, the sums over the batch of `monitored`.
    """

    gradients: list[tf.Tensor]
    statistics: tf.Tensor

    def tensors(self) -> list[tf.Tensor]:
        """All parts, in one list."""
        return [*self.gradients, self.statistics]

    @classmethod
    def of(cls, tensors: Sequence[tf.Tensor]) -> Release:
        """The opposite of `tensors`."""
        return cls(list(tensors[:-1]), tensors[-1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientMechanism(Mechanism):
    """Releases noisy gradients of the student; each batch makes one update.

    Every answer contributes one vector of L2 norm at most `l2_norm`: its gradient
    and, with `monitor_share` of the squared norm, whether the student agreed and its
    bounded loss. So the progress that is shown is as private as the student.

    Args:
        noise_multiplier: standard deviation of the noise over the sensitivity. None
            lets `fit` compute it from `target_epsilon`. 0 is not private, and the
            statement says so.
        l2_norm: the clip norm C.
        monitor_share: share of the squared norm spent on agreement and loss.
        distillation_loss: "kl_divergence" or "cross_entropy"; their gradients agree.
    """

    noise_multiplier: float | None = None
    l2_norm: float = 1.0
    monitor_share: float = 0.02
    distillation_loss: str = "kl_divergence"

    # Whether an answer may enter several releases (a query pool).
    reusable: ClassVar[bool]

    def __post_init__(self) -> None:
        """Checks the parameters."""
        _validate.positive_finite("l2_norm", self.l2_norm)
        _validate.fraction_open("monitor_share", self.monitor_share)
        _validate.one_of("distillation_loss", self.distillation_loss, LOSSES)
        if self.noise_multiplier is not None:
            _validate.non_negative("noise_multiplier", self.noise_multiplier)

    @property
    def sensitivity(self) -> float:
        """L2 sensitivity of `summed` when one answer is zeroed out."""
        return self.l2_norm

    @property
    def stddev(self) -> float:
        """Standard deviation of the noise on every coordinate, σC."""
        return gaussian_stddev(self.noise_multiplier, self.sensitivity)

    @property
    def is_calibrated(self) -> bool:
        """Whether `noise_multiplier` is fixed."""
        return self.noise_multiplier is not None

    def event(self) -> Event:
        """Gaussian of `noise_multiplier`, which is relative to the sensitivity."""
        return gaussian_event(self.noise_multiplier)

    def calibrated(
        self: GradientT,
        target_epsilon: float,
        delta: float,
        schedule: Callable[[Event], Event],
        accountant: str = "rdp",
    ) -> GradientT:
        """A copy with the least noise multiplier that keeps the target."""
        return calibrated_gaussian(self, target_epsilon, delta, schedule, accountant)

    def check(self, num_classes: int) -> None:
        """Fits any number of classes."""

    @abc.abstractmethod
    def summed(self, student: keras.Model, batch: Batch, noise: Noise) -> Release:
        """One replica's sum of bounded contributions.

        Args:
            student: ends in logits.
            batch: queries and the teacher's answers.
            noise: `noise(shape)` is standard Gaussian noise of this replica alone,
                for a mechanism that noises every answer by itself.

        Returns:
            The sum over the replica's rows.
        """

    @property
    @abc.abstractmethod
    def shared_stddevs(self) -> tuple[float, float]:
        """Standard deviations of the one draw added after the all-reduce.

        For the gradients and for the statistics.
        """

    def divisor(self, batch_size: int) -> int:
        """What a released sum is divided by to be a mean.

        Args:
            batch_size: the configured global batch size.
        """
        return batch_size

    def losses(self, answers: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        """The per-answer losses `[batch]`, not reduced."""
        return LOSSES[self.distillation_loss](answers, logits)

    @property
    def gradient_norm(self) -> float:
        """The part of `l2_norm` that an answer's gradient may use."""
        return self.l2_norm * math.sqrt(1.0 - self.monitor_share)

    @property
    def statistics_norm(self) -> float:
        """The part of `l2_norm` that an answer's statistics may use."""
        return self.l2_norm * math.sqrt(self.monitor_share)

    def monitored(
        self, batch: Batch, logits: tf.Tensor, losses: tf.Tensor
    ) -> tf.Tensor:
        """Agreement and bounded loss, each row of norm at most `statistics_norm`.

        Args:
            batch: queries and answers.
            logits: `[batch, classes]` of the student.
            losses: `[batch]`.

        Returns:
            `[2]`, the sum over the batch.
        """
        agree = tf.argmax(logits, -1) == tf.argmax(batch.answers, -1)
        bounded = tf.clip_by_value(losses / MAX_LOSS, 0.0, 1.0)
        rows = tf.stack([tf.cast(agree, tf.float32), bounded], -1)
        finite = tf.reduce_all(tf.math.is_finite(batch.answers), -1)
        finite &= tf.reduce_all(tf.math.is_finite(logits), -1)
        keep = (batch.mask > 0) & finite & tf.math.is_finite(losses)
        rows = tf.where(keep[:, None], rows, 0.0)
        return tf.reduce_sum(rows, 0) * (self.statistics_norm / math.sqrt(2.0))

    def progress(self, release: Release, batch_size: int) -> tuple[Any, Any]:
        """Agreement and loss from the noisy statistics.

        Args:
            release: after the noise.
            batch_size: the configured global batch size.

        Returns:
            Unbiased, noisy `(agreement, loss)` of the batch, scalars; the loss is
            that of rows cut off at `MAX_LOSS`.
        """
        unit = self.statistics_norm / math.sqrt(2.0) * self.divisor(batch_size)
        return release.statistics[0] / unit, release.statistics[1] / unit * MAX_LOSS


@dataclasses.dataclass(frozen=True)
class Released:
    """Private answers to queries; may be stored, shown and used without limit.

    Attributes:
        answers: `[batch, classes]` float32, what was released.
        candidates: `[batch, classes]` float32, 1 for the classes that could be; all 0
            for a query that was asked and not answered.
    """

    answers: tf.Tensor
    candidates: tf.Tensor

    @property
    def answered(self) -> tf.Tensor:
        """Which queries were answered, bool `[batch]`."""
        return tf.reduce_any(self.candidates > 0, -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerMechanism(Mechanism):
    """Releases each answer by itself, once; what is released is memoised."""

    def releases_per_batch(self, batch_size: int) -> int:
        """Releases to one unit from one batch: one per answer under `RECORD`."""
        return batch_size if self.unit is Unit.RECORD else 1

    @abc.abstractmethod
    def release(
        self, answers: tf.Tensor, prior: tf.Tensor, seed: tf.Tensor
    ) -> Released:
        """Releases one private answer per query.

        Args:
            answers: `[batch, classes]` probabilities of the teacher. Protected.
            prior: `[batch, classes]` probabilities that do not come from these
                answers: the student's prediction or another public guess.
            seed: int64 `[2]`, of a stream that is used for nothing else.

        Returns:
            What was released.
        """

    @abc.abstractmethod
    def log_likelihood(self, released: Released) -> tf.Tensor:
        """Log probability of what was released, for every true class.

        Args:
            released: private answers.

        Returns:
            `[batch, classes]`, up to a constant of the row.
        """

    def loss(self, released: Released, logits: tf.Tensor) -> tf.Tensor:
        """Negative log likelihood of the student through the known channel.

        Args:
            released: private answers.
            logits: `[batch, classes]` of the student.

        Returns:
            `[batch]`.
        """
        joint = tf.nn.log_softmax(logits) + self.log_likelihood(released)
        return -tf.reduce_logsumexp(joint, -1)

    def estimates(self, released: Released) -> tf.Tensor:
        """Estimates of the one-hot answers, for means over many queries.

        Args:
            released: private answers with all classes as candidates.

        Returns:
            `[batch, classes]`; by default the class probabilities that the release
            alone implies, which is close where there is little noise.
        """
        return tf.nn.softmax(self.log_likelihood(released))

    def labels(self, released: Released) -> tf.Tensor:
        """The class that each release points to, `[batch]` int64."""
        return tf.argmax(released.answers, -1)


def gaussian_event(noise_multiplier: float | None) -> Event:
    """Cost of a Gaussian release; without noise, of a release without privacy."""
    if noise_multiplier is None:
        raise _unknown_noise()
    if noise_multiplier == 0:
        return dp_accounting.NonPrivateDpEvent()
    return dp_accounting.GaussianDpEvent(noise_multiplier)


def gaussian_stddev(noise_multiplier: float | None, sensitivity: float) -> float:
    """Standard deviation of the noise; an unknown one is an error, never zero."""
    if noise_multiplier is None:
        raise _unknown_noise()
    return noise_multiplier * sensitivity


def _unknown_noise() -> ValueError:
    return ValueError(
        "The noise multiplier is not known yet. Pass `noise_multiplier`, or "
        "`target_epsilon` to `fit`, which computes it."
    )


def calibrated_gaussian(
    mechanism: Any,
    target_epsilon: float,
    delta: float,
    schedule: Callable[[Event], Event],
    accountant: str = "rdp",
) -> Any:
    """A copy of a Gaussian mechanism with the least noise that keeps a target."""
    found = noise_multiplier_for(
        target_epsilon,
        delta,
        lambda m: schedule(dataclasses.replace(mechanism, noise_multiplier=m).event()),
        mechanism.relation,
        accountant,
    )
    return dataclasses.replace(mechanism, noise_multiplier=found)
