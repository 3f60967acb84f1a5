"""What every client is asked to do with a registry that knows who asks."""

from __future__ import annotations

import secrets
from base64 import b64encode
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from conformance.accounts.registry import Account, PrivateRegistry
from conformance.clients.lab import CellFailed, Client, Lab, check, operation

_CONTENT_SIZE = 300_000
_NOT_TRUSTED = ("certificate",)
_NOT_LET_IN = ("401", "authentication required", "unauthorized")
# Of a login: as before, or in skopeo's and kitclient's words.
_WRONG_PASSWORD = (*_NOT_LET_IN, "invalid username/password", "password is wrong")
# Of a pull: as before, or in the words of programs that do not ask when they have nothing to show.
_NO_LOGIN = (*_NOT_LET_IN, "credential", "log in", "docker login")
_MAY_NOT = ("may not create", "denied", "403")


@dataclass(frozen=True)
class AccountsLab(Lab):
    """A lab whose registry is a private one.

    Attributes:
        tool: whose it is; its repository is named after it.
        content: of the file that is pushed; nobody has it but this client.
        variables: for every command, beside what a lab sets.
    """

    registry: PrivateRegistry
    tool: str
    content: bytes = field(default_factory=lambda: secrets.token_bytes(_CONTENT_SIZE), repr=False)
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def repository(self) -> str:
        return f"{self.host}/{self.tool}/private"

    def environment(self, **more: str) -> dict[str, str]:
        """A lab's, behind the proxy, and with every place where a client might look for a login in the folder."""
        home = str(self.folder)
        places = {"XDG_CONFIG_HOME": home, "XDG_DATA_HOME": home, "XDG_RUNTIME_DIR": home}
        places |= {"REGISTRY_AUTH_FILE": f"{home}/auth.json", "REGCTL_CONFIG": f"{home}/regctl.json"}
        proxy = dict.fromkeys(("HTTPS_PROXY", "https_proxy"), self.registry.proxy)
        without_proxy = {"NO_PROXY": "", "no_proxy": ""}
        return super().environment(**places, **proxy, **without_proxy, **self.variables, **more)

    def check_forgotten(self, account: Account) -> None:
        """No file in the folder holds the password, or the two words that a Basic header is made of."""
        plain = account.password.encode()
        encoded = b64encode(f"{account.name}:{account.password}".encode())
        for path in self.folder.rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                check(plain not in content and encoded not in content, "the password is still in", path)


class Accounts(Client):
    """A client that logs in. What it is told to trust, and where it keeps a login, is its own way and is in the lab's folder."""

    lab: AccountsLab

    def trust(self) -> None:
        """From now on the registry's certificate is one that it takes."""
        raise NotImplementedError

    def login(self, account: Account) -> None:
        """The password comes on standard input.

        Raises:
            CellFailed: the registry does not know them, and says so.
        """
        raise NotImplementedError

    def logout(self) -> None:
        raise NotImplementedError

    def push(self, reference: str) -> None:
        """The lab's content, in a form that this client knows."""
        raise NotImplementedError

    def pull(self, reference: str) -> bytes:
        """The content of what was pushed. Nothing of it was here before."""
        raise NotImplementedError

    @property
    def pushed(self) -> str:
        return f"{self.lab.repository}:v1"

    @operation("the certificate of a private CA is refused until it is trusted")
    def trusted(self) -> None:
        _refused(lambda: self.login(self.lab.registry.writer), _NOT_TRUSTED)
        with suppress(CellFailed):  # most have kept nothing
            self.logout()
        self.trust()

    @operation("a wrong password: no login")
    def wrong_password(self) -> None:
        _refused(
            lambda: self.login(replace(self.lab.registry.writer, password="wrong")),  # noqa: S106
            _WRONG_PASSWORD,
        )
        with suppress(CellFailed):
            self.logout()

    @operation("login, push, pull")
    def push_and_pull(self) -> None:
        self.login(self.lab.registry.writer)
        self.push(self.pushed)
        self._check_pulled()

    @operation("logout: what was pushed cannot be pulled")
    def logged_out(self) -> None:
        self.logout()
        _refused(lambda: self.pull(self.pushed), _NO_LOGIN)
        self.lab.check_forgotten(self.lab.registry.writer)

    @operation("login of a reader: pull, but no push")
    def reader(self) -> None:
        self.login(self.lab.registry.reader)
        self._check_pulled()
        _refused(lambda: self.push(f"{self.lab.repository}:v2"), _MAY_NOT)
        self.logout()
        self.lab.check_forgotten(self.lab.registry.reader)

    def _check_pulled(self) -> None:
        check(self.pull(self.pushed) == self.lab.content, "other bytes came back")


def _refused(action: Callable[[], object], words: tuple[str, ...]) -> None:
    """It fails, and says one of these words; a refusal for another reason is none."""
    try:
        action()
    except CellFailed as error:
        said = str(error)
        check(any(word in said.lower() for word in words), "refused, but not for the reason:", said)
    else:
        check(False, "it was not refused")
