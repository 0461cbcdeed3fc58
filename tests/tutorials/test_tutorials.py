"""Promises of the tutorials, in small form: figures that anybody would look for are those of the theory.

- the measured rate of consensus is `Topology.rho` to three digits, and one-peer exponential is exact in log2 n steps;
- DGD's bias halves with gamma (1.9 to 2.1), its stable range is that of the eigenvalues, and GossipSGD has its digits;
- exact diffusion comes to the minimum, to 1e-12, by hand and as a method; D2 and gradient tracking too, DSGD does not;
- on a directed graph a pull is off by more than 0.3 and push-sum exact to 1e-12; push-DIGing has the minimum to 1e-12;
- without waiting workers agree to 1e-12, and of the sum of masses, as of that of x, less than 1e-12 is lost;
- worker 0 alone speaks, and every tutorial draws what it found.
"""

import importlib
import math
import re

import pytest
import tutorial_workers as workers

from fused_dlam import topology, tutorials
from fused_dlam.tools.launch import run_workers


@pytest.fixture(scope="module")
def four():
    pytest.importorskip("sklearn")
    return run_workers(workers.four, 4, deadline=120)


@pytest.fixture(scope="module")
def six():
    return run_workers(workers.six, 6, deadline=120)


def test_worker_0_alone_speaks(four, six):
    for ranks in (four, six):
        told = [[one[1] for one in rank.values() if isinstance(one, tuple)] for rank in ranks]
        assert all(map(str.strip, told[0])) and not any("".join(lines) for lines in told[1:])


def test_hello(four):
    found, text = four[0]["hello"]
    assert found["greetings"] == [f"Hello, I am worker {i} of 4." for i in range(4)]
    assert found["after"] == pytest.approx((topology.ring(4).weights() @ range(4)).tolist())
    assert found["means"] == pytest.approx((1.5, 1.5)) and "rank 1 has (3,)" in found["message"]
    assert all(rank["hello"][0]["message"] == found["message"] for rank in four) and found["message"] in text


def test_the_rate_of_consensus_is_rho(four):
    found, text = four[0]["rates"]
    assert len(found) == 6
    for name, one in found.items():
        assert one["rate"] == pytest.approx(one["rho"], abs=5e-4), name
        assert f"{one['rate']:.4f}" in text
    assert found["ring"]["rho"] == pytest.approx(1 / 3) and found["star"]["rho"] == pytest.approx(3 / 4)
    exact, _ = four[0]["exact"]
    assert {name: one["steps"] for name, one in exact.items()} == {"full": 1, "one-peer-exponential": 2}
    assert all(one["errors"][-1] < 1e-15 for one in exact.values())
    assert exact["one-peer-exponential"]["errors"][1] > 0.1


def test_the_bias_of_dgd_halves_with_gamma(four):
    found, _ = four[0]["biases"]
    atc, awc = ([errors[-1] for errors in found[form].values()] for form in ("atc", "awc"))
    assert 1.9 < atc[0] / atc[1] < 2.1 and 1.7 < awc[0] / awc[1] < 2.1
    assert awc[0] > 2 * atc[0] > 0.02


def test_the_stable_range_of_dgd(four):
    found, _ = four[0]["stable"]
    assert found["atc"]["limit"] > 2 * found["awc"]["limit"] > 0.5
    assert all(one["below"] < 1 < one["above"] for one in found.values())


def test_the_optimizer_has_the_digits_of_the_loop(four):
    assert all(difference < 1e-14 for difference in four[0]["optimizer"][0].values())


def test_bias_correction(four):
    by_hand, by_method = four[0]["by hand"][0], four[0]["by method"][0]
    assert by_hand[-1] < 1e-12 and by_method["exact-diffusion"][-1] < 1e-12
    assert by_hand[:60] == pytest.approx(by_method["exact-diffusion"][:60], rel=1e-6)


