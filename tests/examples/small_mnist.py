"""examples/mnist.py as a program, with the same methods in small sizes."""

import runpy
import sys
from pathlib import Path

from dp_transcribe import methods, wavelets
from dp_transcribe.generators import MLPGenerator
from dp_transcribe.queries import FreshQueries, QueryPool

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "mnist.py"
PUBLIC_IMAGES = 1100
SIZES = {
    "PRETRAINING_STEPS": 1,
    "ConvGenerator": MLPGenerator,
    "pretrain": lambda generator, prior, **_: None,
    "REPLAY_SIZE": 256,
    "QueryPool": lambda **_: QueryPool(size=256, batch_size=64, updates=10),
    "FreshQueries": lambda **_: FreshQueries(batch_size=64),
}

if __name__ == "__main__":
    for name, value in SIZES.items():
        setattr(methods, name, value)
    wavelets.PUBLIC_IMAGES = PUBLIC_IMAGES
    sys.argv[0] = str(EXAMPLE)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
