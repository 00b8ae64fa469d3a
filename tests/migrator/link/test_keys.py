"""The CA and its hosts' certificates: what is in them, who may read the files, the commands."""

from __future__ import annotations

import json
import os
import ssl
import stat
import subprocess
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from migrator.cli import keys as cli_keys
from migrator.cli.main import main
from migrator.errors import ConfigError
from migrator.link import keys, tls
from migrator.link.certificates import CA_DAYS, host_certificate

HOST_FILES = ("ca.crt", "host.crt", "host.key")


def openssl(*arguments: str | Path) -> str:
    command = ["openssl", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def everything(directory: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(directory.rglob("*"))}


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    keys.init(tmp_path / "ca", ["hosta"])
    return tmp_path / "ca"


# -- certificates -------------------------------------------------------------------------------


@pytest.mark.parametrize("purpose", ["sslserver", "sslclient"])
@pytest.mark.parametrize(
    ("host", "check"),
    [
        ("hosta.example", "-verify_hostname"),
        ("10.0.0.2", "-verify_ip"),
        ("fd00::2", "-verify_ip"),
        (".".join(["x" * 60] * 4), "-verify_hostname"),
    ],
)
def test_openssl_accepts_the_chain(tmp_path: Path, host: str, check: str, purpose: str) -> None:
    made = keys.init(tmp_path / "ca", [host])
    home = tmp_path / "ca" / host
    assert made == [tmp_path / "ca/ca.key", tmp_path / "ca/ca.crt", *(home / n for n in HOST_FILES)]
    arguments = ["-x509_strict", "-no-CApath", "-no-CAstore", "-purpose", purpose, check, host]
    said = openssl("verify", *arguments, "-CAfile", home / "ca.crt", home / "host.crt")
    assert said == f"{home / 'host.crt'}: OK\n"
    arguments[-1] = {"-verify_ip": "10.0.0.3"}.get(check, "hostb.example")
    with pytest.raises(subprocess.CalledProcessError):
        openssl("verify", *arguments, "-CAfile", home / "ca.crt", home / "host.crt")


def test_what_the_certificates_say(ca: Path) -> None:
    said = openssl("x509", "-in", ca / "ca.crt", "-noout", "-text")
    assert "CA:TRUE, pathlen:0" in said
    assert "X509v3 Basic Constraints: critical" in said
    assert "X509v3 Key Usage: critical\n                Certificate Sign\n" in said
    host = openssl("x509", "-in", ca / "hosta/host.crt", "-noout", "-text")
    assert "X509v3 Basic Constraints: critical\n                CA:FALSE\n" in host
    assert "X509v3 Key Usage: critical\n                Digital Signature\n" in host
    assert "TLS Web Client Authentication, TLS Web Server Authentication\n" in host
    assert "X509v3 Subject Alternative Name: \n                DNS:hosta\n" in host
    for text in (said, host):
        assert "Version: 3 " in text
        assert "Signature Algorithm: ecdsa-with-SHA256" in text
        assert "ASN1 OID: prime256v1" in text
    assert (ca / "ca.crt").read_bytes() == (ca / "hosta/ca.crt").read_bytes()


def test_validity(tmp_path: Path) -> None:
    keys.init(tmp_path / "ca", ["hosta"], days=7)
    keys.add(tmp_path / "ca", ["hostb"])
    now = datetime.now(timezone.utc)
    for certificate, days in zip(keys.show(tmp_path / "ca"), (3650, 7, 825), strict=True):
        # a few minutes back, for clocks that are behind
        assert now - timedelta(minutes=10) < certificate.not_before < now - timedelta(minutes=4)
        left = certificate.not_after - now
        assert timedelta(days=days, minutes=-5) < left <= timedelta(days=days)


def test_every_certificate_has_a_key_and_a_number_of_its_own(ca: Path) -> None:
    keys.add(ca, ["hostb", "hostc"])
    certificates = [ca / "ca.crt", *sorted(ca.glob("*/host.crt"))]
    for what in ("-serial", "-pubkey"):
        assert len({openssl("x509", "-noout", what, "-in", c) for c in certificates}) == 4
    for certificate in certificates[1:]:
        public = openssl("pkey", "-pubout", "-in", certificate.with_name("host.key"))
        assert public == openssl("x509", "-noout", "-pubkey", "-in", certificate)


def test_fingerprint_is_that_of_openssl(ca: Path) -> None:
    file = ca / "hosta/host.crt"
    said = openssl("x509", "-noout", "-fingerprint", "-sha256", "-in", file)
    digits = said.strip().partition("=")[2].replace(":", "").lower()
    der = ssl.PEM_cert_to_DER_cert(file.read_text())
    assert keys.fingerprint(der) == f"sha256:{digits}"
    assert [c.fingerprint for c in keys.show(ca / "hosta")][1] == f"sha256:{digits}"


# -- hosts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("HostA.Example", "hosta.example"),
        ("a", "a"),
        ("3com-2.example", "3com-2.example"),
        ("0123456789", "0123456789"),
        ("10.0.0.2", "10.0.0.2"),
        ("FD00:0:0::02", "fd00::2"),
        ("x" * 63, "x" * 63),
    ],
)
def test_hosts(text: str, host: str) -> None:
    assert keys.host_name(text) == keys.host_name(host) == host


