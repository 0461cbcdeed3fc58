"""Promises about checkpoints on one worker, whatever happened to their files:

- torn, changed, deleted and swapped files: `load_checkpoint` gives what was saved, bit for bit, or refuses in words,
  and then model and optimizer are as before, bit for bit;
- no file can have code run, neither `.metadata` nor an entry of another file;
- foreign checkpoints of torch.distributed.checkpoint, and models with other names and shapes, are refused in words.
"""

import functools
import pickle
import shutil
import tempfile
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from api_examples import fuzzed, refused
from hypothesis import strategies as st
from torch import nn

from fused_dlam import Gossip, GossipSGD, load_checkpoint, save_checkpoint
from fused_dlam.optim.safe_reading import read_metadata

KINDS = ("mi-dmsgd", "adam", "gossip")


def build(kind, steps, seed=0, width=4):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 1))
    if kind == "gossip":
        optimizer = Gossip(torch.optim.AdamW(model.parameters(), lr=0.1))
    else:
        optimizer = GossipSGD(model.parameters(), lr=0.1, method=kind)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3])
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        scheduler.step()
    return model, optimizer, scheduler


def values(things):
    """All that is in a model, an optimizer and a scheduler, as bytes."""

    def plain(x):
        if isinstance(x, torch.Tensor):
            return str(x.dtype), tuple(x.shape), x.detach().numpy().tobytes()
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items()}
        return [plain(v) for v in x] if isinstance(x, (list, tuple)) else repr(x)

    return [plain(thing.state_dict()) for thing in things]


