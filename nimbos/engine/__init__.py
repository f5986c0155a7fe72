"""The engine: an ask in, chunks out. Knows no users, no HTTP and no database. Its door is `Engine`."""

from nimbos.engine.engine import Engine
from nimbos.engine.protocol import STEP_BUCKETS_S, EngineStats

__all__ = ["STEP_BUCKETS_S", "Engine", "EngineStats"]
