"""The SAE: two dictionaries of `n_latents` rows, three biases, and the activation between them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sparsefeat_kernels import PreparedEncoder, SparseCode, prefilter_pays, prepare_encoder, sparse_decode, topk_encode
from torch import Tensor, nn

from sparsefeat.arguments import number, whole
from sparsefeat.sae import in_memory
from sparsefeat.sae.activations import (
    SELECTION,
    batch_topk_encode,
    groupmax_encode,
    nnls_encode,
    pursuit_encode,
    threshold_encode,
)
from sparsefeat.sae.config import FACTORS, FITTED, PURSUITS, SAEConfig
from sparsefeat.sae.files import reading
from sparsefeat.sae.files.weights import FLOATING
from sparsefeat.sae.formats import native
from sparsefeat.sae.hub import push_to_hub
from sparsefeat.sae.io import check_device, place_of, read_sae
from sparsefeat.sae.names import NAMES, Names
from sparsefeat.sae.normalizers import PCA, ROW_SCALED, denormalize, modulation, normalize, row_scale
from sparsefeat.sae.published import published
from sparsefeat.whole import as_path

# What the `timestep` normaliser has of its own.
TIME = tuple(f"{layer}_{part}" for layer in ("time_in", "time_out", "modulation") for part in ("weight", "bias"))

# The prefilter's weights of SAEs that encoded where it pays. Kept beside the modules, not in them: a copied or pickled
# SAE makes its own.
_PREPARED: weakref.WeakKeyDictionary[SAE, PreparedEncoder] = weakref.WeakKeyDictionary()


class SAE(nn.Module):
    """A sparse autoencoder of activation rows.

    `pre = W_enc (n(x) - b_pre) + b_enc`, `z = activation(pre)`, `x_hat = n^-1(z W_dec + b_out)`, where `n` is the
    normaliser; `W_enc` and `W_dec` are both `[n_latents, d_model]`, one latent one row in each. See `SAEConfig`.

    A new SAE has random unit decoder rows, the encoder tied to them at the start, and biases of zero; train it with
    `sparsefeat.training.SAETrainer` or open a trained one with `sparsefeat.load_sae`. Change weights in place under
    `torch.no_grad()`, `sae.W_enc[3] = 0`: of what is written into `sae.W_enc.data` torch tells nobody, and `encode` may go on
    with what it had made of the weights before.

    >>> sae = SAE(SAEConfig(d_model=8, n_latents=32, k=4))
    >>> code = sae.encode(torch.randn(3, 5, 8))          # SparseCode of 15 rows
    >>> code.values.shape, sae.decode(code).shape
    (torch.Size([15, 4]), torch.Size([15, 8]))

    Raises:
        TypeError: `config` is no SAEConfig.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_pre: nn.Parameter
    b_out: nn.Parameter
    W_skip: nn.Parameter
    threshold: Tensor | None
    _names: Names = Names()
    timestep: float | Tensor | None = None
    """Of an SAE with normalizer "timestep": what `encode` encodes at; see `at_timestep`."""
    pca_basis: Tensor | None
    pca_mean: Tensor
    pca_std: Tensor

    def __init__(self, config: SAEConfig) -> None:
        super().__init__()
        if not isinstance(config, SAEConfig):
            raise TypeError(
                f"config is {type(config).__name__}, not an SAEConfig; make one, SAEConfig(d_model, n_latents)."
            )
        self.config = config
        shapes = config.tensor_shapes()
        for name in ("W_enc", "b_enc", "W_dec", "b_pre", "b_out", "W_skip", *TIME):
            if name in shapes:
                setattr(self, name, nn.Parameter(torch.zeros(shapes[name])))
            elif name not in ("W_skip", *TIME):
                self.register_parameter(name, None)  # pursuits have no encoder
        self.register_buffer("threshold", torch.zeros(shapes["threshold"]) if "threshold" in shapes else None)
        self.register_buffer("pca_basis", torch.eye(config.d_model) if "pca_basis" in shapes else None)
        for name in shapes:
            if name.startswith("statistic_") or name in ("pca_mean", "pca_std"):
                self.register_buffer(name, torch.full(shapes[name], 1.0 if name == "pca_std" else 0.0))
        if not self.W_dec.is_meta:
            with torch.no_grad():
                self.W_dec.normal_()
                self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
                if config.activation not in PURSUITS:
                    self.W_enc.copy_(self.W_dec)
                if config.time_width is not None:  # the modulation begins as none: its own weights are zero
                    for name in ("time_in_weight", "time_out_weight"):
                        self.get_parameter(name).normal_(std=config.time_width**-0.5)

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

    @property
    def names(self) -> Names:
        """Of latents, as far as they have any: `sae.names = sf.Names.read(path)`; saved with the SAE.

        Raises:
            ValueError: what is set does not map latents to names, or names a latent that is not there.
        """
        return self._names

    @names.setter
    def names(self, given: Names | Mapping[int, str]) -> None:
        given = given if isinstance(given, Names) else Names(given)
        if (last := max(given, default=0)) >= self.n_latents:
            raise ValueError(f"names has latent {last}; this SAE has latents 0 to {self.n_latents - 1}.")
        self._names = given

    def encode(self, x: Tensor, k: int | None = None) -> SparseCode:
        """The code of `x [..., d_model]`, over its rows flattened; `x` is cast to the SAE's dtype.

        `k` replaces the config's, for an activation that has one (Multi-TopK, sweeps over sparsity).

        In float32 on a CPU with bf16 instructions top-k
        encodes of many rows in evaluation mode go through the kernel's certified prefilter with weights that are
        prepared once: a bf16 copy of the encoder (half the size of `W_enc`) is kept as long as the SAE lives, and made
        again when the weights have changed.

        Raises:
            TypeError: `x` is no tensor of real numbers.
            ValueError: another width; a `k` that this activation cannot have.
        """
        _check_tensor(x)
        config = self.config
        if k is not None and config.k is None:
            raise ValueError(f"k is {k!r} but a {config.activation!r} code has none: leave it out")
        if k is not None:
            try:
                k = whole("k", k, 1, config.n_latents)
            except ValueError:
                raise ValueError(f"k is {k!r}: pass a whole number from 1 to {config.n_latents}") from None
        if k is not None and config.activation == "groupmax" and config.n_latents % k:
            raise ValueError(f"k is {k} but n_latents is {config.n_latents}: groupmax needs k equal groups")
        weights = (self.W_enc, self.b_enc, self.b_pre)
        with torch.autocast(x.device.type, enabled=False):  # the ops leave it by themselves; the rest is plain torch
            rows = self.normalize(x)
            if config.activation == "groupmax":
                return groupmax_encode(rows, *weights, k or config.k or 1)
            if config.activation in FACTORS:
                if k is not None and k != config.k:
                    raise ValueError(f"k is {k} but an 'nnls' code has all {config.n_latents} latents: leave it out")
                return nnls_encode(rows, self.W_enc, self.W_dec, self.b_pre)
            if config.activation in PURSUITS:
                return pursuit_encode(rows, self.W_dec, self.b_pre, k or config.k or 1, config.activation)
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
        # In training the weights change between any two calls: the kernels round them by themselves, a tile at a time.
        if self.training or torch.compiler.is_compiling() or W_enc.is_inference():
            return None
        if not prefilter_pays(W_enc, rows, self.config.k or 1):
            return None
        found, weights = _PREPARED.get(self), (W_enc, self.b_enc, self.b_pre)
        if found is None or not found.is_current(*weights):
            found = _PREPARED[self] = prepare_encoder(*weights, into=found)
        return found

    def decode(self, code: SparseCode, like: Tensor | None = None) -> Tensor:
        """The reconstruction `[rows, d_model]` in the SAE's dtype, or in the shape of `like`, the activations encoded.

        An SAE that normalises every row by its own scale needs `like`, to put it back, and so does one with a skip.

        Raises:
            TypeError: `code` is no SparseCode.
            ValueError: it is of another number of latents; `like` is needed, or has another width.
        """
        if not isinstance(code, SparseCode):
            raise TypeError(f"code is {type(code).__name__}, not a SparseCode: pass what encode(x) gives")
        if code.n_latents != self.n_latents:
            raise ValueError(f"the code has {code.n_latents} latents, this SAE {self.n_latents}: use its own")
        if like is not None and len(self._rows(like)) != code.rows:
            raise ValueError(f"like has shape {list(like.shape)}, the code {code.rows} rows: pass what was encoded")
        return self.denormalize(sparse_decode(code.values, code.indices, self.W_dec, self.b_out), like)

    def normalize(self, x: Tensor) -> Tensor:
        """n(x) above, `[rows, d_model]` in the SAE's dtype: what `b_pre` is subtracted from.

        Raises:
            TypeError: `x` is no tensor of real numbers.
            ValueError: another width; the SAE depends on the timestep, and was not told it.
        """
        rows = self._rows(x)
        if self.config.normalizer == "timestep":
            scale, shift = self._modulation(rows)
            return rows * (1 + scale) + shift
        pca = self._pca
        return normalize(rows, self.config.normalizer, self.config.eps) if pca is None else pca.normalize(rows)

    def at_timestep(self, timestep: float | Tensor) -> SAE:
        """Encode at this timestep from now on, a number or one for every row `[rows]`; returns the same SAE.

        What an SAE with normalizer "timestep" was trained with: the `timestep` its transformer is given, which for FLUX
        lies between 0 and 1. `attach` does it in every step, and the last step's stays. Other SAEs do not depend on it.

        Raises:
            ValueError: it is neither a finite number nor a tensor.
        """
        self.timestep = timestep if isinstance(timestep, Tensor) else number("timestep", timestep)
        return self

    def denormalize(self, out: Tensor, like: Tensor | None = None) -> Tensor:
        """n^-1 above, the last part of `decode`: of `z W_dec + b_out [rows, d_model]`; the skip, if any, is added.

        Raises:
            ValueError: `like` is needed, or has another width.
        """
        config = self.config
        if like is None and (config.normalizer in ROW_SCALED or config.skip):
            what = f"normalizer {config.normalizer!r}" if config.normalizer in ROW_SCALED else "a skip"
            raise ValueError(f"decoding with {what} needs the activations: pass like=x")
        pca = self._pca
        if pca is not None:
            out = pca.denormalize(out)
        if like is None:
            return out
        if config.normalizer in ROW_SCALED:
            out = denormalize(out, self._rows(like), config.normalizer)
        if config.skip:
            out = out + self._rows(like) @ self.W_skip.T
        return out.view(like.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Encode and decode: the reconstruction of `x`, in its shape and the SAE's dtype.

        Raises:
            TypeError: as `encode`.
            ValueError: as `encode`.
        """
        return self.decode(self.encode(x), like=x)

    def row_scale(self, x: Tensor) -> Tensor | None:
        """`[rows, 1]` if the normaliser has a scale for every row, else None: a change of the code times the decoder
        rows is multiplied by it in activations.

        Raises:
            ValueError: `x` has another width.
        """
        if self.config.normalizer not in ROW_SCALED:
            return None
        return row_scale(self._rows(x), self.config.normalizer)

    def change_of(self, decoded: Tensor, like: Tensor) -> Tensor:
        """What a change of the code changes in the activations `like`: of the change times the decoder rows, without
        bias, `decoded [rows, d_model]`."""
        pca = self._pca
        if pca is not None:
            return pca.directions(decoded)
        scale = self.row_scale(like)
        return decoded if scale is None else decoded * scale

    @classmethod
    def of(cls, module: nn.Module, **options: Any) -> SAE:
        """The SAE that a module of SAELens, sparsify or dictionary_learning is, on its device and in its dtype, in
        evaluation mode; `module` is left as it was, and an SAE of here is itself.

        options: of `load_sae`, such as hookpoint and base_model. Its codes are compared on 64 rows.

        Raises:
            TypeError: `module` is of another program. ValueError: its codes are not those of its saved weights.
        """
        if isinstance(module, SAE):
            return module
        with in_memory.written(module) as folder:
            weight = next(module.parameters())
            sae = load_sae(folder, **{"device": weight.device, "dtype": weight.dtype, **options})
        in_memory.check_codes(module, sae)
        return sae

    def latent(self, named: int | str) -> int:
        """The number of a latent that is called so, or that this number is."""
        return self.names.find(named) if isinstance(named, str) else named

    def statistic(self, name: str) -> Tensor:
        """Numbers kept for every latent, `[n_latents]`: one of `config.statistics`.

        Raises:
            ValueError: there is none of that name.
        """
        if name not in self.config.statistics:
            known = ", ".join(self.config.statistics) or "none"
            raise ValueError(f"this SAE has no statistic {name!r} (it has {known}): collect it from activations")
        return self.get_buffer(f"statistic_{name}")

    def directions(self, latents: Tensor | list[int]) -> Tensor:
        """What one unit of each of `latents` adds to the activations, `[len(latents), d_model]`: the decoder rows, turned
        back from the components of a PCA normaliser; of the other normalisers `row_scale` is not yet in them.

        Raises:
            TypeError: `latents` are no whole numbers.
            ValueError: a latent that is not there.
        """
        try:
            index = torch.as_tensor(latents, device=self.device)
        except (TypeError, ValueError, RuntimeError):
            index = None
        if index is None or (index.numel() and (index.is_floating_point() or index.dtype == torch.bool)):
            raise TypeError(f"latents is {latents!r:.80}: pass a list of whole numbers")
        index = index.long()
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.n_latents:
            raise ValueError(
                f"latents run from {int(index.min())} to {int(index.max())}: choose in 0 to {self.n_latents - 1}"
            )
        pca = self._pca
        return self.W_dec[index] if pca is None else pca.directions(self.W_dec[index])

    def save(self, folder: str | Path, *, dtype: torch.dtype | None = None, overwrite: bool = False) -> Path:
        """Write `config.json` and `sae.safetensors` into `folder`, and names of latents; see `sparsefeat.sae.formats.native.write`.

        Names that lie there stay if the weights do. Where those of another SAE are replaced, they are of other latents, and go.

        Raises:
            TypeError: `folder` is no path. ValueError: it is empty.
            FileExistsError: it holds something other than this SAE, and `overwrite` is not given.
            OSError: it cannot be written.
        """
        state, names = self.state_dict(), as_path(folder) / NAMES
        others = names.exists() and not native.holds(names.parent, state)
        written = native.write(names.parent, self.config, state, dtype=dtype, overwrite=overwrite)
        if self.names:
            self.names.write(names)
        elif others:
            names.unlink()
        return written

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        subfolder: str | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> str:
        """Upload to a hub repository; see `sparsefeat.sae.hub.push_to_hub`."""
        return push_to_hub(self, repo_id, private=private, subfolder=subfolder, metrics=metrics)

    @property
    def _pca(self) -> PCA | None:
        if self.config.normalizer not in FITTED:
            return None
        return PCA(
            self.pca_basis if self.config.normalizer == "pca" else None, self.pca_mean, self.pca_std, self.config.clip
        )

    def _modulation(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        if self.timestep is None:
            raise ValueError(
                "this SAE depends on the timestep: attach it to a pipeline, or call sae.at_timestep(t) first"
            )
        timestep = torch.as_tensor(self.timestep).reshape(-1)
        if len(timestep) not in (1, len(rows)):
            raise ValueError(
                f"timestep has {len(timestep)} numbers for {len(rows)} rows: pass one, or one for every row"
            )
        return modulation(timestep, dict(self.named_parameters(recurse=False)))

    def _rows(self, x: Tensor) -> Tensor:
        _check_tensor(x)
        if x.ndim < 1 or x.shape[-1] != self.d_model:
            raise ValueError(
                f"x has shape {list(x.shape)}: its last dimension must be the SAE's d_model, {self.d_model}; "
                "channels-first maps need movedim(1, -1)"
            )
        return x.reshape(-1, self.d_model).to(self.dtype)


def _check_tensor(x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x is {type(x).__name__}, not a tensor: pass torch.as_tensor(x)")
    if x.is_complex():
        raise TypeError(f"x has dtype {x.dtype}: pass real numbers")


def save(sae: SAE, folder: str | Path, *, dtype: torch.dtype | None = None, overwrite: bool = False) -> Path:
    """Write `config.json` and `sae.safetensors`; the same as `sae.save(folder)`."""
    return sae.save(folder, dtype=dtype, overwrite=overwrite)


def load_sae(
    source: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    k: int | None = None,
    hookpoint: str | None = None,
    base_model: str | None = None,
) -> SAE:
    """Open a trained SAE of any format in `docs/interop.md`, in evaluation mode.

    source: a local folder, or a single file where the format is one, which win, a name of the table of published SAEs
        (`sparsefeat sae list`, such as "sdxl-unbox/up.0.1"), or a hub id `owner/name`; `subfolder` is a folder (or file)
        within either, `revision` a branch, tag or commit of the hub.
    dtype: None gives float32 (float64 if stored so), whatever the file holds.
    k, hookpoint, base_model: in the place of what the files say; most foreign formats do not know the pipeline they were
        trained on, and overcomplete's not their k. `sparsefeat.check(sae, pipe, prompts)` tells whether they fit. A
        hookpoint or base model other than the one that the files state is used with a warning that names both.

    Raises:
        FileNotFoundError: nothing is there. OSError: the hub cannot be asked. TypeError: `source` is no path. ValueError:
            the files are of no known format, damaged, or do not fit what is given; it names the file.
    """
    check_device(device)
    if dtype is not None and dtype not in FLOATING.values():
        raise ValueError(f"dtype is {dtype!r}: choose a floating dtype, such as torch.float16")
    entry = published(source) if isinstance(source, str) and not Path(source).expanduser().exists() else None
    if entry is not None:
        source, subfolder = entry.repository, subfolder or entry.subfolder
        hookpoint, base_model = hookpoint or entry.hookpoint, base_model or entry.base_model
    place = place_of(source, revision, subfolder)
    with reading(place):
        given = {"k": k, "hookpoint": hookpoint, "base_model": base_model}
        config, state = read_sae(place, device, dtype, given)
        with torch.device("meta"):
            sae = SAE(config)
        sae.load_state_dict(state, assign=True)
        if place.is_dir() and (place / NAMES).exists():
            sae.names = Names.read(place / NAMES)
        return sae.eval()
