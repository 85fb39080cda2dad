"""What needs a GPU and is not in the conformance kit."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from dovetail.core.errors import UnsupportedError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def test_a_group_of_one_keeps_its_arrays_on_the_gpu(tmp_path: Path) -> None:
    from dovetail.core.plugins.selection import load_platform

    group = load_platform("cuda").communicator(0, 1, str(tmp_path / "meeting"))
    x = torch.arange(6, dtype=torch.bfloat16, device="cuda").view(3, 2).t()
    found = [
        group.all_reduce(x),
        group.all_gather(x, 1),
        group.reduce_scatter(x, 0),
        group.broadcast(x, 0),
    ]
    group.barrier()
    group.close()
    for out in found:
        assert out.device == x.device
        assert torch.equal(out, x)
        assert out.data_ptr() != x.data_ptr()


def test_members_do_not_share_a_gpu(tmp_path: Path) -> None:
    from dovetail.core.plugins.selection import load_platform

    count = torch.cuda.device_count()
    with pytest.raises(UnsupportedError, match=f"{count + 1} members need a GPU each"):
        load_platform("cuda").communicator(0, count + 1, str(tmp_path / "meeting"))


def test_kernels_are_compiled_ahead_and_never_while_serving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton import knobs

    from dovetail import LLM, SamplingParams
    from tests.checkpoints import make_checkpoint

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "triton"))
    threads: list[str] = []

    def compiled(**_: object) -> None:
        threads.append(threading.current_thread().name)

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", compiled)
    model = make_checkpoint("qwen3", tmp_path, hidden_size=64, head_dim=32)
    llm = LLM(str(model), device="cuda", dtype="bfloat16", max_num_seqs=32, max_model_len=200)
    ahead = [name for name in threads if name.startswith("compiler")]
    late = len(threads) - len(ahead)
    assert len(ahead) > 20 and late == 0, f"{late} of {len(threads)} not ahead"
    prompts = [[5 + i] * (1 + 3 * i) for i in range(40)]
    for params in (
        SamplingParams(temperature=0.0, max_tokens=20),
        SamplingParams(temperature=0.9, max_tokens=20),
        SamplingParams(temperature=0.9, top_p=0.8, max_tokens=20),
    ):
        llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    assert len(threads) == len(ahead) + late, "something was compiled while serving"
