"""What torch tests of its own optimizers: the generic tests of its test_optim.py (TestOptimRenewed), on one worker.

That file is not in torch's wheel, only what it is made of: `OptimizerInfo`, configurations of SGD, the decorator. So
here are its tests under their names, written anew; NOT_HERE says why the others are left out. The law behind them is in
test_optimizer.py: one worker is `torch.optim.SGD`, step for step.
"""

import copy
import inspect
import io

import pytest
import torch
from torch import nn

from fused_dlam import GossipSGD

pytest.importorskip("expecttest")
common = pytest.importorskip("torch.testing._internal.common_optimizers")
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook  # noqa: E402
from torch.testing._internal.common_device_type import instantiate_device_type_tests  # noqa: E402
from torch.testing._internal.common_utils import TestCase, parametrize  # noqa: E402

METHODS = ("dmsgd", "decentlam", "pmsgd", "qg-dmsgd", "dsgd", "da-dmsgd")


def inputs(device, dtype=None):
    """torch's configurations of SGD that `GossipSGD` has arguments for, and one for each method."""
    has = inspect.signature(GossipSGD.__init__).parameters
    ours = [i for i in common.optim_inputs_func_sgd(device, dtype) if all(name in has for name in i.kwargs)]
    return ours + [common.OptimizerInput(params=None, kwargs={"method": m}, desc=m) for m in METHODS]


db = [
    common.OptimizerInfo(
        GossipSGD,
        optim_inputs_func=inputs,
        optim_error_inputs_func=common.optim_error_inputs_func_sgd,
        supported_impls=("fused",),
        supports_fused_on=("cpu", "cuda"),
    )
]
in_float32 = common.optims(db, dtypes=[torch.float32])

# Of torch's generic tests those that are not here, and why.
NOT_HERE = {
    "test_optim_infos_do_not_specify_global_cliquey_kwargs": "is about torch's list of configurations",
    "test_forloop_goes_right_direction_multigpu": "needs two GPUs; a bucket holds parameters of one device",
    "test_rosenbrock_sparse": "sparse gradients are refused: test_protocol.py, row 22",
    "test_foreach_matches_forloop": "there is no `foreach`",
    "test_mixed_device_dtype": "needs two GPUs; mixed types: test_protocol.py, row 24",
    "test_set_default_dtype_works_with_foreach": "there is no `foreach`",
    "test_foreach_large_tensor": "there is no `foreach`",
    "test_peak_memory_foreach": "there is no `foreach`",
    "test_fused_error_on_params_on_meta": "parameters on the meta device are refused at construction: row 2",
    "test_fused_large_tensor": "needs 64 GB; the kernels count in 64 bits: test_triton_interpreter.py",
    "test_cpu_load_state_dict": "is about the flags `fused` and `capturable` in checkpoints, which ours have not",
    "test_load_nontensor_step": "is about a tensor `step` in the state of a parameter, which ours have not",
    "test_second_order_optims_return_consistent_types": "is about optimizers that need a closure",
    "test_defaults_changed_to_foreach": "there is no `foreach`",
    "test_fused_cpu_matches_cuda": "is part of bench/gpu.py, which compares every pass with float64",
}
UPSTREAM = """errors forloop_goes_right_direction param_group_with_lrscheduler_goes_right_direction tensor_lr complex
complex_2d fused_matches_forloop fused_does_not_step_if_foundinf param_groups_weight_decay param_groups_lr
step_is_noop_when_params_have_no_grad step_is_noop_for_zero_grads optimizer_can_be_printed state_dict_deterministic
can_load_older_state_dict can_load_from_to_named_state_dict save_load_equality_with_weights_only
state_dict_with_cuda_params state_dict_pre_hook state_dict_post_hook state_dict_pre_post_hook
load_state_dict_pre_hook_and_prepend load_state_dict_post_hook load_state_dict_pre_post_hook step_post_hook
step_pre_hook step_all_hooks deepcopy_copies_all_public_attrs non_empty_state""".split()


def configurations(device, dtype, info):
    for one in common._get_optim_inputs_including_global_cliquey_kwargs(device, dtype, info):
        yield copy.deepcopy(one.kwargs)


