"""What runs a rule's equations over flat buffers, and the gate that holds the machine code to its floor.

It is installed as `fused_dlam.kernels`, and under that name alone its files can be imported.
"""

if __name__ != "fused_dlam.kernels":
    # Where a checkout is on the path, transformers takes this folder for Hugging Face's package `kernels`, and asks for
    # its version: one that is too old for anything.
    __version__ = "0"
