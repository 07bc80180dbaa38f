"""Private data distillation: a few synthetic examples that stand for a data set."""

from dp_transcribe.distillation.dataset import DistilledDataset, balanced_labels
from dp_transcribe.distillation.kernels import (
    Kernel,
    NTKKernel,
    RBFKernel,
    ScatteringKernel,
)
from dp_transcribe.distillation.linear import LinearTraining, PrivateLinearModel
from dp_transcribe.distillation.ridge import KernelRidgeClassifier
from dp_transcribe.distillation.scattering import Scattering

__all__ = [
    "DistilledDataset",
    "Kernel",
    "KernelRidgeClassifier",
    "LinearTraining",
    "NTKKernel",
    "PrivateLinearModel",
    "RBFKernel",
    "Scattering",
    "ScatteringKernel",
    "balanced_labels",
]
