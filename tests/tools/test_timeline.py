"""Promises of `fused-dlam timeline`: of one step on two workers every span of every bucket is found, once, and drawn.

- a bucket is packed, sent, waited for and combined once, and its exchange begins with the sending and ends before it is
  combined; of computing there is one forward and one backward pass, and one step;
- without overlap no exchange begins in the backward pass; with it all but the last bucket's do;
- a profiler that stops while messages are on their way breaks nothing: gloo's own spans, which would end in memory that
  is the profiler's no more, are not recorded.
"""

import json

import pytest
import timeline_workers as workers

from fused_dlam.examples.timeline import COMPUTING, Span, draw, hidden, spans, summary
from fused_dlam.tools.launch import run_workers


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    trace = tmp_path_factory.mktemp("timeline") / "trace.json"
    return run_workers(workers.both, 2, trace, deadline=60), trace


def test_every_span_is_found(ranks):
    for rank in ranks[0]:
        for found in rank.values():
            computing = [s.what for s in found if s.bucket is None]
            assert computing == list(COMPUTING) and found[0].start == 0
            buckets = {s.bucket for s in found if s.bucket is not None}
            assert buckets == set(range(len(buckets))) and len(buckets) > 2
            for bucket in buckets:
                of = {s.what: s for s in found if s.bucket == bucket}
                assert sum(s.bucket == bucket for s in found) == len(of) == 5
                assert set(of) == {"pack", "send", "wait", "combine", "exchange"}
                assert all(s.start <= s.end for s in of.values())
                assert of["pack"].end <= of["exchange"].start <= of["send"].start
                assert of["exchange"].end <= of["combine"].start


def test_messages_leave_in_the_backward_pass_with_overlap_alone(ranks):
    for rank in ranks[0]:
        for title, found in rank.items():
            (backward,) = [s for s in found if s.what == "backward"]
            left = [s.bucket for s in found if s.what == "exchange" and s.start < backward.end]
            last = max(s.bucket for s in found if s.bucket is not None)
            assert left == (list(range(last)) if title == "overlap=True" else [])
            assert (hidden(found) > 0) == (title == "overlap=True")


def test_the_whole_trace_is_written(ranks):
    names = [str(e.get("name", "")) for e in json.loads(ranks[1].read_text())["traceEvents"]]
    assert sum(name.startswith("fused_dlam::exchange") for name in names) > 2
    assert not [name for name in names if name.startswith(("gloo:send", "gloo:recv"))]


@pytest.mark.slow
def test_a_profiler_that_stops_while_receives_are_posted():
    """Without the above a process dies, by SIGSEGV or SIGABRT, in one of three such runs or in more."""
    assert run_workers(workers.again_and_again, 2, 8, deadline=120) == [8, 8]


def test_figures_and_picture(ranks, tmp_path):
    pytest.importorskip("matplotlib")
    step = [Span("forward", None, 0.0, 1.0), Span("backward", None, 1.0, 3.0), Span("exchange", 0, 2.0, 4.0),
            Span("exchange", 1, 3.0, 4.0), Span("step", None, 3.0, 5.0)]  # fmt: skip
    assert hidden(step) == pytest.approx(1 / 3) and hidden([]) == 0
    assert summary("a", step) == (
        "a: forward 1.0 ms, backward 2.0 ms, step 2.0 ms; 2 exchanges, 33 % of their time in the backward pass"
    )
    figure = draw(ranks[0][0])
    assert [axes.get_title() for axes in figure.axes] == ["overlap=True", "overlap=False"]
    for axes, found in zip(figure.axes, ranks[0][0].values(), strict=True):
        assert len(axes.patches) == len(found)
    figure.savefig(tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 5_000


def test_a_trace_without_spans():
    class Empty:
        def events(self):
            return []

    assert spans(Empty()) == []
