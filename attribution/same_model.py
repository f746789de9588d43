"""Whether features that came ready made are by a backbone's model: by its name, and by their pictures."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from attribution.backbone_settings import BackboneSettings
from attribution.captions import describe
from attribution.features import FeatureSet, length_one

# Other decoders, resizing and precisions cost hundredths; another model is nowhere near.
LEAST_COSINE = 0.9


def check_model(name: str, settings: BackboneSettings, made_by: str) -> None:
    """Raises ValueError if `made_by`, as clip-retrieval's --clip_model is told, is not the backbone's model.

    Weights in a file have no name that could differ: of them only the net's is compared.
    """
    names = _names_of_model(settings)
    if not any(re.fullmatch(pattern, made_by) for pattern in names.values()):
        raise ValueError(f"{name}: wanted features made by {' or '.join(names)}, got {made_by}")


def pictures_of(features: FeatureSet, source: Path, count: int) -> dict[str, Path]:
    """Id to file of at most `count` rows whose names are files that are here, evenly over all; often none."""
    names = features.rows["source"]
    found: dict[int, Path] = {}
    for row in dict.fromkeys(np.linspace(0, len(features) - 1, 4 * count).astype(int).tolist()):
        name = names[row].as_py()
        places = [place / name for place in (Path(), source, source.parent)]
        # Not Path.is_file, which raises where a name is too long for a file's.
        file = next(filter(os.path.isfile, places), None)
        if file is not None and len(found) < count:
            found[row] = file
    ids = features.ids_of(np.array(list(found), dtype=np.int64))
    return dict(zip(ids.tolist(), found.values(), strict=True))


def least_cosine(
    source: Path, features: FeatureSet, image_ids: Sequence[str], encoded: Float[np.ndarray, "images dim"]
) -> float:
    """The least cosine between the rows of these images and what the backbone made of their pictures.

    Raises ValueError where it is too small for them to be by the same model.
    """
    cosines = (length_one(features.select(image_ids)) * length_one(encoded)).sum(axis=1)
    worst = int(cosines.argmin())
    if cosines[worst] < LEAST_COSINE:
        picture = describe(features, [image_ids[worst]])[image_ids[worst]]["caption"]
        said = f"cosine {cosines[worst]:.3f} with what {features.space.backbone} makes of its picture"
        raise ValueError(f"{source}: {picture}: {said}; wanted features by the same model")
    return float(cosines[worst])


def _names_of_model(settings: BackboneSettings) -> dict[str, str]:
    """What clip-retrieval can have been told to get this model: for a reader, and as a pattern."""
    model, weights = settings.model or settings.library, settings.weights
    if settings.library != "open_clip" or weights is None or "/" in model:
        return {model: re.escape(model)}
    is_file = "/" in weights or bool(Path(weights).suffix)
    plain = model.removesuffix("-quickgelu")
    names = {f"open_clip:{model}/{'...' if is_file else weights}"}
    if weights == "openai" or (is_file and model != plain):
        # OpenAI's names for its own, which clip-retrieval takes without a library before them.
        short = re.sub(r"^(ViT-\w+)-(\d+)", r"\1/\2", plain).replace("-336", "@336px")
        names |= {short, f"open_clip:{plain}/openai"}
    return {name: re.escape(name).replace(r"\.\.\.", ".+") for name in sorted(names)}
