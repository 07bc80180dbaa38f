"""examples/mnist.py with teachers on disjoint shards, in small sizes."""

import dataclasses
import functools
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from dp_transcribe import methods
from dp_transcribe.queries import FreshQueries

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "mnist.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("mnist_ensembles", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small(example, monkeypatch, mnist_small):
    dataset = dataclasses.replace(
        mnist_small,
        train_images=mnist_small.train_images[:120],
        train_labels=mnist_small.train_labels[:120],
        test_images=mnist_small.test_images[:40],
        test_labels=mnist_small.test_labels[:40],
    )
    features = functools.partial(example.scattering_features, images=50, damping_rank=4)
    monkeypatch.setattr(example, "load_dataset", lambda *_: dataset)
    monkeypatch.setattr(example, "scattering_features", features)
    monkeypatch.setattr(example, "FEATURES", 20)
    few = FreshQueries(batch_size=32)
    monkeypatch.setattr(methods, "FreshQueries", lambda **_: few)
    return example


@pytest.mark.parametrize(
    "route, releases",
    [("votes", 2 * 32), pytest.param("gradient", 2, marks=pytest.mark.slow)],
)
def test_a_route_leaves_report_statement_pictures_and_student(
    small, tmp_path, route, releases
):
    config = small.ExampleConfig(
        unit="record",
        route=route,
        epochs=1,
        steps_per_epoch=2,
        output_dir=str(tmp_path / "out"),
        cache_dir=str(tmp_path / "cache"),
    )
    report = small.run(config)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files >= {"report.json", "statement.txt", "samples.png", "student"}
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["unit"] == "RECORD" and written["method"] == route
    assert written["releases"] == releases
    assert 0.9 < written["statement"]["epsilon"] <= 1.0
    assert report["teacher"]["source"] == "trained"
    text = (tmp_path / "out" / "statement.txt").read_text()
    assert "per unit RECORD" in text and "REPLACE_ONE" in text
    assert len(list((tmp_path / "cache").rglob("teacher_*.npz"))) == 6
    assert small.shard_teachers(config, small.load_dataset())[1] == "cached"


@pytest.mark.parametrize("shards", [1, 7])
def test_a_number_of_shards_that_does_not_do_is_refused(small, tmp_path, shards):
    config = small.ExampleConfig(
        unit="record",
        route="votes",
        shards=shards,
        output_dir=str(tmp_path / "out"),
        cache_dir=str(tmp_path / "cache"),
    )
    with pytest.raises(small.RefusedError, match=r"`shards`.*2.*6"):
        small.run(config)


def test_as_many_teachers_as_were_asked_for(small, tmp_path):
    config = small.ExampleConfig(
        unit="record", route="votes", shards=4, cache_dir=str(tmp_path)
    )
    ensemble, source = small.shard_teachers(config, small.load_dataset())
    assert (ensemble.num_teachers, source) == (4, "trained")
