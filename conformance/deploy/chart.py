"""The Helm chart: linted, rendered for each way to run it, and held against the schemas of Kubernetes and of our configuration."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from conformance import toolbox
from conformance.clients.lab import CellFailed, Client, Lab, check, operation
from tests.authority import Authority
from tests.registry.auth.logins import written

_CHART = toolbox.HERE.parent / "deploy" / "helm" / "modelkit-registry"
_VALUES = Path(__file__).parent / "values"
_VERIFY = toolbox.HERE.parent / ".venv" / "bin" / "modelkit-registry"
# The oldest that Chart.yaml admits and kubectl-validate brings; the newest is that of versions.toml.
_OLDEST = "1.27"
_REFUSED = {
    "a bucket without a name": ("storage.type=s3",),
    "an ingress without a host": ("ingress.enabled=true",),
    "a value that is not known": ("replicas=3",),
    "a kind of storage that is not known": ("storage.type=nfs",),
    "a secret in the ConfigMap": ("config.http.secret=hunter2",),
    "another one": ("config.storage.s3.secretkey=hunter2",),
    "one in a list": ("config.notifications.endpoints[0].secret=hunter2",),
    "an autoscaler of processor time that nobody asked for": (
        "storage.type=s3",
        "storage.s3.bucket=models",
        "autoscaling.enabled=true",
    ),
    "probes that would have to show a certificate": (
        "tls.existingSecret=certificate",
        "config.http.tls.clientcas[0]=/authorities/ca.crt",
    ),
    "probes of which it is said that they must": (
        "tls.existingSecret=certificate",
        "config.http.tls.clientcas[0]=/authorities/ca.crt",
        "config.http.tls.clientauth=require-and-verify-client-cert",
    ),
}
_REASONS = (
    "values don't meet the specifications of the schema",
    "config has a secret",
    "autoscaling.enabled needs resources.requests.cpu",
    "config.http.tls.clientcas needs clientauth: verify-client-cert-if-given",
)


class Chart(Client):
    """Rendered only: there is no cluster here."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.helm = toolbox.go_tool("helm")
        self.validate = toolbox.go_tool("kubectl-validate")

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Everything rendered once, as `<values>.out.yaml`, and the schemas laid out as kubectl-validate wants them."""
        self._lay_out_schemas()
        for values in sorted(_VALUES.glob("*.yaml")):
            (self.lab.folder / f"{values.stem}.out.yaml").write_text(self._template("--values", values))
        yield

    @operation("helm lint --strict, with each set of values")
    def lint(self) -> None:
        for values in sorted(_VALUES.glob("*.yaml")):
            self.lab.run(self.helm, "lint", "--strict", "--values", values, _CHART)

    @operation("helm template: objects that Kubernetes knows, the oldest version and the newest")
    def schemas(self) -> None:
        common = (self.validate, "--version", _OLDEST, "--local-crds", "crds")
        rendered = sorted(self.lab.folder.glob("*.out.yaml"))
        self.lab.run(*common, *rendered)
        self.lab.run(*common, "--local-schemas", "schemas", *rendered)

    @operation("helm template: no root, read-only, no privileges, probes, secrets by reference")
    def pods(self) -> None:
        for name, documents in self._rendered().items():
            kinds = [document["kind"] for document in documents]
            check("Secret" not in kinds, name, kinds)
            for spec in _pod_specs(documents):
                check(_is_restricted(spec), name, spec)
            # One image, so one registry that it is pulled from.
            pull_secrets = [spec.get("imagePullSecrets") for spec in _pod_specs(documents)]
            check(len(pull_secrets) == 2 and pull_secrets[0] == pull_secrets[1], name, pull_secrets)
            (deployment,) = (document for document in documents if document["kind"] == "Deployment")
            (container,) = deployment["spec"]["template"]["spec"]["containers"]
            check({"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys(), name, container)

    @operation("helm template: modelkit-registry verify of each config.yml")
    def configurations(self) -> None:
        files = self._mounted()
        for name, documents in self._rendered().items():
            (text,) = (
                document["data"]["config.yml"] for document in documents if document["kind"] == "ConfigMap"
            )
            for mounted, path in files.items():
                text = text.replace(mounted, str(path))
            file = self.lab.folder / f"{name}.config.yml"
            file.write_text(text)
            self.lab.run(_VERIFY, "verify", file)

    @operation("helm template: one replica on a folder, several on a bucket")
    def replicas(self) -> None:
        for name, documents in self._rendered().items():
            (spec,) = (document["spec"] for document in documents if document["kind"] == "Deployment")
            kinds = {document["kind"] for document in documents}
            if name.startswith("folder"):
                check(spec["replicas"] == 1 and spec["strategy"] == {"type": "Recreate"}, name, spec)
            else:
                check("PodDisruptionBudget" in kinds and "PersistentVolumeClaim" not in kinds, name, kinds)
                check(spec.get("replicas") == 3 or "HorizontalPodAutoscaler" in kinds, name, spec)

    @operation("helm template: what cannot work is refused")
    def refused(self) -> None:
        for what, settings in _REFUSED.items():
            try:
                self._template(*(f"--set={setting}" for setting in settings))
            except CellFailed as error:
                check(any(reason in str(error) for reason in _REASONS), what, error)
            else:
                raise CellFailed(f"{what} is taken")

    def _template(self, *options: str | Path) -> str:
        return self.lab.run(self.helm, "template", "--kube-version", f"{_OLDEST}.0", *options, "here", _CHART)

    def _mounted(self) -> dict[str, Path]:
        """What a pod would have of its secrets, by where it would have it: `verify` opens each."""
        folder = self.lab.folder / "mounted"
        folder.mkdir()
        (folder / "secret").write_text("sealed")
        written(folder / "htpasswd", {"alice": "secret"})
        authority = Authority(folder)
        certificate, key = authority.issue("registry.example")
        return {
            "/run/secrets/http/secret": folder / "secret",
            "/run/secrets/htpasswd/htpasswd": folder / "htpasswd",
            "/run/secrets/tls/tls.crt": certificate,
            "/run/secrets/tls/tls.key": key,
            "/authorities/ca.crt": authority.file,
        }

    def _rendered(self) -> dict[str, list[dict[str, Any]]]:
        return {
            path.name.removesuffix(".out.yaml"): list(yaml.safe_load_all(path.read_text()))
            for path in sorted(self.lab.folder.glob("*.out.yaml"))
        }

    def _lay_out_schemas(self) -> None:
        """`api/v1.json`, `apis/GROUP/VERSION.json`; in Kubernetes' own folder they are `apis__GROUP__VERSION_openapi.json`."""
        schemas = self.lab.folder / "schemas"
        for source in (toolbox.go_module("kubernetes") / "api" / "openapi-spec" / "v3").iterdir():
            *place, version = source.name.removesuffix("_openapi.json").split("__")
            if not version.startswith("v"):  # what versions a group has
                continue
            target = schemas.joinpath(*place, f"{version}.json")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        operator = toolbox.go_module("prometheus-operator") / "example" / "prometheus-operator-crd"
        (self.lab.folder / "crds").mkdir()
        shutil.copyfile(
            operator / "monitoring.coreos.com_servicemonitors.yaml",
            self.lab.folder / "crds" / "servicemonitors.yaml",
        )


def _pod_specs(documents: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for document in documents:
        if document["kind"] == "Pod":
            yield document["spec"]
        elif document["kind"] == "Deployment":
            yield document["spec"]["template"]["spec"]


def _is_restricted(spec: dict[str, Any]) -> bool:
    """What the `restricted` Pod Security Standard asks for, and a read-only root file system."""
    pod = spec["securityContext"]
    locked = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    return (
        pod["runAsNonRoot"] is True
        and pod["seccompProfile"] == {"type": "RuntimeDefault"}
        and not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        and all(container["securityContext"] == locked for container in spec["containers"])
    )
