"""Where the keys of a deployment come from."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlib import keys
from pdlib.errors import UserError

HERE = {"PD_API_KEY": "from-here", "PD_ADMIN_API_KEY": "admin-from-here"}


def test_the_variable_is_stronger_than_the_environment(tmp_path: Path) -> None:
    assert keys.resolve(keys.API, "mine", HERE, tmp_path) == "mine"
    assert [keys.resolve(name, None, HERE, tmp_path) for name in keys.SHARED] == ["from-here", "admin-from-here"]
    assert keys.resolve(keys.API, None, {"PD_API_KEY": ""}, tmp_path) is None
    assert keys.resolve(keys.API, None, {"PD_API_KEY": "generate"}, tmp_path)


def test_a_generated_key_is_kept_for_its_owner_alone_and_stays(tmp_path: Path) -> None:
    folder = tmp_path / "keys" / "local-1"
    first, second = (keys.resolve(keys.API, "generate", HERE, folder) for _ in range(2))
    assert first != second, "nobody keeps it yet"
    assert len(first) >= 43
    assert not folder.exists()
    keys.keep(folder / keys.API, first)
    keys.keep(folder / keys.API, second)
    assert keys.resolve(keys.API, "generate", HERE, folder) == first
    assert (folder / keys.API).stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    assert keys.resolve(keys.ADMIN, "generate", {}, folder) != first


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        (b"k", 0o640, "has mode 0640, so others can read the key: chmod 600"),
        (b"", 0o600, "must hold one key and nothing else"),
        (b"one two", 0o600, "must hold one key and nothing else"),
        (b"\xff\xfe", 0o600, "it is not text"),
    ],
)
def test_a_file_that_is_no_key_is_refused(tmp_path: Path, content: bytes, mode: int, said: str) -> None:
    path = tmp_path / keys.API
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(UserError, match=said):
        keys.resolve(keys.API, "generate", {}, tmp_path)


def test_a_folder_is_no_key(tmp_path: Path) -> None:
    (tmp_path / keys.API).mkdir()
    with pytest.raises(UserError, match="Is a directory"):
        keys.kept(tmp_path / keys.API)


@given(st.text())
def test_what_the_environment_holds_is_one_word_or_refused_without_showing_it(text: str) -> None:
    def resolved() -> str | None:
        found: str | None = keys.resolve(keys.API, None, {"PD_API_KEY": text}, Path("/nonexistent"))
        return found

    if text in ("", "generate"):
        assert (resolved() is None) == (text == "")
    elif text.isascii() and text.split() == [text] and text.isprintable():
        assert resolved() == text
    else:
        with pytest.raises(UserError) as refused:
            resolved()
        assert str(refused.value) == "PD_API_KEY (environment): expected one word of printable ASCII"
