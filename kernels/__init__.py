"""Everything that touches elements: the rules' equations and the passes that run them over flat buffers."""

if __name__ != "fused_dlam.kernels":
    raise ImportError("this folder is installed as fused_dlam.kernels; import it under that name")
