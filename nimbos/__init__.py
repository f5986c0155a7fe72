"""Nimbos: an AI cloud you own, with a language model as its operating system. Read `docs/architecture.md` next."""

__version__ = "0.1.0"
