"""What is released of the teacher's answers, how it is noised and what it costs."""

from dp_transcribe.mechanisms.ensemble_gradient import EnsembleGradient
from dp_transcribe.mechanisms.inherited import Inherited
from dp_transcribe.mechanisms.noisy_answer import NoisyAnswer
from dp_transcribe.mechanisms.noisy_votes import NoisyVotes, answer_confidently
from dp_transcribe.mechanisms.output_gradient import NormalizedOutputGradient
from dp_transcribe.mechanisms.randomized_response import (
    RandomizedResponse,
    SelectiveRandomizedResponse,
)
from dp_transcribe.mechanisms.weight_gradient import ClippedGradient, NormalizedGradient

__all__ = [
    "ClippedGradient",
    "EnsembleGradient",
    "Inherited",
    "NoisyAnswer",
    "NoisyVotes",
    "NormalizedGradient",
    "NormalizedOutputGradient",
    "RandomizedResponse",
    "SelectiveRandomizedResponse",
    "answer_confidently",
]
