"""Template class weights equal a slow loop over classes and templates, and need the loop's every part."""

import torch

from vlkit.addons.class_weights.templates import template_weights, templates_hash


class HashEmbedder:
    """A fixed random unit vector for every text."""

    def embed_texts(self, texts, batch_size=256, progress=None):
        rows = []
        for text in texts:
            generator = torch.Generator().manual_seed(sum(ord(char) * 31**i for i, char in enumerate(text)) % 2**31)
            rows.append(torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0))
        return torch.stack(rows)


def test_equals_the_loop_of_the_paper():
    embedder, templates = HashEmbedder(), ("a photo of a {}.", "art of the {}.", "{}")
    weights = template_weights(embedder, [["dog"], ["cat", "kitten"]], templates)
    expected = []
    for name in ("dog", "cat", "kitten"):
        total = torch.zeros(16)
        for template in templates:
            total += embedder.embed_texts([template.format(name)])[0]
        expected.append(total / total.norm())
    torch.testing.assert_close(weights.vectors, torch.stack(expected))
    assert weights.class_of.tolist() == [0, 1, 1]
    single = template_weights(embedder, [["dog"]], templates[:1])
    assert not torch.allclose(weights.vectors[0], single.vectors[0], atol=1e-2)  # the ensemble matters


def test_hash_tells_template_lists_apart():
    assert templates_hash(["a {}"]) == templates_hash(("a {}",)) != templates_hash(["the {}"])
