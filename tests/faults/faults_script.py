"""A script of its own: meets cases of the table, one per line of the standard input, and prints what became of each.

python faults_script.py FOLDER AT_ONCE: a few cases run at once, most of which wait. Every worker is a fork of this
process, which has imported everything; the store has a process of its own, as a launcher gives it.
"""

import gc
import json
import mmap
import os
import signal
import sys
import time
from pathlib import Path

import fault_worker
import torch._dynamo  # noqa: F401 -- else each worker imports it with its first optimizer
import torch.distributed.checkpoint  # noqa: F401
import torch.utils.data  # noqa: F401
from fault_worker import BUILT, CELLS, FAULT, GO, RECOVERED, cell
from forks import fork, start_store

START = 90.0  # seconds that a case may take to its fault, on a machine that does other things


class Case:
    def __init__(self, case, folder):
        self.case, self.folder = case, folder
        self.cells = memoryview(mmap.mmap(-1, 8 * 16 * CELLS)).cast("d")
        self.codes, self.ended, self.continued = {}, {}, set()

    def run(self):
        os.setpgid(0, 0)
        n, parent = self.case["n"], os.getppid()
        self.keeper, port = start_store()
        self.pids = {
            rank: fork(fault_worker.run, self.case, rank, port, self.cells, self.folder, out=self.log(rank))
            for rank in range(n)
        }
        start = time.time()
        while len(self.codes) < n and os.getppid() == parent:
            began = max(self.cells[cell(FAULT, r)] for r in range(n))
            if time.time() > (began + 3 * self.case["timeout"] + 20 if began else start + START):
                break
            self.reap()
            self.act(began)
            time.sleep(0.005)
        (self.folder / "report.json").write_text(json.dumps(self.report()))
        os.killpg(0, signal.SIGKILL)  # the store, data loaders, and who hangs

    def log(self, rank):
        return str(self.folder / f"{rank}.log")

    def reap(self):
        for rank, pid in self.pids.items():
            if rank not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank], self.ended[rank] = os.waitstatus_to_exitcode(status), time.time()

    def act(self, began):
        """What this process has to do: the store dies, stopped workers go on."""
        cells, case = self.cells, self.case
        if case["act"] == "store" and began and not cells[cell(GO, 0)]:
            os.kill(self.keeper, signal.SIGKILL)
            os.waitpid(self.keeper, 0)
            cells[cell(GO, 0)] = time.time()
        others = [r for r in range(case["n"]) if r not in case["victims"]]
        due = {
            None: False,
            "soon": time.time() > began + 1.0,
            "recovered": all(cells[cell(RECOVERED, r)] for r in others),
            "ended": all(r in self.codes for r in others),
        }[case["resume"]]
        for rank in case["victims"]:
            if due and cells[cell(FAULT, rank)] and rank not in self.continued:
                self.continued.add(rank)
                os.kill(self.pids[rank], signal.SIGCONT)

    def report(self):
        began = max(self.cells[cell(FAULT, r)] for r in range(self.case["n"]))
        hung = [rank for rank in self.pids if rank not in self.codes]
        for rank in hung:
            os.kill(self.pids[rank], signal.SIGUSR1)
        time.sleep(0.3 * bool(hung))
        told = {}
        for rank in self.pids:
            file = self.folder / f"{rank}.json"
            told[rank] = json.loads(file.read_text()) if file.exists() and file.stat().st_size else {}
        logs = {rank: Path(self.log(rank)).read_text()[-3000:] for rank in self.pids if Path(self.log(rank)).exists()}
        stacks = {rank: (self.folder / f"{rank}.stack").read_text() for rank in hung}
        return {
            "codes": self.codes, "hung": hung, "stacks": stacks, "told": told, "logs": logs,
            "seconds": {rank: round(end - began, 2) for rank, end in self.ended.items()} if began else {},
            "built": all(self.cells[cell(BUILT, r)] for r in self.pids),
        }  # fmt: skip


def main(folder, at_once):
    waiting = [json.loads(line) for line in sys.stdin]
    gc.collect()
    gc.freeze()
    running, number, again = {}, 0, set()
    while waiting or running:
        while waiting and len(running) < at_once:
            case, number = waiting.pop(0), number + 1
            own = Path(folder, str(number))
            own.mkdir()
            running[fork(Case(case, own).run, out=str(own / "log"))] = case, own
        pid, _ = os.wait()
        case, own = running.pop(pid)
        file = own / "report.json"
        report = json.loads(file.read_text()) if file.exists() else {"failed": (own / "log").read_text()}
        # torch's own process group cannot be built now and then, see tools/launch.py: nothing of a case has run then.
        unstarted = any(t.get("outcome") == "error" and "started" not in t for t in report.get("told", {}).values())
        if unstarted and case["id"] not in again:
            again.add(case["id"])
            waiting.append(case)
            continue
        print(json.dumps({"id": case["id"], **report}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