@pytest.mark.parametrize(
    "text",
    [
        *["", ".", "..", "../a", "a/b", "/a", "a/..", ".a", "a.", "a..b", "-a", "a-", "a_b", "a b"],
        *["a\n", "a\0", "*.example", "häst", "10.0.0.256", "10.0.0", "fe80::1%eth0", "fd00::2::"],
        *["x" * 64, ".".join(["x" * 60] * 5)],
    ],
)
def test_what_is_not_a_host_makes_nothing(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="expected the name or the address of a host"):
        keys.init(tmp_path / "ca", ["hosta", text])
    assert list(tmp_path.iterdir()) == []


# -- files --------------------------------------------------------------------------------------


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("no_umask")
def test_nobody_else_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And as nothing changes a mode, it has been so from the beginning."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("modes are for making files, not for mending them")

    for name in ("chmod", "fchmod", "lchmod"):
        monkeypatch.setattr(os, name, refuse, raising=False)
    keys.init(tmp_path / "ca", ["hosta"])
    keys.add(tmp_path / "ca", ["hostb"])
    modes = {p: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "ca").rglob("*")}
    modes[tmp_path / "ca"] = stat.S_IMODE((tmp_path / "ca").stat().st_mode)
    for path, mode in modes.items():
        assert mode == {".key": 0o600, ".crt": 0o644}.get(path.suffix, 0o700), path
    assert len(modes) == 1 + 2 + 2 * (1 + len(HOST_FILES))


def test_nothing_is_overwritten(ca: Path) -> None:
    before = everything(ca)
    for make, hosts in (
        (keys.init, ["hostb"]),
        (keys.init, []),
        (keys.init, ["hosta"]),
        (keys.add, ["hosta"]),
        (keys.add, ["hostb", "HOSTA"]),
        (keys.add, ["ca.key"]),
    ):
        with pytest.raises(ConfigError, match="there already, and nothing is overwritten"):
            make(ca, hosts)
        assert everything(ca) == before


