"""Prompts as the UNet reads them, with a new token that each customized model has its own row for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from jaxtyping import Float, Int
from torch import Tensor, nn

from attribution.customized_model import TOKEN


def word_id(pipe: StableDiffusionPipeline, word: str) -> int:
    """The id of a word that is one token of the vocabulary. Raises ValueError if it is not."""
    ids = pipe.tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1 or ids[0] == pipe.tokenizer.unk_token_id:
        pieces = ", ".join(pipe.tokenizer.convert_ids_to_tokens(ids))
        raise ValueError(
            f"token initializer {word!r}: wanted one word of the base's vocabulary, got: {pieces}"
        )
    return int(ids[0])


def word_vectors(pipe: StableDiffusionPipeline, words: Sequence[str]) -> Float[Tensor, "words dim"]:
    """The rows of the base's token table for words of its vocabulary. Raises ValueError for others."""
    ids = [word_id(pipe, word) for word in words]
    return pipe.text_encoder.get_input_embeddings().weight[ids].detach()


def token_ids(
    pipe: StableDiffusionPipeline, prompts: Sequence[str], models: Sequence[int], *, token: str = TOKEN
) -> Int[Tensor, "prompts words"]:
    """Ids padded to the pipeline's length; where `token` stands, vocabulary size + the number of the model.

    Raises ValueError for a prompt that is too long: diffusers would cut it, and the concept with it.
    """
    tokenizer = pipe.tokenizer
    tokenizer.add_tokens(token)
    new = tokenizer.convert_tokens_to_ids(token)
    if new != len(tokenizer) - 1:
        raise ValueError(f"{token}: wanted a token that the base does not know, got its token {new}")
    length = tokenizer.model_max_length
    rows = tokenizer(list(prompts), padding="max_length", max_length=length).input_ids
    for prompt, row in zip(prompts, rows, strict=True):
        if len(row) > length:
            raise ValueError(f"prompt {prompt!r}: {len(row)} tokens, wanted at most {length}")
    ids = torch.tensor(rows, device=pipe.device)
    return torch.where(ids == new, ids + torch.tensor(models, device=pipe.device)[:, None], ids)


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
    pipe: StableDiffusionPipeline, ids: Int[Tensor, "prompts words"], vectors: Float[Tensor, "models dim"]
) -> Float[Tensor, "prompts words text"]:
    """What the UNet reads for `ids` (of `token_ids`), model m's token having row `vectors[m]`."""
    encoder = pipe.text_encoder
    table = encoder.get_input_embeddings()
    encoder.set_input_embeddings(_TokenTable(table, vectors, len(pipe.tokenizer) - 1))
    try:
        # No mask, as in diffusers: the padding is read too, except where the encoder's config says otherwise.
        return encoder(ids)[0]
    finally:
        encoder.set_input_embeddings(table)
