"""`DPTranscriber`: teacher, student and generator in one Keras model."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import pathlib
import tempfile
from typing import Any, cast

import keras
import numpy as np
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe.ensembles import TeacherEnsemble
from dp_transcribe.learning import (
    AnswerLearner,
    GradientLearner,
    as_int32,
    make_learner,
)
from dp_transcribe.losses.objective import GeneratorObjective
from dp_transcribe.mechanisms.base import AnswerMechanism, GradientMechanism, Mechanism
from dp_transcribe.mechanisms.clipping.validate import (
    check_student as check_clippable,
)
from dp_transcribe.mechanisms.ensemble_gradient import EnsembleGradient
from dp_transcribe.mechanisms.inherited import Inherited
from dp_transcribe.mechanisms.noise import QUERIES, NoiseSource
from dp_transcribe.mechanisms.noisy_answer import NoisyAnswer
from dp_transcribe.mechanisms.noisy_votes import NoisyVotes
from dp_transcribe.mechanisms.output_gradient import NormalizedOutputGradient
from dp_transcribe.mechanisms.randomized_response import (
    RandomizedResponse,
    SelectiveRandomizedResponse,
)
from dp_transcribe.mechanisms.weight_gradient import ClippedGradient, NormalizedGradient
from dp_transcribe.privacy.accounting import ACCOUNTANTS
from dp_transcribe.privacy.inheritance import inherit
from dp_transcribe.privacy.ledger import Ledger, Spend
from dp_transcribe.privacy.statement import PrivacyStatement, statement_from_ledger
from dp_transcribe.privacy.units import Unit
from dp_transcribe.queries import FreshQueries, Queries, QueryPool
from dp_transcribe.students import check_student
from dp_transcribe.teachers import Teacher
from dp_transcribe.workers import (
    LocalCopy,
    check_equal,
    has_other_workers,
    is_chief,
    losing_no_worker,
)

logger = logging.getLogger(__name__)

DEFAULT_DELTA = 1e-5


class BudgetExceededError(ValueError):
    """The next noisy step would pass the target epsilon; nothing was spent."""


@keras.saving.register_keras_serializable(package="dp_transcribe")
class DPTranscriber(keras.Model):
    """Turns a teacher into a student that may be released, without data.

    One `train_step` updates the generator against the student, then the student
    through a differentially private mechanism. `fit` needs no training data.
    `evaluate` and `predict` are the student's.

    Args:
        teacher: a `Teacher`, or what `Teacher` takes. Asked, never trained.
        student: built Functional or Sequential model, `[batch, *image_shape]` to
            logits `[batch, classes]`, without BatchNormalization.
        generator: a procedural or trainable generator of queries.
        mechanism: what is released of the teacher's answers.
        queries: `FreshQueries` or, for weight gradients, `QueryPool`.
        second_student: a student of other initial weights, which learns from the same
            private answers at no further cost. With `objective.student_disagreement`
            the generator looks for images on which the two differ (DisGUIDE).
        public_prior: a procedural generator that makes part of the queries when
            `generator` is trainable.
        public_share: that part, between 0 and 1.
        objective: what a trainable generator is updated for, against the student.
        student_updates: per `train_step`. With an answer mechanism these are updates
            on the replay, which cost nothing.
        generator_updates: per `train_step`, of a trainable generator.
        generator_batch_size: images per generator update, over all replicas.
        replay_size: answered queries kept, with an answer mechanism.
        replay_batch_size: rows per student update, with an answer mechanism.
        candidates_per_query: public images drawn for each query. Above 1, half of the
            queries are those that the student is least sure of, the others the first
            ones drawn; choosing by the student is post-processing.
        uniform_prior_queries: queries answered before the student's prediction takes
            the place of a uniform prior, with an answer mechanism.
        balance_classes: whether the classes are taken to be equally frequent where the
            student is used, though they are not among the queries. The student then
            learns with its logits shifted by the log frequencies of the classes as it
            sees them itself, and candidates are chosen to balance the classes that it
            predicts; both are post-processing. Logit adjustment: arXiv:2007.07314.
        generator_covered: whether the generator is as private as the student: it was
            never guided by the teacher. Goes into the statement.
        schedule: epochs and steps per epoch that `fit` takes by default.
        seed: None for secret noise. A given seed is for tests: the statement says so.

    **Privacy**: the unit is the mechanism's: `RESPONSE` for the published methods on
    one teacher. The ledger is written before a noisy result is used.
    Checkpoints hold the noise key and the teacher: release only what
    `export_student` writes.

    Raises:
        ValueError: parts do not fit each other; nothing was spent.

    References:
        arXiv:2304.12528 (DPDFD), arXiv:2409.12384, arXiv:2601.19090 (DPSD).
    """

    train_function: Any

    def __init__(
        self,
        teacher: Teacher | Any,
        student: keras.Model,
        generator: Any,
        *,
        mechanism: Mechanism,
        queries: Queries | None = None,
        second_student: keras.Model | None = None,
        public_prior: Any = None,
        public_share: float = 0.8,
        objective: GeneratorObjective | None = None,
        student_updates: int = 1,
        generator_updates: int = 1,
        generator_batch_size: int = 64,
        replay_size: int = 200_000,
        replay_batch_size: int = 512,
        candidates_per_query: int = 1,
        balance_classes: bool = False,
        uniform_prior_queries: int = 0,
        generator_covered: bool = True,
        schedule: tuple[int, int] = (1, 100),
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
        self.student = student
        self.second_student = second_student
        self.generator = generator
        self._mechanism = _validate.instance_of("mechanism", mechanism, Mechanism)
        self._queries = queries if queries is not None else FreshQueries()
        self.public_prior = public_prior
        self.public_share = _validate.probability("public_share", public_share)
        self.objective = objective if objective is not None else GeneratorObjective()
        self._student_updates = _validate.positive_int(
            "student_updates", student_updates
        )
        self.generator_updates = _validate.non_negative_int(
            "generator_updates", generator_updates
        )
        self.generator_batch_size = _validate.positive_int(
            "generator_batch_size", generator_batch_size
        )
        self.replay_size = _validate.positive_int("replay_size", replay_size)
        self.replay_batch_size = _validate.positive_int(
            "replay_batch_size", replay_batch_size
        )
        self.candidates_per_query = _validate.positive_int(
            "candidates_per_query", candidates_per_query
        )
        self.uniform_prior_queries = _validate.non_negative_int(
            "uniform_prior_queries", uniform_prior_queries
        )
        self.balance_classes = bool(balance_classes)
        self.class_frequencies = self.add_weight(
            shape=(self.teacher.num_classes,),
            initializer=keras.initializers.Constant(1.0 / self.teacher.num_classes),
            trainable=False,
            aggregation="mean",
            name="class_frequencies",
        )
        self.generator_covered = generator_covered
        self.seed = _validate.optional_seed("seed", seed)
        self._check_parts()
        self._has_other_workers = has_other_workers(self.distribute_strategy)
        self.noise = NoiseSource(self.seed)
        self.ledger = Ledger()
        self.delta: float | None = None
        self.accountant = "rdp"
        self.schedule = tuple(_validate.positive_int("schedule", n) for n in schedule)
        self._learner: GradientLearner | AnswerLearner | None = None
        self._pool_number = 0
        self._pool_updates = 0
        self._target_epsilon: float | None = None
        self._budget: int | None = None
        self._horizon = self._planned = 0
        self._shown_until = 0
        self._epsilon_shown = 0.0
        self._trackers = {
            name: keras.metrics.Mean(name=name)
            for name in ("student_loss", "agreement", "generator_loss")
        }
        self.built = True

    # What it is made of.

    # Fixed, all three: a traced step has the old noise built in, and the ledger would
    # be told of the new.
    @property
    def mechanism(self) -> Mechanism:
        """What is released of the teacher's answers."""
        return self._mechanism

    @property
    def queries(self) -> Queries:
        """How queries are drawn."""
        return self._queries

    @property
    def student_updates(self) -> int:
        """Updates of the student in one `train_step`."""
        return self._student_updates

    @property
    def trains_generator(self) -> bool:
        """Whether a `train_step` updates the generator."""
        return isinstance(self.generator, keras.Model) and self.generator_updates > 0

    @property
    def trainable_variables(self) -> list[Any]:
        """The student's: what `optimizer` trains. The teacher is never in it."""
        return self.student.trainable_variables

    @property
    def student_optimizer(self) -> keras.optimizers.Optimizer:
        """The student's optimizer."""
        return self.optimizer

    def build(self, input_shape: Any = None) -> None:
        """Nothing is left to build: the student comes built."""
        self.built = True

    def call(self, inputs: Any, training: bool = False) -> Any:
        """The student's logits `[batch, classes]`."""
        return self.student(inputs, training=training)

    def _check_parts(self) -> None:
        check_student(self.student, self.teacher)
        check_clippable(self.student)
        _check_dtype(self.dtype_policy)
        self.mechanism.check(self.teacher.num_classes)
        self.mechanism.check_teacher(self.teacher)
        _check_guidance(self.mechanism, self.generator_covered)
        if self.second_student is not None:
            _check_second_student(self)
        if self.trains_generator:
            _check_objective(self.objective, self.mechanism, self.second_student)
        for name in ("generator", "public_prior"):
            _check_source(name, getattr(self, name), self.teacher)
        _check_queries(self.queries, self.mechanism, self._num_replicas)
        classes = getattr(self.generator, "num_classes", None)
        if classes not in (None, self.teacher.num_classes):
            expected = f"{self.teacher.num_classes} classes, as the teacher has"
            raise _validate.invalid("generator", classes, expected)

    @property
    def _num_replicas(self) -> int:
        return self.distribute_strategy.num_replicas_in_sync

    # How it is trained.

    def compile(
        self,
        student_optimizer: Any = "adam",
        generator_optimizer: Any = "adam",
        loss: Any = None,
        metrics: Any = None,
        **kwargs: Any,
    ) -> None:
        """Configures training.

        Args:
            student_optimizer: a Keras optimizer; `use_ema=True` averages the noisy
                iterates at no cost.
            generator_optimizer: for a trainable generator.
            loss: of `evaluate` and validation; cross entropy of labels by default.
            metrics: of `evaluate` and validation, for example `["accuracy"]`.
            **kwargs: passed to `keras.Model.compile`. XLA is off on CPUs by default,
                where it makes convolutions several times slower.
        """
        if loss is None:
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        if not tf.config.list_physical_devices("GPU"):
            kwargs.setdefault("jit_compile", False)
        super().compile(
            optimizer=student_optimizer, loss=loss, metrics=metrics, **kwargs
        )
        self.generator_optimizer = keras.optimizers.get(generator_optimizer)
        self._compile_arguments = {"loss": loss, "metrics": metrics, **kwargs}
        self._local_student = LocalCopy(self.student, self._compile_arguments)
        self._build_optimizers()

    def _build_optimizers(self) -> None:
        self.optimizer.build(self.student.trainable_variables)
        if self.second_student is not None:
            alike = keras.saving.serialize_keras_object(self.optimizer)
            self.second_optimizer = keras.saving.deserialize_keras_object(alike)
            self.second_optimizer.build(self.second_student.trainable_variables)
        if isinstance(self.generator, keras.Model):
            self.generator_optimizer.build(self.generator.trainable_variables)

    def get_compile_config(self) -> dict[str, Any]:
        """Returns the arguments of `compile`, serialised."""
        arguments = {
            "student_optimizer": self.optimizer,
            "generator_optimizer": self.generator_optimizer,
            **self._compile_arguments,
        }
        return keras.saving.serialize_keras_object(arguments)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles as `get_compile_config` described."""
        self.compile(**keras.saving.deserialize_keras_object(config))

    def train_step(self, data: Any) -> dict[str, Any]:
        """The generator learns from the student, the student from the mechanism.

        Args:
            data: unused; a step makes its own queries.

        Returns:
            The metrics so far in this epoch.
        """
        del data
        logs: dict[str, Any] = {}
        if self.trains_generator:
            for _ in range(self.generator_updates):
                logs["generator_loss"] = self._update_generator()
        logs.update(self._make_learner().step())
        for name, value in logs.items():
            self._trackers[name].update_state(value)
        return self._reducible({n: self._trackers[n].result() for n in logs})

    def _reducible(self, logs: dict[str, Any]) -> dict[str, Any]:
        """Gives scalars the axis along which Keras averages over workers."""
        if not self._has_other_workers:
            return logs
        return {name: tf.reshape(value, [1]) for name, value in logs.items()}

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As in Keras; each of several workers measures the whole set by itself."""
        if not self._has_other_workers:
            return super().evaluate(*args, **kwargs)
        kwargs.pop("_use_cached_eval_dataset", None)
        return self._local_student.run("evaluate", *args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As in Keras; each of several workers predicts by itself."""
        if not self._has_other_workers:
            return super().predict(*args, **kwargs)
        return self._local_student.run("predict", *args, **kwargs)

    def get_metrics_result(self) -> dict[str, Any]:
        """The metrics of `evaluate`; those of training are `train_step`'s."""
        results = super().get_metrics_result()
        return {k: v for k, v in results.items() if k not in self._trackers}

    def _update_generator(self) -> tf.Tensor:
        """One update with the student as fixed discriminator.

        The teacher is read only where it is itself private (`Inherited`).
        """
        number = self.noise.advance()
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        seed = self.noise.stream(number, QUERIES, part=replica)
        count = max(self.generator_batch_size // self._num_replicas, 1)
        inputs = self.generator.draw_inputs(count, as_int32(seed))
        variables = self.generator.trainable_variables
        with tf.GradientTape() as tape:
            images = self.generator(*inputs)
            logits = self.student(images, training=False)
            second = None
            if self.second_student is not None:
                second = self.second_student(images, training=False)
            loss = self.objective(
                logits, second_logits=second, **self._read_teacher(images)
            )
        gradients = tape.gradient(loss, variables)
        scale = 1.0 / self._num_replicas
        self.generator_optimizer.apply([g * scale for g in gradients], variables)
        return loss

    def _read_teacher(self, images: tf.Tensor) -> dict[str, Any]:
        """What the objective reads of a private teacher; nothing of any other."""
        if not isinstance(self.mechanism, Inherited) or not self.objective.adversarial:
            return {}
        return {"released": self.teacher.probabilities(images)}

    def draw_queries(self, count: tf.Tensor | int, seed: tf.Tensor) -> tf.Tensor:
        """Images to ask about: from the generator and the public prior.

        Args:
            count: how many.
            seed: int32 `[2]`.

        Returns:
            `[count, *image_shape]` in the teacher's input range.
        """
        if self.public_prior is None:
            return self.generator.sample(count, seed)
        share = tf.cast(count, tf.float32) * self.public_share
        public = tf.cast(tf.round(share), tf.int32)
        parts = [
            self.public_prior.sample(public, seed),
            self.generator.sample(count - public, tf.random.fold_in(seed, 1)),
        ]
        return tf.concat(parts, 0)

    # What it costs.

    def fit(  # type: ignore[override]
        self,
        *,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        target_epsilon: float | None = None,
        delta: float = DEFAULT_DELTA,
        accountant: str = "rdp",
        validation_data: Any = None,
        callbacks: Any = None,
        verbose: Any = "auto",
        initial_epoch: int = 0,
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """Transcribes: trains student and generator for a number of steps.

        Args:
            epochs: number of epochs, as in Keras; by default that of `schedule`.
            steps_per_epoch: `train_step`s per epoch; by default that of `schedule`.
            target_epsilon: never passed, per unit of the mechanism (an answer of
                the teacher for `RESPONSE`). Fixes the noise of a mechanism that has
                none yet.
            delta: of the target and of the epsilon that is shown.
            accountant: of the target and of the epsilon that is shown: `"rdp"`, or
                `"pld"`, which is tighter, so needs less noise, and takes seconds.
            validation_data: `(images, labels)`. What is chosen by it is chosen by
                data that the guarantee does not cover: say so.
            callbacks: Keras callbacks.
            verbose: as in Keras.
            initial_epoch: as in Keras.
            **kwargs: further arguments of `keras.Model.fit`, for validation.

        Returns:
            Keras' history. `epsilon` is that at the end of the epoch.

        Raises:
            BudgetExceededError: not even one step fits the target. Nothing was spent.
            ValueError: an argument is out of range, or workers differ. Nothing was
                spent.
            WorkerLostError: another worker ended; every step begun is in the ledger.
        """
        default_epochs, default_steps = self.schedule
        epochs = default_epochs if epochs is None else epochs
        steps_per_epoch = default_steps if steps_per_epoch is None else steps_per_epoch
        _validate.positive_int("epochs", epochs)
        _validate.positive_int("steps_per_epoch", steps_per_epoch)
        self.delta = _validate.fraction_open("delta", delta)
        self.accountant = _validate.one_of("accountant", accountant, ACCOUNTANTS)
        if not self.compiled:
            raise ValueError("Call `compile` before `fit`.")
        executions = -(-steps_per_epoch // self.steps_per_execution)
        self._horizon = executions * self._releases_at_once
        self._planned = self._horizon * max(epochs - initial_epoch, 1)
        self._calibrate(target_epsilon)
        self._target_epsilon = target_epsilon
        self._budget = self._releases_within(target_epsilon)
        self._shown_until = 0
        with losing_no_worker(self.distribute_strategy):
            self._prepare()
            return super().fit(
                self._steps(),
                epochs=epochs,
                steps_per_epoch=steps_per_epoch,
                validation_data=validation_data,
                callbacks=callbacks,
                verbose=verbose,
                initial_epoch=initial_epoch,
                **{"shuffle": False, **kwargs},
            )

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
        self._mechanism = self.mechanism.calibrated(
            target_epsilon, self._delta, schedule, self.accountant
        )
        logger.info("Calibrated to epsilon %s: %s", target_epsilon, self.mechanism)

    def _prepare(self) -> None:
        """Builds everything that Keras would build from a batch of data."""
        self._make_learner()
        logits = tf.zeros([1, self.teacher.num_classes])
        labels = tf.zeros([1], tf.int32)
        self.compute_loss(y=labels, y_pred=logits)
        self.compute_metrics(None, labels, logits)
        self.reset_metrics()
        if self._has_other_workers:
            check_equal(self.distribute_strategy, self._shared_state())

    def _shared_state(self) -> dict[str, bytes]:
        """What must be the same on all workers."""
        state = {
            "mechanism or queries": repr((self.mechanism, self.queries)).encode(),
            "ledger": self.ledger.to_json().encode(),
        }
        for name in ("noise", "student", "teacher"):
            weights = getattr(self, name).get_weights()
            state[name] = b"".join(np.asarray(w).tobytes() for w in weights)
        return state

    def _make_learner(self) -> GradientLearner | AnswerLearner:
        if self._learner is None:
            with self.distribute_strategy.scope():
                self._learner = make_learner(self)
        return self._learner

    def _steps(self) -> tf.data.Dataset:
        """An endless run of step numbers, one row per replica."""
        steps = tf.data.Dataset.counter().batch(self._num_replicas)
        return steps.map(lambda rows: tf.ensure_shape(rows, [self._num_replicas]))

    def make_train_function(self, force: bool = False) -> None:
        """Wraps Keras' train function: every call is accounted before it runs."""
        if self.train_function is not None and not force:
            return
        super().make_train_function(force=force)
        run_steps = self.train_function

        def accounted(iterator: Any) -> dict[str, Any]:
            self._account(self.steps_per_execution)
            return {**run_steps(iterator), "epsilon": self._epsilon_shown}

        self.train_function = accounted

    @property
    def _releases_per_step(self) -> int:
        """Releases to one unit in one `train_step`."""
        by_answer = isinstance(self.mechanism, AnswerMechanism)
        batches = 1 if by_answer else self.student_updates
        return batches * self.mechanism.releases_per_batch(self.queries.batch_size)

    @property
    def _releases_at_once(self) -> int:
        """Releases between two looks at the budget."""
        return self.steps_per_execution * self._releases_per_step

    def _releases_within(self, target_epsilon: float | None) -> int:
        """Releases that a unit may bear; refuses if that is not even one step.

        Args:
            target_epsilon: the target, or None for no limit but the pool's own.

        Returns:
            The number, for an answer that entered none before, or the number of
            further ones for a record.
        """
        if isinstance(self.mechanism, Inherited):
            self._check_inherited_target(self.mechanism, target_epsilon)
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
        spent = self.ledger.epsilon(**self._terms)
        spend = self.queries.spend(self.mechanism, self._pool_number + 1)
        allowed = self.ledger.max_count(
            spend, target_epsilon=target_epsilon, limit=limit, **self._terms
        )
        if spent > target_epsilon or allowed < needed:
            cost = self.ledger.epsilon_after(spend, needed, **self._terms)
            unit = self.mechanism.unit.value
            raise BudgetExceededError(
                f"The next step would pass target_epsilon={target_epsilon} per {unit} "
                f"at delta={self._delta}: {spent:.4g} is spent, and {needed} "
                f"release(s) of {self.mechanism} bring it to {cost:.4g}. Nothing was "
                "spent. Use more noise, or leave the noise out to have it computed."
            )
        return allowed

    def _check_inherited_target(
        self, mechanism: Inherited, target_epsilon: float | None
    ) -> None:
        """Refuses a target that the teacher has passed."""
        if target_epsilon is None or mechanism.keeps(target_epsilon, self._delta):
            return
        spent = mechanism.statement
        raise BudgetExceededError(
            f"The teacher has passed target_epsilon={target_epsilon} per RECORD at "
            f"delta={self._delta}: its statement says epsilon={spent.epsilon:.6g} at "
            f"delta={spent.delta:g}. Nothing was spent. Train a teacher for a smaller "
            "epsilon, or raise the target."
        )

    def _account(self, steps: int) -> None:
        """Records what the next steps spend; renews the pool when it is used up."""
        learner = self._make_learner()
        releases = steps * self._releases_per_step
        if self._budget is None or (self._runs_down and self._budget < releases):
            self._budget = self._releases_within(self._target_epsilon)
        if isinstance(self.mechanism, Inherited):
            self._epsilon_shown = self.mechanism.statement.epsilon
            return
        if self._runs_down:
            self._budget -= releases
            limited = self._target_epsilon is not None
            self.stop_training |= limited and self._budget < releases
        elif isinstance(learner, GradientLearner) and learner.pool is not None:
            self._turn_pool(learner, releases)
        self.ledger.record(self._spend(self._pool_number), releases)
        if self._shown_until <= 0:
            self._shown_until = max(self._horizon, releases)
            self._epsilon_shown = self._epsilon_ahead(releases, self._budget)
        self._shown_until -= releases

    @property
    def _runs_down(self) -> bool:
        """Whether every release uses up some of the budget: a record bears all."""
        return self.mechanism.unit is Unit.RECORD

    def _turn_pool(self, learner: GradientLearner, releases: int) -> None:
        """Counts updates of the pool, renews it, stops where the budget ends."""
        budget, updates = cast(int, self._budget), cast(QueryPool, self.queries).updates
        used_up = self._pool_updates + releases > budget
        if learner.pool_is_empty or used_up:
            self._pool_number += 1
            self._pool_updates = 0
            learner.renew_pool()
        self._pool_updates += releases
        if self._pool_updates + releases > budget and budget < updates:
            self.stop_training = True

    def _spend(self, pool: int) -> Spend:
        return self.queries.spend(self.mechanism, pool)

    def _epsilon_ahead(self, releases: int, budget: int) -> float:
        """Epsilon at the end of the epoch that these releases begin."""
        ahead, pool = self._shown_until - releases, self._pool_number
        counts = {pool: min(ahead, budget) if self._runs_down else ahead}
        if isinstance(self.queries, QueryPool):
            here = (budget - self._pool_updates) // releases * releases
            whole = budget // releases * releases
            counts = {pool: min(ahead, here)}
            if budget == self.queries.updates:
                counts[pool + 1] = min(max(ahead - here, 0), whole)
        return max(
            self.ledger.epsilon_after(self._spend(pool), count, **self._terms)
            for pool, count in counts.items()
        )

    @property
    def _terms(self) -> dict[str, Any]:
        """Unit, delta and accountant of the target and of what is shown."""
        unit = self.mechanism.unit
        return {"unit": unit, "delta": self._delta, "accountant": self.accountant}

    @property
    def _delta(self) -> float:
        return self.delta or DEFAULT_DELTA

    def privacy_statement(
        self, *, delta: float | None = None, accountant: str | None = None
    ) -> PrivacyStatement:
        """What the student's guarantee is, and what it is not.

        Args:
            delta: by default that of `fit`.
            accountant: `"rdp"` or `"pld"`, by default that of `fit`.

        Returns:
            The statement, of the mechanism's unit. One that is inherited keeps the
            teacher's own delta and accountant.
        """
        covered, not_covered = ["student"], ["teacher", "checkpoints (they hold keys)"]
        (covered if self.generator_covered else not_covered).append("generator")
        if isinstance(self.mechanism, Inherited):
            _validate.one_of("delta", delta, (None, self.mechanism.statement.delta))
            left_out = not_covered[2:]
            return inherit(
                self.mechanism.statement, covered=covered, not_covered=left_out
            )
        return statement_from_ledger(
            self.ledger,
            unit=self.mechanism.unit,
            relation=self.mechanism.relation,
            delta=delta or self._delta,
            accountant=accountant or self.accountant,
            mechanism=self.mechanism.name,
            covered=covered,
            not_covered=not_covered,
            sampling=self.queries.assumption(self.mechanism.unit),
            noise_seed=self.seed,
            details={
                "mechanism": self.mechanism.get_config(),
                "queries": dataclasses.asdict(self.queries),
            },
        )

    # How it is kept.

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments.

        Raises:
            ValueError: the teacher is not a Keras model, so it has no config.
        """
        serialize = keras.saving.serialize_keras_object
        config = {name: getattr(self, name) for name in _PLAIN_ARGUMENTS}
        for name in _SERIALIZED:
            config[name] = serialize(getattr(self, name))
        for name in ("mechanism", "queries", "objective"):
            value = getattr(self, name)
            config[name] = {"kind": type(value).__name__, "fields": _config_of(value)}
        config["teacher"] = self.teacher.get_config()
        return {**super().get_config(), **config}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DPTranscriber:
        """Makes the transcriber that `get_config` described."""
        config = dict(config)
        for name in _SERIALIZED:
            config[name] = keras.saving.deserialize_keras_object(config[name])
        for name in ("mechanism", "queries", "objective"):
            entry = config[name]
            config[name] = _made_from(_KINDS[entry["kind"]], entry["fields"])
        kind = TeacherEnsemble if "member" in config["teacher"] else Teacher
        config["teacher"] = kind.from_config(config["teacher"])
        return cls(**config)

    def save_own_variables(self, store: Any) -> None:
        """Writes ledger, pool count, replay and the teacher's weights."""
        super().save_own_variables(store)
        store["ledger"] = _as_bytes(self.ledger.to_json())
        state = {
            "pool_number": self._pool_number,
            "delta": self.delta,
            "accountant": self.accountant,
            "mechanism": self.mechanism.get_config(),
            "seed": self.seed,
        }
        store["state"] = _as_bytes(json.dumps(state))
        for index, weight in enumerate(self.teacher.get_weights()):
            store[f"teacher_{index}"] = weight
        if isinstance(self._learner, AnswerLearner):
            for index, value in enumerate(self._learner.get_replay()):
                store[f"replay_{index}"] = value

    def load_own_variables(self, store: Any) -> None:
        """Reads what `save_own_variables` wrote."""
        own = len(self._trainable_variables) + len(self._non_trainable_variables)
        super().load_own_variables({str(i): store[str(i)] for i in range(own)})
        self.ledger = Ledger.from_json(_as_text(store["ledger"]))
        state = json.loads(_as_text(store["state"]))
        self._mechanism = type(self.mechanism).from_config(state["mechanism"])
        self.delta, self.accountant = state["delta"], state["accountant"]
        self.seed = state["seed"]
        self._pool_number = state["pool_number"]
        self._forget_run()
        weights = _numbered(store, "teacher")
        if weights:
            self.teacher.set_weights(weights)
        replay = _numbered(store, "replay")
        if replay:
            cast(AnswerLearner, self._make_learner()).set_replay(replay)

    def _forget_run(self) -> None:
        """Drops pool, budget and traced step: they belong to what was before."""
        self._learner, self._budget = None, None
        self._pool_updates = self._shown_until = 0
        if self.train_function is not None:
            self.make_train_function(force=True)

    def save_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Saves everything to a `.keras` file that is never seen half written.

        With several workers all of them call it after the same step; the first one
        alone writes.

        Args:
            path: ends in `.keras`. Load it with `keras.saving.load_model`.

        **Privacy**: holds the noise key and the teacher; keep it as secret as them.
        """
        path = pathlib.Path(path)
        if is_chief(self.distribute_strategy):
            partial = path.with_name(f".partial-{path.name}")
            self.save(partial)
            os.replace(partial, path)
        else:
            with tempfile.TemporaryDirectory() as folder:
                self.save(pathlib.Path(folder) / path.name)


_SERIALIZED = ("student", "second_student", "generator", "public_prior")
_PLAIN_ARGUMENTS = (
    "public_share",
    "student_updates",
    "generator_updates",
    "generator_batch_size",
    "replay_size",
    "replay_batch_size",
    "candidates_per_query",
    "balance_classes",
    "uniform_prior_queries",
    "generator_covered",
    "schedule",
    "seed",
)
_KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        ClippedGradient,
        EnsembleGradient,
        Inherited,
        NormalizedGradient,
        NormalizedOutputGradient,
        NoisyAnswer,
        NoisyVotes,
        RandomizedResponse,
        SelectiveRandomizedResponse,
        FreshQueries,
        QueryPool,
        GeneratorObjective,
    )
}


def _config_of(value: Any) -> dict[str, Any]:
    """The fields of a mechanism, a sampler or an objective."""
    if isinstance(value, Mechanism):
        return value.get_config()
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}


def _made_from(kind: Any, fields: dict[str, Any]) -> Any:
    """The opposite of `_config_of`."""
    return kind.from_config(fields) if issubclass(kind, Mechanism) else kind(**fields)


def _as_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def _as_text(values: Any) -> str:
    return np.asarray(values, np.uint8).tobytes().decode()


def _numbered(store: Any, prefix: str) -> list[np.ndarray]:
    """The arrays stored as `prefix_0`, `prefix_1` and so on."""
    found: list[np.ndarray] = []
    while f"{prefix}_{len(found)}" in store.keys():
        found.append(np.asarray(store[f"{prefix}_{len(found)}"]))
    return found


def _check_source(name: str, source: Any, teacher: Teacher) -> None:
    """Refuses a generator whose images the teacher does not take."""
    if source is None and name == "public_prior":
        return
    for own, of_teacher in (
        ("image_shape", "input_shape"),
        ("output_range", "input_range"),
    ):
        wanted = tuple(getattr(teacher, of_teacher))
        if tuple(getattr(source, own, ())) != wanted:
            expected = f"a generator with {own}={wanted}, the teacher's {of_teacher}"
            raise _validate.invalid(name, source, expected)


def _check_dtype(policy: Any) -> None:
    """Refuses float16, whose loss scaling would be undone by clipping."""
    if policy.compute_dtype == "float16":
        mend = "Use `keras.config.set_dtype_policy` with 'float32' or 'mixed_bfloat16'."
        raise _validate.invalid("dtype", policy.name, "no float16 policy", mend)


def _check_guidance(mechanism: Mechanism, generator_covered: bool) -> None:
    """Refuses queries that carry records past a mechanism of unit `RECORD`."""
    releases = mechanism.unit is Unit.RECORD and not isinstance(mechanism, Inherited)
    if releases and not generator_covered:
        mend = "Let the student guide the generator."
        expected = f"True with {mechanism.name}: no generator that the teacher guided"
        raise _validate.invalid("generator_covered", generator_covered, expected, mend)


def _check_second_student(model: DPTranscriber) -> None:
    """Refuses a second student that cannot learn beside the first."""
    second = cast(keras.Model, model.second_student)
    if not isinstance(model.mechanism, AnswerMechanism):
        mend = "The noise of a gradient is for one student."
        expected = f"None with {model.mechanism.name}, which releases no answers"
        raise _validate.invalid("second_student", second, expected, mend)
    own = {id(variable) for variable in model.student.variables}
    if any(id(variable) in own for variable in second.variables):
        expected = "a student that shares no weights with the first"
        raise _validate.invalid("second_student", second, expected)
    check_student(second, model.teacher)


def _check_objective(
    objective: GeneratorObjective,
    mechanism: Mechanism,
    second_student: keras.Model | None,
) -> None:
    """Refuses terms that need more than the students' logits.

    A teacher that is itself private may be read, too.
    """
    refused = ["activation", "batch_norm_statistics"]
    if second_student is None:
        refused.append("student_disagreement")
    if not isinstance(mechanism, Inherited):
        refused.append("adversarial")
    for name in refused:
        if getattr(objective, name) != 0:
            expected = f"an objective of the student's logits alone, with {name}=0"
            raise _validate.invalid("objective", objective, expected)


def _check_queries(queries: Queries, mechanism: Mechanism, replicas: int) -> None:
    """Refuses a sampler that the mechanism's cost is not stated for."""
    _validate.instance_of("queries", queries, (FreshQueries, QueryPool))
    if isinstance(queries, QueryPool) and mechanism.unit is Unit.RECORD:
        mend = "Sampling queries hides no record: each can change every answer."
        expected = f"FreshQueries with {mechanism.name}, of unit RECORD"
        raise _validate.invalid("queries", queries, expected, mend)
    reusable = isinstance(mechanism, GradientMechanism) and mechanism.reusable
    if isinstance(queries, QueryPool) and not reusable:
        mend = "It noises every answer by itself; use FreshQueries."
        expected = f"FreshQueries with {mechanism.name}"
        raise _validate.invalid("queries", queries, expected, mend)
    for name in ("batch_size", "size"):
        if getattr(queries, name, replicas) % replicas:
            expected = f"a multiple of the {replicas} replicas"
            raise _validate.invalid(name, getattr(queries, name), expected)
