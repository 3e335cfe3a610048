"""What is installed: the wheel's content, a wheel in an empty environment, an editable checkout."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import mxforge
from mxforge.native import build

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"runtime": "mxforge", "compile": "mxforge/compile", "schedules": "mxforge/schedules"}
IMPORT = "import mxforge, sys; print(mxforge.__version__, mxforge.__file__)"


def run(*command: str | Path, cwd: Path) -> str:
    """The command's stdout; its stderr too where it fails."""
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=outside, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def loaded_by(statement: str, cwd: Path) -> set[str]:
    """Top-level modules in the process after `statement`."""
    code = f"{statement}; import sys; print(*{{m.split('.')[0] for m in sys.modules}})"
    return set(run(sys.executable, "-c", code, cwd=cwd).split())


def test_import_loads_neither_numpy_nor_tvm(tmp_path):
    assert not {"numpy", "tvm", "tvm_ffi", "tiktoken"} & loaded_by("import mxforge", tmp_path)


def test_runtime_never_imports_the_compiler(tmp_path):
    modules = ("engine", "cli", "bench", "inspect", "tokenizer")
    statement = "import " + ", ".join(f"mxforge.{name}" for name in modules)
    assert "tvm" not in loaded_by(statement, tmp_path)


@pytest.mark.parametrize(
    ("missing", "statement"),
    [
        ("tvm", "import mxforge; mxforge.compile_model('.')"),
        ("ml_dtypes", "import mxforge; mxforge.compile_model('.')"),
        ("tvm", "from mxforge.compile.cli import main; sys.exit(main(['.']))"),
        ("tvm", "from mxforge.cli import main; sys.exit(main(['compile', '.']))"),
        ("ml_dtypes", "from mxforge.cli import main; sys.exit(main(['diff', '.', '.']))"),
        ("onnx", "from mxforge.cli import main; sys.exit(main(['export-onnx', '.', 'out']))"),
        ("ml_dtypes", "from mxforge.cli import main; sys.exit(main(['export-onnx', '.', 'out']))"),
    ],
)
def test_without_the_compilers_packages_the_extra_is_named(missing, statement, tmp_path):
    code = f"import sys; sys.modules[{missing!r}] = None; {statement}"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    last = result.stderr.splitlines()[-1]
    assert missing in last
    assert 'install them with: pip install "mxforge[compile]"' in last
    if "compile_model" in statement:
        assert last.startswith("mxforge.errors.CompilerMissingError: ")
    else:
        assert len(result.stderr.splitlines()) == 1


def test_every_public_name_exists():
    assert {name for name in mxforge.__all__ if not hasattr(mxforge, name)} == set()
    assert set(dir(mxforge)) == set(mxforge.__all__)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what is packaged, so that building leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for folder in PACKAGES:
        shutil.copytree(
            ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet")
    run(*pip, "--no-deps", "--wheel-dir", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def empty_environment(folder: Path, *packages: str | Path) -> Path:
    """Its Python; only `packages` are in it, without what they depend on."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", "--quiet", "--no-deps", *packages, cwd=folder)
    return python


@pytest.mark.full
def test_wheel_holds_every_module_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in PACKAGES.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    expected |= {"mxforge/py.typed", "mxforge/data/o200k_base.ranks"}
    native = ROOT / "runtime" / "native"
    for folder in ("core", "cuda", "metal", "vulkan", "vulkan/plans", "vulkan/tvm"):
        sources = [path for path in (native / folder).iterdir() if path.suffix]  # no .clang-format
        expected |= {f"mxforge/native/{folder}/{path.name}" for path in sources}
    expected.add(f"mxforge/native/{build.CORE.output.name}")
    assert not wheel.name.endswith("-none-any.whl")
    assert {name for name in names if ".dist-info/" not in name} == expected
    licenses = {name.rpartition("/")[2] for name in names if "/licenses/" in name}
    assert licenses == {"LICENSE", "NOTICE"}


@pytest.mark.full
def test_metadata_names_version_pins_and_commands(wheel):
    archive = zipfile.ZipFile(wheel)
    (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
    assert metadata["Version"] == mxforge.__version__
    required = metadata.get_all("Requires-Dist")
    of_compiler = [each for each in required if each.endswith('; extra == "compile"')]
    pinned = {each.partition(";")[0] for each in of_compiler}
    assert {"apache-tvm==0.27.0.post1", "apache-tvm-ffi==0.1.14.post1"} <= pinned
    assert not [each for each in required if "tvm" in each and each not in of_compiler]
    assert metadata.get_all("Provides-Extra") == ["compile", "tokenizers", "cuda"]
    commands = archive.read(f"{info}/entry_points.txt").decode()
    assert re.findall(r"^(\S+) = ", commands, re.MULTILINE) == [
        "compile-model", "mxforge", "mxforge_vulkan",
    ]  # fmt: skip


@pytest.mark.full
def test_wheel_in_an_empty_environment_imports_and_tells_its_version(wheel, tmp_path):
    python = empty_environment(tmp_path / "env", wheel)
    version, file = run(python, "-c", IMPORT, cwd=tmp_path).split()
    assert version == mxforge.__version__
    assert "site-packages" in file
    said = run(python.parent / "mxforge", "--version", cwd=tmp_path)
    assert said == f"mxforge {mxforge.__version__}\n"
    assert "--random-weights" in run(python.parent / "compile-model", "--help", cwd=tmp_path)
    attempt = [python, "-c", "import mxforge; mxforge.compile_model('.')"]
    said = subprocess.run(attempt, cwd=tmp_path, capture_output=True, text=True).stderr
    assert 'pip install "mxforge[compile]"' in said.splitlines()[-1]


@pytest.mark.full
def test_editable_install_runs_the_checkout(source, tmp_path):
    python = empty_environment(tmp_path / "env", "--editable", source)
    _, file = run(python, "-c", IMPORT, cwd=tmp_path).split()
    assert Path(file) == source / "runtime" / "__init__.py"
    find = "import importlib.util as u; print(*(u.find_spec(name).origin for name in {}))"
    names = ["mxforge.compile", "mxforge.schedules"]
    origins = run(python, "-c", find.format(names), cwd=tmp_path).split()
    assert [Path(origin).parent for origin in origins] == [source / "compile", source / "schedules"]
