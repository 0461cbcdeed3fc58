"""Promises about bench/costs.py, cost_fits.py and cost_model.py, and about bench/exchange.py, which measures what they
are fitted to:

- every formula equals a case worked out by hand, and the load on a shared card equals a count of messages;
- a fit to times made from known a and b returns them, to rounding; noise of 5 % moves the rate by less than 5 %;
- both published figures for 256 GPUs: partial averaging is faster;
- a benchmark of two real workers counts what the formula says, checks what arrives, and can be fitted;
- the gate fails when, and only when, a ratio leaves its margin.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

import cost_fits  # noqa: E402
import cost_model  # noqa: E402
import costs  # noqa: E402
import exchange  # noqa: E402
from costs import COSTS, Cost, Link, Network  # noqa: E402

from fused_dlam import topology  # noqa: E402
from fused_dlam.tools.launch import run_workers  # noqa: E402

M = 1e6
LINK = Link(1e-3, 1e8)  # 1 ms a message, 10 ms per 1e6 bytes


@pytest.mark.parametrize(
    "name, n, g, messages, share",
    [
        ("ring all-reduce", 8, 1, 14, 1.75),
        ("tree all-reduce", 8, 1, 6, 1.75),
        ("tree all-reduce", 12, 1, 8, 11 / 6),
        ("one-peer", 8, 1, 1, 1),
        ("one-peer", 100_000, 1, 1, 1),
        ("one-peer", 16, 4, 1, (1 + 2 + 4 + 4) / 4),
        ("exponential", 8, 1, 1, 3),
        ("exponential", 9, 1, 1, 4),
        ("exponential", 16, 4, 1, 11),
        ("ring neighbors", 8, 4, 1, 2),
        ("ring neighbors", 2, 1, 1, 1),
    ],
)
def test_formulas(name, n, g, messages, share):
    """What one worker's card sends, as a share of M, and how many messages follow each other."""
    cost = COSTS[name](n, M, g)
    assert cost.messages == messages and cost.bytes == pytest.approx(share * M, rel=1e-12)
    assert LINK.seconds(cost) == pytest.approx(1e-3 * messages + 1e-2 * share, rel=1e-12)


@pytest.mark.parametrize("n, g", [(5, 1), (12, 1), (16, 4), (12, 4), (24, 8), (64, 8)])
def test_the_load_on_a_shared_card_is_a_count_of_messages(n, g):
    for name, graph in costs.MEASURED.items():
        if name != "all-reduce":
            counted = exchange.card_load(topology.get(name, n), g)
            assert COSTS[graph](n, 1.0, g).bytes == pytest.approx(counted, rel=1e-12), name


def test_hierarchical():
    """4 hosts of 4: 3 messages and 0.75 M per pass inside, 2 passes and 1 for each message that arrives."""
    network = Network("test", LINK, Link(1e-4, 1e9), 4, round_seconds=0.5)
    once = 3e-4 + 0.75e-3
    assert costs.hierarchical("tree all-reduce", 16, M, network) == pytest.approx(2 * once + 4e-3 + 1.5e-2)
    assert costs.hierarchical("one-peer", 16, M, network) == pytest.approx(3 * once + 1e-3 + 1e-2)
    assert costs.hierarchical("exponential", 16, M, network) == pytest.approx(4 * once + 1e-3 + 2e-2)
    seconds = costs.predict(network, 16, M)
    assert seconds["hierarchical one-peer"] == pytest.approx(3 * once + 1e-3 + 1e-2 + 0.5)
    assert seconds["ring all-reduce"] == pytest.approx(30e-3 + 1.875e-2)
    with pytest.raises(ValueError, match="4 on every host"):
        costs.predict(network, 18, M)


def test_a_step_hides_communication_behind_compute():
    """The measured case of 33.6 MB, 8 hosts, 200 Mbit/s and 1.4 s of compute: AWC hides all of it."""
    network = Network("lab", Link(0, 25e6), LINK, 1)
    steps = costs.steps(network, 8, 33.6e6, 1.4)
    expected = {
        "ring all-reduce after backward": 1.4 + 2.352,
        "ring all-reduce overlapped": 1.4 + 2.352 - 1.4 * 2 / 3,
        "one-peer ATC": 1.4 + 1.344 - 1.4 * 2 / 3,
        "one-peer AWC": 1.4,
    }
    for name, seconds in expected.items():
        assert steps[name] == pytest.approx(seconds, rel=1e-9), name


def measured(link, n=8, noise=0.0):
    """What bench/exchange.py would write if the model held, times exp(noise)."""
    random = np.random.default_rng(3)
    rows = [
        {"operation": name, "size": size, "seconds": link.seconds(COSTS[cost](n, size, 1)) * np.exp(noise * z)}
        for (name, cost), zs in zip(costs.MEASURED.items(), random.normal(size=(4, 6)), strict=True)
        for size, z in zip(exchange.SIZES, zs, strict=True)
    ]
    return {"workers": n, "per_host": 1, "rows": rows}


def test_the_fit_recovers_what_made_the_times():
    found = cost_fits.fit_measured(measured(LINK))
    for link in (found["link"], *found["alone"].values()):
        assert link == pytest.approx(LINK, rel=1e-9)
    assert max(abs(r["residual"]) for r in found["residuals"]) < 1e-9
    noisy = cost_fits.fit_measured(measured(LINK, noise=0.05))
    assert noisy["link"].rate == pytest.approx(LINK.rate, rel=0.05)
    assert noisy["link"].latency == pytest.approx(LINK.latency, rel=0.05)
    assert 0.01 < np.std([r["residual"] for r in noisy["residuals"]]) < 0.1


