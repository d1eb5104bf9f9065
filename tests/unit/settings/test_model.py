"""Values that are wrong are told with what is allowed; what would be unsafe is refused."""

import pytest

from carrel.errors import InvalidSettings, UnsafeConfiguration

STRONG = "a-secret-of-more-than-thirty-two-bytes"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "limits: {max_sessions: abc}",
            "limits.max_sessions (",
        ),
        (
            "limits: {max_sessions: abc}",
            'config.yaml:1): "abc" is not allowed; it wants a whole number, at least 1, or null.',
        ),
        ("limits: {max_sessions: true}", "true is not allowed; it wants a whole number"),
        ("limits: {max_sessions: 0}", "0 is not allowed"),
        ("limits: {sandbox_cpus: 0}", "it wants a number, more than 0, or null"),
        ("port: 70000", "it wants a whole number, at least 0, at most 65535."),
        ("memory: maybe", '"maybe" is not allowed; it wants true or false.'),
        ("durability: disk", "it wants one of process, power."),
        ("isolation: docker", "it wants one of bubblewrap, container, none, or null."),
        ("cors_origins: https://a.example", "it wants a list of texts."),
        ("defaults: {setting_sources: [home]}", "it wants a list of user, project, local, or null."),
        ("defaults: {permission_mode: yolo}", "it wants one of default, "),
        (
            "data: 3",
            "data (",
        ),
        ("host: [a]", "it wants a text."),
        (
            "model_upstream: claude",
            "model_upstream (",
        ),
        ("model_upstream: claude", "must be anthropic, scripted, scripted:FILE or a URL."),
        ("cors_origins: [https://a.example/]", "'https://a.example/' is no origin; write one such as"),
        ("cors_origins: [a.example]", "'a.example' is no origin"),
        ("trusted_proxies: [proxy]", "'proxy' is no address"),
        ("rate_limits: {per_key: often}", "must be a rate such as 600/minute"),
        ("database: {url: mysql://planted@db/x}", "must be postgresql://USER:PASSWORD@HOST:PORT/DATABASE"),
        ("mcp_servers: {a: {type: stdio}}", "a: a stdio server needs command"),
        ("mcp_servers: {a: {type: pipe, headers: {A: planted}}}", "a: type must be stdio, sse or http"),
        ("mcp_servers: [planted]", "this value is not allowed; it wants a mapping."),
        ("plugins: [{path: /nowhere}]", "there is no folder /nowhere"),
        (
            "plugins: [{}]",
            "plugins (",
        ),
        ("plugins: [{}]", "0.path: Field required"),
        ("plugins: [{type: remote, path: /}]", "0.type: Input should be 'local'"),
        ("jwt: {secret: planted}", "is shorter than 32 bytes; make one: openssl rand -base64 48"),
        ("static_token: planted", "is shorter than 16 bytes"),
        (
            "memory: true\ndatabase: {url: 'postgresql://planted@x/y'}",
            "memory: true and database.url exclude each other",
        ),
        ("port: 9\ndialects: {sdk-server: {port: 9}}", "port and dialects.sdk-server.port are both 9"),
        ("dialects: {sdk-server: {auth: jwt}}", "dialects.sdk-server.auth jwt needs jwt.secret, "),
        ("dialects: {sdk-server: {auth: static-token}}", "dialects.sdk-server.auth static-token needs static_token"),
    ],
)
def test_a_wrong_value_is_told_with_what_is_allowed(load, text, words):
    with pytest.raises(InvalidSettings) as told:
        load(text)
    assert words in told.value.message
    assert "planted" not in told.value.message
    assert "planted" not in repr(told.value.__cause__)


def test_several_mistakes_are_told_at_once(load):
    with pytest.raises(InvalidSettings) as told:
        load("port: x\nlog_level: loud\n")
    assert "port (" in told.value.message
    assert "log_level (" in told.value.message


@pytest.mark.parametrize(
    "secret", ["secret", "changeme", "CHANGE_ME", "Your-Secret-Key", "your secret key change in production"]
)
def test_published_secrets_are_refused_insecure_or_not(load, secret):
    for text in (f"jwt: {{secret: {secret}}}", f"static_token: {secret}"):
        with pytest.raises(InvalidSettings, match="is a secret out of an example"):
            load(f"allow_insecure: true\n{text}")


def test_strong_secrets_are_taken(load):
    settings = load(f"jwt: {{secret: {STRONG}}}\nstatic_token: {STRONG}\ndialects: {{sdk-server: {{auth: jwt}}}}")
    assert settings.jwt.secret.get_secret_value() == STRONG
    assert STRONG not in repr(settings)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("auth: none\nhost: 0.0.0.0", "auth none on 0.0.0.0 would let anyone in"),
        ("auth: none\nnetwork: host", "auth none with network host would let an agent drive"),
        ("dialects: {sdk-server: {auth: none, port: 0, host: 0.0.0.0}}", "dialects.sdk-server.auth none on 0.0.0.0"),
        ("host: 0.0.0.0\ndialects: {sdk-server: {auth: none}}", "dialects.sdk-server.auth none on 0.0.0.0"),
        ("isolation: none\ndialects: {sdk-server: {auth: none}}", "none with isolation none would let an agent"),
        ("network: host\ndialects: {claude-agent-http: {auth: none}}", "none with network host"),
        ("cors_origins: ['*']", "List the origins of your own pages, such as cors_origins: [https://app.example.com]."),
        ("api: {cors_origins: ['*']}", "List the origins of your own pages"),
    ],
)
def test_what_is_unsafe_is_refused_unless_insisted_on(load, text, words):
    with pytest.raises(UnsafeConfiguration) as told:
        load(text)
    assert words in told.value.message
    assert load(f"{text}\nallow_insecure: true").allow_insecure


def test_where_every_agent_has_a_container_of_its_own_isolation_says_nothing(load):
    open_dialect = "dialects: {sdk-server: {auth: none}}\nisolation: container\n"
    assert load(f"{open_dialect}runtime: docker\nnetwork: {{allow: [example.com]}}").unwalled is None
    with pytest.raises(UnsafeConfiguration):
        load(f"{open_dialect}runtime: docker\nruntimes: [local]")


def test_a_dialect_without_keys_on_loopback_is_fine(load):
    assert load("dialects: {sdk-server: {auth: none, port: 0}}").dialects["sdk-server"].auth == "none"


def test_frozen(load):
    with pytest.raises(ValueError, match="frozen"):
        load().port = 1
