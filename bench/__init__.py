"""Measurements: one script for each question, both sides in one run, a ratio as the result. README.md says how."""
