"""Which settings each training method looks at, and whether it needs the augmented view.

This table imports nothing, so the configuration can check a method without importing torch.
"""

from __future__ import annotations

from typing import NamedTuple

AUGMENTATION = frozenset({"synonyms", "match", "dictionary_scale"})
PUSH = frozenset({"alpha", "push_ratio", "reduction"})
PULL = frozenset({"beta", "pull_ratio", "layer", "reduction"})


class MethodUses(NamedTuple):
    """What a method needs.

    Attributes:
        two_views: batches hold x in rows 0..B-1 and its synonym-replaced x^a in rows B..2B-1.
        settings: the settings that change the result of this method, of those that not every method looks at.
    """

    two_views: bool
    settings: frozenset[str]


METHOD_USES: dict[str, MethodUses] = {
    "finetune": MethodUses(False, frozenset()),
    "rs-da": MethodUses(True, AUGMENTATION),
    "rs-rp": MethodUses(False, frozenset({"perturbation"})),
    "adv": MethodUses(False, frozenset({"perturbation", "adversarial_steps"})),
    "ear": MethodUses(True, AUGMENTATION | PUSH | PULL),
    "ear-no-ept": MethodUses(True, AUGMENTATION | PULL),
    "ear-no-apt": MethodUses(True, AUGMENTATION | PUSH),
    "ear-no-both": MethodUses(True, AUGMENTATION),
    "nt+apt": MethodUses(True, AUGMENTATION | PULL | {"perturbation"}),
    "ept+srpt": MethodUses(True, AUGMENTATION | PUSH | PULL),
}

# Every method looks at the settings that are not in here.
METHOD_SETTINGS = frozenset[str]().union(*(uses.settings for uses in METHOD_USES.values()))
