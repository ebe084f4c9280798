"""What subtracts a number from the scores of each gallery item; one method a file."""

from vlkit.contracts import MethodRow

METHODS: dict[str, MethodRow] = {
    "dual_is": MethodRow(
        name="dual_is",
        slot="gallery_bias",
        needs="captions and unlabelled images, whatever is searched",
        cost="one subtraction; fitting is the banks' features, use two products of banks and gallery",
        source="Wang et al. 2023, arXiv:2310.11612 (DualIS)",
        when="As log_sum_exp, where images and captions of the domain are both at hand.",
    ),
    "log_sum_exp": MethodRow(
        name="log_sum_exp",
        slot="gallery_bias",
        needs="captions to search images, unlabelled images to search texts or to classify",
        cost="one subtraction; fitting is the bank's features, use one product of bank and gallery",
        source="Smith et al. 2017, arXiv:1702.03859 (inverted softmax)",
        when="Some gallery items come up for every query, and a bank of queries is at hand.",
    ),
    "mean": MethodRow(
        name="mean",
        slot="gallery_bias",
        needs="captions to search images, unlabelled images to search texts or to classify",
        cost="one subtraction; fitting is the bank's features, use one product of bank and gallery",
        source="Zhou et al. 2023, arXiv:2302.11084 (DN as a bias)",
        when="The mildest correction: safe with a bank of a hundred queries.",
    ),
    "qb_norm": MethodRow(
        name="qb_norm",
        slot="gallery_bias",
        needs="captions to search images, unlabelled images to search texts or to classify",
        cost="a product of bank and gallery for each chunk of queries; cannot be folded into an index",
        source="Bogolin et al. 2022, arXiv:2112.12777",
        when="The bank is of another domain than the queries: only answers that the bank knows as hubs are corrected.",
    ),
    "top_k_mean": MethodRow(
        name="top_k_mean",
        slot="gallery_bias",
        needs="captions to search images, unlabelled images to search texts or to classify",
        cost="one subtraction; fitting is the bank's features, use one product of bank and gallery",
        source="Chowdhury et al. 2024, arXiv:2410.24114 (NNN)",
        when="The strongest correction in retrieval when the bank holds thousands of queries.",
    ),
}
