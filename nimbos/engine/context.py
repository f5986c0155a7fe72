"""Context tree: which token prefixes are in the model's memory, and who shares them.

Knows nothing of C or of time; `model.py` performs what this decides (`Copy`, `Drop`). Read `scheduler.py` next.

A radix tree over token ids, one root for each account, so that no account can notice another's prefixes by timing.
A *branch* is one sequence id of the model: a path from a root to a tip. Live branches belong to asks; a retired branch
stays as cache until its cells are needed. Invariants (`check` tests them):
    - a node's `users` are exactly the branches whose path goes through it, and there is at least one;
    - cells in use = sum of the lengths of all nodes: a shared token has one cell however many branches hold it;
    - no retired branch ends at a node that another branch passes: it would own an id and keep nothing alive;
    - a pinned node is not forgotten: of a retired branch that alone holds one, only what is behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

from nimbos.engine.pins import Pins


@dataclass(frozen=True, slots=True)
class Copy:
    """Sequence `target` takes over positions [0, end) of `source`."""

    source: int
    target: int
    end: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Sequence `branch` is forgotten from position `start` on."""

    branch: int
    start: int = 0


Operation = Copy | Drop


@dataclass(slots=True, eq=False)
class Node:
    """Tokens at positions [start, start + len(tokens)) below `parent`."""

    start: int
    tokens: list[int]
    parent: Node | None
    users: set[int] = field(default_factory=set)
    children: dict[int, list[Node]] = field(default_factory=dict)

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Match:
    """The longest prefix in memory: `length` tokens, the last of them in `node` (the root for length 0)."""

    length: int
    node: Node


@dataclass(frozen=True, slots=True)
class Idle:
    """A retired branch whose tokens from `start` on no other branch holds, and no pin keeps."""

    branch: int
    start: int


class NoRoom(Exception):
    """Neither a free sequence id nor a retired branch to forget."""


