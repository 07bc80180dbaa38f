"""The site of the documents: its pages are there, and name what the package has."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dp_transcribe as dpt

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
MISSING = [
    name for name in ("mkdocs", "mkdocstrings") if not importlib.util.find_spec(name)
]


def test_every_page_is_in_the_navigation():
    config = (ROOT / "mkdocs.yml").read_text("utf-8")
    listed = re.findall(r"^  - \w+: (\S+\.md)$", config, re.M)
    assert set(listed) == {path.name for path in DOCS.glob("*.md")}


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda path: path.stem)
def test_links_lead_to_pages(page):
    links = re.findall(r"\]\(([^)#:]+)[^)]*\)", page.read_text("utf-8"))
    assert [link for link in links if not (DOCS / link).is_file()] == []


def test_every_public_name_is_described():
    text = (DOCS / "api.md").read_text("utf-8")
    described = re.findall(r"^::: dp_transcribe\.(\w+)$", text, re.M)
    public = [name for name in dpt.__all__ if callable(getattr(dpt, name))]
    assert sorted(described) == sorted(public)


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"without {' and '.join(MISSING)}")
def test_the_site_is_built_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"]
        + ["--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "DPTranscriber" in (tmp_path / "site" / "api" / "index.html").read_text()
