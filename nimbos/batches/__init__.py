"""Files and batches: many requests in one file, answered when there is room. Read `words.py`, then `jobs.py`."""

from nimbos.batches.endpoint import AnswerJournal, Endpoint, Perform, Refuse, Reply
from nimbos.batches.jobs import Batches
from nimbos.batches.rehearsal import rehearsal_source
from nimbos.batches.uploads import Part, Upload, UploadState
from nimbos.batches.words import TEST_MODEL, Batch, Fault, File, State

__all__ = [
    "TEST_MODEL",
    "AnswerJournal",
    "Batch",
    "Batches",
    "Endpoint",
    "Fault",
    "File",
    "Part",
    "Perform",
    "Refuse",
    "Reply",
    "State",
    "Upload",
    "UploadState",
    "rehearsal_source",
]
