"""The table of faults: with on_failure="raise" and "continue", real processes, SIGKILL and SIGSTOP, over gloo.

- nobody hangs: every rank has ended 3 timeout + 20 seconds after the fault. (timeout + 2 is what is promised on a quiet
  machine; the real time is in the test's output, and decides nothing.)
- "raise": every other rank ends with ExchangeError, which names a rank that is gone, by its global number, on those
  that saw it go and on those that follow; parameters are as before a failed averaged();
- "continue": the others go on to the end, agree on who is left, have taken one local step in every step(); a checkpoint
  is complete, and theirs; one that was only silent comes back, or ends in words;
- a rank that is killed after training, late in its last step, or stopped for a moment disturbs nobody, nor does the end
  of the store.

The whole table: -m slow.
"""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from table import CASES, EVERYDAY
from verdict import wrong

import fused_dlam

SCRIPT = Path(__file__).with_name("faults_script.py")
ROOT = Path(fused_dlam.__file__).parents[1]
ENVIRONMENT = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
AT_ONCE = 4  # cases: most of them wait most of the time


class Reports:
    """Of all cases that are to be tested, from one script that meets one after the other."""

    def __init__(self, cases, folder):
        self.found, self.changed = {}, threading.Condition()
        self.folder, self.errors = folder, folder / "errors"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, SCRIPT, str(folder), str(AT_ONCE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=errors, text=True, env=ENVIRONMENT,
            )  # fmt: skip
        self.process.stdin.write("".join(json.dumps(case) + "\n" for case in cases))
        self.process.stdin.close()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            report = json.loads(line)
            with self.changed:
                self.found[report["id"]] = report
                self.changed.notify_all()
        with self.changed:
            self.changed.notify_all()

    def of(self, case):
        def there():
            return case["id"] in self.found or not self.reader.is_alive()

        with self.changed:
            while not there():
                self.changed.wait(1.0)
        return self.found.get(case["id"], {"failed": f"the script ended: {self.errors.read_text()[-2000:]}"})

    def close(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def reports(request, tmp_path_factory):
    here = {item.callspec.params["case"]["id"] for item in request.session.items if item.module is request.module}
    reports = Reports([case for case in CASES if case["id"] in here], tmp_path_factory.mktemp("faults"))
    yield reports
    reports.close()


def _parameters():
    for case in CASES:
        slow = () if case["id"] in EVERYDAY else (pytest.mark.slow,)
        yield pytest.param(case, id=case["id"], marks=slow)


@pytest.mark.parametrize("case", list(_parameters()))
def test_fault(case, reports):
    report = reports.of(case)
    print("seconds from the fault to each rank's end:", report.get("seconds"))
    bad = wrong(case, report)
    for rank, log in sorted(report.get("logs", {}).items()) if bad else ():
        print(f"-- rank {rank} --\n{log}")
    assert not bad, "\n".join(bad)
