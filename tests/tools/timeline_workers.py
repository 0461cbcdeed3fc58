"""What worker processes run in the tests of the timeline."""

from fused_dlam.examples import timeline


def both(rank, trace):
    """The example's own steps."""
    return timeline.both(trace if rank == 0 else None)


def again_and_again(rank, times):
    """Each recording ends with the next step's receives posted."""
    return sum(bool(timeline.record(overlap=True)) for _ in range(times))
