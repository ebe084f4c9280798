"""What a trained model looks at, and what its parts look for; one method a file."""

from vlkit.contracts import MethodRow

METHODS: dict[str, MethodRow] = {
    "decomposition": MethodRow(
        name="decomposition",
        slot="interpret",
        needs="a CLIP ViT",
        cost="one forward pass with explicit attention",
        source="Gandelsman et al. 2024, arXiv:2310.05916",
        when="To see which heads and patches write a class into the image feature; no gradient is needed.",
    ),
    "legrad": MethodRow(
        name="legrad",
        slot="interpret",
        needs="a CLIP ViT",
        cost="a forward and a backward pass through the last two layers",
        source="Bousselham et al. 2025, arXiv:2404.03214",
        when="For heat maps of a text that should be complete rather than sharp.",
    ),
    "relevance": MethodRow(
        name="relevance",
        slot="interpret",
        needs="open_clip's transformers",
        cost="a forward and a backward pass through the last layers",
        source="Chefer et al. 2021, arXiv:2103.15679",
        when="The usual baseline for heat maps, and the one that also says which words mattered.",
    ),
    "text_span": MethodRow(
        name="text_span",
        slot="interpret",
        needs="a CLIP ViT, unlabelled images, a pool of texts",
        cost="one decomposition of the images and a singular value decomposition a head",
        source="Gandelsman et al. 2024, arXiv:2310.05916",
        when="To name what each attention head looks for, and to take heads with a spurious cue out.",
    ),
}
