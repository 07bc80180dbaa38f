"""Two worker processes on one machine: one student, one key, one ledger."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

# The same program on both workers. The second kills itself at the end.
PROGRAM = """
import hashlib, json, os, signal, sys, time
from pathlib import Path
import numpy as np
import tensorflow as tf

strategy = tf.distribute.MultiWorkerMirroredStrategy()

import keras
from dp_transcribe import mechanisms as m
from dp_transcribe import workers
from dp_transcribe.generators import MLPGenerator
from dp_transcribe.queries import FreshQueries, QueryPool
from tests import tiny

folder, index = Path(sys.argv[1]), int(sys.argv[2])
results = {"replicas": workers.own_replicas(strategy)}


def build(mechanism, **kwargs):
    keras.utils.set_random_seed(index)  # weights must come from the first worker
    return tiny.transcriber(mechanism, eager=False, **kwargs)


def digest(arrays):
    return hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in arrays)).hexdigest()


def summary(model, history):
    return {
        "student": digest(model.student.get_weights()),
        "generator": digest(getattr(model.generator, "get_weights", list)()),
        "noise": [np.asarray(w).tolist() for w in model.noise.get_weights()],
        "ledger": model.ledger.to_json(),
        "releases": tiny.releases(model),
        "history": {k: [float(x) for x in v] for k, v in history.items()},
    }


def own_rows(variable):
    (codes,) = strategy.experimental_local_results(variable)
    return [row.ravel().tolist() for row in codes.numpy() if row.any()]


with strategy.scope():
    generator = MLPGenerator(tiny.IMAGE, latent_dim=4, units=(8,))
    secret = build(
        m.ClippedGradient(noise_multiplier=2.0),
        generator=generator,
        generator_batch_size=8,
        queries=QueryPool(size=64, batch_size=16, updates=4),
        student=tiny.conv_model(index),
        seed=None,
        compile_arguments={"metrics": ["accuracy"]},
    )
images = np.random.default_rng(0).random((12, *tiny.IMAGE), np.float32)
labels = np.arange(12) % 10
history = secret.fit(
    epochs=2,
    steps_per_epoch=2,
    verbose=0,
    validation_data=(images, labels),
    validation_batch_size=4,
).history
results["secret"] = summary(secret, history)
results["secret"]["rows"] = own_rows(secret._run.learner.pool.codes)
predicted = secret.predict(images, verbose=0).argmax(-1)
assert np.array_equal(predicted, secret.student(images).numpy().argmax(-1))
results["secret"]["val_accuracy"] = float((predicted == labels).mean())

with strategy.scope():
    answers = build(m.NoisyAnswer(noise_multiplier=2.0), rests=[(16, 32)])
history = answers.fit(epochs=1, steps_per_epoch=3, verbose=0).history
results["answers"] = summary(answers, history)
results["answers"]["rows"] = own_rows(answers._run.learner.replay.codes)
answers.save_checkpoint(folder / "m.keras")
history = answers.fit(epochs=1, steps_per_epoch=2, verbose=0).history
workers.gather_parts(strategy, [np.zeros(1, np.float32)])  # both have saved
with strategy.scope():
    loaded = keras.saving.load_model(folder / "m.keras")
results["loaded rows"] = own_rows(loaded._run.learner.replay.codes)
loaded.fit(epochs=1, steps_per_epoch=2, verbose=0)
results["resumed as uninterrupted"] = (
    digest(loaded.student.get_weights()) == digest(answers.student.get_weights())
    and loaded.ledger == answers.ledger
)


def movement(strategy, mechanism, **kwargs):
    with strategy.scope():
        model = build(mechanism, queries=FreshQueries(batch_size=128), **kwargs)
    before = model.student.get_weights()[0]
    model.fit(epochs=1, steps_per_epoch=1, verbose=0)
    return (model.student.get_weights()[0] - before).ravel().tolist()


for name, mechanism, teacher in (
    ("signal", m.ClippedGradient(noise_multiplier=0.0, l2_norm=1e6), None),
    ("noise", m.ClippedGradient(noise_multiplier=2.0), tiny.silent_teacher()),
):
    for where, place in (("both", strategy), ("one", tf.distribute.get_strategy())):
        generator = tiny.SinglePixels(tiny.IMAGE)
        parts = {"generator": generator, "teacher": teacher}
        results[f"{name} {where}"] = movement(place, mechanism, **parts)

