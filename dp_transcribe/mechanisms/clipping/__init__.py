"""Per-example gradients of a student, bounded and summed."""

from dp_transcribe.mechanisms.clipping.bound import Bound, ClippedSum
from dp_transcribe.mechanisms.clipping.step import clipped_gradient_sum
from dp_transcribe.mechanisms.clipping.validate import (
    BatchNormalizationError,
    HalfPrecisionError,
    PlaceError,
    RegularizationError,
    RowMixingError,
    UnsupportedStudentError,
    check_sampled,
    check_student,
)

__all__ = [
    "BatchNormalizationError",
    "Bound",
    "ClippedSum",
    "HalfPrecisionError",
    "PlaceError",
    "RegularizationError",
    "RowMixingError",
    "UnsupportedStudentError",
    "check_sampled",
    "check_student",
    "clipped_gradient_sum",
]
