"""python -m attribution: any picture's answer, and one line for anything that is none."""

from __future__ import annotations

import base64
import dataclasses
import html.parser
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from attribution.__main__ import main
from attribution.backbones import Backbone, BackboneSettings, load_backbone
from attribution.calibrator import Calibrator
from attribution.features import FeatureSet, write_feature_set
from attribution.files import write_json
from attribution.images import ImageError, decode_image, write_image_table
from attribution.mapper import Mapper
from tests.test_images import encode, png_of_size

SETTINGS = BackboneSettings("pixels", None, None, 4, "float32", 8)
CALIBRATOR = Calibrator(2.0, -0.1)
HOSTILE = '<script>alert("x")</script> & co'


def picture(seed: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small.repeat(4, 0).repeat(4, 1))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a repro leaves: 20 distractors and 6 exemplars, in the space of pixels, unmapped."""
    root = tmp_path_factory.mktemp("repository")
    params = {"featurize": {"backbones": ["pixels"], "settings": {"pixels": dataclasses.asdict(SETTINGS)}}}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    data = root / "data"
    backbone = load_backbone("pixels", SETTINGS, root=root)
    for name, table, seeds in (
        ("distractors", data / "world" / "distractors" / "part-00000.parquet", range(20)),
        ("exemplars", data / "world" / "exemplars.parquet", range(100, 106)),
    ):
        ids = [f"{name[0]}{seed}" for seed in seeds]
        images = pa.array([encode(picture(seed)) for seed in seeds], pa.binary())
        captions = [HOSTILE if seed == 100 else f"picture {seed}" for seed in seeds]
        write_image_table(table, pa.table({"image_id": ids, "caption": captions, "image": images}))
        vectors = backbone.encode([picture(seed) for seed in seeds])
        write_feature_set(data / "features" / "pixels" / name, backbone.space, ids, [vectors])
    mapper = dataclasses.replace(Mapper.identity(backbone.space.dim), config={"backbone": "pixels"})
    (data / "mappers" / "pixels").mkdir(parents=True)
    mapper.save(data / "mappers" / "pixels" / "mapper.safetensors")
    (data / "calibrators").mkdir()
    CALIBRATOR.save(data / "calibrators" / "pixels.json", backbone="pixels")
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to spoil, with a picture of one's own in it: exemplar e100, larger and as a JPEG."""
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    picture(100).resize((300, 300), Image.Resampling.NEAREST).save("mine.jpg", quality=95)
    return tmp_path / "copy"


def rows_of(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if re.match(r" +\d+ ", line)]


