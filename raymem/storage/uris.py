"""Finds secrets in addresses: what a recipe holds is stored with every checkpoint and printed, so none may be in it."""

from __future__ import annotations

import re
from urllib.parse import SplitResult, parse_qsl, urlsplit

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S*")
_DATABASES = ("sqlite", "postgresql", "postgres", "mysql", "mariadb", "mssql", "oracle")
_PARTS = (
    "token",
    "secret",
    "passw",
    "pwd",
    "accesskey",
    "apikey",
    "privatekey",
    "accountkey",
    "credential",
    "signature",
)
_WHOLE = ("key", "sig", "sas", "auth", "authorization", "jwt", "bearer", "pass")
_SHOWN = 40
CURE = (
    "take it out and use the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, "
    "HF_TOKEN, MLFLOW_TRACKING_TOKEN) or the role of the machine"
)
"""What to do about a secret in an address, as the end of an error."""


def secret_in(text: str) -> str | None:
    """Say in words which part of the addresses in a text is a secret, without repeating it; None if there is none.

    A user without a password counts as one, since tokens are written there, but not for databases, which are logged
    into by name alone, nor does S3's ``anonymous``.
    """
    if "://" not in text:
        return None
    for found in _URI.finditer(text):
        try:
            parts = urlsplit(found[0])
        except ValueError:  # what is no address cannot be opened either; whoever tries says so
            continue
        if (
            said := _before_host(parts)
            or _among_options(parts.query, "options")
            or _among_options(parts.fragment, "fragment")
        ):
            return said
    return None


def names_secret(name: str) -> bool:
    """Say whether a setting's name says that its value is a secret: ``HF_TOKEN``, ``apiKey``; not ``max_tokens``."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())
    plain = "".join(words)
    return "token" in words or any(part in plain for part in _PARTS if part not in ("token", "signature"))


def _before_host(parts: SplitResult) -> str | None:
    user, at, _ = parts.netloc.rpartition("@")
    if not at:
        return None
    name, colon, _ = user.partition(":")
    if colon:
        return "a password before the @"
    scheme = parts.scheme.split("+")[0].lower()
    if not name or name == "anonymous" or scheme in _DATABASES:
        return None
    return "a user or key before the @"


def _among_options(query: str, place: str) -> str | None:
    for name, value in parse_qsl(query.replace(";", "&"), keep_blank_values=True):
        plain = re.sub(r"[^a-z0-9]", "", name.lower())
        if plain in _WHOLE or any(part in plain for part in _PARTS):
            return f"{name[:_SHOWN]!r} among its {place}"
        if said := secret_in(value):
            return said
    return None
