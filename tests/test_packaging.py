"""What a wheel, an sdist and a bare checkout hold, and what can be imported from each.

Everything is built in a copy of the working tree: nothing is left in the tree itself.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {".cpp", ".h", ".cu", ".cuh", ".md"}


def python(code: str, cwd: Path, *path: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in `cwd`, which comes first on sys.path, as it does for `python -c`."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )


def output(code: str, cwd: Path, *path: Path) -> list[str]:
    done = python(code, cwd, *path)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def build(kind: str, tree: Path, into: Path) -> Path:
    """Call the hook that pip calls (`kind` is "wheel" or "sdist"); return the file it made."""
    into.mkdir()
    code = f"from setuptools import build_meta as b; print(b.build_{kind}({str(into)!r}))"
    return into / output(code, tree)[-1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git tracks, or would after `git add .`, with links kept as links."""
    if not (ROOT / ".git").exists():
        pytest.skip("the list of files comes from git, and this is not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    copy = tmp_path_factory.mktemp("checkout") / "fastdiff-checkout"
    for name in filter(None, listed.split("\0")):
        source, target = ROOT / name, copy / name
        if os.path.lexists(source):  # tracked, deleted and not yet committed
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    return copy


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist."""
    place = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", checkout, place / "built")) as archive:
        if sys.version_info >= (3, 12):
            archive.extractall(place, filter="data")
        else:
            archive.extractall(place)
    return next(place.glob("fastdiff-*"))


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A copy of its own, since a build leaves build/ and an egg-info beside the sources.
    place = tmp_path_factory.mktemp("wheel")
    shutil.copytree(checkout, place / "tree", symlinks=True)
    return build("wheel", place / "tree", place / "built")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel."""
    place = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    return place


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata(installed: Path) -> Message:
    return Parser().parsestr(next(installed.glob("*.dist-info/METADATA")).read_text("utf-8"))


def files(folder: Path, suffixes: set[str]) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in suffixes
    }


def test_the_top_level_holds_only_the_agreed_names(checkout: Path) -> None:
    visible = {path.name for path in checkout.iterdir() if not path.name.startswith(".")}
    agreed = "pyproject.toml README.md LICENSE Makefile fastdiff kernels csrc benchmarks tests"
    assert visible <= set(agreed.split())


LINKED = ("kernels", "csrc", "benchmarks")


@pytest.mark.parametrize("name", LINKED)
def test_the_package_links_to_the_top_level_folder(checkout: Path, name: str) -> None:
    assert os.readlink(checkout / "fastdiff" / name) == f"../{name}"


