"""Training scripts to start from; they need `pip install 'fused-dlam[demo]'` and run on GPUs or CPUs. See README.md.

torchrun --nproc-per-node 4 -m fused_dlam.examples.ddp --amp           DistributedDataParallel
torchrun --nproc-per-node 4 -m fused_dlam.examples.gossip --amp        the same script, five lines changed
torchrun --nproc-per-node 4 -m fused_dlam.examples.gossip --amp --resume
torchrun --nproc-per-node 4 -m fused_dlam.examples.accelerated         with Hugging Face Accelerate
torchrun --nproc-per-node 4 -m fused_dlam.examples.dashboard           curves for TensorBoard
torchrun --nproc-per-node 4 -m fused_dlam.examples.detection           an object detector; needs torchvision
"""
