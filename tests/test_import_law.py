"""The rooms of the package: imports go one way, and collectives stay in the room that moves bytes."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EVERYTHING = {
    "rules", "topology", "kernels", "layers", "comm", "theory", "engine", "optim", "tools", "examples", "tutorials",
    "frameworks", "",
}  # fmt: skip
MAY = {  # room -> the rooms that it may import
    "rules": set(),
    "topology": set(),
    "kernels": {"rules"},
    "layers": {"rules"},
    "comm": {"topology"},
    "theory": {"rules", "topology", "layers"},
    "engine": {"rules", "topology", "kernels", "layers", "comm"},
    "optim": {"rules", "topology", "kernels", "layers", "comm", "theory", "engine"},
    "tools": EVERYTHING,
    "examples": {"", "rules", "topology", "frameworks"},  # public names alone
    "tutorials": {"", "rules", "topology"},  # the same
    "frameworks": {"", "rules", "topology"},  # the same
    "": EVERYTHING,  # the public names
}
COLLECTIVES = {
    "all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "all_gather_object", "reduce_scatter_tensor",
    "isend", "irecv", "send", "recv", "P2POp", "batch_isend_irecv", "barrier", "new_group", "broadcast_object_list",
}  # fmt: skip


def files():
    """(room, module as a tuple, tree) of every file."""
    for folder, prefix in ((ROOT / "fused_dlam", ()), (ROOT / "kernels", ("kernels",))):
        for path in sorted(folder.rglob("*.py")):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            if prefix or parts[0] != "kernels":  # the link
                yield parts[0] if len(parts) > 1 else "", parts, ast.parse(path.read_text())


def imported(parts, tree):
    """(line, room) of every import of the package itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                base = [*parts[:-1][: len(parts) - node.level], *base]
            elif base[:1] == ["fused_dlam"]:
                base = base[1:]
            else:
                continue
            for alias in node.names:
                first = [*base, alias.name][0]
                yield node.lineno, first if first in MAY else ""
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "fused_dlam":
                    yield node.lineno, ([*alias.name.split("."), ""])[1]


def test_imports_go_one_way():
    offenders = [
        f"{'/'.join(parts)}.py:{line} imports {there or 'the package'}"
        for here, parts, tree in files()
        for line, there in imported(parts, tree)
        if there != here and there not in MAY[here]
    ]
    assert offenders == []


def test_collectives_are_called_in_comm_and_tools_alone():
    offenders = [
        f"{'/'.join(parts)}.py:{node.lineno} {node.attr}"
        for here, parts, tree in files()
        if here not in ("comm", "tools", "examples", "tutorials")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in COLLECTIVES
        if isinstance(node.value, ast.Name) and node.value.id in ("dist", "distributed", "c10d")
    ]
    assert offenders == []


def test_importing_the_package_imports_nothing_heavy():
    """DTensor takes 0.7 s, matplotlib as long. And nothing of the checkout but the package can be imported from it."""
    heavy = ("torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint", "matplotlib",
             "sklearn", "numba")  # fmt: skip
    code = f"import sys, fused_dlam; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    for name in ("tests", "bench", "fused_dlam"):
        assert importlib.util.find_spec(f"fused_dlam.{name}") is None