class Saves:
    """Three saves of each kind, two of them of one step, in a folder that lives as long as the tests."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory()
        self.home = Path(self.folder.name)
        self.values = {}
        for kind in KINDS:
            for name, steps, seed in (("a", 3, 1), ("same step", 3, 2), ("later", 4, 3)):
                things = build(kind, steps, seed)
                save_checkpoint(self.home / kind / name, *things[:2], scheduler=things[2])
                self.values[kind, name] = values(things)

    def files(self, kind, name):
        return sorted(p for p in (self.home / kind / name).rglob("*") if p.is_file())


@functools.cache
def the_saves():
    return Saves()


def load_into(path, kind):
    """(whether it loaded, the values afterwards); on refusal they are what they were."""
    things = build(kind, 1)
    before = values(things)
    _, error = refused(lambda: load_checkpoint(path, *things[:2], scheduler=things[2]), OSError)
    after = values(things)
    assert error is None or after == before, f"something was loaded although: {error}"
    return error is None, after


HARM = st.tuples(
    st.sampled_from(["truncate", "flip", "zero", "delete", "append", "swap", "folder", "random"]),
    st.integers(0, 1),  # which file
    st.floats(0, 1),  # where in it
    st.integers(0, 7),  # which bit
)


def harm(file, how, place, bit, other):
    content = bytearray(file.read_bytes()) if file.is_file() else bytearray()
    at = min(int(place * len(content)), len(content) - 1)
    if how == "truncate":
        file.write_bytes(content[: max(at, 0)])
    elif how == "delete":
        file.unlink()
    elif how == "append":
        file.write_bytes(content + b"\0" * bit + b"more")
    elif how == "swap":
        shutil.copy(other, file)
    elif how == "folder":
        file.unlink()
        file.mkdir()
    elif how == "random":
        file.write_bytes(torch.randint(256, (at + 1,), generator=torch.Generator().manual_seed(bit)).byte().numpy())
    elif content:
        if how == "flip":
            content[at] ^= 1 << bit
        else:
            content[at : at + 1 + 3 * bit] = bytes(len(content[at : at + 1 + 3 * bit]))
        file.write_bytes(content)


@fuzzed(25, 0.1, kind=st.sampled_from(KINDS), other=st.sampled_from(["same step", "later"]),
        harms=st.lists(HARM, min_size=1, max_size=2, unique_by=lambda h: h[1]))  # fmt: skip
def test_files_that_were_harmed(kind, other, harms):
    saved = the_saves()
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder, "x")
        shutil.copytree(saved.home / kind / "a", there)
        own = sorted(p for p in there.rglob("*") if p.is_file())
        for how, which, place, bit in harms:
            harm(own[which], how, place, bit, saved.files(kind, other)[which])
        loaded, found = load_into(there, kind)
        assert not loaded or found == saved.values[kind, "a"]


NESTED = st.recursive(
    st.sampled_from([1, 0.5, "text", None]) | st.builds(torch.ones, st.integers(0, 3)),
    lambda inner: st.dictionaries(st.sampled_from(["a", "model", "optimizer", "state", "param_groups", "0"]), inner,
                                  min_size=1, max_size=3) | st.lists(inner, min_size=1, max_size=2),
    max_leaves=6,
)  # fmt: skip
WORKER = st.fixed_dictionaries({"model": NESTED, "optimizer": NESTED, "scheduler": NESTED})


NAMES = st.sampled_from(["worker0", "worker1", "parts", "model", "worker"])


@fuzzed(8, 0.02, kind=st.sampled_from(KINDS), state=st.dictionaries(NAMES, NESTED | WORKER, min_size=1, max_size=3))
def test_foreign_checkpoints(state, kind):
    with tempfile.TemporaryDirectory() as folder:
        dcp.save(state, checkpoint_id=folder, no_dist=True)
        loaded, _ = load_into(folder, kind)
        assert not loaded


WHAT = ["place", "stored", "drop", "drop place", "offset", "length", "file", "dtype", "fields"]


def mutated(metadata, draw):
    """A Metadata with some of its fields exchanged for others, as no save writes it."""
    keys = sorted(metadata.state_dict_metadata)
    key, other = draw(st.sampled_from(keys)), draw(st.sampled_from(keys))
    what = draw(
        st.sampled_from(["place", "stored", "drop", "drop place", "offset", "length", "file", "dtype", "fields"])
    )
    infos = list(metadata.storage_data.values())
    info = infos[draw(st.integers(0, len(infos) - 1))]
    number = draw(st.sampled_from([-1, 0, 1, 2**40, None, "x", 1.5]))
    if what == "place":
        odd = st.sampled_from([(), ("worker0",), ("worker0", "optimizer", "state"), "worker0", None, (1, 2),
                               ("parts", "x", "0", "a"), metadata.planner_data[other]])  # fmt: skip
        metadata.planner_data[key] = draw(odd)
    elif what == "stored":
        metadata.state_dict_metadata[key] = metadata.state_dict_metadata[other]
    elif what == "drop":
        del metadata.state_dict_metadata[key]
    elif what == "drop place":
        del metadata.planner_data[key]
    elif what in ("offset", "length"):
        setattr(info, what, number)
    elif what == "file":
        info.relative_path = draw(st.sampled_from(["", "..", "/", "nothing", 3, None, "\0"]))
    elif what == "dtype":
        entry = metadata.state_dict_metadata[key]
        if hasattr(entry, "properties"):
            entry.properties.dtype = draw(st.sampled_from([torch.int8, torch.float64, torch.complex64, 3, None]))
    else:
        name = draw(st.sampled_from(["state_dict_metadata", "planner_data", "storage_data"]))
        setattr(metadata, name, draw(st.sampled_from([None, {}, [], 3, {1: 2}])))


@fuzzed(12, 0.05, data=st.data(), kind=st.sampled_from(KINDS))
def test_metadata_that_no_save_writes(data, kind):
    saved = the_saves()
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder, "x")
        shutil.copytree(saved.home / kind / "a", there)
        metadata = read_metadata(there)
        mutated(metadata, data.draw)
        (there / ".metadata").write_bytes(pickle.dumps(metadata))
        load_into(there, kind)
