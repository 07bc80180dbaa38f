"""On 1, 2 and 4 replicas: one sum, one draw of noise, different queries."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

pytestmark = pytest.mark.slow

# Logical devices must be set before TensorFlow starts, hence a process of its own.
START = """
import json, sys
import numpy as np
import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(
    cpu, [tf.config.LogicalDeviceConfiguration()] * 4
)

import keras
from dp_transcribe import mechanisms as m
from dp_transcribe.generators import MLPGenerator
from dp_transcribe.mechanisms.noise import NoiseSource
from dp_transcribe.queries import FreshQueries, QueryPool
from tests import tiny

keras.utils.set_random_seed(0)
results = {}


def build(mechanism, strategy, **kwargs):
    with strategy.scope():
        kwargs.setdefault("generator", tiny.UniformPixels(tiny.IMAGE))
        return tiny.transcriber(mechanism, eager=False, **kwargs)


def mirrored(replicas):
    if replicas == 1:
        return tf.distribute.get_strategy()
    devices = [f"CPU:{i}" for i in range(replicas)]
    # Collectives of two sizes in one process disturb each other.
    one_device = tf.distribute.ReductionToOneDevice() if replicas == 4 else None
    return tf.distribute.MirroredStrategy(devices, one_device)


def parts(variable):
    return [np.asarray(v) for v in two_.experimental_local_results(variable)]


def summary(model, history):
    student = [parts(v.value) for v in model.student.variables]
    return {
        "equal": all(np.array_equal(*p) for p in student),
        "finite": all(np.all(np.isfinite(p)) for p in student),
        "moved": float(np.abs(student[0][0] - start).max()),
        "counter": [int(p) for p in parts(model.noise.counter)],
        "releases": sum(e.count for e in model.ledger.entries),
        "epsilon": history["epsilon"][-1],
        "history": {k: [float(x) for x in v] for k, v in history.items()},
    }


def movement(replicas, mechanism, **kwargs):
    model = build(mechanism, mirrored(replicas), **kwargs)
    before = model.student.get_weights()[0]
    model.fit(epochs=1, steps_per_epoch=1, verbose=0)
    return (model.student.get_weights()[0] - before).ravel().tolist()


"""

PROGRAM = """
start = tiny.linear_model(0, 0.1).get_weights()[0]
two_ = mirrored(2)
LEARNERS = {
    "pool": (
        m.ClippedGradient(noise_multiplier=2.0),
        QueryPool(size=64, batch_size=16, updates=4),
    ),
    "output": (m.NormalizedOutputGradient(noise_multiplier=2.0), None),
    "answer": (m.NoisyAnswer(noise_multiplier=2.0), None),
}
for name, (mechanism, queries) in LEARNERS.items():
    rests = [(16, 32)] if name == "answer" else ()
    model = build(mechanism, two_, queries=queries, rests=rests)
    history = model.fit(epochs=1, steps_per_epoch=3, verbose=0).history
    results[name] = summary(model, history)
    if name == "pool":
        codes = parts(model._run.learner.pool.codes)
        answers = parts(model._run.learner.pool.answers)
    if name == "answer":
        replay = [parts(v) for v in model._run.learner.replay.variables()]
        codes = replay[0]
        results[name]["written"] = [int(w) for w in replay[2]]
        model.save_checkpoint(sys.argv[1] + "/m.keras")
        with two_.scope():
            loaded = keras.saving.load_model(sys.argv[1] + "/m.keras")
        replays = [m._run.learner.get_replay() for m in (loaded, model)]
        results[name]["loaded"] = all(
            np.array_equal(a, b) for a, b in zip(*replays, strict=True)
        )
    if name in ("pool", "answer"):
        rows = [tuple(r.ravel()) for c in codes for r in c if r.any()]
        results[name]["rows"], results[name]["distinct"] = len(rows), len(set(rows))


noted = {}


class NotedLatents(MLPGenerator):
    # Keeps what every replica draws, for its queries and for its own update.

    def draw_inputs(self, n, seed):
        latents, labels = super().draw_inputs(n, seed)
        context = tf.distribute.get_replica_context()
        if context is None or context.num_replicas_in_sync == 1:  # a trial
            return latents, labels

        def keep(replica, values):
            noted.setdefault(int(replica), []).append(values.tolist())
            return values

        kept = tf.numpy_function(
            keep, [context.replica_id_in_sync_group, latents], tf.float32
        )
        return tf.ensure_shape(kept, latents.shape), labels


