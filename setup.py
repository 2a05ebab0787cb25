"""Hands the native build over to CMakeLists.txt; nothing about sources or flags lives here.

Build options go to CMake through the environment, for example
`CMAKE_ARGS="-DUNLEARN_FAST_CUDA=OFF" pip install .`.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
FIND_TORCH = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"


def torch_directory() -> str:
    """Where torch lives, or ''. `-I` looks past pip's isolated build environment, at what the user has installed."""
    for flags in ([], ["-I"]):
        found = subprocess.run(
            [sys.executable, *flags, "-c", FIND_TORCH], capture_output=True, text=True
        ).stdout.strip()
        if found:
            return found
    return ""


def first_error(log: str) -> str:
    """The first error of a build log, with the line after it: CMake puts the place first and the reason second."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["no output"]
    at = next((i for i, line in enumerate(lines) if "error" in line.lower()), len(lines) - 1)
    return " ".join(lines[at : at + 2])


class CMakeBuild(build_ext):
    """Runs CMake. Without a compiler the package still installs, and `_build.json` keeps the reason for `info`."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        package = (ROOT if in_place else Path(self.build_lib).resolve()) / "unlearn_fast"
        package.mkdir(parents=True, exist_ok=True)
        for stale in [*package.glob("_cpu*.so"), *package.glob("_cuda*.so"), *package.glob("_native*.so")]:
            stale.unlink()
        reason = self.build_native(package)
        if reason:
            self.warn(f"the native parts were not built, the slow references will serve: {reason}")
        (package / "_build.json").write_text(json.dumps({"missing": reason}) + "\n")

    def build_native(self, package: Path) -> str | None:
        """Returns None, or why the native parts could not be built. A failing nvcc must not cost the CPU kernels."""
        torch = torch_directory()
        cmake = shutil.which("cmake")
        if not torch:
            return "torch was not found when the package was built"
        if not cmake:
            return "cmake was not found when the package was built"
        configure = [cmake, "-S", str(ROOT), f"-DTORCH_DIR={torch}", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-DCMAKE_INSTALL_PREFIX={package}", "-DCMAKE_BUILD_TYPE=Release"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        build = Path(self.build_temp).resolve()
        reason = self.cmake(configure, build)
        if reason and shutil.which("nvcc"):
            without_cuda = ["-DUNLEARN_FAST_CUDA=OFF", "-DCUDA_MISSING=it failed to build: see the log of the build"]
            reason = self.cmake([*configure, *without_cuda], build.with_name(build.name + "-cpu"))
        return reason

    def cmake(self, configure: list[str], build: Path) -> str | None:
        """Configures, compiles and installs in the folder `build`. Returns None, or what failed."""
        cmake = configure[0]
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        compile_ = [cmake, "--build", str(build), "-j", jobs]
        install = [cmake, "--install", str(build)]
        steps = {"configure": [*configure, "-B", str(build)], "compile": compile_, "install": install}
        for step, command in steps.items():
            done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            print(done.stdout, flush=True)
            if done.returncode:
                return f"cmake could not {step} the native parts: {first_error(done.stdout)}"
        return None

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    ext_modules=[Extension("unlearn_fast._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=[] if torch_directory() else ["torch>=2.10"],
)
