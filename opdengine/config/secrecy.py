"""What looks like a secret is refused where settings are read: they are written to the run's folder as they are.

No message repeats the value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from opdengine.errors import ConfigError

WORDS = {
    "password", "passwd", "passphrase", "pwd", "secret", "secrets", "credential", "credentials", "apikey",
    "authorization", "auth", "bearer", "cookie", "cookies", "accesstoken", "authtoken", "hftoken", "clientsecret",
    "privatekey", "accesskey", "secretkey", "authkey", "apitoken", "sessionid", "jwt",
}  # fmt: skip
"""Words of which one makes a name that of a secret."""

IN_URL = {"key", "sig", "signature"}
"""Names that are secrets in an address only."""

KEYS = {"api", "access", "private", "secret", "auth", "subscription", "signing", "encryption", "account", "ssh"}
"""Words that make "key" a secret."""

TEXT_TOKENS = {"bos", "eos", "pad", "unk", "sep", "cls", "mask", "stop", "end", "start", "begin", "image", "special",
               "think", "tool", "turn", "prefix", "suffix", "boundary"}  # fmt: skip
"""Words that make "token" a part of a text, and not a secret."""

VALUES = re.compile(
    r"\b(?:sk|pk|rk)[-_][A-Za-z0-9_-]{16,}|\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
    r"|\bglpat-[\w-]{16,}|\bAKIA[A-Z0-9]{16}\b|\bxox[abpr]-[\w-]{10,}|\bAIza[\w-]{30,}"
    r"|\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.|(?i:\bbearer\s+[A-Za-z0-9+/=_.-]{16,})|-----BEGIN [A-Z ]*PRIVATE KEY"
)
"""The shapes of widespread keys."""

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>]+")


def names_secret(name: str) -> bool:
    """Whether a name such as ``X-Api-Key``, ``hfToken`` or ``db_password`` is that of a secret."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]
    if WORDS & set(words) or "".join(words) in WORDS:
        return True
    before = set(words[:-1])
    if words[-1:] in (["key"], ["keys"]):
        return bool(KEYS & before)
    if words[-1:] == ["tokens"]:
        return bool((KEYS | {"hf", "refresh", "session"}) & before)
    return words[-1:] == ["token"] and not TEXT_TOKENS & before


def holds_secret(text: str) -> bool:
    """Whether a text holds a key of a known shape, or an address with a credential in it."""
    return bool(VALUES.search(text)) or any(_url_has_secret(found[0]) for found in URL.finditer(text))


def _url_has_secret(url: str) -> bool:
    try:
        parts = urlsplit(url)
        named = (name for name, _ in parse_qsl(parts.query))
        return parts.password is not None or any(names_secret(name) or name.lower() in IN_URL for name in named)
    except ValueError:
        return "@" in url


def refuse_secrets(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first setting that looks like a secret; names its place and the remedy.

    ``api_key_env`` and what is null, empty, zero or a truth value is none.
    """
    for place, name, value in _texts(settings, ""):
        if name == "api_key_env":
            continue
        if names_secret(name) or holds_secret(value):
            raise ConfigError(
                f"{place} looks like a secret or holds a credential, and settings are written to the run's folder; "
                "leave it out and let the code that needs it read a variable of the shell (of an endpoint: api_key_env)"
            )


def _texts(value: Any, place: str, name: str = "") -> Iterator[tuple[str, str, str]]:
    """Place, last name and text of everything that is text; what is below a secret's name has that name."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            inner = name if names_secret(name) else str(key)
            yield from _texts(item, f"{place}.{key}" if place else str(key), inner)
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _texts(item, f"{place}.{number}", name)
    elif value and not isinstance(value, bool):
        yield place, name, str(value)[:100_000]
