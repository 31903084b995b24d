"""From what the user wrote to typed values, with the place of every mistake."""

from __future__ import annotations

import math
import re
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

from . import bench_load, firewall, keys
from .errors import UserError, did_you_mean, nearest
from .plan_file import newer
from .variables import BENCH, CLUSTER, HOST, ONLY_TYPED, VARIABLES, VERB, Variable

_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}
#: How alike an inventory's own variable must be to one of ours to be called a misspelling.
_TYPO_CUTOFF = 0.87
#: Names of environment variables that hold secrets (SGLANG_..._MAX_TOKENS does not).
_PRIVATE = re.compile(r".*(TOKEN|SECRET|PASSWORD|_KEY)", re.IGNORECASE)


def check_extra_vars(extra: Mapping[str, Any]) -> None:
    """Refuse ``-e`` names that are neither ours nor Ansible's own, saying which was meant, and manifests of later checkouts."""
    if later := newer(extra.get("manifest")):
        raise UserError(f"-e @manifest.json: {later}")
    for name, value in extra.items():
        if name == "_raw_params":
            # Ansible puts there what it could not split at "=" and blanks.
            raise UserError(
                f"-e: {value!r} is no name=value; one name=value an -e, without blanks; a value with blanks, a list or a "
                """mapping goes as JSON: -e '{"bench_load": {"isl": "512", "osl": "128"}}'"""
            )
        if name not in VARIABLES and not name.startswith("ansible_"):
            hint = did_you_mean(name, VARIABLES) or "; docs/variables.md lists them"
            raise UserError(f"-e {name}=...: there is no variable {name}{hint}")
        environment = value if name.endswith("engine_env") and isinstance(value, Mapping) else {}
        private = [key for key in environment if _PRIVATE.fullmatch(str(key))]
        if private:
            raise UserError(
                f"-e {name}=...: {private[0]} is a secret by its name, and what -e sets stays in plans and results. The hub's token is "
                "hf_token (in a vault, or a file of mode 0600 for -e @FILE); any other belongs in the inventory, in a vault"
            )


def check_typed(extra: Mapping[str, Any], typed: Sequence[str]) -> None:
    """Refuse secrets among the words of the command line (``typed``: those after ``-e``), which `ps` shows to everybody."""
    for name, value in extra.items():
        secret = name in VARIABLES and VARIABLES[name].secret and value and value != keys.GENERATE
        if secret and any(str(value) in word for word in typed if not word.startswith("@")):
            raise UserError(
                f"-e {name}=...: every user of this machine sees it in `ps`, and it is a secret: put it into a vault, or into a file "
                "of mode 0600 for -e @FILE"
            )


def check_inventory_names(names: Mapping[str, Iterable[str]]) -> None:
    """Refuse inventory variables that look like a misspelt one of ours; others are the user's own business.

    ``names``: host -> the names set for it.
    """
    for host, given in names.items():
        for name in given:
            if name in VARIABLES or name.startswith(("ansible_", "_")):
                continue
            meant = nearest(name, [known for known in VARIABLES if known not in ONLY_TYPED], _TYPO_CUTOFF)
            if meant:
                raise UserError(f"inventory: host {host} sets {name}, which does nothing; did you mean {meant}?")


