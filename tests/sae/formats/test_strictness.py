"""Of every format: a tensor or a key that its SAEs do not have is refused, and folds are made in single precision."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsefeat.sae import SAE, load_sae
from sparsefeat.sae.convert import convert, writable
from sparsefeat.sae.formats import FORMATS
from sparsefeat.sae.formats.folder_names import hookpoint_called
from tests.sae.dense import CASES, NORMALIZERS, random_sae
from tests.sae.formats.expected import FIXTURES, copied, opened

EVERY = sorted(path.parent for path in FIXTURES.glob("*/*/expected.safetensors"))
NO_NAMES = ("atoms.pt", "atom_indices.pt", "mean.pt", "std.pt", "expected.safetensors")  # one tensor, without a name
# Configs whose unknown keys are those of a training run, which are not all known.
OPEN = ("fae",)


def weight_files(place: Path) -> list[Path]:
    files = [path for path in sorted(place.rglob("*")) if path.suffix in (".pt", ".pth", ".bin", ".safetensors")]
    return [file for file in files if file.name not in (*NO_NAMES, "sae_lens.safetensors", "sparsity.safetensors")]


def rewritten(file: Path, change: Any) -> None:
    """The file with `change` of its state dict, wherever that lies in it."""
    if file.suffix == ".safetensors":
        save_file({name: t.contiguous() for name, t in change(load_file(file)).items()}, file)
        return
    state = torch.load(file, weights_only=True)
    inside = next((name for name in ("state_dict", "ae", "model_state_dict") if name in state), None)
    torch.save(change(state) if inside is None else state | {inside: change(state[inside])}, file)


WITH_WEIGHTS = [case for case in EVERY if weight_files(case)]


@pytest.mark.parametrize("case", WITH_WEIGHTS, ids=lambda case: f"{case.parent.name}-{case.name}")
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_more_is_another_sae(tmp_path, case):
    place = copied(case, tmp_path)
    (file,) = weight_files(place)
    rewritten(file, lambda state: state | {"W_dec_2": torch.ones(3)})
    with pytest.raises(ValueError, match=r"has W_dec_2, which this format's SAEs do not have"):
        opened(case, place)
    rewritten(
        file, lambda state: {n: t for n, t in state.items() if n != "W_dec_2"} | {"stats_last_nonzero": torch.ones(3)}
    )
    opened(case, place)


@pytest.mark.parametrize("case", EVERY, ids=lambda case: f"{case.parent.name}-{case.name}")
@pytest.mark.filterwarnings("ignore")
def test_a_key_more_is_another_sae(tmp_path, case):
    place = copied(case, tmp_path)
    configs = [path for name in ("cfg.json", "config.json", "hyperparams.json") for path in place.rglob(name)]
    if not configs or case.parent.name in OPEN:
        pytest.skip("no config, or one of a whole training run")
    values = json.loads(configs[0].read_text())
    inner = values.get("trainer", values)
    inner["normalize_io"] = True
    configs[0].write_text(json.dumps(values))
    with pytest.raises(ValueError, match="says normalize_io True, which is not understood"):
        opened(case, place)
    inner["normalize_io"] = False
    configs[0].write_text(json.dumps(values))
    opened(case, place)


@pytest.mark.parametrize("case", WITH_WEIGHTS, ids=lambda case: f"{case.parent.name}-{case.name}")
@pytest.mark.filterwarnings("ignore")
def test_weights_in_half_precision_are_folded_in_single(tmp_path, case):
    """The SAE of the bf16 file is the one of the same numbers in float32, not of their folded values in bf16 again."""
    saes = {}
    for dtype in ("half", "single"):
        place = copied(case, tmp_path / dtype)
        (file,) = weight_files(place)

        def change(state: dict[str, Any], dtype: str = dtype) -> dict[str, Any]:
            halves = {
                n: t.bfloat16() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
                for n, t in state.items()
            }
            if dtype == "half":
                return halves
            return {
                n: t.float() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in halves.items()
            }

        rewritten(file, change)
        saes[dtype] = opened(case, place)
    half, single = (saes[dtype].state_dict() for dtype in ("half", "single"))
    assert half.keys() == single.keys()
    for name in half:
        assert torch.allclose(half[name], single[name], rtol=1e-6, atol=1e-7), name


def test_numbers_beyond_the_dtype_asked_for_are_said(tmp_path):
    sae = random_sae("jumprelu")
    with torch.no_grad():
        sae.threshold[0] = 1e30  # a latent that is never active stays one
    assert load_sae(sae.save(tmp_path / "a"), dtype=torch.float16).threshold[0] == torch.finfo(torch.float16).max
    with torch.no_grad():
        sae.b_pre[0] = 1e5
    with pytest.raises(ValueError, match=r"b_pre in .* has numbers beyond torch.float16's largest"):
        load_sae(sae.save(tmp_path / "b"), dtype=torch.float16)


def can_be_written(sae: SAE, name: str, folder: Path) -> bool:
    """Whether the format's own writer takes it: what it took must not fail afterwards."""
    folder.mkdir()
    write = next(known.write for known in FORMATS if known.name == name)
    if write is not None:
        with contextlib.suppress(ValueError):
            write(folder, sae.config, sae.state_dict())
            return True
    return write is None