class ContextTree:
    def __init__(self, *, cells: int, sequences: int) -> None:
        """`cells`: tokens of KV in the pool; `sequences`: ids 0 … sequences − 1."""
        self.cells = cells
        self.used_cells = 0
        self._roots: dict[str, Node] = {}
        self._free = list(range(sequences - 1, -1, -1))
        self._tips: dict[int, Node] = {}
        self._account: dict[int, str] = {}
        self._retired: dict[int, int] = {}  # branch → time of last use, by `_clock`
        self._clock = count()
        self._pins = Pins(cells=cells, sequences=sequences)

    # --- looking

    def match(self, account: str, tokens: Sequence[int]) -> Match:
        """The longest prefix of `tokens` that some branch of this account holds."""
        root = self._roots.get(account)
        if root is None:
            return Match(0, Node(0, [], None))
        return self._descend(root, tokens, 0)

    def _descend(self, node: Node, tokens: Sequence[int], at: int) -> Match:
        best = Match(at, node)
        while at < len(tokens):
            candidates = node.children.get(tokens[at])
            if not candidates:
                return best
            if len(candidates) > 1:  # rare: two branches sampled the same tokens by themselves
                found = [self._enter(c, tokens, at) for c in candidates]
                return max([best, *found], key=lambda m: m.length)
            node = candidates[0]
            same = common_length(node.tokens, tokens, at)
            best = Match(at + same, node)
            if same < len(node.tokens):
                return best
            at += same
        return best

    def _enter(self, node: Node, tokens: Sequence[int], at: int) -> Match:
        same = common_length(node.tokens, tokens, at)
        whole = same == len(node.tokens)
        return self._descend(node, tokens, at + same) if whole else Match(at + same, node)

    @property
    def free_cells(self) -> int:
        return self.cells - self.used_cells

    def evictable_cells(self, keep: Match | None = None, *, live: Sequence[int] | None = None) -> int:
        """Cells that forgetting every retired branch would free, pins and `keep`'s path excepted. `live`: as if of the
        live branches only these were."""
        kept = set(self._pins.kept())
        node = keep.node if keep else None
        while node is not None:
            kept.add(id(node))
            node = node.parent
        held = self._tips.keys() - self._retired.keys() if live is None else set(live)
        total = 0
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            if node.parent is not None and id(node) not in kept and node.users.isdisjoint(held):
                total += len(node.tokens)
            for children in node.children.values():
                stack.extend(children)
        return total

    def length(self, branch: int) -> int:
        """Tokens of this branch in memory."""
        return self._tips[branch].end

    def tokens(self, branch: int) -> list[int]:
        path: list[list[int]] = []
        node: Node | None = self._tips[branch]
        while node is not None:
            path.append(node.tokens)
            node = node.parent
        return [token for tokens in reversed(path) for token in tokens]

    def account(self, branch: int) -> str:
        return self._account[branch]

    def oldest_idle(self, *, keep: Match | None = None) -> Idle | None:
        """The least recently used branch that holds something for itself alone; not the only one that holds `keep`."""
        kept = keep.node.users if keep is not None and keep.length and len(keep.node.users) == 1 else set()
        for branch in sorted(self._retired.keys() - kept, key=self._retired.__getitem__):
            pinned = self._own_pin(branch)
            shared = next((n for n in _path(self._tips[branch]) if n is pinned or len(n.users) > 1), None)
            start = shared.end if shared is not None else 0
            if start < self.length(branch):
                return Idle(branch, start)
        return None

    @property
    def branches(self) -> int:
        return len(self._tips)

    @property
    def pinned_cells(self) -> int:
        return self._pins.cells

    # --- changing

    def open(self, account: str, match: Match, now_ms: float = 0.0) -> tuple[int, list[Operation]]:
        """A new live branch that shares the matched prefix; pins on its way are renewed.

        Returns: its id, and what the model must do, in order. Raises: NoRoom.
        """
        operations: list[Operation] = []
        length, node = match.length, match.node
        if length:
            node = self._split(node, length - node.start)
            self._touch(node)
        if not self._free:
            operations += self._free_an_id(keep=node if length else None)
        branch = self._free.pop()
        if length:
            operations.append(Copy(next(iter(node.users)), branch, length))
        else:
            node = self._roots.setdefault(account, Node(0, [], None))
        self._tips[branch] = node
        self._account[branch] = account
        self._use(branch, node)
        self._pins.use(_path(node), now_ms)
        operations += self._release_covered(node)
        return branch, operations

    def extend(self, branch: int, tokens: Sequence[int]) -> None:
        """The model has computed `tokens` at the end of this branch."""
        if not tokens:
            return
        tip = self._tips[branch]
        self.used_cells += len(tokens)
        if tip.parent is not None and not tip.children and len(tip.users) == 1 and tip not in self._pins:
            tip.tokens.extend(tokens)
            return
        child = Node(tip.end, list(tokens), tip, {branch})
        tip.children.setdefault(child.tokens[0], []).append(child)
        self._tips[branch] = child

    def retire(self, branch: int) -> list[Operation]:
        """The ask is done: the branch stays as cache, unless another one already holds all of it."""
        tip = self._tips[branch]
        if tip.parent is None or len(tip.users) > 1 or self._duplicate(branch):
            return self.drop(branch)
        self._retired[branch] = next(self._clock)
        return []

    def drop(self, branch: int) -> list[Operation]:
        """Forgets a branch; cells that nobody else holds are free."""
        node: Node | None = self._tips.pop(branch)
        self._retired.pop(branch, None)
        account = self._account.pop(branch)
        while node is not None:
            parent = node.parent
            node.users.discard(branch)
            if not node.users and parent is not None:
                self._remove(node, parent)
            elif not node.users:
                del self._roots[account]
            node = parent
        self._free.append(branch)
        return [Drop(branch)]

    def cut(self, branch: int, start: int) -> list[Operation]:
        """A retired branch forgets [start, …), which it alone holds; all of it, where others hold the rest."""
        assert branch in self._retired, "a live branch was cut"
        node = self._tips[branch]
        while node.start > start:
            assert node.parent is not None and len(node.users) == 1
            node = node.parent
        end = self._split(node, start - node.start) if start > node.start else node.parent
        assert end is not None
        if end.parent is None or len(end.users) > 1:
            return self.drop(branch)
        return self._shorten(branch, end)

    def pin(self, branch: int, length: int, now_ms: float, duration_ms: float) -> None:
        """The first `length` tokens of this branch are kept for so long, also when it ends; as far as pins may go."""
        node: Node | None = self._tips[branch]
        assert length <= self.length(branch), "only what is in memory can be pinned"
        while node is not None and node.start >= length:
            node = node.parent
        if node is not None and node.parent is not None:
            node = self._split(node, length - node.start)
            self._pins.add(node, self._account[branch], now_ms, duration_ms)

    def expire(self, now_ms: float) -> None:
        """Pins whose time is over keep nothing any more."""
        self._pins.expire(now_ms)

    def make_room(self, cells: int, *, keep: Match | None = None, unpin: bool = False) -> list[Operation]:
        """Forgets the least recently used retired branches until `cells` are free, or none is left but `keep`'s and,
        without `unpin`, what is pinned."""
        operations: list[Operation] = []
        while self.free_cells < cells:
            dropped = self._forget_oldest(keep=keep.node if keep and keep.length else None)
            if not dropped and not (unpin and len(self._pins)):
                break
            if not dropped:
                self._pins.lose_one()
            operations += dropped
        return operations

    # --- inside

    def _forget_oldest(self, *, keep: Node | None) -> list[Operation]:
        """Up to its pin, where it has one that no other branch holds."""
        for branch in sorted(self._retired, key=self._retired.__getitem__):
            if keep is None or branch not in keep.users or len(keep.users) > 1:
                pinned = self._own_pin(branch)
                if pinned is None:
                    return self.drop(branch)
                if pinned is not self._tips[branch]:
                    return self._shorten(branch, pinned)
        return []

    def _free_an_id(self, *, keep: Node | None) -> list[Operation]:
        for branch in sorted(self._retired, key=self._retired.__getitem__):
            kept = keep is not None and branch in keep.users and len(keep.users) == 1
            if not kept and self._own_pin(branch) is None:
                return self.drop(branch)
        raise NoRoom

    def _own_pin(self, branch: int) -> Node | None:
        """The last pinned node that only this branch holds."""
        if not len(self._pins):
            return None
        return next((n for n in _path(self._tips[branch]) if n in self._pins and len(n.users) == 1), None)

    def _shorten(self, branch: int, end: Node) -> list[Operation]:
        """A retired branch forgets what is behind `end`, which nobody else holds."""
        node = self._tips[branch]
        while node is not end:
            assert node.parent is not None
            self._remove(node, node.parent)
            node = node.parent
        self._tips[branch] = end
        return [Drop(branch, end.end)]

    def _remove(self, node: Node, parent: Node) -> None:
        self.used_cells -= len(node.tokens)
        siblings = parent.children[node.tokens[0]]
        siblings.remove(node)
        if not siblings:
            del parent.children[node.tokens[0]]
        self._pins.remove(node)

    def _use(self, branch: int, node: Node | None) -> None:
        while node is not None:
            node.users.add(branch)
            node = node.parent

    def _touch(self, node: Node) -> None:
        for branch in node.users & self._retired.keys():
            self._retired[branch] = next(self._clock)

    def _release_covered(self, node: Node) -> list[Operation]:
        """Retired branches that end at `node`, which a new branch now holds as well, need no id any more."""
        ended = [b for b in node.users if b in self._retired and self._tips[b] is node and len(node.users) > 1]
        return [operation for branch in ended for operation in self.drop(branch)]

    def _duplicate(self, branch: int) -> bool:
        """Whether another path of the account holds the same tokens as this branch in other cells."""
        tip = self._tips[branch]
        parent = tip.parent
        if parent is None:
            return True
        if tip in self._pins:
            return False
        for twin in parent.children[tip.tokens[0]]:
            if twin is not tip:
                found = self._enter(twin, tip.tokens, 0) if twin.tokens[0] == tip.tokens[0] else None
                if found and found.length == len(tip.tokens):
                    return True
        return False

    def _split(self, node: Node, length: int) -> Node:
        """Cuts `node` after `length` tokens and returns the upper part; the lower keeps users and children."""
        if length >= len(node.tokens):
            return node
        upper = Node(node.start, node.tokens[:length], node.parent, set(node.users))
        assert node.parent is not None
        siblings = node.parent.children[node.tokens[0]]
        siblings[siblings.index(node)] = upper
        node.start += length
        node.tokens = node.tokens[length:]
        node.parent = upper
        upper.children[node.tokens[0]] = [node]
        return upper

    def check(self) -> None:
        """Asserts every invariant; for tests."""
        cells = 0
        seen: dict[int, Node] = {}
        nodes: list[Node] = []
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            nodes.append(node)
            assert node.users, "a node that nobody holds"
            assert node.parent is None or node.tokens, "an empty node"
            cells += len(node.tokens)
            for first, children in node.children.items():
                for child in children:
                    assert child.parent is node and child.start == node.end and child.tokens[0] == first
                    assert child.users <= node.users
                    stack.append(child)
            for branch in node.users:
                if branch not in seen or seen[branch].end <= node.end:
                    seen[branch] = node
        assert cells == self.used_cells, (cells, self.used_cells)
        assert seen.keys() == self._tips.keys()
        assert all(self._tips[b] is n for b, n in seen.items()), "a tip is not where its users end"
        assert self._tips.keys().isdisjoint(self._free)
        self._pins.check(set(map(id, nodes)))
        for branch in self._retired:
            assert len(self._tips[branch].users) == 1, "a retired branch that another one covers"


def _path(node: Node | None) -> Iterator[Node]:
    """From a node up to its root."""
    while node is not None:
        yield node
        node = node.parent


def common_length(tokens: Sequence[int], other: Sequence[int], at: int) -> int:
    """How many of `tokens` stand in `other` from position `at` on."""
    limit = min(len(tokens), len(other) - at)
    low, high = 0, limit
    if tokens[:limit] == other[at : at + limit]:
        return limit
    while high - low > 1:  # invariant: [0, low) is the same, [0, high) is not
        middle = (low + high) // 2
        if tokens[low:middle] == other[at + low : at + middle]:
            low = middle
        else:
            high = middle
    return low