def test_the_picture_s_own_exemplar_comes_first(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mine.jpg", "--top", "3"]) == 0
    printed = capsys.readouterr()
    rows = rows_of(printed.out)
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert rows[0][3:5] == ["e100", "exemplar"]
    assert float(rows[0][1]) > 0.99
    assert printed.err == ""
    assert printed.out.splitlines()[0] == "mine.jpg"


def test_scores_influence_and_remainder_are_the_definition_s(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["mine.jpg", "--top", "3"]) == 0
    out = capsys.readouterr().out
    folder = root / "data" / "features" / "pixels"
    sets = [FeatureSet.open(folder / name) for name in ("distractors", "exemplars")]
    gallery = np.concatenate([one.vectors() for one in sets]).astype(np.float64)
    query = load_backbone("pixels", SETTINGS, root=root).encode([decode_image(root / "mine.jpg")])[0]
    scores = gallery @ query / np.linalg.norm(gallery, axis=1) / np.linalg.norm(query)
    influence = np.maximum(np.exp(CALIBRATOR.inv_tau * (scores - scores.max())) + CALIBRATOR.b, 0)
    influence /= influence.sum()
    best = np.argsort(-scores)[:3]
    ids = np.concatenate([one.image_ids for one in sets])
    for row, place in zip(rows_of(out), best, strict=True):
        assert row[3] == ids[place]
        assert float(row[1]) == pytest.approx(scores[place], abs=1e-4)
        assert float(row[2].rstrip("%")) / 100 == pytest.approx(influence[place], abs=1e-4)
    remainder = re.search(r"remainder ([\d.]+)%, the influence of (\d+) other images in a gallery of 26", out)
    assert remainder
    assert float(remainder[1]) / 100 == pytest.approx(1 - influence[best].sum(), abs=1e-4)
    assert int(remainder[2]) == (influence > 0).sum() - 3


class Page(html.parser.HTMLParser):
    """Tags, image sources and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_holds_its_pictures_and_escapes_what_others_wrote(root: Path) -> None:
    name = "<img src=x onerror=alert(1)> & \n.png"
    picture(100).save(root / name)
    assert main([name, "mine.jpg", "--top", "4", "--page", "out/page.html"]) == 0
    text = (root / "out" / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("img") == 2 * (1 + 4)
    assert "script" not in page.tags
    assert HOSTILE in page.text
    assert "<img src=x onerror=alert(1)> & \\n.png" in page.text
    for source in page.sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(data, validate=True))).load()
    mine = decode_image(base64.b64decode(page.sources[1].partition(",")[2]))
    np.testing.assert_array_equal(np.asarray(mine), np.asarray(picture(100)))


def test_more_are_asked_for_than_there_are(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mine.jpg", "--top", str(10**20), "--backbone", "pixels"]) == 0
    out = capsys.readouterr().out
    assert len(rows_of(out)) == 26
    assert "remainder 0.00%, the influence of 0 other images in a gallery of 26" in out


BAD = {
    "gone.png": (None, "no such file"),
    "notes.png": (b"dear diary\n", "not an image that can be read"),
    "cut.png": (
        encode(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))[:5000],
        "truncated",
    ),
    "bomb.png": (png_of_size(60_000, 60_000), "too many pixels, more than the limit of 50 million"),
    "void.png": (b"", r"empty \(0 bytes\)"),
}


def test_each_bad_picture_is_one_line_and_the_status_is_2(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (data, _) in BAD.items():
        if data is not None:
            (root / name).write_bytes(data)
    assert main([*BAD, "."]) == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == len(BAD) + 1
    for line, (name, (_, message)) in zip(lines, BAD.items(), strict=False):
        assert re.match(rf"attribution: {name}: .*{message}", line), line
    assert lines[-1] == "attribution: .: a folder, not an image"
    assert printed.out == ""
    assert not (root / "attribution.html").exists()


def test_beside_a_bad_picture_the_good_one_is_answered(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gone.png", "mine.jpg"]) == 2
    printed = capsys.readouterr()
    assert printed.err == "attribution: gone.png: no such file\n"
    assert rows_of(printed.out)[0][3] == "e100"


def test_the_evaluation_says_how_sure_the_answers_are(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {"mapped": {"recall_at_10": 0.25}, "chance": {"recall_at_10": 0.0005}}
    metrics = {"object": {"all": found}, "calibration": {"after": {"expected_calibration_error": 0.043}}}
    assert main(["mine.jpg"]) == 0
    assert "how sure" not in capsys.readouterr().out
    write_json(root / "metrics" / "pixels.json", metrics)
    assert main(["mine.jpg"]) == 0
    wanted = (
        "how sure: of the known sources of test images, the first 10 held 25.0% for objects "
        "(by chance 0.05%); influence given and influence due differed by 4.3% (metrics/pixels.json)"
    )
    assert wanted in capsys.readouterr().out.splitlines()
    assert f"<p>{wanted}</p>" in (root / "attribution.html").read_text()


def test_bars_are_as_long_as_influence_is_large(root: Path) -> None:
    """The best match's is whole: shares of a gallery of thousands would not be seen."""
    assert main(["mine.jpg", "--top", "5"]) == 0
    page = (root / "attribution.html").read_text()
    widths = [float(width) for width in re.findall(r"width: ([\d.]+)%", page)]
    shares = [float(share) for share in re.findall(r"<b>([\d.]+)%</b>", page)]
    assert len(widths) == len(shares) == 5
    assert widths == pytest.approx([100 * share / shares[0] for share in shares], abs=0.2)


def test_a_picture_that_the_backbone_refuses_is_one_line_too(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Backbone, images: list[Image.Image]) -> np.ndarray:
        if images[0].width > 100 * images[0].height:
            raise ImageError("sides too unequal")
        return usual(self, images)

    usual = Backbone.encode
    monkeypatch.setattr(Backbone, "encode", refuse)
    Image.new("RGB", (900, 2)).save(root / "strip.png")
    assert main(["strip.png", "mine.jpg"]) == 2
    printed = capsys.readouterr()
    assert printed.err == "attribution: strip.png: sides too unequal\n"
    assert rows_of(printed.out)[0][3] == "e100"
    assert main(["strip.png"]) == 2
    assert capsys.readouterr().err.endswith("attribution: no picture that pixels can take\n")


@pytest.mark.parametrize(
    "path",
    [
        "data/features/pixels/distractors",
        "data/features/pixels/exemplars",
        "data/mappers/pixels/mapper.safetensors",
        "data/calibrators/pixels.json",
        "data/world/distractors",
        "data/world/exemplars.parquet",
    ],
)
def test_what_a_repro_has_not_made_yet_is_one_line(
    root: Path, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    (root / path).rename(root / "elsewhere")
    assert main(["mine.jpg"]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"attribution: {path}: not made yet; run: dvc repro\n")


def change_space(root: Path) -> None:
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("dtype: float32", "dtype: float16"))


def lose_shard(root: Path) -> None:
    (root / "data" / "features" / "pixels" / "exemplars" / "img_emb_0.npy").unlink()


def spoil_calibrator(root: Path) -> None:
    (root / "data" / "calibrators" / "pixels.json").write_text('{"inv_tau": 4, "b": -2}')


def wider_mapper(root: Path) -> None:
    mapper = dataclasses.replace(Mapper.identity(7), config={"backbone": "pixels"})
    mapper.save(root / "data" / "mappers" / "pixels" / "mapper.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            change_space,
            r"exemplars|distractors: another feature space \(dtype: wanted 'float16', got 'float32'\)",
        ),
        (lose_shard, "shard img_emb_0.npy is missing; run: dvc repro featurize@pixels"),
        (spoil_calibrator, r"calibrators/pixels\.json: .*-1 < b"),
        (wider_mapper, r"mapper\.safetensors: wanted a mapper for dim 48, got one for 7"),
        (lambda root: (root / "params.yaml").unlink(), r"params\.yaml: no such file"),
    ],
)
def test_what_does_not_fit_is_one_line(
    root: Path, capsys: pytest.CaptureFixture[str], spoil: object, message: str
) -> None:
    assert callable(spoil)
    spoil(root)
    assert main(["mine.jpg"]) == 2
    printed = capsys.readouterr()
    assert re.search(message, printed.err)
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_an_unknown_backbone_is_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mine.jpg", "--backbone", "dino"]) == 2
    assert capsys.readouterr().err == (
        "attribution: params.yaml: no section featurize.settings.dino; featurize.settings has: pixels\n"
    )


