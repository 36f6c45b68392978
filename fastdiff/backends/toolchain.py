"""Finds a compiler and ninja, and runs them over a target's sources.

The environment variables that choose them stand in fastdiff/backends/build.py.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fastdiff.backends.targets import BuildError, Target

__all__ = ["Compiler", "compile", "find_compiler", "find_ninja"]

_TORCH = Path(torch.__file__).parent


class Compiler(NamedTuple):
    command: tuple[str, ...]
    identity: str  # what it calls itself, for the hash of a library


def find_compiler(kind: str) -> Compiler:
    """The "c++" or "nvcc" to use. Raises BuildError saying what to install."""
    command = _find_cxx()
    identity = _version(command)
    if kind == "nvcc":
        homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
        places = [f"{home}/bin/nvcc" for home in homes if home]
        found = next(filter(None, map(shutil.which, [*places[:-1], "nvcc", places[-1]])), None)
        if found is None:
            raise BuildError("no nvcc: install the CUDA toolkit and name its folder in CUDA_HOME")
        # nvcc takes a program, not a command, and has its own default.
        ccbin = ("-ccbin", command[0]) if os.environ.get("CXX") and len(command) == 1 else ()
        command = (found, *ccbin)
        identity += _version((found,))
    return Compiler(command, identity)


def _find_cxx() -> tuple[str, ...]:
    if configured := shlex.split(os.environ.get("CXX", "")):
        program = shutil.which(configured[0])
        if program is None:
            raise BuildError(f"CXX names the compiler {configured[0]!r}, which is not there")
        return (os.path.abspath(program), *configured[1:])  # ninja runs it from elsewhere
    for name in ("g++", "c++", "clang++"):
        if program := shutil.which(name):
            return (program,)
    raise BuildError(
        "no C++ compiler: install one (apt install g++, dnf install gcc-c++, "
        "conda install -c conda-forge cxx-compiler) or name one in CXX"
    )


def _version(command: Sequence[str]) -> str:
    try:
        result = subprocess.run(
            [*command, "--version"], capture_output=True, env=_environment(), check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"the compiler {shlex.join(command)} does not run: {error}") from error
    # Arguments in CXX count as flags. The path does not: it may differ between environments.
    return shlex.join(command[1:]) + result.stdout.decode(errors="replace")


def _environment() -> dict[str, str]:
    """Compiler messages in English, which `_first_errors` and the hash of `--version` rely on."""
    return {**os.environ, "LC_ALL": "C"}


def find_ninja() -> str:
    """The ninja of the Python package, else the one on PATH."""
    found = None
    with contextlib.suppress(ImportError):
        from ninja import BIN_DIR

        found = shutil.which("ninja", path=BIN_DIR)
    found = found or shutil.which("ninja")
    if found is None:
        raise BuildError("no ninja: pip install ninja")
    return os.path.abspath(found)


def compile(
    target: Target, compiler: Compiler, ninja: str, source_root: Path, work: Path, verbose: bool
) -> Path:
    """Runs ninja in the directory `work` and returns the library in it.

    The output of a compilation that fails is kept beside `work`.
    """
    (work / "build.ninja").write_text(_ninja_file(target, compiler, source_root))
    # The compiler's own temporary files go where those of a killed build are removed.
    environment = {**_environment(), "TMPDIR": str(work)}
    try:
        process = subprocess.Popen(
            [ninja, "-v"],
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except OSError as error:
        raise BuildError(f"{ninja} does not run: {error.strerror}") from error
    log = []
    with process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.append(line.decode(errors="replace"))
                if verbose:
                    print(log[-1], end="", file=sys.stderr, flush=True)
        except BaseException:  # Ctrl-C
            process.terminate()
            raise
    if process.returncode != 0:
        log_path = work.parent / f"{target.name}.log"
        log_path.write_text("".join(log))
        hint = "\nFASTDIFF_CUDA_ARCHS chooses the GPUs." if target.compiler == "nvcc" else ""
        raise BuildError(
            f"the {target.label} does not compile with {shlex.join(compiler.command)}:\n"
            f"{_first_errors(log)}{hint}\nAll output: {log_path}"
        )
    return work / f"{target.name}.so"


def _ninja_file(target: Target, compiler: Compiler, root: Path) -> str:
    includes = (root / "include", root, _TORCH / "include")
    flags = (*target.flags, *(f"-I{folder}" for folder in includes))
    link_flags = (f"-L{_TORCH / 'lib'}", *target.link_flags)
    lines = [
        f"cxx = {_quoted(compiler.command)}",
        f"flags = {_quoted(flags)}",
        f"link_flags = {_quoted(link_flags)}",
        "rule compile",
        "  command = $cxx $flags $more -c $in -o $out",
        "rule link",
        "  command = $cxx $in -o $out $link_flags",
    ]
    objects = []
    for source in target.sources:
        stem = source.path.replace("/", "_")
        objects.append(f"{stem}.{source.suffix}.o" if source.suffix else f"{stem}.o")
        lines += [
            f"build {objects[-1]}: compile {_escaped(root / source.path)}",
            f"  more = {_quoted(source.flags)}",
        ]
    lines.append(f"build {target.name}.so: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def _quoted(arguments: Sequence[str]) -> str:
    """A shell command line, as the value of a ninja variable."""
    return shlex.join(arguments).replace("$", "$$")


def _escaped(path: Path) -> str:
    """An input of a ninja build line; ninja itself quotes it for the shell."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def _first_errors(log: Sequence[str], count: int = 5) -> str:
    is_error = re.compile(r"\b(error|fatal) *:|undefined reference|cannot find", re.IGNORECASE)
    errors = [line.strip() for line in log if is_error.search(line)]
    return "\n".join(errors[:count] or [line.strip() for line in log[-count:]])
