"""Sources of synthetic queries: procedural generators and trainable ones."""

from dp_transcribe.generators.bags import Bags
from dp_transcribe.generators.base import ProceduralGenerator
from dp_transcribe.generators.blends import Blends
from dp_transcribe.generators.conv_generator import ConvGenerator
from dp_transcribe.generators.dead_leaves import DeadLeaves
from dp_transcribe.generators.footwear import Footwear
from dp_transcribe.generators.garments import Garments
from dp_transcribe.generators.mixture import Mixture
from dp_transcribe.generators.mlp_generator import MLPGenerator
from dp_transcribe.generators.power_law_noise import PowerLawNoise
from dp_transcribe.generators.pretraining import pretrain
from dp_transcribe.generators.priors import DOMAINS, default_prior
from dp_transcribe.generators.random_strokes import RandomStrokes
from dp_transcribe.generators.silhouettes import Silhouettes
from dp_transcribe.generators.smooth_noise import SmoothNoise
from dp_transcribe.generators.trainable import TrainableGenerator

__all__ = [
    "DOMAINS",
    "Bags",
    "Blends",
    "ConvGenerator",
    "DeadLeaves",
    "Footwear",
    "Garments",
    "MLPGenerator",
    "Mixture",
    "PowerLawNoise",
    "ProceduralGenerator",
    "RandomStrokes",
    "Silhouettes",
    "SmoothNoise",
    "TrainableGenerator",
    "default_prior",
    "pretrain",
]
