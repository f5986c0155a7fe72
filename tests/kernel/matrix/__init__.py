"""The kill matrix: a server that dies, or whose database fails, at any write that is chosen. Read `doom.py` first."""
