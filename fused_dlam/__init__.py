"""Decentralized momentum optimizers for PyTorch: data-parallel training by gossip, without all-reduce."""

from . import layers, rules, topology
from .comm.mailbox import Mailbox
from .comm.neighbor_allreduce import neighbor_allreduce
from .comm.neighbor_exchange import neighbor_exchange
from .comm.neighbor_gather import neighbor_gather
from .comm.pair_average import pair_average
from .comm.push_sum import push_sum
from .comm.watch import ExchangeError
from .layers import SlowMo
from .optim.checkpoint import load_checkpoint, save_checkpoint, worker_state
from .optim.decentlam import DecentLaM
from .optim.gossip import Gossip
from .optim.gossip_sgd import GossipSGD
from .optim.mixed_precision import GradScaler
from .optim.pair_gossip import PairGossip
from .optim.push_sum import PushSum
from .rules.rule import Rule, jit
from .theory.limits import rate_limit
from .theory.simulator import Simulation, simulate
from .theory.stability import consensus_growth
from .topology import Topology

__version__ = "0.1.0"
__all__ = [
    "DecentLaM",
    "ExchangeError",
    "Gossip",
    "GossipSGD",
    "GradScaler",
    "Mailbox",
    "PairGossip",
    "PushSum",
    "Rule",
    "Simulation",
    "SlowMo",
    "Topology",
    "consensus_growth",
    "jit",
    "layers",
    "load_checkpoint",
    "neighbor_allreduce",
    "neighbor_exchange",
    "neighbor_gather",
    "pair_average",
    "push_sum",
    "rate_limit",
    "rules",
    "save_checkpoint",
    "simulate",
    "topology",
    "worker_state",
]
