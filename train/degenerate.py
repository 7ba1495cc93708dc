"""When an answer of the target is not worth learning: rules that look at its tokens and nothing else.

Each rule has a name, which `data.drop` lists. The whole conversation is dropped, later turns would build on the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmspec.types import Output, Target
from train.answers import DROPPED

LOOP_BLOCK = 32
"""Tokens of the longest block whose repetition is looked for."""
LOOP_TIMES = 4
"""How often a block must have been said in a row."""
LOOP_TOKENS = 32
"""How long the repetition must be at least, so that "no, no, no, no" may be said."""


def fault(output: Output, text: str, target: Target, rules: Sequence[str]) -> str | None:
    """Why an answer is degenerate: the first rule that it breaks, in the words of the quarantine; None: it is not.

    Args:
        output: as the loop returned it.
        text: its text, without special tokens.
        target: that wrote it.
        rules: of `mmspec.recipe.DROP_RULES`:
            special: a token before the end is a special one or stands for a picture; the text would lack it.
            empty: there is no text.
            loop: it ends in a loop, see `loop`.
            cut: it reached its limit before a stop token.
    """
    stopped = output.finish_reason == "stop"
    tokens = output.tokens[:-1] if stopped else output.tokens
    if "special" in rules and (found := sorted(target.special_ids.intersection(tokens))):
        return f"{DROPPED}, it holds a special token: id {found[0]}"
    if "empty" in rules and not text:
        return f"{DROPPED}, it is empty"
    if "loop" in rules and (block := loop(tokens)):
        return f"{DROPPED}, it ends in a loop: the last {block} of {len(tokens)} tokens over and over"
    if "cut" in rules and not stopped:
        return f"{DROPPED}, it was cut at its limit: {len(tokens)} tokens"
    return None


def loop(tokens: Sequence[int]) -> int:
    """Length of the block that an answer ends in the repetition of; 0 when it does not.

    The last max(32, 4 p) tokens are one block of p tokens over and over, for a p of at most 32: eight times a block of
    four, or four times a sentence of thirty.
    """
    for block in range(1, LOOP_BLOCK + 1):
        span = max(LOOP_TOKENS, LOOP_TIMES * block)
        if span > len(tokens):
            return 0
        end = tokens[-span:]
        if end[block:] == end[:-block]:
            return block
    return 0
