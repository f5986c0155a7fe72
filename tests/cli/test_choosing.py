"""Which models `nimbos up` serves, of those that it is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from nimbos.cli.serve import choose
from nimbos.config import Settings
from nimbos.errors import ConfigError
from nimbos.hub import Hub
from tests import tiny_gguf
from tests.live import write_script


async def test_of_two_files_of_one_name_neither_is_left_out_silently(tmp_path: Path) -> None:
    hub = Hub(Settings(home=str(tmp_path / "home")), environment={})
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
    one, other = (tiny_gguf.write("qwen2", tmp_path / folder) for folder in ("one", "other"))
    script = f"scripted:{write_script(tmp_path, one.stem, {'default': {'text': 'Hello.'}})}"
    chosen = await choose(hub, [str(one), str(one)])
    assert [model.path for model in chosen.local] == [one]
    for names in ([str(one), str(other)], [str(one), script], [script, str(one)]):
        with pytest.raises(ConfigError, match=f"Two models are named '{one.stem}'"):
            await choose(hub, names)
