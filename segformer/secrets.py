"""What must not stand in a run folder, a log or a message: who logs in, and with what."""

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

REDACTED = "<redacted>"
SHORTEST = 8  # characters of a secret that is looked for inside other text: shorter ones are also parts of words
_SECRET = re.compile(
    r"\w*(token|secrets?|passwords?|passwd|passphrase|apikeys?)|key|pwd|pass|credentials?|cookies?|bearer|"
    r"auth(entication|orization)?"
)
_SECRET_PAIRS = {(kind, key) for kind in ("access", "api", "private", "secret") for key in ("key", "keys")}
_SIGNED = {"sig", "signature"}  # of an address that opens a file without a password
_NAMED = re.compile(r"([\w.@-]+)[\"']?\s*[:=]")
_PAIR = re.compile(r"(?P<key>[\w.@-]+)[\"']?\s*[:=]\s*[\"']?(?P<value>[^\s,;&}\]\"']+)")
_SETTING = re.compile(r"(?P<key>[\w.@-]+)=(?P<value>[^\s,;&]+)")
_QUERY = re.compile(r"(?<=[?&])(?P<key>[\w.-]+)=(?P<value>[^\s&#]+)")
# up to the last @ before the path; a password that holds a slash is told from a port by not being a number
_USER = re.compile(r"(?<=://)(?:[^\s/?#]*@|[^\s/?#:@]+:(?!\d+(?:/|$))[^\s@]+@)")


def redacted(values: Any) -> Any:
    """A copy of nested plain values in which every secret reads "<redacted>".

    A secret is the text or number under a key that names one, and whatever lies below such a key: `api_key`, `apiKey`,
    `hf-token`, `password`, `auth`, a `key` of any kind, but not `monitor`, `tokens_per_batch` or `keyframe`. From every
    text go users and passwords in addresses, what stands behind a secret's name (`HF_TOKEN=abc`), and the values of
    environment variables of such names. Switches, null and empty text stay.
    """
    return _redacted(values, secret=False)


def redacted_arguments(arguments: Sequence[str]) -> list[str]:
    """The same for the words of a command line: `logger.wandb.api_key=abc`, `+a={token:abc}`, `--token abc`.

    Of a value that holds a secret somewhere nothing is kept.
    """
    hidden: list[str] = []
    for previous, word in pairwise(["", *arguments]):
        key, sign, value = word.partition("=")
        if any(names_secret(match[1]) for match in _NAMED.finditer(word)):
            hidden.append(f"{key}={REDACTED}" if sign and value and not _NAMED.search(key) else REDACTED)
        elif previous.startswith("-") and "=" not in previous and names_secret(previous):
            hidden.append(REDACTED)
        else:
            hidden.append(_without_address(word))
    return hidden


def redacted_text(text: str) -> str:
    """A message without addresses' users, and without the secrets of the environment and of this command line."""
    given = [match["value"] for word in sys.argv for match in _PAIR.finditer(word) if names_secret(match["key"])]
    return _without(_without_environment(_without_address(text)), given)


def names_secret(key: str) -> bool:
    """Whether a key names a secret, by its words: parts between _ and -, and between small and capital letters."""
    words = re.findall("[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", key).lower())
    plural = key.rpartition(".")[2].lower() == "tokens"  # but num_tokens is a number
    return plural or any(_SECRET.fullmatch(word) for word in words) or not _SECRET_PAIRS.isdisjoint(pairwise(words))


def _redacted(values: Any, secret: bool) -> Any:
    if isinstance(values, Mapping):
        return {key: _redacted(value, secret or names_secret(str(key))) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_redacted(value, secret) for value in values]
    if secret and not isinstance(values, bool) and values not in (None, ""):
        return REDACTED
    return (
        _SETTING.sub(_without_value, _without_environment(_without_address(values)))
        if isinstance(values, str)
        else values
    )


def _without_address(text: str) -> str:
    """Without users, passwords and keys in the addresses that it holds."""
    if "://" not in text:
        return text
    return _QUERY.sub(_without_value, _USER.sub(f"{REDACTED}@", text))


def _without_value(match: re.Match[str]) -> str:
    secret = names_secret(match["key"]) or not _SIGNED.isdisjoint(re.split("[^a-z]", match["key"].lower()))
    return f"{match['key']}={REDACTED}" if secret else match[0]


def _without_environment(text: str) -> str:
    """Without the values of environment variables that name a secret, which a configuration may have taken up."""
    named = [value for name, value in os.environ.items() if names_secret(name)]
    return _without(text, (value for value in named if not os.path.isabs(value)))  # PWD is where one is


def _without(text: str, secrets: Iterable[str]) -> str:
    for secret in secrets:
        if len(secret) >= SHORTEST:
            text = text.replace(secret, REDACTED)
    return text
