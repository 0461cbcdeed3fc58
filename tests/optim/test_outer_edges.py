"""Promises of `Gossip` in rounds where scripts do what is unusual:

- after a checkpoint of an earlier step, and after parameters were set, what is sent is what is there, to that step's
  neighbors;
- checkpoints of optimizers without rounds load, and the other way round, and leave nothing behind; on three workers
  a run that is resumed in mid-round is the uninterrupted one, bit for bit, `every` included;
- workers in unlike places of a round are not saved: a ValueError on all;
- where ways are averaged by all-reduce unlike settings, and workers that began apart, are a ValueError on all;
- a step that raised leaves nothing undone in the one that follows; one that was interrupted while it sent the next
  message ahead is not done a second time in silence: it raises;
- within `join()` means are over the ranks that have data, and a step without data, or left out for an overflow, counts
  for nothing;
- within `join()` ranks, and machines, may take unlike numbers of inner steps: who is out of data takes part in the
  exchanges that are left, having gone nothing, as the dense float64 statement has it, to 1e-12;
- an overflow is a machine's own, whatever number of inner steps the others take;
- a parameter that comes late has bias corrections of its own, and a checkpoint of the round in which it came goes on
  bit for bit; so has a worker that comes late gone nothing of the round.
"""

import numpy as np
import oracle
import outer_edge_workers as edge
import pytest
import torch
import workers

from fused_dlam import topology

MI = {"outer": "mi-dmsgd", "every": 3}
LOADED = {
    "DiLoCo": {"outer": "nesterov-pmsgd", "every": 3, "momentum": 0.0, "lr": 1.0},
    "MI, awc": {"outer": "mi-dmsgd", "every": 3, "momentum": 0.0, "lr": 1.0, "schedule": "awc"},
}
BACK = {
    "averages, awc": {"schedule": "awc", "every": 2},
    "averages, atc": {"schedule": "atc", "every": 2},
    "MI, awc": {"outer": "mi-dmsgd", "schedule": "awc", "every": 2},
}
COUNTING = {"adam": 4, "mi-adamw": 4, "adamw": None}  # every=None: of `GossipSGD`
THAWS = [("adam", 5), ("adam", 8), ("mi-adamw", 7), ("adamw", 5), ("adamw", 7)]
RING = {"outer": "mi-dmsgd", "topology": "exponential", "momentum": 0.6, "correction_rate": 0.1}
# options, every of each worker, batches of each rank in each epoch
UNLIKE = {
    "DiLoCo": ({"outer": "nesterov-pmsgd", "topology": "full"}, (2, 4, 1, 3), [(8, 11, 2, 0), (3, 8, 1, 7)]),
    "MI": (RING, (2, 4, 1, 3), [(8, 11, 2, 0), (3, 8, 1, 7)]),
    "MI, awc": ({**RING, "schedule": "awc", "lr": 0.4}, (2, 4, 1, 3), [(8, 11, 2, 0), (0, 9, 0, 2)]),
    "machines": (
        {"outer": "mi-dmsgd", "hierarchical": True, "correction_rate": 0.1}, (2, 3), [(8, 5, 4, 0), (1, 0, 7, 6)],
    ),
}  # fmt: skip

