"""Configuration: where it comes from, what wins, what is refused and how that is said."""

import os
from pathlib import Path

import pytest
import yaml

from registry.config import S3, Config
from registry.config_sources import ConfigInvalid, json_schema, load_config
from registry.config_types import parse_address, parse_duration, parse_size

ROOT = Path(__file__).parents[2]


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yml"
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(path: Path | None = None, **environ: str) -> tuple[str, ...]:
    with pytest.raises(ConfigInvalid) as caught:
        load_config(path, environ=environ)
    return caught.value.problems


def test_no_file_is_a_whole_configuration() -> None:
    config = load_config().config

    assert config == Config()
    assert config.http.addr == "127.0.0.1:5000"
    assert config.storage.driver == "filesystem"
    assert config.storage.delete.enabled
    assert not config.manifests.allowsparse


def test_the_example_holds_every_default_and_nothing_else() -> None:
    path = ROOT / "deploy" / "config.example.yml"

    assert load_config(path).config == Config()
    assert leaves(yaml.safe_load(path.read_text())) == leaves(Config().model_dump()) - NOT_IN_THE_EXAMPLE


# One driver stands in a file, and what has no default cannot stand in it with one.
NOT_IN_THE_EXAMPLE = {
    "auth",
    "storage.inmemory",
    "storage.s3",
    "storage.redirect.endpoint",
    "http.accessControl",
    "http.host",
    "http.secret",
    "http.secret_file",
    "http.tls.certificate",
    "http.tls.key",
}


def leaves(tree: object, path: str = "") -> set[str]:
    if isinstance(tree, dict) and tree and path not in {"http.headers", "log.fields"}:
        return {
            leaf
            for key, value in tree.items()
            for leaf in leaves(value, f"{path}.{key}" if path else str(key))
        }
    return {path}


def test_every_key_is_in_the_manual() -> None:
    manual = (ROOT / "docs" / "operations.md").read_text()

    missing = {leaf for leaf in leaves(Config().model_dump()) if f"`{leaf}`" not in manual}

    assert not missing


def test_a_file_of_distribution_carries_over(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
version: 0.1
log: {level: info, formatter: json, fields: {service: registry}, accesslog: {disabled: true}}
storage:
  filesystem: {rootdirectory: /var/lib/registry}
  delete: {enabled: true}
  maintenance: {uploadpurging: {enabled: true, age: 168h, interval: 24h, dryrun: false}, readonly: {enabled: false}}
http:
  addr: :5000
  draintimeout: 1m30s
  headers: {X-Content-Type-Options: [nosniff]}
health: {storagedriver: {enabled: true, interval: 10s, threshold: 3}}
""",
    )

    config = load_config(path).config

    assert config.http.addr == ":5000"
    assert config.http.draintimeout == 90
    assert config.storage.filesystem is not None
    assert config.storage.filesystem.rootdirectory == Path("/var/lib/registry")


def test_all_problems_are_reported_at_once_with_their_paths(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
storage: {filesystem: {rootdir: /x}, delete: {enabled: maybe}}
http: {addr: nonsense, tls: {certificate: /a}, prefix: registry}
limits: {headertimeout: soon, manifestsize: 4 apples, connections: 0}
worker: 3
""",
    )

    problems = problems_of(path)

    assert "storage.filesystem.rootdir: unknown key; did you mean rootdirectory?" in problems
    assert "worker: unknown key; did you mean workers?" in problems
    assert "storage.delete.enabled: should be a valid boolean, not 'maybe'" in problems
    assert "http.tls: should have both certificate and key, or neither" in problems
    assert {problem.partition(":")[0] for problem in problems} == {
        "storage.filesystem.rootdir",
        "storage.delete.enabled",
        "http.addr",
        "http.tls",
        "http.prefix",
        "limits.headertimeout",
        "limits.manifestsize",
        "limits.connections",
        "worker",
    }
    assert not any("pydantic" in problem or "https://" in problem for problem in problems)


