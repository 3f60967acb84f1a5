"""How each client logs in, and what makes it trust an authority."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from conformance import toolbox
from conformance.accounts.base import Accounts, AccountsLab
from conformance.accounts.registry import Account
from conformance.clients.docker import Engine
from conformance.clients.lab import file_in_tar, tar_of
from conformance.views.kit import KITCLIENT

_FILE = "weights.bin"
_KITFILE = f"manifestVersion: 1.0.0\npackage: {{name: private}}\nmodel: {{name: model, path: {_FILE}}}\n"


class Docker(Accounts, Engine):
    """By the engine's folder of certificates. The engine sees a folder of the lab where the machine has /etc/docker."""

    # $0 is the lab's folder; what follows is the engine's command.
    _AT_HOME = 'mkdir -p /etc/docker && mount --bind "$0" /etc/docker && exec "$@"'

    def __init__(self, lab: AccountsLab) -> None:
        super().__init__(lab)
        self.settings = lab.folder / "etc-docker"

    def before_daemon(self) -> tuple[str | Path, ...]:
        return ("unshare", "--mount", "sh", "-c", self._AT_HOME, self.settings)

    @contextmanager
    def ready(self) -> Iterator[None]:
        self.settings.mkdir()
        with super().ready():
            yield

    def trust(self) -> None:
        folder = self.settings / "certs.d" / self.lab.host
        folder.mkdir(parents=True)
        shutil.copy(self.lab.registry.authority, folder / "ca.crt")

    def login(self, account: Account) -> None:
        options = ("-u", account.name, "--password-stdin")
        self.run("login", *options, self.lab.host, stdin=account.password.encode())

    def logout(self) -> None:
        self.run("logout", self.lab.host)

    def push(self, reference: str) -> None:
        self.run("import", "--change", f"CMD /{_FILE}", "-", reference, stdin=tar_of(self.lab.content))
        self.run("push", reference)

    def pull(self, reference: str) -> bytes:
        self.run("image", "rm", "--force", reference)
        self.run("pull", reference)
        container = self.run("create", reference).strip()
        self.run("cp", f"{container}:/{_FILE}", _FILE)
        self.run("rm", container)
        return (self.lab.folder / _FILE).read_bytes()


class Oras(Accounts):
    """By --ca-file."""

    def __init__(self, lab: AccountsLab) -> None:
        super().__init__(lab)
        self.tool = toolbox.go_tool("oras")
        self.trusting: tuple[str, ...] = ()

    def trust(self) -> None:
        self.trusting = ("--ca-file", str(self.lab.registry.authority))

    def login(self, account: Account) -> None:
        options = (*self.trusting, "-u", account.name, "--password-stdin")
        self.lab.run(self.tool, "login", *options, self.lab.host, stdin=account.password.encode())

    def logout(self) -> None:
        self.lab.run(self.tool, "logout", self.lab.host)

    def push(self, reference: str) -> None:
        (self.lab.folder / _FILE).write_bytes(self.lab.content)
        self.lab.run(self.tool, "push", *self.trusting, reference, f"{_FILE}:application/octet-stream")

    def pull(self, reference: str) -> bytes:
        shutil.rmtree(self.lab.folder / "pulled", ignore_errors=True)
        self.lab.run(self.tool, "pull", *self.trusting, "-o", "pulled", reference)
        return (self.lab.folder / "pulled" / _FILE).read_bytes()


class TrustingByVariable(Accounts):
    """By SSL_CERT_FILE, as every program in Go can."""

    def trust(self) -> None:
        self.lab = replace(self.lab, variables={"SSL_CERT_FILE": str(self.lab.registry.authority)})


class Crane(TrustingByVariable):
    def __init__(self, lab: AccountsLab) -> None:
        super().__init__(lab)
        self.tool = toolbox.go_tool("crane")

    def run(self, *arguments: str, stdin: bytes = b"") -> bytes:
        return self.lab.run_for_bytes(self.tool, *arguments, stdin=stdin)

    def login(self, account: Account) -> None:
        options = ("-u", account.name, "--password-stdin")
        self.run("auth", "login", self.lab.host, *options, stdin=account.password.encode())
        # It keeps what it is told, and asks nobody; so ask.
        self.run("catalog", self.lab.host)

    def logout(self) -> None:
        self.run("auth", "logout", self.lab.host)

    def push(self, reference: str) -> None:
        (self.lab.folder / "layer.tar").write_bytes(tar_of(self.lab.content))
        self.run("append", "--oci-empty-base", "-f", "layer.tar", "-t", reference)

    def pull(self, reference: str) -> bytes:
        return file_in_tar(self.run("export", reference, "-"))