def test_wheel_is_pure_python_and_holds_one_top_level_package(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    tops = {name.split("/")[0] for name in names(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fastdiff"}


@pytest.mark.parametrize(
    ("folder", "suffixes"), [("kernels", {".py"}), ("csrc", SOURCES), ("benchmarks", {".py"})]
)
def test_wheel_carries_every_source_of_the_linked_folder(
    checkout: Path, installed: Path, folder: str, suffixes: set[str]
) -> None:
    expected = files(checkout / folder, suffixes)
    assert expected
    assert files(installed / "fastdiff" / folder, suffixes) == expected
    for name in expected:
        shipped = installed / "fastdiff" / folder / name
        assert shipped.read_bytes() == (checkout / folder / name).read_bytes()


def test_wheel_carries_every_python_file_data_file_and_the_typing_marker(
    checkout: Path, installed: Path
) -> None:
    wanted = {".py", ".typed", ".safetensors", ".json"}
    expected = {
        path.relative_to(checkout).as_posix()
        for path in (checkout / "fastdiff").rglob("*")
        if path.suffix in wanted and path.relative_to(checkout).parts[1] not in LINKED
    }
    assert "fastdiff/py.typed" in expected
    held = {
        f"fastdiff/{name}"
        for name in files(installed / "fastdiff", wanted)
        if name.split("/")[0] not in LINKED
    }
    assert held == expected


def test_wheel_carries_nothing_left_over_from_a_build(wheel: Path) -> None:
    left_over = (".pyc", ".so", ".o", ".egg-info")
    assert [name for name in names(wheel) if name.endswith(left_over)] == []


def test_wheel_built_from_the_sdist_holds_the_same_files(
    sdist: Path, wheel: Path, tmp_path: Path
) -> None:
    again = build("wheel", sdist, tmp_path / "built")
    assert names(again) == names(wheel)


def test_sdist_holds_files_where_the_checkout_holds_links(sdist: Path) -> None:
    assert not any(path.is_symlink() for path in sdist.rglob("*"))


def test_wheel_declares_the_console_script_and_the_runtime_needs(installed: Path) -> None:
    scripts = next(installed.glob("*.dist-info/entry_points.txt")).read_text("utf-8")
    assert scripts.split("\n")[:2] == ["[console_scripts]", "fastdiff = fastdiff.cli:main"]
    needs = metadata(installed).get_all("Requires-Dist")
    assert [need for need in needs if "extra ==" not in need] == [
        "torch>=2.10",
        'triton>=3.6; sys_platform == "linux"',
        "numpy",
        "ninja",
    ]


def test_every_tool_that_development_needs_has_a_pinned_version(
    checkout: Path, installed: Path
) -> None:
    def name(requirement: str) -> str:
        end = next((i for i, c in enumerate(requirement) if c in "<>=;[ "), len(requirement))
        return requirement[:end].lower()

    lines = (checkout / ".ci" / "constraints.txt").read_text("utf-8").splitlines()
    pinned = {name(line) for line in lines if line and not line.startswith("#")}
    without_needs = {"k-diffusion", "denoising-diffusion-pytorch"}  # installed by the Makefile
    needs = {name(need) for need in metadata(installed).get_all("Requires-Dist")}
    assert pinned == (needs - {"fastdiff"}) | without_needs


def test_version_of_the_package_is_the_version_of_the_wheel(
    installed: Path, tmp_path: Path
) -> None:
    code = "import fastdiff; print(fastdiff.__file__); print(fastdiff.__version__)"
    file, version = output(code, tmp_path, installed)
    assert Path(file) == installed / "fastdiff" / "__init__.py"
    assert version == metadata(installed)["Version"]


@pytest.mark.parametrize("where", ["checkout", "installed"])
def test_kernels_import_under_the_name_fastdiff_kernels(
    where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tree = request.getfixturevalue(where)
    (file,) = output("import fastdiff.kernels as k; print(k.__file__)", tmp_path, tree)
    assert Path(file) == tree / "fastdiff" / "kernels" / "__init__.py"


@pytest.mark.parametrize("where", ["checkout", "installed"])
def test_benchmarks_list_their_cases(
    where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    code = (
        "from fastdiff.cli import main; main(['bench', '--list', '--only', 'limits/one element'])"
    )
    lines = output(code, tmp_path, request.getfixturevalue(where))
    assert lines == ["limits/one element, 1 thread, warm memory"]


def test_using_the_folder_as_top_level_kernels_says_what_to_do(checkout: Path) -> None:
    done = python("import kernels; kernels.step", checkout)
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith("AttributeError: ")
    assert "import fastdiff.kernels" in last
    assert "Hugging Face" in last
    assert python("import kernels.step", checkout).returncode != 0


def test_transformers_and_the_drop_in_import_from_the_repository_root(checkout: Path) -> None:
    """They ask for Hugging Face's kernels, and the folder of that name answers."""
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import transformers.modeling_utils, diffusers, fastdiff as fd\n"
        "scheduler = fd.integrations.diffusers.accelerate(diffusers.DDIMScheduler())\n"
        "print(type(scheduler).__name__)"
    )
    assert output(code, checkout) == ["DDIMScheduler"]


def test_a_library_that_looks_for_hugging_face_kernels_degrades(checkout: Path) -> None:
    code = "try:\n    from kernels import get_kernel\nexcept ImportError:\n    print('without')"
    assert output(code, checkout) == ["without"]
