from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from pdbench.model import profile
from pdbench.model.profile import ORIGINS, ProfileError

TINY = (resources.files("pdbench.model") / "profiles" / "tiny.yml").read_text("utf-8")


def changed(*path: str, to: object = ...) -> str:
    """Return tiny with one place changed; `...` takes it out."""
    data: Any = yaml.safe_load(TINY)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    if to is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = to
    return yaml.safe_dump(data)


def test_the_profiles_of_the_setups_are_there_and_load() -> None:
    assert {"tiny", "h200-qwen2.5-3b", "h200-gpt-oss-120b", "gh200-qwen2.5-3b", "a100-qwen2.5-3b"} <= set(profile.shipped())
    for name in profile.shipped():
        loaded = profile.load(name)
        assert loaded.name == name
        assert all(source.split(":")[0] in ORIGINS and source.partition(": ")[2] for source in loaded.sources.values())


def test_only_what_was_measured_claims_to_be() -> None:
    assert profile.load("h200-qwen2.5-3b").measured_share > 0.5
    assert all(profile.load(name).measured_share < 0.1 for name in profile.shipped() if not name.startswith("h200-qwen2.5-3b"))
    assert all(
        "not measured" in profile.load(name).description or name in ("tiny", "rehearsal")
        for name in profile.shipped()
        if "h200-q" not in name or "gh" in name
    )


@pytest.mark.parametrize(
    ("path", "to", "said"),
    [
        (("engin",), {}, "unknown key engin; did you mean engine?"),
        (("zzz",), 1, "unknown key zzz; known: description"),
        (("engine", "startup_s"), ..., "engine.startup_s is missing"),
        (("engine", "start_s"), [1, "chosen: x"], "unknown key engine.start_s; did you mean engine.startup_s?"),
        (("model", "layers"), [0, "chosen: x"], "model.layers must be a whole number above 0, not 0"),
        (("model", "layers"), [1.5, "chosen: x"], "model.layers must be a whole number above 0, not 1.5"),
        (("model", "layers"), [True, "chosen: x"], "model.layers must be a whole number above 0, not True"),
        (("gpu", "tflops"), ["9", "chosen: x"], "gpu.tflops must be a number above 0, not '9'"),
        (("gpu", "tflops"), [float("nan"), "chosen: x"], "gpu.tflops must be a number above 0"),
        (("engine", "startup_s"), [-1, "chosen: x"], "engine.startup_s must be a number of 0 or more, not -1"),
        (("engine", "mem_fraction"), [1.2, "chosen: x"], "engine.mem_fraction must be a share above 0, at most 1, not 1.2"),
        (("gpu", "tflops"), 9, 'gpu.tflops must be [value, "where it comes from"], not 9'),
        (("gpu", "tflops"), [9, "I think"], "gpu.tflops: its source must begin with one of measured, published"),
        (("description",), 3, "description must be text"),
        (("transports",), 3, "transports must be a mapping"),
        (("transports", "rdma"), ..., "transports.rdma is missing"),
        (("transports", "rdma", "bandwidth_gb_per_s"), [0, "chosen: x"], "transports.rdma.bandwidth_gb_per_s must be"),
        (("model", "active_params"), [9e9, "chosen: x"], "model.active_params is larger than model.params"),
        (("model", "experts"), [8, "chosen: x"], "model.experts and model.experts_per_token go together"),
        (("model", "kv_lora_rank"), [512, "chosen: x"], "model.kv_lora_rank and model.rope_dim go together"),
        (("model", "window"), [128, "chosen: x"], "model.windowed_layers and model.window go together"),
    ],
)
def test_a_bad_profile_is_refused_with_file_and_key(tmp_path: Path, path: tuple[str, ...], to: object, said: str) -> None:
    file = tmp_path / "mine.yml"
    file.write_text(changed(*path, to=to))
    with pytest.raises(ProfileError) as caught:
        profile.load(str(file))
    assert said in str(caught.value)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(("text", "said"), [("a: [", "not YAML"), ("- 1", "must be a mapping"), ("", "must be a mapping")])
def test_what_is_no_profile_at_all_is_refused(text: str, said: str) -> None:
    with pytest.raises(ProfileError, match=said):
        profile.parse(text, "x.yml")


def test_a_missing_file_is_told_with_the_names_that_exist(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"no profile 'tiney': No such file.*one of: .*tiny; did you mean tiny\?"):
        profile.load("tiney")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProfileError, match="not a text file"):
        profile.load(str(tmp_path / "binary"))
