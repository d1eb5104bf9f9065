"""The form that every object has in the store: content in chunks, each with a tag, and the SHA-256 of the whole.

    header   64 bytes: `CARREL-O`, version 1, cipher (0 none, 1 AES-256-GCM), 6 zeros, id of the key (16), salt (32)
    chunks   262,144 bytes of content each, the last one less, each followed by a tag of 16 bytes
    trailer  size of the content (8 bytes, big-endian) and its SHA-256, as one more chunk, with its tag

A tag is AES-GCM's, or the beginning of a SHA-256. It covers the header, the object's key, the chunk's number, and whether
it is the trailer: so a chunk that is changed, moved, left out or taken from another object is found, in a part as well.
Each object is encrypted by a key of its own, made by HKDF-SHA-256 of the operator's key and the salt; a nonce is the
number of the chunk and so never comes twice under one key.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable, Iterator, Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from carrel.errors import ObjectDamaged, ObjectKeyMissing

__all__ = ["CHUNK", "HEADER", "LEAST", "SEALED", "TRAILER", "Keyring", "Opener", "Sealer", "content_size"]

CHUNK = 256 * 2**10
TAG = 16
SEALED = CHUNK + TAG
HEADER = 64
TRAILER = 8 + 32 + TAG
LEAST = HEADER + TRAILER

_MAGIC = b"CARREL-O\x01"
_PLAIN, _AES_GCM = b"\x00", b"\x01"
_NO_KEY = bytes(16)
_ID_AT = 16
_SALT_AT = 32


def content_size(stored: int) -> int:
    """How many bytes of content are in so many stored ones. Raises ObjectDamaged where there can be none."""
    body = stored - LEAST
    chunks = -(-body // SEALED)
    if body < 0 or 0 < body - (chunks - 1) * SEALED <= TAG:
        raise ObjectDamaged(operator_detail=f"no object of ours has {stored} bytes")
    return body - chunks * TAG


class Keyring:
    """The operator's keys: what is sealed with the first can be opened with any."""

    def __init__(self, keys: Sequence[bytes] = (), *, accept_unencrypted: bool = False) -> None:
        """Take the keys, of 32 bytes each.

        Args:
            keys: none: nothing is encrypted.
            accept_unencrypted: whether, with keys, what was stored without encryption is opened too.
        """
        if any(len(key) != 32 for key in keys):
            raise ValueError("a key has 32 bytes")
        self._keys = {_key_id(key): key for key in keys}
        self._first = _key_id(keys[0]) if keys else _NO_KEY
        self._accept_unencrypted = accept_unencrypted or not keys

    def __repr__(self) -> str:
        return f"Keyring({len(self._keys)} keys)"

    def new_header(self) -> bytes:
        """The header of an object that is to be stored."""
        cipher = _AES_GCM if self._keys else _PLAIN
        return _MAGIC + cipher + bytes(_ID_AT - len(_MAGIC) - 1) + self._first + secrets.token_bytes(32)

    def cipher(self, header: bytes) -> AESGCM | None:
        """What opens the object of this header; None where it is not encrypted.

        Raises:
            ObjectDamaged: it is no header.
            ObjectKeyMissing: its key is not on the ring.
        """
        kind, key_id = header[len(_MAGIC) : len(_MAGIC) + 1], header[_ID_AT:_SALT_AT]
        if len(header) != HEADER or not header.startswith(_MAGIC) or kind not in (_PLAIN, _AES_GCM):
            raise ObjectDamaged(operator_detail="it does not begin as an object of ours")
        if kind == _PLAIN:
            if not self._accept_unencrypted:
                raise ObjectKeyMissing(
                    "The object is not encrypted, and an encryption key is set; where that is right, "
                    "set objects.accept_unencrypted."
                )
            return None
        key = self._keys.get(key_id)
        if key is None:
            raise ObjectKeyMissing(
                f"The object is encrypted with the key {key_id.hex()[:8]}, which is not set; add it to "
                "objects.old_encryption_keys.",
                key_id=key_id.hex()[:8],
            )
        derived = HKDF(algorithm=SHA256(), length=32, salt=header[_SALT_AT:], info=b"carrel object 1").derive(key)
        return AESGCM(derived)


