"""`vlkit adapt METHOD --active ROUNDS`: labels are asked for, round by round, in place of shots that are drawn."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

from vlkit.cli.console import print_table, progress_bar, say
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from vlkit.addons.adapt import Adapted
    from vlkit.addons.base import AddOn
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource


@dataclass(frozen=True)
class Asking:
    """How labels are asked for.

    Attributes:
        rounds: as many labels as classes in each.
        strategy: clusters, random or entropy.
        selective: leave out questions the model knows the answer to.
    """

    rounds: int
    strategy: str
    selective: bool

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ConfigError: an unknown strategy.
        """
        from vlkit.addons.active import Strategy

        if self.strategy not in get_args(Strategy):
            raise ConfigError(f"--ask {self.strategy!r}: expected one of {', '.join(get_args(Strategy))}.")


def asked_in_rounds(
    addon: "AddOn", reference: "Reference", source: "FeatureSource", templates: str, asking: Asking, json: bool
) -> "tuple[Adapted, dict[str, Any]]":
    """The add-on of the last round, and what the record says of each: the labels of the data answer."""
    from vlkit.addons.active import active_learning
    from vlkit.addons.adapt import validated
    from vlkit.addons.pipeline import Pipeline

    known = reference.labelled
    if known is None or known.labels is None:
        raise ConfigError("--active asks for classes, so --data must be class folders.")
    answers = known.labels.tolist()
    pool = replace(reference, few_shot=None, labelled=None, images=replace(known, labels=None))
    rows: list[dict[str, Any]] = []
    adapted: Adapted | None = None
    with progress_bar(f"ask for labels, fit {addon.name}", "rounds") as tick:
        for one in active_learning(
            addon,
            pool,
            source,
            lambda rows: [answers[row] for row in rows],
            rounds=asking.rounds,
            strategy=asking.strategy,  # type: ignore[arg-type]
            selective=asking.selective,
            templates=templates,
            progress=tick,
        ):
            adapted = validated(Pipeline([one.addon]), reference, source, templates)
            rows.append(
                {
                    "round": one.number,
                    "asked": [known.records[row].key for row in one.asked],
                    "assumed": [known.records[row].key for row in one.assumed],
                    "questions": one.questions,
                    "validation": adapted.adapted,
                }
            )
    assert adapted is not None, "there is a round"
    if not json:
        cells = [
            (
                row["round"],
                row["questions"],
                len(row["assumed"]),
                "-" if row["validation"] is None else f"{row['validation']:.2%}",
            )
            for row in rows
        ]
        print_table("labels asked for", ("round", "questions so far", "assumed in it", "validation"), cells)
    say(f"{rows[-1]['questions']} labels were asked for in {len(rows)} rounds, of {len(answers)} images")
    return adapted, {"active": {"strategy": asking.strategy, "selective": asking.selective, "rounds": rows}}
