"""The builder: one build for this machine, whatever happens around it.

Toy sources stand in for csrc, and a shell script around the real compiler records every call, can
stop in the middle of a build, and answers --version as it is told.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastdiff import cli
from fastdiff.backends import build as builder
from fastdiff.backends import toolchain
from fastdiff.backends.build import BuildError, Source, Target, build
from fastdiff.ops.schemas import SCHEMAS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="native libraries: Linux only")

GXX = shutil.which("g++")
FLAGS = ("-O0", "-fPIC")
TOY = Target(
    "toy",
    (Source("toy.cpp"), Source("toy.cpp", "two", ("-DTWO",))),
    FLAGS,
    ("-shared",),
    label="toy",
)
TOY_CPP = """#include "toy.h"
#ifdef TWO
extern "C" int two() { return 2; }
#else
extern "C" int answer() { return ANSWER; }
#endif
"""

# Stops once, when a file says so, at the first compilation or with half a library written.
COMPILER = """#!/bin/sh
here={here}
case "$*" in
    *--version*) cat $here/version; exit;;
    *" -c "*) step=compile;;
    *) step=link;;
esac
echo "$step" >> $here/calls
if [ $step = link ] && [ -e $here/stop-link ]; then echo half > toy.so; fi
if rm $here/stop-$step 2> $here/null; then
    exec 3< $here/go
    echo > $here/stopped
    read line <&3  # or the end of the test
fi
exec {gxx} "$@"
"""

CHILD = """
import ctypes, sys
from fastdiff.backends.build import Source, Target, build
toy = Target("toy", (Source("toy.cpp"), Source("toy.cpp", "two", ("-DTWO",))), {flags!r},
             ("-shared",), label="toy")
