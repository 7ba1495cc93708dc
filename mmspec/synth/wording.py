"""Sentences with free choices: '[It|The picture] shows {name}.'

A question is worded freely; the way it is worded sets a mood, and the answer follows that mood in most of its choices.
So sampled text has real entropy, a good model can be confident about most choices, and greedy answers still vary.
"""

import random
import re
from collections.abc import Sequence

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
FOLLOWS_MOOD = 0.6


class Wording:
    """Expands templates for one turn.

    Args:
        rng: Source of all choices.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.mood = 0
        self._site = 0

    def ask(self, templates: Sequence[str], **fields: object) -> str:
        """A question from one of `templates`; the index of that template becomes the mood of the answer."""
        self.mood = self.rng.randrange(len(templates))
        self._site = 0
        return self._expand(templates[self.mood], bias=False, fields=fields)

    def say(self, template: str, **fields: object) -> str:
        """A sentence of the answer, expanded in the mood of the question.

        Args:
            template: Text with `[a|b|c]` choices (nested ones too) and `{field}` places.
            **fields: Values of the fields.

        Returns:
            The expanded text.
        """
        return self._expand(template, bias=True, fields=fields)

    def pick(self, number: int) -> int:
        """An index below `number`, biased to the mood."""
        self._site += 1
        if self.rng.random() < FOLLOWS_MOOD:
            return (self.mood + self._site) % number
        return self.rng.randrange(number)

    def _expand(self, template: str, bias: bool, fields: dict[str, object]) -> str:
        while (found := _CHOICE.search(template)) is not None:
            options = found.group(1).split("|")
            index = self.pick(len(options)) if bias else self.rng.randrange(len(options))
            template = template[: found.start()] + options[index] + template[found.end() :]
        return template.format(**fields)
