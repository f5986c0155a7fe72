"""A byte-level vocabulary of a few hundred pieces, with the marks that chat models have."""

from __future__ import annotations

from nimbos.engine.vocab import Vocab

WORDS = (
    b"true", b"false", b"null", b'{"', b'"}', b'": ', b'": "', b'", "', b'"name', b"name", b"age", b" the", b"the",
    b"ing", b" and", b"\n\n", b"  ", b"</", b"think", b">\n\n", b"END", b"ND", b" of", b"he", b"ll", b"lo", b"llo",
)  # fmt: skip
CONTROL = (b"<|im_start|>", b"<|im_end|>", b"<|endoftext|>")
ADDED = (b"<think>", b"</think>", b"<tool_call>")  # user-defined: text, but one token


def small_vocab(*, added: tuple[bytes, ...] = ADDED, control: tuple[bytes, ...] = CONTROL, ends: bool = True) -> Vocab:
    """Ids: 0-255 the bytes, then WORDS, `control`, `added`."""
    pieces = tuple(bytes([byte]) for byte in range(256)) + WORDS + control + added
    ids = {piece: token for token, piece in enumerate(pieces)}
    hidden = frozenset(ids[piece] for piece in control)
    longest = max(map(len, pieces))

    def tokenize(text: bytes, parse_special: bool) -> list[int]:
        out: list[int] = []
        at = 0
        while at < len(text):
            for length in range(longest, 0, -1):
                token = ids.get(text[at : at + length])
                if token is not None and (parse_special or token not in hidden):
                    out.append(token)
                    at += len(pieces[token])
                    break
        return out

    eog = frozenset(ids[piece] for piece in control[1:]) if ends else frozenset()
    return Vocab(
        pieces=pieces,
        control=hidden,
        eog=eog,
        eos=ids[control[1]] if ends else None,
        bos=None,
        tokenize=tokenize,
    )