path = build(toy)
print(path, ctypes.CDLL(str(path)).answer())
"""


class Toy:
    """A csrc with one library in it, its compiler, and an installed package that carries both."""

    def __init__(self, root: Path) -> None:
        self.cache = root / "cache"
        self.bin = root / "bin"
        self.site = root / "site"
        backends = self.site / "fastdiff" / "backends"
        backends.mkdir(parents=True)
        for module in ("build", "targets", "toolchain"):
            shutil.copy(Path(builder.__file__).with_name(f"{module}.py"), backends)
        for package in (backends, backends.parent):
            (package / "__init__.py").touch()
        self.csrc = self.site / "fastdiff" / "csrc"
        (self.csrc / "include").mkdir(parents=True)
        (self.csrc / "toy.cpp").write_text(TOY_CPP)
        self.header = self.csrc / "include" / "toy.h"
        self.set_answer(42)
        self.bin.mkdir()
        self.compiler = self.bin / "compiler"
        self.compiler.write_text(COMPILER.format(here=self.bin, gxx=GXX))
        self.compiler.chmod(0o755)
        self.set_version("toy compiler 1")
        # Held open for reading and writing: no open() of the script blocks, nothing is lost.
        self.fifos = {}
        for name in ("stopped", "go"):
            os.mkfifo(self.bin / name)
            self.fifos[name] = os.open(self.bin / name, os.O_RDWR)

    def set_answer(self, value: int | str) -> None:
        self.header.write_text(f"#define ANSWER {value}\n")

    def set_version(self, text: str) -> None:
        (self.bin / "version").write_text(text)

    def calls(self) -> list[str]:
        log = self.bin / "calls"
        return log.read_text().split() if log.exists() else []

    def stop_at(self, step: str) -> None:
        (self.bin / f"stop-{step}").touch()

    def wait_until_stopped(self) -> None:
        assert select.select([self.fifos["stopped"]], [], [], 120)[0], "the compiler never ran"

    def go_on(self) -> None:
        os.write(self.fifos["go"], b"\n")

    @contextlib.contextmanager
    def child(self) -> Iterator[subprocess.Popen[str]]:
        """Another process that builds and loads the toy from the installed package."""
        with subprocess.Popen(
            [sys.executable, "-c", CHILD.format(flags=FLAGS)],
            env={**os.environ, "PYTHONPATH": str(self.site)},
            cwd=self.bin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def libraries(self) -> list[Path]:
        return sorted(self.cache.rglob("*.so"))

    def unfinished(self) -> list[Path]:
        return [path for path in self.cache.iterdir() if path.name.startswith(".")]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    if GXX is None:
        pytest.skip("no g++")
    toy = Toy(tmp_path)
    monkeypatch.setattr(builder, "source_root", lambda: toy.csrc)
    monkeypatch.setenv("FASTDIFF_CACHE", str(toy.cache))
    monkeypatch.setenv("CXX", str(toy.compiler))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.delenv("FASTDIFF_NATIVE", raising=False)
    (tmp_path / "tmp").mkdir()
    yield toy
    for fifo in toy.fifos.values():
        os.close(fifo)


def call(library: Path, name: str = "answer") -> int:
    return getattr(ctypes.CDLL(str(library)), name)()


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


# ---- once for this machine ---------------------------------------------------------------------


def test_first_build_says_so_and_the_second_runs_no_compiler(toy, capsys):
    library = build(TOY)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "fastdiff: building the toy (once for this machine, about 1 s) ..."
    assert second.startswith("fastdiff: built the toy in ") and second.endswith(str(library))
    assert library.name == "toy.so" and library.parent.parent == toy.cache
    assert (call(library), call(library, "two")) == (42, 2)
    assert toy.calls().count("compile") == 2 and toy.calls().count("link") == 1
    assert toy.unfinished() == []

    assert build(TOY) == library
    assert len(toy.calls()) == 3
    assert capsys.readouterr().err == ""


def test_whatever_the_library_depends_on_rebuilds_it_and_the_old_one_is_found_again(toy):
    original = build(TOY)
    built = {original}

    def rebuilds(target: Target = TOY) -> Path:
        before = len(toy.calls())
        built.add(library := build(target))
        assert len(toy.calls()) == before + 3
        return library

    toy.set_answer(43)
    assert call(rebuilds()) == 43
    (toy.csrc / "toy.cpp").write_text(TOY_CPP.replace("ANSWER", "ANSWER + 1"))
    assert call(rebuilds()) == 44
    (toy.csrc / "new.h").touch()
    rebuilds()
    rebuilds(dataclasses.replace(TOY, flags=(*FLAGS, "-DUNUSED")))
    rebuilds(dataclasses.replace(TOY, link_flags=("-shared", "-lm")))
    toy.set_version("toy compiler 2")
    rebuilds()
    os.environ["CXX"] += " -DFLAG_OF_CXX"
    rebuilds()
    assert len(built) == 8

    os.environ["CXX"] = str(toy.compiler)
    toy.set_version("toy compiler 1")
    toy.set_answer(42)
    (toy.csrc / "toy.cpp").write_text(TOY_CPP)
    (toy.csrc / "new.h").unlink()
    before = len(toy.calls())
    assert build(TOY) == original and call(original) == 42
    assert len(toy.calls()) == before


def test_torch_is_part_of_the_key(toy, monkeypatch):
    library = build(TOY)
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert build(TOY).parent != library.parent


def test_force_builds_again(toy):
    library = build(TOY)
    assert build(TOY, force=True) == library
    assert toy.calls().count("link") == 2
    assert call(library) == 42


def test_verbose_shows_the_commands(toy, capsys):
    build(TOY, verbose=True)
    assert f"{toy.compiler} -O0 -fPIC" in capsys.readouterr().err


def test_special_characters_in_paths_and_flags_reach_the_compiler(toy, monkeypatch, tmp_path):
    strange = tmp_path / "a b$c:d'e"
    shutil.copytree(toy.csrc, strange / "csrc")
    monkeypatch.setattr(builder, "source_root", lambda: strange / "csrc")
    monkeypatch.setenv("FASTDIFF_CACHE", str(strange / "cache"))
    (strange / "csrc" / "include" / "toy.h").write_text("#define ANSWER int(sizeof(TEXT))\n")
    library = build(dataclasses.replace(TOY, flags=(*FLAGS, "-DTEXT=\"$x 'y' z\"")))
    assert call(library) == len("$x 'y' z") + 1


def test_only_the_newest_libraries_are_kept_and_none_that_was_just_found(toy):
    libraries = []
    for answer in range(6):
        toy.set_answer(answer)
        libraries.append(build(TOY))
    assert len(toy.libraries()) == 6  # all used just now
    for position, library in enumerate(libraries):
        age(library.parent, 7200 - position)
    toy.set_answer(1)
    assert build(TOY) == libraries[1]  # in use again
    neighbour = toy.cache / "toy_two-0123456789abcdef01234567"
    neighbour.mkdir()
    age(neighbour, 7200)

    toy.set_answer(6)
    libraries.append(build(TOY))
    assert toy.libraries() == sorted(libraries[i] for i in (1, 4, 5, 6))
    assert neighbour.exists()


# ---- several processes -------------------------------------------------------------------------


def test_two_processes_at_once_compile_once_and_both_load(toy):
    toy.stop_at("compile")
    with toy.child() as first:
        toy.wait_until_stopped()
        with toy.child() as second:
            line = second.stderr.readline()
            assert line == ("fastdiff: waiting for another process that is building the toy ...\n")
            toy.go_on()
            outputs = [child.communicate() for child in (first, second)]
    assert first.returncode == second.returncode == 0, outputs
    assert outputs[0][0] == outputs[1][0] == f"{toy.libraries()[0]} 42\n"
    assert toy.calls().count("link") == 1
    assert outputs[1][1] == ""


@pytest.mark.parametrize("step", ["compile", "link"])
def test_killed_build_leaves_nothing_that_loads_and_the_next_one_succeeds(toy, step):
    toy.stop_at(step)
    with toy.child() as child:
        toy.wait_until_stopped()
        child.kill()
    (unfinished,) = toy.unfinished()
    if step == "link":
        assert (unfinished / "toy.so").read_text() == "half\n"
    assert list(toy.cache.glob("toy-*")) == []

    library = build(TOY)
    assert call(library) == 42
    assert toy.unfinished() == []
    assert toy.libraries() == [library]
    toy.go_on()  # the killed build's compiler


def test_unfinished_builds_of_other_hosts_stay_for_a_day(toy):
    builder_elsewhere, killed_elsewhere = (
        toy.cache / f".toy-elsewhere-{name}" for name in ("new", "old")
    )
    for path in (builder_elsewhere, killed_elsewhere):
        path.mkdir(parents=True)
    age(killed_elsewhere, 2 * 86400)
    build(TOY)
    assert toy.unfinished() == [builder_elsewhere]


def test_without_file_locks_it_builds_and_removes_nothing_of_others(toy, monkeypatch):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    other = toy.cache / (builder._work_prefix(TOY) + "other")
    other.mkdir(parents=True)
    assert call(build(TOY)) == 42
    assert toy.unfinished() == [other]


# ---- where it cannot be kept -------------------------------------------------------------------


def test_cache_that_cannot_be_made_falls_back_to_a_private_directory(toy, monkeypatch, capsys):
    (toy.bin / "file").touch()
    monkeypatch.setenv("FASTDIFF_CACHE", str(toy.bin / "file" / "cache"))
    library = build(TOY)
    assert call(library) == 42
    private = library.parent.parent
    assert private.parent == Path(os.environ["TMPDIR"])
    assert private.stat().st_mode & 0o777 == 0o700
    assert f"cannot keep libraries in {toy.bin}/file/cache (Not a" in capsys.readouterr().err

    assert build(TOY) == library
    assert toy.calls().count("link") == 1
    assert capsys.readouterr().err == ""


def test_cache_without_write_permission_falls_back_too(toy, monkeypatch, capsys):
    make = builder.tempfile.mkdtemp  # permission bits do not stop root

    def read_only(prefix, dir):
        if dir == toy.cache:
            raise PermissionError(errno.EACCES, "Permission denied", str(dir))
        return make(prefix=prefix, dir=dir)

    monkeypatch.setattr(builder.tempfile, "mkdtemp", read_only)
    library = build(TOY)
    assert call(library) == 42 and not library.is_relative_to(toy.cache)
    assert f"cannot keep libraries in {toy.cache} (Permission denied)" in capsys.readouterr().err


def test_read_only_cache_still_serves_what_is_in_it(toy, monkeypatch):
    library = build(TOY)

    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", read_only)
    monkeypatch.setattr(Path, "mkdir", read_only)
    monkeypatch.setattr(builder, "_lock", read_only)
    assert build(TOY) == library


def test_nowhere_to_write_names_the_variable(toy, monkeypatch):
    (toy.bin / "file").touch()
    monkeypatch.setenv("FASTDIFF_CACHE", str(toy.bin / "file" / "cache"))
    monkeypatch.setenv("TMPDIR", str(toy.bin / "file"))
    with pytest.raises(BuildError, match=r"Not a directory.*FASTDIFF_CACHE"):
        build(TOY)


def test_library_in_a_temporary_directory_open_to_others_is_not_trusted(toy, monkeypatch):
    (toy.bin / "file").touch()
    monkeypatch.setenv("FASTDIFF_CACHE", str(toy.bin / "file" / "cache"))
    private = build(TOY).parent.parent
    private.chmod(0o777)
    with pytest.raises(BuildError, match="belongs to another user"):
        build(TOY)
    private.rename(private.with_name("elsewhere"))
    private.symlink_to(private.with_name("elsewhere"))
    with pytest.raises(BuildError):
        build(TOY)


# ---- what is missing or wrong ------------------------------------------------------------------


def test_no_compiler_says_what_to_install(toy, monkeypatch):
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(toy.bin))
    with pytest.raises(BuildError, match=r"no C\+\+ compiler.*g\+\+.*CXX"):
        build(TOY)
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    with pytest.raises(BuildError, match=r"CXX names the compiler 'no-such-compiler'"):
        build(TOY)


def test_library_built_before_serves_without_a_compiler(toy, monkeypatch):
    library = build(TOY)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build(TOY) == library
    toy.set_answer(43)
    with pytest.raises(BuildError, match="no-such-compiler"):
        build(TOY)


def test_compiler_that_does_not_run(toy, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(BuildError, match="does not run"):
        build(TOY)


def test_no_nvcc_says_what_to_install(toy, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toy.bin))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: name if name == str(toy.compiler) else None)
    with pytest.raises(BuildError, match=r"no nvcc.*CUDA_HOME"):
        build(dataclasses.replace(TOY, compiler="nvcc"))


def test_ninja_of_path_is_enough_and_none_says_what_to_install(toy, monkeypatch):
    ninja, which = toolchain.find_ninja(), shutil.which
    monkeypatch.setitem(sys.modules, "ninja", None)  # importing it fails
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "ninja" else which(name))
    with pytest.raises(BuildError, match="no ninja: pip install ninja"):
        build(TOY)
    monkeypatch.setattr(shutil, "which", which)
    (toy.bin / "ninja").symlink_to(ninja)
    monkeypatch.setenv("PATH", f"{toy.bin}{os.pathsep}{os.environ['PATH']}")
    assert toolchain.find_ninja() == str(toy.bin / "ninja")
    assert call(build(TOY)) == 42


def test_compile_error_shows_the_compilers_words_and_where_all_of_them_are(toy):
    toy.set_answer("no_such_name")
    with pytest.raises(BuildError, match=r"toy\.h:1:16: error: .*no_such_name") as caught:
        build(TOY)
    message = str(caught.value)
    assert message.startswith(f"the toy does not compile with {toy.compiler}:\n")
    log = Path(message.rpartition("All output: ")[2])
    assert log.parent == toy.cache and "FAILED" in log.read_text()
    assert toy.libraries() == [] and toy.unfinished() == []
    toy.set_answer(42)
    assert call(build(TOY)) == 42


def test_link_error_names_the_library(toy):
    with pytest.raises(BuildError, match="cannot find -lno_such_library"):
        build(dataclasses.replace(TOY, link_flags=("-shared", "-lno_such_library")))


def test_no_sources_is_an_incomplete_installation(toy, monkeypatch):
    monkeypatch.setattr(builder, "source_root", lambda: toy.bin)
    with pytest.raises(BuildError, match="incomplete"):
        build(TOY)


def test_switched_off_even_where_it_is_built(toy, monkeypatch):
    build(TOY)
    monkeypatch.setenv("FASTDIFF_NATIVE", "0")
    with pytest.raises(BuildError, match="FASTDIFF_NATIVE=0"):
        build(TOY)


# ---- places ------------------------------------------------------------------------------------


def test_sources_of_a_checkout_and_of_a_wheel(toy, monkeypatch):
    monkeypatch.undo()
    checkout = Path(__file__).resolve().parent.parent / "csrc"
    assert builder.source_root() == checkout and not checkout.is_symlink()
    monkeypatch.setattr(builder, "__file__", str(toy.site / "fastdiff/backends/build.py"))
    assert builder.source_root() == toy.csrc


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"FASTDIFF_CACHE": "/c", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/c"),
        ({"FASTDIFF_CACHE": "~/c", "HOME": "/h"}, "/h/c"),
        ({"FASTDIFF_CACHE": "", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/fastdiff"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, "/h/.cache/fastdiff"),
        ({"HOME": "/h"}, "/h/.cache/fastdiff"),
    ],
)
def test_cache_root_follows_the_environment(monkeypatch, environment, expected):
    for name in ("FASTDIFF_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert builder.cache_root() == Path(expected)


# ---- the targets -------------------------------------------------------------------------------


@pytest.mark.skipif(GXX is None, reason="no g++")
def test_cpu_library_builds_from_nothing_and_loads(tmp_path):
    """Without the optimiser, a fifth of the time: the library of all other tests has it."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec {GXX} "$@" -O0\n')
    compiler.chmod(0o755)
    script = """
import torch
from fastdiff.backends.build import build, cpu_target
from fastdiff.ops.schemas import SCHEMAS
torch.ops.load_library(str(build(cpu_target())))
for name in SCHEMAS:
    print(name, "CPU" in torch._C._dispatch_dump(f"fastdiff_native::{name}"))
"""
    root = Path(builder.__file__).resolve().parents[2]
    environment = {
        **os.environ, "FASTDIFF_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(root),
        "CXX": str(compiler),
    }  # fmt: skip
    environment.pop("FASTDIFF_NATIVE", None)
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "fastdiff: built the native CPU library in " in result.stderr
    assert result.stdout.split() == [word for name in SCHEMAS for word in (name, "True")]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_cpu_kernels_are_compiled_per_isa_and_code_for_every_machine_is_linked_first(
    monkeypatch, machine
):
    monkeypatch.setattr(builder.platform, "machine", lambda: machine)
    target = builder.cpu_target()
    levels = [source.suffix for source in target.sources if source.path == "cpu/kernels.cpp"]
    assert levels == (
        ["portable", "avx2", "avx512", "avx512_bf16"] if machine == "x86_64" else ["portable"]
    )
    needs_isa = [any("-march" in flag for flag in source.flags) for source in target.sources]
    assert needs_isa == sorted(needs_isa)
    have = {flag for flag in target.flags if flag.startswith("-DFASTDIFF_HAVE_")}
    assert have == {f"-DFASTDIFF_HAVE_{level.upper()}" for level in levels[1:]}