@pytest.mark.parametrize(
    "key",
    ["auth: {silly: {}}", "redis: {}", "storage: {cache: {}}", "http: {http2: {}}", "storage: {gcs: {}}"],
)
def test_a_key_that_only_distribution_has_is_named_as_such(tmp_path: Path, key: str) -> None:
    (problem,) = problems_of(written(tmp_path, key))

    assert "a key of Distribution that this registry does not have" in problem


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "line 1"),
        ("- a", "at the top level"),
        ("workers: 1\nworkers: 2", "stands twice"),
        ("\x00", "not YAML"),
        ("http: 5", "http: "),
        ("storage: {filesystem: {}, inmemory: {}}", "one driver"),
        ("storage: {inmemory: {}, s3: {bucket: models}}", "one driver"),
        ("storage: s3", "storage.s3.bucket: "),
        ("storage: {s3: {bucket: a/b}}", "name of a bucket"),
        ("storage: {s3: {bucket: models, accesskey: a}}", "both accesskey and secretkey"),
        ("storage: {s3: {bucket: models, keyid: k}}", "encrypt: true"),
        ("storage: {s3: {bucket: models, chunksize: 1MiB}}", "storage.s3.chunksize: "),
        ("storage: {s3: {bucket: models, segmentsize: 1MiB}}", "storage.s3.segmentsize: "),
        ("storage: {s3: {bucket: models, rootdirectory: ../x}}", "a folder in the bucket"),
        ("storage: {s3: {bucket: models, regionendpoint: 's3://x'}}", "address of the store"),
        ("storage: {s3: {bucket: models, v4auth: true}}", "a key of Distribution"),
        ("storage: oss", "storage.oss: unknown key"),
        ("storage: inmemory\nworkers: 2", "needs workers: 1"),
        ("log: {formatter: logstash}", "'text' or 'json'"),
        ('http: {headers: {X-A: ["a\\r\\nb"]}}', "printable"),
        ("http: {host: registry.example}", "the address clients use"),
        ("limits: {trustedproxies: [10.0.0.0/33]}", "limits.trustedproxies"),
        ("http: {draintimeout: -1s}", "duration"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, text: str, said: str) -> None:
    assert said in "\n".join(problems_of(written(tmp_path, text)))


@pytest.mark.parametrize(
    "name",
    [
        *("Connection", "content-length", "Content-Encoding", "Content-Type", "Content-Range", "Date"),
        *("Docker-Content-Digest", "ETag", "keep-alive", "Location", "TRANSFER-ENCODING", "Upgrade"),
        *("Trailer", "WWW-Authenticate", "Range", "Docker-Upload-UUID", "Link", "X-Request-Id"),
    ],
)
def test_a_header_that_each_answer_has_its_own_of_is_refused(name: str, tmp_path: Path) -> None:
    (problem,) = problems_of(written(tmp_path, f"http: {{headers: {{{name}: [x]}}}}"))

    assert problem == f"http.headers: {name} is the answer's own; leave it out"


@pytest.mark.parametrize(
    "name", ["Cache-Control", "Server", "Strict-Transport-Security", "Access-Control-Allow-Origin", "Vary"]
)
def test_headers_of_the_operator_are_taken(name: str, tmp_path: Path) -> None:
    config = load_config(written(tmp_path, f"http: {{headers: {{{name}: x}}}}")).config

    assert config.http.headers == {name: ["x"]}


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.999:5000", "127.1:5000", "1.2.3.4.5:5000", "127.0.0.1:65536", "[1.2.3.4]:5000"),
        *("a b:5000", "http://a:5000", "-a:5000", "a/b:5000", "a:+1", "a:", "a"),
        *("[::g]:5000", "[]:5000", "[a]:5000", "::1:5000"),
        *(f"{'a' * 300}:5000", "a@b:5000", "*:5000"),
    ],
)
def test_an_address_that_nobody_can_listen_on_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="should be an address"):
        parse_address(address)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1:5000", ":5000", "[::1]:0", "[fe80::1%eth0]:443", "localhost:65535"),
        *("registry_1:5000", "a.example.:80", "4you.example:80", "0.0.0.0:5000"),
    ],
)
def test_an_address_is_a_name_or_a_number_and_a_port(address: str) -> None:
    assert parse_address(address) == address


BAD_AUTHORITIES = ["a:b:c", "a:99999", "a:0", "a:http", "a:", "[::1", "::1", "[::1]:x", "[a]", ":5000", "a]"]


@pytest.mark.parametrize("authority", BAD_AUTHORITIES)
@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("http.host", "http: {{host: 'https://{}'}}"),
        ("storage.redirect.endpoint", "storage: {{redirect: {{endpoint: 'https://{}'}}}}"),
        ("storage.s3.regionendpoint", "storage: {{s3: {{bucket: models, regionendpoint: 'https://{}'}}}}"),
        ("storage.s3.regionendpoint", "storage: {{s3: {{bucket: models, regionendpoint: '{}'}}}}"),
    ],
)
def test_an_address_that_nobody_can_reach_is_refused(
    key: str, text: str, authority: str, tmp_path: Path
) -> None:
    (problem,) = problems_of(written(tmp_path, text.format(authority)))

    assert problem.startswith(f"{key}: should be ")


