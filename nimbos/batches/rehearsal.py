"""The model `batch-test-model`: one fixed answer without inference, to check one's files before they cost anything."""

from __future__ import annotations

import hashlib

from nimbos.batches.words import TEST_MODEL
from nimbos.engine.script import Reply, Script
from nimbos.engine.scripted import ScriptedSource

_TEXT = "This is a test answer: your file is read and its lines are answered. No model was asked."


def rehearsal_source() -> ScriptedSource:
    digest = hashlib.sha256(_TEXT.encode()).hexdigest()
    return ScriptedSource(Script((), Reply(text=_TEXT)), model_id=TEST_MODEL, model_hash=digest)
