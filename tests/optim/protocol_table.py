"""What torch expects of an optimizer, row by row, and the table that test_protocol_*.py make of what they find.

PROTOCOL_TABLE=write python -m pytest tests/optim -k protocol    writes protocol_table.md anew
"""

import os
from pathlib import Path

PATH = Path(__file__).with_name("protocol_table.md")
CONTRACT = """Parameters, groups or named parameters; bad settings are a ValueError in torch's words
A group may be added at any time
Every hyper-parameter is read from its group at every step
`step(closure)` returns the closure's loss
`step` is wrapped once, for subclasses too
Step hooks, local and global
`state_dict` hooks, also with entries of their own in `state`
Loading does not round float32 state to 16-bit parameters
State stays in its flat buffers when a checkpoint is loaded
Older checkpoints load
`deepcopy` and `pickle`
Checkpoints load with `weights_only` and hold no more than they need
`zero_grad(set_to_none=True)` every step
A parameter without a gradient is left alone
Schedulers wrap `step`
A tensor learning rate, without a wait for the device
Schedulers that cycle momentum
`maximize`
`foreach`, `fused`, `differentiable`, `capturable`
`GradScaler` calls `step` whatever it found
`grad_scale` and `found_inf` are honored
Sparse gradients
Complex parameters
Mixed types and devices
Empty, 0-d and non-contiguous parameters
Non-leaf, duplicate and shared parameters
Distributed checkpoints fetch and set the state without a step
Sharded (DTensor) parameters
`torch.compile` around forward and backward, and around `step`
One optimizer per parameter, stepping in the backward pass
`PostLocalSGDOptimizer` and `ZeroRedundancyOptimizer`
Ranges in a profiler's trace
`repr` prints every group
CUDA-graph capture of `step`""".splitlines()
HEAD = """What torch expects of an optimizer, and what `GossipSGD` does. `pytest tests/optim -k protocol` fails where
that is not so; with `PROTOCOL_TABLE=write` it renews this file. Refused: with the message quoted, as it is raised.

| | contract | outcome | how |
|---|---|---|---|
"""


class Table:
    """Collects rows while the tests run; a test that fails adds none."""

    def __init__(self):
        self.rows: dict[int, list[tuple[str, str]]] = {}

    def works(self, row: int, how: str) -> None:
        self.rows.setdefault(row, []).append(("works", how))

    def refused(self, row: int, error: object) -> None:
        kind = f"{type(error).__name__}: " if isinstance(error, Exception) else ""
        self.rows.setdefault(row, []).append(("refused", f'"{kind}{error}"'))

    def lines(self) -> dict[int, str]:
        return {
            row: f"| {row} | {CONTRACT[row - 1]} | {' / '.join(dict.fromkeys(o for o, _ in found))} |"
            f" {'; '.join(how for _, how in found)} |"
            for row, found in sorted(self.rows.items())
        }

    def check(self) -> None:
        """Fails if the file says otherwise of a row whose tests ran, or, where all did, lacks one or has one more."""
        lines = self.lines()
        if os.environ.get("PROTOCOL_TABLE") == "write" and len(lines) == len(CONTRACT):
            PATH.write_text(HEAD + "\n".join(lines.values()) + "\n")
        written = PATH.read_text().splitlines()
        stale = [line for line in lines.values() if line not in written]
        assert not stale, f"{PATH.name} is stale, PROTOCOL_TABLE=write renews it:\n" + "\n".join(stale)
        if len(lines) == len(CONTRACT):
            assert written == (HEAD + "\n".join(lines.values())).splitlines()
