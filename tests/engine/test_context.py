"""The context tree against a naive reference: every branch is simply its whole token list."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nimbos.engine.context import ContextTree, Copy, Drop, NoRoom, Operation, common_length

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=12)
ACCOUNTS = st.sampled_from(("anna", "bert"))
CELLS, SEQUENCES = 60, 6


class Tree(RuleBasedStateMachine):
    """`memory` is what the model would hold if it did the operations: it must agree with the tree at all times."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = ContextTree(cells=CELLS, sequences=SEQUENCES)
        self.memory: dict[int, list[int]] = {}
        self.account: dict[int, str] = {}
        self.live: list[int] = []

    def perform(self, operations: list[Operation]) -> None:
        for operation in operations:
            if isinstance(operation, Copy):
                assert operation.target not in self.memory, "copied over a sequence in use"
                assert len(self.memory[operation.source]) >= operation.end
                self.memory[operation.target] = self.memory[operation.source][: operation.end]
            else:
                assert isinstance(operation, Drop)
                self.memory.pop(operation.branch, None)

    @rule(account=ACCOUNTS, tokens=TOKENS)
    def open(self, account: str, tokens: list[int]) -> None:
        match = self.tree.match(account, tokens)
        known = [common_length(held, tokens, 0) for b, held in self.memory.items() if self.account[b] == account]
        assert match.length == max(known, default=0), "not the longest prefix of this account"
        self.perform(self.tree.make_room(len(tokens) - match.length, keep=match))
        try:
            branch, operations = self.tree.open(account, match)
        except NoRoom:
            assert len(self.live) == SEQUENCES or self.tree.branches == SEQUENCES
            return
        self.perform(operations)
        self.memory.setdefault(branch, [])
        self.account[branch] = account
        assert self.memory[branch] == tokens[: match.length]
        self.live.append(branch)
        rest = tokens[match.length :]
        if len(rest) <= self.tree.free_cells:
            self.tree.extend(branch, rest)
            self.memory[branch].extend(rest)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), tokens=TOKENS)
    def extend(self, data: st.DataObject, tokens: list[int]) -> None:
        branch = data.draw(st.sampled_from(self.live))
        self.perform(self.tree.make_room(len(tokens)))
        if len(tokens) <= self.tree.free_cells:
            self.tree.extend(branch, tokens)
            self.memory[branch].extend(tokens)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), keep=st.booleans())
    def end(self, data: st.DataObject, keep: bool) -> None:
        branch = data.draw(st.sampled_from(self.live))
        self.live.remove(branch)
        self.perform(self.tree.retire(branch) if keep else self.tree.drop(branch))

    @rule(cells=st.integers(1, CELLS))
    def evict(self, cells: int) -> None:
        self.perform(self.tree.make_room(cells))

    @invariant()
    def agrees(self) -> None:
        self.tree.check()
        assert self.tree.used_cells <= CELLS
        assert self.tree.branches == len(self.memory)
        for branch, tokens in self.memory.items():
            assert self.tree.tokens(branch) == tokens
        assert set(self.live) <= set(self.memory)


TestTree = Tree.TestCase
TestTree.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_shared_prefix_has_each_cell_once() -> None:
    tree = ContextTree(cells=1000, sequences=20)
    first, _ = tree.open("a", tree.match("a", [1]))
    tree.extend(first, list(range(100)))
    for number in range(15):
        branch, operations = tree.open("a", tree.match("a", [*range(100), 500 + number]))
        assert operations == [Copy(first, branch, 100)]
        tree.extend(branch, [500 + number])
    assert tree.used_cells == 115


def test_one_account_never_sees_the_prefix_of_another() -> None:
    tree = ContextTree(cells=100, sequences=4)
    branch, _ = tree.open("anna", tree.match("anna", [1, 2, 3]))
    tree.extend(branch, [1, 2, 3])
    assert tree.match("bert", [1, 2, 3]).length == 0


def test_the_least_recently_used_branch_is_forgotten_first() -> None:
    tree = ContextTree(cells=30, sequences=8)
    for start in (0, 100, 200):
        branch, _ = tree.open("a", tree.match("a", [start]))
        tree.extend(branch, list(range(start, start + 10)))
        tree.retire(branch)
    used, _ = tree.open("a", tree.match("a", [*range(10), 7]))  # a hit makes the first one young
    tree.extend(used, [])
    tree.retire(used)
    tree.make_room(5)
    assert tree.match("a", list(range(100, 110))).length == 0
    assert tree.match("a", list(range(10))).length == 10
    assert tree.match("a", list(range(200, 210))).length == 10


def test_common_length_finds_the_first_difference() -> None:
    assert common_length([1, 2, 3], [9, 1, 2, 3, 4], 1) == 3
    assert common_length([1, 2, 3], [1, 2, 9], 0) == 2
    assert common_length([5], [1], 0) == 0
    assert common_length([], [1], 0) == 0
