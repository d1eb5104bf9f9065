"""API keys as they are made."""

from hashlib import sha256

from carrel.auth import make_key
from carrel.model import Scope, utc_now


def test_a_key_is_shown_once_and_kept_as_a_digest() -> None:
    key, secret = make_key("alice", scopes=[Scope.WRITE, Scope.READ, Scope.READ], now=utc_now(), name="ci")
    assert secret.startswith("carrel_sk_")
    assert len(secret) == len("carrel_sk_") + 43
    assert key.hash == sha256(secret.encode()).hexdigest()
    assert key.prefix == secret[:18]
    assert key.scopes == [Scope.READ, Scope.WRITE]
    assert secret[18:] not in repr(key)
    assert "hash" not in key.model_dump()


def test_no_two_keys_are_the_same() -> None:
    made = [make_key("alice", scopes=[Scope.READ], now=utc_now()) for _ in range(50)]
    assert len({secret for _, secret in made}) == len({key.id for key, _ in made}) == 50
