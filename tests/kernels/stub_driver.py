"""Triton on a driver that launches nothing: its binder, compiler, loader and launcher run as on a GPU, on CPU tensors.

`build` compiles stub_cuda.c into a folder; `install` makes it this process's driver, for good: call it in a process of
its own, before anything of Triton's looks for a GPU.
"""

import ctypes
import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch


def build(folder: Path) -> None:
    library = folder / "libcuda.so.1"
    source = Path(__file__).with_name("stub_cuda.c")
    # The name inside makes it the libcuda that Triton's own modules are linked with.
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", source, "-o", library]
    subprocess.run(command, check=True)


class Stub:
    """The driver of this process: what was launched, and what was built for it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.library = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
        self.built: Counter[str] = Counter()  # kernels by name, and "launcher": those Triton 3.6 compiles in C

    @property
    def launches(self) -> int:
        return ctypes.c_long.in_dll(self.library, "launches").value

    @property
    def grid(self) -> int:
        """Programs of the last launch."""
        return ctypes.c_uint.in_dll(self.library, "last_grid").value

    def addresses(self, launch: Callable[[], None], count: int) -> list[int]:
        """The addresses that a launch hands its kernel, `count` of them."""
        watched = ctypes.c_int.in_dll(self.library, "watched")
        watched.value = count
        launch()
        watched.value = 0
        return list((ctypes.c_ulonglong * count).in_dll(self.library, "last_addresses"))

    @property
    def builds(self) -> int:
        return sum(self.built.values())

    @property
    def kernels(self) -> int:
        """Builds without those of launchers."""
        return self.builds - self.built["launcher"]

    def forget(self, *kernels) -> None:
        """As if nothing had been built yet, in this process or on disk."""
        import triton

        triton.knobs.cache.dir = tempfile.mkdtemp(dir=self.folder)
        for kernel in kernels:
            kernel.device_caches.clear()


def install(folder: Path) -> Stub:
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    stub = Stub(folder)

    import triton
    from triton.backends.nvidia import driver as nvidia

    class Driver(nvidia.CudaDriver):
        def __init__(self):
            self.utils = nvidia.CudaUtils()
            self.launcher_cls = nvidia.CudaLauncher
            self.get_device_capability = lambda device=0: (9, 0)
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0

        def get_active_torch_device(self):
            return torch.device("cpu")

    stub.forget()
    triton.runtime.driver.set_active(Driver())

    compile_kernel = triton.JITFunction._do_compile

    def counted(self, *arguments, **options):
        stub.built[self.fn.__name__] += 1
        return compile_kernel(self, *arguments, **options)

    triton.JITFunction._do_compile = counted
    compile_c = triton.runtime.build._build

    def counted_c(name, *arguments, **options):
        stub.built["launcher"] += 1
        return compile_c(name, *arguments, **options)

    triton.runtime.build._build = counted_c
    return stub
