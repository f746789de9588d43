"""Prompts as the UNet reads them, with a new token that each customized model has its own rows for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLPipeline
from jaxtyping import Float, Int
from torch import Tensor, nn

from attribution.base_model import Pipeline, latent_shape, text_encoders
from attribution.cross_attention import Text
from attribution.customized_model import TOKEN


def word_id(tokenizer: Any, word: str) -> int:
    """The id of a word that is one token of the vocabulary. Raises ValueError if it is not."""
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        pieces = ", ".join(tokenizer.convert_ids_to_tokens(ids))
        raise ValueError(
            f"token initializer {word!r}: wanted one word of the base's vocabulary, got: {pieces}"
        )
    return int(ids[0])


def word_vectors(pipe: Pipeline, words: Sequence[str]) -> Float[Tensor, "words dim"]:
    """The rows of the base's token tables for words of its vocabulary, those of both encoders side by side.

    Raises ValueError for other words.
    """
    rows = []
    for tokenizer, encoder in text_encoders(pipe):
        ids = [word_id(tokenizer, word) for word in words]
        rows.append(encoder.get_input_embeddings().weight[ids].detach())
    return torch.cat(rows, dim=1).to(pipe.unet.device)


def row_widths(pipe: Pipeline) -> list[int]:
    """How much of such a row is each encoder's."""
    return [encoder.get_input_embeddings().weight.shape[1] for _, encoder in text_encoders(pipe)]


def token_ids(
    pipe: Pipeline, prompts: Sequence[str], models: Sequence[int], *, token: str = TOKEN
) -> Int[Tensor, "prompts words"]:
    """Ids padded to the pipeline's length; where `token` stands, vocabulary size + the number of the model.

    Those of a second tokenizer, which pads differently, follow those of the first. Raises ValueError for a
    prompt that is too long: diffusers would cut it, and the concept with it.
    """
    numbers = torch.tensor(models, device=pipe.unet.device)[:, None]
    columns = []
    for tokenizer, _ in text_encoders(pipe):
        ids = torch.tensor(_padded(tokenizer, prompts, token), device=pipe.unet.device)
        columns.append(torch.where(ids == len(tokenizer) - 1, ids + numbers, ids))
    return torch.cat(columns, dim=1)


def _padded(tokenizer: Any, prompts: Sequence[str], token: str) -> list[list[int]]:
    tokenizer.add_tokens(token)
    new = tokenizer.convert_tokens_to_ids(token)
    if new != len(tokenizer) - 1:
        raise ValueError(f"{token}: wanted a token that the base does not know, got its token {new}")
    length = tokenizer.model_max_length
    rows = tokenizer(list(prompts), padding="max_length", max_length=length).input_ids
    for prompt, row in zip(prompts, rows, strict=True):
        if len(row) > length:
            raise ValueError(f"prompt {prompt!r}: {len(row)} tokens, wanted at most {length}")
    return rows


class _TokenTable(nn.Module):
    """The frozen table of the base, with ids from `first` on taken from `vectors`."""

    def __init__(self, table: nn.Module, vectors: Tensor, first: int) -> None:
        super().__init__()
        self.table, self.vectors, self.first = table, vectors, first

    def forward(self, ids: Tensor) -> Tensor:
        is_new = ids >= self.first
        old = self.table(ids.masked_fill(is_new, 0))
        new = F.embedding((ids - self.first).clamp(min=0), self.vectors)
        return torch.where(is_new[..., None], new.to(old.dtype), old)


def encode_text(
    pipe: Pipeline, ids: Int[Tensor, "prompts words"], vectors: Float[Tensor, "models dim"]
) -> Text:
    """What the UNet reads for `ids` (of `token_ids`), model m's token having row `vectors[m]`.

    For SDXL, as diffusers has it: the layers before the last of both encoders side by side, the second's
    pooled text, and the size of a picture that was neither shrunk nor cropped. Where the base says so, the
    empty prompt of guidance is nothing at all.
    """
    if not isinstance(pipe, StableDiffusionXLPipeline):
        with _own_rows(pipe.tokenizer, pipe.text_encoder, vectors) as encoder:
            # No mask, as in diffusers: the padding is read too.
            return Text(encoder(ids)[0], {})
    words, pooled = [], ids.new_zeros(0)
    parts = zip(text_encoders(pipe), ids.chunk(2, dim=1), vectors.split(row_widths(pipe), dim=1), strict=True)
    for (tokenizer, whole), mine, rows in parts:
        with _own_rows(tokenizer, whole, rows) as encoder:
            read = encoder(mine, output_hidden_states=True)
            words.append(read.hidden_states[-2])
            # Of the second, which has a projection, the last is kept. With the token in the prompt it is read
            # where the token stands, not at the end: the published encoder takes the largest id for the end.
            pooled = read[0]
    made = torch.cat(words, dim=-1)
    if pipe.config.force_zeros_for_empty_prompt:
        empty = ids[:, 1] == pipe.tokenizer.eos_token_id
        made = made.masked_fill(empty[:, None, None], 0)
        pooled = pooled.masked_fill(empty[:, None], 0)
    height, width = (side * pipe.vae_scale_factor for side in latent_shape(pipe)[1:])
    sizes = made.new_tensor([height, width, 0, 0, height, width]).expand(len(ids), -1)
    return Text(made, {"text_embeds": pooled, "time_ids": sizes})


@contextlib.contextmanager
def _own_rows(tokenizer: Any, encoder: Any, vectors: Tensor) -> Iterator[Any]:
    """Inside, the encoder reads ids from the vocabulary's end on as rows of `vectors`."""
    table = encoder.get_input_embeddings()
    encoder.set_input_embeddings(_TokenTable(table, vectors, len(tokenizer) - 1))
    try:
        yield encoder
    finally:
        encoder.set_input_embeddings(table)
