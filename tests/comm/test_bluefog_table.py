"""Promises about comm/bluefog.md: each name that BlueFog exports has one row, what a row names in code exists with the
arguments it is given, the counts are those of the rows, and the lines on the page give what they say."""

import inspect
import re
from collections import Counter
from pathlib import Path

import bluefog_workers
import numpy as np
import pytest
import torch
import torch.distributed as dist
from workers import run_together

import fused_dlam

PAGE = (Path(fused_dlam.__file__).parent / "comm" / "bluefog.md").read_text(encoding="utf-8")

# What bluefog/torch/__init__.py imports from bluefog, in its order, at commit
# 9ee376a7f7399f18d864f75b399dcfa6962fa4fb of github.com/Bluefog-Lib/bluefog.
NAMES = """
    CommunicationType DistributedAdaptThenCombineOptimizer DistributedAdaptWithCombineOptimizer
    DistributedGradientAllreduceOptimizer DistributedWinPutOptimizer DistributedAllreduceOptimizer
    DistributedNeighborAllreduceOptimizer DistributedHierarchicalNeighborAllreduceOptimizer init shutdown size
    local_size rank local_rank machine_size machine_rank load_topology set_topology load_machine_topology
    set_machine_topology in_neighbor_ranks out_neighbor_ranks in_neighbor_machine_ranks out_neighbor_machine_ranks
    mpi_threads_supported unified_mpi_window_model_supported nccl_built is_homogeneous suspend resume allreduce
    allreduce_nonblocking allreduce_ allreduce_nonblocking_ allgather allgather_nonblocking broadcast
    broadcast_nonblocking broadcast_ broadcast_nonblocking_ neighbor_allgather neighbor_allgather_nonblocking
    neighbor_allreduce neighbor_allreduce_nonblocking hierarchical_neighbor_allreduce
    hierarchical_neighbor_allreduce_nonblocking poll synchronize wait barrier win_create win_free win_update
    win_update_then_collect neighbor_win_put_nonblocking neighbor_win_put neighbor_win_get_nonblocking neighbor_win_get
    neighbor_win_accumulate_nonblocking neighbor_win_accumulate win_put_nonblocking win_put win_get_nonblocking win_get
    win_accumulate_nonblocking win_accumulate win_wait win_poll win_mutex get_win_version
    get_current_created_window_names win_associated_p turn_on_win_ops_with_associated_p
    turn_off_win_ops_with_associated_p set_skip_negotiate_stage get_skip_negotiate_stage timeline_start_activity
    timeline_end_activity timeline_context broadcast_optimizer_state broadcast_parameters allreduce_parameters
    GetRecvWeights GetSendWeights IsRegularGraph IsTopologyEquivalent ExponentialTwoGraph ExponentialGraph
    FullyConnectedGraph MeshGrid2DGraph RingGraph StarGraph SymmetricExponentialGraph GetDynamicOnePeerSendRecvRanks
    GetExp2DynamicSendRecvMachineRanks GetInnerOuterRingDynamicSendRecvRanks GetInnerOuterExpo2DynamicSendRecvRanks
    InferSourceFromDestinationRanks InferDestinationFromSourceRanks
""".split()
KINDS = ["direct", "composed", "torch", "moot", "none"]


def rows(header):
    """The cells of every row of every table that begins with this header."""
    for table in PAGE.split(header + "\n")[1:]:
        for line in table.split("\n\n")[0].splitlines()[1:]:
            yield [cell.strip() for cell in line.strip("|").split("|")]


TABLE = [(re.findall(r"`(\w+)`", cells[0]), *cells[1:]) for cells in rows("| BlueFog | kind | here | |")]


def test_every_name_has_one_row():
    assert Counter(name for names, *_ in TABLE for name in names) == Counter(NAMES)


def test_the_counts_are_those_of_the_rows():
    counted = Counter(kind for names, kind, *_ in TABLE for _ in names)
    assert set(counted) <= set(KINDS)
    said = {what: int(number) for what, number, _ in rows("| what it is | names | what it means |")}
    assert said == {kind: counted[kind] for kind in KINDS} | {"all": len(NAMES)}
    assert f"exports {len(NAMES)} names" in PAGE