def run_with_noted_latents(name, strategy, seed=1):
    noted.clear()
    with strategy.scope():
        generator = NotedLatents(tiny.IMAGE, latent_dim=64, units=(8,))
    model = build(
        m.NormalizedGradient(noise_multiplier=2.0),
        strategy,
        generator=generator,
        generator_batch_size=8,
        seed=seed,
    )
    history = model.fit(epochs=1, steps_per_epoch=3, verbose=0).history
    results[f"latents {name}"] = [noted[r] for r in sorted(noted)]
    return model, history


model, history = run_with_noted_latents("2", two_)
results["generator"] = summary(model, history)
results["generator"]["generators_equal"] = all(
    np.array_equal(*parts(v.value)) for v in model.generator.variables
)

run_with_noted_latents("4", mirrored(4))
stream = NoiseSource.stream
NoiseSource.stream = lambda self, number, purpose, part=0: stream(self, number, purpose)
run_with_noted_latents("2 sharing a stream", two_, seed=2)
NoiseSource.stream = stream

# The noise alone: no answer contributes.
for name, kind in [
    ("shared", m.ClippedGradient), ("rows", m.NormalizedOutputGradient)
]:
    for replicas in (1, 2, 4):
        results[f"noise of {name} {replicas}"] = movement(
            replicas,
            kind(noise_multiplier=2.0),
            teacher=tiny.silent_teacher(),
            generator=tiny.SinglePixels(tiny.IMAGE),
            queries=FreshQueries(batch_size=256),
        )

# The signal alone: `SinglePixels` gives every replica the same images again.
for replicas in (1, 2, 4):
    results[f"signal {replicas}"] = movement(
        replicas,
        m.ClippedGradient(noise_multiplier=0.0, l2_norm=1e6),
        generator=tiny.SinglePixels(tiny.IMAGE),
        queries=FreshQueries(batch_size=256),
    )

try:
    build(m.NormalizedGradient(), two_, queries=FreshQueries(batch_size=15))
except ValueError as error:
    results["odd"] = str(error)
print(json.dumps(results))
"""


LONG_RUNS = """
# Long enough for replicas to drift apart, if anything let them.
for replicas in (1, 2, 4):
    strategy = mirrored(replicas)
    with strategy.scope():
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    model = build(
        m.ClippedGradient(noise_multiplier=2.0),
        strategy,
        queries=QueryPool(size=64, batch_size=16, updates=50),
        optimizer=optimizer,
    )
    history = model.fit(epochs=1, steps_per_epoch=50, verbose=0).history
    copies = [
        [np.asarray(c) for c in strategy.experimental_local_results(v.value)]
        for v in (*model.student.variables, *model.optimizer.variables)
    ]
    results[replicas] = {
        "copies": len(copies[0]),
        "equal": all(np.array_equal(c[0], other) for c in copies for other in c),
        "ledger": model.ledger.to_json(),
        "epsilon": history["epsilon"][-1],
    }
