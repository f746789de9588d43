"""The render stage: tables as promised, the same bytes again, distractors from the corpus."""

from pathlib import Path

import numpy as np
import pytest

from attribution.concepts import read_concepts
from attribution.files import sha256_file
from attribution.images import decode_image, read_image_table, table_parts
from miniworld.concepts import Counts
from miniworld.corpus import corpus_captions, corpus_picture
from stages.render import Params, run

PARAMS = Params(
    seed=3,
    objects=Counts(3, 1, 2, 1),
    styles=Counts(2, 1, 1, 1),
    fresh_every=2,
    distractors=7,
    distractors_per_part=3,
    workers=1,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    run(PARAMS, exemplars=folder / "exemplars.parquet", distractors=folder / "distractors")
    return folder


def test_exemplar_table_makes_the_concepts(world: Path) -> None:
    concepts = read_concepts(world / "exemplars.parquet")
    assert sum(concept.kind == "object" for concept in concepts) == 7
    assert sum(concept.kind == "style" for concept in concepts) == 5
    assert {concept.split for concept in concepts} == {"train", "val", "test"}
    fresh = read_concepts(world / "exemplars.parquet", fresh=True)
    assert len(fresh) == 2 + 1 + 1 + 1 + 1 + 1 + 1 + 1
    texts = fresh[0].exemplars[0].texts
    assert {"medium", "thing", "place", "caption"} <= set(texts)


def test_distractors_are_the_first_pictures_of_the_corpus(world: Path) -> None:
    assert [part.name for part in table_parts(world / "distractors")] == [
        "part-00000.parquet",
        "part-00001.parquet",
        "part-00002.parquet",
    ]
    rows = read_image_table(world / "distractors").to_pylist()
    assert len(rows) == 7
    picture = np.asarray(decode_image(rows[4]["image"]))
    np.testing.assert_array_equal(picture, corpus_picture(3, 4))
    assert rows[4]["caption"] == corpus_captions(3, 4, 1)[0]


def test_same_bytes_again(world: Path, tmp_path: Path) -> None:
    run(PARAMS, exemplars=tmp_path / "exemplars.parquet", distractors=tmp_path / "distractors")
    for name in ("exemplars.parquet", "distractors/part-00001.parquet"):
        assert sha256_file(tmp_path / name) == sha256_file(world / name)