def test_a_host_that_appears_meanwhile_is_not_overwritten(
    ca: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As somebody else's add at the same time would make it."""
    theirs: dict[Path, bytes | None] = {}

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr("migrator.link.keys.host_certificate", host_certificate)
        keys.add(ca, ["hostb"])
        theirs.update(everything(ca))
        return host_certificate(*arguments)

    monkeypatch.setattr("migrator.link.keys.host_certificate", meanwhile)
    with pytest.raises(ConfigError, match="hostb: "):
        keys.add(ca, ["hostb"])
    assert everything(ca) == theirs
    assert ca / "hostb/host.key" in theirs


def test_a_host_is_made_whole_or_not_at_all(ca: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = everything(ca)
    write = keys._write

    def full(path: Path, content: bytes, mode: int) -> None:
        if path.name == "host.key":
            raise OSError(28, "No space left on device", str(path))
        write(path, content, mode)

    monkeypatch.setattr(keys, "_write", full)
    with pytest.raises(ConfigError, match="No space left"):
        keys.add(ca, ["hostb"])
    assert everything(ca) == before


def test_a_directory_that_others_may_write_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match="others may write to it: chmod go-w"):
        keys.init(tmp_path, ["hosta"])
    assert list(tmp_path.iterdir()) == []
    tmp_path.chmod(0o755)
    keys.init(tmp_path, ["hosta"])


def test_a_directory_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        keys.init(tmp_path / "no" / "ca", ["hosta"])
    with pytest.raises(ConfigError, match="no CA here"):
        keys.add(tmp_path / "no", ["hosta"])
    with pytest.raises(ConfigError, match="No such file"):
        keys.show(tmp_path / "no")


def test_no_ca_to_add_by(ca: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no CA here: migrator keys init"):
        keys.add(ca / "hosta", ["hostb"])
    with pytest.raises(ConfigError, match="no certificates: migrator keys init"):
        keys.show(tmp_path)


def test_a_ca_that_cannot_be_used(ca: Path, tmp_path: Path) -> None:
    keys.init(tmp_path / "other", [])
    key = (ca / "ca.key").read_bytes()
    for wrong, said in (
        ((tmp_path / "other/ca.key").read_bytes(), "is not the key of ca.crt beside it"),
        (b"nonsense", "expected a key in PEM"),
    ):
        (ca / "ca.key").write_bytes(wrong)
        with pytest.raises(ConfigError, match=said):
            keys.add(ca, ["hostb"])
    (ca / "ca.key").write_bytes(key)
    (ca / "ca.key").chmod(0o640)
    with pytest.raises(ConfigError, match=r"ca\.key: others may use this key"):
        keys.add(ca, ["hostb"])
    (ca / "ca.key").chmod(0o600)
    (ca / "ca.crt").write_text("nonsense")
    with pytest.raises(ConfigError, match=r"ca\.crt: expected a certificate in PEM"):
        keys.add(ca, ["hostb"])
    assert not (ca / "hostb").exists()


@pytest.mark.parametrize("days", [0, -1, 3651, 10**12])
def test_days_that_make_no_sense(tmp_path: Path, days: int) -> None:
    with pytest.raises(ConfigError, match="expected 1 to 3650 days"):
        keys.init(tmp_path / "ca", ["hosta"], days)
    assert list(tmp_path.iterdir()) == []


def test_no_host_outlasts_its_ca(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.init(tmp_path / "ca", ["hosta"], days=3650)
    later = datetime.now(timezone.utc) + timedelta(days=3000)
    monkeypatch.setattr(keys, "_now", lambda: later)
    with pytest.raises(ConfigError, match=r"the CA ends on 20\d\d-.*fewer days"):
        keys.add(tmp_path / "ca", ["hostb"])
    keys.add(tmp_path / "ca", ["hostb"], days=600)


# -- commands -----------------------------------------------------------------------------------


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["keys", *map(str, arguments)])


def test_the_commands(tmp_path: Path) -> None:
    home = tmp_path / "ca"
    done = invoke("init", home, "HostA", "10.0.0.2", "--days", "30", "--json")
    assert done.exit_code == 0
    made = [Path(file) for file in json.loads(done.stdout)["files"]]
    assert sorted(made) == sorted(file for file in home.rglob("*") if file.is_file())
    assert all(f"made {file}\n" in done.stderr for file in made)
    done = invoke("add", home, "hostb")
    assert (done.exit_code, done.stdout) == (0, "")
    done = invoke("show", home, "--json")
    assert done.exit_code == 0
    shown = json.loads(done.stdout)["certificates"]
    assert [c["names"] for c in shown] == [[], ["10.0.0.2"], ["hosta"], ["hostb"]]
    for said, known in zip(shown, keys.show(home), strict=True):
        assert said == {
            "file": str(known.file),
            "subject": known.subject,
            "names": list(known.names),
            "fingerprint": known.fingerprint,
            "not_before": known.not_before.isoformat(),
            "not_after": known.not_after.isoformat(),
        }
        for text in (said["subject"], said["fingerprint"], said["not_after"][:10]):
            assert text in done.stderr
    assert "not now" not in done.stderr


def test_a_certificate_that_has_expired_is_pointed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = datetime.now(timezone.utc) - timedelta(days=40)
    with monkeypatch.context() as patched:
        patched.setattr(keys, "_now", lambda: earlier)
        keys.init(tmp_path / "ca", ["hosta"], days=30)
    assert invoke("show", tmp_path / "ca").stderr.count("which is not now") == 1


def test_without_a_host_it_is_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "ThisHost")
    assert invoke("init", tmp_path / "ca").exit_code == 0
    assert (tmp_path / "ca/thishost/host.crt").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["init"], "Missing argument 'DIR'"),
        (["add", "ca"], "Missing argument 'HOST...'"),
        (["init", "ca", "--days", "0"], "--days"),
        (["show", __file__], "is a file"),
        (["init", "ca", "a/b"], "not 'a/b'"),
        (["show", "ca"], "No such file or directory"),
    ],
)
def test_usage_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_defaults_are_those_of_the_library() -> None:
    for command in (cli_keys.init, cli_keys.add):
        (days,) = (option for option in command.params if option.name == "days")
        assert days.default == keys.HOST_DAYS
        assert isinstance(days.type, click.FloatRange)
        assert (days.type.min, days.type.max) == (1, CA_DAYS)


