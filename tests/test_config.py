"""Settings: what the file may say, and how it is told when it may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from nimbos.config import load
from nimbos.errors import ConfigError


def test_no_file_gives_the_defaults(tmp_path: Path) -> None:
    settings = load(tmp_path / "new")
    assert settings.server.port == 8000
    assert settings.home == str(tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[engine]\ncels = 5\n", "cels"),
        ("[engine]\ncells = 'many'\n", "engine.cells"),
        ("[motor]\n", "motor"),
        ("[engine]\nguess_tokens = -4\n", "engine.guess_tokens"),
        ("[engine]\nguess_tokens = 65\n", "engine.guess_tokens"),
        ("[engine]\nsequences = 1\n", "engine.sequences"),
        ("[engine]\ninbox = 0\n", "engine.inbox"),
        ("[engine]\ncells = -1\n", "engine.cells"),
        ("[server]\nport = 65536\n", "server.port"),
        ("[server]\nkeep_alive_s = 0\n", "server.keep_alive_s"),
        ("[server]\nkeep_alive_s = nan\n", "server.keep_alive_s"),
        ("[server]\nstall_write_s = inf\n", "server.stall_write_s"),
        ("[batches]\nlines = 0\n", "batches.lines"),
        ("[server]\nunknown_fields = 'quiet'\n", "server.unknown_fields"),
        ("home = '/elsewhere'\n", "home"),
        ("[engine\n", "config.toml"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_the_place(text: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(ConfigError, match=named):
        load(tmp_path)
