"""The context tree against a naive reference: every branch is simply its whole token list."""

from __future__ import annotations

import pytest
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
        self.now = 0

    def perform(self, operations: list[Operation]) -> None:
        for operation in operations:
            if isinstance(operation, Copy):
                assert operation.target not in self.memory, "copied over a sequence in use"
                assert len(self.memory[operation.source]) >= operation.end
                self.memory[operation.target] = self.memory[operation.source][: operation.end]
            else:
                assert isinstance(operation, Drop)
                if operation.start:
                    del self.memory[operation.branch][operation.start :]
                else:
                    self.memory.pop(operation.branch, None)

    @rule(account=ACCOUNTS, tokens=TOKENS)
    def open(self, account: str, tokens: list[int]) -> None:
        match = self.tree.match(account, tokens)
        known = [common_length(held, tokens, 0) for b, held in self.memory.items() if self.account[b] == account]
        assert match.length == max(known, default=0), "not the longest prefix of this account"
        self.perform(self.tree.make_room(len(tokens) - match.length, keep=match))
        try:
            branch, operations = self.tree.open(account, match, self.now)
        except NoRoom:
            assert self.tree.branches == SEQUENCES
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

    @precondition(lambda self: any(self.memory[branch] for branch in self.live))
    @rule(data=st.data(), duration=st.integers(1, 20))
    def pin(self, data: st.DataObject, duration: int) -> None:
        branch = data.draw(st.sampled_from([branch for branch in self.live if self.memory[branch]]))
        length = data.draw(st.integers(1, len(self.memory[branch])))
        self.tree.pin(branch, length, self.now, duration)

    @rule(ticks=st.integers(1, 10))
    def pass_time(self, ticks: int) -> None:
        self.now += ticks
        self.tree.expire(self.now)

    @rule(data=st.data())
    def give_way(self, data: st.DataObject) -> None:
        """What some live ones would free is what they do free, with all that is idle; pins keep theirs."""
        staying = [branch for branch in self.live if data.draw(st.booleans())]
        promised = self.tree.free_cells + self.tree.evictable_cells(live=staying)
        for branch in [branch for branch in self.live if branch not in staying]:
            self.live.remove(branch)
            self.perform(self.tree.retire(branch))
        self.perform(self.tree.make_room(CELLS))
        assert self.tree.free_cells == promised

    @rule(cells=st.integers(1, CELLS), unpin=st.booleans())
    def evict(self, cells: int, unpin: bool) -> None:
        self.perform(self.tree.make_room(cells, unpin=unpin))

    @invariant()
    def agrees(self) -> None:
        self.tree.check()
        assert self.tree.used_cells <= CELLS
        assert self.tree.branches == len(self.memory)
        for branch, tokens in self.memory.items():
            assert self.tree.tokens(branch) == tokens
        assert set(self.live) <= set(self.memory)
        assert self.tree.pinned_cells <= CELLS // 2


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


def test_a_context_of_which_a_part_is_used_again_is_young() -> None:
    """Whoever asked that will go on with it more likely than with what nobody came near."""
    tree = ContextTree(cells=30, sequences=8)
    for start in (0, 100, 200):
        retired(tree, "a", list(range(start, start + 10)))
    tree.open("a", tree.match("a", [0, 1, 2, 7]))
    tree.make_room(1)
    assert [tree.match("a", list(range(start, start + 10))).length for start in (0, 100, 200)] == [10, 0, 10]


def test_common_length_finds_the_first_difference() -> None:
    assert common_length([1, 2, 3], [9, 1, 2, 3, 4], 1) == 3
    assert common_length([1, 2, 3], [1, 2, 9], 0) == 2
    assert common_length([5], [1], 0) == 0
    assert common_length([], [1], 0) == 0


def retired(
    tree: ContextTree, account: str, tokens: list[int], *, pin: int = 0, now: int = 0, duration: int = 100
) -> None:
    """An ask that is over; `pin` of its tokens are to be kept."""
    match = tree.match(account, tokens)
    branch, _ = tree.open(account, match, now)
    tree.extend(branch, tokens[match.length :])
    if pin:
        tree.pin(branch, pin, now, duration)
    tree.retire(branch)


def test_what_is_pinned_outlives_what_was_used_later() -> None:
    tree = ContextTree(cells=60, sequences=8)
    retired(tree, "a", list(range(20)), pin=12)
    for start in (100, 200, 300, 400):
        retired(tree, "a", list(range(start, start + 10)))
    operations = tree.make_room(48)
    assert Drop(next(o.branch for o in operations if o.start), 12) in operations, "only what is behind the pin"
    assert tree.match("a", list(range(20))).length == 12
    assert tree.used_cells == 12 == tree.pinned_cells
    assert tree.make_room(60) == [], "pinned cells were given away"
    tree.check()


