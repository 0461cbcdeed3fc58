"""What the tests of the optimizer protocol share: the table that they fill, and what three ranks did."""

import tempfile

import protocol_workers
import pytest
from protocol_table import Table
from workers import run_together


@pytest.fixture(scope="session")
def table():
    return Table()


@pytest.fixture(scope="session")
def ranks():
    with tempfile.TemporaryDirectory() as folder:
        return run_together(3, {"all": (protocol_workers.everything, folder)}, deadline=120)["all"]
