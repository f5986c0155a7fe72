"""The tables of every part, a file each, on one `metadata`."""
