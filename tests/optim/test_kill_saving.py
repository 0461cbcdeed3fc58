"""Promise: whatever ranks are killed in a save, a complete checkpoint is there: the old or the new one, bit for bit.

Real processes and SIGKILL: two workers that save into one directory again and again, killed at moments uniform in the
time that a save takes, both or one of them; and one worker killed before each file operation of a save in turn.
"""

import multiprocessing
import os
import random
import time

import kill_workers
import pytest
from workers import run_together

from fused_dlam.tools.launch import PRELOAD


class Pair:
    """Two ranks that save until they are killed."""

    def __init__(self, folder, round_, resume):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.processes, self.pipes, self.saved = [], [], 0
        for rank in range(2):
            here, there = context.Pipe()
            process = context.Process(
                target=kill_workers.save_on, args=(rank, 2, str(folder), round_, resume, there), daemon=True
            )
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)

    def hear(self, rank, what):
        """The next message of this kind; EOFError if the rank ended."""
        while self.pipes[rank].poll(60):
            message = self._next(rank)
            if message[0] == what:
                return message
        raise TimeoutError(f"rank {rank} does not say {what!r}")

    def kill(self, ranks):
        for rank in ranks:
            self.processes[rank].kill()  # harmless where it has just ended by itself

    def last_saved(self):
        """The last step whose save returned on any rank, once all have ended."""
        for rank, pipe in enumerate(self.pipes):
            self.processes[rank].join(60)
            try:
                while pipe.poll():
                    self._next(rank)
            except EOFError:
                pass
        return self.saved

    def _next(self, rank):
        message = self.pipes[rank].recv()
        if message[0] == "saved":
            self.saved = max(self.saved, message[1])
        return message


def kills(folder, count, seed):
    """Kills a pair `count` times; what came of it, in numbers."""
    print(f"seed {seed}")
    dice = random.Random(seed)
    saved, took, seen = 0, 0.1, {"old": 0, "new": 0, "one rank": 0, "half written": 0, "most folders": 0}
    path = folder / "latest"
    for round_ in range(count + 1):
        pair = Pair(folder, round_, resume=bool(saved))
        if saved:
            steps = []
            for rank in range(2):
                _, step, wrong = pair.hear(rank, "loaded")
                assert not wrong, (seed, round_, rank, step, wrong)
                steps.append(step)
            assert steps[0] == steps[1] and steps[0] in (saved, saved + 1), (seed, round_, steps, saved)
            seen["old" if steps[0] == saved else "new"] += 1
            saved = steps[0]
        if round_ == count:
            pair.kill((0, 1))
            break
        first = max(pair.hear(rank, "saved")[2] for rank in range(2))
        second = max(pair.hear(rank, "saved")[2] for rank in range(2))
        took = second - first  # a round; the next one or two are under way now
        time.sleep(dice.random() * 2 * took)
        one = dice.random() < 1 / 3
        pair.kill([dice.randrange(2)] if one else [0, 1])
        seen["one rank"] += one
        if one:
            time.sleep(dice.random() * 2 * took)
            pair.kill([rank for rank in range(2) if pair.processes[rank].is_alive()])
        saved = pair.last_saved()  # returned: it must be there, or the one after it
        folders = kill_workers.folders(path)
        seen["half written"] += folders > 1
        seen["most folders"] = max(seen["most folders"], folders)
    print(seen)
    return seen


def check(seen, count):
    assert seen["old"] + seen["new"] == count
    assert seen["most folders"] <= 2  # what killed saves leave is removed by the next


@pytest.mark.slow
def test_killed_in_many_saves(tmp_path):
    """KILLS=200 pytest -m slow -k many_saves"""
    count = int(os.environ.get("KILLS", "30"))
    seen = kills(tmp_path, count, random.SystemRandom().randrange(1 << 31))
    check(seen, count)
    assert seen["one rank"] > count / 10 and seen["half written"] > count / 4


def test_killed_before_each_file_operation(tmp_path):
    """Always the old or the new one, never with more than two on the disk, and from some operation on the new."""
    (results,) = run_together(1, {"each": (kill_workers.die_at_each_operation, str(tmp_path))})["each"]
    news = []
    former = 1
    for at, step, loaded, wrong, folders in results:
        assert not wrong and loaded in (former, step) and folders <= 2, (at, step, loaded, wrong, folders)
        news.append(loaded == step)
        former = loaded
    assert news == sorted(news) and len(news) > 10 and not news[5]
    assert results[-1][-1] == 1
