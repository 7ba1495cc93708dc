"""The closed vocabulary of the synthetic corpus: what can be seen and how it is named."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (240, 215, 30),
    "green": (40, 150, 60),
    "blue": (35, 80, 215),
    "purple": (130, 50, 165),
    "pink": (250, 145, 190),
    "black": (25, 25, 28),
}

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "star", "cross", "ring")

POSITIONS: tuple[str, ...] = (
    "top left",
    "top middle",
    "top right",
    "middle left",
    "center",
    "middle right",
    "bottom left",
    "bottom middle",
    "bottom right",
)
"""Names of the nine grid cells in reading order."""

ROWS: tuple[str, ...] = ("top", "middle", "bottom")

NUMBERS: tuple[str, ...] = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
)

WORDS: tuple[str, ...] = (
    "OPEN",
    "EXIT",
    "STOP",
    "SALE",
    "CAFE",
    "BANK",
    "HOTEL",
    "PARK",
    "MILK",
    "BREAD",
    "MUSIC",
    "BOOKS",
    "PIZZA",
    "TAXI",
    "TRAIN",
    "HOUSE",
    "MARKET",
    "GARDEN",
    "RIVER",
    "OCEAN",
    "WINTER",
    "SUMMER",
    "COFFEE",
    "FLOWER",
    "DOCTOR",
    "POLICE",
    "DANGER",
    "SLOW",
    "FAST",
    "NORTH",
    "SOUTH",
    "EAST",
    "WEST",
    "LEMON",
    "APPLE",
    "HONEY",
    "TIGER",
    "EAGLE",
    "HORSE",
    "PAPER",
    "PHONE",
    "RADIO",
    "LIGHT",
    "WATER",
    "STONE",
    "CLOUD",
    "BEACH",
    "MOVIE",
)
"""Words that can stand on a sign: four to six letters, so that each fits into 96 pixels."""

TOPICS: tuple[str, ...] = (
    "general vqa",
    "text vqa",
    "image captioning",
    "chart understanding",
    "complex reasoning pro",
    "multi-turn conversation",
)
"""MMSpec's topics in MMSpec's order."""


def article(noun_phrase: str) -> str:
    """The noun phrase with its indefinite article: 'an orange star', 'a red ring'."""
    return ("an " if noun_phrase[0] in "aeio" else "a ") + noun_phrase


def plural(noun: str) -> str:
    """The plural of a shape's name."""
    return noun + ("es" if noun.endswith("s") else "s")


def counted(number: int, noun: str) -> str:
    """'one star', 'three crosses'; the number as a word."""
    return f"{NUMBERS[number]} {noun if number == 1 else plural(noun)}"


def listed(parts: list[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
