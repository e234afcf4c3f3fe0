"""ONNX at length: every kind of network, and what other programs write with an exported folder.

    python tests/long_onnx.py shapes                 # each kind: how far from the network's logits
    python tests/long_onnx.py readers MODEL FOLDER   # FOLDER: what export.py --export=onnx wrote

`readers` wants optimum-onnx or onnxruntime-genai: greedy ids of three prompts beside generate's."""

import importlib
import sys
import tempfile
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from test_model import OURS, QWEN3, SHAPES, make_net

from barelm.bpe import bpe_tokenizer
from barelm.checkpoint import load
from barelm.onnx_check import check_onnx, left_padded
from barelm.onnx_file import write_onnx
from model import generate

WINDOW = QWEN3 | dict(window=8)
ENCODER = QWEN3 | dict(causal=False)
BERT = dict(n_head=2, n_embd=16, causal=False, pos="learned", norm="layer", norm_place="post")
BERT |= dict(bias=True, qk_norm=False, mlp="gelu_erf", mlm_head=True, n_types=2, embed_norm=True)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
KINDS = {
    "window": WINDOW | dict(layers="SL"),
    "window, sink tokens": WINDOW | dict(sink_tokens=2),
    "local": WINDOW | dict(attention="local"),
    "strided": WINDOW | dict(attention="strided"),
    "fixed": WINDOW | dict(attention="fixed", layers="SL"),
    "two thetas": WINDOW | dict(layers="SSL", local_rope_theta=100.0),
    "sinks": QWEN3 | dict(sinks=True),
    "softcaps": QWEN3 | dict(softcap=5.0, logit_softcap=3.0),
    "alibi": QWEN3 | dict(pos="alibi"),
    "relative": QWEN3 | dict(pos="relative"),
    "yarn": QWEN3 | dict(rope_scaling=YARN),
    "scores as they are": QWEN3 | dict(scale_scores=False),
    "qk_norm of all heads": QWEN3 | dict(qk_norm_all=True),
    "half of a head turned": QWEN3 | dict(rope_fraction=0.5),
    "geglu": QWEN3 | dict(mlp="geglu"),
    "LayerNorm, gelu_erf": QWEN3 | dict(mlp="gelu_erf", norm="layer", norm_bias=True),
    "scaled embedding": QWEN3 | dict(embed_scale=True, embed_norm=True, logit_scale=0.5),
    "no first norm": QWEN3 | dict(first_norm=False),
    "mtp": QWEN3 | dict(mtp=1),
    "experts": QWEN3 | dict(n_experts=4, norm_topk=False),
    "experts, bias, shared": QWEN3
    | dict(n_experts=4, balance="bias", n_shared_experts=1, expert_layers="DE"),
    "encoder": ENCODER,
    "encoder, window": ENCODER | dict(window=8, layers="SL"),
    "encoder, relative": ENCODER | dict(pos="relative"),
    "bert": BERT,
}
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village,",
    "def fibonacci(n):\n",
)
N_TOKENS = 32


def shapes(*names):
    tok = bpe_tokenizer([(b"a", b"b")])
    vocab_size = -(-tok.n_vocab // 64) * 64
    for name, shape in (SHAPES | OURS | KINDS).items():
        if names and name not in names:
            continue
        net = make_net(**dict(n_ctx=64) | shape | dict(vocab_size=vocab_size))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            write_onnx(net, path)
            result = check_onnx(net, tok, path)
        verdict = "" if result.good else "  NOT THE SAME"
        others = f"{result.n_other} of {result.n_sure}"
        print(f"{name:<26}{result.difference:>9.1e}{others:>10}{verdict}", flush=True)


def readers(model, folder):
    net, tok = load(model)
    answers = generate(net, tok, list(PROMPTS), max_new_tokens=N_TOKENS, temperature=0)
    ours = [answer.ids for answer in answers]
    prompts = [tok.prompt(prompt) for prompt in PROMPTS]
    for name, ids_of in (("optimum.onnxruntime", optimum_ids), ("onnxruntime_genai", genai_ids)):
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            print(f"{name}: {error}")
            continue
        for what, theirs, expected in ids_of(module, folder, prompts, ours):
            same = sum(ids[: len(row)] == row for ids, row in zip(theirs, expected))
            print(f"{name}, {what}: the ids of {same} of {len(expected)} are generate's")


def optimum_ids(module, folder, prompts, ours):
    net = module.ORTModelForCausalLM.from_pretrained(folder)
    alone = []
    for prompt in prompts:
        alone += optimum_batch(net, [prompt])
    yield "one by one", alone, ours
    yield "a batch of 2, left padding", optimum_batch(net, prompts[:2]), ours[:2]


def optimum_batch(net, prompts):
    ids, mask = left_padded(prompts)
    options = dict(max_new_tokens=N_TOKENS, do_sample=False)
    out = net.generate(ids, attention_mask=mask, **options)
    return out[:, ids.shape[1] :].tolist()


def genai_ids(module, folder, prompts, ours):
    model = module.Model(folder)
    tok = module.Tokenizer(model)
    theirs = [tok.encode(prompt).tolist() for prompt in PROMPTS]
    yield "its tokenizer", theirs, prompts
    rows = []
    for prompt in prompts:
        params = module.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + N_TOKENS, do_sample=False)
        generator = module.Generator(model, params)
        generator.append_tokens(prompt)
        rows.append([])
        while not generator.is_done():
            generator.generate_next_token()
            rows[-1].append(int(generator.get_next_tokens()[0]))
    yield "one by one", rows, ours


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    {"shapes": shapes, "readers": readers}[sys.argv[1]](*sys.argv[2:])
