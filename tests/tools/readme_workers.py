"""What worker processes run in test_readme.py."""

import re
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]


def blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S)


def script(rank, folder):
    """README's script in this process, which is a worker already; then its two lines on checkpoints."""
    code, resume = blocks(ROOT / "README.md")
    code = code.replace('dist.init_process_group("gloo")', "torch.manual_seed(rank := dist.get_rank())")
    code = code.replace("dist.destroy_process_group()", "").replace("model.pt", f"{folder}/model.pt")
    space = {}
    exec(code, space)
    own = [p.detach().clone() for p in space["model"].parameters()]
    exec(resume.replace("run/", f"{folder}/run/"), space)
    assert all(torch.equal(a, b) for a, b in zip(own, space["model"].parameters(), strict=True))
    assert space["scheduler"].last_epoch == 100 and space["step"] == 99
    dist.barrier()
    saved = torch.load(f"{folder}/model.pt")
    with space["optimizer"].averaged(space["model"]):
        return all(torch.equal(saved[name], value) for name, value in space["model"].state_dict().items())
