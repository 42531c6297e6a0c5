"""Build the native extension `spo_kernels._C` with CMake; the metadata is in pyproject.toml.

SPO_BUILD_NATIVE=0 installs pure Python: every op then runs on its PyTorch reference.
SPO_BUILD_JOBS limits the parallel compile jobs (default: one per core).
SPO_CUDA_ARCHS overrides the CUDA architectures, e.g. "90;100".
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
FAILED = (
    "spo_kernels: the native kernels were not built, since {why}: install what is missing, or set "
    "SPO_BUILD_NATIVE=0 to install without them (every op then runs on its PyTorch reference)"
)


class CMakeBuild(build_ext):
    """Hand the one extension over to CMake."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext)
        except ImportError as error:
            why = f"the Python package {error.name} is missing"
        except FileNotFoundError as error:
            why = f"{error.filename} is missing"
        except subprocess.CalledProcessError as error:
            step = "compile" if "--build" in error.cmd else "configure"
            why = f"cmake could not {step} them (its message is above; is there a C++ compiler?)"
        else:
            return
        # Not an exception: setuptools would print a traceback below this sentence.
        sys.exit(FAILED.format(why=why))

    def _build(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{build}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DSPO_EXT_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DSPO_PYTHON=ON",
        ]
        if shutil.which("ninja"):
            configure.append("-GNinja")
        if archs := os.environ.get("SPO_CUDA_ARCHS"):
            configure.append(f"-DSPO_CUDA_ARCHS={archs}")
        # A cache left by another build environment names compilers and headers that are gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        subprocess.run(configure, check=True)
        jobs = os.environ.get("SPO_BUILD_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", build, "--parallel", jobs], check=True)


native = os.environ.get("SPO_BUILD_NATIVE", "1") != "0"
setup(
    ext_modules=[Extension("spo_kernels._C", sources=[])] if native else [],
    cmdclass={"build_ext": CMakeBuild},
)
