"""What torch tests of its own optimizers: the generic tests of its test_optim.py (TestOptimRenewed), on one worker.

That file is not in torch's wheel, only what it is made of: `OptimizerInfo`, configurations of SGD, the decorator. So
its tests are written anew, under their names: state and checkpoints here, steps in
test_torch_optim.py.
"""

import copy
import io

import torch
from torch import nn
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_utils import TestCase, parametrize
from torch_problems import (
    Problem,
    add_entry,
    configurations,
    in_float32,
    inputs,
    names_of,
    run,
    take_entry,
)

from fused_dlam import GossipSGD


def trained_and_loaded(problem, twin_is_named, kwargs, steps):
    """The problem's optimizer after some steps, the problem's twin, and the twin's optimizer that loaded its state."""
    optimizer = GossipSGD(problem.named, **kwargs)
    run(problem, optimizer, steps=steps)
    twin = problem.twin(twin_is_named)
    other = GossipSGD(twin.named, **kwargs)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return optimizer, twin, other


class TestTorchOptimState(TestCase):
    @parametrize("is_named_optim0", [True, False])
    @parametrize("is_named_optim1", [True, False])
    @in_float32
    def test_state_dict_deterministic(self, device, dtype, optim_info, is_named_optim0, is_named_optim1):
        for kwargs in configurations(device, dtype, optim_info):
            problem = Problem(device, dtype, named=is_named_optim0)
            optimizer, twin, other = trained_and_loaded(problem, is_named_optim1, kwargs, steps=10)
            for _ in range(5):
                run(problem, optimizer, steps=2)
                run(twin, other, steps=2)
                self.assertEqual(problem.params, twin.params)
            states = [optimizer.state_dict(), other.state_dict()]
            for state in states:
                for group in state["param_groups"]:
                    group.pop("param_names", None)
            self.assertEqual(*states)
            for one in (optimizer, other):  # repeated parameters have one representation
                one.param_groups.extend(one.param_groups)
            groups = [one.state_dict()["param_groups"] for one in (optimizer, other)]
            assert groups[0][-1]["params"] == groups[1][-1]["params"] == groups[0][0]["params"]

    @in_float32
    def test_can_load_older_state_dict(self, device, dtype, optim_info):
        """Every key that is not torch.optim.SGD's may be missing, and `maximize`."""
        for kwargs in configurations(device, dtype, optim_info):
            problem = Problem(device, dtype)
            optimizer = GossipSGD(problem.params, **kwargs)
            run(problem, optimizer, steps=3)
            older = copy.deepcopy(optimizer.state_dict())
            for group in older["param_groups"]:
                for name in [k for k in group if k not in ("lr", "momentum", "weight_decay", "params")]:
                    del group[name]
            optimizer.load_state_dict(older)
            run(problem, optimizer, steps=2)

    @parametrize("is_named_optim0", [True, False])
    @parametrize("is_named_optim1", [True, False])
    @in_float32
    def test_can_load_from_to_named_state_dict(self, device, dtype, optim_info, is_named_optim0, is_named_optim1):
        for kwargs in configurations(device, dtype, optim_info):
            problem = Problem(device, dtype, named=is_named_optim0)
            _, twin, other = trained_and_loaded(problem, is_named_optim1, kwargs, steps=3)
            run(twin, other, steps=2)
            if is_named_optim0 or is_named_optim1:
                assert other.state_dict()["param_groups"][0]["param_names"] == ["name0", "name1"]

    @parametrize("is_named_optim", [True, False])
    @in_float32
    def test_save_load_equality_with_weights_only(self, device, dtype, optim_info, is_named_optim):
        for kwargs in configurations(device, dtype, optim_info):
            problem = Problem(device, dtype, named=is_named_optim)
            optimizer = GossipSGD(problem.named, **kwargs)
            run(problem, optimizer, steps=3)
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            for weights_only in (True, False):
                file.seek(0)
                self.assertEqual(torch.load(file, weights_only=weights_only), optimizer.state_dict())

    @in_float32
    def test_state_dict_with_cuda_params(self, device, dtype, optim_info):
        """A checkpoint made on the CPU goes on elsewhere, and is not changed by being loaded."""
        for given in inputs("cpu"):
            problem = Problem("cpu", dtype)
            optimizer = GossipSGD(problem.params, **given.kwargs)
            run(problem, optimizer, steps=3)
            twin = problem.twin()
            twin.params, twin.v = [nn.Parameter(p.detach().to(device)) for p in twin.params], twin.v.to(device)
            other = GossipSGD(twin.params, **given.kwargs)
            saved = copy.deepcopy(optimizer.state_dict())
            other.load_state_dict(saved)
            self.assertEqual(saved, optimizer.state_dict())
            run(problem, optimizer, steps=5)
            run(twin, other, steps=5)
            self.assertEqual([p.cpu() for p in twin.params], problem.params)

    # -- hooks -------------------------------------------------------------------------------------------------------

    def _hooked(self, device, dtype, info, *names):
        for kwargs in configurations(device, dtype, info):
            optimizer = GossipSGD([torch.rand(2, 3, device=device, dtype=dtype, requires_grad=True)], **kwargs)
            for name in names:
                hook = add_entry if name.startswith("state_dict_pre") else take_entry
                getattr(optimizer, f"register_{name}_hook")(hook)
            yield optimizer.state_dict()

    @in_float32
    def test_state_dict_pre_hook(self, device, dtype, optim_info):
        assert all(s["state"]["test"] == 1 for s in self._hooked(device, dtype, optim_info, "state_dict_pre"))

    @in_float32
    def test_state_dict_post_hook(self, device, dtype, optim_info):
        assert all(s["found"] is None for s in self._hooked(device, dtype, optim_info, "state_dict_post"))

    @in_float32
    def test_state_dict_pre_post_hook(self, device, dtype, optim_info):
        both = ("state_dict_pre", "state_dict_post")
        assert all(s["found"] == 1 and "test" not in s["state"] for s in self._hooked(device, dtype, optim_info, *both))

    def _loaded(self, device, dtype, info, *hooks):
        """Optimizers that have loaded a checkpoint which a hook replaced by another, with lr = 0.003 and momentum 7."""

        def replace(optimizer, state_dict):
            other = copy.deepcopy(state_dict)
            other["param_groups"][0]["lr"] = 0.003
            for state in other["state"].values():
                for value in state.values():
                    value.fill_(7.0)
            return other

        def look(optimizer):
            p = optimizer.param_groups[0]["params"][0]
            optimizer.state["seen"] = [float(v.mean()) for v in optimizer.state[p].values()]

        for kwargs in configurations(device, dtype, info):
            optimizer = GossipSGD([torch.rand(2, 3, device=device, dtype=dtype, requires_grad=True)], **kwargs)
            saved = optimizer.state_dict()
            if "pre" in hooks:
                optimizer.register_load_state_dict_pre_hook(replace)
            if "post" in hooks:
                optimizer.register_load_state_dict_post_hook(look)
            optimizer.load_state_dict(saved)
            yield optimizer

    @in_float32
    def test_load_state_dict_pre_hook_and_prepend(self, device, dtype, optim_info):
        def second(optimizer, state_dict):
            state_dict["param_groups"][0]["lr"] = 0.002

        for optimizer in self._loaded(device, dtype, optim_info, "pre"):
            assert optimizer.param_groups[0]["lr"] == 0.003
            p = optimizer.param_groups[0]["params"][0]
            assert all((v == 7.0).all() for v in optimizer.state[p].values())
            saved = optimizer.state_dict()
            optimizer.register_load_state_dict_pre_hook(second)
            optimizer.load_state_dict(saved)
            assert optimizer.param_groups[0]["lr"] == 0.002
            optimizer.register_load_state_dict_pre_hook(second, prepend=True)
            optimizer.load_state_dict(saved)
            assert optimizer.param_groups[0]["lr"] == 0.002

    @in_float32
    def test_load_state_dict_post_hook(self, device, dtype, optim_info):
        assert all(not any(o.state["seen"]) for o in self._loaded(device, dtype, optim_info, "post"))

    @in_float32
    def test_load_state_dict_pre_post_hook(self, device, dtype, optim_info):
        """A post hook sees what was loaded, in its final place."""
        for optimizer in self._loaded(device, dtype, optim_info, "pre", "post"):
            assert all(v == 7.0 for v in optimizer.state["seen"])

    # -- copies ------------------------------------------------------------------------------------------------------

    @in_float32
    def test_deepcopy_copies_all_public_attrs(self, device, dtype, optim_info):
        """And the copy goes on as the original does."""
        for kwargs in configurations(device, dtype, optim_info):
            problem = Problem(device, dtype)
            optimizer = GossipSGD(problem.params, **kwargs)
            run(problem, optimizer, steps=3)
            other_problem, other = copy.deepcopy((problem, optimizer))
            public = [{k for k in vars(o) if not k.startswith("_")} for o in (optimizer, other)]
            assert public[0] == public[1]
            for one, o in ((problem, optimizer), (other_problem, other)):
                run(one, o, steps=3)
            self.assertEqual(problem.params, other_problem.params, rtol=0, atol=0)
            self.assertEqual(optimizer.state_dict(), other.state_dict(), rtol=0, atol=0)

    @in_float32
    def test_non_empty_state(self, device, dtype, optim_info):
        for kwargs in configurations(device, dtype, optim_info):
            if kwargs.get("method") != "dsgd":  # which has no momentum
                problem = Problem(device, dtype)
                optimizer = GossipSGD(problem.params, **kwargs)
                run(problem, optimizer, steps=1)
                assert all(len(state) for state in optimizer.state.values())


HERE = names_of(TestTorchOptimState)
instantiate_device_type_tests(TestTorchOptimState, globals(), only_for=("cpu", "cuda"))
