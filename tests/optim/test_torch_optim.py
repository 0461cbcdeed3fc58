"""What torch tests of its own optimizers: the generic tests of its test_optim.py (TestOptimRenewed), on one worker.

That file is not in torch's wheel, only what it is made of: `OptimizerInfo`, configurations of SGD, the decorator. So
its tests are written anew, under their names: steps here, state and checkpoints in
test_torch_optim_state.py. test_torch_optim_names.py says why the others are left out. The law behind them is in
test_optimizer.py: one worker is `torch.optim.SGD`, step for step.
"""

import copy

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_utils import TestCase, parametrize
from torch_problems import METHODS, Problem, common, configurations, db, in_float32, inputs, names_of, run

from fused_dlam import GossipSGD


class TestTorchOptim(TestCase):
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

    # -- hooks -------------------------------------------------------------------------------------------------------

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


HERE = names_of(TestTorchOptim)
instantiate_device_type_tests(TestTorchOptim, globals(), only_for=("cpu", "cuda"))
