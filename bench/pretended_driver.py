"""Triton's own launcher without a GPU: on a driver that says it is an H100's, looks at every launch and runs none
(pretended_driver.c).
"""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("pretended_driver.c")


def compiler() -> str | None:
    return shutil.which("gcc") or shutil.which("clang")


def build(library: Path) -> None:
    """Needs a compiler of C."""
    header = Path(str(importlib.import_module("triton").__file__)).parent / "backends" / "nvidia" / "include"
    options = ["-shared", "-fPIC", f"-I{header}", f"-Wl,-soname,{library.name}"]
    subprocess.run([str(compiler()), *options, "-o", str(library), str(SOURCE)], check=True)


def pretend(folder: Path) -> bool:
    """Let Triton launch on it from now on, in this process; whether there is a compiler to build it, in `folder`."""
    if compiler() is None:
        return False
    library = folder / "libcuda.so.1"
    build(library)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # whoever asks for it by its name from now on gets this one
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    driver = importlib.import_module("triton.backends.nvidia.driver").CudaDriver()
    driver.get_current_device = driver.get_current_stream = lambda *_: 0
    driver.get_device_capability = lambda *_: (9, 0)
    importlib.import_module("triton").runtime.driver.set_active(driver)
    return True
