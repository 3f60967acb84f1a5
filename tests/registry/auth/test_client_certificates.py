"""Names from certificates that TLS has verified: one place, one name, or nobody."""

import time
from typing import Any

import pytest

from registry.auth.auth_config import Clientcertificates
from registry.auth.client_certificates import login_of_certificate


def shown(**more: Any) -> dict[str, Any]:
    moment = time.gmtime(time.time() + 3600)
    return {
        "subject": ((("organizationName", "Acme"),), (("commonName", "alice"),)),
        "notAfter": time.strftime("%b %d %H:%M:%S %Y GMT", moment),
        "subjectAltName": (("DNS", "job.example"), ("email", "a@example"), ("URI", "spiffe://acme/job")),
        **more,
    }


@pytest.mark.parametrize(
    ("place", "name"),
    [("commonname", "alice"), ("dns", "job.example"), ("email", "a@example"), ("uri", "spiffe://acme/job")],
)
def test_the_name_is_in_the_place_that_was_said(place: Any, name: str) -> None:
    login = login_of_certificate(shown(), Clientcertificates(name=place, prefix="cert:"))

    assert login is not None
    assert (login.name, login.method) == (f"cert:{name}", "certificate")
    assert login.expires is not None


@pytest.mark.parametrize(
    "more",
    [
        {"subject": ()},
        {"subject": ((("organizationName", "alice"),),)},
        {"subject": ((("commonName", ""),),)},
        {"subject": ((("commonName", "alice"),), (("commonName", "root"),))},
        {"subject": ((("commonName", "a\nb"),),)},
        {"subject": ((("commonName", "x" * 256),),)},
        {"notAfter": "Jan  1 00:00:00 2020 GMT"},
    ],
    ids=str,
)
def test_a_certificate_without_one_name_is_nobody(more: dict[str, Any]) -> None:
    assert login_of_certificate(shown(**more), Clientcertificates()) is None


def test_an_alternative_name_of_another_kind_is_no_name() -> None:
    certificate = shown(subjectAltName=(("DNS", "alice"), ("DNS", "root")))

    assert login_of_certificate(certificate, Clientcertificates(name="dns")) is None
    assert login_of_certificate(certificate, Clientcertificates(name="uri")) is None
