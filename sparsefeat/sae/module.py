"""The SAE: two dictionaries of `n_latents` rows, three biases, and the activation between them."""

from __future__ import annotations

import weakref
from pathlib import Path

import torch
from sparsefeat_kernels import PreparedEncoder, SparseCode, bf16_products, prepare_encoder, sparse_decode, topk_encode
from torch import Tensor, nn

from sparsefeat.sae.activations import SELECTION, batch_topk_encode, threshold_encode
from sparsefeat.sae.config import SAEConfig
from sparsefeat.sae.formats import native
from sparsefeat.sae.normalizers import row_statistics, standardize, unstandardize

# The prefilter's weights of SAEs that encoded on a CPU with bf16 instructions. Kept beside the modules, not in them: a
# copied or pickled SAE makes its own.
_PREPARED: weakref.WeakKeyDictionary[SAE, PreparedEncoder] = weakref.WeakKeyDictionary()

# Fewer rows at once do not pay for the pass over the weights that the first call after a change makes: it costs as much
# as the prefilter saves at about 60 rows (20,480 x 1280, two cores).
PREFILTERED_ROWS = 128


class SAE(nn.Module):
    """A sparse autoencoder of activation rows.

    `pre = W_enc (n(x) - b_pre) + b_enc`, `z = activation(pre)`, `x_hat = n^-1(z W_dec + b_out)`, where `n` is the
    normaliser; `W_enc` and `W_dec` are both `[n_latents, d_model]`, one latent one row in each. See `SAEConfig`.

    A new SAE has random unit decoder rows, the encoder tied to them at the start, and biases of zero; train it with
    `sparsefeat.training.SAETrainer` or open a trained one with `sparsefeat.load_sae`.

    >>> sae = SAE(SAEConfig(d_model=8, n_latents=32, k=4))
    >>> code = sae.encode(torch.randn(3, 5, 8))          # SparseCode of 15 rows
    >>> code.values.shape, sae.decode(code).shape
    (torch.Size([15, 4]), torch.Size([15, 8]))
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_pre: nn.Parameter
    b_out: nn.Parameter
    threshold: Tensor | None

    def __init__(self, config: SAEConfig) -> None:
        super().__init__()
        self.config = config
        shapes = config.tensor_shapes()
        for name in ("W_enc", "b_enc", "W_dec", "b_pre", "b_out"):
            setattr(self, name, nn.Parameter(torch.zeros(shapes[name])))
        self.register_buffer("threshold", torch.zeros(shapes["threshold"]) if "threshold" in shapes else None)
        if not self.W_dec.is_meta:
            with torch.no_grad():
                self.W_dec.normal_()
                self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
                self.W_enc.copy_(self.W_dec)

    @property
    def d_model(self) -> int:
        return self.config.d_model

    @property
    def n_latents(self) -> int:
        return self.config.n_latents

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    def extra_repr(self) -> str:
        c = self.config
        k = "" if c.k is None else f", k={c.k}"
        where = "" if c.hookpoint is None else f", hookpoint={c.hookpoint!r}"
        return f"{c.n_latents} latents x {c.d_model}, {c.activation}{k}, normalizer={c.normalizer!r}{where}"

    def encode(self, x: Tensor, k: int | None = None) -> SparseCode:
        """The code of `x [..., d_model]`, over its rows flattened; `x` is cast to the SAE's dtype.

        `k` replaces the config's, for one of the top-k activations (Multi-TopK, sweeps over sparsity).

        In float32 on a CPU with bf16 instructions, top-k encodes of many rows go through the kernel's certified
        prefilter, which keeps a bf16 copy of the encoder (half the size of `W_enc`) as long as the SAE lives and makes it
        again when the weights have changed.
        """
        config = self.config
        if k is not None and (config.k is None or not 1 <= k <= config.n_latents):
            raise ValueError(f"k is {k} for a {config.activation!r} SAE of {config.n_latents} latents: leave it out")
        rows = self._rows(x)
        if config.normalizer == "standardize":
            rows = standardize(rows, config.eps)
        weights = (self.W_enc, self.b_enc, self.b_pre)
        with torch.autocast(
            rows.device.type, enabled=False
        ):  # the ops leave it by themselves; these two are plain torch
            if config.activation == "batch_topk" and self.training:
                return batch_topk_encode(rows, *weights, k or config.k or 1)
            if config.uses_threshold and k is None:
                return threshold_encode(rows, *weights, self.threshold)
        selection = SELECTION[config.activation]
        values, indices = topk_encode(rows, *weights, k or config.k or 1, selection, prepared=self.prepared(len(rows)))
        return SparseCode(values, indices, config.n_latents)

    def prepared(self, rows: int) -> PreparedEncoder | None:
        """For the kernels' `prepared=`: what an encode of so many rows should use, None for the plain path."""
        W_enc = self.W_enc
        if (
            rows < PREFILTERED_ROWS
            or W_enc.dtype != torch.float32
            or W_enc.device.type != "cpu"
            or W_enc.is_inference()
            or torch.compiler.is_compiling()
            or not bf16_products()
        ):
            return None
        found = _PREPARED.get(self)
        if found is None or not found.is_current(W_enc, self.b_enc):
            found = _PREPARED[self] = prepare_encoder(W_enc, self.b_enc, into=found)
        return found

    def decode(self, code: SparseCode, like: Tensor | None = None) -> Tensor:
        """The reconstruction `[rows, d_model]` in the SAE's dtype, or in the shape of `like`, the activations encoded.

        A standardising SAE needs `like`: the mean and scale of its rows are put back.
        """
        if code.n_latents != self.n_latents:
            raise ValueError(f"the code has {code.n_latents} latents, this SAE {self.n_latents}: use its own")
        return self.denormalize(sparse_decode(code.values, code.indices, self.W_dec, self.b_out), like)

    def denormalize(self, out: Tensor, like: Tensor | None = None) -> Tensor:
        """n^-1 above, the last part of `decode`: of `z W_dec + b_out [rows, d_model]`."""
        if self.config.normalizer == "standardize":
            if like is None:
                raise ValueError("decoding with normalizer 'standardize' needs the activations: pass like=x")
            out = unstandardize(out, self._rows(like), self.config.eps)
        return out if like is None else out.view(like.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Encode and decode: the reconstruction of `x`, in its shape and the SAE's dtype."""
        return self.decode(self.encode(x), like=x)

    def row_scale(self, x: Tensor) -> Tensor | None:
        """`[rows, 1]` for a standardising SAE, else None: a change in code space is multiplied by it in activations."""
        if self.config.normalizer != "standardize":
            return None
        return row_statistics(self._rows(x), self.config.eps)[1]

    def directions(self, latents: Tensor | list[int]) -> Tensor:
        """The decoder rows of `latents`, `[len(latents), d_model]`."""
        index = torch.as_tensor(latents, dtype=torch.long, device=self.device)
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.n_latents:
            raise ValueError(
                f"latents run from {int(index.min())} to {int(index.max())}: choose in 0 to {self.n_latents - 1}"
            )
        return self.W_dec[index]

    def save(self, folder: str | Path, *, dtype: torch.dtype | None = None, overwrite: bool = False) -> Path:
        """Write `config.json` and `sae.safetensors` into `folder`; see `sparsefeat.sae.formats.native.write`."""
        return native.write(Path(folder), self.config, self.state_dict(), dtype=dtype, overwrite=overwrite)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, subfolder: str | None = None) -> str:
        """Upload to a hub repository, created if need be; returns the address of the commit."""
        from sparsefeat.sae.io import push_to_hub

        return push_to_hub(self, repo_id, private=private, subfolder=subfolder)

    def _rows(self, x: Tensor) -> Tensor:
        if x.ndim < 1 or x.shape[-1] != self.d_model:
            raise ValueError(
                f"x has shape {list(x.shape)}: its last dimension must be the SAE's d_model, {self.d_model}; "
                "channels-first maps need movedim(1, -1)"
            )
        return x.reshape(-1, self.d_model).to(self.dtype)
