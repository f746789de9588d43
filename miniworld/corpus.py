"""The corpus the base model is trained on: picture i is a pure function of (seed, i).

The distractors of the gallery are its first images, so that the gallery holds what the model was trained on.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from miniworld.captions import draw_caption, full_caption
from miniworld.draw import render
from miniworld.scene import Instance, Scene, draw_instance, draw_scene

_CORPUS_STREAM = 1  # exemplars draw from stream 2: no instance is shared


def corpus_scene(seed: int, index: int) -> Scene:
    """Scene `index` of the corpus."""
    return draw_scene(np.random.default_rng((seed, _CORPUS_STREAM, index)))


def corpus_instance(seed: int, index: int) -> Instance:
    """What scene `index` shows."""
    return draw_instance(np.random.default_rng((seed, _CORPUS_STREAM, index)))


def corpus_captions(seed: int, index: int, count: int) -> list[str]:
    """`count` captions of scene `index`: the full one, then drawn ones."""
    scene = corpus_scene(seed, index)
    rng = np.random.default_rng((seed, _CORPUS_STREAM, index, 1))
    return [full_caption(scene), *(draw_caption(scene, rng) for _ in range(count - 1))]


def corpus_picture(seed: int, index: int) -> np.ndarray:
    """Picture `index` of the corpus as uint8 [64, 64, 3]."""
    return np.asarray(render(corpus_scene(seed, index)))


def corpus_pictures(seed: int, indices: Iterable[int], *, workers: int) -> Iterator[np.ndarray]:
    """The pictures of `indices`, in order, drawn by `workers` processes."""
    with process_map(workers) as each:
        yield from each(partial(corpus_picture, seed), indices)


@contextlib.contextmanager
def process_map(workers: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """`map` over `workers` processes, results in order."""
    if workers <= 1:
        yield map
        return
    with ProcessPoolExecutor(workers) as pool:
        yield partial(pool.map, chunksize=50)