@pytest.mark.parametrize("authority", ["a", "minio_1:9000", "[fd00::1]:9000", "s3.example:65535"])
def test_a_store_has_a_name_or_a_number_and_perhaps_a_port(authority: str, tmp_path: Path) -> None:
    text = f"storage: {{s3: {{bucket: models, regionendpoint: '{authority}'}}}}"

    s3 = load_config(written(tmp_path, text)).config.storage.s3

    assert s3 is not None
    assert s3.endpoint == f"https://{authority}"


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path / "none.yml")

    assert "cannot be read: No such file" in problem


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10s", 10),
        ("168h", 604800),
        ("1h30m", 5400),
        ("250ms", 0.25),
        ("1.5s", 1.5),
        (7, 7),
        (0.5, 0.5),
        ("0s", 0),
    ],
)
def test_durations_are_go_texts_or_seconds(text: object, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    [
        "10",
        "s",
        "1 s",
        "1d",
        "-1s",
        "1s\n",
        "",
        True,
        None,
        float("nan"),
        float("inf"),
        -1,
        "1e3s",
        "\u0663s",
    ],
    ids=repr,
)
def test_what_is_no_duration_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="should"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4MiB", 4 << 20),
        ("10GB", 10**10),
        ("1k", 1000),
        ("1 KiB", 1024),
        ("2Ti", 2 << 40),
        ("512", 512),
        (9, 9),
        ("0B", 0),
    ],
)
def test_sizes_have_units_or_are_bytes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["-1", "1.5GiB", "MiB", "1XB", "", True, None, -1, 1.0, "1iB", "\u0663"], ids=repr
)
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="should"):
        parse_size(text)


def test_flags_win_over_variables_and_those_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "http: {addr: ':1', draintimeout: 1s}\nlog: {level: debug}")
    environ = {"REGISTRY_HTTP_ADDR": ":2", "MODELREG_LOG_LEVEL": "warn", "REGISTRY_LOG_LEVEL": "error"}

    config = load_config(path, environ=environ, overrides={"http.addr": ":3"}).config

    assert config.http.addr == ":3"
    assert config.http.draintimeout == 1
    assert config.log.level == "warn"


def test_variables_reach_lists_maps_and_whole_trees() -> None:
    config = load_config(
        environ={
            "REGISTRY_STORAGE_FILESYSTEM_ROOTDIRECTORY": "/data",
            "REGISTRY_STORAGE_DELETE_ENABLED": "false",
            "REGISTRY_HTTP_HEADERS": "{X-A: [b, c]}",
            "REGISTRY_LOG_FIELDS_MY_ZONE": "007",
            "MODELREG_LIMITS_TRUSTEDPROXIES_0": "10.0.0.0/8",
            "MODELREG_LIMITS_TRUSTEDPROXIES_1": "192.0.2.1",
            "MODELREG_LIMITS_BLOBSIZE": "10GiB",
            "MODELREG_HTTP_SECRET": "0123",
        }
    ).config

    assert config.storage.filesystem is not None
    assert config.storage.filesystem.rootdirectory == Path("/data")
    assert not config.storage.delete.enabled
    assert config.http.headers == {"X-A": ["b", "c"]}
    assert config.log.fields == {"my_zone": "007"}
    assert config.limits.trustedproxies == ("10.0.0.0/8", "192.0.2.1")
    assert config.limits.blobsize == 10 << 30
    assert config.http.secret is not None
    assert config.http.secret.get_secret_value() == "0123"


def test_a_variable_replaces_the_driver_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "storage: {filesystem: {rootdirectory: /data}}")

    assert load_config(path, environ={"REGISTRY_STORAGE": "inmemory"}).config.storage.driver == "inmemory"
    assert load_config(path, overrides={"storage.inmemory": {}}).config.storage.driver == "inmemory"


def test_unknown_variables_of_ours_are_refused_and_of_others_told() -> None:
    loaded = load_config(environ={"REGISTRY_REDIS_ADDR": "x", "OTHER": "y"})

    assert loaded.warnings == ("REGISTRY_REDIS_ADDR: ignored: " + REDIS_HINT,)
    assert problems_of(MODELREG_STORAGE_DELETE_ENABLD="x") == (
        "MODELREG_STORAGE_DELETE_ENABLD: unknown key; did you mean enabled?",
    )
    assert "leaves a gap" in problems_of(MODELREG_LIMITS_TRUSTEDPROXIES_1="10.0.0.1")[0]


