"""The run of a transcriber: its learner, and steps that are accounted before they run.

`DPTranscriber.train_step` says what a step does, `Run` when it may.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import tensorflow as tf

from dp_transcribe.mechanisms.base import AnswerMechanism, GradientMechanism
from dp_transcribe.mechanisms.noise import secret_bytes
from dp_transcribe.precision import require_float32
from dp_transcribe.queries import QueryPool
from dp_transcribe.teachers import Teacher
from dp_transcribe.transcriber.answer_learning import AnswerLearner
from dp_transcribe.transcriber.compatibility import check_learns, check_ledger
from dp_transcribe.transcriber.gradient_learning import GradientLearner
from dp_transcribe.transcriber.optimizers import check_optimizers
from dp_transcribe.transcriber.rehearsal import build_measures
from dp_transcribe.workers import (
    check_equal,
    gather_parts,
    has_other_workers,
    own_replicas,
)

if TYPE_CHECKING:
    from dp_transcribe.transcriber.model import DPTranscriber


class Run:
    """What lasts from step to step, until other weights are loaded or learn.

    Args:
        owner: the transcriber that runs.

    Attributes:
        learner: of the student, with its pool or replay; None before the first step.
        shows: whether it is printed how far a new pool is.
        is_accounted: whether the step under way is in the ledger.
        leaves_out_replay: whether what is saved now is to go without the replay.
        loaded_digest: of the weights that the ledger of a file is of, until they are
            found to be there; None where nothing was loaded.
    """

    def __init__(self, owner: DPTranscriber) -> None:
        self.owner = owner
        self.learner: GradientLearner | AnswerLearner | None = None
        self.shows = self.is_accounted = self.leaves_out_replay = False
        self.loaded_digest: str | None = None
        self._was_loaded = False

    def make_learner(self) -> GradientLearner | AnswerLearner:
        """The learner, made if there is none."""
        if self.learner is None:
            with self.owner.distribute_strategy.scope():
                self.learner = learner_for(self.owner)
        return self.learner

    def check(self) -> None:
        """Refuses to begin where the run would fail, or be paid for in vain.

        Raises:
            RuntimeError: the weights are another transcriber's, without its ledger.
            ValueError: the transcriber is not compiled, or what it is made of changed
                since it was checked. Nothing was spent, either way.
        """
        owner = self.owner
        if not owner.compiled:
            raise ValueError("Call `compile` before `fit`.")
        require_float32()
        check_learns(owner.student)
        check_optimizers(owner, owner.optimizer, owner.generator_optimizer)
        if isinstance(owner.teacher, Teacher) and not owner.run_eagerly:
            owner.teacher.check_in_graph()
        check_ledger(owner)

    def prepare(self) -> None:
        """Builds everything that Keras would build from a batch of data."""
        owner = self.owner
        if self._was_loaded and isinstance(owner.queries, QueryPool):
            # Other queries than those of a run that went on from the same place.
            self.renew_key()
        self._was_loaded = False
        self.make_learner().prepare()
        build_measures(owner)
        owner.reset_metrics()
        if has_other_workers(owner.distribute_strategy):
            check_equal(owner.distribute_strategy, _shared_state(owner))

    def renew_key(self) -> None:
        """A new key of the noise, the first worker's on all of them."""
        strategy = self.owner.distribute_strategy
        parts = [secret_bytes() for _ in own_replicas(strategy)]
        self.owner.noise.renew(gather_parts(strategy, parts)[0])

    def steps(self) -> tf.data.Dataset:
        """An endless run of step numbers, one row per replica."""
        replicas = self.owner.distribute_strategy.num_replicas_in_sync
        steps = tf.data.Dataset.counter().batch(replicas)
        return steps.map(lambda rows: tf.ensure_shape(rows, [replicas]))

    def accounted(self, trace: Callable[..., None]) -> Callable[[Any], dict[str, Any]]:
        """Keras' train function, every call of which is accounted before it runs.

        Args:
            trace: Keras' `make_train_function`. What it makes is not yet traced: it
                will hold what a step does when it is called first.
        """
        owner = self.owner
        traced: dict[tuple[bool, int], Any] = {}

        def train(iterator: Any) -> dict[str, Any]:
            check_optimizers(owner, owner.optimizer, owner.generator_optimizer)
            learner, steps = self.make_learner(), owner.steps_per_execution
            needs_pool = owner.budget.spend(steps)
            owner.releases.assign(owner.ledger.releases(owner.mechanism.unit))
            if needs_pool:
                self._fill_pool(cast(GradientLearner, learner))
            owner.stop_training |= owner.budget.is_spent
            # A traced function makes as many steps as were asked for at the time.
            kind = learner.begin_steps(steps), steps
            if kind not in traced:
                trace(force=True)
                traced[kind] = owner.train_function
                owner.train_function = train
            self.is_accounted = True
            try:
                logs = traced[kind](iterator)
            finally:
                self.is_accounted = False
            return {**logs, "epsilon": owner.budget.epsilon_shown}

        return train

    def _fill_pool(self, learner: GradientLearner) -> None:
        """New queries; a pool left half filled holds answers of the one before."""
        try:
            learner.renew_pool(show=self.shows)
        except BaseException:
            self.owner.budget.close_pool()
            raise

    def follow_trainable(self) -> None:
        """Makes another learner if other weights learn than when it was made."""
        learner = self.learner
        if learner is None:
            return
        learnt = {id(v) for v in learner.learns.trainable_variables}
        if learnt == {id(v) for v in self.owner.student.trainable_variables}:
            return
        self._forget()
        if isinstance(learner, AnswerLearner):
            kept = learner.replay_written(), learner.replay_pieces()
            cast(AnswerLearner, self.make_learner()).set_replay(*kept)

    def after_load(self) -> None:
        """Ends what was under way: state was loaded, and another run goes on."""
        self._was_loaded = True
        self._forget()

    def _forget(self) -> None:
        """Drops pool, budget and traced step: they belong to what was before."""
        self.learner = None
        self.owner.budget.forget_run()
        if self.owner.train_function is not None:
            self.owner.make_train_function(force=True)


def _shared_state(owner: DPTranscriber) -> dict[str, bytes]:
    """What must be the same on all workers."""
    state = {
        "mechanism or queries": repr((owner.mechanism, owner.queries)).encode(),
        "ledger": owner.ledger.to_json().encode(),
        "noise": b"".join(v.tobytes() for v in owner.noise.state().values()),
    }
    for name in ("student", "teacher"):
        weights = getattr(owner, name).get_weights()
        state[name] = b"".join(np.asarray(w).tobytes() for w in weights)
    return state


def learner_for(owner: DPTranscriber) -> GradientLearner | AnswerLearner:
    """The learner that fits the transcriber's mechanism."""
    if isinstance(owner.mechanism, AnswerMechanism):
        return AnswerLearner(owner)
    if isinstance(owner.mechanism, GradientMechanism):
        return GradientLearner(owner)
    raise TypeError(f"No way to learn from {owner.mechanism!r} is known.")
