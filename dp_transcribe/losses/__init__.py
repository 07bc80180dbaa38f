"""Losses: what the student and the generator minimise."""

from dp_transcribe.losses.batch_norm_statistics import BatchNormStatistics
from dp_transcribe.losses.distillation import cross_entropy, kl_divergence
from dp_transcribe.losses.generator import (
    activation,
    adversarial,
    information_entropy,
    one_hot,
    student_disagreement,
)
from dp_transcribe.losses.objective import GeneratorObjective

__all__ = [
    "BatchNormStatistics",
    "GeneratorObjective",
    "activation",
    "adversarial",
    "cross_entropy",
    "information_entropy",
    "kl_divergence",
    "one_hot",
    "student_disagreement",
]
