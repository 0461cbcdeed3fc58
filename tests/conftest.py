"""tests/ has the rooms of the package and is none itself: this makes `from workers import data` work in each."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
FOLDERS = [HERE, *sorted(p for p in HERE.rglob("*") if p.is_dir() and p.name != "__pycache__")]
sys.path[:0] = map(str, FOLDERS)
# Three processes run tests at once, and start more: threads of each beside them cost 14 % of the processors' time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
