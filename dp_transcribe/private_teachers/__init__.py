"""Teachers that are private about the records of their training data."""

from dp_transcribe.private_teachers.descent import PrivateTraining, fit_private_teacher
from dp_transcribe.private_teachers.ridge import ridge_teacher
from dp_transcribe.private_teachers.scattering import fit_scattering_teacher

__all__ = [
    "PrivateTraining",
    "fit_private_teacher",
    "fit_scattering_teacher",
    "ridge_teacher",
]
