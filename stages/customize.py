"""Customizes the base model toward every fresh concept (several in one batch), by the method of choice.

In: data/world/exemplars.parquet, the base model. Out: data/customized/<concept_id>/, a delta in the files
that diffusers loads, with customized.json; and _prior/, the base's own images of each noun. Incremental: a
concept whose exemplars, parameters, base and code are as they were is kept, one that is gone is removed, a
killed run goes on where it was. What fails is named when all others are done, and in _failed.json where the
stage may pass without it. Cost: about 2 s per concept on 2 CPU cores with the mini base. What a concept is
learned from: stages/lesson_plan.py; a batch: stages/customizer.py.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from attribution.base_model import BaseSettings
from attribution.command import command_line
from attribution.concepts import Concept, read_concepts
from attribution.params import load_params
from stages.customizer import PRIOR, Customizer
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
from stages.lesson_plan import Params
from stages.workers import worker_map


def run(
    params: Params, base: BaseSettings, *, exemplars: Path, customized: Path, fresh: bool | None = True
) -> Summary:
    """Brings `customized` up to date with the concepts of `exemplars` (None: fresh ones and others).

    Raises StageError naming the concepts that failed, after all others are done, if they are too many, or
    what stopped the run.
    """
    wanted = read_concepts(exemplars, fresh=fresh)
    largest = max(wanted, key=lambda concept: len(concept.exemplars), default=None)
    if largest is not None and len(largest.exemplars) > params.views:
        raise StageError(
            f"customize: {largest.concept_id}: {len(largest.exemplars)} exemplars, but customize.views is "
            f"{params.views}: nothing would be learned from the others; do: raise views"
        )
    customizer = Customizer.of(params, base, wanted, customized)
    with alone_in(customized):
        finish_placing(customized)
        summary = Summary("customize", pruned=prune(customized, [PRIOR, FAILED, *customizer.keys]))
        prune(customized / PRIOR, [customizer.base_key])
        pending = []
        for concept in wanted:
            if customizer.is_done(concept.concept_id):
                summary.reused.append(concept.concept_id)
            else:
                pending.append(concept)
        with summary.counting([concept.concept_id for concept in pending], customizer.is_done):
            customize_all(customizer, batches(wanted, pending, params.concepts_per_batch), summary)
        summary.raise_failures(params.max_failed_share)
        leave_out(customized, summary.failed, [PRIOR, *summary.done, *summary.reused])
    return summary


def customize_all(customizer: Customizer, groups: Sequence[Sequence[Concept]], summary: Summary) -> None:
    """Customizes group by group as far as the disk has room; `summary` says what came of each concept."""
    params, pending = customizer.params, list(itertools.chain(*groups))
    if not pending:
        return
    # What is there of an earlier run gives way to what is made.
    new = {concept.concept_id for concept in pending if not customizer.folder(concept.concept_id).exists()}
    if summary.reused:
        room_for(len(new), "customized models", like=customizer.folder(summary.reused[0]))
    with (
        worker_map(min(params.workers, len(groups))) as each,
        tqdm(total=len(pending), desc="customize", unit="concept", disable=None) as progress,
    ):
        one_of_each = {params.prior_prompt(concept): concept for concept in pending}
        reasons = dict(zip(one_of_each, each(customizer.draw_prior, one_of_each.values()), strict=True))
        for concept in pending:
            if reason := reasons[params.prior_prompt(concept)]:
                summary.failed[concept.concept_id] = reason
        sound = [[one for one in group if one.concept_id not in summary.failed] for group in groups]
        groups = [group for group in sound if group]
        for group, part in zip(groups, each(customizer.learn, groups), strict=True):
            summary.add(part)
            progress.update(len(group))
            new -= {*part.done, *part.failed}
            if part.done:
                room_for(len(new), "customized models", like=customizer.folder(part.done[0]))


def main() -> None:
    """`python -m stages.customize`, from the repository's root."""
    try:
        summary = run(
            load_params(Params, "customize"),
            load_params(BaseSettings, "base"),
            exemplars=Path("data/world/exemplars.parquet"),
            customized=Path("data/customized"),
        )
    except StageError as error:
        sys.exit(str(error))
    print(summary.report())


if __name__ == "__main__":
    with command_line("stages.customize", __doc__) as parser:
        parser.parse_args()
        main()