def test_a_fit_is_never_negative():
    assert cost_fits.fit([Cost(1, 1e6), Cost(1, 2e6)], [1.0, 3.0]).latency == 0
    assert cost_fits.fit([Cost(1, 1e6), Cost(1, 2e6)], [1.0, 0.5]).rate == np.inf


def test_direction_of_the_published_figures():
    """Partial averaging is faster for both models, from the ring's own a and b and with a constant per round.

    A constant makes the ratio fall with the size of the model, as published; without it the ratio rises.
    """
    found = cost_fits.fit_published()
    ratio = {
        how: [m[how][1] / m[how][0] for m in found["models"].values()]
        for how in ("published", "from the ring", "from all four")
    }
    assert all(r < 0.6 for both in ratio.values() for r in both)
    assert ratio["published"][0] > ratio["published"][1] and ratio["from all four"][0] > ratio["from all four"][1]
    assert ratio["from the ring"][0] < ratio["from the ring"][1]
    for model in found["models"].values():
        assert model["from the ring"][0] == pytest.approx(model["published"][0], rel=1e-9)
        assert model["from all four"] == pytest.approx(model["published"], rel=0.16)
        assert model["8 behind a card"] > model["published"][0]  # so they cannot have been flat, 8 behind a card


def test_what_the_comparison_says_depends_on_the_all_reduce():
    """Against a flat ring the gain grows with n; against a hierarchical tree it stays below 2 on a fast inside."""
    for network in (costs.TCP, costs.INFINIBAND):
        ring, tree = [], []
        for n in costs.WORKERS:
            seconds = costs.predict(network, n, costs.MODELS["ResNet-50"])
            ring.append(seconds["ring all-reduce"] / seconds["hierarchical one-peer"])
            tree.append(seconds["hierarchical tree all-reduce"] / seconds["hierarchical one-peer"])
            assert seconds["one-peer"] > seconds["tree all-reduce"]  # flat, with 8 behind a card
        assert ring == sorted(ring) and ring[-1] > 100
        assert 1.5 < min(tree) and max(tree) < 2.01


def test_tables_json_and_picture(tmp_path, capsys):
    (tmp_path / "measured.json").write_text(json.dumps(measured(LINK)))
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    cost_model.main([str(tmp_path / "measured.json"), "--json", str(out), "--picture", str(picture)])
    text = capsys.readouterr().out
    assert "one-peer /" in text and "100000" in text and "1 ms a message, 0.8 Gbit/s" in text
    written = json.loads(out.read_text())
    assert written["measured"][0]["link"] == pytest.approx(LINK._asdict())
    assert len(written["predictions"]) == 4 * 2 * 3
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_two_workers_are_measured(tmp_path):
    """In the benchmark itself a wrong count or a wrong result is an error."""
    plan = exchange.Plan(sizes=(1000, 40_000), repeats=1, buckets=3, deadline=60.0)
    result = run_workers(exchange.measure, 2, plan, deadline=120.0)[0]
    assert [(row["operation"], row["size"]) for row in result["rows"]] == [
        (operation, size)
        for size in (1000, 40_000)
        for operation in exchange.OPERATIONS[:-1]  # the last: many hosts
    ]
    for row in result["rows"]:
        assert 0 < row["least"] <= row["seconds"] <= row["most"] and row["payload"] == row["size"]
        assert row["messages"] == {"all-reduce": 2, "raw one-peer": 1}.get(row["operation"], 3)
    assert "one-peer-exponential" in exchange.table(result)
    exchange.draw(result, str(tmp_path / "out.png"))
    assert cost_fits.fit_measured(json.loads(json.dumps(result)))["link"].latency > 0


def test_the_gate():
    def result(large_raw=1.0, large=0.57, small=0.12):
        ratios = {10_000: (3.0, small), 1_000_000: (9.0, 9.0), 100_000_000: (large_raw, large)}
        return {
            "per_host": 1,
            "rows": [
                {"operation": exchange.ONE_PEER, "size": size, "to_raw": raw, "to_all_reduce": reduce}
                for size, (raw, reduce) in ratios.items()
            ],
        }

    assert exchange.failures(result()) == []
    assert [
        "100 MB, one-peer-exponential: to_raw is 1.090" in line for line in exchange.failures(result(large_raw=1.09))
    ] == [True]
    assert len(exchange.failures(result(large_raw=1.09, large=0.66, small=0.26))) == 3
    row = {"operation": exchange.HIERARCHICAL, "size": 10_000_000, "to_all_reduce": 0.71}
    assert len(exchange.failures({"per_host": 4, "rows": [row]})) == 1


def test_the_command_line_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    for argv, message in (
        ([], "say --workers N"),
        (["--workers", "2", "--gate"], "8 ranks or more at a limited rate"),
        (["--workers", "2", "--gate", "--sizes", "1000"], "--gate needs the sizes"),
        (["--workers", "2", "--sizes", "2"], "at least 4 bytes"),
        (["--workers", "1"], "two workers"),
    ):
        with pytest.raises(SystemExit):
            exchange.main(argv)
        assert message in capsys.readouterr().err
