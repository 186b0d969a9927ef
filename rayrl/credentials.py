"""Keeping credentials out of the configuration, and with it out of run folders and logs.

A run folder holds config.yaml and a report, both made to be shown around.  Keys therefore live in
environment variables; addresses that carry one are refused and never repeated in a message.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from pydantic_core import PydanticCustomError

CREDENTIAL = "credential"
"""The type of a validation error whose input must not be shown."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_USER_INFO = re.compile(r"(?<=://)[^/?#\s'\"]+@")
_SECRET_NAME = r"[\w.-]*(?:key|secret|token|password|passwd|signature|credential)[\w.-]*"
_SECRET_IN_QUERY = re.compile(rf"([?&]{_SECRET_NAME}=)[^&#\s'\"]+", re.IGNORECASE)


def refuse_credentials(address: str) -> str:
    """The address itself; ValueError, which does not repeat it, where it carries a credential."""
    if "@" in urlsplit(address).netloc or _SECRET_IN_QUERY.search(address):
        raise ValueError(
            "the address carries a credential, which would be written into the run folder: "
            "put it into the environment"
        )
    return address


def server_address(url: str) -> str:
    """The URL itself; ValueError unless it names a host by http or https, without a credential."""
    parts = urlsplit(refuse_credentials(url))
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("want http://host… or https://host…")
    return url


def variable_name(name: str) -> str:
    """The name of an environment variable, or "".  What cannot be one is likely to be the key
    itself, and is refused with an error of type ``credential``, which says not to repeat it."""
    if name and not _VARIABLE.fullmatch(name):
        raise PydanticCustomError(
            CREDENTIAL, "want the name of the environment variable that holds the key, not the key"
        )
    return name


def redacted(text: str) -> str:
    """The text with the credentials of every address in it replaced by ``***``."""
    return _SECRET_IN_QUERY.sub(r"\1***", _USER_INFO.sub("***@", text))
