"""Promises about the advice of a refusal: every remedy that it names has a growth below one."""

import warnings

import pytest
from hard_graphs import matchings, row_stochastic

from fused_dlam import consensus_growth, rules, topology
from fused_dlam.theory import stability


@pytest.mark.parametrize(
    "top", [topology.one_peer_exponential(8), topology.exponential(8), matchings(8, 6), row_stochastic(5, 4)], ids=repr
)
def test_remedies_are_true(top):
    """What a refusal recommends has a growth below one; a graph that cannot be symmetrized is no obstacle."""
    growth = consensus_growth("decentlam", top, 0.95)
    assert growth > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = stability.remedies(rules.decentlam, top, 0.95, growth)
    assert f"{growth:.4f}-fold" in text and repr(top.name) in text and f"{top.n} workers" in text
    assert ("pc-dmsgd" in text) == (consensus_growth("pc-dmsgd", top, 0.95) < 1)
    if "momentum=" in text:
        beta = float(text.split("momentum=")[1].split(" ")[0])
        assert 0 < beta < 0.95 and consensus_growth("decentlam", top, beta) < 1


def test_names_are_not_topologies():
    with pytest.raises(TypeError, match="needs a Topology"):
        consensus_growth("dsgd", "ring")
