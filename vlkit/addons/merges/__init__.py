"""What makes one matrix of scores out of several; one method a file."""

from vlkit.contracts import MethodRow

METHODS: dict[str, MethodRow] = {
    "arithmetic": MethodRow(
        name="arithmetic",
        slot="merges",
        needs="queries of words and an image",
        cost="none",
        source="the baselines of Psomas et al. 2024, arXiv:2405.15587",
        when="To see what sum, product, minimum, or one part alone reach before anything else is tried.",
    ),
    "freedom": MethodRow(
        name="freedom",
        slot="merges",
        needs="a list of words, or captions to take nouns from; the gallery",
        cost="the nearest words of 20 images, and 7 texts a query",
        source="Efthymiadis et al. 2024, arXiv:2412.03297",
        when="The words name a style or a place, and the same kind of thing is wanted in it.",
    ),
    "weicom": MethodRow(
        name="weicom",
        slot="merges",
        needs="queries of words and an image",
        cost="mean and deviation of a query's similarities",
        source="Psomas et al. 2024, arXiv:2405.15587",
        when="An image and words that change one of its attributes.",
    ),
}
