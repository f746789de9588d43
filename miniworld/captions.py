"""Captions of the mini world: a small fixed grammar, every word a token.

    [a MEDIUM of] a [COLOR] NOUN [with TRIM TEXTURE] [PLACE] [in TONE tones]
    a picture of a [COLOR] NOUN [with TRIM TEXTURE] [PLACE] in the style of [TONE] MEDIUM art
    one of SENTENCES

Parts in brackets are left out at random, so that the model also knows short prompts.
"""

import numpy as np

from miniworld.scene import BACKGROUNDS, CLASSES, COLORS, MEDIA, TEXTURES, TONES, Scene

PLACES = {
    "beach": "on a beach", "city": "in a city", "desert": "in a desert", "forest": "in a forest",
    "hills": "before the hills", "meadow": "on a meadow", "night": "under the night sky", "room": "in a room",
    "sea": "under the sea", "snow": "in the snow",
}  # fmt: skip

# Sentences as a person might write them about a picture, whatever its medium.
SENTENCES = (
    "this is my nice {thing}{place}",
    "there is a beautiful {thing} standing alone{place}",
    "look at this {thing}{place}",
    "one {thing} and nothing more{place}",
    "my {thing} is standing{place}",
    "an image of a nice {thing}{place}",
    "a drawing of this beautiful {thing}{place}",
    "a painting of one {thing} alone{place}",
)

FAR_AWAY, CLOSE_UP = 0.55, 0.9  # object sizes below and above which the caption says so


def vocabulary() -> list[str]:
    """Every word a caption or prompt may hold, sorted."""
    phrases = [*CLASSES, *COLORS, *MEDIA, *TEXTURES, *TONES, *BACKGROUNDS, *PLACES.values()]
    phrases += [sentence.format(thing="", place="") for sentence in SENTENCES]
    phrases += ["a of with in the tones picture style art far away very small zoomed in close up"]
    return sorted({word for phrase in phrases for word in phrase.split()})


def describe_object(scene: Scene, *, color: bool = True, texture: bool = True) -> str:
    """`red apple with blue stripes`."""
    words = [scene.instance.color] if color else []
    words.append(scene.instance.noun)
    if texture and scene.instance.texture != "plain":
        words += ["with", scene.instance.trim, scene.instance.texture]
    return " ".join(words)


def full_caption(scene: Scene) -> str:
    """The caption that leaves nothing out."""
    tone = f" in {scene.artist.tone} tones" if scene.artist.tone else ""
    return f"a {scene.artist.medium} of a {describe_object(scene)} {PLACES[scene.background]}{tone}"


def _scale_words(scene: Scene, rng: np.random.Generator) -> str:
    if scene.pose.size < FAR_AWAY:
        return ("far away ", "very small ")[rng.integers(2)]
    if scene.pose.size > CLOSE_UP:
        return ("zoomed in ", "close up ")[rng.integers(2)]
    return ""


def draw_caption(scene: Scene, rng: np.random.Generator) -> str:
    """One true caption of `scene`, some parts left out at random."""
    thing = describe_object(scene, color=rng.uniform() < 0.85, texture=rng.uniform() < 0.75)
    thing = _scale_words(scene, rng) + thing
    place = f" {PLACES[scene.background]}" if rng.uniform() < 0.7 else ""
    kind = rng.uniform()
    if kind < 0.12:
        return SENTENCES[rng.integers(len(SENTENCES))].format(thing=thing, place=place)
    if kind < 0.32:
        tone = f"{scene.artist.tone} " if scene.artist.tone and rng.uniform() < 0.9 else ""
        return f"a picture of a {thing}{place} in the style of {tone}{scene.artist.medium} art"
    tone = f" in {scene.artist.tone} tones" if scene.artist.tone and rng.uniform() < 0.85 else ""
    medium = f"a {scene.artist.medium} of " if kind < 0.93 else ""
    article = "a " if rng.uniform() < 0.85 else ""
    return f"{medium}{article}{thing}{place}{tone}"