with strategy.scope():
    unlike = build(m.ClippedGradient(noise_multiplier=2.0 + index))
try:
    unlike.fit(epochs=1, steps_per_epoch=1, verbose=0)
except ValueError as error:
    results["unlike"] = str(error)
results["unlike releases"] = tiny.releases(unlike)


class Kill(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if index == 1 and batch == 2:
            print(json.dumps(results), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)


with strategy.scope():
    lost = build(m.ClippedGradient(noise_multiplier=2.0))
started = time.monotonic()
try:
    lost.fit(epochs=1, steps_per_epoch=1000, verbose=0, callbacks=[Kill()])
except workers.WorkerLostError as error:
    results["lost"] = str(error)
    results["lost seconds"] = time.monotonic() - started
    results["lost releases"] = tiny.releases(lost)
    results["lost updates"] = int(lost.optimizer.iterations.numpy())
print(json.dumps(results), flush=True)
"""


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def start(index, ports, folder):
    addresses = [f"127.0.0.1:{port}" for port in ports]
    task = {"type": "worker", "index": index}
    environment = {
        **os.environ,
        "TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": task}),
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
    }
    # Into files: a full pipe would stop one worker while the other is waited for.
    with (folder / f"out{index}").open("w") as out:
        with (folder / f"errors{index}").open("w") as errors:
            return subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(folder), str(index)],
                env=environment,
                cwd=ROOT,
                stdout=out,
                stderr=errors,
            )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="module")
def workers(folder):
    """What both workers found, and how they ended."""
    ports = free_ports(2)
    processes = [start(index, ports, folder) for index in range(2)]
    try:
        for process in processes:
            process.wait(timeout=600)
    finally:
        for process in processes:
            process.kill()
    outputs = [(folder / f"out{index}").read_text() for index in range(2)]
    errors = [(folder / f"errors{index}").read_text()[-3000:] for index in range(2)]
    assert all(output.strip() for output in outputs), "\n".join(errors)
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    return found, [process.returncode for process in processes]


@pytest.mark.parametrize("run", ["secret", "answers"])
def test_workers_hold_one_student_one_key_and_one_ledger(workers, run):
    first, second = (found[run] for found in workers[0])
    for name in ("student", "generator", "noise", "ledger", "history"):
        assert first[name] == second[name], name
    assert first["releases"] == {"secret": 4, "answers": 3}[run]
    assert all(np.all(np.isfinite(v)) for v in first["history"].values())


def test_validation_measures_the_whole_set(workers):
    for found in workers[0]:
        secret = found["secret"]
        assert secret["history"]["val_accuracy"][-1] == pytest.approx(
            secret["val_accuracy"]
        )


@pytest.mark.parametrize(("run", "rows"), [("secret", 32), ("answers", 24)])
def test_workers_ask_different_queries(workers, run, rows):
    first, second = ({tuple(r) for r in found[run]["rows"]} for found in workers[0])
    assert len(first) == len(second) == rows
    assert not first & second


@pytest.mark.parametrize("what", ["signal", "noise"])
def test_two_workers_move_the_student_as_one_process_does(workers, what):
    """The sum does not depend on their number, and the noise is drawn once."""
    for found in workers[0]:
        np.testing.assert_allclose(
            found[f"{what} both"], found[f"{what} one"], atol=1e-6
        )
    assert np.abs(workers[0][0][f"{what} one"]).max() > 1e-3


def test_the_first_worker_alone_writes_and_each_finds_its_replay(workers, folder):
    assert [path.name for path in folder.glob("*.keras")] == ["m.keras"]
    for found in workers[0]:
        assert found["loaded rows"] == found["answers"]["rows"]
        assert found["resumed as uninterrupted"]


def test_workers_that_differ_are_refused_before_anything_is_spent(workers):
    for found in workers[0]:
        assert "differ in their mechanism or queries" in found["unlike"]
        assert found["unlike releases"] == 0


def test_a_killed_worker_ends_the_run_of_the_other_with_everything_counted(workers):
    (first, _), (status, killed) = workers
    assert killed == -signal.SIGKILL
    assert status == 0
    assert "Another worker ended" in first["lost"]
    assert first["lost seconds"] < 120
    assert first["lost updates"] <= first["lost releases"] <= first["lost updates"] + 1
    assert first["lost updates"] >= 3
