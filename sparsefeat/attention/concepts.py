"""ConceptAttention's concept stream: concepts that attend to an image beside the prompt, and change nothing.

Helbling et al., "ConceptAttention: Diffusion Transformers Learn Highly Interpretable Features", ICML 2025, section 3. In
every block with a text stream of its own, with the text's weights and modulation, at positions 0:

    c' = norm(c);  q, k, v = W_text c'
    o_c = softmax(q [k; k_image]^T / sqrt(d)) [v; v_image]     concepts see concepts and image, not the prompt
    c <- c + gate o_c W_out;  c <- c + gate' ff(norm'(c))
    S[x, c] = <o_x, o_c>                                       o_x: the image's own attention output

both outputs before their projection, over all heads. A map is the mean over layers and steps of the softmax over concepts
of S. A concept of several tokens is as many rows of the stream, of which the outputs are averaged.

The image's keys, values and outputs are those that the model's attention had; the stream is run by the model's own modules,
so LoRA and quantised layers are in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from sparsefeat_kernels import concept_attention, concept_map_
from torch import Tensor, nn

from sparsefeat.attention.reading import Layer, attentions_of, chosen_of, none_to_read, refuse_bypassed
from sparsefeat.pipeline import AttentionCall, Call


@dataclass(frozen=True)
class Embedded:
    """What the text encoder made of the concepts: `rows` [tokens, width], and where each concept's begin and end."""

    rows: Tensor
    spans: tuple[tuple[int, int], ...]

    def averaged(self, output: Tensor) -> Tensor:
        """[batch, heads, tokens, d] -> [batch, heads, concepts, d], the mean over each concept's tokens."""
        return torch.stack([output[:, :, a:b].mean(2) for a, b in self.spans], dim=2)