@pytest.mark.parametrize("text", ["", "featurize: 3", "featurize: {backbones: []}"])
def test_without_a_first_backbone_there_is_no_default(
    root: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (root / "params.yaml").write_text(text)
    assert main(["mine.jpg"]) == 2
    message = "attribution: params.yaml: featurize.backbones: wanted a list of one or more\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["mine.jpg", "--top", "0"],
        ["mine.jpg", "--top", "ten"],
        ["mine.jpg", "--page", "data"],
        ["mine.jpg", "--page", ""],
        ["mine.jpg", "--page", os.devnull],
        ["mine.jpg", "--page", "mine.jpg"],
        ["mine.jpg", "--page", "params.yaml"],
    ],
)
def test_wrong_arguments_are_status_2(root: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert (root / "data" / "mappers").is_dir()
    assert decode_image(root / "mine.jpg").size


def test_a_page_that_cannot_be_written_is_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mine.jpg", "--page", "params.yaml/page.html"]) == 2
    assert capsys.readouterr().err == "attribution: params.yaml: File exists\n"


def test_as_a_command_it_says_no_more_than_it_should(root: Path) -> None:
    (root / "bomb.png").write_bytes(png_of_size(10_000, 10_000))
    repository = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "attribution", "bomb.png", "mine.jpg"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(repository)},
    )
    assert done.returncode == 2
    assert done.stderr == ("attribution: bomb.png: 10000 x 10000 pixels, more than the limit of 50 million\n")
    assert rows_of(done.stdout)[0][3] == "e100"
    assert done.stdout.endswith("page: attribution.html\n")


def test_stdout_need_not_have_every_letter_nor_a_reader_to_the_end(root: Path) -> None:
    shutil.copy("mine.jpg", "\N{SNOWMAN}.jpg")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, "-m", "attribution", "\N{SNOWMAN}.jpg"]
    latin = {**environment, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=latin)
    assert done.stdout.startswith("\\u2603.jpg\n")
    Path("attribution.html").unlink()
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, text=True, check=True, env=environment
    )
    os.close(write)
    assert done.stderr == ""
    assert Path("attribution.html").exists()


def test_captions_may_be_missing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = root / "data" / "world" / "exemplars.parquet"
    rows = pq.read_table(table)
    captions = pa.array([None] * len(rows), pa.string())
    pq.write_table(rows.set_column(1, "caption", captions), table)
    assert main(["mine.jpg"]) == 0
    assert rows_of(capsys.readouterr().out)[0][3:] == ["e100", "exemplar"]
