"""The concepts of the mini world: what exemplars show, and how concepts are split.

An object concept is one instance, shown once. A style concept is one artist, shown in 4 to 12 pictures.
Concept i of a (kind, split, seen) group is a pure function of (seed, group, i): one more changes no other.

`seen` says whether the concept's `group` (an object's class, an artist's medium) occurs in the train split.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from miniworld.scene import CLASSES, MEDIA, Scene, draw_artist, draw_instance, draw_scene

UNSEEN_CLASSES = ("butterfly", "cactus", "guitar", "teapot")
UNSEEN_MEDIA = ("chalk drawing", "woodcut")

_EXEMPLAR_STREAM = 2

Kind = Literal["object", "style"]
Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Counts:
    """How many concepts of one kind each split holds."""

    train: int
    val: int
    test_seen: int
    test_unseen: int


@dataclass(frozen=True)
class Concept:
    """One concept: its scenes are its exemplars."""

    concept_id: str
    kind: Kind
    noun: str
    group: str
    split: Split
    seen: bool
    fresh: bool
    scenes: tuple[Scene, ...]


def _concept_id(kind: Kind, group: str, scenes: tuple[Scene, ...]) -> str:
    digest = hashlib.sha256(repr([asdict(scene) for scene in scenes]).encode()).hexdigest()
    return f"{kind}-{group.replace(' ', '-')}-{digest[:10]}"


def _draw_concept(seed: int, kind: Kind, split: Split, seen: bool, index: int, fresh: bool) -> Concept:
    stream = (seed, _EXEMPLAR_STREAM, ("object", "style").index(kind), ("train", "val", "test").index(split))
    rng = np.random.default_rng((*stream, int(seen), index))
    if kind == "object":
        groups = [c for c in CLASSES if (c in UNSEEN_CLASSES) != seen]
        group = noun = groups[index % len(groups)]
        instance = draw_instance(rng, noun)
        # As in the paper: an ink drawing would show neither colour nor texture of the one it is of.
        photo = draw_artist(rng, medium="photo", toned=0.0)
        scenes: tuple[Scene, ...] = (draw_scene(rng, instance=instance, artist=photo, ordinary_pose=True),)
    else:
        groups = [m for m in MEDIA if (m in UNSEEN_MEDIA) != seen]
        group, noun = groups[index % len(groups)], "art"
        artist = draw_artist(rng, medium=group, toned=0.85)
        scenes = tuple(draw_scene(rng, artist=artist, ordinary_pose=True) for _ in range(rng.integers(4, 13)))
    return Concept(_concept_id(kind, group, scenes), kind, noun, group, split, seen, fresh, scenes)


def draw_concepts(seed: int, objects: Counts, styles: Counts, *, fresh_every: int) -> Iterator[Concept]:
    """Every concept; each `fresh_every`-th of a group is customized in the default run."""
    kinds: tuple[tuple[Kind, Counts], ...] = (("object", objects), ("style", styles))
    for kind, counts in kinds:
        groups: tuple[tuple[Split, bool, int], ...] = (
            ("train", True, counts.train),
            ("val", True, counts.val),
            ("test", True, counts.test_seen),
            ("test", False, counts.test_unseen),
        )
        for split, seen, count in groups:
            for index in range(count):
                yield _draw_concept(seed, kind, split, seen, index, fresh=index % fresh_every == 0)