class Problem:
    """|W v + b|^2 over two parameters, contiguous or not, named or not."""

    def __init__(self, device, dtype, contiguous=True, named=False):
        shapes = ((10, 5), (10,)) if contiguous else ((10, 5, 2), (10, 2))
        whole = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
        self.params = [nn.Parameter(w if contiguous else w[..., 0]) for w in whole]
        self.v = torch.randn(5, device=device, dtype=dtype)
        self.named = [(f"name{i}", p) for i, p in enumerate(self.params)] if named else self.params

    def loss(self):
        weight, bias = self.params
        return (weight.mv(self.v) + bias).square().sum()

    def closure(self, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        return closure

    def twin(self, named=False):
        other = copy.copy(self)
        other.params = [nn.Parameter(p.detach().clone()) for p in self.params]
        other.named = [(f"name{i}", p) for i, p in enumerate(other.params)] if named else other.params
        return other


def run(problem, optimizer, schedulers=(), steps=20):
    """Steps, by a closure and by hand in turn; returns whether the loss fell."""
    first = problem.loss().item()
    for step in range(steps):
        loss = optimizer.step(problem.closure(optimizer)) if step % 2 else problem.closure(optimizer)()
        if not step % 2:
            optimizer.step()
        for scheduler in schedulers:
            plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*([loss.detach()] if plateau else []))
    return problem.loss().item() < first


def add_entry(optimizer):
    optimizer.state["test"] = 1


def take_entry(optimizer, state_dict):
    state_dict["found"] = state_dict["state"].pop("test", None)
    return state_dict


