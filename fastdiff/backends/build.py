"""Builds the native libraries from csrc/: once per machine, at first use, in seconds.

`build(cpu_target())` returns the path of a shared library that is ready to load. The library is
kept under a hash of everything it depends on (all of csrc, the flags, torch, the compiler), so
it is found again until one of those changes, by every Python of this machine.

Environment variables, all optional:
    FASTDIFF_NATIVE=0    no native library: `build` refuses, and the other backends serve.
    FASTDIFF_CACHE       where libraries are kept; default $XDG_CACHE_HOME/fastdiff, else
                         ~/.cache/fastdiff. Where it cannot be written a directory of this user
                         under the system's temporary directory is taken, with a message.
    CXX                  C++ compiler, a command with its arguments; default the first of g++, c++
                         and clang++ on PATH. nvcc is given it as its host compiler.
    CUDA_HOME            CUDA toolkit whose bin/nvcc compiles CUDA; else CUDA_PATH, nvcc on PATH,
                         /usr/local/cuda.
    FASTDIFF_CUDA_ARCHS  compute capabilities to compile CUDA for, as in "8.0 9.0" or "80,90";
                         default those of the visible GPUs.

What holds whatever happens:
    A library appears under its name complete or not at all: it is built beside its place and moved
    there in one step, so a killed build leaves only a directory that the next build removes.
    Of processes that start at once one builds and the others wait for it and load its library.
    Where a file system has no locks each builds its own and the last move wins.
    Without a compiler a library that is there already still serves, such as one that an earlier
    stage of a container image left in the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shutil
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from fastdiff.backends.targets import (
    BuildError,
    Source,
    Target,
    cpu_target,
    cuda_archs,
    cuda_host_target,
    cuda_target,
    not_served,
)
from fastdiff.backends.toolchain import compile, find_compiler, find_ninja

__all__ = [
    "BuildError",
    "Source",
    "Target",
    "build",
    "cache_root",
    "cpu_target",
    "cuda_archs",
    "cuda_host_target",
    "cuda_target",
    "not_served",
    "source_root",
]

_KEEP = 4  # libraries of one target; older ones are pruned
_IN_USE_SECONDS = 3600  # but none found this recently: its path may be about to be loaded
_ABANDONED_SECONDS = 86400  # after which another host's unfinished build counts as killed


def source_root() -> Path:
    """csrc: real files in an installed wheel, the target of a link in a checkout."""
    return (Path(__file__).parent.parent / "csrc").resolve()


def cache_root() -> Path:
    """Where libraries are kept, whether or not it exists yet."""
    if configured := os.environ.get("FASTDIFF_CACHE"):
        return Path(configured).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):  # the XDG specification ignores relative ones
        return Path(xdg) / "fastdiff"
    try:
        return Path.home() / ".cache" / "fastdiff"
    except RuntimeError:  # a user without a home, as in some containers
        return _temporary_root()


def _temporary_root() -> Path:
    # Not tempfile.gettempdir(): it raises where nothing can be written, and there a library that is
    # in the cache already must still be found.
    return Path(os.environ.get("TMPDIR") or "/tmp") / f"fastdiff-{os.geteuid()}"


def _is_safe(root: Path) -> bool:
    """Whether libraries in `root` are this user's: anybody can make a directory in /tmp."""
    if root != _temporary_root():
        return True
    try:
        found = root.lstat()
    except FileNotFoundError:
        return True
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return mine and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def build(target: Target, *, force: bool = False, verbose: bool = False) -> Path:
    """Returns the target's library, built now if this machine has none that is up to date.

    `force` builds in any case, `verbose` shows the compiler's commands and output on stderr.
    Raises BuildError where the library cannot be built.
    """
    if os.environ.get("FASTDIFF_NATIVE") == "0":
        raise BuildError("native libraries are switched off by FASTDIFF_NATIVE=0")
    if sys.platform != "linux":
        raise BuildError(f"native libraries are built on Linux only, not on {sys.platform}")
    content = _content_key(target)
    roots = list(dict.fromkeys((cache_root(), _temporary_root())))
    try:
        compiler = find_compiler(target.compiler)
    except BuildError:
        library = None if force else _find_library(roots, target, f"{target.name}-{content}*")
        if library is None:
            raise
        return library
    compiler_key = hashlib.sha256(compiler.identity.encode()).hexdigest()[:8]
    entry = f"{target.name}-{content}{compiler_key}"
    if not force and (library := _find_library(roots, target, entry)):
        return library
    ninja = find_ninja()

    def compile_in(work: Path) -> Path:
        return compile(target, compiler, ninja, source_root(), work, verbose)

    refused = []
    for root in roots:
        try:
            return _build_in(root / entry, target, compile_in, force)
        except OSError as error:  # read-only, full, not ours, or a file is in the way
            refused.append(f"cannot keep libraries in {root} ({error.strerror or error})")
            _say(refused[-1])
    raise BuildError(f"{', '.join(refused)}: name a directory to keep them in FASTDIFF_CACHE")


