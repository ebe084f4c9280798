"""What a tower computes on top of a dual encoder; one method a file."""

from vlkit.contracts import MethodRow

METHODS: dict[str, MethodRow] = {
    "patch_alignment": MethodRow(
        name="patch_alignment",
        slot="head",
        needs="patch tokens (any ViT); image-text pairs to train it",
        cost="two small layers for each patch",
        source="Mukhoti et al. 2023, arXiv:2212.04994",
        when="Segmentation by texts, with pairs to train on: patches learn to match texts, towers stay frozen.",
    ),
}
