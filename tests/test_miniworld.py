"""Renderer, grammar and concepts are pure functions of seeds, and keep exemplars out of the corpus."""

from typing import Any

import numpy as np
import pytest

from attribution.params import load_params
from miniworld.captions import FAR_AWAY, describe_object, draw_caption, full_caption, vocabulary
from miniworld.concepts import UNSEEN_CLASSES, UNSEEN_MEDIA, Counts, draw_concepts
from miniworld.corpus import corpus_captions, corpus_instance, corpus_picture, corpus_pictures, corpus_scene
from miniworld.draw import SIZE, render
from miniworld.readings import READINGS, true_readings
from miniworld.scene import (
    BACKGROUNDS,
    CLASSES,
    COLORS,
    MEDIA,
    TEXTURES,
    Pose,
    Scene,
    draw_artist,
    draw_instance,
    draw_scene,
)
from stages.mini_base import Params as PretrainParams
from stages.render import Params as RenderParams

OBJECTS, STYLES = Counts(6, 2, 4, 3), Counts(3, 1, 2, 2)


def scene_of(noun: str = "car", medium: str = "photo", seed: int = 0, **given: Any) -> Scene:
    rng = np.random.default_rng(seed)
    instance = draw_instance(rng, noun)
    return draw_scene(rng, instance=instance, artist=draw_artist(rng, medium=medium, toned=0.0), **given)


def test_world_is_as_large_as_promised() -> None:
    assert len(CLASSES) >= 20
    assert len(BACKGROUNDS) >= 10
    assert len(MEDIA) >= 8
    assert SIZE == 64


