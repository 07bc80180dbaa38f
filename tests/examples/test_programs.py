"""Every program refuses what does not fit with one message and one exit status."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from dp_transcribe import programs

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("mnist", "distill", "tabular", "audit", "distributed")


@pytest.fixture
def own_flags(monkeypatch):
    """Flags of a program that has one."""
    values = flags.FlagValues()
    flags.DEFINE_float("epsilon", 1.0, "Target.", flag_values=values)
    flags.DEFINE_integer("verbosity", -1, "As absl has it.", flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    return values


def test_flags_are_read(own_flags):
    assert programs.parse_flags(["program", "--epsilon=2"]) == ["program"]
    assert own_flags.epsilon == 2.0


@pytest.mark.parametrize("argument", ["--epsilom=1", "--epsilon=much", "epsilon=1"])
def test_what_is_no_flag_is_refused(own_flags, capsys, argument):
    with pytest.raises(SystemExit) as stopped:
        programs.parse_flags(["program", argument])
    assert stopped.value.code == programs.EXIT_REFUSED
    assert "epsil" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("argument", ["--delta=2", "--delta"])
def test_an_example_ends_with_the_status_of_refusals(tmp_path, name, argument):
    done = subprocess.run(
        [sys.executable, f"examples/{name}.py", f"--output_dir={tmp_path}", argument],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == programs.EXIT_REFUSED, done.stderr
    assert "delta" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "distributed"])
@pytest.mark.parametrize("pixels", ["0,255", "255,0"])
def test_pixels_of_a_teacher_that_is_not_given_are_refused(tmp_path, name, pixels):
    flags_given = [f"--output_dir={tmp_path}", f"--teacher_range={pixels}"]
    done = subprocess.run(
        [sys.executable, f"examples/{name}.py", *flags_given],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == programs.EXIT_REFUSED, done.stderr
    assert "`teacher_range`" in done.stderr and "Traceback" not in done.stderr
