"""What worker processes run in the tests of the timeline."""

from fused_dlam.examples import timeline


def both(rank, trace):
    """The example's own steps; and how many buckets its optimizer has, from the parameters."""
    return timeline.both(trace if rank == 0 else None)
