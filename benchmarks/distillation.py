"""How private distillation scales: with private records and with support images.

    python benchmarks/distillation.py --output=distillation.json

Every point is measured in a process of its own, whose peak memory is reported. Records
are random numbers: neither time nor memory depends on their values. Writes JSON and,
beside it, a chart.
"""

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RECORDS = (1_000, 3_000, 10_000, 30_000, 60_000)
SUPPORT = (10, 30, 100, 300)
FEATURES, CLASSES = 3969, 10
SIDE = 28

logger = logging.getLogger("distillation")


def linear_fit(records):
    """Seconds of projection and of a whole fit, after the features are cached."""
    import numpy as np

    from dp_transcribe.distillation import (
        Distillation,
        PrivateLinearModel,
        PublicWhitening,
    )

    rng = np.random.default_rng(0)
    features = rng.standard_normal((records, FEATURES), np.float32) / FEATURES**0.5
    labels = np.arange(records) % CLASSES
    whitening = PublicWhitening.from_public(features[:1000], rank=600)
    began = time.monotonic()
    mapped = whitening.apply(features)
    projected = time.monotonic()
    model = PrivateLinearModel(CLASSES, Distillation().training, seed=0)
    model.fit(mapped, labels, target_epsilon=1.0, delta=1e-5, verbose=0)
    return {
        "projection_seconds": projected - began,
        "fit_seconds": time.monotonic() - projected,
        "steps": model.training.steps,
    }


def synthesis_step(images):
    """Seconds of one step on the support images of the linear route."""
    import numpy as np

    from dp_transcribe.distillation import ScatteringKernel, Synthesis, synthesize
    from dp_transcribe.generators import RandomStrokes

    kernel = ScatteringKernel((SIDE, SIDE, 1))
    weights = np.random.default_rng(0).standard_normal((FEATURES, CLASSES))
    seconds = {}
    for steps in (1, 1, 11):  # the first one compiles
        plan = Synthesis(images_per_class=images // CLASSES, steps=steps, queries=500)
        began = time.monotonic()
        source = RandomStrokes((SIDE, SIDE, 1))
        synthesize(weights, kernel, source, settings=plan, verbose=0)
        seconds[steps] = time.monotonic() - began
    return {"step_seconds": (seconds[11] - seconds[1]) / 10}


def kip_step(images, bounded):
    """Seconds of the clipped sum of 600 records in DP-KIP, the second of two."""
    import numpy as np

    from dp_transcribe.distillation import DPKIP, KIPTraining, ScatteringKernel

    rng = np.random.default_rng(0)
    initial = rng.random((images, SIDE, SIDE, 1), np.float32)
    plan = KIPTraining(bounded=bounded)
    model = DPKIP(ScatteringKernel((SIDE, SIDE, 1)), initial, CLASSES, plan, seed=0)
    embedded = rng.standard_normal((600, FEATURES), np.float32) / FEATURES**0.5
    labels = np.arange(600) % CLASSES
    model.clipped_gradient_sum(embedded, labels)
    began = time.monotonic()
    model.clipped_gradient_sum(embedded, labels)
    return {"step_seconds": time.monotonic() - began}


MEASURES = {
    "linear_fit": linear_fit,
    "synthesis_step": synthesis_step,
    "kip_step_pixels": lambda images: kip_step(images, "pixels"),
    "kip_step_features": lambda images: kip_step(images, "features"),
}


def measure_here(name, size):
    """One point; prints JSON for the process that asked."""
    found = MEASURES[name](size)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.stdout.write(json.dumps({**found, "peak_mb": round(peak, 1)}))


def measure(name, size):
    """One point in a process of its own."""
    command = [sys.executable, __file__, f"--only={name}", f"--size={size}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    logger.info("%s %d: %s", name, size, found)
    return found


def plot(results, path):
    """Seconds and memory against size, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    for name, points in results.items():
        sizes = [int(size) for size in points]
        key = "fit_seconds" if name == "linear_fit" else "step_seconds"
        axes[0].loglog(sizes, [p[key] for p in points.values()], "o-", label=name)
        axes[1].loglog(sizes, [p["peak_mb"] for p in points.values()], "o-")
    axes[0].set_ylabel("seconds (linear_fit: all steps)")
    axes[1].set_ylabel("peak memory, MB")
    for panel in axes:
        panel.set_xlabel("private records (linear_fit) or support images")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="distillation.json")
    parser.add_argument("--measures", default=",".join(MEASURES))
    parser.add_argument("--records", default=",".join(map(str, RECORDS)))
    parser.add_argument("--support", default=",".join(map(str, SUPPORT)))
    parser.add_argument("--only", choices=sorted(MEASURES), help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.only:
        measure_here(asked.only, asked.size)
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    results = {}
    for name in asked.measures.split(","):
        sizes = asked.records if name == "linear_fit" else asked.support
        results[name] = {size: measure(name, int(size)) for size in sizes.split(",")}
    path = Path(asked.output)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    plot(results, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
