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
    ours = next((name for name in ("mi-dmsgd", "pc-dmsgd") if consensus_growth(name, top, 0.95) < 1), None)
    assert [name for name in ("mi-dmsgd", "pc-dmsgd") if f"method={name!r}" in text] == [ours] * (ours is not None)
    if "momentum=" in text:
        beta = float(text.split("momentum=")[1].split(" ")[0])
        assert 0 < beta < 0.95 and consensus_growth("decentlam", top, beta) < 1


def test_mi_dmsgd_is_named_first_under_the_schedule_of_the_refused():
    """Then pc-dmsgd, which is also what mi-dmsgd itself is told where a user's own correction rate is unstable."""
    top = topology.one_peer_exponential(8)
    for rule in (rules.decentlam, rules.decentlam.under("awc"), rules.d2_dmsgd):
        text = stability.remedies(rule, top, 0.9, 1.1)
        assert "method='mi-dmsgd', which is stable here" in text and "pc-dmsgd" not in text
    for rule in (rules.mi_dmsgd, rules.mi_dmsgd.under("awc")):
        factor = consensus_growth(rule, topology.exponential(16), 0.9, correction_rate=1.0)
        text = stability.remedies(rule, topology.exponential(16), 0.9, factor, correction_rate=1.0)
        assert factor > 1 and "method='pc-dmsgd', which is stable here" in text and "mi-dmsgd'," not in text


def test_names_are_not_topologies():
    with pytest.raises(TypeError, match="needs a Topology"):
        consensus_growth("dsgd", "ring")
