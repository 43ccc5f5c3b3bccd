"""What a user is told when something they gave is wrong: one sentence, exit code 1.

Everything else is a bug of ours and keeps its traceback.
"""

import errno
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.metadata import version
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from segformer.launch import process
from segformer.secrets import redacted_text

T = TypeVar("T")

_PLAIN = {int: "an integer", float: "a number", str: "text", bool: "true or false", NoneType: "null"}


class UserError(ValueError):
    """A mistake the reader can mend: the message names the thing, the value found, what was expected and the fix."""


class SharedError(UserError):
    """One that every process meets at the same point: the first one tells it for all."""


def printable(text: str, lines: bool = False) -> str:
    """As a terminal may show it: what a file or a class is called could hold sequences that control one.

    lines: whether the text may have several.
    """
    return "".join(sign if sign.isprintable() or (lines and sign == "\n") else "?" for sign in text)


def nearest(word: str, words: Iterable[str]) -> str:
    """`" (did you mean 'depth'?)"` for the closest of `words`, or an empty string."""
    close = get_close_matches(word, list(words), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def build(where: str, what: Callable[..., T], options: Mapping[str, Any], **more: Any) -> T:
    """Calls `what(**options, **more)`; the signature is the schema of the config section `where`."""
    schema = inspect.signature(what).parameters
    allowed = [name for name in schema if name not in more]
    for key in options:
        if key not in allowed:
            raise UserError(
                f"unknown key '{where}.{key}'{nearest(key, allowed)}: {where} takes {', '.join(sorted(allowed))}"
            )
    hints = get_type_hints(what.__init__ if inspect.isclass(what) else what)
    for name in allowed:
        if name in options:
            _require_type(f"{where}.{name}", options[name], hints.get(name))
        elif schema[name].default is inspect.Parameter.empty:
            raise UserError(f"'{where}.{name}' is not set: add {where}.{name}=... to the command")
    try:
        return what(**options, **more)
    except Exception as error:
        # Lightning raises types of its own for settings it cannot serve; both speak to the user
        if isinstance(error, UserError) or (
            not isinstance(error, ValueError) and "Misconfig" not in type(error).__name__
        ):
            raise
        raise UserError(f"{where}: {' '.join(str(error).split())}") from error


def _require_type(name: str, value: Any, hint: Any) -> None:
    """Refuses a value of the wrong plain type; what is no number, text or switch is the callee's to judge."""
    kinds = set(get_args(hint)) if get_origin(hint) in (Union, UnionType) else {hint}
    if not kinds <= _PLAIN.keys() or any(isinstance(value, kind) for kind in kinds - {int, float}):
        return
    number = isinstance(value, int) and not isinstance(value, bool)
    if (number and kinds & {int, float}) or (isinstance(value, float) and float in kinds):
        return
    raise UserError(f"{name} is {value!r}, expected {' or '.join(sorted(_PLAIN[kind] for kind in kinds))}")


@contextmanager
def explained() -> Iterator[None]:
    """Turns a user's error inside the block into `error: <sentence>` on stderr and exit code 1."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a name that it cannot encode must not end a command
    try:
        yield
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:  # here, or Hydra would print it below the whole command line, secrets and all
            sys.stderr.write(redacted_text(traceback.format_exc()))
            sys.exit(1)
        if not (process() and isinstance(error, SharedError)):
            where = f" in process {process()}" if process() else ""
            print(f"error{where}: {printable(redacted_text(sentence), lines=True)}", file=sys.stderr)
        sys.exit(1)


_DISK = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
)
_LOST = ("DistBackendError", "DistNetworkError", "DistStoreError")  # of torch.distributed


def _worker_sentence(text: str) -> str | None:
    if "timed out" in text:
        return (
            f"{text}: a data worker hangs, often on a slow or lost network disk; "
            "raise data.worker_timeout, or find the file with data.workers=0"
        )
    if "exited unexpectedly" in text or "killed by signal" in text:
        return (
            f"{text}: a data worker died, mostly for want of memory or shared memory; "
            "use fewer data.workers or a larger /dev/shm"
        )
    return None


def _sentence(error: Exception) -> str | None:  # noqa: PLR0911 (one return a kind of error)
    if isinstance(error, UserError):
        # a DataLoader worker sends its traceback along inside the message: the sentence is its last line
        return str(error).rpartition("UserError: ")[2].strip()
    if isinstance(error, RuntimeError) and "DataLoader" in str(error):
        return _worker_sentence(" ".join(str(error).split()))
    if isinstance(error, OSError) and error.errno in _DISK and error.filename:
        reason = (error.strerror or "").lower()
        return f"cannot write {error.filename}: {reason}; check the path, its permissions and the space on its disk"
    if "Misconfig" in type(error).__name__:  # Lightning's type for settings that contradict the data
        return " ".join(str(error).split())
    if isinstance(error, RuntimeError) and ("gloo" in str(error) or type(error).__name__ in _LOST):
        return "the connection to another process broke: that one's own message, if it left one, says why"
    if isinstance(error, RuntimeError) and "torchvision::" in str(error):
        return (
            f"torch {version('torch')} and torchvision {version('torchvision')} do not belong together: "
            "install them in one command, `pip install torch torchvision -c constraints.txt`"
        )
    if type(error).__module__.partition(".")[0] not in ("hydra", "omegaconf"):
        return None
    cause = error.__cause__ or error
    node, key, full_key = (getattr(cause, name, None) for name in ("parent_node", "key", "full_key"))
    if isinstance(node, Mapping) and "not in struct" in str(cause):
        if key == "data":  # of evaluate.py, which has a dataset of its own only if one is named
            return "keys of data change a dataset that is named beside them: add data=NAME"
        keys = [str(name) for name in node]
        return f"unknown key '{full_key}'{nearest(str(key), keys)}: expected one of {', '.join(sorted(keys))}"
    if "Missing mandatory value" in str(error):
        return f"'{full_key}' is not set: add {full_key}=... to the command"
    if getattr(error, "options", None) and getattr(error, "missing_cfg_file", None):
        group, _, choice = str(error.missing_cfg_file).rpartition("/")  # type: ignore[attr-defined]
        options = sorted(error.options)  # type: ignore[attr-defined]
        return f"no config {group}={choice}{nearest(choice, options)}: choose from {', '.join(options)}"
    text = str(error).replace(", set env var HYDRA_FULL_ERROR=1 to see chained exception.", "")
    return " ".join(line.strip() for line in text.splitlines() if "HYDRA_FULL_ERROR" not in line).strip()
