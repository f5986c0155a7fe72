"""Drives a grammar with the real llguidance; its tokens are the 256 bytes and a few control tokens."""

from dataclasses import dataclass

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from nimbos.types import Grammar


class _Bytes:
    eos_token_id = 256
    bos_token_id = None

    def __init__(self, control: tuple[str, ...]) -> None:
        self.tokens = [bytes([value]) for value in range(256)] + [b"\xff" + c.encode() for c in ("<|end|>", *control)]
        self.special_token_ids = list(range(256, len(self.tokens)))

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


@dataclass(frozen=True)
class Outcome:
    """`taken`: how much of the text the grammar let through. `complete`: it may end there."""

    taken: str
    complete: bool
    forced: str


def drive(grammar: Grammar, text: str, *, control: tuple[str, ...] = ()) -> Outcome:
    """Control tokens stand in `text` as they are written, and are fed as one token."""
    tokenizer = LLTokenizer(TokenizerWrapper(_Bytes(control)), n_vocab=257 + len(control))
    compile_ = LLMatcher.grammar_from_json_schema if grammar.kind == "json_schema" else LLMatcher.grammar_from_lark
    matcher = LLMatcher(tokenizer, compile_(grammar.source))
    assert not matcher.is_error(), matcher.get_error()
    ids, at = [], 0
    while at < len(text):
        special = next((c for c in control if text.startswith(c, at)), None)
        ids += [(257 + control.index(special), special)] if special else [(b, None) for b in text[at].encode()]
        at += len(special or text[at])
    taken = bytearray()
    for token, special in ids:
        if matcher.try_consume_tokens([token]) == 0:
            break
        taken += special.encode() if special else bytes([token])
    forced = matcher.compute_ff_bytes().decode(errors="replace") if len(taken) == len(text.encode()) else ""
    return Outcome(taken.decode(errors="replace"), matcher.is_accepting(), forced)