def test_no_target_lets_the_compiler_contract_or_reorder_floating_point():
    for target in (builder.cpu_target(), builder.cuda_host_target(), builder.cuda_target(["9.0"])):
        flags = " ".join(
            [*target.flags, *(flag for source in target.sources for flag in source.flags)]
        )
        assert "-ffp-contract=off" in flags
        assert "fast" not in flags.replace("-DFASTDIFF", "").replace("fastdiff_", "")
        assert ("-fmad=false" in flags) == (target.compiler == "nvcc")


def test_cuda_architectures_from_argument_environment_and_gpus(monkeypatch):
    def codes(target: Target) -> list[str]:
        kernels = [source.flags for source in target.sources if source.path.endswith(".cu")]
        assert kernels and all(flags == kernels[0] for flags in kernels)
        names = [flag.removeprefix("-gencode=") for flag in kernels[0]]
        return [name for name in names if name.startswith("arch=")]

    monkeypatch.setenv("FASTDIFF_CUDA_ARCHS", "10.0, 8.0;sm_90")
    expected = ["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90"]
    expected += ["arch=compute_100,code=sm_100", "arch=compute_100,code=compute_100"]
    assert codes(builder.cuda_target()) == expected
    assert codes(builder.cuda_target(["90a"]))[1] == "arch=compute_90,code=compute_90"
    with pytest.raises(BuildError, match="'ninety'"):
        builder.cuda_target(["ninety"])

    monkeypatch.delenv("FASTDIFF_CUDA_ARCHS")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BuildError, match="--cuda-archs"):
        builder.cuda_target([])
    with pytest.raises(BuildError, match="FASTDIFF_CUDA_ARCHS"):
        builder.cuda_target()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(9, 0), (8, 6), (9, 0)][i])
    assert codes(builder.cuda_target())[:2] == [
        "arch=compute_86,code=sm_86",
        "arch=compute_90,code=sm_90",
    ]


