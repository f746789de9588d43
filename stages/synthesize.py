"""Draws images with every fresh customized model, and lists them with the shipped ones as queries.

In: data/customized, data/prompts, data/world/exemplars.parquet, data/shipped/synthesized.parquet, the base
model. Out: data/synthesized/<concept_id>.parquet, image tables, and data/queries.parquet, the rest.
Concepts of train and val are drawn from train prompts, those of test from test prompts. Any row can be drawn
again with diffusers alone: load the delta, then pipe(prompt, generator=torch.Generator().manual_seed(seed)).
Incremental per concept, and what fails is named when all others are done, as in customize; where the stage
may pass without it, the queries are those of the others. Cost: about 2 s per concept of 20 images on 2 CPU
cores (mini base). Which images: stages/image_requests.py; a batch of them: stages/synthesizer.py; the table
of queries: stages/query_table.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from attribution.base_model import BaseSettings
from attribution.command import command_line
from attribution.concepts import read_concepts
from attribution.params import load_params
from stages.image_requests import Params, choose, read_prompts
from stages.incremental import (
    FAILED,
    StageError,
    Summary,
    alone_in,
    batches,
    finish_placing,
    leave_out,
    prune,
    room_for,
)
from stages.query_table import write_queries
from stages.synthesizer import Synthesizer
from stages.workers import worker_map


def run(
    params: Params,
    base: BaseSettings,
    *,
    exemplars: Path,
    customized: Path,
    prompts: Path,
    synthesized: Path,
    fresh: bool | None = True,
) -> Summary:
    """Brings `synthesized` up to date with the customized models of the (fresh) concepts.

    Raises StageError naming the concepts that failed, after all others are done, if they are too many, or
    what stopped the run.
    """
    wanted = read_concepts(exemplars, fresh=fresh)
    words = read_prompts(prompts)
    requests = {concept.concept_id: choose(params, concept, words) for concept in wanted}
    with alone_in(customized, to_read=True), alone_in(synthesized):
        finish_placing(synthesized)
        synthesizer = Synthesizer.of(params, base, requests, customized, synthesized)
        pruned = prune(synthesized, [FAILED, *(f"{concept_id}.parquet" for concept_id in requests)])
        summary = Summary("synthesize", pruned=pruned, failed=dict(synthesizer.without))
        pending: list[str] = []
        for concept_id in synthesizer.keys:
            (summary.reused if synthesizer.is_done(concept_id) else pending).append(concept_id)
        with summary.counting(pending, synthesizer.is_done):
            synthesize_all(synthesizer, pending, summary)
        summary.raise_failures(params.max_failed_share)
        drawn = (synthesizer.table(concept_id).name for concept_id in (*summary.done, *summary.reused))
        leave_out(synthesized, summary.failed, drawn)
    return summary


def synthesize_all(synthesizer: Synthesizer, pending: Sequence[str], summary: Summary) -> None:
    """Draws concept by concept as far as the disk has room; `summary` says what came of each."""
    if not pending:
        return
    params, images = synthesizer.params, {name: len(synthesizer.requests[name]) for name in pending}
    groups = batches(list(synthesizer.keys), pending, max(1, params.images_per_batch // max(images.values())))
    # What is there of an earlier run gives way to what is made.
    new = {concept_id for concept_id in pending if not synthesizer.table(concept_id).exists()}
    if summary.reused:
        room_for(len(new), "tables of images", like=synthesizer.table(summary.reused[0]))
    with (
        worker_map(min(params.workers, len(groups))) as each,
        tqdm(total=sum(images.values()), desc="synthesize", unit="image", disable=None) as progress,
    ):
        for group, part in zip(groups, each(draw_all, map(synthesizer.part, groups)), strict=True):
            summary.add(part)
            progress.update(sum(images[concept_id] for concept_id in group))
            new -= {*part.done, *part.failed}
            if part.done:
                room_for(len(new), "tables of images", like=synthesizer.table(part.done[0]))


def draw_all(part: Synthesizer) -> Summary:
    """Draws all that is requested of a part."""
    return part.draw(list(part.requests))


def main() -> None:
    """`python -m stages.synthesize`, from the repository's root. No queries are listed if too many failed."""
    params, base = load_params(Params, "synthesize"), load_params(BaseSettings, "base")
    exemplars, synthesized = Path("data/world/exemplars.parquet"), Path("data/synthesized")
    try:
        summary = run(
            params,
            base,
            exemplars=exemplars,
            customized=Path("data/customized"),
            prompts=Path("data/prompts"),
            synthesized=synthesized,
        )
    except StageError as error:
        sys.exit(str(error))
    print(summary.report())
    print(
        write_queries(
            Path("data/queries.parquet"),
            base,
            exemplars=exemplars,
            synthesized=synthesized,
            shipped=Path("data/shipped/synthesized.parquet") if params.use_shipped else None,
        )
    )


if __name__ == "__main__":
    with command_line("stages.synthesize", __doc__) as parser:
        parser.parse_args()
        main()
