"""What configs/linux-guest promises before it fetches: nothing done twice, no half results.

The kernel and the initramfs themselves are shown to work by running them: tests/live.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[2] / "configs"
SCRIPT = CONFIGS / "linux-guest"
INIT = CONFIGS / "linux-guest.d" / "init"


def build(*args: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the script with nothing in its environment but PATH and what is given."""
    return subprocess.run(
        [SCRIPT, *args],
        env={"PATH": os.environ["PATH"]} | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def recipe(init: Path = INIT, program: str = "stress-ng") -> bytes:
    """The checksum line that marks results as made by the present script and init."""
    content = SCRIPT.read_bytes() + init.read_bytes() + program.encode()
    return subprocess.run(["cksum"], input=content, capture_output=True, check=True).stdout


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A directory that looks as after a complete run."""
    directory = tmp_path / "linux"
    directory.mkdir()
    (directory / "vmlinuz").write_bytes(b"kernel")
    (directory / "initramfs.gz").write_bytes(b"initramfs")
    (directory / "recipe").write_bytes(recipe())
    return directory


@pytest.fixture
def bare_path(tmp_path: Path) -> str:
    """A PATH with what the second run may use, and with nothing that could fetch or build."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "cat", "cksum", "dirname"):
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    return str(tools)


@pytest.mark.parametrize("path", [SCRIPT, INIT], ids=["script", "init"])
def test_shell_syntax(path: Path) -> None:
    subprocess.run(["sh", "-n", path], check=True)
    assert os.access(path, os.X_OK)


def test_second_run_is_quiet_and_fetches_nothing(built: Path, bare_path: str) -> None:
    run = build(built, PATH=bare_path)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_default_directory(built: Path, bare_path: str) -> None:
    cache = built.parent
    (cache / "qemu-migrator").mkdir()
    built.rename(cache / "qemu-migrator" / "linux")
    assert build(PATH=bare_path, XDG_CACHE_HOME=str(cache)).returncode == 0
    cache.rename(cache.parent / ".cache")
    moved = bare_path.replace(str(cache), str(cache.parent / ".cache"))
    assert build(PATH=moved, HOME=str(cache.parent)).returncode == 0


@pytest.mark.parametrize("lost", ["vmlinuz", "initramfs.gz", "recipe"])
def test_incomplete_results_do_not_count(built: Path, bare_path: str, lost: str) -> None:
    (built / lost).unlink()
    run = build(built, PATH=bare_path)
    assert run.returncode == 1
    assert "needs apt-get" in run.stderr


@pytest.mark.parametrize("emptied", ["vmlinuz", "initramfs.gz"])
def test_empty_results_do_not_count(built: Path, bare_path: str, emptied: str) -> None:
    (built / emptied).write_bytes(b"")
    assert build(built, PATH=bare_path).returncode == 1


def test_results_of_another_recipe_do_not_count(built: Path, bare_path: str) -> None:
    (built / "recipe").write_text("1 2\n")
    assert build(built, PATH=bare_path).returncode == 1


@pytest.mark.skipif(
    shutil.which("apt-get") is None or shutil.which("dpkg") is None, reason="no apt here"
)
def test_without_package_lists_says_what_to_do_and_leaves_nothing(tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    (lists / "partial").mkdir(parents=True)
    (tmp_path / "apt.conf").write_text(f'Dir::State::lists "{lists}";\n')
    out = tmp_path / "out"
    run = build(out, APT_CONFIG=str(tmp_path / "apt.conf"))
    assert run.returncode == 1
    if "amd64 guest" not in run.stderr:
        assert "apt-get update" in run.stderr
    assert not [entry for entry in out.glob("*") if not entry.name.startswith(".")]
    assert not (out / ".build").exists()


def test_another_init_and_program_are_another_recipe(built: Path, bare_path: str) -> None:
    init = built / "init"
    init.write_text("#!/bin/sh\n")
    assert build(built, init, "stress-ng", PATH=bare_path).returncode == 1
    (built / "recipe").write_bytes(recipe(init, "sqlite3"))
    assert build(built, init, "sqlite3", PATH=bare_path).returncode == 0
    assert build(built, init, "stress-ng", PATH=bare_path).returncode == 1
    assert build(built, PATH=bare_path).returncode == 1


@pytest.mark.parametrize("args", [("-h",), ("a", "b"), ("a", "b", "c", "d"), ("",)], ids=str)
def test_usage(args: tuple[str, ...]) -> None:
    run = build(*args)
    usage = "linux-guest: usage: linux-guest [DIR [INIT PROGRAM]]\n"
    assert (run.returncode, run.stderr) == (1, usage)


def test_no_home_and_no_directory() -> None:
    run = build()
    assert run.returncode == 1
    assert "give a directory" in run.stderr
