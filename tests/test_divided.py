"""finetune.py and rl.py of a network in parts (--parallel=fsdp): the losses and the weights of one
process, whatever learns; and what each process then holds."""

import json
import shutil

import pytest
import torch
import torch.distributed.fsdp  # here, so that forks need not import it
import torch.distributed.tensor  # noqa: F401
from conftest import run

from barelm.adapters import AdaptConfig, add_lora
from barelm.fitting import bytes_of
from barelm.optim import memory_estimate
from barelm.parallel import widen_norms
from barelm.resume import load_state
from barelm.safetensors import read_safetensors
from model import GPT, GPTConfig

QUICK = ["--max_steps=3", "--max_epochs=none", "--batch_size=4", "--micro_tokens=150"]
QUICK += ["--eval_examples=7", "--eval_every=3", "--model=out/tiny", "--dataset=tiny"]
QUICK += ["--warmup_steps=0", "--dtype=float32", "--seq_len=64"]


def rows_of(folder, out):
    return list(map(json.loads, (folder / out / "log.jsonl").read_text().splitlines()))


def same_run(folder, one, other, tolerance=1e-5):
    """Whether two runs have the same figures, step by step, but for the clock's."""
    for row, other_row in zip(rows_of(folder, one), rows_of(folder, other), strict=True):
        assert row.keys() == other_row.keys()
        for key in row.keys() - {"dt"}:
            assert row[key] == pytest.approx(other_row[key], abs=tolerance), key


def same_tensors(one, other, tolerance=1e-4):
    tensors, _ = read_safetensors(one)
    others, _ = read_safetensors(other)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[name], atol=tolerance, rtol=0)


KINDS = {
    "sft": ("finetune.py", "--check_memorized=2"),
    "qlora": ("finetune.py", "--adapt=qlora", "--check_memorized=0"),
    "dpo": ("finetune.py", "--method=dpo"),
}


def test_norms_whose_weights_came_in_fewer_bits():
    norm = torch.nn.LayerNorm(8).bfloat16()
    widen_norms(norm)
    x = torch.randn(3, 8)
    torch.testing.assert_close(norm(x), torch.nn.functional.layer_norm(x, (8,)))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_learn_what_one_process_learns(tiny, kind):
    script, *options = KINDS[kind]
    out = f"out/stage_{kind}"
    run(tiny, script, *QUICK, *options, f"--out_dir={out}1")
    run(tiny, script, *QUICK, *options, f"--out_dir={out}2", "--parallel=fsdp", processes=2)
    same_run(tiny, f"{out}1", f"{out}2")
    name = "adapter_model.safetensors" if kind == "qlora" else "model.safetensors"
    same_tensors(tiny / f"{out}1" / name, tiny / f"{out}2" / name)


def test_samples_of_parts_are_those_of_copies(tiny):
    """Each process generates from weights that are whole while it does."""
    (tiny / "reward.py").write_text(
        "def score(messages, text, answer):\n    return len(text) % 7\n"
    )
    options = [*QUICK, "--max_new_tokens=4", "--group_size=3", "--kl_weight=0.1"]
    options += ["--reward=reward.py:score", "--seq_len=0"]
    for kind in ("ddp", "fsdp"):
        out = f"--out_dir=out/stage_rl_{kind}"
        run(tiny, "rl.py", *options, out, f"--parallel={kind}", processes=2)
    same_run(tiny, "out/stage_rl_ddp", "out/stage_rl_fsdp")
    assert len({row["reward"] for row in rows_of(tiny, "out/stage_rl_ddp") if "reward" in row}) > 1


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_reward_that_fails_on_one_process_loses_nothing(tiny, parallel):
    (tiny / "fails.py").write_text(
        "import os\ncalls = []\n\n\ndef score(messages, text, answer):\n    calls.append(1)\n"
        "    if os.environ['RANK'] == '1' and len(calls) > 8:\n        raise ValueError('late')\n"
        "    return len(text) % 7\n"
    )
    out = f"out/stage_fails_{parallel}"
    options = [*QUICK, "--max_new_tokens=4", "--group_size=3", "--eval_examples=1"]
    options += ["--reward=fails.py:score", "--seq_len=0", f"--out_dir={out}"]
    done = run(tiny, "rl.py", *options, f"--parallel={parallel}", processes=2, check=False)
    assert done.returncode == 1 and "late" in done.stderr and "saved at step 1" in done.stdout
    assert load_state(tiny / out)["step"] == 1


def test_a_run_in_parts_goes_on_bit_for_bit_and_on_one_process(tiny):
    options = [*QUICK, "--check_memorized=0", "--lr_schedule=constant"]
    whole, again, alone = (f"out/stage_{name}" for name in ("whole", "again", "alone"))
    parts = [*options, "--parallel=fsdp"]
    run(tiny, "finetune.py", *parts, f"--out_dir={whole}", "--max_steps=4", processes=2)
    run(tiny, "finetune.py", *parts, f"--out_dir={again}", "--max_steps=2", processes=2)
    shutil.copytree(tiny / again, tiny / alone)
    rest = ["--max_steps=4", "--init_from=resume"]
    run(tiny, "finetune.py", *parts, *rest, f"--out_dir={again}", processes=2)
    run(tiny, "finetune.py", *options, *rest, f"--out_dir={alone}")
    names = [tiny / out / "model.safetensors" for out in (whole, again, alone)]
    assert names[0].read_bytes() == names[1].read_bytes()
    same_tensors(names[0], names[2])


@pytest.mark.parametrize(
    "options, words",
    [
        (["--batch_size=5"], "--batch_size=4"),
        (["--method=embed"], "twice"),
        (["--method=classify", "--adapt=lora"], "merged copy"),
        (["--adapt=qlora", "--merge=quantized"], "on one process"),
    ],
)
def test_what_is_not_done_in_parts_is_refused(tiny, options, words):
    args = [*QUICK, "--parallel=fsdp", "--out_dir=out/stage_refused", *options]
    done = run(tiny, "finetune.py", *args, processes=2, check=False)
    assert done.returncode == 1 and words in done.stderr


def test_four_bits_of_a_7b_shape_fit_a_card_of_24_gb():
    """Llama 7B's shape, 4,096 tokens at once: what its tensors take, and the estimate beside it."""
    shape = dict(n_layer=32, n_head=32, n_embd=4096, n_hidden=11008, n_ctx=4096)
    c = GPTConfig(vocab_size=32000, qk_norm=False, tie=False, **shape)
    targets = "q_proj,k_proj,v_proj,o_proj"
    with torch.device("meta"):
        net = GPT(c)
        add_lora(net, AdaptConfig("qlora", lora_rank=16, lora_targets=targets))
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    # 4 bits, a byte for 64 weights, a float32 for 64 x 256: section 3 of the paper.
    packed = linear * (1 / 2 + 1 / 64 + 4 / 64 / 256)
    learning = 32 * 4 * 16 * 2 * 4096
    weights = packed + 4 * (2 * 32000 * 4096 + learning)
    assert bytes_of(net) == pytest.approx(weights, rel=0.01)
    head, activations = memory_estimate(
        c, 0, rows=2, seq_len=2048, dtype=torch.bfloat16, recompute=True, device_type="cuda"
    )
    gradients_and_moments = 3 * 4 * learning
    assert bytes_of(net) + gradients_and_moments + head + activations < 24e9
