"""The device guard without which torch does not slice fake CUDA tensors."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache

import pytest
import torch


@lru_cache(maxsize=1)
def install_guard() -> None:
    """Without a device guard for CUDA fake tensors cannot be sliced. Skips the test where there can be none."""
    if torch.backends.cuda.is_built():
        torch._C._ensureCUDADeviceGuardSet()
        return
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("fake CUDA tensors on a build of torch without CUDA need a C++ compiler, and there is none")
    torch_root, here = os.path.dirname(torch.__file__), os.path.dirname(__file__)
    with tempfile.TemporaryDirectory() as folder:
        library = os.path.join(folder, "libguard.so")
        command = [compiler, "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch_root}/include", "-o", library]
        command += [os.path.join(here, "fake_cuda_guard.cpp"), f"-L{torch_root}/lib", "-lc10"]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode:
            pytest.skip(f"fake CUDA tensors need a device guard, which does not compile: {built.stderr[-300:]}")
        ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
