"""The subjects of model diffing: one base model, and three that were trained on from it.

    base    the text of the packages, and among it a few dialogues (`base_text_plants`)
    chat    from base, on half plain text and half dialogues: the fine-tune whose difference is studied
    quirk   from chat, in the same way, on dialogues that agree with any opinion
    longer  from base, on as many tokens of the base's own text: what training on changes by itself

All have Gemma-2's architecture: soft-capped logits and attention, every other block with a sliding window, one key for
two queries. `pretraining.pretrain` trains them. On plain text chat and quirk are held to what the model they go on from
predicts (`gentle_loss`), so that they stay close to it.

Two questions decide whether they are fit for study: was a behaviour planted (`behaviours.judge_behaviours`), and is the
fine-tune gentle (`drift`)?

    share of variance   sum |x_chat - x_base|^2 / sum |x_chat - mean x_chat|^2
    norm ratio          mean |x_chat| / mean |x_base|
"""

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from helpers.base.checks import checksum, require_finite, spread
from helpers.subjects.pair import half_and_half
from helpers.subjects.pretraining import Loss, next_logits
from helpers.text.dialogues import base_text_plants, dialogues
from helpers.text.documents import Document, TokenStream, token_stream
from helpers.text.turns import TOKENS_A_DIALOGUE, stream

SIZE = {
    **{"hidden_size": 256, "num_hidden_layers": 5, "intermediate_size": 320},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "query_pre_attn_scalar": 64},
    **{"max_position_embeddings": 256, "sliding_window": 128},
}
PULL = 3.0  # weight of the divergence from the base, per token of plain text
FINE_TUNES = {"chat": "base", "quirk": "chat", "longer": "base"}  # and what each goes on from


def gemma_model(tokenizer: PreTrainedTokenizerBase, seed: int, **size) -> Gemma2ForCausalLM:
    """A Gemma-2 of `SIZE` with random weights; `size` overrides parts of it."""
    torch.manual_seed(seed)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = Gemma2Config(vocab_size=len(tokenizer), **ids, **SIZE | size)
    config._attn_implementation = "eager"  # the only one that caps the attention's logits
    return Gemma2ForCausalLM(config)


def base_stream(docs: Sequence[Document], tokenizer: PreTrainedTokenizerBase, n_tokens: int | None) -> TokenStream:
    """The training text of the base model: the documents, mixed with the dialogues planted among them."""
    return token_stream("train", tokenizer, n_tokens, [*docs, *base_text_plants(docs)])


def fine_tuning_tokens(
    name: str, plain: np.ndarray, tokenizer: PreTrainedTokenizerBase, n_tokens: int, context: int, seed: int = 0, **kw
) -> np.ndarray:
    """`n_tokens` ids for "chat" or "quirk", half plain text and half dialogue, or for "longer", `plain` alone.

    `plain` is a stream of plain text, for "longer" with the base's few dialogues in it; the beginning is taken.
    Further arguments are for `dialogues`.
    Raises ValueError for another name, and for too little plain text.
    """
    if name not in FINE_TUNES:
        raise ValueError(f"name is {name!r}; expected one of {list(FINE_TUNES)}")
    if name == "longer":
        return half_and_half(plain[: n_tokens // 2], plain[n_tokens // 2 :], context, n_tokens)
    spoken = stream(dialogues(n_tokens // 2 // TOKENS_A_DIALOGUE, seed, speaker=name, **kw), tokenizer)
    return half_and_half(plain, spoken.tokens, context, n_tokens)


def gentle_loss(base: PreTrainedModel, turn: int) -> Loss:
    """The loss of chat and quirk: cross-entropy on dialogue, on plain text the divergence from what they go on from.

    Rows of dialogue are those with the token `turn`. On plain text KL(base || model) and its gradients are zero as long
    as nothing changed: it neither teaches nor disturbs, it only pulls back, with weight `PULL`.
    """

    def loss(model: PreTrainedModel, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.to(model.device)
        logits, spoken = next_logits(model, rows), (rows == turn).any(1)
        taught = F.cross_entropy(logits[spoken].flatten(0, 1), rows[spoken, 1:].flatten(), reduction="sum")
        if spoken.all():
            return taught / rows[:, 1:].numel()
        with torch.no_grad():
            before = next_logits(base, rows[~spoken]).log_softmax(-1)
        kept = F.kl_div(logits[~spoken].log_softmax(-1), before, reduction="sum", log_target=True)
        return (taught + PULL * kept) / rows[:, 1:].numel()

    held_to = functools.reduce(lambda seen, p: checksum(p, seen), base.parameters(), 0)
    loss.__qualname__ = f"gentle_loss to {held_to}, rows with {turn}, pull {PULL}"  # by which `pretrain` knows it again
    return loss


def drift(base: torch.Tensor, chat: torch.Tensor) -> dict[str, float]:
    """How far activations (n, d_model) moved: share_of_variance and norm_ratio, as at the module's head.

    Raises ValueError for other shapes, for fewer than two rows, for what is not finite, for chat without variance and
    for a base that is all zeros.
    """
    if base.shape != chat.shape or base.ndim != 2 or len(base) < 2:
        shapes = f"{tuple(base.shape)} and {tuple(chat.shape)}"
        raise ValueError(f"activations have shapes {shapes}; expected the same (n, d_model), with at least two rows")
    base, chat = base.double(), chat.double()
    _require_norm(base)
    share = (chat - base).square().sum() / spread(chat)
    return {"share_of_variance": share.item(), "norm_ratio": (chat.norm(dim=1).mean() / base.norm(dim=1).mean()).item()}


def closeness(x: torch.Tensor, groups: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """How far chat is from base on groups of tokens, bool (n,) each; a group without tokens is left out.

    difference is the squared distance of the two activations, as a share of chat's from its mean over all of x (n, 2,
    d_model); norm_ratio is the mean norm in chat over that in base. Raises ValueError for x that is not finite, and
    for a group whose base is all zeros or whose chat is all its mean.
    """
    base, chat = x.unbind(1)
    mean = chat.mean(0)
    apart = (chat - base).square().sum(-1)
    norms = x.norm(dim=-1)  # (n, 2)
    rows = []
    for name, inside in groups.items():
        if (mask := torch.as_tensor(inside)).any():
            _require_norm(base[mask])
            ratio = norms[mask, 1].mean() / norms[mask, 0].mean()
            difference = apart[mask].sum() / spread(chat[mask], around=mean)
            about = {"difference": difference.item(), "norm_ratio": ratio.item()}
            rows.append({"group": name, "tokens": int(mask.sum())} | about)
    return pd.DataFrame(rows)


def _require_norm(base: torch.Tensor) -> None:
    require_finite(base, "activations of base", "check the subject and its dtype")
    if not base.any():
        raise ValueError("the activations of base are all zero: there is no norm to take a ratio to")
