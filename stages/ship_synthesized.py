"""Makes data/shipped/synthesized.parquet: the images of all concepts that a default run does not customize.

`python -m stages.ship_synthesized` runs customize and synthesize over the concepts that are not fresh, in
data/shipping/ (not in git), and joins their image tables. Run it when the base model, the world, the prompts
or the parameters of either stage have changed; killed, it goes on where it was; run again, it
redraws only what changed. In: as for those two. Cost: about 4 s per concept on 2 CPU cores (mini base).
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pyarrow as pa

from attribution.base_model import BaseSettings
from attribution.command import command_line
from attribution.concepts import read_concepts
from attribution.files import require_space
from attribution.images import read_image_table, write_image_table
from attribution.params import load_params
from stages import customize, synthesize
from stages.incremental import StageError, Summary
from stages.query_table import identity
from stages.synthesizer import SCHEMA


def run(
    customize_params: customize.Params,
    synthesize_params: synthesize.Params,
    base: BaseSettings,
    *,
    exemplars: Path,
    prompts: Path,
    work: Path,
    shipped: Path,
) -> list[Summary]:
    """`shipped` holds the images of every concept that is not fresh, and says what they were made from.

    Raises StageError for what failed in either stage, after all else is done; `shipped` is then as it was.
    """
    customized, synthesized = work / "customized", work / "synthesized"
    # What is shipped lacks nothing.
    customize_params = replace(customize_params, max_failed_share=0.0)
    synthesize_params = replace(synthesize_params, max_failed_share=0.0)
    stages = (
        partial(customize.run, customize_params, customized=customized),
        partial(
            synthesize.run, synthesize_params, customized=customized, prompts=prompts, synthesized=synthesized
        ),
    )
    summaries, failures = [], []
    for stage in stages:
        try:
            summaries.append(stage(base=base, exemplars=exemplars, fresh=False))
        except StageError as error:
            failures.append(str(error))
    if failures:
        raise StageError("\n".join(failures))
    concepts = read_concepts(exemplars, fresh=False)
    parts = [read_image_table(synthesized / f"{concept.concept_id}.parquet") for concept in concepts]
    rows = pa.concat_tables([SCHEMA.empty_table(), *(part.cast(SCHEMA) for part in parts)])
    require_space(shipped, rows.nbytes, f"{len(rows):,} images")
    made_from = {
        "base": base.key(),
        "concepts": json.dumps({concept.concept_id: identity(concept) for concept in concepts}),
        "params": json.dumps(
            {"customize": asdict(customize_params), "synthesize": asdict(synthesize_params)}
        ),
    }
    write_image_table(shipped, rows.replace_schema_metadata(made_from))
    return summaries


def main() -> None:
    """`python -m stages.ship_synthesized`, from the repository's root."""
    shipped = Path("data/shipped/synthesized.parquet")
    try:
        summaries = run(
            load_params(customize.Params, "customize"),
            load_params(synthesize.Params, "synthesize"),
            load_params(BaseSettings, "base"),
            exemplars=Path("data/world/exemplars.parquet"),
            prompts=Path("data/prompts"),
            work=Path("data/shipping"),
            shipped=shipped,
        )
    except StageError as error:
        sys.exit(str(error))
    for summary in summaries:
        print(summary)
    print(f"{shipped}: {shipped.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    with command_line("stages.ship_synthesized", __doc__) as parser:
        parser.parse_args()
        main()