RESUMED = {
    "DiLoCo": {"outer": "nesterov-pmsgd"},
    "MI, awc": {"outer": "mi-dmsgd", "schedule": "awc"},
    "averages": {},
    "unequal": {"outer": "mi-dmsgd", "local_steps": True},
}
INTERRUPTED = [("rounds", 1), ("rounds", 2), ("rounds", 3), ("average", 2), ("GossipSGD", 2)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edges")
    two = {
        ("late", True): (edge.written_late, True),
        ("late", False): (edge.written_late, False),
        "tried again": (edge.tried_again,),
        **{("interrupted", *case): (edge.interrupted, *case) for case in INTERRUPTED},
        "another kind": (edge.of_another_kind,),
        **{("apart", how): (edge.apart, how) for how in ("every", "rate", "loaded")},
        "rebuilt": (edge.rebuilt,),
        "saved apart": (edge.saved_apart, str(folder / "apart")),
        "join, unequal": (edge.joined, {"every": 4, "local_steps": True}, (8, 1)),
        "join, all-reduce": (edge.joined, {"every": 2, "outer": "pmsgd", "momentum": 0.0, "lr": 1.0}, (4, 2)),
        "weighed": (edge.weighed,),
        "thawed": (edge.thawed_late,),
        "newcomer": (edge.newcomer,),
        **{
            ("thaws", method, at): (edge.thaws, method, COUNTING[method], at, str(folder / f"{method}{at}"))
            for method, at in THAWS
        },
        **{("loaded", name): (edge.loaded_within, options) for name, options in LOADED.items()},
    }
    three = {("resumed", name): (edge.resumed, options, 7, 4) for name, options in RESUMED.items()}
    four = {
        **{("back", name): (edge.rolled_back, options) for name, options in BACK.items()},
        "join, machines": (edge.joined_machines, {"every": 3}, (4, 1, 4, 1)),
        **{("scaled", kind): (edge.machines_scaled, kind) for kind in ("ours", "torch's", "by hand")},
        **{("unlike", name): (edge.joined_unlike, *case) for name, case in UNLIKE.items()},
        "unlike, scaled": (edge.joined_unlike, *UNLIKE["machines"], True),
    }
    return {**workers.run_together(2, two), **workers.run_together(3, three), **workers.run_together(4, four)}


@pytest.mark.parametrize("name", BACK)
def test_an_earlier_steps_checkpoint_goes_on_as_that_step(found, name):
    for right, again in found["back", name]:
        assert right == again


@pytest.mark.parametrize("case", INTERRUPTED)
def test_what_was_interrupted_is_not_sent_twice(found, case):
    other, victim = found[("interrupted", *case)]
    assert victim[0] == "interrupted" and len(victim) == 2
    assert "an earlier attempt at step" in victim[1] and "restart all ranks from a checkpoint" in victim[1]
    assert len(other) == 1 and "rank 1" in other[0]


@pytest.mark.parametrize("synchronizes", [True, False])
def test_what_was_set_is_what_is_sent(found, synchronizes):
    assert found["late", synchronizes] == [1.5, 1.5]


@pytest.mark.parametrize("name", LOADED)
def test_a_model_loaded_within_a_round_is_where_the_next_begins(found, name):
    """After synchronize(). Without momentum nothing else moves it; DiLoCo's replicas are equal whatever they were."""
    (one, again), (two, other) = found["loaded", name]
    assert one == pytest.approx(100.0, abs=0.7) and one + two == pytest.approx(200.0, abs=1e-9)
    if name == "DiLoCo":
        assert one == two == 100.0 and again == other


def test_a_step_that_raised_leaves_nothing_undone(found):
    """Two steps of 0.5 on both ranks; a momentum of zero at the start: x = -0.7, by the outer rate."""
    for done, x in found["tried again"]:
        assert done == 2 and x == pytest.approx(-0.7, abs=1e-12)


def test_checkpoints_of_optimizers_without_rounds(found):
    for rank in found["another kind"]:
        for k in (0, 3):
            lr, taken, memory, done = rank[k]
            assert (lr, taken, memory) == (0.1, 0, {}) and done == (k == 3)
            assert rank[k + 1] == (1 if k == 0 else 2)  # one exchange more than the checkpoint's
            assert rank[k + 2] == []


@pytest.mark.parametrize("how", ["every", "rate", "loaded"])
def test_workers_of_an_all_reduce_that_are_apart_are_told_so(found, how):
    (one, x), (two, y) = found["apart", how]
    words = {"every": "agree on every: rank 0 has 2, rank 1 has 3", "rate": "'lr': 0.7", "loaded": "not the same"}
    assert len(one) == len(two) == 1 and words[how] in one[0] and words[how] in two[0]
    assert x == y, "and synchronize() makes them one again"


@pytest.mark.parametrize("name", RESUMED)
def test_on_three_workers_a_resumed_run_is_the_uninterrupted_one(found, name):
    assert found["resumed", name] == [(4, True)] * 3, "every= is the saved one"


def test_workers_apart_in_a_round_are_not_saved(found):
    for told in found["saved apart"]:
        assert "different steps: {0: 'step 5 (exchange 1)', 1: 'step 6 (exchange 1)'}" in told


def test_a_second_optimizer_has_its_own_settings(found):
    for rank in found["rebuilt"]:
        assert rank == [(0.7, 0.7, {}, 0), (0.1, 0.1, {}, 0)]


def test_join_weighs_by_steps_with_data(found):
    """Rank 0 takes 4 steps in each round, rank 1 one in the first alone: both go c = 2.5 there; then 4 and 0."""
    ends = [end for _, _, end in found["join, unequal"]]
    assert ends == pytest.approx([-2.5 - 2.0] * 2, abs=1e-12)


def test_join_averages_ways_over_those_who_have_data(found):
    """Both go 2 in the first round; in the second rank 0 alone, and the mean is its own."""
    ends = [end for _, _, end in found["join, all-reduce"]]
    assert ends == pytest.approx([-4.0] * 2, abs=1e-12)


def test_join_with_machines_averages_over_those_who_have_data(found):
    for rank in (0, 2):
        moved, _, _ = found["join, machines"][rank]
        assert moved == pytest.approx([1.0] * 4, abs=1e-12)


def test_a_step_left_out_for_an_overflow_counts_for_nothing(found):
    assert found["weighed"] == [[1.5], [0.75]]


def test_a_parameter_that_comes_late_has_its_own_bias_corrections(found):
    for first, memory in found["thawed"]:
        assert first == pytest.approx(0.01, rel=1e-4)
        assert memory["adam_steps"] == 41 and torch.tensor(memory["steps of 1"]) == 1


@pytest.mark.parametrize("method, at", THAWS)
def test_a_checkpoint_of_the_round_in_which_a_parameter_came_goes_on_bit_for_bit(found, method, at):
    """It comes before step 5: saved before, in the midst of its first round, and after that."""
    for whole, again in found["thaws", method, at]:
        assert whole == again


@pytest.mark.parametrize("kind", ["ours", "torch's", "by hand"])
def test_an_overflow_is_a_machines_own(found, kind):
    """Of gradients 1.5 and 3.5 machines go 2 steps and 4, in the first round one of the 4 is left out."""
    expected, lr = 0.0, 0.125
    for counts in ((2, 3), (2, 4)):
        c = np.mean(counts)
        expected -= lr * (c * 1.5 + c * 3.5) / 2
    ends, scales = zip(*found["scaled", kind], strict=True)
    assert ends == pytest.approx([expected] * 4, rel=1e-6)
    own = [16.0, 32.0, 64.0, 128.0]  # halved where the scaler knows of the overflow
    assert list(scales) == [*own[:2], own[2] / 2 if kind == "ours" else own[2], own[3] / 2]


def schedule_of(every, batches):
    """(by exchange, of every worker the inner steps of its round as (batches of the epoch, number); by epoch, the
    exchanges up to its end, and what every worker has gone since the last one)."""
    n, size = len(every), len(batches[0]) // len(every)
    table, ends, rest = [], [], [[] for _ in every]
    for counts in batches:
        ahead = [[(counts, s) for s in range(max(counts[i * size : (i + 1) * size]))] for i in range(n)]
        for _ in range(max((len(rest[i]) + len(ahead[i])) // every[i] for i in range(n))):
            due = [every[i] - len(rest[i]) for i in range(n)]
            table.append([rest[i] + ahead[i][: due[i]] for i in range(n)])
            ahead, rest = [ahead[i][due[i] :] for i in range(n)], [[] for _ in every]
        rest = [rest[i] + ahead[i] for i in range(n)]
        ends.append((len(table), rest))
    return table, ends


def unlike(options, every, batches):
    """The dense statement of `edge.joined_unlike`: by epoch, exchanges and where every worker ends."""
    options, n, size = dict(options), len(every), len(batches[0]) // len(every)
    options.pop("hierarchical", None)
    method, graph = options.pop("outer"), topology.get(options.pop("topology", "one-peer-exponential"), n)
    lr, momentum = options.pop("lr", 0.7), options.pop("momentum", 0.9)
    table, ends = schedule_of(every, batches)

    def inner(i, x, steps):
        for counts, s in steps:
            have = [r for r in range(i * size, (i + 1) * size) if s < counts[r]]
            x = x - 0.1 * np.mean([edge.quadratic(r, x) for r in have], axis=0)
        return x

    def way(k, X):
        went = [len(steps) for steps in table[k]]
        going = sum(w > 0 for w in went)
        out = np.zeros_like(X)
        for i in range(n):
            if went[i]:
                out[i] = sum(went) / going / went[i] * (X[i] - inner(i, X[i], table[k][i]))
        return out * (n / going if method.endswith("pmsgd") else 1.0)

    path = oracle.run(
        method, graph.weights, way, np.zeros((n, 3)), lambda k: lr, momentum, 0.0, steps=len(table), **options
    )
    return [(k, [inner(i, path[k][i], rest[i]) for i in range(n)]) for k, rest in ends]


@pytest.mark.parametrize("name", [*UNLIKE, "scaled"])
def test_join_with_unlike_numbers_of_inner_steps(found, name):
    scaled = name == "scaled"
    options, every, batches = UNLIKE["machines" if scaled else name]
    ranks = found["unlike, scaled" if scaled else ("unlike", name)]
    for epoch, (exchanges, x) in enumerate(unlike(options, every, batches)):
        assert exchanges > 3
        for rank, ends in enumerate(ranks):
            end, done = ends[epoch]
            assert done == exchanges
            np.testing.assert_allclose(end, x[rank * len(every) // 4], rtol=0, atol=1e-5 if scaled else 1e-12)


def test_a_newcomer_has_gone_nothing_of_the_round(found):
    """One that was there keeps what it has gone, its own `every`, and its inner optimizer's state."""
    for stayed, came in found["newcomer"]:
        assert stayed == ((1, 1, 1), 5, 1, 1, 1)
        assert came == ((3, 0, 3), 5, 3, 0, 3)