@pytest.mark.parametrize("name", writable())
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize(("activation", "inference"), CASES)
def test_what_is_converted_is_there_whole_or_not_at_all(tmp_path, name, normalizer, activation, inference):
    sae = random_sae(activation, inference, normalizer)
    refused = pytest.raises(ValueError, match=r"cannot express|no biases|standardises")
    if not can_be_written(sae, name, tmp_path / "try"):
        with refused:
            convert(sae, tmp_path / "out", name)
        assert [path.name for path in tmp_path.iterdir()] == ["try"]
        return
    converted = convert(sae, tmp_path / "out", name)
    assert converted.difference < 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "try"]


def test_the_difference_of_a_conversion_of_half_precision_is_that_of_the_weights(tmp_path):
    """Not of rows in half precision: of a conversion that folds nothing it is zero."""
    sae = random_sae("topk")
    with torch.no_grad():
        sae.b_out.copy_(sae.b_pre)
    sae.bfloat16()
    assert convert(sae, tmp_path / "out", "sae_lens").difference == 0
    assert sae.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "is_path"),
    [
        ("layers.3", True),
        ("h.5", True),
        ("gpt_neox.layers.10", True),
        ("unet.up_blocks.1.attentions.1", True),
        ("transformer.single_transformer_blocks.9.ff", True),
        ("text_encoder.text_model.encoder.layers.10", True),
        ("text_encoder_2.encoder.block.23", True),
        ("unet.mid_block", True),
        ("v1.2", False),
        ("sd1.5", False),
        ("mysae.bak", False),
        ("unet.bak", False),
        ("model.2", False),
        ("run.3", False),
        ("2026.11.26", False),
        ("sae_v2.0", False),
        ("layers", False),
        ("checkpoint.500", False),
    ],
)
def test_a_folder_is_a_hookpoint_only_where_its_name_is_the_path_of_a_module(name, is_path):
    assert hookpoint_called(name) == (name if is_path else None)


# Keys that real configs have, as their programs write them, with a value that is not nothing.
REAL = {
    "dictionary_learning/topk": "trainer_class dict_class lr steps auxk_alpha warmup_steps decay_start threshold_beta "
    "threshold_start_step top_k_aux seed activation_dim dict_size k device layer lm_name wandb_name submodule_name",
    "dictionary_learning/standard": "l1_penalty sparsity_warmup_steps resample_steps sparsity_function sparsity_penalty "
    "p_start p_end anneal_start sparsity_queue_length n_sparsity_updates bandwidth target_l0",
    "sae_lens/standard": "l1_coefficient lp_norm use_ghost_grads normalize_sae_decoder noise_scale decoder_init_norm "
    "mse_loss_normalization jumprelu_init_threshold jumprelu_bandwidth scale_sparsity_penalty_by_decoder_norm "
    "decoder_heuristic_init init_encoder_as_decoder_transpose context_size dataset_path prepend_bos seqpos_slice "
    "model_from_pretrained_kwargs neuronpedia_id hook_layer sae_lens_training_version dataset_trust_remote_code "
    "training_tokens store_batch_size_prompts n_batches_in_buffer train_batch_size_tokens feature_sampling_window "
    "dead_feature_window dead_feature_threshold lr lr_scheduler_name lr_warm_up_steps lr_decay_steps l1_warm_up_steps "
    "adam_beta1 adam_beta2 act_store_device autocast autocast_lm compile_llm compile_sae log_to_wandb wandb_project "
    "eval_every_n_wandb_logs n_checkpoints checkpoint_path seed verbose streaming is_dataset_tokenized b_dec_init_method",
    "sparsify/topk": "expansion_factor normalize_decoder num_latents multi_topk",
    "matryoshka/plain": "seed batch_size lr num_tokens l1_coeff beta1 beta2 max_grad_norm seq_len dtype model_name site "
    "layer device model_batch_size num_batches_in_buffer dataset_path wandb_project perf_log_freq sae_type checkpoint_freq "
    "n_batches_to_dead top_k_aux aux_penalty bandwidth hook_point name",
    "llama_scope/residual": "sae_type expansion_factor use_decoder_bias init_decoder_norm init_encoder_norm l1_coefficient "
    "lp use_ghost_grads top_k strict_loading dtype device",
}


@pytest.mark.parametrize("name", REAL)
@pytest.mark.filterwarnings("ignore")
def test_the_keys_of_a_training_are_no_reason_to_refuse(tmp_path, name):
    case = FIXTURES / name
    place = copied(case, tmp_path)
    (config,) = (path for path in place.rglob("*.json") if path.name in ("cfg.json", "config.json", "hyperparams.json"))
    values = json.loads(config.read_text())
    inner = values.get("trainer", values)
    for key in REAL[name].split():
        inner.setdefault(key, "something" if key in ("lm_name", "model_name", "name") else 7)
    config.write_text(json.dumps(values))
    assert torch.equal(opened(case, place).W_dec, opened(case).W_dec)
