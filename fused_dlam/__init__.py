"""Decentralized momentum optimizers for PyTorch: data-parallel training by gossip, without all-reduce."""

from . import rules, topology
from .comm.group import ExchangeError
from .comm.neighbor import neighbor_allreduce
from .layers.slowmo import SlowMo
from .optim.checkpoint import load_checkpoint, save_checkpoint, worker_state
from .optim.decentlam import DecentLaM
from .optim.gossip import Gossip
from .optim.gossip_sgd import GossipSGD
from .optim.mixed_precision import GradScaler
from .rules.jit import jit
from .rules.rule import Rule
from .theory.simulator import Simulation, simulate
from .theory.stability import consensus_growth
from .topology.topology import Topology

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
