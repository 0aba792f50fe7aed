"""FLUX.1 with condition branches, for training: diffusers' modules, one wrapper per block.

The same mathematics as ``omini2_core/flux1/blocks.py`` and ``engine/attention.py``, which work on
ComfyUI's modules instead; ``test_training_parity.py`` holds the two together: change both. A
condition goes through FLUX's image stream with its own LoRA, at time 0 and guidance 1 (original
``block_forward``, ``single_block_forward`` and ``transformer_forward``). One condition's LoRA may
act on the picture as well (the original's ``latent_lora``).

References of an editing model have no LoRA of their own: one acts on text, picture and references
alike, as a stock loader applies it. Joint ones are rows of the picture's stream; isolated ones are
a stream of their own at time 0 that sees itself only (``engine/references.py`` has the same).

One wrapper module per block, so that gradient checkpointing and FSDP take hold of a block as a
whole, every stream included.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, eq=False)
class ConditionTokens:
    """One condition of a batch.

    Attributes:
        tokens: (batch, n, 64) packed latents; rows that aren't ``kept`` are padding.
        ids: (batch or 1, n, 3) index, row and column of each token; fractions are fine.
        adapter: the name of its LoRA, or None.
        independent: whether it attends to itself only.
        kept: (batch, n) bool, or None if all take part.
        reference: whether it is a reference image, which the LoRA of the main stream acts on;
            independent is what the nodes call isolated.
    """

    tokens: Tensor
    ids: Tensor
    adapter: str | None
    independent: bool = False
    kept: Tensor | None = None
    reference: bool = False


class Rope(NamedTuple):
    """Cosines and sines of a stream's positions, (batch or 1, 1, tokens, head_dim) each."""

    cos: Tensor
    sin: Tensor


class Stream(NamedTuple):
    """What stays the same for a stream of tokens through all blocks.

    Attributes:
        temb: (batch, hidden) time, guidance and pooled text.
        rope: of its tokens; for the main stream of text and picture together.
        adapter: the LoRA that acts on it.
        joint: whether it attends to the main stream.
        mask: (batch, 1, 1, keys) bool over the keys it attends to; None is all of them.
    """

    temb: Tensor
    rope: Rope
    adapter: str | None = None
    joint: bool = True
    mask: Tensor | None = None


def branch_linear(module: Any, x: Tensor, adapter: str | None) -> Tensor:
    """A linear layer as one stream sees it: the base, plus that stream's LoRA on top.

    Stateless, so that streams with different LoRAs go through one module in one pass.
    """
    base: Tensor = getattr(module, "base_layer", module)(x)
    if adapter is None or adapter not in getattr(module, "lora_A", ()):
        return base
    low = module.lora_A[adapter](x)
    delta: Tensor = module.lora_B[adapter](low) * module.scaling[adapter]
    return base + delta.to(base.dtype)


