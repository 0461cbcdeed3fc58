"""Promise: every generic test of torch's test_optim.py is in test_torch_optim*.py, or is left out for a reason."""

import test_torch_optim
import test_torch_optim_state

# Of torch's generic tests those that are not here, and why.
NOT_HERE = {
    "test_optim_infos_do_not_specify_global_cliquey_kwargs": "is about torch's list of configurations",
    "test_forloop_goes_right_direction_multigpu": "needs two GPUs; a bucket holds parameters of one device",
    "test_rosenbrock_sparse": "sparse gradients are refused: protocol_table.md, row 22",
    "test_foreach_matches_forloop": "there is no `foreach`",
    "test_mixed_device_dtype": "needs two GPUs; mixed types: protocol_table.md, row 24",
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


def test_every_generic_test_is_here_or_has_a_reason():
    here = test_torch_optim.HERE | test_torch_optim_state.HERE
    assert set(UPSTREAM) == here and not set(NOT_HERE) & {f"test_{name}" for name in here}
