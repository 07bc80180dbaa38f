"""What is installed is the whole package, under pins that fit each other."""

import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dp_transcribe"


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel of a copy of the source tree, built without a network."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    for name in ("dp_transcribe", "tests", "serving"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
        + ["--no-index", "--wheel-dir", str(source / "dist"), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(built)


@pytest.fixture(scope="module")
def metadata(wheel):
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def pins() -> dict[str, str]:
    """The versions of constraints.txt, by normalized name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    parts = (line.split("==") for line in lines if not line.startswith("#"))
    return {name: version for name, version in parts}


def test_wheel_holds_every_module_and_nothing_else(wheel):
    installed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {str(p.relative_to(ROOT)) for p in PACKAGE.rglob("*.py")}
    assert installed == expected | {"dp_transcribe/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_every_folder_with_modules_is_a_package():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [str(f) for f in folders if not (f / "__init__.py").exists()] == []


def test_a_plain_install_imports_from_anywhere(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); "
        "import dp_transcribe; print(dp_transcribe.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "site")


def test_what_is_saved_loads_where_the_package_is_imported():
    """Keras finds a class only when its module was imported."""
    program = "import sys, dp_transcribe; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    registering = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in PACKAGE.rglob("*.py")
        if "@keras.saving.register_keras_serializable" in path.read_text("utf-8")
    }
    assert "dp_transcribe.transcriber.model" in registering
    assert registering <= set(done.stdout.split()), done.stderr


def test_version_and_python_range(metadata):
    source = (PACKAGE / "_version.py").read_text(encoding="utf-8")
    assert f'__version__ = "{metadata["Version"]}"' in source
    supported = SpecifierSet(metadata["Requires-Python"])
    assert "3.11.9" in supported
    assert "3.10.14" not in supported and "3.12.1" not in supported


def test_constraints_pin_every_requirement_inside_its_range(metadata):
    pinned = pins()
    assert all(re.fullmatch(r"[\w.]+", version) for version in pinned.values())
    requirements = [Requirement(r) for r in metadata.get_all("Requires-Dist")]
    assert len(requirements) > 10
    for requirement in requirements:
        version = pinned[normalized(requirement.name)]
        assert requirement.specifier.contains(version), requirement
        # A name alone, or an open lower bound, would leave the version to luck.
        assert requirement.specifier, requirement


def test_every_extra_is_declared(metadata):
    extras = set(metadata.get_all("Provides-Extra"))
    assert extras == {"gpu", "examples", "serving", "test", "dev", "docs"}
