"""Contents by their hash: files, batch lines, stored responses, pictures.

A content is known by the SHA-256 of its bytes, so storing it twice is storing it once, and reading it checks it. In a
folder by default (`folder.py`), in the database by setting (`rows.py`). Knows nothing of who owns a content: the parts
that store one keep its hash in their rows.
"""

from nimbos.blobs.blobs import open_blobs
from nimbos.blobs.content import Aged, Blobs, Stored, hash_of

__all__ = ["Aged", "Blobs", "Stored", "hash_of", "open_blobs"]
