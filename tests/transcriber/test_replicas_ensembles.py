"""On several replicas a teacher is bounded as on one, and the updates agree."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

# Logical devices must be set before TensorFlow starts, hence a process of its own.
PROGRAM = """
import json, sys
import numpy as np
import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(
    cpu, [tf.config.LogicalDeviceConfiguration()] * 2
)

from dp_transcribe.ensembles import TeacherEnsemble
from dp_transcribe.mechanisms import EnsembleGradient, NoisyVotes
from tests import tiny

random = np.random.default_rng(0)
shapes = [v.shape for v in tiny.linear_model().variables]


def ensemble(flipped=False):
    weights = [random.normal(size=(4, *s)).astype(np.float32) for s in shapes]
    if flipped:
        weights = [np.concatenate([-w[:1], w[1:]]) for w in weights]
    return TeacherEnsemble(tiny.linear_model(), weights)


# One for all: a second one would number its collective operations as the first did.
mirrored = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def moved(mechanism, teacher):
    with mirrored.scope():
        model = tiny.transcriber(
            mechanism, teacher=teacher, generator=tiny.UniformPixels(tiny.IMAGE),
            eager=False, replay_size=64,
        )
    before = tiny.flat_weights(model.student)
    model.fit(epochs=1, steps_per_epoch=1, verbose=0)
    return (tiny.flat_weights(model.student) - before).tolist()


results = {}
for space in ("logits", "weights"):
    bound = 0.01
    what = EnsembleGradient(
        num_teachers=4, noise_multiplier=0.0, l2_norm=bound, space=space
    )
    parts = []
    for flipped in (False, True):
        random = np.random.default_rng(0)
        parts.append(moved(what, ensemble(flipped)))
    results[space] = {"bound": bound, "one": parts[0], "other": parts[1]}
random = np.random.default_rng(0)
votes = NoisyVotes(num_teachers=4, noise_multiplier=5.0)
results["votes"] = moved(votes, ensemble())
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results():
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_teacher_moves_the_weights_within_the_bound(results):
    """SGD of rate 1 moves the weights by the sum over the number of teachers."""
    weights = results["weights"]
    moved = np.subtract(weights["one"], weights["other"]) * 4
    assert 0 < np.linalg.norm(moved) <= 2 * weights["bound"] * (1 + 1e-4)


@pytest.mark.parametrize("name", ["logits", "votes"])
def test_the_student_moves_and_stays_finite(results, name):
    found = results[name] if name == "votes" else results[name]["one"]
    assert np.all(np.isfinite(found)) and np.any(np.abs(found) > 0)
