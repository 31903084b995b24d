"""The keys of a deployment: where they come from, and the files of mode 0600 in which they lie on hosts.

Clients, router and workers share ``api_key``; ``admin_api_key`` guards what changes a worker (slow_down, profiles, caches, roles).
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

from .errors import UserError

API, ADMIN = "api_key", "admin_api_key"
SHARED = (API, ADMIN)
#: The router's own, for TLS.
CERT, CERT_KEY = "router_tls_cert", "router_tls_key"
#: The workers', where the engine downloads the model.
HUB = "hf_token"
#: Under a host's state directory: what lies there in files of mode 0600, and the launcher that reads keys.
FILES = {name: f"secrets/{name}" for name in (*SHARED, CERT, CERT_KEY, HUB)}
LAUNCHER = "bin/with_api_key.py"
#: Where the controller's environment may have them.
ENVIRONMENT = {API: "PD_API_KEY", ADMIN: "PD_ADMIN_API_KEY"}
#: The value that asks for a key of ours.
GENERATE = "generate"
_FLAGS = {API: "--api-key", ADMIN: "--admin-api-key"}


def flags(state_dir: str, api: bool, admin: bool = False) -> Dict[str, str]:
    """Return the flags of the keys that are set, each with the file that holds the key."""
    given = {API: api, ADMIN: admin}
    return {_FLAGS[name]: f"{state_dir}/{FILES[name]}" for name in SHARED if given[name]}


def hub_env(state_dir: str) -> Dict[str, str]:
    """Return what tells huggingface_hub in which file its token is."""
    return {"HF_TOKEN_PATH": f"{state_dir}/{FILES[HUB]}"}


def reads(unit: Mapping[str, Any], name: str) -> bool:
    """Whether a unit's command line or environment names the file of a key."""
    return any(str(item).endswith(f"/{FILES[name]}") for item in (*unit["argv"], *unit["env"].values()))


def resolve(name: str, given: Any, environ: Mapping[str, str], folder: Path) -> Any:
    """Return a key: the variable's value, else the environment's; None without either.

    For ``generate`` it is what ``folder`` keeps, or a new one that nobody keeps yet (:func:`keep`). What is no text is left to
    the check of all variables. Raises UserError.
    """
    if given is None:
        given = environ.get(ENVIRONMENT[name]) or None
        if given is not None and not one_word(given):
            raise UserError(f"{ENVIRONMENT[name]} (environment): expected one word of printable ASCII")
    if given != GENERATE:
        return given
    return kept(folder / name) or secrets.token_urlsafe(32)


def one_word(text: str) -> bool:
    """Whether a key can stand in an HTTP header, and in a file that holds nothing else."""
    return bool(text) and text.isascii() and text.isprintable() and " " not in text


def kept(path: Path) -> Optional[str]:
    """Return the key in a file, None where there is no file; raise UserError for one that others may read, or that holds none."""
    try:
        with open(path, encoding="utf-8") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise UserError(f"{path} has mode {mode:04o}, so others can read the key: chmod 600 {path}")
            key = file.read().strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or 'it is not text'}") from None
    if not one_word(key):
        raise UserError(f"{path} must hold one key and nothing else; take it away, and deploy_pd.yml makes a new one")
    return key


def keep(path: Path, key: str) -> None:
    """Write a new key's file, which nobody else may read; one that is there stays."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with open(handle, "w") as file:
        file.write(key + "\n")


def check(cluster: Mapping[str, Optional[str]], engine: str, takes_admin: bool) -> None:
    """Refuse keys that would guard nothing."""
    if cluster[ADMIN] is None:
        return
    if not takes_admin:
        raise UserError(f"engine {engine} has no admin key: leave admin_api_key out (its api_key guards /v1)")
    if cluster[ADMIN] == cluster[API]:
        raise UserError("admin_api_key is the same as api_key, so every client could do what it guards: give it another value")
