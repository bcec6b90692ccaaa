"""What docs/platforms.md says was tried without the machine: no Triton and no Unix, no double precision, weights elsewhere,
and what importing costs."""

from __future__ import annotations

import subprocess
import sys
import traceback
from typing import Any

import accelerate
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sparsefeat as sf
from sparsefeat.sae import SAE, SAEConfig
from tests.tiny import tiny_sd

AT = "unet.mid_block.attentions.0"
CALL: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}

# Of sparsefeat's own imports, those that there are on Unix alone fail; other libraries have theirs.
WITHOUT_UNIX = """\
import builtins, signal, sys, types

import torch, transformers
from diffusers import AutoencoderTiny, StableDiffusionPipeline

its = builtins.__import__


def without(name, globals=None, locals=None, fromlist=(), level=0):
    ours = (globals or {}).get("__name__", "").startswith("sparsefeat")
    if ours and level == 0 and name.split(".")[0] in {"fcntl", "resource", "pwd", "grp", "termios"}:
        raise ImportError(name)
    return its(name, globals, locals, fromlist, level)


sys.modules["triton"] = None
sys.modules["msvcrt"] = types.SimpleNamespace(LK_LOCK=0, LK_NBLCK=2, LK_UNLCK=3, locking=lambda descriptor, mode, n: None)
builtins.__import__ = without
del signal.SIGHUP, signal.SIGKILL, signal.SIGALRM

import sparsefeat as sf, sparsefeat_kernels
from sparsefeat.assets import block_sae_folder, load_pipeline
from sparsefeat.cli import app

pipe, sae = load_pipeline(), sf.load_sae(block_sae_folder())
rec, maps = sf.Record(sae), sf.HeatMaps()
with sf.attach(pipe, rec, maps, sf.Steer(sae, scale={1: 0.0})) as run:
    pipe("a noto emoji of a fox", num_inference_steps=1, guidance_scale=3.0)
assert len(run[rec].top(3)) == 3 and run[maps].word("fox").values.sum() > 0
assert sparsefeat_kernels.implementation("topk_encode", torch.zeros(1)) == "torch"
sae.save("kept")
assert torch.equal(sf.load_sae("kept").W_dec, sae.W_dec)
sf.Steer(sae, add={1: 2.0}).save("steer")
assert sf.load_instrument("steer").add == {1: 2.0}
app(["collect", "--at", "unet.mid_block.attentions.0", "--steps", "1", "--limit", "1", "--out", "rows"])
"""


def test_without_triton_and_without_unix_everything_but_kernels_works(tmp_path):
    run = subprocess.run([sys.executable, "-c", WITHOUT_UNIX], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "rows of width" in run.stdout


class NoDoubles(TorchDispatchMode):
    """Notes the place of every float64 tensor that code of sparsefeat makes."""

    def __init__(self) -> None:
        super().__init__()
        self.places: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float64 and out.numel() > 1:
            own = [frame for frame in traceback.extract_stack(limit=12) if "/sparsefeat" in frame.filename]
            self.places |= {f"{frame.filename}:{frame.lineno}" for frame in own[-1:]}
        return out


def sae() -> SAE:
    torch.manual_seed(3)
    return SAE(SAEConfig(d_model=32, n_latents=96, k=5, hookpoint=AT)).eval()


def test_no_instrument_makes_a_double_precision_tensor_while_the_pipeline_draws():
    pipe, one = tiny_sd(), sae()
    mask = torch.rand(9, 7)
    instruments = (
        sf.Record(one),
        sf.HeatMaps(),
        sf.Steer(one, scale={3: 0.5}, add={7: 1.0}, mask=mask),
        sf.SelfAttention(),
    )
    found = NoDoubles()
    with sf.attach(pipe, *instruments), found:
        pipe("a fox", **CALL)
    assert found.places == set()
    with NoDoubles() as seen:  # it sees them where they are
        run = sf.Record(one)
        with sf.attach(pipe, run) as session:
            pipe("a fox", **CALL)
        session[run].top(3)
    assert seen.places


def test_weights_that_come_from_the_disk_when_their_module_runs_change_nothing(tmp_path):
    def draw(pipe: Any) -> tuple[Any, Any]:
        record, steer = sf.Record(sae()), sf.Steer(sae(), add={7: 3.0}, steps=(0.5, 1.0))
        with sf.attach(pipe, record, steer) as run:
            image = pipe("a fox", generator=torch.Generator().manual_seed(0), **CALL).images
        return image, run[record].top(5)

    pipe = tiny_sd()
    whole, latents = draw(pipe)
    accelerate.disk_offload(pipe.unet, str(tmp_path / "weights"), execution_device=torch.device("cpu"))
    assert all(weight.is_meta for weight in pipe.unet.parameters())
    image, found = draw(pipe)
    assert (image == whole).all()
    assert found == latents


IMPORTS = """\
import sys

begin = set(sys.modules)
import sparsefeat
print(*{name.partition(".")[0] for name in set(sys.modules) - begin} - sys.stdlib_module_names)
import torch
begin = set(sys.modules)
import sparsefeat_kernels
print(*{name.partition(".")[0] for name in set(sys.modules) - begin})
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    sparsefeat_kernels.topk_encode(torch.ones(3, 4), torch.ones(5, 4), torch.ones(5), torch.ones(4), k=2)
print(counter.get_total_flops())
"""


def test_importing_sparsefeat_loads_itself_alone_and_its_kernels_nothing_that_torch_did_not():
    """Not Triton, nor torch's counter, which imports it and still knows the ops. In seconds: `python -m bench.imports`."""
    run = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["sparsefeat", "sparsefeat_kernels", str(2 * 3 * 5 * 4)]
