"""How the paths of a workspace are spelled.

Relative, components joined by `/`, no `.`, `..` or empty component. Linux file names are
bytes: a name that is valid UTF-8 is spelled as it is, and any other byte as `\\xHH` with upper-case digits
(`caf\\xE9`). Where a name holds such a sequence literally, its backslash is spelled `\\x5C`; every other backslash
stands for itself. So each file has exactly one spelling, and another one for the same bytes is refused.
"""

import re
import unicodedata

from carrel import errors

__all__ = ["MAX_NAME_BYTES", "MAX_PATH_BYTES", "MAX_PATH_DEPTH", "length", "parse", "parse_new", "spell", "unspell"]

MAX_NAME_BYTES = 255
MAX_PATH_BYTES = 4096
MAX_PATH_DEPTH = 128

_ESCAPE = re.compile(r"\\x(5C|[89A-F][0-9A-F])")
_NEEDS_ESCAPE = re.compile(r"\\(?=x(?:5C|[89A-F][0-9A-F]))|[\udc80-\udcff]")


def parse(path: str) -> tuple[bytes, ...]:
    """The components of a path as the bytes that are on the disk; none for the empty path, which is the root."""
    if not path:
        return ()
    if "\0" in path:
        raise errors.InvalidPath(path, "a path has no NUL")
    if path.startswith("/"):
        raise errors.InvalidPath(path, "paths are relative to the workspace")
    names = tuple(_parse_name(path, text) for text in path.split("/"))
    if sum(map(len, names)) + len(names) - 1 > MAX_PATH_BYTES:
        raise errors.InvalidPath(path, f"it is over {MAX_PATH_BYTES} bytes")
    if len(names) > MAX_PATH_DEPTH:
        raise errors.InvalidPath(path, f"it has over {MAX_PATH_DEPTH} components")
    return names


def _parse_name(path: str, text: str) -> bytes:
    if text in ("", ".", ".."):
        raise errors.InvalidPath(path, "empty components, '.' and '..' are not allowed")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise errors.InvalidPath(path, "the path is not valid Unicode")
    name = _ESCAPE.sub(lambda match: _unescaped(match[1]), text).encode("utf-8", "surrogateescape")
    if len(name) > MAX_NAME_BYTES:
        raise errors.InvalidPath(path, f"a name is over {MAX_NAME_BYTES} bytes")
    if spell(name) != text:
        raise errors.InvalidPath(path, f"this name is spelled {spell(name)!r}")
    return name


def _unescaped(digits: str) -> str:
    byte = int(digits, 16)
    return chr(byte) if byte < 0x80 else chr(0xDC00 + byte)


def spell(name: bytes) -> str:
    """The one spelling of a name, as the module's docstring describes it."""
    return _NEEDS_ESCAPE.sub(
        lambda match: r"\x5C" if match[0] == "\\" else rf"\x{ord(match[0]) - 0xDC00:02X}",
        name.decode("utf-8", "surrogateescape"),
    )


def parse_new(path: str) -> tuple[bytes, ...]:
    """As `_parse`, for a name that we would bring into being: stricter than what an agent may have made."""
    names = parse(path)
    if not names:
        raise errors.InvalidPath(path, "a file needs a name")
    for name in names:
        try:
            text = name.decode()
        except UnicodeDecodeError:
            raise errors.InvalidPath(path, "new names are UTF-8") from None
        if any(unicodedata.category(char) == "Cc" for char in text):
            raise errors.InvalidPath(path, "new names have no control characters")
    return names


def length(path: str) -> int:
    """How many bytes a spelled path has on the disk."""
    return len(_ESCAPE.sub(".", path).encode())


def unspell(text: str) -> bytes:
    """The bytes of anything that `spell` has spelled, also where it is no path: the target of a link."""
    return _ESCAPE.sub(lambda match: _unescaped(match[1]), text).encode("utf-8", "surrogateescape")
