"""examples/distill.py and examples/tabular.py: files, routes and refusals."""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from absl import flags

from dp_transcribe.data import ImageDataset
from dp_transcribe.distillation import (
    DistilledDataset,
    InterceptKernel,
    MirroredKernel,
    RBFKernel,
    ScatteringKernel,
)
from dp_transcribe.distillation.releases import RecordSums
from dp_transcribe.programs import EXIT_INTERRUPTED, EXIT_REFUSED

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
IMAGE_FILES = {
    "report.json", "statement.txt", "statement.json", "distilled.npz", "images.png",
}  # fmt: skip
KEPT_FILES = {"run.json", "released.npz", "released.statement.json"}
TABLE_FILES = (IMAGE_FILES - {"images.png"}) | {"aucs.png"}


def load(name):
    path = EXAMPLES / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_example", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


example = load("distill")
table = load("tabular")


def bars(count, seed):
    """Noisy horizontal (class 0) and vertical (class 1) bars."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count).astype(np.int32)
    wave = 0.5 + 0.4 * np.sin(np.arange(8) * 2.0 + rng.uniform(0, 6, (count, 1)))
    images = np.repeat(wave[:, :, None], 8, axis=2)
    images[labels == 1] = images[labels == 1].transpose(0, 2, 1)
    images += rng.uniform(-0.1, 0.1, images.shape)
    return images[..., None].astype(np.float32), labels


DATASET = ImageDataset("mnist", *bars(600, 1), *bars(100, 2), 2, "made")


@pytest.fixture
def configure(monkeypatch, tmp_path):
    """Sets the flags of an example, which then writes to the test's folder."""
    monkeypatch.setattr(example, "load_dataset", lambda *_: DATASET)

    def call(module, *arguments):
        values = flags.FlagValues()
        module.define_flags(values)
        values(["example", f"--output_dir={tmp_path / 'out'}", *arguments])
        monkeypatch.setattr(module, "FLAGS", values)

    return call


@pytest.fixture
def run(configure):
    """Runs an example with flags; returns its report."""

    def call(module, *arguments):
        configure(module, *arguments)
        return module.run()

    return call


DPKIP = ("--route=dpkip", "--kernel=rbf", "--steps=2", "--convnet_epochs=0")


def test_report_and_files(run, tmp_path):
    report = run(example, *DPKIP, "--images_per_class=2", "--seed=1")
    assert {path.name for path in (tmp_path / "out").iterdir()} == IMAGE_FILES
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert report["route"] == "dpkip" and report["images_per_class"] == 2
    assert report["measured_on"] == "test"
    assert 0.0 <= report["accuracy"]["krr"] <= 1.0
    assert report["statement"]["unit"] == "RECORD"
    assert 0.0 < report["statement"]["epsilon"] <= 1.0
    assert set(report["seconds"]) == {"features", "distillation", "krr"}
    assert len(DistilledDataset.load(tmp_path / "out")) == 4


def test_seeds_may_be_as_large_as_elsewhere(run):
    report = run(example, *DPKIP, "--images_per_class=2", f"--seed={2**40}")
    assert report["statement"]["noise_seed"] == 2**40


@pytest.mark.parametrize(
    ("module", "arguments", "files"),
    [
        (example, (*DPKIP, "--images_per_class=2"), IMAGE_FILES),
        (table, ("--steps=2", "--delta=1e-4"), TABLE_FILES),
    ],
)
def test_an_interrupted_run_leaves_nothing_older_beside_its_release(
    run, monkeypatch, tmp_path, module, arguments, files
):
    folder = tmp_path / "out"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("of an older run")
    monkeypatch.setattr(module, "measure", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(module, "--epsilon=3", *arguments)
    left = {path.name for path in folder.iterdir()}
    assert left <= files - {"report.json", "aucs.png"}
    assert not any(b"older" in path.read_bytes() for path in folder.iterdir())
    assert 2.9 < DistilledDataset.load(folder).statement.epsilon <= 3.0


def test_a_refused_run_leaves_an_older_release_as_it_is(run, tmp_path):
    run(example, *DPKIP, "--images_per_class=2")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match="`sampling_probability`"):
        run(example, *DPKIP, "--sampling=2")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_a_convnet_learns_from_the_images(run):
    report = run(example, *DPKIP[:-1], "--images_per_class=2", "--convnet_epochs=1")
    assert 0.0 <= report["accuracy"]["convnet"] <= 1.0
    assert "convnet" in report["seconds"]


