"""What the fuzzers of the public API share: how many examples, and what an error must be.

A few examples of each promise are drawn every day, always the same; `-m slow` draws FUZZ_EXAMPLES (1500) in all:

    FUZZ_EXAMPLES=10000 pytest tests/trust -k api -m slow -n0
"""

import linecache
import os
import traceback
import warnings

import pytest
from hypothesis import HealthCheck, given, settings

TOTAL = int(os.environ.get("FUZZ_EXAMPLES", "1500"))
PARTS = 1.5  # what the shares of all promises add up to
OURS = (f"{os.sep}fused_dlam{os.sep}", f"{os.sep}kernels{os.sep}")
TORCHS = os.path.join("torch", "optim", "optimizer.py")  # whose words about groups are those of torch.optim.SGD


def fuzzed(daily, share, **strategies):
    """A test that draws `daily` examples of a promise, or with -m slow its share of FUZZ_EXAMPLES."""

    def decorate(promise):
        often = pytest.param(max(1, round(share / PARTS * TOTAL)), marks=pytest.mark.slow)

        @pytest.mark.parametrize("count", [max(5, daily // 2), often])
        def test(count):
            chosen = settings(
                max_examples=count, derandomize=True, database=None, deadline=None, print_blob=False,
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                warnings.simplefilter("ignore", FutureWarning)
                warnings.simplefilter("error", RuntimeWarning)  # NumPy's, of what became nan
                chosen(given(**strategies)(promise))()

        test.__name__, test.__doc__, test.__module__ = promise.__name__, promise.__doc__, promise.__module__
        return test

    return decorate


def refused(call, *also):
    """(what a call returns, None), or (None, the error) if it refuses in words; any other error is a failure.

    In words: a ValueError or TypeError (or one of `also`) that a `raise` of this package made, not one that Python made
    of bad input on its way.
    """
    try:
        return call(), None
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if last.filename.endswith(TORCHS):
            return None, error
        assert type(error) in (ValueError, TypeError, *also), told(error)
        assert len(str(error).split()) >= 3, told(error)
        line = linecache.getline(last.filename, last.lineno).strip()
        by_us = any(part in last.filename for part in OURS)
        assert by_us and line.startswith("raise"), f"not refused, but raised at {line!r}: {told(error)}"
        return None, error


def told(error):
    return "".join(traceback.format_exception(type(error), error, error.__traceback__)[-6:])
