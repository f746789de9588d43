"""The render stage: tables as promised, the same bytes again, distractors from the corpus."""

import json
import os
import subprocess
import sys
from dataclasses import replace
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

# Corpus pictures of seed 7 that had a pixel one level off where BLAS took fused kernels for their luminance
# (one in 250 had), and the first digits of the sha256 of their pixels.
FRAGILE = {
    1048: "ffd5c843dffb", 2184: "acc7bc7bcebc", 2224: "a12b8244e3d8", 2775: "7460cb50479a",
    2797: "c2c54b3fa5e4", 2900: "4977c8de7c45", 3433: "d5de552ac4ba", 3568: "fdbeedf47e9e",
    3598: "86f3c0f38b36", 3804: "a88b5c26afcf", 4111: "b082fbca9c38", 4198: "ba4bd704148b",
    4757: "0c6ed62c5da4", 5348: "bc1bcdce4feb", 5751: "c3e0d0c01e0a", 5762: "b590fa6a2551",
    6931: "53e69a7abb83", 7113: "db3a8ac02779", 7138: "8b0de0b8ba0a", 7188: "2a7444a02ce8",
    7369: "44f0e0fc705a", 7650: "b5cf0ee78cc4", 8104: "a30a4a4b8691", 8327: "765ff70e142f",
    8394: "f8b990a6c939", 8509: "aa750ed66385", 8727: "75fdeed2eb00", 8798: "02c584646d1e",
    9118: "610c2088a3f0", 9161: "666408cf9f88", 9254: "b1b33dd00834", 9629: "df63d74d0de8",
}  # fmt: skip
DIGESTS_OF_PICTURES = """
import hashlib, json, sys
from miniworld.corpus import corpus_picture
indices = json.load(sys.stdin)
print(json.dumps({i: hashlib.sha256(corpus_picture(7, i).tobytes()).hexdigest()[:12] for i in indices}))
"""


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


@pytest.mark.parametrize("name", ["fresh_every", "distractors_per_part"])
def test_params_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: wanted 1 or more, got 0"):
        replace(PARAMS, **{name: 0})


def test_same_bytes_again(world: Path, tmp_path: Path) -> None:
    run(PARAMS, exemplars=tmp_path / "exemplars.parquet", distractors=tmp_path / "distractors")
    for name in ("exemplars.parquet", "distractors/part-00001.parquet"):
        assert sha256_file(tmp_path / name) == sha256_file(world / name)


# With the kernels that BLAS chooses itself, which are fused on a CPU with AVX-512, and with plain ones. In a
# process of its own: the variable is read once, when numpy is loaded.
@pytest.mark.parametrize("kernels", [None, "Nehalem"])
def test_pictures_do_not_depend_on_the_kernels_of_blas(kernels: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}
    done = subprocess.run(
        [sys.executable, "-c", DIGESTS_OF_PICTURES],
        cwd=Path(__file__).parents[1],
        env=environment | ({"OPENBLAS_CORETYPE": kernels} if kernels else {}),
        input=json.dumps(list(FRAGILE)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert {int(index): digest for index, digest in json.loads(done.stdout).items()} == FRAGILE
