"""Transcribes an MNIST classifier on several replicas or several machines.

    python examples/distributed.py                # all GPUs, or two logical CPU devices
    python examples/distributed.py --workers=2    # two processes on this machine

On several machines the same command runs on each, with TF_CONFIG naming all workers and
saying which one this is (README.md). The first worker trains the teacher, unless it is
given, and alone writes statement.txt, checkpoint.keras and student/1. After a crash,
start all workers again with `--resume`.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import dp_transcribe as dpt
from dp_transcribe import _validate, reporting, workers
from dp_transcribe.auditing import check_fits, load_in_range
from dp_transcribe.data import ImageDataset, load_dataset
from dp_transcribe.export import statements_text
from dp_transcribe.generators.priors import default_prior
from dp_transcribe.programs import parse_flags, refuse
from dp_transcribe.reference_teachers import (
    ConvRecipe,
    conv_teacher,
    train_conv_teacher,
)
from dp_transcribe.students import lenet_student

FLAGS = flags.FLAGS
flags.DEFINE_integer("workers", None, "Starts so many processes here.", lower_bound=2)
flags.DEFINE_integer("replicas", 2, "Logical devices without a GPU.", lower_bound=1)
flags.DEFINE_float("epsilon", 1.0, "Epsilon per answer of the teacher.")
flags.DEFINE_float("delta", 1e-5, "Delta.")
flags.DEFINE_integer("epochs", 5, "Epochs.", lower_bound=1)
flags.DEFINE_integer("steps_per_epoch", 40, "Updates per epoch.", lower_bound=1)
flags.DEFINE_integer("batch_size", 512, "Answers per update, over all replicas.")
flags.DEFINE_float("learning_rate", 0.5, "Of SGD with momentum 0.9.")
flags.DEFINE_string("data_dir", None, "Folder prepared by tensorflow-datasets.")
flags.DEFINE_string("teacher", None, ".keras file; every worker needs it.")
flags.DEFINE_string("teacher_range", None, "Its pixels, low,high; by default 0,1.")
flags.DEFINE_string("output_dir", "output/distributed", "Where the results go.")
flags.DEFINE_integer("seed", None, "For tests; the noise is secret without it.")
flags.DEFINE_bool("resume", False, "Go on from the checkpoint, on every worker.")

RECIPE = ConvRecipe(filters=(16, 32), units=64, epochs=2, min_steps=150)
STUDENTS = "student/1"
CHECKPOINT = "checkpoint.keras"


def make_strategy() -> tf.distribute.Strategy:
    """Several workers if TF_CONFIG says so, else the devices of this machine."""
    if "TF_CONFIG" in os.environ:
        return tf.distribute.MultiWorkerMirroredStrategy()
    if tf.config.list_physical_devices("GPU"):
        return tf.distribute.MirroredStrategy()
    cpu = tf.config.list_physical_devices("CPU")[0]
    devices = [tf.config.LogicalDeviceConfiguration() for _ in range(FLAGS.replicas)]
    tf.config.set_logical_device_configuration(cpu, devices)
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(FLAGS.replicas)])


def make_teacher(strategy: tf.distribute.Strategy, data: ImageDataset) -> Any:
    """The given teacher, or one that the first worker trains for all."""
    if FLAGS.teacher:
        with strategy.scope():
            bounds = _validate.written_range("teacher_range", FLAGS.teacher_range)
            teacher = load_in_range(FLAGS.teacher, bounds)
        check_fits("teacher", teacher, data)
        return teacher
    model = conv_teacher(data.image_shape, data.num_classes, recipe=RECIPE)
    if workers.is_chief(strategy):
        model = train_conv_teacher(
            data.train_images,
            data.train_labels,
            num_classes=data.num_classes,
            recipe=RECIPE,
        )
    copies = len(workers.own_replicas(strategy))
    weights = [
        workers.gather_parts(strategy, [weight] * copies)[0]
        for weight in model.get_weights()
    ]
    with strategy.scope():
        shared = conv_teacher(data.image_shape, data.num_classes, recipe=RECIPE)
        shared.set_weights(weights)
        return dpt.Teacher(shared)


def make_transcriber(teacher: Any) -> dpt.DPTranscriber:
    """DPDFD on random strokes; call it inside the strategy's scope."""
    steps = FLAGS.epochs * FLAGS.steps_per_epoch
    transcriber = dpt.DPTranscriber(
        teacher,
        lenet_student(teacher.input_shape, teacher.num_classes),
        default_prior(
            teacher.input_shape, domain="strokes", output_range=teacher.input_range
        ),
        mechanism=dpt.NormalizedGradient(),
        queries=dpt.QueryPool(
            size=FLAGS.batch_size * min(steps, 50),
            batch_size=FLAGS.batch_size,
            updates=steps,
        ),
        seed=FLAGS.seed,
    )
    optimizer = keras.optimizers.SGD(FLAGS.learning_rate, momentum=0.9, use_ema=True)
    transcriber.compile(student_optimizer=optimizer)
    return transcriber