class TestTorchOptim(TestCase):
    def test_every_generic_test_is_here_or_has_a_reason(self, device):
        assert set(UPSTREAM) == HERE and not set(NOT_HERE) & {f"test_{name}" for name in HERE}

    @common.optims(db)
    def test_errors(self, device, dtype, optim_info):
        for case in optim_info.optim_error_inputs_func(device, dtype):
            given = case.optimizer_error_input
            if issubclass(case.error_type, Warning):
                with self.assertWarnsRegex(case.error_type, case.error_regex):
                    optimizer = GossipSGD(given.params, **given.kwargs)
                given.params[0].grad = torch.ones_like(given.params[0])
                optimizer.step()
            else:
                with self.assertRaisesRegex(case.error_type, case.error_regex):
                    GossipSGD(given.params, **given.kwargs)

    @parametrize("contiguous", [True, False])
    @parametrize("with_lrsched", [True, False])
    @in_float32
    def test_forloop_goes_right_direction(self, device, dtype, optim_info, contiguous, with_lrsched):
        for schedulers in optim_info.scheduler_inputs if with_lrsched else [[]]:
            for kwargs in configurations(device, dtype, optim_info):
                problem = Problem(device, dtype, contiguous)
                optimizer = GossipSGD(problem.params, **kwargs)
                fell = run(problem, optimizer, [make(optimizer) for make in schedulers])
                assert fell is not kwargs.get("maximize", False), kwargs

    @in_float32
    def test_param_group_with_lrscheduler_goes_right_direction(self, device, dtype, optim_info):
        for schedulers in optim_info.scheduler_inputs:
            problem = Problem(device, dtype)
            weight, bias = problem.params
            optimizer = GossipSGD([{"params": [weight]}, {"params": [bias], "lr": 0.01}])
            assert run(problem, optimizer, [make(optimizer) for make in schedulers])

    @in_float32
    def test_tensor_lr(self, device, dtype, optim_info):
        """Bit-equal to the same number, also with a scheduler that writes into the tensor."""
        for kwargs in configurations(device, dtype, optim_info):
            problem = Problem(device, dtype)
            twin = problem.twin()
            for one, lr in ((problem, 1e-3), (twin, torch.tensor(1e-3, dtype=torch.float64))):
                optimizer = GossipSGD(one.params, **{**kwargs, "lr": lr})
                run(one, optimizer, [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)], 6)
            self.assertEqual(problem.params, twin.params, rtol=0, atol=0)

    @common.optims(db, dtypes=[torch.complex64])
    def test_complex(self, device, dtype, optim_info):
        """Equal to the same numbers as real parameters, beside a real one."""
        for kwargs in configurations(device, dtype, optim_info):
            shapes = ((10, 5, torch.complex64), (10, 1, torch.complex64), (10, 5, torch.float32))
            a = [torch.randn(m, n, device=device, dtype=t, requires_grad=True) for m, n, t in shapes]
            b = [(torch.view_as_real(p) if p.is_complex() else p).detach().clone().requires_grad_() for p in a]
            first, second = GossipSGD(a, **kwargs), GossipSGD(b, **kwargs)
            for _ in range(3):
                for p, q in zip(a, b, strict=True):
                    p.grad = torch.randn_like(p)
                    q.grad = torch.view_as_real(p.grad).clone() if p.is_complex() else p.grad.clone()
                first.step()
                second.step()
                self.assertEqual([torch.view_as_real(p) if p.is_complex() else p for p in a], b)

    @common.optims(db, dtypes=[torch.complex64])
    def test_complex_2d(self, device, dtype, optim_info):
        def rosenbrock(z):
            return ((1 - z[0]) ** 2 + 100 * (z[1] - z[0] ** 2) ** 2).abs()

        for kwargs in configurations(device, dtype, optim_info):
            kwargs["lr"] = 1e-4
            z = torch.randn(2, device=device, dtype=dtype, requires_grad=True)
            parts = [part.detach().clone().requires_grad_() for part in (z.real, z.imag)]
            first, second = GossipSGD([z], **kwargs), GossipSGD(parts, **kwargs)
            for _ in range(3):
                for optimizer in (first, second):
                    optimizer.zero_grad()
                rosenbrock(z).backward()
                rosenbrock(torch.complex(*parts)).backward()
                first.step()
                second.step()
                self.assertEqual([z.real, z.imag], parts)

    @common.optims(db, dtypes=[torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_fused_matches_forloop(self, device, dtype, optim_info):
        """Compiled passes against the reference, parameters and state; a layer is frozen, one step has no gradients."""
        # 16-bit types with the default method alone: each rule takes a second to compile for each type.
        for given in inputs(device)[: None if dtype.itemsize > 2 else -len(METHODS)]:
            runs = []
            for fused in (False, True):
                torch.manual_seed(1)
                model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid()).to(device, dtype)
                scalar = torch.rand((), device=device, dtype=dtype, requires_grad=True)
                scalar.grad = torch.ones_like(scalar)
                params = [*model.parameters(), scalar]
                if fused and dtype == torch.float64 and device != "cpu":
                    continue  # the Triton kernels have no float64
                optimizer = GossipSGD(params, fused=fused, **copy.deepcopy(given.kwargs))
                x = torch.linspace(0.1, 0.6, 6, device=device).to(dtype).reshape(3, 2)
                for step in range(7):
                    optimizer.zero_grad()
                    model[2].requires_grad_(step not in (3, 4))
                    if step != 2:
                        model(x).sum().backward()
                    optimizer.step()
                runs.append([*params, *(v for p in params for v in optimizer.state[p].values())])
            self.assertEqual(runs[0], runs[-1])

    @in_float32
    def test_fused_does_not_step_if_foundinf(self, device, dtype, optim_info):
        for kwargs in configurations(device, dtype, optim_info):
            for scale in (None, torch.ones((), device=device)):
                params = [torch.ones(1, device=device, dtype=dtype) for _ in range(5)]
                for p in params:
                    p.grad = torch.ones_like(p)
                optimizer = GossipSGD(params, **kwargs)
                optimizer.grad_scale, optimizer.found_inf = scale, torch.ones((), device=device)
                optimizer.step()
                assert all(p.item() == 1 and not v.any() for p in params for v in optimizer.state[p].values())

    @in_float32
    def test_param_groups_weight_decay(self, device, dtype, optim_info):
        for kwargs in configurations(device, dtype, optim_info):
            problem = Problem(device, dtype)
            groups = [{"params": [p], **copy.deepcopy(kwargs)} for p in problem.params]
            groups[1]["weight_decay"] = 0.0
            assert run(problem, GossipSGD(groups)) is not kwargs.get("maximize", False), kwargs

    @in_float32
    def test_param_groups_lr(self, device, dtype, optim_info):
        for kwargs in configurations(device, dtype, optim_info):
            kwargs["lr"] = kwargs.get("lr", 1e-3)
            problem, still = Problem(device, dtype), nn.Parameter(torch.randn(2, device=device, dtype=dtype))
            before = still.detach().clone()
            optimizer = GossipSGD([{"params": problem.params, **kwargs}, {"params": [still]}], lr=1e-28)
            still.grad = torch.rand_like(still)
            assert run(problem, optimizer) is not kwargs.get("maximize", False), kwargs
            self.assertEqual(still, before)

    @in_float32
    def test_step_is_noop_when_params_have_no_grad(self, device, dtype, optim_info):
        params = [torch.randn(2, 3, device=device, dtype=dtype) for _ in range(2)]
        before = [p.clone() for p in params]
        for kwargs in configurations(device, dtype, optim_info):
            assert GossipSGD(params, **kwargs).step(lambda: 1) == 1
            self.assertEqual(params, before)

    @in_float32
    def test_step_is_noop_for_zero_grads(self, device, dtype, optim_info):
        param = torch.randn(5, 1, device=device, dtype=dtype, requires_grad=True)
        before = param.detach().clone()
        for kwargs in configurations(device, dtype, optim_info):
            if not kwargs.get("weight_decay"):
                optimizer = GossipSGD([param], **kwargs)
                param.grad = torch.zeros_like(param)
                optimizer.step(lambda: 1)
                self.assertEqual(param.detach(), before)

    @in_float32
    def test_optimizer_can_be_printed(self, device, dtype, optim_info):
        for kwargs in configurations(device, dtype, optim_info):
            assert "weight_decay" in repr(GossipSGD(Problem(device, dtype).params, **kwargs))

    @parametrize("is_named_optim0", [True, False])
    @parametrize("is_named_optim1", [True, False])
    @in_float32
    def test_state_dict_deterministic(self, device, dtype, optim_info, is_named_optim0, is_named_optim1):
        for kwargs in configurations(device, dtype, optim_info):
            problem = Problem(device, dtype, named=is_named_optim0)
            optimizer = GossipSGD(problem.named, **kwargs)
            run(problem, optimizer, steps=10)
            twin = problem.twin(is_named_optim1)
            other = GossipSGD(twin.named, **kwargs)
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
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
            optimizer = GossipSGD(problem.named, **kwargs)
            run(problem, optimizer, steps=3)
            twin = problem.twin(is_named_optim1)
            other = GossipSGD(twin.named, **kwargs)
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
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

    def _counted(self, device, dtype, info, register):
        for kwargs in configurations(device, dtype, info):
            optimizer = GossipSGD([torch.ones(2, device=device, dtype=dtype)], **kwargs)
            calls = []
            handle = getattr(optimizer, register)(lambda *args, calls=calls: calls.append(args))
            optimizer.step()
            optimizer.step()
            handle.remove()
            optimizer.step()
            assert len(calls) == 2

    @in_float32
    def test_step_post_hook(self, device, dtype, optim_info):
        self._counted(device, dtype, optim_info, "register_step_post_hook")

    @in_float32
    def test_step_pre_hook(self, device, dtype, optim_info):
        self._counted(device, dtype, optim_info, "register_step_pre_hook")

    @in_float32
    def test_step_all_hooks(self, device, dtype, optim_info):
        for kwargs in configurations(device, dtype, optim_info):
            params = [torch.ones(2, device=device, dtype=dtype)]
            optimizers = [GossipSGD(params, **kwargs), torch.optim.SGD(params)]
            order = []

            def note(what, order=order):
                return lambda *args: order.append(what)

            handles = [register_optimizer_step_pre_hook(note(0)), register_optimizer_step_post_hook(note(3))]
            for optimizer in optimizers:
                handles += [optimizer.register_step_pre_hook(note(1)), optimizer.register_step_post_hook(note(2))]
            for optimizer in (*optimizers, optimizers[0]):
                optimizer.step()
            for handle in handles:
                handle.remove()
            for optimizer in optimizers:
                optimizer.step()
            assert order == [0, 1, 2, 3] * 3

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


HERE = {name.removeprefix("test_") for name in vars(TestTorchOptim) if name.startswith("test_")}
HERE.remove("every_generic_test_is_here_or_has_a_reason")
instantiate_device_type_tests(TestTorchOptim, globals(), only_for=("cpu", "cuda"))
