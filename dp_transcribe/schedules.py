"""Learning-rate schedules that Keras does not bring."""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from dp_transcribe import _validate


@keras.saving.register_keras_serializable(package="dp_transcribe")
class DelayedCosineDecay(keras.optimizers.schedules.LearningRateSchedule):
    """Zero at first, then a cosine decay from `learning_rate` to a share of it.

    A student that learns from a replay of noisy answers while there are few of them
    learns their noise by heart, and does not forget it. This schedule lets the
    answers come in first.

    Args:
        learning_rate: where the decay begins.
        total_steps: steps of the optimizer in all; the rate stays at the end of the
            decay from then on.
        delay: share of the steps that are taken at rate zero, from 0 up to below 1.
        alpha: share of `learning_rate` where the decay ends.
    """

    def __init__(
        self,
        learning_rate: float,
        total_steps: int,
        delay: float = 0.8,
        alpha: float = 0.02,
    ) -> None:
        super().__init__()
        self.learning_rate = _validate.positive_finite("learning_rate", learning_rate)
        self.total_steps = _validate.positive_int("total_steps", total_steps)
        self.delay = _validate.probability("delay", delay)
        if delay >= 1.0:
            raise _validate.invalid("delay", delay, "a share below 1")
        self.alpha = _validate.probability("alpha", alpha)

    def __call__(self, step: Any) -> tf.Tensor:
        """The learning rate of a step, a scalar."""
        done = tf.cast(step, tf.float32) / self.total_steps
        decayed = tf.clip_by_value((done - self.delay) / (1.0 - self.delay), 0.0, 1.0)
        cosine = 0.5 * (1.0 + tf.cos(math.pi * decayed))
        rate = self.learning_rate * (self.alpha + (1.0 - self.alpha) * cosine)
        return tf.where(done < self.delay, 0.0, rate)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "learning_rate": self.learning_rate,
            "total_steps": self.total_steps,
            "delay": self.delay,
            "alpha": self.alpha,
        }
