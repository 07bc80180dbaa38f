"""The benchmark of distillation, on its smallest sizes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "distillation.py"


@pytest.mark.slow
def test_every_measure_is_of_time_that_passed(tmp_path):
    """A difference of two timings must not be less than nothing."""
    output = tmp_path / "distillation.json"
    flags = [f"--output={output}", "--records=1000", "--support=10"]
    subprocess.run([sys.executable, BENCHMARK, *flags], check=True)
    found = json.loads(output.read_text())
    for points in found.values():
        for point in points.values():
            assert point["peak_mb"] > 0
            assert all(v > 0 for k, v in point.items() if k.endswith("seconds"))
    assert output.with_suffix(".png").exists()
