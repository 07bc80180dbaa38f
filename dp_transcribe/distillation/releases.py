"""Noisy sums over private records: sampling, noise and ledger in one place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import dp_accounting
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe.mechanisms.noise import SAMPLING, NoiseSource
from dp_transcribe.precision import require_float32
from dp_transcribe.privacy.ledger import Ledger, Spend
from dp_transcribe.privacy.statement import PrivacyStatement, statement_from_ledger
from dp_transcribe.privacy.units import Relation, Unit

RELATION = Relation.REPLACE_SPECIAL


class RecordSums:
    """Gaussian releases of sums to which each private record adds a bounded part.

    Args:
        mechanism: the name to write into the ledger.
        l2_norm: bound of one record's contribution, over all tensors of a release
            together.
        noise_multiplier: standard deviation of the noise in units of `l2_norm`.
        sampling_probability: probability with which a release takes each record; 1
            takes them all.
        seed: None for secret randomness; an int makes runs repeatable, for tests.
            Two sums over the same records must not share one.
        ledger: where releases are recorded; None makes a new one.

    **Privacy**: unit `RECORD` under zero-out, where the number of records is public
    and a record is replaced by an empty one that contributes nothing. A sum then
    moves by at most `l2_norm`, and nothing else scales the noise. That each
    contribution is within the bound is the promise of the caller. Every release is
    written to `ledger` before its noise is drawn, an empty sample included.

    Attributes:
        seed: as given.
    """

    def __init__(
        self,
        *,
        mechanism: str,
        l2_norm: float,
        noise_multiplier: float,
        sampling_probability: float = 1.0,
        seed: int | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        require_float32()
        self.l2_norm = _validate.positive_finite("l2_norm", l2_norm)
        self.noise_multiplier = _validate.non_negative(
            "noise_multiplier", noise_multiplier
        )
        self.sampling_probability = sampling_rate(sampling_probability)
        self.ledger = Ledger() if ledger is None else ledger
        self.spend = Spend(
            unit=Unit.RECORD,
            relation=RELATION,
            event=sum_event(self.noise_multiplier, self.sampling_probability),
            mechanism=mechanism,
        )
        source = NoiseSource(seed)
        self._source: NoiseSource | None = source
        self.seed = source.seed
        self._number: tf.Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle or a copy holds: ledger and facts, never the noise's key."""
        return {**self.__dict__, "_source": None, "_number": None}

    @property
    def source(self) -> NoiseSource:
        """Key and counter of the noise, as secret as the records.

        Raises:
            RuntimeError: this is a copy or was pickled, and can make no release.
        """
        if self._source is None:
            raise RuntimeError(
                "This is a copy, which has no key of the noise. Make releases with the "
                "original."
            )
        return self._source

    def begin(self) -> None:
        """Records the next release; call it before looking at any record."""
        source = self.source
        self.ledger.record(self.spend)
        self._number = source.advance()

    def sample(self, num_records: int) -> tf.Tensor:
        """Draws the records of the release begun, each independently.

        Args:
            num_records: number of private records.

        Returns:
            int64 `[sampled]`, indices in rising order; may be empty.
        """
        if self.sampling_probability == 1.0:
            return tf.range(num_records, dtype=tf.int64)
        seed = self.source.stream(self._begun(), SAMPLING)
        # 24 random bits in float32 would round the probability; float64 has 53.
        draws = tf.random.stateless_uniform([num_records], seed, dtype=tf.float64)
        return tf.where(draws < self.sampling_probability)[:, 0]

    def add_noise(self, total: tf.Tensor) -> tf.Tensor:
        """Ends the release begun.

        Args:
            total: float32, the sum of the records' bounded contributions.

        Returns:
            The sum with noise of standard deviation `noise_multiplier * l2_norm` in
            every entry.
        """
        return self.add_joint_noise([total])[0]

    def add_joint_noise(self, totals: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """As `add_noise`, for a sum that consists of several tensors.

        Args:
            totals: float32; `l2_norm` bounds a record's part of all of them together.
        """
        number = self._begun()
        self._number = None
        stddev = self.noise_multiplier * self.l2_norm
        noises = self.source.normal_like(totals, number=number)
        return [t + stddev * noise for t, noise in zip(totals, noises, strict=True)]

    def epsilon(self, *, delta: float, accountant: str) -> float:
        """Epsilon per record of all releases so far.

        Args:
            delta: strictly between 0 and 1.
            accountant: `"rdp"` or `"pld"`.

        Returns:
            The epsilon.
        """
        return self.ledger.epsilon(unit=Unit.RECORD, delta=delta, accountant=accountant)

    def statement(
        self, *, delta: float, accountant: str, covered: tuple[str, ...], **details: Any
    ) -> PrivacyStatement:
        """The statement of all releases so far.

        Args:
            delta: strictly between 0 and 1.
            accountant: `"rdp"` or `"pld"`.
            covered: what the guarantee speaks of.
            **details: further public facts.

        Returns:
            The statement, unit `RECORD`.
        """
        facts = {
            "l2_norm": self.l2_norm,
            "noise_multiplier": self.noise_multiplier,
            **details,
        }
        return statement_from_ledger(
            self.ledger,
            unit=Unit.RECORD,
            delta=delta,
            relation=RELATION,
            accountant=accountant,
            covered=covered,
            not_covered=("the private records", "accuracies measured on them"),
            noise_seed=self.seed,
            details=facts,
        )

    def _begun(self) -> tf.Tensor:
        if self._number is None:
            raise RuntimeError(
                "No release has begun. Call `begin()` before each sum: it writes the "
                "release to the ledger."
            )
        return self._number


@contextlib.contextmanager
def handing_over(released: object) -> Iterator[None]:
    """Leaves what was paid for to whoever catches an error of what is made of it.

    Args:
        released: becomes the attribute `released` of any exception in the block, of an
            interruption as well.

    **Privacy**: `released` must be private already.
    """
    try:
        yield
    except BaseException as error:
        error.released = released  # type: ignore[attr-defined]
        error.add_note(
            "What was released before is paid for: this exception keeps it, as its "
            "attribute `released`."
        )
        raise


def sampling_rate(value: float) -> float:
    """Checks a sampling probability, above 0 and at most 1."""
    _validate.probability("sampling_probability", value)
    return _validate.positive_finite("sampling_probability", value)


def sum_event(multiplier: float, probability: float) -> dp_accounting.DpEvent:
    """What one release costs.

    Args:
        multiplier: noise in units of the bound; zero is accounted as no privacy.
        probability: with which the release takes each record.

    Returns:
        The event.
    """
    gaussian = dp_accounting.GaussianDpEvent(multiplier)
    if probability == 1.0:
        return gaussian
    return dp_accounting.PoissonSampledDpEvent(probability, gaussian)