def test_a_convnet_is_taught_by_the_images(run):
    report = run(
        example,
        *("--route=dpkip", "--bounded=features", "--steps=2", "--images_per_class=2"),
        *("--convnet_epochs=0", "--taught_epochs=1", "--seed=1"),
    )
    assert 0.0 <= report["accuracy"]["convnet_taught"] <= 1.0
    assert "convnet_taught" in report["seconds"]


def test_the_means_route_takes_the_settings_of_the_flags(run, monkeypatch):
    small = {"networks": 2, "filters": 8, "candidates": 300}
    small |= {"public_images": 150, "directions": 120}
    plan = functools.partial(example.MeanMatching, **small)
    monkeypatch.setattr(example, "MeanMatching", plan)
    taken = mock.Mock(wraps=example.distill_means)
    monkeypatch.setattr(example, "distill_means", taken)
    report = run(
        example,
        *("--route=means", "--images_per_class=2", "--steps=2", "--l2_norm=0.5"),
        *("--damping_rank=20", "--learning_rate=0.1", "--convnet_epochs=0"),
    )
    asked = {"images_per_class": 2, "steps": 2, "l2_norm": 0.5}
    asked |= {"damping_rank": 20, "learning_rate": 0.1}
    assert taken.call_args.kwargs["settings"] == plan(**asked)
    assert report["statement"]["unit"] == "RECORD"
    assert report["statement"]["details"]["l2_norm"] == 0.5


LINEAR = ("--route=linear", "--steps=3", "--damping_rank=10", "--synthesis_steps=2")
MEANS = ("--route=means", "--steps=2", "--damping_rank=10")
FEW = ("--images_per_class=2", "--convnet_epochs=0", "--seed=1")


@pytest.fixture
def small(monkeypatch):
    """Makes both routes small enough for the images at hand."""
    sizes = {"networks": 2, "filters": 8, "candidates": 300}
    sizes |= {"public_images": 150, "directions": 120}
    plan = functools.partial(example.MeanMatching, **sizes)
    monkeypatch.setattr(example, "MeanMatching", plan)
    kernel = InterceptKernel(ScatteringKernel((8, 8, 1), groups=1, scale=1))
    monkeypatch.setattr(example, "make_kernel", lambda _: kernel)
    settings = example.settings

    def fewer(dataset):
        return dataclasses.replace(settings(dataset), public_images=200)

    monkeypatch.setattr(example, "settings", fewer)


@pytest.mark.parametrize("route", [LINEAR, MEANS])
def test_other_images_are_made_of_what_was_released_at_no_cost(
    run, small, monkeypatch, tmp_path, route
):
    folder = tmp_path / "out"
    first = run(example, *route, *FEW)
    assert {path.name for path in folder.iterdir()} == IMAGE_FILES | KEPT_FILES
    images = DistilledDataset.load(folder).images
    kept = {name: (folder / name).read_bytes() for name in KEPT_FILES}
    spent = mock.Mock()
    monkeypatch.setattr(RecordSums, "begin", spent)
    monkeypatch.setattr(example, "private_features", spent)
    again = run(example, *route, *FEW, "--resume")
    np.testing.assert_array_equal(DistilledDataset.load(folder).images, images)
    assert again["accuracy"] == first["accuracy"]
    more = run(example, *route, *FEW, "--images_per_class=3", "--resume")
    spent.assert_not_called()
    assert len(DistilledDataset.load(folder)) == 6
    assert more["statement"] == again["statement"] == first["statement"]
    assert {name: (folder / name).read_bytes() for name in KEPT_FILES} == kept


