"""Promises of README: one sitting long, its links lead somewhere, and its training script trains and resumes."""

import re

import pytest
import readme_workers
from readme_workers import ROOT

from fused_dlam.tools.launch import run_workers

PAGES = [ROOT / "README.md", *(p for p in sorted(ROOT.glob("*/**/README.md")) if "fused_dlam/kernels" not in str(p))]


def test_one_sitting():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    assert links or page.parent != ROOT
    for link in links:
        assert link.startswith("http") or (page.parent / link).exists(), link


def test_the_training_script(tmp_path):
    """Three workers train, rank 0 saves their mean, all save and load: what was loaded is what was there."""
    assert run_workers(readme_workers.script, 3, str(tmp_path)) == [True] * 3