class _Joint:
    """SD3 and FLUX: text weights of their own."""

    def enter(self, block: Any, concepts: Tensor, time: Tensor) -> tuple[Tensor, Any]:
        if getattr(block, "context_pre_only", False):
            return block.norm1_context(concepts, time), None
        normed, *kept = block.norm1_context(concepts, emb=time)
        return normed, kept

    def project(self, attention: Any, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if getattr(attention, "fused_projections", False) and hasattr(attention, "to_added_qkv"):
            query, key, value = attention.to_added_qkv(normed).chunk(3, dim=-1)
            return query, key, value
        return attention.add_q_proj(normed), attention.add_k_proj(normed), attention.add_v_proj(normed)

    norms = ("norm_added_q", "norm_added_k")

    def leave(self, block: Any, concepts: Tensor, output: Tensor, kept: Any, time: Tensor) -> Tensor:
        if kept is None:
            return concepts  # the last block of SD3 has no text after its attention
        gate, shift, scale, gate_ff = kept
        concepts = concepts + gate.unsqueeze(1) * block.attn.to_add_out(output)
        normed = block.norm2_context(concepts) * (1 + scale[:, None]) + shift[:, None]
        return concepts + gate_ff.unsqueeze(1) * block.ff_context(normed)


class _Shared:
    """CogVideoX: one set of weights for text and video, with a modulation for each."""

    def enter(self, block: Any, concepts: Tensor, time: Tensor) -> tuple[Tensor, Any]:
        _, normed, _, gate = block.norm1(concepts, concepts, time)
        return normed, gate

    def project(self, attention: Any, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if getattr(attention, "fused_projections", False) and hasattr(attention, "to_qkv"):
            query, key, value = attention.to_qkv(normed).chunk(3, dim=-1)
            return query, key, value
        return attention.to_q(normed), attention.to_k(normed), attention.to_v(normed)

    norms = ("norm_q", "norm_k")

    def leave(self, block: Any, concepts: Tensor, output: Tensor, kept: Any, time: Tensor) -> Tensor | None:
        concepts = concepts + kept * block.attn1.to_out[1](block.attn1.to_out[0](output))
        _, normed, _, gate = block.norm2(concepts, concepts, time)
        return concepts + gate * block.ff(normed)


def _of(rows: list[int], tensor: Tensor) -> Tensor:
    """Those rows of a tensor that may have one entry for all."""
    return tensor.expand(len(rows)) if tensor.ndim == 0 or len(tensor) == 1 else tensor[rows]


def _flux_time(root: Any, arguments: Mapping[str, Any], rows: list[int]) -> Tensor:
    """FLUX's modulation without the prompt: the pooled text and the guidance are zero, as published."""
    pooled = torch.zeros_like(arguments["pooled_projections"][rows])
    time = _of(rows, arguments["timestep"]).to(arguments["hidden_states"].dtype) * 1000
    if arguments.get("guidance") is None:
        return root.time_text_embed(time, pooled)
    return root.time_text_embed(time, torch.zeros_like(time), pooled)


def _sd3_time(root: Any, arguments: Mapping[str, Any], rows: list[int]) -> Tensor:
    return root.time_text_embed(_of(rows, arguments["timestep"]), arguments["pooled_projections"][rows])


def _cogvideox_time(root: Any, arguments: Mapping[str, Any], rows: list[int]) -> Tensor:
    time = root.time_proj(_of(rows, arguments["timestep"])).to(arguments["hidden_states"].dtype)
    embedded = root.time_embedding(time, None)
    if getattr(root, "ofs_embedding", None) is not None:
        embedded = embedded + root.ofs_embedding(root.ofs_proj(arguments["ofs"]).to(embedded.dtype))
    return embedded


@dataclass(frozen=True)
class Way:
    """How a family's concept stream is made: which text encoder, which module embeds, how the time modulates; and by which
    encoders the pipeline embeds a prompt side by side where it was loaded without the first.
    """

    encoder: str
    embeds: str
    time: Callable[[Any, Mapping[str, Any], list[int]], Tensor]
    blocks: _Joint | _Shared
    first: float = 0.0
    """Where the published maps begin, as a share of the blocks."""
    without: tuple[str, ...] = ()

    def encoders(self, pipe: Any) -> tuple[str, ...]:
        """Those that embed this pipeline's concepts."""
        there = getattr(pipe, self.encoder, None) is not None or not self.without
        return (self.encoder,) if there else self.without


WAYS: Mapping[str, Way] = {
    "FluxTransformer2DModel": Way("text_encoder_2", "context_embedder", _flux_time, _Joint(), first=15 / 19),
    "SD3Transformer2DModel": Way(
        "text_encoder_3", "context_embedder", _sd3_time, _Joint(), without=("text_encoder", "text_encoder_2")
    ),
    "CogVideoXTransformer3DModel": Way("text_encoder", "patch_embed.text_proj", _cogvideox_time, _Shared()),
}


def _way_of(pipe: Any, root: nn.Module) -> Way:
    """How concepts run beside this pipeline's model; ValueError where that is not known, or has no encoder."""
    name = type(root).__name__
    if name not in WAYS:
        raise ValueError(
            f"kind='concept' needs a text stream whose blocks are known, as in {', '.join(WAYS)}; {type(pipe).__name__} has "
            f"{name}: take kind='joint' or kind='text_renormalised'."
        )
    way = WAYS[name]
    missing = [f"pipe.{one}" for one in way.encoders(pipe) if getattr(pipe, one, None) is None]
    if missing:
        raise ValueError(
            f"kind='concept' embeds concepts by {' and '.join(missing)}, which this {type(pipe).__name__} was loaded without: "
            "load it with that."
        )
    return way


class Concepts:
    """The concepts beside one pipeline: which layers they pass, what they are embedded as, and the stream of each run."""

    def __init__(self, pipe: Any, names: Sequence[str], wanted: Sequence[str] | None):
        found = tuple(
            layer
            for layer in attentions_of(pipe, "joint_attention")
            if re.search(r"\.transformer_blocks\.\d+\.", layer.path)  # blocks in which the text is apart
        )
        if not found:
            for layer in attentions_of(pipe, "joint_attention"):
                _way_of(pipe, layer.root)  # of blocks with another name there is none
            raise ValueError(none_to_read(pipe, "concept", attentions_of(pipe, "cross_attention"), ()))
        self._way = _way_of(pipe, found[0].root)
        start = min(round(len(found) * self._way.first), len(found) - 1)
        self.read: tuple[Layer, ...] = found[start:] if wanted is None else chosen_of(found, wanted, "joint-attention")
        last = max(found.index(layer) for layer in self.read)
        self.passed: tuple[Layer, ...] = found[: last + 1]
        """From the first block to the last that is read."""
        refuse_bypassed(self.passed)
        self.names: tuple[str, ...] = tuple(names)
        _known(pipe, self._way, self.names)
        self._call: Call | None = None
        self._embedded: Embedded | None = None
        self._stream: Stream | None = None

    @property
    def root_name(self) -> str:
        return self.passed[0].root_name

    def begin_call(self, call: Call) -> None:
        self._stream, self._call = None, call
        self._embedded = _embed(call.pipe, self._way, self.names, call.arguments)

    def begin_run(self, arguments: Mapping[str, Any], rows: list[int]) -> None:
        """The model is about to run, with the concepts beside these rows of its batch."""
        self._stream = None
        if rows and self._embedded is not None and self._call is not None:
            root = self.passed[0].root
            start, latent = root.get_submodule(self._way.embeds), arguments["hidden_states"]
            with torch.no_grad(), self._call.as_the_pipeline(latent.device):
                own = start(self._embedded.rows.to(latent.device, latent.dtype))[None].expand(len(rows), -1, -1)
                self._stream = Stream(self._way, rows, own, self._way.time(root, arguments, rows))

    def at(self, call: AttentionCall) -> Outputs | None:
        """Through the block of this attention; its outputs where it is one to read."""
        stream, embedded = self._stream, self._embedded
        if stream is None or embedded is None or self._call is None:
            return None
        expected = self.passed[len(stream.passed)].path if len(stream.passed) < len(self.passed) else None
        if call.path != expected:
            raise ValueError(
                f"the concepts came to {call.path} without {expected or 'a run of the model around it'}, as a cache or "
                "skip_layers passes over blocks: turn it off for kind='concept'."
            )
        layer = self.passed[len(stream.passed)]
        with torch.no_grad(), self._call.as_the_pipeline(call.query.device):
            image, concepts = stream.through(layer, call)
        if not any(layer is one for one in self.read):
            return None
        return Outputs(call, image, embedded.averaged(concepts), stream.rows)


@dataclass(frozen=True)
class Outputs:
    """The outputs of one attention that become maps: the image's and the concepts', of some rows of the batch."""

    call: AttentionCall
    output: Tensor
    concepts: Tensor
    rows: list[int]

    @property
    def image(self) -> tuple[int, int]:
        return self.call.streams["image"]

    @property
    def tokens(self) -> int:
        return self.concepts.shape[2]

    def add_to(
        self, maps: Tensor, group: Tensor, weight: Tensor | None, tokens: Tensor | None, heads_apart: bool
    ) -> None:
        """Add the softmax over the concepts to [groups, image positions, concepts]; `weight` [heads] is one number."""
        group = group[self.rows]
        if weight is None:
            concept_map_(maps, self.output, self.concepts, None, group)
            return
        added = torch.zeros_like(maps)
        concept_map_(added, self.output, self.concepts, None, group)
        maps += weight[0] * added


def _known(pipe: Any, way: Way, concepts: Sequence[str]) -> None:
    tokenizers = [_tokenizer(pipe, encoder) for encoder in way.encoders(pipe)]
    for concept in concepts:
        counts = []
        for tokenizer in tokenizers:
            ids = tokenizer(concept, add_special_tokens=False).input_ids
            if getattr(tokenizer, "unk_token_id", None) in ids or not _own(tokenizer, ids):
                raise ValueError(
                    f"concepts={list(concepts)!r}: the tokenizer does not know {concept!r}; name another word."
                )
            counts.append(len(ids))
        if len(set(counts)) > 1:
            raise ValueError(
                f"concepts={list(concepts)!r}: {concept!r} is {' and '.join(map(str, counts))} tokens of the two tokenizers, "
                "whose encoders stand side by side; name another word."
            )


def _tokenizer(pipe: Any, encoder: str) -> Any:
    return getattr(pipe, encoder.replace("text_encoder", "tokenizer"))


def _own(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """The places of the tokens that are not the tokenizer's marks and padding."""
    special = set(tokenizer.all_special_ids)
    return [place for place, token in enumerate(ids) if token not in special]


def _embed(pipe: Any, way: Way, concepts: Sequence[str], arguments: Mapping[str, Any]) -> Embedded:
    """Every concept encoded alone, as these pipelines encode a prompt: padded and without a mask. Of what comes out its own
    tokens are taken, without the marks and the padding.
    """
    encode = _encoded if way.encoders(pipe) == (way.encoder,) else _encoded_side_by_side
    rows, spans, before = [], [], 0
    for concept in concepts:
        with torch.no_grad():
            rows.append(encode(pipe, way, concept, arguments))
        spans.append((before, before + len(rows[-1])))
        before += len(rows[-1])
    return Embedded(torch.cat(rows), tuple(spans))


def _encoded(pipe: Any, way: Way, concept: str, arguments: Mapping[str, Any]) -> Tensor:
    """[tokens, width] by the one encoder, padded to the call's `max_sequence_length`."""
    encoder, tokenizer = getattr(pipe, way.encoder), _tokenizer(pipe, way.encoder)
    device = getattr(pipe, "_execution_device", None) or next(encoder.parameters()).device
    length = arguments.get("max_sequence_length")
    padded: dict[str, Any] = {} if length is None else {"padding": "max_length", "max_length": length}
    ids = tokenizer(concept, truncation=length is not None, return_tensors="pt", **padded).input_ids
    output: Tensor = encoder(ids.to(device))[0]
    return output[0, _own(tokenizer, ids[0].tolist())]


def _encoded_side_by_side(pipe: Any, way: Way, concept: str, arguments: Mapping[str, Any]) -> Tensor:
    """[tokens, width] by the CLIPs: Stable Diffusion 3's `encode_prompt` puts their channels side by side, fills the rest
    with zeros, and puts zeros in the third encoder's place after them.
    """
    skipped = {"clip_skip": arguments.get("clip_skip")}
    encoded = pipe.encode_prompt(concept, None, None, do_classifier_free_guidance=False, **skipped)[0][0]
    tokenizer = _tokenizer(pipe, way.encoders(pipe)[0])
    ids = tokenizer(concept, truncation=True, max_length=pipe.tokenizer_max_length).input_ids
    own: Tensor = encoded[_own(tokenizer, ids)]
    return own


@dataclass
class Stream:
    """The concepts of one run of the model: the `rows` of its batch that they run beside, and how far they came."""

    way: Way
    rows: list[int]
    concepts: Tensor
    time: Tensor
    passed: list[str] = field(default_factory=list)

    def through(self, layer: Layer, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Through one block, whose attention was `call`. The outputs of the image's positions [batch, heads, n, d] and of
        the concepts' tokens [batch, heads, tokens, d], before their projection.
        """
        block = layer.root.get_submodule(layer.path.partition(".")[2].rpartition(".")[0])
        blocks, heads = self.way.blocks, call.query.shape[1]
        normed, kept = blocks.enter(block, self.concepts, self.time)
        projected = blocks.project(layer.module, normed)
        query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in projected)
        norms = [getattr(layer.module, name, None) for name in blocks.norms]
        query, key = (t if norm is None else norm(t) for t, norm in zip((query, key), norms, strict=True))
        assert call.output is not None
        image = slice(*call.streams["image"])
        first, last = self.rows[0], self.rows[-1] + 1
        rows = slice(first, last) if self.rows == list(range(first, last)) else self.rows  # a slice copies nothing
        keys, values, outputs = (t[rows][:, :, image].detach() for t in (call.key, call.value, call.output))
        query, key, value = (t.to(keys.dtype) for t in (query, key, value))
        output = concept_attention(query, key, value, keys, values.to(keys.dtype), call.scale)
        written = output.transpose(1, 2).flatten(2).to(self.concepts.dtype)
        self.concepts = blocks.leave(block, self.concepts, written, kept, self.time)
        self.passed.append(layer.path)
        return outputs, output.to(outputs.dtype)