@pytest.mark.parametrize(
    ("route", "given", "name"),
    [
        (LINEAR, ("--epsilon=2",), "epsilon"),
        (LINEAR, ("--steps=4",), "steps"),
        (MEANS, LINEAR, "route"),
        (MEANS, ("--l2_norm=0.5",), "l2_norm"),
        (MEANS, ("--seed=2",), "seed"),
    ],
)
def test_a_release_of_other_flags_is_not_gone_on_with(
    configure, run, small, tmp_path, route, given, name
):
    (tmp_path / "out").mkdir()
    configure(example, *route, *FEW)
    kept = {name: getattr(example.FLAGS, name) for name in example.OF_RELEASE["linear"]}
    (tmp_path / "out" / "run.json").write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=f"`{name}`.*in the run that is resumed"):
        run(example, *route, *FEW, *given, "--resume")


@pytest.mark.parametrize("content", [None, "[]", "{"])
def test_without_a_release_there_is_nothing_to_go_on_with(
    run, small, tmp_path, content
):
    if content is not None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "run.json").write_text(content)
    with pytest.raises(ValueError, match="`resume`.*run.json.*a new run"):
        run(example, *LINEAR, *FEW, "--resume")


def test_an_interrupted_run_goes_on_with_what_was_paid_for(
    configure, run, small, monkeypatch, tmp_path, capsys
):
    whole = run(example, *LINEAR, *FEW)
    with monkeypatch.context() as broken:
        module = importlib.import_module("dp_transcribe.distillation.distill")
        broken.setattr(module, "synthesize", mock.Mock(side_effect=KeyboardInterrupt))
        configure(example, *LINEAR, *FEW, f"--output_dir={tmp_path / 'new'}")
        with pytest.raises(SystemExit) as stopped:
            example.main(["distill"])
    assert stopped.value.code == EXIT_INTERRUPTED
    assert "--resume goes on" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "new").iterdir()} == KEPT_FILES
    again = run(example, *LINEAR, *FEW, f"--output_dir={tmp_path / 'new'}", "--resume")
    assert again["accuracy"] == whole["accuracy"]
    assert again["statement"] == whole["statement"]


def test_an_interrupted_save_is_made_up_for(configure, small, tmp_path, capsys):
    configure(example, *LINEAR, *FEW)
    saving = example.LinearRelease.save
    broken = mock.Mock(side_effect=[KeyboardInterrupt, None])

    def save(self, folder):
        broken()
        saving(self, folder)

    with mock.patch.object(example.LinearRelease, "save", save):
        with pytest.raises(SystemExit):
            example.main(["distill"])
    assert "--resume goes on" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == KEPT_FILES


def test_what_cannot_be_kept_is_told(configure, small, monkeypatch, capsys):
    configure(example, *LINEAR, *FEW)
    full = mock.Mock(side_effect=OSError("No space left on device"))
    monkeypatch.setattr(example.LinearRelease, "save", full)
    with pytest.raises(SystemExit) as stopped:
        example.main(["distill"])
    assert stopped.value.code == EXIT_REFUSED
    assert "budget is spent" in capsys.readouterr().err


def test_an_interrupted_resumption_says_that_the_release_is_there(
    configure, run, small, monkeypatch, tmp_path, capsys
):
    run(example, *LINEAR, *FEW)
    configure(example, *LINEAR, *FEW, "--resume")
    make = mock.Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(example, "images_of_model", make)
    with pytest.raises(SystemExit) as stopped:
        example.main(["distill"])
    assert stopped.value.code == EXIT_INTERRUPTED
    assert "--resume goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fails", "message", "left"),
    [
        ("private_features", "Nothing was written", set()),
        ("measure", "images are written", IMAGE_FILES - {"report.json"}),
    ],
)
def test_an_interruption_is_told_and_says_what_there_is(
    configure, monkeypatch, tmp_path, capsys, fails, message, left
):
    configure(example, *DPKIP, *FEW)
    monkeypatch.setattr(example, fails, mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit) as stopped:
        example.main(["distill"])
    assert stopped.value.code == EXIT_INTERRUPTED
    assert message in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == left