def _content_key(target: Target) -> str:
    """Hash of what the library is made from, the compiler aside. No paths of this installation."""
    root = source_root()
    key = hashlib.sha256()
    files = [path for path in root.rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")]
    if not files:
        raise BuildError(f"no C++ sources in {root}: this installation of fastdiff is incomplete")
    for path in sorted(files):
        content = path.read_bytes()
        key.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
        key.update(content)
    torch_version = (torch.__version__, torch.version.git_version, torch.version.cuda)
    # A home directory can be shared by machines and containers that are not alike.
    system = (platform.machine(), os.confstr("CS_GNU_LIBC_VERSION"))
    key.update(repr((target, torch_version, system)).encode())
    return key.hexdigest()[:16]


def _find_library(roots: Sequence[Path], target: Target, pattern: str) -> Path | None:
    """The newest library in an entry that matches `pattern`, in the first root that has one."""
    for root in roots:
        found: list[tuple[float, Path]] = []
        with contextlib.suppress(OSError):  # no such directory, or one that may not be read
            if _is_safe(root):
                libraries = root.glob(f"{pattern}/{target.name}.so")
                found = sorted((path.stat().st_mtime, path) for path in libraries)
        if found:
            library = found[-1][1]
            with contextlib.suppress(OSError):  # a read-only cache
                os.utime(library.parent)  # in use: not pruned
            return library
    return None


def _build_in(entry: Path, target: Target, compile_in: Callable[[Path], Path], force: bool) -> Path:
    """Builds the library of one cache entry. Raises OSError where its root cannot be used."""
    root, library = entry.parent, entry / f"{target.name}.so"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_safe(root):
        raise PermissionError(f"{root} belongs to another user")
    waiting = f"waiting for another process that is building the {target.label} ..."
    with _lock(root / f"{target.name}.lock", waiting) as locked:
        if not force and library.is_file():  # built while this process waited
            return library
        if locked:
            _remove_killed_builds(root, target)
        work = Path(tempfile.mkdtemp(prefix=_work_prefix(target), dir=root))
        try:
            _say(
                f"building the {target.label} (once for this machine, about {target.seconds} s) ..."
            )
            start = time.perf_counter()
            built = compile_in(work)
            with built.open("rb") as file:
                os.fsync(file)  # before the move: no half-written library after a power cut
            entry.mkdir(exist_ok=True)
            os.replace(built, library)
            _say(f"built the {target.label} in {time.perf_counter() - start:.1f} s: {library}")
        finally:
            shutil.rmtree(work, ignore_errors=True)
        if locked:
            _prune(root, target, keep=entry)
    return library


@contextlib.contextmanager
def _lock(path: Path, waiting: str) -> Iterator[bool]:
    """Holds an exclusive lock; yields False, and holds none, where the file system has no locks."""
    import fcntl  # not on Windows, where this module must still import

    with path.open("a") as file:
        locked = True
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _say(waiting)
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            locked = False
        try:
            yield locked
        finally:
            if locked:
                # Closing is not enough: a process forked meanwhile, a data loader's, shares it.
                fcntl.flock(file, fcntl.LOCK_UN)


def _work_prefix(target: Target) -> str:
    return f".{target.name}-{socket.gethostname()}-"


def _remove_killed_builds(root: Path, target: Target) -> None:
    """Under the lock nobody else on this host builds; other hosts may have locks of their own."""
    prefix = _work_prefix(target)
    for path in root.glob(f".{target.name}-*"):
        with contextlib.suppress(OSError):
            age = time.time() - path.stat().st_mtime
            if path.name.startswith(prefix) or age > _ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _prune(root: Path, target: Target, keep: Path) -> None:
    entry = re.compile(re.escape(target.name) + "-[0-9a-f]{24}")
    used = []
    for path in root.iterdir():
        if entry.fullmatch(path.name) and path != keep:
            with contextlib.suppress(OSError):
                used.append((path.stat().st_mtime, path))
    for when, path in sorted(used, reverse=True)[_KEEP - 1 :]:
        if time.time() - when > _IN_USE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _say(message: str) -> None:
    print(f"fastdiff: {message}", file=sys.stderr, flush=True)
