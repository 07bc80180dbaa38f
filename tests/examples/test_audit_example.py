"""examples/audit.py in small sizes: its files, its table and its verdicts."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags

from dp_transcribe import methods
from dp_transcribe.distillation import KIPTraining, LinearTraining
from dp_transcribe.queries import FreshQueries

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "audit.py"
FLAGS = [
    "--canaries=256",
    "--train_images=300",
    "--teacher_epochs=25",
    "--epochs=1",
    "--steps_per_epoch=2",
    "--inversion_steps=3",
    "--seed=1",
]


@pytest.fixture
def example(monkeypatch):
    """The example as a module, with flags of its own."""
    monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
    define = {
        name: getattr(flags, name) for name in dir(flags) if name.startswith("DEFINE_")
    }
    for name, function in define.items():

        def own(*args, _function=function, **kwargs):
            return _function(*args, flag_values=flags.FLAGS, **kwargs)

        monkeypatch.setattr(flags, name, own)
    spec = importlib.util.spec_from_file_location("audit_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "audit_example", module)
    spec.loader.exec_module(module)
    return module


def pairs(dataset):
    """Each training image with its label, in an order of their own."""
    rows = zip(dataset.train_images, dataset.train_labels, strict=True)
    return sorted((int(label), image.tobytes()) for image, label in rows)


def test_images_keep_their_labels_in_another_order(example, mnist_small):
    mixed = example.shuffled(mnist_small)
    assert pairs(mixed) == pairs(mnist_small)
    assert not np.array_equal(mixed.train_images, mnist_small.train_images)


@pytest.mark.parametrize("shadows", [1, 13, 20])
def test_shadow_models_that_cannot_be_are_refused_first(
    example, mnist_small, monkeypatch, tmp_path, shadows
):
    monkeypatch.setattr(example, "load_dataset", lambda name, data_dir: mnist_small)
    monkeypatch.setattr(example, "overfit", lambda *_: pytest.fail("too late"))
    example.FLAGS(
        ["audit.py", f"--output_dir={tmp_path}", *FLAGS, f"--shadows={shadows}"]
    )
    with pytest.raises(ValueError, match="`shadows`.*0, or from 2 to 12"):
        example.run()


@pytest.mark.slow
def test_everything_is_audited_and_nothing_is_flagged(
    example, mnist_small, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(example, "load_dataset", lambda name, data_dir: mnist_small)
    monkeypatch.setattr(
        methods, "FreshQueries", lambda **_: FreshQueries(batch_size=64)
    )
    quick = {
        "audit_linear_model": LinearTraining(steps=4, l2_norm=0.3, accountant="rdp"),
        "audit_dpkip": KIPTraining(steps=2, sampling_probability=0.1),
    }
    for name, training in quick.items():
        audit = getattr(example, name)
        monkeypatch.setattr(
            example, name, lambda _a=audit, _t=training, **terms: _a(_t, **terms)
        )
    example.FLAGS(["audit.py", f"--output_dir={tmp_path}", *FLAGS])
    report = example.run()
    assert json.loads((tmp_path / "audit.json").read_text()) == report
    assert not any(audit["flagged"] for audit in report["audits"].values())
    assert {"dpdfd", "srr", "dpsd_data", "dpsd_label"} <= set(report["audits"])
    ours = {"private teacher", "votes", "gradients of teachers"}
    ours |= {"distillation, class means"}
    assert ours <= set(report["audits"])
    for audit in report["audits"].values():
        assert audit["epsilon_lower_bound"] <= audit["claimed_epsilon"] <= 1.0
    assert report["membership"]["teacher"]["auc"] > 0.55
    for student in ("student", "record_student"):
        found = report["membership"][student]["auc"]
        assert found < 0.56, student  # 300 members: 0.02 noise
    table = capsys.readouterr().out
    assert "lower bound" in table and "FLAGGED" not in table
    assert (tmp_path / "audit.png").stat().st_size > 0