def test_an_interrupted_dpkip_gives_the_images_so_far(run, monkeypatch, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "released.npz").write_text("of another route")  # paid for
    steps = example.DPKIP.train_step
    count = mock.Mock(side_effect=[None, None, KeyboardInterrupt])

    def step(self, *arguments):
        count()
        return steps(self, *arguments)

    monkeypatch.setattr(example.DPKIP, "train_step", step)
    report = run(example, *DPKIP, *FEW, "--steps=40")
    assert {path.name for path in folder.iterdir()} == IMAGE_FILES | {"released.npz"}
    assert 0.0 < report["statement"]["epsilon"] < 0.9
    assert len(DistilledDataset.load(folder)) == 4


def test_validation_reads_no_test_image(run, monkeypatch):
    seen = {}
    monkeypatch.setitem(
        example.BY_ROUTE,
        "dpkip",
        lambda dataset, *_: seen.update(dataset=dataset) or sys.exit("seen"),
    )
    with pytest.raises(SystemExit, match="seen"):
        run(example, *DPKIP, "--validate")
    held = seen["dataset"]
    assert len(held.train_images) == 480 and len(held.test_images) == 120
    np.testing.assert_array_equal(held.test_images, DATASET.train_images[480:])
    np.testing.assert_array_equal(held.test_labels, DATASET.train_labels[480:])


def test_the_linear_route_takes_the_settings_of_the_flags(run, monkeypatch):
    asked = {}

    def distill(*_, settings, features, **__):
        asked.update(settings=settings, features=features)
        raise ValueError("stop")

    monkeypatch.setattr(example, "distill", distill)
    monkeypatch.setattr(
        example, "embed_in_batches", lambda _, x, verbose: x.reshape(len(x), -1)
    )
    with pytest.raises(ValueError, match="stop"):
        run(
            example, "--steps=7", "--learning_rate=3", "--l2_norm=0.5",
            "--damping_rank=9", "--images_per_class=4", "--synthesis_steps=5",
        )  # fmt: skip
    plan = asked["settings"]
    assert (plan.training.steps, plan.training.learning_rate) == (7, 3.0)
    assert (plan.training.l2_norm, plan.damping_rank) == (0.5, 9)
    assert (plan.synthesis.images_per_class, plan.synthesis.steps) == (4, 5)
    assert len(asked["features"]) == 600


@pytest.mark.parametrize(
    ("name", "inner", "tag"),
    [
        ("mnist", ScatteringKernel((8, 8, 1)), ""),
        ("cifar10", MirroredKernel(ScatteringKernel((8, 8, 1))), "-mirrored"),
    ],
)
def test_one_kernel_distils_and_classifies(
    run, monkeypatch, tmp_path, name, inner, tag
):
    used = {}

    def embed(kernel, images, verbose):
        used["embeds"] = kernel
        return images.reshape(len(images), -1)

    def distill(*_, kernel, **__):
        used["distils"] = kernel
        return mock.MagicMock(), None

    def measure(_, dataset, kernel, watch):
        used["classifies"] = kernel
        raise ValueError("stop")

    dataset = dataclasses.replace(DATASET, name=name)
    monkeypatch.setattr(example, "load_dataset", lambda *_: dataset)
    monkeypatch.setattr(example, "embed_in_batches", embed)
    monkeypatch.setattr(example, "distill", distill)
    monkeypatch.setattr(example, "measure", measure)
    with pytest.raises(ValueError, match="stop"):
        run(example, f"--cache_dir={tmp_path / 'cache'}")
    assert used["embeds"] == inner
    assert used["distils"] == InterceptKernel(inner)
    assert used["classifies"] is used["distils"]
    (kept,) = (tmp_path / "cache").iterdir()
    digest = hashlib.sha256(dataset.train_images.tobytes()).hexdigest()[:12]
    assert kept.name == f"{name}-made-scattering{tag}-{digest}.npy"


