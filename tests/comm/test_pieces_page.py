"""Promises of fused_dlam/comm/pieces.md: its examples run on four ranks, and give what they say; its links lead on."""

import re

import page_workers
import pytest
import torch

from fused_dlam.tools.launch import run_workers

N = 4


def test_the_examples_run():
    for rank, (blocks, got) in enumerate(run_workers(page_workers.run, N, deadline=120)):
        left = (rank - 1) % N
        assert blocks == 11
        for name in ("mean", "estimate"):
            torch.testing.assert_close(got[name], torch.tensor([1.5]), rtol=1e-6, atol=0)
        assert got["mass"] == pytest.approx(1.0, rel=1e-14)
        assert got["total"].item() == rank + left and got["extrapolated"].item() == 1.5 * rank - 0.5 * left
        assert list(got["theirs"]) == [left] and torch.equal(got["theirs"][left], torch.full((left, 2), left))
        assert got["halved"].item() == (0.5 if rank < 2 else rank)
        assert got["of_machines"].item() == 1.5  # the mean of two machines' means
        ring = [rank, left, (rank - 2) % N]  # exponential: offsets 0, 1 and 2
        assert got["first"].item() == pytest.approx(sum(ring) / 3, rel=1e-6)
        assert got["second"].item() == pytest.approx(sum(r * r for r in ring) / 3, rel=1e-6)
        torch.testing.assert_close(got["z"], torch.tensor([0.95]))
        assert "rank 2 lists rank 1 as a source, and rank 1 does not send to it" in got["said"]
        around = (rank + left + (rank + 1) % N) / 3
        assert got["after"].item() == pytest.approx(around, rel=1e-6)


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", page_workers.PAGE.read_text(encoding="utf-8"))
    assert links and all((page_workers.PAGE.parent / link).exists() for link in links)