class ConditionedDoubleBlock(nn.Module):
    """A ``FluxTransformerBlock`` for text, picture and every condition."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block: Any = block

    def forward(
        self,
        text: Tensor,
        picture: Tensor,
        conditions: list[Tensor],
        main: Stream,
        branches: Sequence[Stream],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """All of shape (batch, tokens, hidden), as they come out of the block."""
        block, attn = self.block, self.block.attn
        text_mod = _modulation(block.norm1_context.linear, main.temb, main.adapter, 6)
        mod = _modulation(block.norm1.linear, main.temb, main.adapter, 6)
        into_text = _modulated(block.norm1_context.norm, text, text_mod[0], text_mod[1])
        into_picture = _modulated(block.norm1.norm, picture, mod[0], mod[1])
        added = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
        of_text = _heads(added, into_text, attn.head_dim, main.adapter)
        of_picture = _heads(_qkv(attn), into_picture, attn.head_dim, main.adapter)
        q, k, v = (
            torch.cat(pair, 2)
            for pair in zip(
                _normed(attn.norm_added_q, attn.norm_added_k, *of_text),
                _normed(attn.norm_q, attn.norm_k, *of_picture),
                strict=True,
            )
        )
        q, k = rotate(q, main.rope), rotate(k, main.rope)

        mods, qkvs = [], []
        for x, branch in zip(conditions, branches, strict=True):
            own = _modulation(block.norm1.linear, branch.temb, branch.adapter, 6)
            into = _modulated(block.norm1.norm, x, own[0], own[1])
            mods.append(own)
            qkvs.append(_rotated_qkv(attn, into, branch))
        attended, of_conditions = _attention(q, k, v, main, qkvs, branches)

        length = text.shape[1]
        ends = attn.to_add_out, block.norm2_context, block.ff_context
        text = _behind_attention(text, attended[:, :length], text_mod, ends, main.adapter)
        ends = attn.to_out[0], block.norm2, block.ff
        picture = _behind_attention(picture, attended[:, length:], mod, ends, main.adapter)
        conditions = [
            _behind_attention(x, each, own, ends, branch.adapter)
            for x, each, own, branch in zip(conditions, of_conditions, mods, branches, strict=True)
        ]
        return text, picture, conditions


class ConditionedSingleBlock(nn.Module):
    """A ``FluxSingleTransformerBlock`` for text and picture together and every condition.

    Attributes:
        last: whether no block follows, so that only the conditions' keys and values matter.
    """

    def __init__(self, block: nn.Module, last: bool) -> None:
        super().__init__()
        self.block: Any = block
        self.last = last

    def forward(
        self,
        main_tokens: Tensor,
        conditions: list[Tensor],
        main: Stream,
        branches: Sequence[Stream],
    ) -> tuple[Tensor, list[Tensor]]:
        """All of shape (batch, tokens, hidden), as they come out of the block."""
        attn = self.block.attn
        into, gate = self._into(main_tokens, main)
        q, k, v = _rotated_qkv(attn, into, main)
        intos = [self._into(x, b) for x, b in zip(conditions, branches, strict=True)]
        qkvs = [_rotated_qkv(attn, x, b) for (x, _), b in zip(intos, branches, strict=True)]
        attended, of_conditions = _attention(q, k, v, main, qkvs, branches, not self.last)
        main_tokens = self._out(main_tokens, attended, into, gate, main.adapter)
        if self.last:
            return main_tokens, []
        conditions = [
            self._out(x, each, own, own_gate, branch.adapter)
            for x, each, (own, own_gate), branch in zip(
                conditions, of_conditions, intos, branches, strict=True
            )
        ]
        return main_tokens, conditions

    def _into(self, x: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
        norm = self.block.norm
        shift, scale, gate = _modulation(norm.linear, stream.temb, stream.adapter, 3)
        return _modulated(norm.norm, x, shift, scale), gate

    def _out(
        self, x: Tensor, attended: Tensor, into: Tensor, gate: Tensor, adapter: str | None
    ) -> Tensor:
        block = self.block
        mlp = F.gelu(branch_linear(block.proj_mlp, into, adapter), approximate="tanh")
        out = torch.cat((attended, mlp.to(attended.dtype)), dim=-1)
        return x + gate * branch_linear(block.proj_out, out, adapter)


class ConditionedFlux(nn.Module):
    """Diffusers' FLUX.1 transformer with conditions; takes the model it is given apart.

    Args:
        flux: a ``FluxTransformer2DModel``; LoRAs, if any, have to be injected already.
        gradient_checkpointing: whether blocks are computed again in the backward pass.
        main_adapter: the LoRA that acts on text and picture too, as far as it has their modules.
    """

    def __init__(
        self, flux: Any, gradient_checkpointing: bool = False, main_adapter: str | None = None
    ) -> None:
        super().__init__()
        singles = flux.single_transformer_blocks
        flux.transformer_blocks = nn.ModuleList(
            ConditionedDoubleBlock(block) for block in flux.transformer_blocks
        )
        flux.single_transformer_blocks = nn.ModuleList(
            ConditionedSingleBlock(block, block is singles[-1]) for block in singles
        )
        self.flux: Any = flux
        self.gradient_checkpointing = gradient_checkpointing
        self.main_adapter = main_adapter

    @property
    def guidance_embeds(self) -> bool:
        """Whether the model takes a guidance value, as FLUX.1-dev does."""
        return bool(self.flux.config.guidance_embeds)

    def forward(
        self,
        picture: Tensor,
        text: Tensor,
        pooled: Tensor,
        timestep: Tensor,
        picture_ids: Tensor,
        conditions: Sequence[ConditionTokens] = (),
        guidance: Tensor | None = None,
        picture_kept: Tensor | None = None,
        text_kept: Tensor | None = None,
    ) -> Tensor:
        """The velocity, noise - picture.

        Args:
            picture: (batch, n, 64) packed latents.
            text: (batch, m, text width).
            pooled: (batch, pooled width).
            timestep: (batch,), 0 to 1.
            picture_ids: (batch or 1, n, 3); the text lies at 0, 0, 0.
            guidance: (batch,); 1 where None is given.
            picture_kept, text_kept: (batch, n), (batch, m) bool; the other rows are padding.

        Returns:
            (batch, n, 64); rows of padding hold nothing of use.
        """
        flux, own = self.flux, picture.shape[1]
        references = [c for c in conditions if c.reference]
        conditions = [c for c in conditions if not c.reference]
        if any(c.independent for c in references):
            alone = _in_one_sequence(references)
            conditions.append(replace(alone, adapter=self.main_adapter))
        elif references:
            of_picture = ConditionTokens(picture, picture_ids, None, kept=picture_kept)
            whole = _in_one_sequence([of_picture, *references])
            picture, picture_ids, picture_kept = whole.tokens, whole.ids, whole.kept
        text_ids = picture_ids.new_zeros(picture_ids.shape[0], text.shape[1], 3)
        main = Stream(
            self._time_embedding(timestep, guidance, pooled),
            self._rope(torch.cat((text_ids, picture_ids), 1)),
            self.main_adapter,
        )
        begin = torch.zeros_like(timestep)
        start = self._time_embedding(begin, None, pooled)
        # A reference has the picture's guidance: it goes through the model like the picture.
        referred = self._time_embedding(begin, guidance, pooled)
        kept = _joined((text_kept, text), (picture_kept, picture))
        branches = [
            Stream(
                referred if c.reference else start,
                self._rope(c.ids),
                c.adapter,
                not c.independent,
                _branch_mask(c, kept, text, picture),
            )
            for c in conditions
        ]
        main = main._replace(mask=_main_mask(kept, text, picture, conditions))

        x = flux.x_embedder
        tokens = [branch_linear(x, c.tokens, c.adapter) for c in conditions]
        picture, text = branch_linear(x, picture, main.adapter), flux.context_embedder(text)
        for block in flux.transformer_blocks:
            text, picture, tokens = self._run(block, text, picture, tokens, main, branches)
        length, hidden = text.shape[1], torch.cat((text, picture), 1)
        for block in flux.single_transformer_blocks:
            hidden, tokens = self._run(block, hidden, tokens, main, branches)
        pictures = hidden[:, length : length + own]
        velocity: Tensor = flux.proj_out(flux.norm_out(pictures, main.temb))
        return velocity

    def _run(self, block: nn.Module, *args: Any) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def _time_embedding(self, timestep: Tensor, guidance: Tensor | None, pooled: Tensor) -> Tensor:
        embed: Callable[..., Tensor] = self.flux.time_text_embed
        time = timestep * 1000
        if not self.guidance_embeds:
            return embed(time, pooled)
        if guidance is None:
            guidance = torch.ones_like(timestep)
        return embed(time, guidance * 1000, pooled)

    def _rope(self, ids: Tensor) -> Rope:
        batch, tokens, axes = ids.shape
        cos, sin = self.flux.pos_embed(ids.reshape(-1, axes))
        return Rope(cos.view(batch, 1, tokens, -1), sin.view(batch, 1, tokens, -1))


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """RoPE on (batch, heads, tokens, head_dim), neighbouring numbers as pairs, in float32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    turned = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
    return (x.float() * rope.cos + turned * rope.sin).to(x.dtype)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    main: Stream,
    conditions: Sequence[tuple[Tensor, Tensor, Tensor]],
    branches: Sequence[Stream],
    with_conditions: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    """Who sees whom (paper section 3.3): the main stream everything, a condition itself and, if
    joint, the main stream; never another condition."""
    keys = torch.cat((k, *(c[1] for c in conditions)), 2)
    values = torch.cat((v, *(c[2] for c in conditions)), 2)
    attended = _attend(q, keys, values, main.mask)
    if not with_conditions:
        return attended, []
    of_conditions = []
    for (own_q, own_k, own_v), branch in zip(conditions, branches, strict=True):
        if branch.joint:
            own_k, own_v = torch.cat((k, own_k), 2), torch.cat((v, own_v), 2)
        of_conditions.append(_attend(own_q, own_k, own_v, branch.mask))
    return attended, of_conditions


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


