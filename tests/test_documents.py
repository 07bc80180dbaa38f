"""The Python in the documents compiles, fits the package and runs."""

import ast
import functools
import importlib
import inspect
import re
import typing
from pathlib import Path

import keras
import pytest

import dp_transcribe as dpt
from dp_transcribe import methods, wavelets
from dp_transcribe.distillation import (
    Distillation,
    DistilledDataset,
    LinearTraining,
    ScatteringKernel,
)
from dp_transcribe.generators import MLPGenerator
from dp_transcribe.queries import QueryPool
from dp_transcribe.reference_teachers import WaveletRecipe

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (16, 16, 1)
DOCUMENTS = [ROOT / "README.md", ROOT / "serving" / "README.md"]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))


def blocks(document):
    """The fenced Python of a document, one after the other."""
    return re.findall(
        r"^```python\n(.*?)^```", document.read_text("utf-8"), re.S | re.M
    )


def calls_in_text(document):
    """What the text or a table names of the package, such as `dpt.srr(...)`."""
    return re.findall(r"(?<!`)`(dpt\.[^`]+)`(?!`)", document.read_text("utf-8"))


class Checker(ast.NodeVisitor):
    """Finds every name of the package, and binds every call to its signature.

    Of variables it knows what a call that they are assigned from returns.

    Args:
        types: classes of variables that are there already, by their names.
    """

    def __init__(self, types=()):
        self.names = {"dpt": dpt}
        self.types = dict(types)
        self.bound = 0

    def visit_Import(self, node):
        for alias in node.names:
            module = importlib.import_module(alias.name)
            self.names[alias.asname or alias.name] = module

    def visit_ImportFrom(self, node):
        module = importlib.import_module(node.module)
        for alias in node.names:
            self.names[alias.asname or alias.name] = getattr(module, alias.name)

    def visit_Assign(self, node):
        self.visit(node.value)
        made = self.returned(node.value)
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.types.pop(target.id, None)
                if made is not None:
                    self.types[target.id] = made

    def visit_Attribute(self, node):
        if self.owner(node) is None:  # what an instance holds is set when it is made
            self.resolve(node)
        self.generic_visit(node)

    def visit_Call(self, node):
        self.generic_visit(node)
        function = self.resolve(node.func)
        if function is None:
            return
        method = not isinstance(function, type) and self.owner(node.func) is not None
        given = [object()] * (len(node.args) + method)
        keywords = {word.arg: object() for word in node.keywords}
        inspect.signature(function).bind(*given, **keywords)
        self.bound += 1

    def resolve(self, node):
        """What an expression names, None if that is not known."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if not isinstance(node, ast.Attribute):
            return None
        owner = self.owner(node) or self.resolve(node.value)
        return None if owner is None else getattr(owner, node.attr)

    def owner(self, node):
        """The class whose method `variable.method` is."""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            return self.types.get(node.value.id)
        return None

    def returned(self, node):
        """The class of what a call returns."""
        function = self.resolve(node.func) if isinstance(node, ast.Call) else None
        if function is None or isinstance(function, type):
            return function
        made = typing.get_type_hints(function).get("return")
        return made if isinstance(made, type) else None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.parent.name)
def test_what_is_written_fits_the_package(document):
    checker = Checker()
    for source in [*blocks(document), *calls_in_text(document)]:
        checker.visit(ast.parse(source))


def test_the_readme_is_read():
    checker = Checker()
    for source in blocks(ROOT / "README.md"):
        checker.visit(ast.parse(source))
    assert len(blocks(ROOT / "README.md")) >= 5
    assert checker.bound >= 15
    assert checker.types["transcriber"] is dpt.DPTranscriber
    assert len(calls_in_text(ROOT / "README.md")) >= 5


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("dpt.dpdfdd(teacher, prior)", AttributeError),
        ("dpt.dpdfd(teacher, prior, pool=3)", TypeError),
        ("dpt.dpdfd(teacher)", TypeError),
        ("x = dpt.dpdfd(teacher, prior)\nx.statement()", AttributeError),
        ("x = dpt.load_teacher('a')\nx.predict()", TypeError),
        ("from dp_transcribe.generators import nothing", AttributeError),
        ("dpt.export_student(dpt.srr(teacher), 'served')", TypeError),
    ],
)
def test_what_does_not_fit_is_found(source, error):
    with pytest.raises(error):
        Checker().visit(ast.parse(source))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.parent.name)
def test_commands_have_the_flags_that_are_written(document):
    text = document.read_text("utf-8").replace("\\\n", " ")
    for name, flags in re.findall(r"(examples/\w+\.py)((?: +--\S+)*)", text):
        source = (ROOT / name).read_text("utf-8")
        for flag in re.findall(r"--(\w+)", flags):
            assert f'"{flag}"' in source, f"{name} --{flag}"


@pytest.fixture
def small(monkeypatch):
    """The same calls in small sizes."""
    fit, pool = dpt.DPTranscriber.fit, QueryPool(size=128, batch_size=32, updates=10)
    short = {"epochs": 1, "steps_per_epoch": 1, "verbose": 0}
    monkeypatch.setattr(
        dpt.DPTranscriber, "fit", lambda self, **given: fit(self, **{**given, **short})
    )
    for owner in (dpt, methods):
        monkeypatch.setattr(owner, "QueryPool", lambda **_: pool)
    monkeypatch.setattr(methods, "ConvGenerator", MLPGenerator)
    monkeypatch.setattr(methods, "pretrain", lambda *_, **__: None)
    monkeypatch.setattr(methods, "REPLAY_SIZE", 2048)
    monkeypatch.setattr(wavelets, "PUBLIC_IMAGES", 1100)
    recipe = WaveletRecipe(directions=50, units=(8,), epochs=1, min_steps=1)
    settings = Distillation(
        training=LinearTraining(steps=2, accountant="rdp"),
        public_images=150,
        damping_rank=20,
    )
    for name, given in (
        ("train_wavelet_teacher", {"recipe": recipe}),
        ("fit_scattering_teacher", {"settings": settings}),
    ):
        patched = functools.partial(getattr(dpt, name), **given)
        monkeypatch.setattr(dpt, name, patched)


def network():
    """Images to logits."""
    layers = [keras.layers.Input(SHAPE), keras.layers.Flatten()]
    return keras.Sequential([*layers, keras.layers.Dense(10)])


@pytest.mark.slow
def test_the_readme_runs(small, mnist_small, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    network().save("teacher.keras")
    images = mnist_small.train_images[:200, 6:22, 6:22]
    labels = mnist_small.train_labels[:200]
    public = {
        "images": images,
        "labels": labels,
        "student": network(),
        "generator": MLPGenerator(SHAPE),
        "network": network(),
        "kernel": ScatteringKernel(SHAPE),
    }
    for source in blocks(ROOT / "README.md"):
        if "distilled" in source:
            teacher = public["teacher"]
            public["distilled"] = DistilledDataset(
                images, labels, 10, teacher.statement
            )
        exec(source, public)
    assert "does NOT protect a" in capsys.readouterr().out
    assert Path("served/1/saved_model.pb").exists()
    assert Path("private_teacher.statement.json").exists()
