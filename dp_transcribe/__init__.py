"""Turn a trained classifier into a student that is safe to release.

transcriber = dpt.DPTranscriber(teacher, student, generator, mechanism=...)
transcriber.compile(student_optimizer=..., generator_optimizer=...)
transcriber.fit(epochs=20, steps_per_epoch=500, target_epsilon=1.0, delta=1e-5)
print(transcriber.privacy_statement())
dpt.export_student(transcriber, "served/1")
"""

from dp_transcribe._version import __version__
from dp_transcribe.ensembles import TeacherEnsemble
from dp_transcribe.export import export_generator, export_student
from dp_transcribe.losses import GeneratorObjective
from dp_transcribe.mechanisms import (
    ClippedGradient,
    EnsembleGradient,
    Inherited,
    NoisyAnswer,
    NoisyVotes,
    NormalizedGradient,
    NormalizedOutputGradient,
    RandomizedResponse,
    SelectiveRandomizedResponse,
)
from dp_transcribe.methods import (
    METHODS,
    dpdfd,
    dpsd,
    pate,
    pate_gradient,
    srr,
    transcribe_private_teacher,
)
from dp_transcribe.privacy import PrivacyStatement, Unit
from dp_transcribe.private_teachers import (
    PrivateTraining,
    fit_private_teacher,
    fit_scattering_teacher,
    ridge_teacher,
)
from dp_transcribe.queries import FreshQueries, QueryPool
from dp_transcribe.reference_teachers import train_wavelet_teacher
from dp_transcribe.shards import train_shard_teachers
from dp_transcribe.students import replace_batch_norm
from dp_transcribe.teachers import Teacher, load_teacher
from dp_transcribe.transcriber import DPTranscriber
from dp_transcribe.transcriber.budget import BudgetExceededError
from dp_transcribe.wavelets import wavelet_student

__all__ = [
    "BudgetExceededError",
    "ClippedGradient",
    "DPTranscriber",
    "EnsembleGradient",
    "FreshQueries",
    "GeneratorObjective",
    "Inherited",
    "METHODS",
    "NoisyAnswer",
    "NoisyVotes",
    "NormalizedGradient",
    "NormalizedOutputGradient",
    "PrivacyStatement",
    "PrivateTraining",
    "QueryPool",
    "RandomizedResponse",
    "SelectiveRandomizedResponse",
    "Teacher",
    "TeacherEnsemble",
    "Unit",
    "__version__",
    "dpdfd",
    "dpsd",
    "export_generator",
    "export_student",
    "fit_private_teacher",
    "fit_scattering_teacher",
    "load_teacher",
    "replace_batch_norm",
    "pate",
    "pate_gradient",
    "ridge_teacher",
    "srr",
    "train_shard_teachers",
    "train_wavelet_teacher",
    "transcribe_private_teacher",
    "wavelet_student",
]
