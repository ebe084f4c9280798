"""A fixed number of augmented views of each image, so that a teacher's features of them can be stored.

    replay = Replay(views=10)
    view = replay.view(number, epoch)                       # one of them in each epoch
    choices = replay.draw(augment, image, number, view)     # the same in every run, for the same bytes of an image

Source: Vasu et al. 2024, "MobileCLIP: Fast Image-Text Models through Multi-Modal Reinforced Training",
    arXiv:2311.17049, section 3.2: what an image was augmented by is stored with the teacher's features.
Differs: nothing is stored of it; it is drawn again, from the image's own bytes.
"""

import hashlib
from dataclasses import dataclass

from vlkit.data.augment import Augment, Choices
from vlkit.data.decode import EncodedImage
from vlkit.data.randomness import fleeting_generator

# Of every run: stored features are of no run's seed.
_SEED = 0
_TAIL = 1024  # bytes, which in two different photographs differ


@dataclass(frozen=True)
class Replay:
    """How many views each image has."""

    views: int

    def view(self, number: int, epoch: int) -> int:
        """Which view, in 0..views-1, an image has in an epoch; after so many epochs it has had each."""
        return (number + epoch) % self.views

    def draw(self, augment: Augment, image: EncodedImage, number: int, view: int) -> Choices:
        """What happens to an image in one of its views."""
        return augment.draw(image.height, image.width, fleeting_generator(_SEED, view, number, "stored view"))


def image_number(data: bytes) -> int:
    """A number in 0..2**63-1 that names an image by its bytes: renamed, copied or elsewhere it keeps it."""
    found = hashlib.blake2b(data[-_TAIL:] + len(data).to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(found, "little") >> 1