print(json.dumps(results))
"""


def printed_by(program, folder):
    """What a program prints last, which begins with `START`."""
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", START + program, str(folder)],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return printed_by(PROGRAM, tmp_path_factory.mktemp("replicas"))


@pytest.fixture(scope="module")
def long_runs(tmp_path_factory):
    return printed_by(LONG_RUNS, tmp_path_factory.mktemp("long"))


@pytest.mark.parametrize("learner", ["pool", "output", "answer", "generator"])
def test_replicas_hold_one_student_and_one_counter(results, learner):
    found = results[learner]
    assert found["equal"] and found["finite"] and found["moved"] > 1e-3
    assert len(set(found["counter"])) == 1
    assert found["releases"] == 3
    assert 0 < found["epsilon"] < 3
    assert set(found["history"]) >= {"agreement", "student_loss", "epsilon"}


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_after_fifty_steps_replicas_are_equal_and_the_ledger_is_that_of_one(
    long_runs, replicas
):
    found, alone = long_runs[str(replicas)], long_runs["1"]
    assert found["copies"] == replicas
    assert found["equal"]
    assert found["ledger"] == alone["ledger"]
    assert found["epsilon"] == alone["epsilon"] > 0.0


def test_replicas_hold_one_generator(results):
    assert results["generator"]["generators_equal"]


@pytest.mark.parametrize(("learner", "rows"), [("pool", 64), ("answer", 48)])
def test_replicas_ask_different_queries(results, learner, rows):
    assert results[learner]["rows"] == results[learner]["distinct"] == rows


def independent(latents):
    """Whether latents `[replicas][draws][rows][64]` look like streams of their own.

    Fails with two streams that are the same or shifted by rows, or correlated by more
    than 4.5 deviations; what replicas draw adds up like independent Gaussians.
    """
    draws = [np.array(draw) for draw in itertools.chain(*latents)]
    rows = np.concatenate(draws)
    distinct = len(np.unique(rows, axis=0)) == len(rows)
    size = min(draw.size for draw in draws)
    flat = np.array([draw.ravel()[:size] for draw in draws])
    correlations = np.corrcoef(flat) - np.eye(len(flat))
    by_replica = [np.concatenate(draws, axis=None) for draws in latents]
    total = np.sum(by_replica, axis=0) / len(latents) ** 0.5
    gaussian = stats.kstest(total, "norm").pvalue > 1e-3
    return distinct and np.abs(correlations).max() < 4.5 / size**0.5 and gaussian


@pytest.mark.parametrize("run", ["2", "4"])
def test_replicas_draw_independent_latents_in_every_step(results, run):
    """In each of three steps, for the generator's own update and for the queries."""
    latents = results[f"latents {run}"]
    assert len(latents) == int(run)
    assert [[len(rows) for rows in draws] for draws in latents] == [
        [8 // int(run), 16 // int(run)] * 3
    ] * int(run)
    assert independent(latents)


def test_latents_follow_from_seed_and_replica(results):
    """Of four replicas each draws half the rows, and the first two draw the same."""
    for two, four in zip(results["latents 2"], results["latents 4"], strict=False):
        assert [draw[: len(draw) // 2] for draw in two] == four
    another_seed = results["latents 2 sharing a stream"][0]
    assert independent([*results["latents 2"], another_seed])


def test_a_stream_that_replicas_share_is_noticed(results):
    first, second = results["latents 2 sharing a stream"]
    assert first == second
    assert independent([first])
    assert not independent([first, second])
    a_row_later = [draw[1:] + draw[:1] for draw in first]
    assert not independent([first, a_row_later])
    halved = [(0.5 * np.array(draw)).tolist() for draw in first]
    assert not independent([first, halved])


def test_every_replica_keeps_a_replay_and_all_are_saved(results):
    assert results["answer"]["written"] == [24, 24]
    assert results["answer"]["loaded"]


@pytest.mark.parametrize("replicas", [2, 4])
def test_the_signal_does_not_depend_on_the_number_of_replicas(results, replicas):
    np.testing.assert_allclose(
        results[f"signal {replicas}"], results["signal 1"], atol=1e-6
    )
    assert np.abs(results["signal 1"]).max() > 1e-3


@pytest.mark.parametrize("replicas", [2, 4])
def test_the_noise_of_the_sum_is_one_draw_on_all_replicas(results, replicas):
    """Drawn on each and summed, it would be larger by the root of their number."""
    np.testing.assert_allclose(
        results[f"noise of shared {replicas}"],
        results["noise of shared 1"],
        atol=1e-6,
    )


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_noise_has_one_deviation_on_any_number_of_replicas(results, replicas):
    """Each of 64 pixels gets one shared draw, or the rows of four answers."""
    for name, deviation in (("shared", 2.0 / 256), ("rows", 2 * 2.0 / 256)):
        sample = np.array(results[f"noise of {name} {replicas}"]) / deviation
        assert stats.kstest(sample, "norm").pvalue > 1e-3
        assert 0.9 < sample.std() < 1.1


def test_a_batch_that_does_not_divide_is_refused(results):
    assert "multiple of the 2 replicas" in results["odd"]
