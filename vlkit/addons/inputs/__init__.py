"""What changes the pixels before the image tower sees them; one method a file."""

from vlkit.contracts import MethodRow

METHODS: dict[str, MethodRow] = {
    "pixel_prompt": MethodRow(
        name="pixel_prompt",
        slot="inputs",
        needs="few-shot labels; long training through the vision tower",
        cost="none",
        source="Wu et al. 2024, arXiv:2212.10556",
        when="Labels and no way inside the tower: only pixels change, so ResNets do as well.",
    ),
    "red_circle": MethodRow(
        name="red_circle",
        slot="inputs",
        needs="a box; box_scores also expressions to subtract",
        cost="an image pass for each box and view",
        source="Shtedritski et al. 2023, arXiv:2304.06712",
        when="To ask about a region: which of several boxes an expression means.",
    ),
}
