"""Promise: MI-DmSGD keeps all-reduce's range of learning rates for equal curvature at momentum 0.95 to 0.999 too."""

import pytest

from fused_dlam import rate_limit, topology


@pytest.mark.parametrize("graph", [topology.one_peer_exponential(n) for n in (3, 4, 8, 16, 64, 1024)] + [
    topology.base_k(12), topology.get("one-peer-ring", 8), topology.get("one-peer-hypercube", 16),
    topology.one_peer_exponential(8).every(4), topology.exponential(5), topology.get("one-way-ring", 8),
], ids=lambda g: f"{g.name} {g.n}")  # fmt: skip
def test_high_momentum_keeps_the_range(graph):
    """Equal curvature: 0.999 of all-reduce's range from beta 0.95 to 0.999, with what "auto" takes."""
    for beta in (0.95, 0.98, 0.99, 0.995, 0.999):
        assert rate_limit("mi-dmsgd", graph, beta) >= 0.999 * 2 * (1 + beta), beta


def test_high_momentum_without_the_last_term():
    """The control: (1-rho)/(1+rho) alone, and 20 (1-beta), lose most of the range at beta 0.99."""
    graph = topology.one_peer_exponential(16)
    e = (1 - graph.slowest_rho) / (1 + graph.slowest_rho)
    assert 0.4 < rate_limit("mi-dmsgd", graph, 0.99, correction_rate=e) < 0.5
    assert 0.4 < rate_limit("mi-dmsgd", graph, 0.99, correction_rate=min(e, 20 * 0.01)) < 0.5