def _number(kind: type, value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise ValueError
    number = kind(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _list(value: Any) -> List[Any]:
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [value]
    raise ValueError


def _texts(value: Any) -> List[Any]:
    """Return a list of words; numbers stay what they are, for rates, and nothing else stands for a word."""
    items = _list(value)
    if any(isinstance(item, bool) or not isinstance(item, (str, int, float)) or item == "" for item in items):
        raise ValueError
    return items


def _writable(value: Any) -> bool:
    """Whether text in a value, however deep, can stand in files and command lines: no NUL, no half of a surrogate pair."""
    if isinstance(value, str):
        return not any(char == "\0" or "\ud800" <= char <= "\udfff" for char in value)
    if isinstance(value, Mapping):
        return all(_writable(key) and _writable(item) for key, item in value.items())
    return all(_writable(item) for item in value) if isinstance(value, (list, tuple)) else True


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word not in _TRUE | _FALSE:
        raise ValueError
    return word in _TRUE


def _gpus(value: Any) -> Any:
    if value == "auto":
        return "auto"
    several = isinstance(value, (list, tuple)) or (isinstance(value, str) and "," in value)
    if not several and _number(int, value) > 4096:
        # No host has as many, and a list of billions would take all memory.
        raise ValueError
    indices = [_number(int, item) for item in _list(value)] if several else [*range(_number(int, value))]
    if min(indices, default=0) < 0 or (not several and _number(int, value) < 0):
        raise ValueError
    return indices


def _span(value: Any) -> str:
    text = str(value).strip()
    bench_load.longest(text)
    return text


def _networks(value: Any) -> List[str]:
    items = [str(item) for item in _list(value)]
    if any(firewall.network(item) is None for item in items):
        raise ValueError
    return items


def _ports(value: Any) -> List[str]:
    items = [str(item).replace(" ", "") for item in _list(value)]
    for item in items:
        firewall.span_of(item)
    return items


def _dict(value: Any) -> Dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError
    return {str(key): item for key, item in value.items()}


_CONVERT = {
    "str": lambda value: str(value),
    "int": lambda value: _number(int, value),
    "float": lambda value: _number(float, value),
    "bool": _bool,
    "list": _texts,
    "dict": _dict,
    "ints": lambda value: [_number(int, item) for item in _list(value)],
    "gpus": _gpus,
    "span": _span,
    "networks": _networks,
    "ports": _ports,
}
_EXPECTED = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list": "a list of words, such as a,b or [a, b]",
    "dict": "a mapping such as {key: value}",
    "ints": "whole numbers such as 32,64",
    "gpus": "a count, a list of indices such as [0, 1], or auto",
    "span": "a length such as 512, 256-1024 (smaller first, at least 1), normal:512:64, lognormal:512:0.4, file:lengths.txt, "
    "or a mixture such as 512@0.7,4096@0.3",
    "networks": "IP addresses and networks such as 192.0.2.7,10.0.0.0/16 (no bits set beyond the network's)",
    "ports": "ports and ranges such as 50051,32803-32810",
}


def convert(variable: Variable, value: Any, where: str) -> Any:
    """Return ``value`` as the variable's type; raise UserError naming variable, value, place and what would be right."""
    if value is None:
        return variable.default
    shown = "(secret)" if variable.secret else repr(value)
    if variable.type in ("str", "int", "float") and isinstance(value, (list, dict)):
        raise UserError(f"{variable.name}={shown} ({where}): expected {_EXPECTED[variable.type]}")
    if variable.type in ("str", "list", "dict") and not _writable(value):
        raise UserError(f"{variable.name} ({where}): it holds a character that no file or command line can")
    try:
        result = _CONVERT[variable.type](value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{variable.name}={shown} ({where}): expected {_EXPECTED[variable.type]}") from None
    if variable.choices and result not in variable.choices:
        raise UserError(
            f"{variable.name}={shown} ({where}): one of {', '.join(variable.choices)}"
            f"{did_you_mean(str(result), variable.choices)}"
        )
    if variable.type in ("ints", "list") and not result and variable.default:
        raise UserError(f"{variable.name}={shown} ({where}): expected {_EXPECTED[variable.type]}, and not none at all")
    if variable.name in ("state_dir", "install_dir", "model_dir", "cache_dir") and not result.startswith("/"):
        raise UserError(f"{variable.name}={shown} ({where}): expected an absolute path")
    if variable.name in ("address", "listen_address") and ":" in result:
        raise UserError(
            f"{variable.name}={shown} ({where}): expected an IPv4 address; a deployment over IPv6 was never tried, and is not "
            "written into URLs as they need it"
        )
    if variable.name == "service_user" and not re.fullmatch(r"[a-z_][a-z0-9_-]{0,30}", result):
        raise UserError(f"{variable.name}={shown} ({where}): expected a user's name, such as pd")
    if variable.name == "model_sha256" and not re.fullmatch(r"[0-9a-f]{64}", result):
        raise UserError(f"{variable.name}={shown} ({where}): expected 64 hex digits in lower case")
    if variable.name == "engine_shm_size" and not re.fullmatch(r"[0-9]+[kmg]", result):
        raise UserError(f"{variable.name}={shown} ({where}): expected a size such as 32g")
    if variable.secret and not keys.one_word(result):
        raise UserError(f"{variable.name} ({where}): expected one word of printable ASCII")
    if variable.type == "list" and variable.name != "bench_request_rate":
        result = [str(item) for item in result]
    numbers = result if variable.type == "ints" else [result]
    for number in numbers if variable.type in ("int", "float", "ints") else []:
        if variable.minimum is not None and number < variable.minimum:
            raise UserError(f"{variable.name}={shown} ({where}): at least {variable.minimum}")
        if variable.maximum is not None and number > variable.maximum:
            raise UserError(f"{variable.name}={shown} ({where}): at most {variable.maximum}")
    return result


def host_settings(host: str, given: Mapping[str, Any], extra: Mapping[str, Any]) -> Dict[str, Any]:
    """Return every variable's typed value for one host.

    ``given``: what Ansible resolved for the host (extra-vars included); ``extra``: the extra-vars alone, to say where
    a wrong value was set.
    """
    return {
        name: convert(variable, given.get(name), "-e" if name in extra else f"host {host}, inventory or group_vars")
        for name, variable in VARIABLES.items()
    }


def cluster_settings(by_host: Mapping[str, Mapping[str, Any]]) -> Dict[str, Any]:
    """Return the values that must be one for the whole deployment; raise UserError naming two hosts that differ.

    ``by_host``: host -> its :func:`host_settings`, in inventory order.
    """
    first: Optional[Tuple[str, Mapping[str, Any]]] = None
    for host, values in by_host.items():
        if first is None:
            first = (host, values)
            continue
        for name, variable in VARIABLES.items():
            if variable.scope in (CLUSTER, BENCH, VERB) and values[name] != first[1][name]:
                shown = "differs" if variable.secret else f"is {first[1][name]!r} and {values[name]!r}"
                raise UserError(
                    f"{name} {shown} on hosts {first[0]} and {host}: it is one value for the whole deployment; "
                    "set it under all: vars: of the inventory, in group_vars/all.yml, or with -e"
                )
    if first is None:
        raise UserError("the inventory has no host")
    return {name: first[1][name] for name, variable in VARIABLES.items() if variable.scope != HOST}


def check_state_dirs(by_host: Mapping[str, str]) -> None:
    """Refuse hosts of one machine (``host`` -> state_dir) that would undo each other's work in one folder."""
    seen: Dict[str, str] = {}
    for host, folder in by_host.items():
        if folder in seen:
            raise UserError(
                f"hosts {seen[folder]} and {host} are this machine and share state_dir={folder}: give each its own, "
                "such as /var/lib/pd-{{ inventory_hostname }} in the inventory"
            )
        seen[folder] = host


def check_templates(extra: Mapping[str, Any]) -> None:
    """Refuse templates in ``-e`` values of ours: a deployment keeps them as they stand, and later commands read them."""
    for name, value in extra.items():
        if name in VARIABLES and "{{" in str(value):
            raise UserError(f"-e {name}=...: a template belongs in the inventory or group_vars, not in -e")
