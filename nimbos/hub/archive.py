"""Takes chosen regular files out of a tar archive that may be hostile: no links, no devices, no way out of the folder,
a limit on what it may unpack to. Who chooses gives each member its place, so an archive's own paths are never used."""

from __future__ import annotations

import gzip
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from nimbos.errors import DownloadFailed

MAX_UNPACKED_BYTES = 2 << 30


def extract(archive: Path, folder: Path, choose: Callable[[PurePosixPath], PurePosixPath | None]) -> list[Path]:
    """Writes the members for which `choose` names a place under `folder`; None leaves a member out.

    Raises: DownloadFailed for a damaged or oversized archive, or a place outside.
    """
    written: list[Path] = []
    total = 0
    try:
        with gzip.open(archive) as unzipped, tarfile.open(fileobj=unzipped) as tar:
            for member in tar:
                place = choose(PurePosixPath(member.name)) if member.isreg() else None
                if place is None:
                    continue
                total += member.size
                if total > MAX_UNPACKED_BYTES:
                    raise DownloadFailed(f"{archive.name} unpacks to more than {MAX_UNPACKED_BYTES} bytes.")
                written.append(_write(tar, member, folder, place))
            _read_on(unzipped, archive.name)
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, FileExistsError) as error:
        raise DownloadFailed(f"{archive.name} is damaged: {error}.") from error
    return written


def _read_on(unzipped: gzip.GzipFile, name: str) -> None:
    """To the very end, where the checksum is."""
    read = 0
    while block := unzipped.read(1 << 20):
        read += len(block)
        if read > MAX_UNPACKED_BYTES:
            raise DownloadFailed(f"{name} unpacks to more than {MAX_UNPACKED_BYTES} bytes.")


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, place: PurePosixPath) -> Path:
    if place.is_absolute() or ".." in place.parts:
        raise DownloadFailed(f"An archive has a file that would be written to {str(place)!r}, which is refused.")
    target = folder.joinpath(*place.parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    source = tar.extractfile(member)
    assert source is not None  # it is a regular file
    with target.open("xb") as file:
        shutil.copyfileobj(source, file)
    return target
