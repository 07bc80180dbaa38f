"""One-run audits: canaries, guesses, and what they say about a claimed epsilon."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from dp_transcribe import _validate
from dp_transcribe.evaluation.bounds import epsilon_lower_bound, gaussian_lower_bound
from dp_transcribe.privacy.ledger import Ledger
from dp_transcribe.privacy.statement import PrivacyStatement, statement_from_ledger
from dp_transcribe.privacy.units import Unit

# Parts of the canaries that are guessed, the surest ones; chosen before any audit.
# Few sure guesses show a tail, guesses about all of them a shift.
SHARES = (1.0, 0.3, 0.1, 0.03)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guesses:
    """What an attack guessed, and the bound that follows.

    Attributes:
        attack: name of the attack and the share of canaries that it guessed.
        guesses: number of guesses.
        correct: number of correct ones.
        bound: lower bound on epsilon.
    """

    attack: str
    guesses: int
    correct: int
    bound: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditResult:
    """What a canary audit found. A lower bound: it never shows that a claim holds.

    Attributes:
        unit: what a canary is one of.
        mechanism: name of what was audited.
        claimed_epsilon: what the audited run's own statement says.
        delta: of claim and bound, 0.0 for a pure claim.
        epsilon_lower_bound: assumes nothing of the mechanism.
        gaussian_lower_bound: assumes that the claim is that of a Gaussian mechanism,
            which says more; None for a pure claim.
        confidence: with which both bounds hold together.
        canaries: number of canaries.
        guesses: number of guesses of the best attack.
        correct: number of correct ones.
        attack: the best attack.
        shards_of_a_record: most shards that any record is in, None where there are
            none. Counted, not guessed: with m of them noise is m times too small,
            whatever the bounds say.
    """

    unit: Unit
    mechanism: str
    claimed_epsilon: float
    delta: float
    epsilon_lower_bound: float
    gaussian_lower_bound: float | None
    confidence: float
    canaries: int
    guesses: int
    correct: int
    attack: str
    shards_of_a_record: int | None = None

    @property
    def flagged(self) -> bool:
        """Whether a bound is above the claim or shards overlap: something is broken."""
        bounds = (self.epsilon_lower_bound, self.gaussian_lower_bound or 0.0)
        overlap = (self.shards_of_a_record or 1) > 1
        return overlap or max(bounds) > self.claimed_epsilon

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = dataclasses.asdict(self)
        claimed = self.claimed_epsilon if np.isfinite(self.claimed_epsilon) else "inf"
        values.update(
            unit=self.unit.value, claimed_epsilon=claimed, flagged=self.flagged
        )
        return values


def flip_coins(shape: int | tuple[int, ...], seed: int | None) -> np.ndarray:
    """Which canaries are included, bool of this shape: a fair coin for each.

    Args:
        shape: number of canaries, or their shape.
        seed: None for secret coins.
    """
    random = np.random.default_rng(None if seed is None else [seed, 1])
    return random.random(shape) < 0.5


def audit_scores(
    attacks: Mapping[str, np.ndarray],
    included: np.ndarray,
    ledger: Ledger,
    *,
    unit: Unit,
    delta: float,
    confidence: float = 0.95,
    seed: int | None = None,
) -> AuditResult:
    """Turns scores of canaries into the result of an audit.

    See `audit_statement`.

    Args:
        attacks: by name, a score for each canary, `[canaries]`, higher where the
            attack believes it included. Computed without knowing the coins.
        included: bool `[canaries]`, the fair coins.
        ledger: of the audited run; what it says is the claim.
        unit: what a canary is one of.
        delta: of the claim.
        confidence: of the result, strictly between 0 and 1.
        seed: for the order of equal scores.

    Returns:
        The result, with the bounds of the best attack.

    Raises:
        ValueError: an argument is out of range.
    """
    statement = statement_from_ledger(ledger, unit=unit, delta=delta, tighter=False)
    return audit_statement(
        attacks, included, statement, confidence=confidence, seed=seed
    )


def audit_statement(
    attacks: Mapping[str, np.ndarray],
    included: np.ndarray,
    statement: PrivacyStatement,
    *,
    confidence: float = 0.95,
    seed: int | None = None,
) -> AuditResult:
    """Turns scores of canaries into the result of an audit of a statement.

    The canaries with the highest scores are guessed to be included and as many with
    the lowest to be left out. Every attack guesses for every one of `SHARES`, and from
    each guess follow one bound or two. The error is divided among all of them by equal
    parts, so that with probability `confidence` none is above the true epsilon: a
    correct mechanism is flagged with probability 1 - `confidence` at most.

    Args:
        attacks: by name, a score for each canary, `[canaries]`, higher where the
            attack believes it included. Computed without knowing the coins.
        included: bool `[canaries]`, the fair coins.
        statement: of the audited run; what it says is the claim.
        confidence: of the result, strictly between 0 and 1.
        seed: for the order of equal scores.

    Returns:
        The result, with the bounds of the best attack.

    Raises:
        ValueError: an argument is out of range.
    """
    _validate.fraction_open("confidence", confidence)
    included = np.asarray(included, bool)
    tries = [
        (f"{name}, {share:.0%} guessed", scores, share)
        for name, scores in attacks.items()
        for share in SHARES
    ]
    is_pure = statement.delta == 0.0
    bounds = len(tries) * (1 if is_pure else 2)
    counted = [
        (name, *_count(scores, included, share, seed or 0))
        for name, scores, share in tries
    ]
    terms = {
        "delta": statement.delta,
        "confidence": 1.0 - (1.0 - confidence) / bounds,
        "canaries": len(included),
    }
    best = _best(counted, epsilon_lower_bound, terms)
    gaussian = None if is_pure else _best(counted, gaussian_lower_bound, terms)
    shown = best if gaussian is None or best.bound >= gaussian.bound else gaussian
    return AuditResult(
        unit=statement.unit,
        mechanism=statement.mechanism,
        claimed_epsilon=statement.epsilon,
        delta=statement.delta,
        epsilon_lower_bound=best.bound,
        gaussian_lower_bound=None if gaussian is None else gaussian.bound,
        confidence=confidence,
        canaries=len(included),
        guesses=shown.guesses,
        correct=shown.correct,
        attack=shown.attack,
    )


def _best(
    counted: list[tuple[str, int, int]], bound: Any, terms: Mapping[str, Any]
) -> Guesses:
    """The attack whose guesses give the largest bound."""
    candidates = [
        Guesses(
            attack=name,
            guesses=guesses,
            correct=correct,
            bound=bound(correct, guesses, **terms),
        )
        for name, guesses, correct in counted
    ]
    return max(candidates, key=lambda guessed: guessed.bound)


def _count(
    scores: np.ndarray, included: np.ndarray, share: float, seed: int
) -> tuple[int, int]:
    """Number of guesses and of correct ones when the surest share is guessed."""
    scores = np.nan_to_num(np.asarray(scores, np.float64))
    if scores.shape != included.shape:
        expected = f"one score for each of {len(included)} canaries"
        raise _validate.invalid("scores", scores.shape, expected)
    half = int(share * len(scores)) // 2
    ties = np.random.default_rng(seed).random(len(scores))
    order = np.lexsort((ties, scores))
    lowest, highest = order[:half], order[len(order) - half :]
    correct = np.count_nonzero(~included[lowest]) + np.count_nonzero(included[highest])
    return 2 * half, int(correct)
