"""Promises of fused_dlam/frameworks/ray.md, on two workers that Ray starts; which takes it 45 s of CPU time.

- The page's example runs as it stands, over unlike numbers of batches; every day its loop alone does, without Ray.
- After a worker's failure Ray starts all anew, and they go on from the reported checkpoint: every loss is that of a run
  without an interruption, and without Ray, bit for bit.
- `prepare_model` (DDP) is refused, before the optimizer is built and after.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ray_workers import without_ray
from workers import run_together

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed", allow_module_level=True)

import fused_dlam

PAGE = Path(fused_dlam.__file__).parent / "frameworks" / "ray.md"
# Around the example: what else is looked at in its workers, and a failure of theirs in the third epoch.
ABOVE = """
import json
from pathlib import Path

def checks(told):
    import ray.train, torch
    from ray.train.torch import prepare_model
    from fused_dlam import GossipSGD

    def refused(call):
        try:
            call()
        except ValueError as error:
            return str(error)

    rank, report = ray.train.get_context().get_world_rank(), ray.train.report
    first = not (told / f"refused.{rank}").exists()
    if first:
        wrapped = prepare_model(torch.nn.Linear(3, 1))
        said = [refused(lambda: GossipSGD(wrapped.parameters(), lr=0.1))]
        model = torch.nn.Linear(3, 1)
        optimizer = GossipSGD(model.parameters(), lr=0.1)
        later = prepare_model(model)
        said.append(refused(lambda: (later(torch.ones(2, 3)).sum().backward(), optimizer.step())))
        (told / f"refused.{rank}").write_text(json.dumps(said))

    def reported(metrics, **options):
        if first and metrics["epoch"] == 2:
            raise RuntimeError("this worker fails")
        with (told / f"reported.{rank}").open("a") as file:
            print(json.dumps({**metrics, "first": first}), file=file)
        report(metrics, **options)

    ray.train.report = reported
    torch.manual_seed(0)
"""
BELOW = """
import ray
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20)
"""


def blocks():
    """The loop and the call of it."""
    loop, call = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert loop.count("\n") <= 30
    return loop, call


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A folder in which the workers have left what they found."""
    home = tmp_path_factory.mktemp("ray")
    told = home / "told"
    told.mkdir()
    loop, call = blocks()
    loop = re.sub(r"(def train\(config\):).*", rf"\1\n    checks(Path('{told}'))", loop)
    call = call.replace("/shared/", f"{home}/") + f"Path('{told}/result').write_text(json.dumps(result.metrics))\n"
    (home / "script.py").write_text(ABOVE + loop + BELOW + call)
    environment = {**os.environ, "PYTHONPATH": str(PAGE.parents[2]), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "TMPDIR": "/tmp",
    }  # a socket's path has 107 characters at most
    out = subprocess.run(
        [sys.executable, "script.py"], cwd=home, env=environment, capture_output=True, text=True, timeout=580
    )
    assert out.returncode == 0, out.stdout[-3000:] + out.stderr[-3000:]
    return told


def uninterrupted(folder):
    """What each worker reports."""
    return run_together(2, {"loop": (without_ray, blocks()[0], str(folder))})["loop"]


def test_the_loop(tmp_path):
    first, second = uninterrupted(tmp_path)
    assert first == second and [report["epoch"] for report in first] == [0, 1, 2, 3]
    assert first[-1]["loss"] < 0.1 * first[0]["loss"]


@pytest.mark.slow
def test_it_goes_on_after_a_failure(told, tmp_path):
    whole = uninterrupted(tmp_path)
    for rank in range(2):
        lines = [json.loads(line) for line in (told / f"reported.{rank}").read_text().splitlines()]
        assert [line.pop("first") for line in lines] == [True, True, False, False]
        assert lines == whole[rank]
    assert json.loads((told / "result").read_text()) == whole[0][-1]


@pytest.mark.slow
def test_prepare_model_is_refused(told):
    for rank in range(2):
        said = json.loads((told / f"refused.{rank}").read_text())
        assert len(said) == 2 and all("prepare_model" in text for text in said)