def _key_id(key: bytes) -> bytes:
    return hashlib.sha256(b"carrel object key id\0" + key).digest()[:16]


class _Sealing:
    """What sealing and opening one object have in common."""

    def __init__(self, keys: Keyring, key: str, header: bytes) -> None:
        self._cipher = keys.cipher(header)
        self._about = hashlib.sha256(header + key.encode()).digest()

    def _bound(self, number: int, trailer: bool) -> bytes:
        return self._about + number.to_bytes(11, "big") + bytes([trailer])

    def _seal(self, number: int, data: bytes, trailer: bool = False) -> bytes:
        bound = self._bound(number, trailer)
        if self._cipher is not None:
            return self._cipher.encrypt(bound[-12:], data, self._about)
        return data + hashlib.sha256(bound + data).digest()[:TAG]

    def _open(self, number: int, sealed: bytes, trailer: bool = False) -> bytes:
        bound = self._bound(number, trailer)
        if self._cipher is not None:
            try:
                return self._cipher.decrypt(bound[-12:], sealed, self._about)
            except InvalidTag:
                raise ObjectDamaged(operator_detail=f"chunk {number} does not open") from None
        data, tag = sealed[:-TAG], sealed[-TAG:]
        if not hmac.compare_digest(hashlib.sha256(bound + data).digest()[:TAG], tag):
            raise ObjectDamaged(operator_detail=f"the checksum of chunk {number} does not hold")
        return data


class Sealer(_Sealing):
    """Brings the content of one object into the form it is stored in: header, whole chunks, then the end."""

    def __init__(self, keys: Keyring, key: str) -> None:
        self.header = keys.new_header()
        super().__init__(keys, key, self.header)
        self._whole = hashlib.sha256()
        self._number = 0
        self._rest = bytearray()
        self.size = 0

    @property
    def sha256(self) -> str:
        """Of all content so far."""
        return self._whole.hexdigest()

    def add(self, data: bytes) -> bytes:
        """The chunks that are whole with this piece of content."""
        self._whole.update(data)
        self.size += len(data)
        self._rest += data
        whole = len(self._rest) - len(self._rest) % CHUNK
        sealed = b"".join(self._next(bytes(self._rest[at : at + CHUNK])) for at in range(0, whole, CHUNK))
        del self._rest[:whole]
        return sealed

    def end(self) -> bytes:
        """The last chunk and the trailer."""
        last = self._next(bytes(self._rest)) if self._rest else b""
        trailer = self.size.to_bytes(8, "big") + self._whole.digest()
        return last + self._seal(self._number, trailer, trailer=True)

    def _next(self, data: bytes) -> bytes:
        sealed = self._seal(self._number, data)
        self._number += 1
        return sealed


class Opener(_Sealing):
    """Opens the chunks of one object, in any order."""

    def __init__(self, keys: Keyring, key: str, header: bytes, stored: int) -> None:
        super().__init__(keys, key, header)
        self.size = content_size(stored)
        self._chunks = -(-self.size // CHUNK)

    def chunks(self, first: int, sealed: Iterable[bytes]) -> Iterator[bytes]:
        """The content of chunks that follow each other, from number `first` on. Raises ObjectDamaged."""
        for number, data in enumerate(sealed, first):
            yield self._open(number, data)

    def trailer(self, sealed: bytes) -> str:
        """The SHA-256 of the whole, in hexadecimal. Raises ObjectDamaged where it is the end of another object."""
        trailer = self._open(self._chunks, sealed, trailer=True)
        if int.from_bytes(trailer[:8], "big") != self.size:
            raise ObjectDamaged(operator_detail="it has not the size that was stored")
        return trailer[8:].hex()
