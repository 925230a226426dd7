"""W&B's server and what the environment says of it, checked before anything is trained or sent."""

from __future__ import annotations

import base64
import json
import os
import re
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import urlsplit

from repa_lab.errors import InputError, StateError

KEY = "WANDB_API_KEY"
MODES = ("online", "offline", "disabled")
_FURTHER_MODES = {"run": "online", "shared": "online", "dryrun": "offline"}  # other words that W&B knows
_ANSWER_S = 5.0


class ServerError(StateError):
    """W&B's server does not answer, or has not taken what it was sent."""


class WandbRefusalError(InputError):
    """W&B refuses what the environment holds, such as the key; the text names the variable."""


def resolve_mode(mode: str) -> str:
    """Return a W&B mode; ``auto`` is WANDB_MODE if set, else online with a key and offline without."""
    if mode != "auto":
        return mode
    if chosen := os.environ.get("WANDB_MODE"):
        return _FURTHER_MODES.get(chosen, chosen)
    return "online" if api_key() else "offline"


def why_offline(mode: str) -> str:
    """Return why a mode is resolved to ``offline``."""
    if mode == "offline":
        return "run.wandb.mode is offline"
    chosen = os.environ.get("WANDB_MODE")
    return f"WANDB_MODE is {chosen}" if chosen else f"{KEY} is not set, and `wandb login` has stored no key"


def api_key() -> str | None:
    """Return WANDB_API_KEY, or else the key that `wandb login` has stored for the server; None if there is neither."""
    if key := os.environ.get(KEY):
        return key
    stored = [os.environ.get("NETRC") or "~/.netrc", "~/_netrc"]
    if not any(Path(file).expanduser().is_file() for file in stored):
        return None
    from wandb.errors import AuthenticationError, UsageError
    from wandb.sdk.lib.wbauth import read_netrc_auth  # as the client that sends the rows

    try:
        return read_netrc_auth(host=server_address())
    except (AuthenticationError, ValueError, UsageError):  # malformed
        return None


def environment_problems(mode: str) -> Iterator[str]:
    """Yield why W&B will refuse what the environment holds; each reason begins with the name of the variable."""
    if mode not in MODES:
        yield f"WANDB_MODE: expected one of {', '.join((*MODES, *_FURTHER_MODES))}, got {mode!r}"
    if mode != "online":
        return
    if problem := _key_problem(api_key() or ""):
        yield f"{KEY}: {problem}"
    import wandb  # 1 s
    from wandb.errors import UsageError

    for name in os.environ:
        if name.startswith("WANDB_") and name != KEY:
            try:
                wandb.Settings().update_from_env_vars({name: os.environ[name]})
            except (ValueError, UsageError) as error:
                yield f"{name}: {_reason(error)}"


def _key_problem(key: str) -> str | None:
    if not key:
        return "not set, and `wandb login` has stored no key; W&B's mode online needs one"
    if re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+", key):  # a JSON web token
        return None
    secret = key.split("-", 1)[-1]  # the key of a private server has a prefix
    if not re.fullmatch(r"[\w-]+", secret):
        return "not a key of W&B, which has only letters, digits and underscores"
    return f"a key of W&B has 40 or more characters, this one has {len(secret)}" if len(secret) < 40 else None


def _reason(error: Exception) -> str:
    """Return W&B's reason in one line; of a validation error without the value, which may be a secret."""
    from pydantic import ValidationError

    text = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
    return " ".join(text.split())


def server_address() -> str:
    """Return the address of W&B's server, as its client reads it from its settings files and the environment."""
    import wandb

    settings = wandb.Settings()
    settings.update_from_system_settings()
    settings.update_from_env_vars({name: value for name, value in os.environ.items() if name == "WANDB_BASE_URL"})
    return str(settings.base_url)


def require_server() -> None:
    """Ask W&B's server whether it takes the key; wait for at most 5 s.

    Raises:
        ServerError: the server does not answer.
        WandbRefusalError: the key or another variable is wrong, or the server refuses the key.
    """
    if problems := list(environment_problems("online")):
        raise WandbRefusalError("\n".join(problems))
    address = server_address()
    answers: SimpleQueue[dict[str, Any] | Exception] = SimpleQueue()
    # In a thread, because looking up the server's name has no time limit.
    threading.Thread(target=lambda: answers.put(_viewer(address)), daemon=True).start()
    try:
        answer = answers.get(timeout=_ANSWER_S)
    except Empty:
        raise ServerError(f"W&B's server {address} does not answer within {_ANSWER_S:g} s") from None
    if isinstance(answer, urllib.error.HTTPError):
        if answer.code in (401, 403):
            raise WandbRefusalError(f"{KEY}: {address} refuses the key (status {answer.code})")
        raise ServerError(f"{address} answers with status {answer.code}, not as W&B's server does")
    if isinstance(answer, Exception):
        reason = getattr(answer, "reason", answer)
        if not isinstance(reason, ssl.SSLError):  # W&B's client looks for certificates in other places
            text = (isinstance(reason, OSError) and reason.strerror) or str(reason) or type(reason).__name__
            raise ServerError(f"W&B's server {address} cannot be reached: {text}")
    elif answer.get("viewer", address) is None:
        raise WandbRefusalError(f"{KEY}: {address} does not know the key")


def settle_mode(mode: str) -> tuple[str, str | None]:
    """Decide whether W&B is told of runs while they are trained; ask its server once.

    Returns:
        The mode, ``offline`` without a server, and why the server cannot be told, if it should be.

    Raises:
        WandbRefusalError: the server refuses the key.
    """
    mode = resolve_mode(mode)
    try:
        if mode == "online":
            require_server()
    except ServerError as error:
        return "offline", str(error)
    return mode, None


def _viewer(address: str) -> dict[str, Any] | Exception:
    try:
        return ask(address, "query Viewer { viewer { id } }", {})
    except (OSError, ValueError) as error:
        return error


def ask(address: str, query: str, variables: dict[str, Any]) -> dict[str, Any]:
    """Return the answer of W&B's server to a GraphQL query that has a name.

    Raises:
        OSError: there is no answer, or one that refuses (`HTTPError`).
        ValueError: the answer is no JSON object.
    """
    (operation,) = re.findall(r"^query (\w+)", query)
    body = json.dumps({"operationName": operation, "query": query, "variables": variables})
    authorization = base64.b64encode(f"api:{api_key()}".encode()).decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {authorization}"}
    request = urllib.request.Request(f"{address}/graphql", body.encode(), headers)
    # No proxy to this machine, as W&B's client has it; the environment's proxies to all others.
    is_here = urlsplit(address).hostname in ("localhost", "127.0.0.1", "::1")
    proxies = urllib.request.ProxyHandler({} if is_here else None)
    with urllib.request.build_opener(proxies).open(request, timeout=_ANSWER_S) as answer:
        content = json.load(answer)
    if not isinstance(content, dict):
        raise ValueError(f"{address} answers with no JSON object")
    return content.get("data") or {}
