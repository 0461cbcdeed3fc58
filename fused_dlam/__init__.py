"""Decentralized momentum optimizers for PyTorch: data-parallel training by gossip, without all-reduce."""

from pathlib import Path

_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir():  # a source checkout keeps kernels/ beside this folder
    __path__.append(str(_here.parent))

from . import topology  # noqa: E402
from .amp import GradScaler  # noqa: E402
from .decentlam import DecentLaM  # noqa: E402
from .exchange import ExchangeError  # noqa: E402
from .gossip import Gossip  # noqa: E402
from .kernels import rules  # noqa: E402
from .kernels.jit import jit  # noqa: E402
from .kernels.rule import Rule  # noqa: E402
from .mixing import Topology  # noqa: E402
from .neighbor import neighbor_allreduce  # noqa: E402
from .optimizer import GossipSGD  # noqa: E402
from .resume import load_checkpoint, save_checkpoint, worker_state  # noqa: E402
from .simulator import Simulation, simulate  # noqa: E402
from .slowmo import SlowMo  # noqa: E402
from .stability import consensus_growth  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "DecentLaM",
    "ExchangeError",
    "Gossip",
    "GossipSGD",
    "GradScaler",
    "Rule",
    "Simulation",
    "SlowMo",
    "Topology",
    "consensus_growth",
    "jit",
    "load_checkpoint",
    "neighbor_allreduce",
    "rules",
    "save_checkpoint",
    "simulate",
    "topology",
    "worker_state",
]
