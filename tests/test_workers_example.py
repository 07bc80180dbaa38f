"""examples/distributed.py on logical devices and on two worker processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--epochs=1", "--steps_per_epoch=2", "--batch_size=32"]


def run(prepared, folder, *flags):
    """What the example prints."""
    done = subprocess.run(
        [sys.executable, "examples/distributed.py", *SMALL, *flags]
        + [f"--data_dir={prepared}", f"--output_dir={folder}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("kind", ["--replicas=2", "--workers=2"])
def test_one_student_one_statement_and_a_run_that_goes_on(prepared, tmp_path, kind):
    printed = run(prepared, tmp_path, kind)
    assert printed.count("student on 2 replicas") == 1
    names = {"checkpoint.keras", "statement.txt", "student"}
    assert {path.name for path in tmp_path.iterdir()} == names
    served = tf.saved_model.load(tmp_path / "student/1").signatures["serving_default"]
    assert served(image=tf.zeros([3, 28, 28, 1]))["logits"].shape == (3, 10)
    before = (tmp_path / "statement.txt").read_text()
    assert "RESPONSE" in before
    if kind == "--replicas=2":
        run(prepared, tmp_path, kind, "--resume", "--epochs=2")
        assert (tmp_path / "statement.txt").read_text() != before
