"""Read sentence pairs, augment them with synonyms, and make batches of two views."""

from ear_ops.data.collator import PairCollator
from ear_ops.data.hub import load_hub_split, pairs_from_dataset
from ear_ops.data.pairs import DataError, PairExample, available_languages, is_untranslated, load_split, read_pairs
from ear_ops.data.parallel import load_parallel
from ear_ops.data.synonyms import SynonymAugmenter, load_synonyms
from ear_ops.data.tasks import PAWSX, TASKS, XNLI, Task, get_task
from ear_ops.data.variants import VariantGroup, one_row_per_variant, read_variants, write_variants
from ear_ops.data.views import PairItem, PairViews, VariantViews

__all__ = [
    "PAWSX",
    "TASKS",
    "XNLI",
    "DataError",
    "PairCollator",
    "PairExample",
    "PairItem",
    "PairViews",
    "SynonymAugmenter",
    "Task",
    "VariantGroup",
    "VariantViews",
    "available_languages",
    "get_task",
    "is_untranslated",
    "load_hub_split",
    "load_parallel",
    "load_split",
    "load_synonyms",
    "one_row_per_variant",
    "pairs_from_dataset",
    "read_pairs",
    "read_variants",
    "write_variants",
]
