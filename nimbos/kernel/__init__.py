"""The kernel: agents as durable processes. Read `words.py` and `events.py` first, `fold.py` and `runner.py` next."""

__all__: list[str] = []
