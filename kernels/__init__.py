"""What runs a rule's equations over flat buffers, and the gate that holds the machine code to its floor."""

if __name__ != "fused_dlam.kernels":
    raise ImportError("this folder is installed as fused_dlam.kernels; import it under that name")
