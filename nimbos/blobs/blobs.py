"""Where contents are kept, as the settings say."""

from __future__ import annotations

from pathlib import Path

from nimbos.blobs.content import Blobs
from nimbos.blobs.folder import FolderBlobs
from nimbos.blobs.rows import DatabaseBlobs
from nimbos.config import Settings
from nimbos.db import Database

_IN_DATABASE = "database"


def open_blobs(settings: Settings, database: Database) -> Blobs:
    """As `storage.blobs` says. Nothing has to be closed."""
    place = settings.storage.blobs
    if place == _IN_DATABASE:
        return DatabaseBlobs(database)
    return FolderBlobs(Path(place) if place else Path(settings.home) / "blobs")
