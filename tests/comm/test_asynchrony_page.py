"""Promise of fused_dlam/comm/asynchrony.md: its examples run as they stand, and do what it says; its links are right.

- asynchronous push-sum by ranks that take unequal numbers of steps: nothing is lost, and all are between all they had;
- a training with unequal numbers of batches: all evaluate one mean, what is saved belongs together, masses sum to n.
"""

import re
from pathlib import Path

import mailbox_workers
import pytest
import torch
from workers import run_together

import fused_dlam

PAGE = Path(fused_dlam.__file__).parent / "comm/asynchrony.md"
N = 3


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    consensus, training = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    folder = str(tmp_path_factory.mktemp("page"))
    calls = {"consensus": (mailbox_workers.page, consensus)}
    calls |= {"training": (mailbox_workers.trained_by_the_page, training, folder)}
    return run_together(N, calls, deadline=120.0)


def test_consensus(ran):
    for mean, n, (x, p) in ran["consensus"]:
        assert 0 <= float(mean.min()) and float(mean.max()) <= n - 1  # how near the mean is a matter of time
        assert abs(p - n) < 1e-12 and torch.allclose(x, torch.full_like(x, n * (n - 1) / 2), rtol=0, atol=1e-4)


def test_training(ran):
    for rank, (mean, same, step, _) in enumerate(ran["training"]):
        assert torch.equal(mean, ran["training"][0][0]) and same and step == 10 + 10 * rank
    assert abs(sum(mass for *_, mass in ran["training"]) - N) < 1e-12


def test_links():
    for link in re.findall(r"\]\(([^)#\s]+)\)", PAGE.read_text()):
        assert link.startswith("http") or (PAGE.parent / link).exists(), link
