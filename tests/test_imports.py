"""What kept results depend on: all that their makers import, but for what cannot change them."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages import customizer, synthesizer
from stages.imports import BESIDE, ROOT, code_behind, imported_files

MAKERS = (customizer, synthesizer)


def names(files: tuple[str, ...]) -> set[str]:
    return {str(Path(file).relative_to(ROOT)) for file in files}


def test_a_module_is_followed_through_others(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    sources = {
        "one": "def later():\n    from stages.two import x\n",
        "two": "import numpy\nfrom stages import three, one\n",
        "three": "",
        "four": "from stages import one\n",
    }
    for name, source in sources.items():
        (tmp_path / "stages" / f"{name}.py").write_text(source)
    found = imported_files(tmp_path / "stages" / "one.py", tmp_path)
    assert {path.stem for path in found} == {"one", "two", "three"}


def test_what_makes_a_result_counts_and_what_shares_the_work_does_not() -> None:
    made, drawn = (names(maker.CODE) for maker in MAKERS)
    assert made - drawn >= {"attribution/lessons.py", "attribution/augmentation.py", "stages/lesson_plan.py"}
    assert drawn - made == {"stages/image_requests.py", "stages/synthesizer.py"}
    assert made & drawn >= {"attribution/sampling.py", "attribution/lora.py", "attribution/images.py"}
    assert not (made | drawn) & {*BESIDE, "stages/customize.py", "stages/synthesize.py"}


@pytest.mark.parametrize("name", BESIDE)
def test_nothing_is_left_out_in_vain(name: str) -> None:
    imported = set.union(*(imported_files(Path(maker.__file__), ROOT) for maker in MAKERS))
    assert ROOT / name in imported
    assert str(ROOT / name) not in code_behind(customizer.__file__)
