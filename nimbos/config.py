"""Settings, from `NIMBOS_HOME/config.toml` and the environment; an unknown key is an error.

Every folder Nimbos writes to hangs under one: `home`.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import platformdirs

from nimbos.errors import ConfigError

UnknownFieldsPolicy = Literal["", "strict", "warn"]
Count = Annotated[int, msgspec.Meta(ge=0)]
AtLeastOne = Annotated[int, msgspec.Meta(ge=1)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of every engine process.

    `library`: folder of a libllama to use before all others. `threads`: 0 is one for each core.
    `context_tokens`: longest sequence, 0 is the model's own length but at most `cells`.
    `cells`: room for tokens of KV that all asks share, 0 is as many as fit in `kv_memory_mib`.
    `swap_memory_mib`: for contexts that nobody uses now, outside of the cells; 0 keeps none. `swap_disk_mib`: for what
    is more than that, in a file without a name.
    `guess_tokens`: that a step computes ahead for a branch where its text repeats itself; 0 is none.
    `flash_attention`: false is faster with some builds of the library once contexts are long, and takes more memory.
    `stall_target_ms`: a step that holds an interactive row takes no longer. `inbox`: asks that may wait.
    """

    library: str = ""
    threads: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    context_tokens: Count = 0
    cells: Count = 0
    kv_memory_mib: AtLeastOne = 1024
    swap_memory_mib: Count = 512
    swap_disk_mib: Count = 0
    sequences: Annotated[int, msgspec.Meta(ge=2, le=256)] = 128
    flash_attention: bool = True
    stall_target_ms: AtLeastOne = 150
    max_step_tokens: AtLeastOne = 512
    guess_tokens: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0
    inbox: AtLeastOne = 512
    restart_limit: Count = 5
    share_prefixes: bool = True
    fair: bool = True


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`memory_mib`: budget for all loaded models, 0 is 80 % of what the machine has free at start.
    `stall_write_s`: a client that takes no bytes for so long is cut off.
    `responses_bytes`: all responses and conversations that a project keeps.
    `moderation_model`: a chat model that judges texts for `/v1/moderations`, "" for none.
    `unknown_fields`: what is done with fields that a dialect does not know, "" is what each does by itself.
    `ollama`: a second listener on loopback, at `ollama_port`, that speaks Ollama and asks for no key."""

    host: str = "127.0.0.1"
    port: Port = 8000
    allow_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    tls_cert: str = ""
    tls_key: str = ""
    insecure: bool = False
    max_body_bytes: AtLeastOne = 16 * 1024 * 1024
    max_header_bytes: AtLeastOne = 32 * 1024
    responses_bytes: AtLeastOne = 10 * 1024 * 1024 * 1024
    memory_mib: Count = 0
    keep_alive_s: Seconds = 15.0
    stall_write_s: Seconds = 60.0
    ollama: bool = False
    ollama_port: Port = 11434
    moderation_model: str = ""
    unknown_fields: UnknownFieldsPolicy = ""
    aliases: dict[str, str] = msgspec.field(default_factory=dict)


class StorageSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`database_url`: `postgresql://…`, or "" for SQLite in the home folder; the variable NIMBOS_DATABASE_URL goes
    before it. `blobs`: a folder for contents, "" is `blobs` in the home folder; "database" keeps them there."""

    database_url: str = ""
    blobs: str = ""


class BatchSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`file_bytes`: the largest file. `project_bytes`, `project_files`: all files of a project. `open_batches`: of a
    project, that are not over. `lines`: of one batch. `line_bytes`: the longest line. `lines_at_once`: lines of all
    batches that one server answers at a time."""

    file_bytes: AtLeastOne = 200 * 1024 * 1024
    project_bytes: AtLeastOne = 10 * 1024 * 1024 * 1024
    project_files: AtLeastOne = 100_000
    open_batches: AtLeastOne = 1_000
    lines: AtLeastOne = 50_000
    line_bytes: AtLeastOne = 4 * 1024 * 1024
    lines_at_once: AtLeastOne = 32


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    engine: EngineSettings = EngineSettings()
    server: ServerSettings = ServerSettings()
    storage: StorageSettings = StorageSettings()
    batches: BatchSettings = BatchSettings()
    home: str = ""

    @property
    def models_dir(self) -> Path:
        return Path(self.home) / "models"

    @property
    def run_dir(self) -> Path:
        return Path(self.home) / "run"

    @property
    def engines_dir(self) -> Path:
        return Path(self.home) / "engines"

    @property
    def cache_dir(self) -> Path:
        return Path(self.home) / "cache"

    @property
    def keys_file(self) -> Path:
        return Path(self.home) / "keys.toml"


def default_home() -> Path:
    """`NIMBOS_HOME`, or the platform's data folder."""
    named = os.environ.get("NIMBOS_HOME")
    return Path(named).expanduser().absolute() if named else Path(platformdirs.user_data_dir("nimbos"))


def load(home: Path | None = None) -> Settings:
    """Reads the settings and makes the home folder (mode 0700) if there is none.

    Raises: ConfigError naming the file and the key.
    """
    home = home or default_home()
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(f"The folder {home} cannot be made: {error}. Set NIMBOS_HOME to another one.") from error
    file = home / "config.toml"
    try:
        table = tomllib.loads(file.read_text()) if file.exists() else {}
        if "home" in table:
            raise ConfigError(f"{file}: the key `home` cannot be set here; NIMBOS_HOME names the folder.")
        settings = msgspec.convert({**table, "home": str(home)}, Settings)
        if database_url := os.environ.get("NIMBOS_DATABASE_URL"):
            storage = msgspec.structs.replace(settings.storage, database_url=database_url)
            settings = msgspec.structs.replace(settings, storage=storage)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{file}: {error}") from error
    return settings
