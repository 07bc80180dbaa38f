"""What a run may spend and what it has spent: the ledger is written before a step."""

from __future__ import annotations

import copy
import functools
import logging
from typing import Any

from dp_transcribe import _validate
from dp_transcribe.mechanisms.base import AnswerMechanism, Mechanism
from dp_transcribe.mechanisms.inherited import Inherited
from dp_transcribe.privacy.accounting import ACCOUNTANTS
from dp_transcribe.privacy.ledger import Ledger
from dp_transcribe.privacy.units import Unit
from dp_transcribe.queries import Queries, QueryPool

logger = logging.getLogger(__name__)

DEFAULT_DELTA = 1e-5


class BudgetExceededError(ValueError):
    """The next noisy step would pass the target epsilon; nothing was spent."""


class Budget:
    """The privacy budget of a transcriber.

    Args:
        mechanism: what is released of the teacher's answers.
        queries: how queries are drawn.
        student_updates: updates of the student in one step.

    Attributes:
        mechanism: the mechanism, with its noise as soon as that is known.
        ledger: everything that was released.
        delta: of the target and of the epsilon shown, None before the first `plan`.
        accountant: of the same.
        pool_number: of the pool in use, 0 before the first.
        epsilon_shown: epsilon at the end of the epoch.
    """

    def __init__(
        self, mechanism: Mechanism, queries: Queries, student_updates: int
    ) -> None:
        _validate.instance_of("mechanism", mechanism, Mechanism)
        self.mechanism = self._offered = mechanism
        self.queries = queries
        self.ledger = Ledger()
        self.delta: float | None = None
        self.accountant = "rdp"
        self.pool_number = 0
        self.epsilon_shown = 0.0
        self.student_updates = _validate.positive_int(
            "student_updates", student_updates
        )
        self._target: float | None = None
        self._steps_at_once = 1
        self._horizon = self._planned = 0
        self.forget_run()

    def forget_run(self) -> None:
        """Drops pool and allowance: they belong to what was before."""
        self._allowed: int | None = None
        self._pool_is_open = False
        self._pool_updates = self._shown_until = 0

    def resume(self, ledger: Ledger, mechanism: Mechanism, *, pool_number: int) -> None:
        """Takes the place of what was spent, which is never forgotten.

        Args:
            ledger: of a checkpoint. The own one stays if it goes on from there: what
                was released since is out, though the weights go back.
            mechanism: of the checkpoint; without noise if it was saved before a run.
            pool_number: of the checkpoint.
        """
        if not self.ledger.continues(ledger):
            self.ledger, self.pool_number = ledger, 0
        self.mechanism = self._offered = mechanism
        self.pool_number = max(self.pool_number, pool_number)

    def close_pool(self) -> None:
        """The pool in use was not filled: the next step begins another."""
        self._pool_is_open = False

    def plan(
        self,
        *,
        target_epsilon: float | None,
        delta: float,
        accountant: str,
        epochs: int,
        steps_per_epoch: int,
        steps_at_once: int,
    ) -> None:
        """Computes noise and allowance for a run; refuses one that cannot begin.

        A refusal leaves the budget as it was, and noise that nothing was spent with
        yet is computed anew.

        Args:
            target_epsilon: never passed, or None for no limit but the pool's own.
            delta: of the target.
            accountant: of the target.
            epochs: that the run takes.
            steps_per_epoch: steps of each.
            steps_at_once: steps between two looks at the budget.

        Raises:
            BudgetExceededError: not even one step fits the target.
            ValueError: an argument is out of range. Nothing was spent, either way.
        """
        trial = copy.copy(self)
        trial.delta = _validate.fraction_open("delta", delta)
        trial.accountant = _validate.one_of("accountant", accountant, ACCOUNTANTS)
        trial._steps_at_once = steps_at_once
        executions = -(-steps_per_epoch // steps_at_once)
        trial._horizon = executions * trial._releases_at_once
        trial._planned = trial._horizon * epochs
        trial.mechanism = self._offered
        trial._calibrate(target_epsilon)
        trial._target = target_epsilon
        trial._allowed = trial._releases_within(target_epsilon)
        trial._shown_until = 0
        vars(self).update(vars(trial))

    def spend(self, steps: int) -> bool:
        """Records what the next steps release; call it before they run.

        Args:
            steps: how many.

        Returns:
            Whether they need a new pool of queries.
        """
        self._offered = self.mechanism
        self._steps_at_once = steps
        releases = self._releases_at_once
        if self._allowed is None or (self._runs_down and self._allowed < releases):
            self._allowed = self._releases_within(self._target)
        if isinstance(self.mechanism, Inherited):
            self.epsilon_shown = self.mechanism.statement.epsilon
            return False
        new_pool = False
        if self._runs_down:
            self._allowed -= releases
        elif isinstance(self.queries, QueryPool):
            new_pool = self._turn_pool(releases, self._allowed)
        self.ledger.record(self._entry(self.pool_number), releases)
        if self._shown_until <= 0:
            self._shown_until = max(self._horizon, releases)
            self.epsilon_shown = self._epsilon_ahead(releases, self._allowed)
        self._shown_until -= releases
        return new_pool

    @property
    def is_spent(self) -> bool:
        """Whether no further steps fit the target."""
        if self._allowed is None or self._target is None:
            return False
        if self._runs_down:
            return self._allowed < self._releases_at_once
        if not isinstance(self.queries, QueryPool):
            return False
        used_up = self._pool_updates + self._releases_at_once > self._allowed
        return used_up and self._allowed < self.queries.updates

    @property
    def terms(self) -> dict[str, Any]:
        """Unit, delta and accountant of the target and of what is shown."""
        return {
            "unit": self.mechanism.unit,
            "delta": self.delta or DEFAULT_DELTA,
            "accountant": self.accountant,
        }

    @property
    def _releases_per_step(self) -> int:
        """Releases to one unit in one `train_step`."""
        by_answer = isinstance(self.mechanism, AnswerMechanism)
        batches = 1 if by_answer else self.student_updates
        return batches * self.mechanism.releases_per_batch(self.queries.batch_size)

    @property
    def _releases_at_once(self) -> int:
        """Releases between two looks at the budget."""
        return self._steps_at_once * self._releases_per_step

    @property
    def _runs_down(self) -> bool:
        """Whether every release uses up some of the budget: a record bears all."""
        if isinstance(self.mechanism, Inherited):
            return False
        return self.mechanism.unit is Unit.RECORD

    def _entry(self, pool: int) -> Any:
        return self.queries.spend(self.mechanism, pool)

    def _calibrate(self, target_epsilon: float | None) -> None:
        if target_epsilon is not None:
            _validate.positive_finite("target_epsilon", target_epsilon)
        if self.mechanism.is_calibrated:
            return
        if target_epsilon is None:
            raise ValueError(
                f"{self.mechanism.name} has no noise yet. Pass `target_epsilon` to "
                "`fit`, or give the mechanism its noise."
            )
        schedule = functools.partial(
            self.queries.schedule, unit=self.mechanism.unit, releases=self._planned
        )
        self.mechanism = self.mechanism.calibrated(
            target_epsilon, self.terms["delta"], schedule, self.accountant
        )
        logger.info("Calibrated to epsilon %s: %s", target_epsilon, self.mechanism)

    def _releases_within(self, target_epsilon: float | None) -> int:
        """Releases that a unit may bear; refuses if that is not even one step.

        Args:
            target_epsilon: the target, or None for no limit but the pool's own.

        Returns:
            The number, for an answer that entered none before, or the number of
            further ones for a record.
        """
        if isinstance(self.mechanism, Inherited):
            self._check_inherited(self.mechanism, target_epsilon)
            return 0
        limit = needed = 1
        if isinstance(self.queries, QueryPool):
            limit, needed = self.queries.updates, self._releases_at_once
        elif self._runs_down:
            needed = self._releases_at_once
            limit = max(self._planned, needed)
        if needed > limit:
            expected = f"at least student_updates * steps_per_execution = {needed}"
            raise _validate.invalid("updates", limit, expected)
        if target_epsilon is None:
            return limit
        spent = self.ledger.epsilon(**self.terms)
        entry = self._entry(self.pool_number + 1)
        allowed = self.ledger.max_count(
            entry, target_epsilon=target_epsilon, limit=limit, **self.terms
        )
        if spent > target_epsilon or allowed < needed:
            cost = self.ledger.epsilon_after(entry, needed, **self.terms)
            unit = self.mechanism.unit.value
            raise BudgetExceededError(
                f"The next step would pass target_epsilon={target_epsilon} per {unit} "
                f"at delta={self.terms['delta']}: {spent:.4g} is spent, and {needed} "
                f"release(s) of {self.mechanism} bring it to {cost:.4g}. Nothing was "
                "spent. Use more noise, or leave the noise out to have it computed."
            )
        return allowed

    def _check_inherited(
        self, mechanism: Inherited, target_epsilon: float | None
    ) -> None:
        """Refuses a target that the teacher has passed."""
        delta = self.terms["delta"]
        if target_epsilon is None or mechanism.keeps(target_epsilon, delta):
            return
        spent = mechanism.statement
        raise BudgetExceededError(
            f"The teacher has passed target_epsilon={target_epsilon} per RECORD at "
            f"delta={delta}: its statement says epsilon={spent.epsilon:.6g} at "
            f"delta={spent.delta:g}. Nothing was spent. Train a teacher for a smaller "
            "epsilon, or raise the target."
        )

    def _turn_pool(self, releases: int, allowed: int) -> bool:
        """Counts updates of the pool; returns whether they begin a new one."""
        begins = not self._pool_is_open or self._pool_updates + releases > allowed
        if begins:
            self._pool_is_open = True
            self.pool_number += 1
            self._pool_updates = 0
        self._pool_updates += releases
        return begins

    def _epsilon_ahead(self, releases: int, allowed: int) -> float:
        """Epsilon at the end of the epoch that these releases begin."""
        ahead, pool = self._shown_until - releases, self.pool_number
        counts = {pool: min(ahead, allowed) if self._runs_down else ahead}
        if isinstance(self.queries, QueryPool):
            here = (allowed - self._pool_updates) // releases * releases
            whole = allowed // releases * releases
            counts = {pool: min(ahead, here)}
            if allowed == self.queries.updates:
                counts[pool + 1] = min(max(ahead - here, 0), whole)
        return max(
            self.ledger.epsilon_after(self._entry(pool), count, **self.terms)
            for pool, count in counts.items()
        )
