"""How the student learns from noisy gradients."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, cast

import tensorflow as tf

from dp_transcribe.mechanisms.base import Batch, GradientMechanism, Release
from dp_transcribe.mechanisms.noise import NOISE, QUERIES, SAMPLING, standard_normal
from dp_transcribe.queries import PoolStore, QueryPool, quantize
from dp_transcribe.transcriber.learning import Learner
from dp_transcribe.transcriber.replicas import all_reduce_sum, as_int32, replica_index

if TYPE_CHECKING:
    from dp_transcribe.transcriber.model import DPTranscriber

# How fast the frequencies of classes follow the student's predictions, and how many
# queries are looked at for them per `train_step`.
PREDICTION_RATE, LOOKED_AT = 0.05, 256


class GradientLearner(Learner):
    """The student descends along noisy sums of bounded per-answer gradients."""

    def __init__(self, owner: DPTranscriber) -> None:
        super().__init__(owner)
        queries = owner.queries
        self.batch_size = queries.batch_size
        self.pool: PoolStore | None = None
        self.sampling_probability = 1.0
        if isinstance(queries, QueryPool):
            shape, classes = owner.teacher.input_shape, owner.teacher.num_classes
            size = queries.size // self.replicas
            self.pool = PoolStore(size, shape, classes, self.feature_shape)
            self.sampling_probability = queries.sampling_probability
            self._fill = tf.function(self._fill_pool)

    @property
    def mechanism(self) -> GradientMechanism:
        """The transcriber's mechanism."""
        return cast(GradientMechanism, self.owner.mechanism)

    def renew_pool(self, *, show: bool = False) -> None:
        """Replaces the pool by new queries, on every replica.

        Args:
            show: print how far it is, since a large pool takes minutes.
        """
        self.owner.distribute_strategy.run(self._fill, args=(show,))

    def _fill_pool(self, show: bool) -> None:
        number = self.owner.noise.advance()
        pool = cast(PoolStore, self.pool)

        def make(count: tf.Tensor, chunk: tf.Tensor) -> tuple[tf.Tensor, ...]:
            codes, answers = self.ask(count, number, chunk)
            return codes, answers, self.embed(codes)

        pool.fill(make, show=show)

    def step(self) -> dict[str, Any]:
        """The student updates of one `train_step`.

        Returns:
            `student_loss` and `agreement`, from the noisy statistics alone.
        """
        if self.owner.balance_classes:
            self._count_classes(self.owner.noise.advance())
        progress = [self.update() for _ in range(self.owner.student_updates)]
        agreement, loss = zip(*progress, strict=True)
        count = float(len(progress))
        return {
            "student_loss": tf.add_n(loss) / count,
            "agreement": tf.add_n(agreement) / count,
        }

    def _count_classes(self, number: tf.Tensor) -> None:
        seed = as_int32(self.owner.noise.stream(number, QUERIES, part=replica_index()))
        if self.pool is None:
            inputs = self.embed(
                quantize(self._draw(LOOKED_AT, seed), self.output_range)
            )
        else:
            inputs = self.inputs(self.pool.some_inputs(LOOKED_AT, seed))
        logits = self.learns(inputs, training=False)
        seen = tf.nn.softmax(tf.cast(logits, tf.float32) + self.log_frequencies)
        self.follow_frequencies(seen, tf.ones([LOOKED_AT]), PREDICTION_RATE)

    def update(self) -> tuple[tf.Tensor, tf.Tensor]:
        """One noisy update: sample, bound, sum over replicas, noise, descend."""
        owner, mechanism = self.owner, self.mechanism
        number = owner.noise.advance()
        batch = dataclasses.replace(
            self._batch(number), log_frequencies=self.log_frequencies
        )
        release = mechanism.summed(self.learns, batch, self._row_noise(number))
        release = self._noisy(all_reduce_sum(release.tensors()), number)
        # Keras' optimizers sum over replicas what is the same on all of them here.
        scale = 1.0 / (mechanism.divisor(self.batch_size) * self.replicas)
        gradients = [gradient * scale for gradient in release.gradients]
        owner.student_optimizer.apply(gradients, self.learns.trainable_variables)
        return mechanism.progress(release, self.batch_size)

    def _batch(self, number: tf.Tensor) -> Batch:
        if self.pool is not None:
            seed = self.owner.noise.stream(number, SAMPLING, part=replica_index())
            kept, answers, mask = self.pool.sample(self.sampling_probability, seed)
            return Batch(self.inputs(kept), answers, mask)
        count = self.batch_size // self.replicas
        codes, answers = self.ask(count, number, 0)
        return Batch(self.embed(codes), answers, tf.ones([count]))

    def _row_noise(self, number: tf.Tensor) -> Any:
        """Standard noise of this replica's own rows."""
        seed = self.owner.noise.stream(number, NOISE, part=replica_index() + 1)
        return lambda shape: standard_normal(shape, seed)

    def _noisy(self, tensors: list[tf.Tensor], number: tf.Tensor) -> Release:
        """Adds the one draw that is the same on all replicas."""
        *gradients, statistics = self.owner.noise.normal_like(tensors, number=number)
        on_gradients, on_statistics = self.mechanism.shared_stddevs
        noise = [draw * on_gradients for draw in gradients]
        noise.append(statistics * on_statistics)
        return Release.of([t + n for t, n in zip(tensors, noise, strict=True)])
