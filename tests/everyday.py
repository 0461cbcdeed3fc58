"""One of each kind is tested every day, the rest with -m slow, as CI does: the suite stays within ten minutes."""

import pytest


def everyday(cases, kept):
    """`cases` for pytest.mark.parametrize, tuples of several arguments too: those not among `kept` are slow."""

    def slow(case):
        return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)

    return [case if case in kept else slow(case) for case in cases]