def test_errors_as_json(ca: Path) -> None:
    done = invoke("init", ca, "--json")
    assert done.exit_code == 2
    said = json.loads(done.stdout)
    assert said["status"] == "failed"
    assert "nothing is overwritten" in said["reason"]


# -- other users --------------------------------------------------------------------------------

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: gives files away")
OTHER = 65534


@needs_root
@pytest.mark.parametrize("command", ["init", "add"])
def test_a_directory_of_another_user(tmp_path: Path, command: str) -> None:
    directory = tmp_path / "ca"
    directory.mkdir(mode=0o755)
    if command == "add":
        keys.init(directory, ["hosta"])
    os.chown(directory, OTHER, OTHER)
    before = everything(directory)
    done = invoke(command, directory, "hostb")
    assert done.exit_code == 2
    assert f"ca: belongs to another user (its owner has the number {OTHER})" in " ".join(
        done.stderr.split()
    )
    assert everything(directory) == before


@needs_root
def test_a_ca_key_of_another_user(ca: Path) -> None:
    os.chown(ca / "ca.key", OTHER, OTHER)
    with pytest.raises(ConfigError, match=r"ca\.key: belongs to another user"):
        keys.add(ca, ["hostb"])


@needs_root
@pytest.mark.parametrize("name", HOST_FILES)
def test_a_hosts_file_of_another_user(ca: Path, name: str) -> None:
    tls.load(ca / "hosta")
    os.chown(ca / "hosta" / name, OTHER, OTHER)
    with pytest.raises(ConfigError, match=rf"{name}: belongs to another user"):
        tls.load(ca / "hosta")


def test_files_of_this_user_and_of_root(ca: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = (ca / "ca.key").stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    if owner == 0:
        keys.check_private(ca / "ca.key")
    else:
        with pytest.raises(ConfigError, match="belongs to another user"):
            keys.check_private(ca / "ca.key")