def test_same_scene_same_picture() -> None:
    first, second = (np.asarray(render(scene_of(seed=3))) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (64, 64, 3)


@pytest.mark.parametrize("medium", MEDIA)
def test_every_medium_shows_the_object(medium: str) -> None:
    """Another instance of another class in the same place, the same grain: many pixels change."""
    scene = scene_of("car", medium, seed=5)
    other = Scene(
        scene_of("tree", medium, seed=6).instance,
        scene.pose,
        scene.background,
        scene.artist,
        scene.noise_seed,
    )
    change = np.abs(np.asarray(render(scene)).astype(int) - np.asarray(render(other)).astype(int))
    assert (change.max(axis=2) > 25).mean() > 0.10


@pytest.mark.parametrize("noun", CLASSES)
def test_every_class_fills_a_fair_part_of_the_frame(noun: str) -> None:
    scene = scene_of(noun, "poster", seed=1, ordinary_pose=True)
    smaller = Scene(
        scene.instance,
        type(scene.pose)(scene.pose.x, scene.pose.y, 0.02, scene.pose.tilt, scene.pose.flip),
        scene.background,
        scene.artist,
        scene.noise_seed,
    )
    differs = np.abs(np.asarray(render(scene)).astype(int) - np.asarray(render(smaller)).astype(int)).max(
        axis=2
    )
    assert 0.05 < (differs > 20).mean() < 0.75


@pytest.mark.parametrize("texture", TEXTURES)
def test_textures_differ_from_plain(texture: str) -> None:
    from dataclasses import replace

    scene = scene_of("apple", "poster", seed=2)
    plain, textured = (
        np.asarray(render(replace(scene, instance=replace(scene.instance, texture=name))))
        for name in ("plain", texture)
    )
    assert (plain != textured).any() == (texture != "plain")


def test_captions_use_known_words_and_are_true() -> None:
    known = set(vocabulary())
    for index in range(300):
        scene = corpus_scene(7, index)
        for caption in corpus_captions(7, index, 4):
            words = caption.split()
            assert set(words) <= known
            assert scene.instance.noun in words
            assert ("far" in words or "small" in words) <= (scene.pose.size < FAR_AWAY)
            stated = [color for color in COLORS if color in words]
            assert set(stated) <= {scene.instance.color, scene.instance.trim}


def test_captions_leave_things_out_at_random() -> None:
    scene = scene_of(seed=4)
    rng = np.random.default_rng(0)
    captions = {draw_caption(scene, rng) for _ in range(200)}
    assert len(captions) > 30
    assert describe_object(scene, color=False, texture=False) == "car"
    assert full_caption(scene).startswith("a photo of a ")


def test_corpus_is_the_same_by_any_number_of_workers() -> None:
    alone = list(corpus_pictures(7, range(6), workers=1))
    together = list(corpus_pictures(7, range(6), workers=2))
    np.testing.assert_array_equal(alone, together)
    np.testing.assert_array_equal(alone[5], corpus_picture(7, 5))


def test_concepts_are_split_by_group() -> None:
    concepts = list(draw_concepts(1, OBJECTS, STYLES, fresh_every=3))
    assert len(concepts) == 15 + 8
    assert len({concept.concept_id for concept in concepts}) == len(concepts)
    for concept in concepts:
        unseen = concept.group in (*UNSEEN_CLASSES, *UNSEEN_MEDIA)
        assert concept.seen != unseen
        assert concept.split == "test" or concept.seen
        assert len(concept.scenes) == 1 if concept.kind == "object" else 4 <= len(concept.scenes) <= 12
    artists = [{scene.artist for scene in concept.scenes} for concept in concepts if concept.kind == "style"]
    assert all(len(mine) == 1 for mine in artists)


def test_one_more_concept_changes_no_other() -> None:
    few = {c.concept_id for c in draw_concepts(1, OBJECTS, STYLES, fresh_every=3)}
    more = {c.concept_id for c in draw_concepts(1, Counts(7, 2, 4, 3), STYLES, fresh_every=3)}
    assert few < more
    assert len(more - few) == 1


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.nightly)])
def test_no_exemplar_instance_or_artist_is_in_the_corpus(every: int) -> None:
    """The default world: every scene of the corpus, or each eighth, against every exemplar."""
    render_params, pretrain = load_params(RenderParams, "render"), load_params(PretrainParams, "pretrain")
    assert render_params.seed == pretrain.seed
    assert render_params.distractors <= pretrain.pictures
    concepts = draw_concepts(
        render_params.seed, render_params.objects, render_params.styles, fresh_every=render_params.fresh_every
    )
    scenes = [scene for concept in concepts for scene in concept.scenes]
    instances = {scene.instance.proportions for scene in scenes}
    artists = {scene.artist.angle for scene in scenes}
    # An instance is the first thing a scene draws: the whole corpus's are had without the rest.
    assert corpus_instance(pretrain.seed, 5) == corpus_scene(pretrain.seed, 5).instance
    corpus = (corpus_instance(pretrain.seed, index) for index in range(0, pretrain.pictures, every))
    assert not any(instance.proportions in instances for instance in corpus)
    assert not any(
        corpus_scene(pretrain.seed, index).artist.angle in artists for index in range(0, 5000, every)
    )


def test_readings_are_indices_of_the_truth() -> None:
    scene = scene_of("fish", "woodcut", seed=9)
    truth = true_readings(scene)
    assert READINGS["noun"][truth["noun"]] == "fish"
    assert READINGS["medium"][truth["medium"]] == "woodcut"
    assert READINGS["color"][truth["color"]] == scene.instance.color


def test_exemplars_of_objects_are_plain_photos_in_an_ordinary_pose() -> None:
    """An ink drawing would show neither colour nor texture of the one it is of."""
    few = OBJECTS.__class__(60, 2, 4, 3)
    concepts = list(draw_concepts(1, few, STYLES, fresh_every=3))
    objects = [one.scenes[0] for one in concepts if one.kind == "object"]
    assert {(scene.artist.medium, scene.artist.tone) for scene in objects} == {("photo", None)}
    poses: list[Pose] = [scene.pose for one in concepts for scene in one.scenes]
    assert all(0.64 <= pose.size <= 0.80 for pose in poses)