def test_kept_features_are_of_the_images_at_hand(configure, monkeypatch, tmp_path):
    configure(example, "--kernel=rbf")
    embed = mock.Mock(
        side_effect=lambda _, images, verbose: images.reshape(len(images), -1)
    )
    monkeypatch.setattr(example, "embed_in_batches", embed)
    # The first record has withdrawn, and the labels moved up with the images.
    rest = dataclasses.replace(
        DATASET,
        train_images=DATASET.train_images[1:],
        train_labels=DATASET.train_labels[1:],
    )
    for dataset in (DATASET, rest, DATASET, example.hold_out(DATASET)):
        monkeypatch.setattr(example, "load_dataset", lambda *_, d=dataset: d)
        kept = example.private_features(dataset, RBFKernel(), str(tmp_path))
        images = dataset.train_images
        np.testing.assert_array_equal(kept, images.reshape(len(images), -1))
    assert embed.call_count == len(list(tmp_path.iterdir())) == 3


def test_kept_features_are_for_the_owner_alone(configure, tmp_path):
    configure(example, "--kernel=rbf")
    example.private_features(DATASET, RBFKernel(), str(tmp_path))
    (kept,) = tmp_path.iterdir()
    assert kept.stat().st_mode & 0o077 == 0


def test_features_are_never_kept_in_part(configure, monkeypatch, tmp_path):
    configure(example, "--kernel=rbf")

    def half(path, array):
        Path(path).write_bytes(array.tobytes()[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(example.np, "save", half)
    with pytest.raises(KeyboardInterrupt):
        example.private_features(DATASET, RBFKernel(), str(tmp_path))
    monkeypatch.undo()
    configure(example, "--kernel=rbf")
    kept = example.private_features(DATASET, RBFKernel(), str(tmp_path))
    assert len(kept) == len(DATASET.train_images)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("--epsilon=0",), "epsilon"),
        (("--delta=1",), "delta"),
        (("--kernel=rbf",), "kernel"),
        ((*DPKIP, "--bounded=features"), "bounded"),
        ((*DPKIP, "--sampling=2"), "sampling_probability"),
        ((*DPKIP, "--taught_epochs=1"), "taught_epochs"),
        ((*DPKIP, "--synthesis_steps=5"), "synthesis_steps"),
        ((*DPKIP, "--damping_rank=5"), "damping_rank"),
        (("--bounded=pixels",), "bounded"),
        (("--sampling=0.1",), "sampling"),
        (("--route=means", "--synthesis_steps=5"), "synthesis_steps"),
        (("--route=means", "--cache_dir=kept"), "cache_dir"),
        ((*DPKIP, "--resume"), "resume"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_nothing_is_spent(
    run, monkeypatch, arguments, name
):
    spent = mock.Mock()
    monkeypatch.setattr(RecordSums, "begin", spent)
    with pytest.raises(ValueError, match=f"`{name}`"):
        run(example, *arguments)
    spent.assert_not_called()


def test_a_refusal_is_one_line(configure, capsys):
    configure(example, "--epsilon=-1")
    with pytest.raises(SystemExit) as stopped:
        example.main(["distill"])
    assert stopped.value.code == EXIT_REFUSED
    (line,) = capsys.readouterr().err.splitlines()
    assert "epsilon" in line


def test_table_report_and_files(run, tmp_path):
    report = run(table, "--epsilon=20", "--delta=1e-4", "--steps=20", "--seed=1")
    assert {path.name for path in (tmp_path / "out").iterdir()} == TABLE_FILES
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert report["rows"] == {"real": 426, "distilled": 10}
    assert report["statement"]["unit"] == "RECORD"
    assert set(report["real"]) == set(report["distilled"])
    assert report["distilled"]["logistic regression"]["roc_auc"] > 0.9
    assert report["real"]["logistic regression"]["pr_auc"] > 0.95
