"""Whether two questions are one: the same words, or nearly, whatever stands around them.

Invariant: texts are compared as words, without case, punctuation, width of letters or picture marks. A question occurs
in a text if some stretch of the text's words differs from it by at most 15% of its words, so that "Answer with a single
word" behind it hides nothing. The index finds every such text: of a question of eight words or more that is changed by
so little, four words in a row are whole somewhere.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence

CHANGED = 0.15
"""Share of a question's words that may differ."""
MIN_WORDS = 8
"""Shorter questions are asked of any picture; the index leaves them out."""
GRAM = 4

_MARK = re.compile(r"<image(?: \d+)?>")
_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3"
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W_{_IDEOGRAPHS}]+")


def words(text: str) -> tuple[str, ...]:
    """The words of a text; where a script does not part them, its characters."""
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", _MARK.sub(" ", text)).casefold()))


def edits(question: Sequence[str], text: Sequence[str]) -> int:
    """Words to insert, drop or replace until the question is a stretch of the text."""
    row = [0] * (len(text) + 1)
    for n, word in enumerate(question, start=1):
        before, row[0] = row[0], n
        for place, other in enumerate(text, start=1):
            before, row[place] = row[place], min(before + (word != other), row[place] + 1, row[place - 1] + 1)
    return min(row)


def allowed(question: Sequence[str]) -> int:
    """Edits within CHANGED."""
    return int(CHANGED * len(question))


def occurs(question: Sequence[str], text: Sequence[str]) -> bool:
    """Whether a question occurs in a text."""
    return bool(question) and edits(question, text) <= allowed(question)


class QuestionIndex:
    """Finds which of many questions occur in a text.

    Args:
        questions: words of each; those below MIN_WORDS are never found.
    """

    def __init__(self, questions: Sequence[tuple[str, ...]]) -> None:
        self._questions = questions
        self._places: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for number, question in enumerate(questions):
            if len(question) >= MIN_WORDS:
                for gram in _grams(question):
                    self._places[gram].append(number)

    def find(self, text: tuple[str, ...]) -> list[tuple[int, int]]:
        """Numbers of the questions that occur in a text, each with its edits."""
        shared: dict[int, int] = defaultdict(int)
        for gram in set(_grams(text)):
            for number in self._places.get(gram, ()):
                shared[number] += 1
        found = []
        for number, n in shared.items():
            question = self._questions[number]
            # An edit breaks no more than GRAM of them.
            whole = len(question) - GRAM + 1 - GRAM * allowed(question)
            if n >= whole and (changed := edits(question, text)) <= allowed(question):
                found.append((number, changed))
        return found


def _grams(text: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [text[at : at + GRAM] for at in range(len(text) - GRAM + 1)]
