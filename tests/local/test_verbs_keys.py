"""Both keys set, everything said (-vvv): what they guard, who knows them, and where they stand."""

from __future__ import annotations

import gzip
import json
import secrets
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from local.conftest import Checkout
from meanwhile import repeating

LOAD = ("-e", "bench_concurrency=4", "-e", "bench_num_requests=24", "-e", "bench_output_len=16")
#: no GPU is free, so that a worker must change its role
SWITCH = (
    "-e",
    "gpus=2",
    "-e",
    "transfer_backend=mooncake_tcp",
    "-e",
    json.dumps({"engine_args": {"enable-pd-role-switch": True}}),
)


@contextmanager
def command_lines(keys: list[str]) -> Iterator[list[str]]:
    """Look at every command line of this machine for as long as the block lasts; yields those that show a key."""
    shown = list[str]()

    def look() -> None:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = path.read_bytes()
            except OSError:
                continue
            if any(key.encode() in line for key in keys):
                shown.append(line.replace(b"\0", b" ").decode(errors="replace"))

    with repeating(look, 0.05, 10):
        yield shown


def text_of(path: Path) -> bytes:
    """A file's content, unpacked."""
    if path.suffix == ".parquet":
        return json.dumps(pq.read_table(path).to_pylist(), default=str).encode()
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def holders(clean: Checkout, key: str) -> dict[str, int]:
    """Every file that holds the key, with its mode."""
    found = [path for path in clean.folder.rglob("*") if path.is_file() and key.encode() in text_of(path)]
    return {str(path.relative_to(clean.folder)): path.stat().st_mode & 0o777 for path in found}


def environments(clean: Checkout, keys: list[str]) -> list[int]:
    """What the deployment runs, where its environment or command line shows a key."""
    shown = []
    for pid in [int(line.split()[0]) for line in clean.processes()]:
        told = b"".join(Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ"))
        shown += [pid] if any(key.encode() in told for key in keys) else []
    return shown


def status(url: str, body: object, key: str) -> int:
    """What a worker answers."""
    data = None if body is None else json.dumps(body).encode()
    call = urllib.request.Request(url, data, {"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(call, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_keys_guard_and_show_nowhere(clean: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    key = secrets.token_hex(12)
    monkeypatch.setenv("PD_API_KEY", key)
    mine = ("-vvv", "-e", "admin_api_key=generate", *SWITCH)
    said = []
    with command_lines([key]) as shown:
        first = clean.measured(*mine, *LOAD)
    said.append(first.text)
    (own,) = (clean.folder / ".pd" / "keys").glob("*/admin_api_key")
    admin = own.read_text().strip()
    keys = [key, admin]
    with command_lines(keys) as also:
        for verb, *words in (
            [
                "profile.yml",
                "-e",
                "role=decode",
                "-e",
                "profile_slow_down=0.2",
                "-e",
                "profile_steps=3",
                "-e",
                "bench_concurrency=8",
                "-e",
                "bench_output_len=40",
            ],
            ["rebalance.yml", "-e", "ratio=2p2d"],
            ["doctor.yml"],
        ):
            said.append(clean.play(verb, *mine, *words).good().text)
        again = clean.play("deploy_pd.yml", *mine, "-e", "ratio=2p2d").good()
    said.append(again.text)
    assert again.changed == {"gh200": 0, "a100": 0}
    assert "switched pd-worker-" in said[2], "a role is changed with the admin key"
    assert shown + also == []
    assert environments(clean, keys) == []
    for text in said:
        assert not any(key in text for key in keys)
    # every call of ours had the right key: caches were emptied, nothing is left slowed down
    latest = json.loads((clean.folder / "results" / "latest" / "validity.json").read_text())
    assert latest["valid"] is True
    states = [f".pd/state-{host}/secrets" for host in ("a100", "gh200")]
    assert holders(clean, key) == {f"{state}/api_key": 0o600 for state in states}
    assert holders(clean, admin) == {str(own.relative_to(clean.folder)): 0o600, **{f"{s}/admin_api_key": 0o600 for s in states}}

    with pytest.raises(OSError, match="401"):
        clean.ask("/workers")
    workers = clean.ask("/workers", key=key)["workers"]
    assert len(workers) == 4
    worker = workers[0]["url"]
    for path, body in (("/slow_down", {"forward_sleep_time": None}), ("/flush_cache", {}), ("/stop_profile", {})):
        assert [status(worker + path, body, given) for given in ("", key)] == [401, 401], path
        assert status(worker + path, body, admin) != 401, path
    assert [status(worker + "/server_info", None, given) for given in ("", key, admin)] == [401, 200, 401]

    own.rename(own.with_suffix(".away"))
    lost = clean.play("bench.yml", *mine, *LOAD)
    assert "is not here: bring it from the controller that deployed" in " ".join(lost.text.split())
    refused = clean.play("bench.yml", *LOAD)
    assert "the deployment has an admin_api_key, and bench.yml has none" in " ".join(refused.text.split())
    typed = clean.play("deploy_pd.yml", "-e", "api_key=typed-s3cret")
    assert "-e api_key=...: every user of this machine sees it in `ps`" in " ".join(typed.text.split())
    assert 0 not in (lost.code, refused.code, typed.code)
    # keys can go again
    monkeypatch.delenv("PD_API_KEY")
    clean.play("deploy_pd.yml").good()
    assert len(clean.ask("/workers")["workers"]) == 4
    assert not list(clean.folder.glob(".pd/state-*/secrets/*"))
