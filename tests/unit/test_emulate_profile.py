from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
import yaml

from pdbench.emulate import profile
from pdbench.emulate.profile import ProfileError

TINY = (resources.files("pdbench.emulate") / "profiles" / "tiny.yml").read_text("utf-8")


def changed(**changes: object) -> str:
    data = {**yaml.safe_load(TINY), **changes}
    return yaml.safe_dump({key: value for key, value in data.items() if value is not ...})


def test_every_shipped_profile_loads() -> None:
    assert "tiny" in profile.shipped()
    for name in profile.shipped():
        assert profile.load(name).decode_step_ms > 0


def test_tiny_has_the_kv_cache_of_qwen_2_5_3b() -> None:
    assert profile.load("tiny").kv_bytes_per_token * 512 == 18 * 2**20


def test_every_figure_of_a_shipped_profile_says_where_it_comes_from() -> None:
    lines = [line for line in TINY.splitlines() if ":" in line and not line.startswith(("#", "description"))]
    block: list[str] = []
    for line in TINY.splitlines():
        block = [*block, line] if line.strip() else []
        if line in lines:
            assert any("#" in seen for seen in block), line


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prefil_tokens_per_s": 1}, "prefil_tokens_per_s; did you mean prefill_tokens_per_s"),
        ({"zzz": 1}, "unknown key zzz; known: description"),
        ({"decode_step_ms": ...}, "decode_step_ms is missing"),
        ({"decode_step_ms": 0}, "decode_step_ms must be a number above 0, not 0"),
        ({"decode_step_ms": "20"}, "decode_step_ms must be a number above 0, not '20'"),
        ({"decode_step_ms": float("nan")}, "decode_step_ms must be"),
        ({"prefill_tokens_per_s": float("inf")}, "prefill_tokens_per_s must be"),
        ({"startup_s": -1}, "startup_s must be a number of 0 or more, not -1"),
        ({"context_length": 1.5}, "context_length must be a whole number above 0, not 1.5"),
        ({"max_running_requests": True}, "max_running_requests must be a whole number above 0, not True"),
        ({"description": 3}, "description must be text"),
        ({"transports": 3}, "transports must be a mapping"),
        ({"transports": {}}, "transports.cuda_ipc is missing"),
    ],
)
def test_a_bad_profile_is_refused_with_file_and_key(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    path = tmp_path / "mine.yml"
    path.write_text(changed(**changes))
    with pytest.raises(ProfileError) as caught:
        profile.load(str(path))
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_bad_transport_is_named() -> None:
    ways = yaml.safe_load(TINY)["transports"]
    ways["rdma"]["bandwidth_gb_per_s"] = 0
    with pytest.raises(ProfileError, match=r"x\.yml: transports\.rdma\.bandwidth_gb_per_s must be a number above 0"):
        profile.parse(changed(transports=ways), "x.yml")
    ways["rdma"] = {"bandwith_gb_per_s": 1, "latency_ms": 1}
    with pytest.raises(ProfileError, match=r"did you mean transports\.rdma\.bandwidth_gb_per_s"):
        profile.parse(changed(transports=ways), "x.yml")


@pytest.mark.parametrize(("text", "said"), [("a: [", "not YAML"), ("- 1", "must be a mapping"), ("", "must be a mapping")])
def test_what_is_no_profile_at_all_is_refused(text: str, said: str) -> None:
    with pytest.raises(ProfileError, match=said):
        profile.parse(text, "x.yml")


def test_a_missing_file_is_told_with_the_names_that_exist(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"no profile 'nowhere': No such file.*one of: .*tiny"):
        profile.load("nowhere")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProfileError, match="not a text file"):
        profile.load(str(tmp_path / "binary"))