REDIS_HINT = "a key of Distribution that this registry does not have: none is needed: caches are built in"


TOKENS_ELSEWHERE = """
auth: {token: {realm: "https://auth.example/token", service: s, issuer: i, jwks: ~nobody-at-all/x}}
"""


def test_a_secret_may_stand_in_a_file_of_its_own_and_is_never_shown(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("swordfish\n")

    config = load_config(environ={"MODELREG_HTTP_SECRET_FILE": str(tmp_path / "secret")}).config

    assert config.http.secret is not None
    assert config.http.secret.get_secret_value() == "swordfish"
    assert "swordfish" not in repr(config)
    both = problems_of(MODELREG_HTTP_SECRET_FILE=str(tmp_path / "secret"), MODELREG_HTTP_SECRET="swordfish")
    assert "one of them is enough" in both[0]
    wrong = problems_of(written(tmp_path, "http: {secret: [swordfish]}"))
    assert "swordfish" not in "\n".join(wrong)


def test_the_file_of_a_secret_may_be_below_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "secret").write_text("swordfish")

    config = load_config(written(tmp_path, "http: {secret_file: ~/secret}")).config

    assert config.http.secret is not None
    assert config.http.secret.get_secret_value() == "swordfish"


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("http.secret_file", "http: {secret_file: ~nobody-at-all/x}"),
        ("log.audit", "log: {audit: ~nobody-at-all/x}"),
        ("auth.token.jwks", TOKENS_ELSEWHERE),
    ],
)
def test_the_home_of_a_user_that_there_is_not_is_refused(key: str, text: str, tmp_path: Path) -> None:
    problems = problems_of(written(tmp_path, text))

    assert [problem.partition(":")[0] for problem in problems] == [key]
    assert "a user that this machine does not know" in problems[0]


@pytest.mark.parametrize("key", ["http.secret", "storage.s3.secretkey"])
@pytest.mark.parametrize("content", ["", "\n", "\r\n\n"], ids=repr)
def test_an_empty_secret_is_refused(key: str, content: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(content)
    variable = f"MODELREG_{key.upper().replace('.', '_')}"
    others = {"MODELREG_STORAGE_S3_BUCKET": "models", "MODELREG_STORAGE_S3_ACCESSKEY": "someone"}
    if key == "http.secret":
        others = {}

    of_file = problems_of(**others, **{f"{variable}_FILE": str(tmp_path / "secret")})

    assert f"{key}_file: should not be empty" in of_file
    assert problems_of(**others, **{variable: ""}) == (f"{key}: should not be empty",)


def test_an_s3_section_of_distribution_carries_over(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("swordfish\n")
    path = written(
        tmp_path,
        f"""
storage:
  s3:
    bucket: models
    region: eu-central-1
    regionendpoint: minio.example:9000
    rootdirectory: /registry/
    accesskey: someone
    secretkey_file: {tmp_path / "secret"}
    encrypt: true
    keyid: alias/models
    secure: false
    skipverify: false
    forcepathstyle: true
    chunksize: 10485760
""",
    )

    config = load_config(path).config

    assert config.storage.driver == "s3"
    assert config.storage.s3 is not None
    assert config.storage.s3.endpoint == "http://minio.example:9000"
    assert config.storage.s3.rootdirectory == "registry"
    assert config.storage.s3.secretkey is not None
    assert config.storage.s3.secretkey.get_secret_value() == "swordfish"
    assert "swordfish" not in repr(config)


def test_the_documents_have_every_key_of_s3() -> None:
    manual = (ROOT / "docs" / "operations.md").read_text()
    example = (ROOT / "deploy" / "config.example.yml").read_text()

    for key in S3.model_fields:
        assert f"`storage.s3.{key}`" in manual
        assert f"#   {key}: " in example


def test_memory_has_one_worker_and_files_have_one_for_each_core_but_not_many() -> None:
    assert load_config(environ={"REGISTRY_STORAGE": "inmemory"}).config.worker_count == 1
    assert load_config(environ={"MODELREG_WORKERS": "3"}).config.worker_count == 3
    assert Config().worker_count == min(4, len(os.sched_getaffinity(0)))


def test_the_schema_describes_every_section() -> None:
    schema = json_schema()

    assert set(schema["properties"]) == set(Config.model_fields)
    assert schema["additionalProperties"] is False
