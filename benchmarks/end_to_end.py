"""Seconds of DPDFD's own training step, by how per-answer gradients are bounded.

    python benchmarks/end_to_end.py --paths=ghost,vectorized --steps=3

A step is everything that `dpt.dpdfd` does in one: the generator's update, five noisy
updates of the student with an expected 2,048 answers each, and accounting. The student
is a LeNet, all of whose weights learn; the default one is cheaper by far. The
pool is smaller than the method's, so that filling it does not hide the rest; filling it
and tracing are left out of the seconds. The teacher is untrained: its answers cost the
same.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SHAPE, CLASSES = (28, 28, 1), 10

logger = logging.getLogger("end_to_end")


def make_transcriber(path, pool_size):
    """DPDFD with another way of bounding and a smaller pool."""
    import dp_transcribe as dpt
    from dp_transcribe.generators import ConvGenerator
    from dp_transcribe.generators.priors import default_prior
    from dp_transcribe.reference_teachers import conv_teacher
    from dp_transcribe.students import lenet_student

    usual = dpt.dpdfd(
        conv_teacher(SHAPE, CLASSES),
        default_prior(SHAPE, domain="strokes"),
        student=lenet_student(SHAPE, CLASSES),
        generator=ConvGenerator(SHAPE),
        batch_size=2048,
    )
    config = usual.get_config()
    config["mechanism"]["fields"].update(clipping=path, noise_multiplier=2.0)
    config["queries"]["fields"]["size"] = pool_size
    transcriber = dpt.DPTranscriber.from_config(config)
    transcriber.compile_from_config(usual.get_compile_config())
    return transcriber


def seconds_per_step(path, steps, pool_size):
    """Median seconds and processor seconds of a step, after the first."""
    import keras

    wall, processor = [], []

    class Clock(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.started, self.used = time.perf_counter(), time.process_time()

        def on_train_batch_end(self, batch, logs=None):
            wall.append(time.perf_counter() - self.started)
            processor.append(time.process_time() - self.used)

    transcriber = make_transcriber(path, pool_size)
    transcriber.fit(epochs=1, steps_per_epoch=steps + 1, callbacks=[Clock()], verbose=0)
    return {
        "seconds": statistics.median(wall[1:]),
        "processor_seconds": statistics.median(processor[1:]),
    }


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("end_to_end.json"))
    parser.add_argument("--paths", default="ghost,vectorized")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--pool_size", type=int, default=20_480)
    options = parser.parse_args()
    report = {}
    for path in options.paths.split(","):
        report[path] = seconds_per_step(path, options.steps, options.pool_size)
        logger.info("%s %s", path, report[path])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