def test_a_pin_ends_by_time_and_is_renewed_by_use() -> None:
    tree = ContextTree(cells=60, sequences=8)
    retired(tree, "a", list(range(20)), pin=20, now=0, duration=100)
    retired(tree, "a", [*range(20), 7], now=90)
    tree.expire(150)
    assert tree.pinned_cells == 20
    tree.expire(190)
    assert tree.pinned_cells == 0
    tree.make_room(60)
    assert tree.used_cells == 0


def test_the_account_that_pins_most_loses_its_oldest() -> None:
    tree = ContextTree(cells=80, sequences=32)
    retired(tree, "modest", list(range(10)), pin=10)
    for start in (100, 200, 300, 400):
        retired(tree, "greedy", list(range(start, start + 10)), pin=10)
    assert tree.pinned_cells == 40
    tree.make_room(80)
    assert tree.match("modest", list(range(10))).length == 10
    assert tree.match("greedy", list(range(100, 110))).length == 0
    assert all(tree.match("greedy", list(range(s, s + 10))).length == 10 for s in (200, 300, 400))


def test_a_prefix_that_others_hold_is_pinned_once() -> None:
    tree = ContextTree(cells=100, sequences=16)
    for last in (50, 60, 70):
        retired(tree, "a", [*range(20), last, last + 1], pin=20)
    assert tree.pinned_cells == 20
    tree.make_room(80)
    assert tree.match("a", [*range(20), 50]).length == 20
    assert tree.used_cells == 20
    assert tree.branches == 1


def test_pins_leave_sequence_ids_to_others() -> None:
    tree = ContextTree(cells=1000, sequences=8)
    for start in range(0, 400, 20):
        retired(tree, "a", list(range(start, start + 10)), pin=10)
    live = [tree.open("b", tree.match("b", [n]))[0] for n in range(6)]
    assert len(set(live)) == 6


def test_what_somebody_is_to_go_on_with_is_not_forgotten_for_their_room() -> None:
    tree = ContextTree(cells=30, sequences=8)
    for start in (0, 100):
        retired(tree, "a", list(range(start, start + 10)))
    match = tree.match("a", [0, 1, 2, 7])
    tree.make_room(30, keep=match)
    assert (match.length, tree.free_cells) == (3, 20)
    assert tree.match("a", list(range(10))).length == 10


def test_the_only_holder_of_what_somebody_is_to_go_on_with_keeps_its_id() -> None:
    tree = ContextTree(cells=30, sequences=2)
    retired(tree, "a", list(range(10)))
    live, _ = tree.open("b", tree.match("b", [1]))
    with pytest.raises(NoRoom):
        tree.open("a", tree.match("a", [0, 1, 2, 7]))
    tree.check()
    assert tree.match("a", list(range(10))).length == 10
    tree.drop(live)
    tree.open("a", tree.match("a", [0, 1, 2, 7]))


def test_of_two_that_computed_the_same_by_themselves_one_stays() -> None:
    tree = ContextTree(cells=30, sequences=8)
    first, second = (tree.open("a", tree.match("a", [1]))[0] for _ in range(2))
    for branch in (first, second):
        tree.extend(branch, list(range(10)))
    assert tree.retire(first) == [Drop(first)]
    assert tree.retire(second) == []
    assert (tree.used_cells, tree.match("a", list(range(10))).length) == (10, 10)


def test_a_pinned_context_stays_though_another_holds_the_same_tokens() -> None:
    """The other one is nobody's promise, and may be forgotten."""
    tree = ContextTree(cells=30, sequences=8)
    other, own = (tree.open("a", tree.match("a", [1]))[0] for _ in range(2))
    for branch in (other, own):
        tree.extend(branch, list(range(10)))
    tree.pin(own, 10, 0, 100)
    assert tree.retire(own) == []
    tree.drop(other)
    tree.make_room(30)
    assert (tree.match("a", list(range(10))).length, tree.pinned_cells) == (10, 10)


def test_of_two_pins_on_one_prefix_the_longer_one_counts() -> None:
    tree = ContextTree(cells=60, sequences=8)
    retired(tree, "a", list(range(20)), pin=20, now=0, duration=100)
    retired(tree, "a", [*range(20), 7], pin=20, now=5, duration=10)
    tree.expire(104)
    assert tree.pinned_cells == 20
    tree.expire(105)
    assert tree.pinned_cells == 0
