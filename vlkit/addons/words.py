"""Words for things, found in captions without a tagger: the stand-in for a word list that is not at hand.

caption_nouns(["A dog on a sofa .", "Two dogs in the snow ."], min_captions=2)      # ["dog"]

A word counts as a noun where it ends a phrase: behind an article or a number, and before a verb, a preposition or the
end. Plurals are brought to the singular by rule, so a few words come out odd.
"""

import re
from collections import Counter
from collections.abc import Iterable

# Behind these a phrase begins, and before those it ends.
_OPENS = "a|an|the|one|two|three|four|five|several|some|many|his|her|their|its|another"
_ENDS = (
    "is|are|was|in|on|at|with|and|or|of|near|by|next|to|from|for|over|under|behind|beside|into|onto|through|across|"
    "around|that|which|while|as|has|have|who|holding|sitting|standing|wearing|running|walking|jumping|playing|riding|"
    "laying|lying|looking|sits|stands|runs|walks|jumps|plays|holds|wears|rides|looks|watches|lays|lies|smiles|poses|"
    "swims|climbs|catches|throws|carries|chases|leaps|does|up|down|along|against|during|inside|outside|above|below"
)
_NOUN = re.compile(rf"\b(?:{_OPENS}) (?:[a-z]+ ){{0,2}}?([a-z]{{3,}})(?= (?:{_ENDS})\b| ?[.,!?;:]|$)")
# They end phrases, but are no things, or are what every picture is.
_NO_THINGS_LISTED = (
    "image photo picture photograph photographs view shot close closeup front top side back middle center other one "
    "left right same way lot group couple pair bunch number piece kind type part edge end background foreground "
    "distance area thing things something someone him her them each all both these those black white red blue green "
    "yellow brown orange pink purple grey gray is are was in on at with and of to from for by has have"
)
_NO_THINGS = frozenset(_NO_THINGS_LISTED.split())
# Words in -ing that are things; all others are verbs.
_THINGS_IN_ING = frozenset(
    {"building", "ceiling", "clothing", "king", "painting", "ring", "string", "swing", "wedding", "wing", "railing"}
)
_IRREGULAR = {
    "men": "man", "women": "woman", "people": "person", "children": "child", "feet": "foot", "teeth": "tooth",
    "mice": "mouse", "geese": "goose", "knives": "knife", "leaves": "leaf", "shelves": "shelf", "wolves": "wolf",
    "sheep": "sheep", "skis": "ski", "buses": "bus", "glasses": "glasses", "scissors": "scissors", "pants": "pants",
    "jeans": "jeans", "shorts": "shorts", "tennis": "tennis",
}  # fmt: skip


def nouns_of(caption: str) -> list[str]:
    """The nouns of one caption in its order, singular, lower case, each once."""
    return list(dict.fromkeys(word for word, _, _ in noun_spans(caption)))


def noun_spans(caption: str) -> list[tuple[str, int, int]]:
    """The nouns of one caption as `nouns_of`, each with where it begins and ends in the caption; repeats are kept."""
    kept = []
    for match in _NOUN.finditer(caption.lower()):
        word = singular(match[1])
        if len(word) >= 3 and word not in _NO_THINGS and (not word.endswith("ing") or word in _THINGS_IN_ING):
            kept.append((word, *match.span(1)))
    return kept


def caption_nouns(captions: Iterable[str], min_captions: int = 2) -> list[str]:
    """The nouns that stand in at least `min_captions` captions, the most frequent first, then by the alphabet."""
    counts = Counter(word for caption in captions for word in nouns_of(caption))
    kept = [word for word, count in counts.items() if count >= min_captions]
    return sorted(kept, key=lambda word: (-counts[word], word))


def singular(word: str) -> str:
    """A plural by rule: `dogs` to `dog`, `boxes` to `box`, `puppies` to `puppy`; others as they are."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ches", "shes", "xes", "sses", "zzes")):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word
