"""Keys: made once, kept private, compared without telling anything."""

from __future__ import annotations

import hashlib
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nimbos.config import Settings
from nimbos.errors import ConfigError
from nimbos.keys import FileKey, OwnerKey, file_keys, owner_key, owner_key_file


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.delenv("NIMBOS_API_KEY", raising=False)
    return Settings(home=str(tmp_path))


def test_the_owners_key_is_made_once_and_only_its_owner_may_read_it(settings: Settings) -> None:
    first = owner_key(settings)
    assert first.secret.startswith("nb-")
    assert len(first.secret) == 3 + 43
    assert owner_key(settings) == first
    file = owner_key_file(settings)
    assert first.file == file
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["owner.key"]


def test_two_first_starts_at_once_agree(settings: Settings) -> None:
    with ThreadPoolExecutor(16) as pool:
        secrets = {key.secret for key in pool.map(lambda _: owner_key(settings), range(64))}
    assert len(secrets) == 1


def test_the_environment_sets_the_owners_key_and_nothing_is_written(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIMBOS_API_KEY", "sk-mine")
    assert owner_key(settings) == OwnerKey(secret="sk-mine", file=None)
    assert not owner_key_file(settings).exists()


@pytest.mark.parametrize("secret", ["", "two words", "tést", "a\nb"])
def test_a_key_that_cannot_stand_in_a_header_is_refused(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    monkeypatch.setenv("NIMBOS_API_KEY", secret)
    with pytest.raises(ConfigError, match="NIMBOS_API_KEY"):
        owner_key(settings)


def test_keys_of_the_file_name_a_project_and_their_scopes(settings: Settings) -> None:
    digest = hashlib.sha256(b"hidden").digest()
    settings.keys_file.write_text(
        f'[keys.a]\nkey="open"\naccount="alice"\nscopes=["class:batch"]\n'
        f'[keys.b]\nsha256="{digest.hex()}"\naccount="bob"\n'
    )
    assert file_keys(settings) == (
        FileKey(name="a", digest=hashlib.sha256(b"open").digest(), account="alice", scopes=frozenset({"class:batch"})),
        FileKey(name="b", digest=digest, account="bob", scopes=frozenset()),
    )


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('[keys.a]\nkey="k"', "account"),
        ('[keys.a]\naccount="x"', "keys.a"),
        ('[keys.a]\naccount="x"\nkey="k"\nsha256="00"', "keys.a"),
        ('[keys.a]\naccount="x"\nsha256="zz"', "keys.a"),
        ('[keys.a]\naccount="x"\nsha256="00"', "keys.a"),
        ('[keys.a]\naccount="x"\nkey="k"\nscopes=["root"]', "root"),
        ('[keys.a]\naccount="x"\nkey="k"\ncolour="red"', "colour"),
        ('[keys.a]\naccount="x"\nkey="k"\n[keys.b]\naccount="y"\nkey="k"', "keys.b"),
        ('[keys.a]\naccount=""\nkey="k"', "keys.a"),
        ("[key.a]", "key"),
        ("= 5", "keys.toml"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_the_key(settings: Settings, text: str, named: str) -> None:
    settings.keys_file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        file_keys(settings)
    assert str(settings.keys_file) in caught.value.message
    assert named in caught.value.message