class Regctl(Accounts):
    """By `registry set --cacert`."""

    def __init__(self, lab: AccountsLab) -> None:
        super().__init__(lab)
        self.tool = toolbox.go_tool("regctl")

    def trust(self) -> None:
        authority = self.lab.registry.authority.read_text()
        # Its check is a request without a login.
        self.lab.run(self.tool, "registry", "set", self.lab.host, "--cacert", authority, "--skip-check")

    def login(self, account: Account) -> None:
        options = ("-u", account.name, "--pass-stdin")
        self.lab.run(self.tool, "registry", "login", self.lab.host, *options, stdin=account.password.encode())

    def logout(self) -> None:
        self.lab.run(self.tool, "registry", "logout", self.lab.host)

    def push(self, reference: str) -> None:
        options = ("--artifact-type", "application/x.weights")
        self.lab.run(self.tool, "artifact", "put", *options, reference, stdin=self.lab.content)

    def pull(self, reference: str) -> bytes:
        return self.lab.run_for_bytes(self.tool, "artifact", "get", reference)


class Skopeo(Accounts):
    """By --cert-dir."""

    def __init__(self, lab: AccountsLab) -> None:
        super().__init__(lab)
        self.tool = toolbox.debian_command("skopeo")
        self.certificates = lab.folder / "certificates"

    def trust(self) -> None:
        shutil.copy(self.lab.registry.authority, self.certificates / "ca.crt")

    def login(self, account: Account) -> None:
        self.certificates.mkdir(exist_ok=True)
        options = ("--cert-dir", self.certificates, "-u", account.name, "--password-stdin")
        self.lab.run(self.tool, "login", *options, self.lab.host, stdin=account.password.encode())

    def logout(self) -> None:
        self.lab.run(self.tool, "logout", self.lab.host)

    def push(self, reference: str) -> None:
        (self.lab.folder / "layer.tar").write_bytes(tar_of(self.lab.content))
        self.lab.run(
            *(toolbox.go_tool("crane"), "append", "--oci-empty-base"),
            *("-f", "layer.tar", "-t", reference, "-o", "image.tar"),
        )
        self._copy("--dest-cert-dir", "docker-archive:image.tar", f"docker://{reference}")

    def pull(self, reference: str) -> bytes:
        folder = self.lab.folder / "pulled"
        shutil.rmtree(folder, ignore_errors=True)
        self._copy("--src-cert-dir", f"docker://{reference}", f"dir:{folder}")
        (layer,) = json.loads((folder / "manifest.json").read_bytes())["layers"]
        return file_in_tar(gzip.decompress((folder / layer["digest"].removeprefix("sha256:")).read_bytes()))

    def _copy(self, option: str, source: str, target: str) -> None:
        self.lab.run(self.tool, "--insecure-policy", "copy", option, self.certificates, source, target)


class OfKits(Accounts):
    """kit's commands, which are kitclient's too."""

    tool: str | Path
    trusting: tuple[str | Path, ...] = ()

    def run(self, command: str, *arguments: str | Path, stdin: bytes = b"") -> None:
        self.lab.run(self.tool, command, *arguments, "--config", "store", stdin=stdin)

    def login(self, account: Account) -> None:
        options = ("-u", account.name, "--password-stdin", *self.trusting)
        self.run("login", self.lab.host, *options, stdin=account.password.encode())

    def logout(self) -> None:
        self.run("logout", self.lab.host)

    def push(self, reference: str) -> None:
        source = self.lab.folder / "source"
        source.mkdir(exist_ok=True)
        (source / _FILE).write_bytes(self.lab.content)
        (source / "Kitfile").write_text(_KITFILE)
        self.run("pack", source, "-t", reference)
        try:
            self.run("push", reference, *self.trusting)
        finally:
            self.run("remove", "--force", reference)

    def pull(self, reference: str) -> bytes:
        shutil.rmtree(self.lab.folder / "unpacked", ignore_errors=True)
        self.run("pull", reference, *self.trusting)
        self.run("unpack", reference, "-d", "unpacked")
        self.run("remove", "--force", reference)
        return (self.lab.folder / "unpacked" / _FILE).read_bytes()


class KitClient(OfKits):
    """By --tls-cert."""

    tool = KITCLIENT

    def __init__(self, lab: AccountsLab) -> None:
        super().__init__(lab)
        # To it the registry's address is one of its own network, and there it heeds no proxy of the environment.
        self.trusting = ("--proxy", lab.registry.proxy)

    def trust(self) -> None:
        self.trusting = (*self.trusting, "--tls-cert", self.lab.registry.authority)


class Kit(OfKits, TrustingByVariable):
    """`kit`, which cannot be installed from a package registry: only where it is on the PATH."""

    tool = "kit"
