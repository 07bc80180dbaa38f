"""benchmarks/dp_step.py: what it compares, what it says of peers, and its report."""

import argparse
import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
NET = ["mlp", "8", "1"]


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


dp_step = load("dp_step")


def fake_peer(folder, name, program):
    """An interpreter of that name that answers with what `program` prints."""
    python = folder / name / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!{sys.executable}\nimport json, sys\n{program}\n")
    python.chmod(0o755)


def test_the_ratio_is_that_of_medians_of_alternating_steps(monkeypatch):
    order, clock = [], types.SimpleNamespace(now=0.0)
    for name in ("perf_counter", "process_time"):
        monkeypatch.setattr(dp_step.time, name, lambda: clock.now)

    def step(name, *seconds):
        spent = iter(seconds)

        def run():
            order.append(name)
            clock.now += next(spent)

        return run

    # The first two are a warm-up; the last but one of each is an outlier.
    steps = {
        "plain": step("plain", 9.0, 9.0, 1.0, 50.0, 2.0),
        "private": step("private", 9.0, 9.0, 5.0, 70.0, 6.0),
    }
    found = dp_step.compare(steps, (), 3)
    assert order[4:] == ["plain", "private"] * 3
    assert found["ratio"] == found["processor_ratio"] == 3.0
    assert found["private_ms"] == pytest.approx(6000.0)


@pytest.mark.parametrize(
    "flag", ["--nets=mlp,foo", "--paths=ghost/0", "--paths=opacus_hooks/2", "--nets="]
)
def test_what_is_not_known_is_refused(flag, capsys):
    with pytest.raises(SystemExit) as ended:
        dp_step.parse([flag])
    assert ended.value.code == 2
    assert "is none of" in capsys.readouterr().err


def test_nets_and_paths_are_lists():
    options = dp_step.parse(["--paths=ghost,ghost/2,jax_privacy"])
    assert options.nets == list(dp_step.NETS)
    assert options.paths == ["ghost", "ghost/2", "jax_privacy"]


def test_peers_are_measured_where_they_are_installed(tmp_path):
    options = argparse.Namespace(peers_dir=tmp_path)
    own = ["ghost", "vectorized", "tf_privacy"]
    assert dp_step.default_paths(options) == own
    fake_peer(tmp_path, "opacus", "print({})")
    found = dp_step.default_paths(options)
    assert found == [*own, "opacus_hooks", "opacus_ghost"]
    missing = dp_step.measure("jax_privacy", NET, 10.0, tmp_path)
    assert "make_environments.py" in missing["error"]


def test_a_peer_is_shown_with_its_best_number_of_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(dp_step.os, "sched_getaffinity", lambda _: {0, 1, 2})
    program = (
        "kind, path, net, batch, repeats, threads = sys.argv[2:]\n"
        "n = int(threads)\n"
        "took = {1: 9.0, 2: 5.0, 3: 7.0}[n]\n"
        "time = {'private_ms': took, 'ratio': took, 'threads': n}\n"
        "memory = {'peak_mb': 9.0, 'step_mb': 2.0 if path == 'plain' else 3.0}\n"
        "print(json.dumps(time if kind == 'time' else memory))"
    )
    fake_peer(tmp_path, "opacus", program)
    found = dp_step.measure("opacus_ghost", NET, 10.0, tmp_path)
    assert (found["threads"], found["ratio"], found["memory_ratio"]) == (2, 5.0, 1.5)


def test_a_worker_that_fails_is_reported_and_stops_nothing():
    broken = (sys.executable, "-c", "raise SystemExit('no memory')")
    found = dp_step.in_own_process([], 10.0, broken)
    assert found == {"error": "exit status 1: no memory"}
    slow = (sys.executable, "-c", "import time; time.sleep(60)")
    assert "not done" in dp_step.in_own_process([], 0.2, slow)["error"]


@pytest.mark.slow
def test_report_and_chart_of_one_net(tmp_path):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "dp_step.py", "--nets=mlp", "--paths=ghost"]
        + ["--batch=8", "--repeats=1", f"--output={tmp_path / 'found.json'}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["nets"]["mlp"]["ghost"]
    assert found["ratio"] > 0 and found["peak_mb"] > found["step_mb"] > 0
    assert (tmp_path / "found.png").stat().st_size > 1000
