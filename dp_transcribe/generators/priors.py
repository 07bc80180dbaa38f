"""Public priors for kinds of images, ready to use."""

from __future__ import annotations

from collections.abc import Sequence

from dp_transcribe._validate import one_of
from dp_transcribe.generators.bags import Bags
from dp_transcribe.generators.base import ProceduralGenerator
from dp_transcribe.generators.blends import Blends
from dp_transcribe.generators.dead_leaves import DeadLeaves
from dp_transcribe.generators.footwear import Footwear
from dp_transcribe.generators.garments import Garments
from dp_transcribe.generators.mixture import Mixture
from dp_transcribe.generators.power_law_noise import PowerLawNoise
from dp_transcribe.generators.random_strokes import RandomStrokes
from dp_transcribe.generators.silhouettes import Silhouettes
from dp_transcribe.generators.smooth_noise import SmoothNoise

_DOMAINS: dict[str, tuple[tuple[type[ProceduralGenerator], float], ...]] = {
    "strokes": ((RandomStrokes, 0.9), (SmoothNoise, 0.1)),
    "clothes": (
        (Garments, 0.6),
        (Footwear, 0.2),
        (Bags, 0.1),
        (SmoothNoise, 0.1),
    ),
    "natural": ((DeadLeaves, 0.5), (PowerLawNoise, 0.2), (Silhouettes, 0.3)),
}
DOMAINS = tuple(_DOMAINS)
# Where detail tells classes apart, pairs of images add what single ones lack.
_BLENDED = ("clothes",)


def default_prior(
    image_shape: Sequence[int],
    *,
    domain: str,
    output_range: Sequence[float] = (0.0, 1.0),
) -> ProceduralGenerator:
    """The mixture of random processes that suits a kind of images.

    Args:
        image_shape: `(height, width, channels)`.
        domain: "strokes" for handwriting, "clothes" for objects on black, "natural"
            for photographs.
        output_range: Lowest and highest pixel value; the teacher's input range.

    Returns:
        A procedural generator.

    Raises:
        ValueError: the domain is not known.

    **Privacy**: public. Which domain the private images are of is taken as known.
    """
    parts = _DOMAINS[one_of("domain", domain, DOMAINS)]
    sources = [kind(image_shape, output_range=output_range) for kind, _ in parts]
    mixture = Mixture(sources, weights=[weight for _, weight in parts])
    return Blends(mixture) if domain in _BLENDED else mixture
