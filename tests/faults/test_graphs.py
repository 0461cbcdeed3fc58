"""The graph of another number of workers. Promise: the same family where it exists and the method is stable, else the
first substitute that is, alike on all workers; what cannot go on is refused at construction."""

import pytest

from fused_dlam import rules, topology
from fused_dlam.comm.generation import store_address
from fused_dlam.optim.succession import SUBSTITUTES, Succession
from fused_dlam.optim.survival import Survival

GROUP = {"momentum": 0.9}


def graphs(family, method="mi-dmsgd", schedule="auto"):
    rule = rules.get(method).under(schedule)
    return Succession(family, rule, groups=lambda: [{**GROUP, **rule.defaults({})}])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 8])
def test_the_family_stays_where_it_exists(n):
    assert graphs("ring")(n).name == topology.ring(n).name
    assert graphs(lambda n: topology.ring(n).every(4))(n).period in (1, 4)


def test_a_family_that_does_not_exist_has_a_substitute():
    of = graphs("one-peer-hypercube")
    assert of(8).name == "one-peer-hypercube"
    assert [of(n).name for n in (7, 6, 5, 3)] == ["one-peer-exponential"] * 4


@pytest.mark.parametrize("at_7", [lambda: {}[7], lambda: 1 / 0, lambda: None])
def test_a_function_that_fails_has_a_substitute(at_7, caplog):
    """It is called in the middle of a recovery, where an error of its own would end all who are left."""
    of = graphs(lambda n: topology.ring(n) if n == 8 else at_7())
    of.look_ahead(8)
    assert of(8).name == topology.ring(8).name and of(7).name == "one-peer-exponential"
    (said,) = [r.getMessage() for r in caplog.records if "given as topology" in r.getMessage()]
    assert "no graph for 7 workers (" in said and any(e in said for e in ("KeyError: 7", "ZeroDivision", "TypeError"))


def test_an_unstable_one_has_a_substitute():
    """DecentLaM has no one-peer graph at momentum 0.9: the symmetric one is next."""
    of = graphs("symmetric-exponential", "decentlam")
    assert {of(n).name for n in (8, 7, 5)} == {"symmetric-exponential"}
    assert graphs("hypercube", "decentlam")(6).name == "symmetric-exponential"


def test_every_number_has_a_graph():
    for method in ("mi-dmsgd", "pc-dmsgd", "decentlam", "qg-dmsgd", "exact-diffusion"):
        for n in range(1, 12):
            assert graphs("hypercube", method)(n).n == n
    assert SUBSTITUTES[-1] == "full"


def test_a_topology_of_one_number_is_refused():
    with pytest.raises(ValueError, match="a function of the number of workers"):
        Succession(topology.ring(4), None)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"on_failure": "ignore"}, "must be 'raise' or 'continue'"),
        ({"min_workers": 0}, "from 1 on"),
        ({"min_workers": True}, "from 1 on"),
        ({"admit_every": -1}, "from 0 on"),
        ({"admit_every": 2.5}, "from 0 on"),
        ({"on_members_changed": "print"}, "a function of the new members"),
    ],
)
def test_options(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        Survival(**options)


@pytest.mark.parametrize("address", ["nonsense", ":29500", "host:", "host:http", "host:0", "host:65536", "host:-1"])
def test_an_address_of_the_store(address, monkeypatch):
    monkeypatch.setenv("FUSED_DLAM_STORE", address)
    with pytest.raises(ValueError, match=f"must be HOST:PORT, .*, not '{address}'"):
        store_address()
    monkeypatch.setenv("FUSED_DLAM_STORE", "[::1]:29500")
    assert store_address() == ("::1", 29500)