def _modulation(module: Any, temb: Tensor, adapter: str | None, parts: int) -> Sequence[Tensor]:
    """Shifts, scales and gates, (batch, 1, hidden) each, in FLUX's order."""
    return branch_linear(module, F.silu(temb), adapter)[:, None].chunk(parts, dim=-1)


def _modulated(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed: Tensor = norm(x)
    return normed * (1 + scale) + shift


def _qkv(attn: Any) -> tuple[Any, Any, Any]:
    return attn.to_q, attn.to_k, attn.to_v


def _behind_attention(
    x: Tensor,
    attended: Tensor,
    mod: Sequence[Tensor],
    modules: tuple[Any, Any, Any],
    adapter: str | None,
) -> Tensor:
    """The second half of a double block, for one stream: its projection, norm and MLP."""
    projection, norm, mlp = modules
    x = x + mod[2] * branch_linear(projection, attended, adapter)
    into = _modulated(norm, x, mod[3], mod[4])
    hidden = F.gelu(branch_linear(mlp.net[0].proj, into, adapter), approximate="tanh")
    return x + mod[5] * branch_linear(mlp.net[2], hidden, adapter)


def _heads(linears: tuple[Any, ...], x: Tensor, head_dim: int, adapter: str | None) -> list[Tensor]:
    """(batch, tokens, hidden) -> q, k, v of (batch, heads, tokens, head_dim)."""
    return [
        branch_linear(linear, x, adapter).unflatten(-1, (-1, head_dim)).transpose(1, 2)
        for linear in linears
    ]


def _normed(
    norm_q: nn.Module, norm_k: nn.Module, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return norm_q(q).to(v.dtype), norm_k(k).to(v.dtype), v


def _rotated_qkv(attn: Any, x: Tensor, stream: Stream) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _heads(_qkv(attn), x, attn.head_dim, stream.adapter)
    q, k, v = _normed(attn.norm_q, attn.norm_k, q, k, v)
    return rotate(q, stream.rope), rotate(k, stream.rope), v


def _in_one_sequence(parts: Sequence[ConditionTokens]) -> ConditionTokens:
    """Tokens behind one another that see each other, as the last of them says of itself."""
    batch = parts[0].tokens.shape[0]
    return replace(
        parts[-1],
        tokens=torch.cat([part.tokens for part in parts], 1),
        ids=torch.cat([part.ids.expand(batch, -1, -1) for part in parts], 1),
        kept=_joined(*((part.kept, part.tokens) for part in parts)),
    )


def _joined(*parts: tuple[Tensor | None, Tensor]) -> Tensor | None:
    """Masks (batch, n) of several streams side by side; None where nothing is padding."""
    if all(kept is None for kept, _ in parts):
        return None
    return torch.cat(
        [x.new_ones(x.shape[:2], dtype=torch.bool) if kept is None else kept for kept, x in parts],
        1,
    )


def _main_mask(
    kept: Tensor | None, text: Tensor, picture: Tensor, conditions: Sequence[ConditionTokens]
) -> Tensor | None:
    main = torch.cat((text[..., :1], picture[..., :1]), 1)
    mask = _joined((kept, main), *((c.kept, c.tokens) for c in conditions))
    return None if mask is None else mask[:, None, None]


def _branch_mask(
    condition: ConditionTokens, kept: Tensor | None, text: Tensor, picture: Tensor
) -> Tensor | None:
    own = condition.kept
    if not condition.independent:
        main = torch.cat((text[..., :1], picture[..., :1]), 1)
        mask = _joined((kept, main), (own, condition.tokens))
        return None if mask is None else mask[:, None, None]
    if own is None:
        return None
    # A condition without a token (nobody sees it) must still attend to something, or it is NaN.
    return (own | ~own.any(1, keepdim=True))[:, None, None]
