"""vlkit: pretrain dual image-text encoders, classify and retrieve zero-shot, and measure it.

    import vlkit
    embedder = vlkit.load_embedder("run:runs/demo/model")
    images = embedder.embed_images(["a.jpg", "b.jpg"])      # (2, D)
    texts = embedder.embed_texts(["a photo of a dog"])      # (1, D)

The public names below are imported on first use, so that `import vlkit` and `vlkit --help` stay fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlkit.addons.classifier import ZeroShotClassifier as ZeroShotClassifier
    from vlkit.errors import VlkitError as VlkitError
    from vlkit.models.embedder import Embedder as Embedder
    from vlkit.models.load import load_embedder as load_embedder
    from vlkit.models.load import load_encoder as load_encoder

__version__ = "0.1.0"

_PUBLIC = {
    "Embedder": "vlkit.models.embedder",
    "VlkitError": "vlkit.errors",
    "ZeroShotClassifier": "vlkit.addons.classifier",
    "load_embedder": "vlkit.models.load",
    "load_encoder": "vlkit.models.load",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'vlkit' has no attribute {name!r}; it offers {', '.join(_PUBLIC)}")
