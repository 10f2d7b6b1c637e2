"""Builds what pyproject.toml cannot describe: the Cython extensions and the BPF programs.

The BPF programs are compiled by clang into `serval_core/dataplane/bpf/*.bpf.o` before the extensions are built, and travel
in the package as data. A missing tool is one clear sentence naming the Debian package that brings it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
BPF_DIRECTORY = Path("serval_core/dataplane/bpf")

# module -> libraries it links
EXTENSIONS: dict[str, list[str]] = {
    "translator.splice_ext": [],
    "serval_core.dataplane.tcp_repair": [],
    "serval_core.dataplane.forward_batch": [],
    "serval_core.dataplane.packet_socket": [],
    "serval_core.dataplane.bpf_loader": ["bpf"],
}


def find_clang() -> str:
    """The BPF compiler: $CLANG, or the newest clang on the path."""
    for name in (os.environ.get("CLANG", ""), "clang", *(f"clang-{n}" for n in range(21, 13, -1))):
        if name and (found := shutil.which(name)):
            return found
    raise SystemExit("serval-translator: clang is needed to build the BPF programs (apt-get install clang llvm libbpf-dev)")


def compile_bpf(output_root: Path) -> None:
    """Compile each bpf/*.bpf.c to an object beside where the package will be read from."""
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    for source in sorted((ROOT / BPF_DIRECTORY).glob("*.bpf.c")):
        target = output_root / BPF_DIRECTORY / (source.name.removesuffix(".c") + ".o")
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [find_clang(), "-g", "-O2", "-Wall", "-Werror", "-target", "bpf", "-mcpu=v3"]
        command += [f"-I/usr/include/{multiarch}"] if multiarch else []
        subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)


class BuildExtensionsAndBpf(build_ext):
    """`build_ext` that also compiles the BPF programs to where the extensions go."""

    def run(self) -> None:
        compile_bpf(ROOT if self.inplace else Path(self.build_lib))
        super().run()


def extensions() -> list[Extension]:
    found = []
    for module, libraries in EXTENSIONS.items():
        source = Path(*module.split(".")).with_suffix(".pyx")
        if (ROOT / source).exists():
            found.append(Extension(module, [str(source)], libraries=libraries, extra_compile_args=["-O2"]))
    return found


setup(
    ext_modules=cythonize(extensions(), compiler_directives={"language_level": 3}),
    cmdclass={"build_ext": BuildExtensionsAndBpf},
)
