"""Two made languages and their grammar, in WMT's files: what is translated needs a lexicon, an order and agreement.

The source says "the red birds see a ship under the lake now", with words of its own. The target puts the adverb first
and the verb last, with its tense before it; a preposition stands behind its place and an adjective behind its noun;
determiner, noun and adjective have endings for the noun's gender, number and case. No sentence to test on is among
those to train on.
"""

import random
from dataclasses import dataclass
from pathlib import Path

SIZES = {"tiny": (4000, 200), "small": (40_000, 1000)}  # pairs to train on and to test on
SEED = 14  # of the lexicon: the languages are always the same


@dataclass(frozen=True)
class Word:
    """A word in both languages; a noun has a gender."""

    source: str
    target: str
    gender: int = 0


def _lexicon() -> dict[str, list[Word]]:
    chance = random.Random(SEED)
    taken: set[str] = set()

    def word(consonants: str, vowels: str, syllables: int) -> str:
        while True:
            made = "".join(chance.choice(consonants) + chance.choice(vowels) for _ in range(syllables))
            if made not in taken:
                taken.add(made)
                return made

    counts = {"noun": 32, "adjective": 16, "verb": 16, "preposition": 4, "adverb": 4}
    return {
        kind: [Word(word("bdfglmnprst", "aeio", 2), word("hjkvwzbdgrn", "aouy", 2), gender=i % 3) for i in range(count)]
        for kind, count in counts.items()
    }


LEXICON = _lexicon()
DETERMINERS = ("the", "a")
CASE = ("", "m", "s")  # subject, object, after a preposition
GENDER = ("e", "o", "i")
TENSES = {"": "", "ed": "ta", "ing": "ri"}


def write(folder: Path, *, size: str, seed: int) -> None:
    """Make `train`, `newstest2013` and `newstest2014`, `.en` and `.de`, in `folder`."""
    train, test = SIZES[size]
    chance = random.Random(seed)
    pairs: dict[str, str] = {}
    while len(pairs) < train + 2 * test:
        source, target = sentence(chance)
        pairs[source] = target
    lines = iter(pairs.items())
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("newstest2013", test), ("newstest2014", test), ("train", train)):
        some = [next(lines) for _ in range(count)]
        for side, language in enumerate(("en", "de")):
            text = "".join(f"{pair[side]}\n" for pair in some)
            (folder / f"{name}.{language}").write_text(text, encoding="utf-8")


def sentence(chance: random.Random) -> tuple[str, str]:
    """A sentence and its translation."""
    subject, theirs = _noun_phrase(chance, case=0)
    thing, its = _noun_phrase(chance, case=1)
    verb, (ending, particle) = chance.choice(LEXICON["verb"]), chance.choice(list(TENSES.items()))
    source, target = [*subject, verb.source + ending, *thing], [*theirs, *its]
    if chance.random() < 0.4:
        preposition = chance.choice(LEXICON["preposition"])
        place, there = _noun_phrase(chance, case=2)
        source, target = [*source, preposition.source, *place], [*target, *there, preposition.target]
    if particle:
        target.append(particle)
    target.append(verb.target)
    if chance.random() < 0.3:
        adverb = chance.choice(LEXICON["adverb"])
        source, target = [*source, adverb.source], [adverb.target, *target]
    return " ".join(source) + ".", " ".join(target) + "."


def _noun_phrase(chance: random.Random, *, case: int) -> tuple[list[str], list[str]]:
    noun, definite, plural = chance.choice(LEXICON["noun"]), chance.random() < 0.5, chance.random() < 0.4
    ending = GENDER[noun.gender] + ("n" if plural else "")
    source = [DETERMINERS[0] if definite else DETERMINERS[1], noun.source + ("s" if plural else "")]
    target = [("d" if definite else "u") + ending + CASE[case], noun.target + ("n" if plural else "")]
    if chance.random() < 0.4:
        adjective = chance.choice(LEXICON["adjective"])
        source.insert(1, adjective.source)
        target.append(adjective.target + ending)
    return source, target
