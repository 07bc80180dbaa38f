"""Turn a trained classifier into a student that is safe to release.

transcriber = dpt.DPTranscriber(teacher, student, generator, mechanism=...)
transcriber.compile(student_optimizer=..., generator_optimizer=...)
transcriber.fit(epochs=20, steps_per_epoch=500, target_epsilon=1.0, delta=1e-5)
print(transcriber.privacy_statement())
dpt.export_student(transcriber, "served/1")
"""

from dp_transcribe._version import __version__
from dp_transcribe.export import export_generator, export_student
from dp_transcribe.losses import GeneratorObjective
from dp_transcribe.mechanisms import (
    ClippedGradient,
    NoisyAnswer,
    NormalizedGradient,
    NormalizedOutputGradient,
    RandomizedResponse,
    SelectiveRandomizedResponse,
)
from dp_transcribe.methods import METHODS, dpdfd, dpsd, srr
from dp_transcribe.privacy import PrivacyStatement, Unit
from dp_transcribe.queries import FreshQueries, QueryPool
from dp_transcribe.students import replace_batch_norm
from dp_transcribe.teachers import Teacher, load_teacher
from dp_transcribe.transcriber import BudgetExceededError, DPTranscriber

__all__ = [
    "BudgetExceededError",
    "ClippedGradient",
    "DPTranscriber",
    "FreshQueries",
    "GeneratorObjective",
    "METHODS",
    "NoisyAnswer",
    "NormalizedGradient",
    "NormalizedOutputGradient",
    "PrivacyStatement",
    "QueryPool",
    "RandomizedResponse",
    "SelectiveRandomizedResponse",
    "Teacher",
    "Unit",
    "__version__",
    "dpdfd",
    "dpsd",
    "export_generator",
    "export_student",
    "load_teacher",
    "replace_batch_norm",
    "srr",
]
