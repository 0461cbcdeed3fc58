"""Where a fault happens: a context around what a worker calls, in which the package's own function is interrupted.

built           before the optimizer is built               settings, broadcast   while it is built
first           before the first step                       sent, unsent          in the middle of a step
between         between two steps                           averaged, distance    in the middle of those calls
before-saving   before save_checkpoint()                    saving                while it writes
last            in the last step                            end                   after training, all through
"""

from contextlib import contextmanager
from unittest import mock

from table import STEP, STEPS

from fused_dlam.comm import generation
from fused_dlam.comm.group import Group
from fused_dlam.comm.membership import Membership
from fused_dlam.comm.place import Place
from fused_dlam.engine import regroup
from fused_dlam.engine.flight import Flight
from fused_dlam.optim.checkpoint_files import Writer
from fused_dlam.optim.surviving import Surviving

INSIDE = {  # (owner, function, at which of its calls that count)
    "settings": (Group, "agree", 1),
    "broadcast": (Place, "start_equal", 1),
    "sent": (Flight, "arrive", 2),  # of the second bucket: the first was combined
    "unsent": (Flight, "_send", 2),
    "averaged": (Group, "mean", 2),
    "distance": (Group, "mean", 2),
    "saving": (Writer, "write_data", 1),
    "last": (Flight, "arrive", 2),
    "confirming": (Place, "confirm", 1),
    "agreeing": (Membership, "agree", 1),
    "forming": (generation, "form", 1),
    "connecting": (Surviving, "_connect", 1),
    "settling": (regroup, "settle", 1),
}
IN_RECOVERY = ("agreeing", "forming", "connecting", "settling")
STEPPED = {"sent": STEP, "unsent": STEP, "last": STEPS - 1}


@contextmanager
def inside(place, strike):
    """Within the context `strike` is called at a place of the package, once."""
    owner, name, nth = INSIDE[place]
    original, count = getattr(owner, name), 0

    def interrupted(first, *arguments, **named):
        nonlocal count
        if place not in STEPPED or first.step == STEPPED[place]:
            count += 1
            if count == nth:
                strike()
        return original(first, *arguments, **named)

    with mock.patch.object(owner, name, interrupted):
        yield