class Checkpoints(keras.callbacks.Callback):
    """Saves after every epoch: all workers take part, the first one writes."""

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self.model.save_checkpoint(Path(FLAGS.output_dir) / CHECKPOINT)


def epochs_done(transcriber: dpt.DPTranscriber) -> int:
    """Whole epochs that the checkpoint has behind it."""
    return int(transcriber.optimizer.iterations.numpy()) // FLAGS.steps_per_epoch


def transcribe(strategy: tf.distribute.Strategy, data: ImageDataset) -> Any:
    """A new run, or the rest of the one that was interrupted."""
    if FLAGS.resume:
        with strategy.scope():
            path = Path(FLAGS.output_dir) / CHECKPOINT
            transcriber = keras.saving.load_model(path)
    else:
        teacher = make_teacher(strategy, data)
        with strategy.scope():
            transcriber = make_transcriber(teacher)
    transcriber.fit(
        epochs=FLAGS.epochs,
        steps_per_epoch=FLAGS.steps_per_epoch,
        initial_epoch=epochs_done(transcriber),
        target_epsilon=FLAGS.epsilon,
        delta=FLAGS.delta,
        callbacks=[Checkpoints()],
        verbose=2 if workers.is_chief(strategy) else 0,
    )
    return transcriber


def write_results(transcriber: dpt.DPTranscriber, data: ImageDataset) -> None:
    """Student, statement and accuracies; on the first worker."""
    folder, statements = Path(FLAGS.output_dir), transcriber.privacy_statements()
    # A copy on one device: nothing that is written waits for other workers.
    student = keras.models.clone_model(transcriber.student)
    student.set_weights(transcriber.student.get_weights())
    dpt.export_student(student, folder / STUDENTS, statement=statements, overwrite=True)
    reporting.write_text(folder / "statement.txt", statements_text(statements))
    data = data.in_range(transcriber.teacher.input_range)
    classes = reporting.predict_classes(student, data.test_images)
    replicas = transcriber.distribute_strategy.num_replicas_in_sync
    for statement in statements:
        print(statement.to_text().split("\n\n")[0])
    print(f"student on {replicas} replicas: {np.mean(classes == data.test_labels):.2%}")
    print(f"Release {folder / STUDENTS} and nothing else.")


def start_workers(count: int, argv: list[str]) -> int:
    """Runs this program as several workers on this machine; returns the exit status."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    processes = []
    for index in range(count):
        task = {"type": "worker", "index": index}
        place = json.dumps({"cluster": {"worker": addresses}, "task": task})
        environment = {**os.environ, "TF_CONFIG": place}
        command = [sys.executable, __file__, *argv]
        processes.append(subprocess.Popen(command, env=environment))
    return max(abs(process.wait()) for process in processes)


def main(argv: list[str]) -> None:
    del argv
    if FLAGS.workers and "TF_CONFIG" not in os.environ:
        sys.exit(start_workers(FLAGS.workers, sys.argv[1:]))
    try:
        _validate.positive_finite("epsilon", FLAGS.epsilon)
        _validate.fraction_open("delta", FLAGS.delta)
        _validate.written_range("teacher_range", FLAGS.teacher_range)
        if FLAGS.teacher_range is not None and FLAGS.teacher is None:
            expected = "None without a `--teacher`"
            raise _validate.invalid("teacher_range", FLAGS.teacher_range, expected)
        _validate.writable_dir("output_dir", FLAGS.output_dir)
        strategy = make_strategy()
        data = load_dataset("mnist", FLAGS.data_dir)
        transcriber = transcribe(strategy, data)
    except workers.WorkerLostError as error:
        sys.exit(f"{error}\nThe same command with --resume goes on.")
    except (ValueError, OSError) as error:
        refuse(error)
    if workers.is_chief(strategy):
        write_results(transcriber, data)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
