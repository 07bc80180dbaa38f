"""`DPTranscriber`: teacher, student and generator in one Keras model."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe.losses.objective import GeneratorObjective
from dp_transcribe.mechanisms.base import Mechanism
from dp_transcribe.mechanisms.noise import NoiseSource
from dp_transcribe.privacy.ledger import Ledger
from dp_transcribe.privacy.statement import PrivacyStatement
from dp_transcribe.queries import FreshQueries, Queries
from dp_transcribe.teachers import Teacher, as_teacher
from dp_transcribe.transcriber import compatibility
from dp_transcribe.transcriber.answer_learning import AnswerLearner
from dp_transcribe.transcriber.budget import DEFAULT_DELTA, Budget
from dp_transcribe.transcriber.generator_learning import GeneratorLearner
from dp_transcribe.transcriber.optimizers import build_optimizers, check_optimizers
from dp_transcribe.transcriber.rehearsal import (
    check_checkpoint_path,
    check_no_data,
    rehearse,
)
from dp_transcribe.transcriber.run import Run
from dp_transcribe.transcriber.saving import (
    arguments_from,
    check_state,
    config_of_arguments,
    read_state,
    write_checkpoint,
    write_state,
)
from dp_transcribe.transcriber.statements import inherited_beside, own_statement
from dp_transcribe.workers import LocalCopy, has_other_workers, losing_no_worker


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
        rests: with an answer mechanism, pairs of numbers of answered queries: from the
            first up to the second one the student rests while answers come in. One
            that learns from few noisy answers learns their noise by heart.
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
        rests: Sequence[tuple[int, int]] = (),
        generator_covered: bool = True,
        schedule: tuple[int, int] = (1, 100),
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.teacher = as_teacher(teacher)
        self.student = student
        self.second_student = second_student
        self.generator = generator
        self.budget = Budget(
            mechanism,
            queries if queries is not None else FreshQueries(),
            student_updates,
        )
        self.public_prior = public_prior
        self.public_share = _validate.probability("public_share", public_share)
        self.objective = objective if objective is not None else GeneratorObjective()
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
        self.rests = compatibility.check_rests(rests, self.mechanism)
        self.balance_classes = bool(balance_classes)
        self.class_frequencies = self.add_weight(
            shape=(self.teacher.num_classes,),
            initializer=keras.initializers.Constant(1.0 / self.teacher.num_classes),
            trainable=False,
            aggregation="mean",
            name="class_frequencies",
        )
        # A weight, so that it goes where the student's weights go: see `check_ledger`.
        self.releases = self.add_weight(
            shape=(),
            dtype="int64",
            initializer="zeros",
            trainable=False,
            aggregation="only_first_replica",
            name="releases",
        )
        self.generator_covered = generator_covered
        _validate.optional_seed("seed", seed)
        compatibility.check_parts(self)
        self._has_other_workers = has_other_workers(self.distribute_strategy)
        self.noise = NoiseSource(seed)
        self.schedule = tuple(_validate.positive_int("schedule", n) for n in schedule)
        self._generator_learner = GeneratorLearner(self)
        self._run = Run(self)
        self._trackers = {
            name: keras.metrics.Mean(name=name)
            for name in ("student_loss", "agreement", "generator_loss")
        }
        self.built = True

    # What it is made of.

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses other parts than those that were checked and that steps hold."""
        if name in _FIXED and name in self.__dict__:
            raise AttributeError(
                f"`{name}` of a transcriber is fixed: checks, traced steps and the "
                "ledger are of the one it was made with. Make a new transcriber."
            )
        super().__setattr__(name, value)

    @property
    def seed(self) -> int | None:
        """The seed of the noise; None if its key is secret."""
        return self.noise.seed

    # Fixed, all three: a traced step has the old noise built in, and the ledger would
    # be told of the new.
    @property
    def mechanism(self) -> Mechanism:
        """What is released of the teacher's answers."""
        return self.budget.mechanism

    @property
    def queries(self) -> Queries:
        """How queries are drawn."""
        return self.budget.queries

    @property
    def student_updates(self) -> int:
        """Updates of the student in one `train_step`."""
        return self.budget.student_updates

    @property
    def ledger(self) -> Ledger:
        """Everything that was released; it only grows."""
        return self.budget.ledger

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
            generator_optimizer: for a trainable generator; None if none learns.
            loss: of `evaluate` and validation; cross entropy of labels by default.
            metrics: of `evaluate` and validation, for example `["accuracy"]`.
            **kwargs: passed to `keras.Model.compile`. XLA is off on CPUs by default,
                where it makes convolutions several times slower.

        Raises:
            ValueError: an optimizer scales losses or was built for other variables,
                or one object is to be both, or `optimizer` is given: there are two of
                them; a metric has a name under which a run reports itself.
        """
        own = {"loss", "epsilon", *self._trackers}
        compatibility.check_compile(loss, metrics, kwargs, own=own)
        student_optimizer = keras.optimizers.get(student_optimizer)
        generator_optimizer = keras.optimizers.get(generator_optimizer)
        check_optimizers(self, student_optimizer, generator_optimizer)
        if loss is None:
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        if not tf.config.list_physical_devices("GPU"):
            kwargs.setdefault("jit_compile", False)
        super().compile(
            optimizer=student_optimizer, loss=loss, metrics=metrics, **kwargs
        )
        self.generator_optimizer = generator_optimizer
        self._compile_arguments = {"loss": loss, "metrics": metrics, **kwargs}
        self._local_student = LocalCopy(self.student, self._compile_arguments)
        build_optimizers(self)
        self._run.follow_trainable()

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

        Raises:
            RuntimeError: it is called by itself and not by `fit` or `train_on_batch`,
                which account for it.
        """
        del data
        if not self._run.is_accounted:
            raise RuntimeError(
                "A step of its own is not accounted for. Call `fit` or "
                "`train_on_batch`, with callbacks for what is to happen in between."
            )
        logs: dict[str, Any] = {}
        if self.trains_generator:
            for _ in range(self.generator_updates):
                logs["generator_loss"] = self._generator_learner.update()
        logs.update(self._run.make_learner().step())
        for name, value in logs.items():
            self._trackers[name].update_state(value)
        return self._reducible({n: self._trackers[n].result() for n in logs})

    def _reducible(self, logs: dict[str, Any]) -> dict[str, Any]:
        """Gives scalars the axis along which Keras averages over workers."""
        if not self._has_other_workers:
            return logs
        return {name: tf.reshape(value, [1]) for name, value in logs.items()}

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

    def make_train_function(self, force: bool = False) -> None:
        """Wraps Keras' train function: every call is accounted before it runs."""
        if self.train_function is None or force:
            self.train_function = self._run.accounted(super().make_train_function)

    def fit(  # type: ignore[override]
        self,
        *data: Any,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        target_epsilon: float | None = None,
        delta: float = DEFAULT_DELTA,
        accountant: str = "rdp",
        validation_data: Any = None,
        validation_batch_size: int | None = None,
        validation_steps: int | None = None,
        validation_freq: Any = 1,
        callbacks: Any = None,
        verbose: Any = "auto",
        initial_epoch: int = 0,
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """Transcribes: trains student and generator for a number of steps.

        Before anything is spent, the validation data are measured (of arrays the first
        batch) and the callbacks are checked: Keras looks at them only after an epoch.

        Args:
            *data: none; refused, as is all else that Keras' `fit` takes with data.
            epochs: number of epochs, as in Keras; by default that of `schedule`.
            steps_per_epoch: `train_step`s per epoch; by default that of `schedule`.
            target_epsilon: never passed, per unit of the mechanism (an answer of
                the teacher for `RESPONSE`). Fixes the noise of a mechanism that has
                none yet.
            delta: of the target and of the epsilon that is shown.
            accountant: of the target and of the epsilon that is shown: `"rdp"`, or
                `"pld"`, which is tighter, so needs less noise, and takes seconds.
            validation_data: `(images, labels)`, or a dataset of batches of that. What
                is chosen by it is chosen by data that the guarantee does not cover:
                say so. Measured are the weights as they stand; with an optimizer of
                `use_ema=True` the averages take their place when `fit` ends. The
                callback `keras.callbacks.SwapEMAWeights()` measures the averages.
            validation_batch_size: as in Keras.
            validation_steps: as in Keras.
            validation_freq: as in Keras.
            callbacks: Keras callbacks.
            verbose: as in Keras.
            initial_epoch: as in Keras, at most `epochs`.
            **kwargs: none; refused.

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
        _validate.in_range("initial_epoch", initial_epoch, 0, epochs)
        check_no_data(data, kwargs)
        self._run.check()
        validation = rehearse(
            self,
            callbacks=callbacks,
            data=validation_data,
            batch_size=validation_batch_size,
            steps=validation_steps,
            frequency=validation_freq,
        )
        self.budget.plan(
            target_epsilon=target_epsilon,
            delta=delta,
            accountant=accountant,
            epochs=max(epochs - initial_epoch, 1),
            steps_per_epoch=steps_per_epoch,
            steps_at_once=self.steps_per_execution,
        )
        self._run.shows = verbose != 0
        with losing_no_worker(self.distribute_strategy):
            self._run.prepare()
            return super().fit(
                self._run.steps(),
                epochs=epochs,
                steps_per_epoch=steps_per_epoch,
                callbacks=callbacks,
                verbose=verbose,
                initial_epoch=initial_epoch,
                shuffle=False,
                **validation,
            )

    @property
    def reported(self) -> set[str]:
        """Names of what a run reports after each epoch, validation aside."""
        names = {"epsilon", *self._trackers}
        return names if self.trains_generator else names - {"generator_loss"}

    # How the student is used.

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

    def answered_queries(self) -> tuple[np.ndarray, np.ndarray]:
        """The queries that the replay keeps, and the answers released to them.

        Returns:
            uint8 codes `[n, *image_shape]`, 0 to 255 over the teacher's input range,
            and released answers float32 `[n, classes]`; without queries that did not
            reach a threshold. Of all workers; with several, all call it at once.

        Raises:
            ValueError: the mechanism releases no answers.

        **Privacy**: covered by the statement, if the generator is.
        """
        learner = self._run.make_learner()
        if not isinstance(learner, AnswerLearner):
            expected = "a mechanism that releases answers"
            raise _validate.invalid("mechanism", self.mechanism, expected)
        return learner.answered()

    # What is guaranteed.

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

        Raises:
            RuntimeError: the weights are another transcriber's, without its ledger.
        """
        compatibility.check_ledger(self)
        return own_statement(self, delta=delta, accountant=accountant)

    def privacy_statements(
        self, *, delta: float | None = None, accountant: str | None = None
    ) -> tuple[PrivacyStatement, ...]:
        """All that is guaranteed of the student: one statement for each unit.

        Where a mechanism of unit `RESPONSE` asks a teacher that is itself private, the
        student also inherits the teacher's guarantee for its records, unless another
        teacher guided the generator. Each statement holds by itself; epsilons of
        different units are never added.

        Args:
            delta: see `privacy_statement`; of the mechanism's.
            accountant: see `privacy_statement`; of the mechanism's.

        Returns:
            The mechanism's statement first.
        """
        own = self.privacy_statement(delta=delta, accountant=accountant)
        return (own, *inherited_beside(self, own))

    # How it is kept.

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments.

        Raises:
            ValueError: the teacher is not a Keras model, so it has no config.
        """
        return {**super().get_config(), **config_of_arguments(self)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DPTranscriber:
        """Makes the transcriber that `get_config` described."""
        return cls(**arguments_from(config))

    def save_own_variables(self, store: Any) -> None:
        """Writes ledger, pool count, replay and the teacher's weights."""
        super().save_own_variables(store)
        write_state(self, store)

    def load_own_variables(self, store: Any) -> None:
        """Reads what `save_own_variables` wrote.

        **Privacy**: until all weights are found to be those of the ledger, there is
        no statement, no further release and no export.

        Raises:
            ValueError: it is of another mechanism or another version.
        """
        self._run.loaded_digest = ""  # no weights have it
        check_state(store)
        own = len(self._trainable_variables) + len(self._non_trainable_variables)
        super().load_own_variables({str(i): store[str(i)] for i in range(own)})
        read_state(self, store)

    def load_weights(
        self, filepath: Any, skip_mismatch: bool = False, **kwargs: Any
    ) -> None:
        """As in Keras: loads what `save_weights` or `save_checkpoint` wrote.

        Args:
            filepath: the file.
            skip_mismatch: refused; the ledger is of all weights of a file.
            **kwargs: as in Keras.

        **Privacy**: a load that is refused midway leaves weights and ledger that do
        not belong together; fit, statement, export and saving refuse them.

        Raises:
            RuntimeError: not all of the weights were loaded.
            ValueError: the file is of another transcriber.
        """
        if skip_mismatch:
            mend = "A ledger of some of the weights would be wrong for the others."
            raise _validate.invalid("skip_mismatch", skip_mismatch, "False", mend)
        super().load_weights(filepath, skip_mismatch=False, **kwargs)
        compatibility.check_ledger(self)

    def __reduce__(self) -> Any:
        """What `copy` and `pickle` take: a checkpoint that goes on with its own noise.

        **Privacy**: holds the noise key and the teacher, as every checkpoint. Of the
        copy and the original one student alone may be released.
        """
        rebuild, arguments = super().__reduce__()
        return _with_own_noise, (rebuild, *arguments)

    def save(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """As in Keras, to a `.keras` file; see `save_checkpoint`."""
        check_checkpoint_path("filepath", os.fspath(filepath))
        super().save(filepath, *args, **kwargs)

    def export(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a transcriber holds the teacher.

        Raises:
            ValueError: always; `export_student` writes what may leave.
        """
        del args, kwargs
        raise ValueError(
            "A transcriber is not exported: it holds the teacher. Use "
            "`dpt.export_student(transcriber, path)`, which writes the student alone, "
            "with its privacy statement."
        )

    def save_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Saves everything to a `.keras` file that is never seen half written.

        With several workers all of them call it after the same step; the first one
        alone writes.

        Args:
            path: ends in `.keras`. Load it with `keras.saving.load_model`. Its folder
                is made if it is missing.

        **Privacy**: holds the noise key and the teacher; keep it as secret as them.

        Raises:
            ValueError: the path ends otherwise or cannot be written, or the teacher is
                no Keras model. What stood at `path` stays.
        """
        write_checkpoint(self, path)


def _with_own_noise(
    rebuild: Callable[..., DPTranscriber], *arguments: Any
) -> DPTranscriber:
    """A copy; the same noise under its sums and the original's would cancel."""
    transcriber = rebuild(*arguments)
    transcriber._run.renew_key()
    return transcriber


# What steps were traced with and what was checked when the transcriber was made.
_FIXED = (
    "teacher",
    "student",
    "second_student",
    "generator",
    "public_prior",
    "generator_covered",
    "generator_updates",
    "candidates_per_query",
)
