"""What several test files share: the folder of the stub driver, and what a process with it found."""

import pytest
import stub_driver
import stub_process


@pytest.fixture(scope="session")
def stub_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stub")
    stub_driver.build(folder)
    return folder


@pytest.fixture(scope="session")
def found(stub_folder):
    """What all the short calls found."""
    process = stub_process.start(stub_folder, *stub_process.SHORT.values())
    return dict(zip(stub_process.SHORT, stub_process.results(process), strict=True))
