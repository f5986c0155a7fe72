"""What a fold is made of: records, and the rules for asks, calls and the context. `kernel/fold.py` is their door."""
