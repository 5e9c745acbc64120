"""Where the agent's endpoint is and what opens it. The key is read here and handed on; it is never part of a message."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .agent_config import Agent
from .isolation import SECRET
from .types import UsageError

NO_KEY = "none"  # sent to a server that wants none; without it openai would take OPENAI_API_KEY


def address(settings: Agent) -> str:
    """The endpoint's URL; "" while a server of the cluster has not announced itself (it moves when it is requeued)."""
    if settings.base_url_file is None:
        return settings.base_url
    try:
        return Path(settings.base_url_file).expanduser().read_text().strip()
    except FileNotFoundError:
        return ""


def read_key(settings: Agent, environ: Mapping[str, str]) -> str:
    """The key, or NO_KEY. It lives in the HTTP client only."""
    if settings.api_key_env:
        if not any(word in settings.api_key_env.upper() for word in SECRET):
            raise UsageError(f"agent.api_key_env: {settings.api_key_env} does not sound like a secret, so jobs would inherit it; "
                             f"its name must contain one of {', '.join(SECRET)}")
        if not (key := environ.get(settings.api_key_env, "").strip()):
            raise UsageError(f"agent.api_key_env: the variable {settings.api_key_env} is not set on this machine")
        return key
    if settings.api_key_file:
        path = Path(settings.api_key_file).expanduser()
        try:
            mode, key = path.stat().st_mode, path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"agent.api_key_file: {path} cannot be read ({error})") from None
        if mode & 0o077:
            raise UsageError(f"agent.api_key_file: others may read {path}; `chmod 600` it")
        if not key or len(key.split()) != 1:
            raise UsageError(f"agent.api_key_file: {path} must hold the key alone, on one line")
        return key
    return NO_KEY


def without_key(key: str, text: str) -> str:
    """`text` as it may be written down."""
    return text.replace(key, "[key]") if key != NO_KEY else text