def test_deep_learning(four):
    found, text = four[0]["learning"]
    parameters = 64 * 64 + 64 + 64 * 10 + 10
    model = 4 * parameters / 1e6  # MB
    steps = 2 * ((1797 - 400) // 4 // 32)
    assert model * steps <= found["ATC, one peer"]["MB"] <= 1.2 * model * steps
    assert found["all-reduce"]["MB"] == pytest.approx(1.5 * found["ATC, one peer"]["MB"], rel=0.1)
    assert all(one["accuracy"][-1] > 50 for one in found.values())
    assert found["all-reduce"]["apart"][0] < 1e-5 < found["ATC, one peer"]["apart"][0]
    assert "0.67 of what all-reduce sends" in text


def test_directed_graphs(six):
    found, text = six[0]["consensus"]
    assert found["pull"][-1] > 0.3 and found["apart"] < 1e-6
    assert found["push-sum"][-1] < 1e-12 and found["push-sum by hand"][-1] < 1e-12
    assert sum(found["masses"]) == pytest.approx(6, abs=1e-12) and max(found["masses"]) > 2 * min(found["masses"])
    assert "seem to be 6.000 workers" in text
    assert six[0]["push-DIGing"] < 1e-12


def test_asynchrony():
    ranks = run_workers(workers.asynchronous, 4, deadline=200)
    for rank in ranks:
        assert rank["worst"] < 1e-12 and max(rank["lost"]) < 1e-12
        (_, first), *_ = rank["log"]
        assert first > 0.1 and rank["together"] == ranks[0]["together"]
        assert all(one["error"] < 1 for one in rank["training"][0].values())
    assert len({rank["steps"] for rank in ranks}) > 1  # each at its own pace
    assert not any(rank["training"][1] for rank in ranks[1:]) and ranks[0]["training"][1]


@pytest.mark.slow
def test_the_whole_of_two_tutorials():
    """Of the others the pages show the figures (test_pages.py)."""
    found = run_workers(workers.whole, 4, "bias_correction", deadline=200)[0]
    stays = {name for name, errors in found.items() if not errors[-1] < 1e-12}
    assert stays == {"dsgd", "mi-dmsgd"} and found["dsgd"][-1] > 100 * found["mi-dmsgd"][-1]
    found = run_workers(workers.whole, 6, "directed", deadline=200)[0]
    assert found["push-DIGing, 0.1"][-1] < 1e-12 and found["optimizer"]["push-diging"] < 1e-12
    assert found["optimizer"]["push-sum"] == pytest.approx(found["descent by push-sum, 0.1"][-1], rel=0.01)
    assert 3 * found["descent by push-sum, 0.025"][-1] < found["descent by push-sum, 0.1"][-1]
    assert found["descent by pull, 0.025"][-1] > 0.02


def test_the_list_of_tutorials():
    """Each is numbered, is for 4 to 8 workers, and says what one does in its own first line."""
    for number, name in enumerate(tutorials.ALL, start=1):
        module = importlib.import_module(f"fused_dlam.tutorials.{name}")
        assert re.match(rf"# {number}\. \w", module.__doc__) and 4 <= module.WORKERS <= 8
        assert callable(module.run) and callable(module.draw)


def test_pictures(four, six, tmp_path):
    pytest.importorskip("matplotlib")
    from fused_dlam.tutorials import consensus, gradient_descent, hello

    consensus_found = {**four[0]["rates"][0], **four[0]["exact"][0]}
    drawn = {hello: four[0]["hello"][0], consensus: consensus_found, gradient_descent: four[0]["biases"][0]}
    for module, found in drawn.items():
        figure = module.draw(found)
        figure.savefig(tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 5_000
    (axes,) = consensus.draw(consensus_found).axes
    measured = [line for line in axes.get_lines() if line.get_linewidth() == 3]
    assert len(measured) == len(consensus_found)
    for line, (name, one) in zip(measured, consensus_found.items(), strict=True):
        assert name in line.get_label() and math.isclose(line.get_ydata()[0], one["errors"][0])
