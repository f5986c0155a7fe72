"""Drivers: what performs a syscall once the gate has let it through. Three kinds, by what a crash can leave:

    internal  `send`, `spawn`, `pin`: rows of the log's own transaction, so there is nothing in between
    waiting   `ask`, `receive`, `wait`, `sleep`: looked at again whenever something arrived; `read` answers at once
    outside   `tool`: an intent is durable before it runs, and what happens then is the effect table's to say

Read `answers.py` for what a driver returns, and `../gate.py` for who calls it.
"""
