"""The numbers and structures of tracker.abi, compared with the headers of the lab's own kernel."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.lab.boot import CHECKOUT, kernel_directory


def test_the_labs_headers_agree() -> None:
    """They may be newer than the host's, which need not know PAGEMAP_SCAN or iommufd."""
    include = kernel_directory() / "include"
    assert (include / "linux/iommufd.h").exists()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/tracker/test_abi.py",
        ],
        cwd=CHECKOUT,
        env={**os.environ, "C_INCLUDE_PATH": str(include)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
