"""A worker of the table: trains, meets with its fault, and leaves in a file what became of it."""

import faulthandler
import json
import logging
import os
import signal
import sys
import time
from contextlib import ExitStack, nullcontext

import streamed_transport
import torch
import torch.distributed as dist
from forks import launched
from places import IN_RECOVERY, INSIDE, inside
from table import CONTINUE, MORE, OPTIMIZERS, STEP, STEPS
from torch import nn

import fused_dlam

FAULT, BUILT, TRAINED, RECOVERED, GO, CELLS = range(6)  # cells of 16 numbers: times, by rank
WIDE = 48


def cell(kind, rank):
    return 16 * kind + rank


class Worker:
    def __init__(self, case, rank, store, cells, folder):
        self.case, self.rank, self.store, self.cells, self.folder = case, rank, store, cells, folder
        self.victim = rank in case["victims"]
        self.place = case["then"] if case["then"] and rank == case["victims"][-1] else case["place"]
        self.told = {"calls": 0, "own": 0, "events": 0}

    # -- the fault ---------------------------------------------------------------------------------------------------

    def strike(self):
        self.cells[cell(FAULT, self.rank)] = time.time()
        if self.case["act"] == "late":
            time.sleep(0.5)
        else:
            os.kill(os.getpid(), signal.SIGKILL if self.case["act"] == "kill" else signal.SIGSTOP)

    def at(self, place):
        """A context: the fault happens in it if it is this rank's and of this place."""
        mine = self.victim and place == self.place
        if mine and place not in INSIDE and self.case["act"] in ("kill", "stop"):
            self.strike()
        return inside(place, self.strike) if mine and place in INSIDE else nullcontext()

    def all_have(self, kind):
        while not all(self.cells[cell(kind, r)] for r in range(self.case["n"])):
            time.sleep(0.01)

    def say(self, kind):
        self.cells[cell(kind, self.rank)] = time.time()

    # -- the script --------------------------------------------------------------------------------------------------

    def build(self):
        case = self.case
        torch.manual_seed(0)
        layers = [layer for _ in range(4) for layer in (nn.Linear(WIDE, WIDE), nn.Tanh())]
        self.model = nn.Sequential(*layers, nn.Linear(WIDE, 1))
        generator = torch.Generator().manual_seed(self.rank)
        self.x = torch.randn(16, WIDE, generator=generator)
        more = dict(
            timeout=case["timeout"], bucket_mb=0.01, on_failure=case["mode"], **(OPTIMIZERS | MORE)[case["optimizer"]]
        )
        if case["mode"] == CONTINUE:
            more |= dict(admit_every=2, on_members_changed=lambda members: self.say(RECOVERED))
        if case["optimizer"] in ("gossip", "outer"):
            inner = torch.optim.SGD(self.model.parameters(), lr=0.02, momentum=0.9)
            inner.register_step_post_hook(lambda *_: self.count())
            return fused_dlam.Gossip(inner, **more)
        return fused_dlam.GossipSGD(self.model.parameters(), lr=0.02, **more)

    def count(self):
        self.told["own"] += 1

    def run(self):
        faulthandler.register(signal.SIGUSR1, file=open(self.folder / f"{self.rank}.stack", "w"))
        logging.basicConfig(level=logging.INFO, format="%(asctime)s.%(msecs)03d %(message)s", datefmt="%H:%M:%S")
        torch.set_num_threads(1)
        try:
            self.train()
            self.told["outcome"] = "end"
        except BaseException as error:
            self.told |= {"outcome": "error", "type": type(error).__name__, "text": str(error)}
            self.told |= {k: getattr(error, k, None) for k in ("rank", "peer", "step", "call", "lost", "silent")}
            self.told["is_exchange_error"] = isinstance(error, fused_dlam.ExchangeError)
            raise
        finally:
            self.told["seconds"] = time.time() - max(self.cells[cell(FAULT, r)] for r in range(16))
            (self.folder / f"{self.rank}.json").write_text(json.dumps(self.told))

    def train(self):
        case = self.case
        if case["streamed"]:
            streamed_transport.play()
        dist.init_process_group("gloo")
        self.told["started"] = True
        if case["loader"]:  # its workers are forks, and hold copies of every socket
            data = torch.utils.data.DataLoader(
                list(range(64)), num_workers=1, persistent_workers=True, multiprocessing_context="fork"
            )
        with self.at("built"), self.at("settings"), self.at("broadcast"):
            self.optimizer = self.build()
        if case["loader"]:
            self.loader = iter(data)
            next(self.loader)
        self.say(BUILT)
        self.all_have(BUILT)
        with ExitStack() as places:
            for place in ("first", "sent", "unsent", "last", *IN_RECOVERY):
                places.enter_context(self.at(place))
            self.loop()
        self.say(TRAINED)
        if case["place"] == "end" and self.victim:
            self.all_have(TRAINED)
        with self.at("end"):
            pass
        self.look()
        if case["act"] not in ("late", "return"):  # a script may end with its loop
            self.optimizer.finish()
        dist.destroy_process_group()

    def loop(self):
        optimizer = self.optimizer
        while optimizer.steps_done < STEPS:
            step = optimizer.steps_done
            if step == STEP + 5 and self.case["resume"] == "recovered":
                self.wait_for_the_other()
            optimizer.zero_grad()
            (self.model(self.x) - self.x[:, :1].sin()).square().mean().backward()
            optimizer.step()
            self.told["calls"] += 1
            if step == STEP:
                self.outside_of_steps()
                if self.leaves():
                    return

    def wait_for_the_other(self):
        """Training is not over before the stopped one asks to be let in. All are at one step again by now."""
        n, store = self.case["n"], self.optimizer._recovery.membership.store
        while self.optimizer.members == (0, 2, 3) and not store.check([f"asks/{n}"]):
            time.sleep(0.02)

    def leaves(self):
        act = self.case["act"]
        if act == "store" and self.rank == 0:
            self.say(FAULT)
            while not self.cells[cell(GO, 0)]:  # until it is dead
                time.sleep(0.01)
        if not self.victim or act not in ("return", "finish", "raise", "exit"):
            return False
        self.say(FAULT)
        if act == "raise":
            raise ValueError("a mistake of the script")
        if act == "exit":
            sys.exit(3)
        return True

    def flat(self):
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()]).clone()

    def outside_of_steps(self):
        place, optimizer = self.case["place"], self.optimizer
        with self.at("between"):
            pass
        if place in ("averaged", "confirming"):
            before = self.flat()
            try:
                with self.at("averaged"), self.at("confirming"), optimizer.averaged(self.model):
                    self.told["mean"] = self.flat().double().sum().item()
            finally:
                self.told["intact"] = torch.equal(before, self.flat())
        if place == "distance":
            with self.at("distance"):
                self.told["distance"] = optimizer.consensus_distance()
        if place in ("saving", "before-saving"):
            self.saved = self.flat()
            with self.at("before-saving"), self.at("saving"):
                fused_dlam.save_checkpoint(self.folder / "checkpoint", self.model, optimizer)

    def look(self):
        """At the end: what there is to be told."""
        optimizer, told = self.optimizer, self.told
        if self.case["optimizer"] not in ("gossip", "outer"):
            taken = {slot.steps for b in optimizer._engine.buckets for slot in b.slots}
            told["own"] = taken.pop() if len(taken) == 1 else sorted(taken)
        told |= {"steps": optimizer.steps_done, "members": optimizer.members}
        told["finite"] = bool(torch.isfinite(self.flat()).all())
        if optimizer._recovery is not None:
            told["events"] = len(optimizer._recovery.events)
        if self.case["resume"] == "recovered":
            told["apart"] = optimizer.consensus_distance() / self.flat().norm().item()
        if self.case["place"] in ("saving", "before-saving"):
            told["saved by"] = fused_dlam.load_checkpoint(self.folder / "checkpoint", self.model, optimizer)
            told["back"] = torch.equal(self.saved, self.flat()) and optimizer.steps_done == STEP + 1


def run(case, rank, port, cells, folder):
    launched(rank, case["n"], port, case["per_machine"])
    Worker(case, rank, port, cells, folder).run()