def called():
    """(name, keywords) of what stands in code in the column of counterparts."""
    for names, kind, here, _ in TABLE:
        code = re.findall(r"`([^`]+)`", here)
        assert (kind in ("moot", "none")) == (here == ""), names
        for item in code:
            name, _, arguments = item.partition("(")
            yield name, tuple(re.findall(r"(\w+)=", arguments))


def missing(name, keywords):
    """What of it there is not."""
    first, *path = name.split(".")
    home = {"dist": dist, "torch": torch}.get(first)
    if home is None:
        home, path = fused_dlam, [first, *path]
    for part in path:
        if not hasattr(home, part):
            return name
        home = getattr(home, part)
    unknown = set(keywords) - set(inspect.signature(home).parameters) if keywords else None
    return f"{name}({', '.join(sorted(unknown))})" if unknown else ""


def test_a_counterpart_exists_and_takes_these_arguments():
    assert missing("Topology.nothing", ()) and missing("topology.star", ("centre",)) == "topology.star(centre)"
    assert [what for what in (missing(*item) for item in sorted(set(called()))) if what] == []


def test_a_link_within_the_page_has_its_heading():
    headings = [re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
                for line in PAGE.splitlines() if line.startswith("#")]  # fmt: skip
    links = re.findall(r"\]\(#([^)]+)\)", PAGE)
    assert links
    for link in links:
        twice = re.fullmatch(r"(.+)-(\d)", link)
        assert link in headings or (twice and headings.count(twice[1]) > int(twice[2])), link


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """What the page's lines leave on each of four ranks."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    folder = str(tmp_path_factory.mktemp("page"))
    return run_together(4, {"page": (bluefog_workers.run_the_page, blocks, folder)}, deadline=120)["page"]


def test_the_lines_give_what_they_say(left):
    """Four ranks, whose x is 0, 1, 2 and the rank added. On the exponential graph rank r hears from r - 1 and r - 2."""
    x = [np.arange(3.0) + r for r in range(4)]
    for r, names in enumerate(left):
        near, far, machine = (r - 1) % 4, (r - 2) % 4, r // 2
        inside = [(x[0] + x[1]) / 2, (x[2] + x[3]) / 2]
        expected = {
            "x": x[r],
            "moved": 0.5 * x[r] + 0.75 * x[near],
            "doubled": -x[r] + 0.75 * 2 * x[near],
            "gathered": np.concatenate([x[j] for j in sorted((near, far))]),
            "mean": (inside[0] + inside[1]) / 2,
            "swapped": 0.5 * 2 * inside[1 - machine],
            "updated": (x[r] + x[near] + x[far]) / 3,
        }
        for name, value in expected.items():
            np.testing.assert_allclose(names[name], value, rtol=0, atol=1e-6, err_msg=f"{name} on rank {r}")
        assert names["regular"] and names["sources"] == [near] and isinstance(names["there"], bool)
        assert list(names["heard"]) == [near] and np.array_equal(names["heard"][near], x[near])
        assert names["versions"] == {near: 1, far: 1} and names["unread"] == {near: 0, far: 0}
        assert "fused_dlam::neighbor_allreduce step 0" in names["spans"] and '"mine"' in names["spans"]


def test_mass_is_conserved_by_the_lines(left):
    """How far ranks have mixed in a hundred steps is a matter of speed. An estimate is a mean of what the ranks had."""
    assert sum(names["mass"] for names in left) == pytest.approx(4, abs=1e-12)
    np.testing.assert_allclose(sum(names["total"].double() for names in left), 4 * np.arange(3.0) + 6, atol=1e-5)
    for names in left:
        assert (names["estimate"] >= torch.arange(3.0) - 1e-5).all() and names["mass"] > 0
        assert (names["estimate"] <= torch.arange(3.0) + 3 + 1e-5).all()


def test_the_graphs_of_the_lines(left):
    """BlueFog's definitions at n = 4: rank i sends to i - 1; to i - 1 and i + 1, for 4 is beyond n/2."""
    for name, heard in {"left_ring": (1,), "sparse": (1, -1)}.items():
        W = np.zeros((4, 4))
        for i in range(4):
            for j in (i, *((i + k) % 4 for k in heard)):
                W[i, j] = 1 / (1 + len(heard))
        np.testing.assert_allclose(left[0][name], W, rtol=0, atol=1e-15)
