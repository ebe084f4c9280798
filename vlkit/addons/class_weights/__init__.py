"""How class weights are made from class names; one method a file."""

from vlkit.contracts import MethodRow

METHODS: dict[str, MethodRow] = {
    "templates": MethodRow(
        name="templates",
        slot="class_weights",
        needs="class names",
        cost="one pass of the text tower over templates x names",
        source="Radford et al. 2021, arXiv:2103.00020",
        when="The first thing to try; the base line of the other methods.",
    ),
}
