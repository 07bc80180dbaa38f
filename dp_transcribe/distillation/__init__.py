"""Private data distillation: a few synthetic examples that stand for a data set."""

from dp_transcribe.distillation.class_means import ClassMeans
from dp_transcribe.distillation.dataset import DistilledDataset, balanced_labels
from dp_transcribe.distillation.distill import (
    Distillation,
    LinearRelease,
    distill,
    images_of_model,
    kernel_for_domain,
)
from dp_transcribe.distillation.features import scattering_features
from dp_transcribe.distillation.jacobians import EmbeddingJacobian
from dp_transcribe.distillation.kernels import (
    InterceptKernel,
    Kernel,
    MirroredKernel,
    NTKKernel,
    RBFKernel,
    ScatteringKernel,
    embed_in_batches,
)
from dp_transcribe.distillation.kip import DPKIP, KIPTraining
from dp_transcribe.distillation.linear import LinearTraining, PrivateLinearModel
from dp_transcribe.distillation.matching import (
    MeanMatching,
    distill_means,
    images_of_means,
)
from dp_transcribe.distillation.random_networks import RandomConvNets
from dp_transcribe.distillation.ridge import KernelRidgeClassifier
from dp_transcribe.distillation.scattering import Scattering
from dp_transcribe.distillation.synthesis import Synthesis, synthesize
from dp_transcribe.distillation.tabular import (
    CategoricalColumn,
    NumericColumn,
    TableEncoder,
)
from dp_transcribe.distillation.whitening import PublicWhitening

__all__ = [
    "CategoricalColumn",
    "ClassMeans",
    "DPKIP",
    "Distillation",
    "DistilledDataset",
    "EmbeddingJacobian",
    "InterceptKernel",
    "KIPTraining",
    "Kernel",
    "KernelRidgeClassifier",
    "LinearRelease",
    "LinearTraining",
    "MeanMatching",
    "MirroredKernel",
    "NTKKernel",
    "NumericColumn",
    "PrivateLinearModel",
    "PublicWhitening",
    "RBFKernel",
    "RandomConvNets",
    "Scattering",
    "ScatteringKernel",
    "Synthesis",
    "TableEncoder",
    "balanced_labels",
    "distill",
    "distill_means",
    "embed_in_batches",
    "images_of_means",
    "images_of_model",
    "kernel_for_domain",
    "scattering_features",
    "synthesize",
]