@pytest.mark.parametrize(
    ("archs", "capability", "served"),
    [
        (["80", "90"], (8, 0), True),
        (["80", "90"], (8, 9), True),  # machine code of sm_80
        (["80", "90"], (12, 0), True),  # PTX of sm_90
        (["80", "90"], (7, 5), False),
        (["90", "100"], (8, 6), False),
        (["86", "90"], (8, 0), False),
        (["90a"], (9, 0), True),
        (["80", "100a", "120"], (10, 3), False),
    ],
)
def test_a_gpu_that_the_cuda_library_is_not_for_is_told_which_are(archs, capability, served):
    reason = builder.not_served(archs, capability)
    assert (reason is None) == served
    if reason is not None:
        name = "{}.{}".format(*capability)
        assert all(f"sm_{arch}" in reason for arch in archs)
        assert f'add "{name}" to FASTDIFF_CUDA_ARCHS' in reason


def test_cuda_library_is_built_for_a_list_of_architectures_without_a_gpu(monkeypatch, capsys):
    asked: list[Target] = []

    def record(target: Target, **options: bool) -> Path:
        asked.append(target)
        return Path(target.name)

    monkeypatch.setattr(builder, "build", record)
    assert cli.main(["build", "--cuda-archs", "9.0, 8.0"]) == 0
    assert capsys.readouterr().out.split() == ["native_cpu", "native_cuda"]
    assert asked[1] == builder.cuda_target(["80", "90"])
    assert cli.main(["build", "--cuda-archs", "nine"]) == 2
    assert "argument --cuda-archs: CUDA architecture 'nine'" in capsys.readouterr().err
