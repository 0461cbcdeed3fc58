"""Promises about what topology functions are given: NumPy's integers are integers, and what makes no sense is refused
by a sentence."""

import math

import numpy as np
import pytest

from fused_dlam import topology
from fused_dlam.topology import FAMILY, RandomTopology, identity


@pytest.mark.parametrize("name", FAMILY)
def test_numpys_integers_are_integers(name):
    plain, numpys = FAMILY[name](8), FAMILY[name](np.int64(8))
    assert type(numpys.n) is int and repr(plain) == repr(numpys) and plain.fingerprint == numpys.fingerprint
    assert topology.get(name, np.int32(8)).fingerprint == plain.fingerprint


@pytest.mark.parametrize("name", FAMILY)
def test_numbers_of_workers_that_make_no_sense(name):
    for n in (0, -1, 2.0, math.nan, True, "8", None):
        with pytest.raises(ValueError, match="the number of workers must be an integer >= 1, not"):
            FAMILY[name](n)
        with pytest.raises(ValueError, match="the number of workers must be an integer >= 1, not"):
            topology.get(name, n)


def test_other_integers():
    assert topology.base_k(9, np.int64(2)).name == topology.base_k(9, 2).name
    assert topology.exponential(9, np.int64(3)).fingerprint == topology.exponential(9, 3).fingerprint
    again = topology.inner_outer_exponential(np.int64(12), np.int64(4))
    assert again.fingerprint == topology.inner_outer_exponential(12, 4).fingerprint
    for make, *arguments in (
        (topology.base_k, 9, 1.5), (topology.exponential, 9, 1), (topology.exponential, 9, "2"),
        (topology.d_equistatic, 9, 0), (topology.u_equistatic, 9, 2.5), (topology.inner_outer_exponential, 12, True),
        (topology.od_equidyn, 8, "0.5"), (topology.ou_equidyn, 8, math.nan), (topology.random_match, 8, -1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="must be"):
            make(*arguments)


def test_random_topologies():
    def draw(step):
        return identity(1)

    for n in (0, -1, 1.5, None):
        with pytest.raises(ValueError, match="the number of workers must be"):
            RandomTopology(draw, n, 1)
    with pytest.raises(ValueError, match="the degree must be an integer >= 0, not -1"):
        RandomTopology(draw, 1, -1)
    with pytest.raises(TypeError, match="draw must be a function of the step, not NoneType"):
        RandomTopology(None, 3, 1)


def test_graphs():
    for wrong in (None, "ring", np.eye(3), [(0, 1)]):
        for make in (topology.from_networkx, topology.metropolis_hastings):
            with pytest.raises(TypeError, match="a networkx.Graph or DiGraph is needed, not"):
                make(wrong)


def test_names_that_are_almost_right():
    for wrong, meant in (("one_peer_exponential", "one-peer-exponential"), ("Ring", "ring"), ("hypercub", "hypercube")):
        with pytest.raises(ValueError, match=f"unknown topology '{wrong}'; known: full, .*. Did you mean '{meant}'?"):
            topology.get(wrong, 8)
    with pytest.raises(ValueError, match=r"\(or pass a Topology\)$"):
        topology.get("moebius", 8)
