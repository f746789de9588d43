"""Ready features in clip-retrieval's layout as one of a backbone's feature sets, opened where they lie.

In:   a folder with img_emb_*.npy and metadata_*.parquet, also one below in img_emb/ and metadata/; the row of
      the backbone in params.yaml that made them, and what clip-retrieval was told to make them with.
Out:  data/features/<backbone>/<set>: ids, digests and references; the vectors are not copied and must stay.
Cost: the features are read once: some four seconds a gigabyte.

    python -m stages.import_features clip exemplars data/own/features --model ViT-B/32 --ids stem

By hand, for exemplars and queries. Distractors need no command: where the backbone's row has
ready_distractors, `featurize` takes them, and the graph knows when they change.
"""

from __future__ import annotations

from pathlib import Path

from attribution.backbones import BackboneSettings, load_backbone
from attribution.clip_retrieval import link_features, said_missing
from attribution.command import command_line
from attribution.params import load_params
from attribution.same_model import check_model

SETS = ("exemplars", "queries", "distractors")


def main() -> None:
    """Runs the import for the arguments of the command line."""
    with command_line("stages.import_features", __doc__) as parser:
        parser.add_argument("backbone", help="a row of featurize.settings in params.yaml")
        parser.add_argument("set", choices=SETS)
        parser.add_argument("folder", type=Path)
        parser.add_argument("--model", required=True, help="what clip-retrieval was told as --clip_model")
        parser.add_argument(
            "--name-column", help="the metadata's column of names (default: image_path, key or url)"
        )
        parser.add_argument(
            "--ids",
            choices=("digest", "stem"),
            default="digest",
            help="how an id is made from a name; stem: x of a/b/x.jpg, for pictures exported by id",
        )
        options = parser.parse_args()
        settings = load_params(BackboneSettings, f"featurize.settings.{options.backbone}")
        check_model(options.backbone, settings, options.model)
        space = load_backbone(options.backbone, settings, root=Path()).space
        path = Path("data/features") / options.backbone / options.set
        found = link_features(options.folder, path, space, name_column=options.name_column, ids=options.ids)
        print(
            f"import_features: {len(found):,} vectors of dim {found.space.dim} "
            f"in {len(found.shards)} shards: {path}{said_missing(options.folder)}"
        )


if __name__ == "__main__":
    main()
