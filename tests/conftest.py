"""tests/ has the rooms of the package and is none itself: this makes `from workers import data` work in each."""

import os
import sys
import zlib
from pathlib import Path

HERE = Path(__file__).parent
FOLDERS = [HERE, *sorted(p for p in HERE.rglob("*") if p.is_dir() and p.name != "__pycache__")]
sys.path[:0] = map(str, FOLDERS)
# Three processes run tests at once, and start more: threads of each beside them cost 14 % of the processors' time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Slow tests that are tables, of half a minute and more each. SLOW_SHARE=2 takes every second row of them, by its name,
# and SLOW_TURN=1 in place of 0 the other ones: CI has no time for both, and takes them by turns.
TABLES = (
    "comm/test_mailbox_endings.py", "comm/test_piece_faults.py", "faults/test_table.py", "kernels/test_cpu_values.py",
    "kernels/test_guard.py", "optim/test_processes.py", "rules/test_field.py", "rules/test_laws.py",
    "rules/test_papers.py", "theory/test_limits.py", "tutorials/test_pages.py",
)  # fmt: skip
# Slow tests that share what takes their time: with SLOW_SHARE=4 the whole file has one of the four turns.
WHOLE = {
    "optim/test_missing_gradients.py": 0, "bench/test_bench_gpu.py": 1, "comm/test_endings.py": 1,
    "tutorials/test_tutorials.py": 2, "faults/test_rounds.py": 2, "trust/test_situations.py": 3,
    "comm/test_random_exchanges.py": 3,
}  # fmt: skip


def pytest_collection_modifyitems(config, items):
    share, turn = int(os.environ.get("SLOW_SHARE", "1")), int(os.environ.get("SLOW_TURN", "0"))
    if share == 1:
        return
    kept, left = [], []
    for item in items:
        path, its = item.path.as_posix(), turn
        if item.get_closest_marker("slow") is not None and path.endswith((*TABLES, *WHOLE)):
            its = next((t for name, t in WHOLE.items() if path.endswith(name)), zlib.crc32(item.nodeid.encode()))
        (kept if its % share == turn % share else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept
