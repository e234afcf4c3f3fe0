"""llama.cpp beside ours: GGUF of every family that opens here, and of real weights.

    mkdir ../llama && cd ../llama && npm install node-llama-cpp
    python tests/long_llama.py ../llama                       # every family, every tokenizer
    python tests/long_llama.py ../llama path/to/SmolLM2-135M  # a folder of real weights, too

Each family is a small random model, whose file llama.cpp opens. Ids are compared where a text is
continued greedily: each of ours must be the likeliest of llama.cpp's behind the same ids."""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import gguf
from llama_library import Llama, Model
from llama_tokenizers import named_tokenizer, with_pattern

from barelm.checkpoint import load
from barelm.families import from_hf_config
from barelm.gguf_file import FILE_TYPES, check_gguf, write_gguf
from barelm.gguf_tokenizer import llama_vocab, trial_texts
from barelm.k_quants import K_QUANTS, quantize
from barelm.llama_ids import PATTERNS
from barelm.run import UserError
from model import GPT, generate

N_NEW = 24
PROMPTS = ["def main(x):\n    return x", "The quick brown fox, 12 times", "one two"]
WIDE = dict(hidden_size=256, intermediate_size=352, num_hidden_layers=3, num_attention_heads=8)
WIDE |= dict(max_position_embeddings=128, vocab_size=448, rms_norm_eps=1e-5, layer_norm_eps=1e-5)
GROUPED = WIDE | dict(num_key_value_heads=2, tie_word_embeddings=False)
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0)
LLAMA3 |= dict(high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32)
EXPERTS = GROUPED | dict(num_local_experts=4, num_experts_per_tok=2)
GPT2 = dict(n_embd=128, n_layer=3, n_head=4, n_positions=128, vocab_size=448)
GPT2 |= dict(layer_norm_epsilon=1e-5)
BERT = WIDE | dict(hidden_size=96, num_attention_heads=4, type_vocab_size=2)
T5 = dict(d_model=96, d_ff=160, d_kv=24, num_heads=4, num_layers=3, num_decoder_layers=2)
T5 |= dict(vocab_size=448)
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
# {name: (tokenizer of the fixtures, config.json)}
MODELS = {
    "llama": ("llama2", dict(model_type="llama") | GROUPED),
    "llama, tied": ("smollm2", dict(model_type="llama") | GROUPED | dict(tie_word_embeddings=True)),
    "llama, llama3": ("llama3", dict(model_type="llama", rope_parameters=LLAMA3) | GROUPED),
    "llama, yarn": ("tinyllama", dict(model_type="llama", rope_parameters=YARN) | GROUPED),
    "llama, linear": (
        "llama2",
        dict(model_type="llama", rope_parameters=dict(rope_type="linear", factor=4.0)) | GROUPED,
    ),
    "mistral": ("mistral", dict(model_type="mistral", sliding_window=100) | GROUPED),
    "ministral": (
        "mistral",
        dict(model_type="ministral", head_dim=40, sliding_window=100, layer_types=MIXED) | GROUPED,
    ),
    "mixtral": ("mistral", dict(model_type="mixtral") | EXPERTS),
    "mixtral, 8": ("mistral", dict(model_type="mixtral") | EXPERTS | dict(num_local_experts=8)),
    "qwen2": ("qwen3", dict(model_type="qwen2") | GROUPED),
    "qwen3": ("qwen3", dict(model_type="qwen3", head_dim=40) | GROUPED),
    "qwen3, yarn": (
        "qwen3",
        dict(model_type="qwen3", head_dim=40, rope_parameters=YARN | dict(attention_factor=1.3))
        | GROUPED,
    ),
    "qwen3_moe": (
        "qwen3",
        dict(model_type="qwen3_moe", head_dim=40, moe_intermediate_size=96, norm_topk_prob=True)
        | EXPERTS,
    ),
    "olmoe": (
        "gpt2",
        dict(model_type="olmoe", num_experts=4, num_experts_per_tok=2) | WIDE,
    ),
    "stablelm": (
        "gpt2",
        dict(model_type="stablelm", partial_rotary_factor=0.25, use_qkv_bias=True) | GROUPED,
    ),
    "stablelm, tied": (
        "gpt2",
        dict(model_type="stablelm") | GROUPED | dict(tie_word_embeddings=True),
    ),
    "gpt2": ("gpt2", dict(model_type="gpt2") | GPT2),
    "bloom": (
        "gpt2",
        dict(model_type="bloom", hidden_size=96) | GPT2,
    ),
    "bert": ("wordpiece", dict(model_type="bert") | BERT),
    "bert, BertModel": ("wordpiece", dict(model_type="bert", architectures=["BertModel"]) | BERT),
    "roberta": ("gpt2", dict(model_type="roberta", pad_token_id=1) | BERT),
    "xlm-roberta": ("unigram", dict(model_type="xlm-roberta", pad_token_id=1) | BERT),
    "modernbert": ("gpt2", dict(model_type="modernbert", local_attention=8) | BERT),
    "t5": ("unigram", dict(model_type="t5") | T5),
    "t5 1.1": (
        "unigram",
        dict(model_type="t5", feed_forward_proj="gated-gelu", tie_word_embeddings=False) | T5,
    ),
}


# --------------------------------------------------------------------------------------------------
# What is compared


def random_model(settings):
    """A GPT whose every tensor counts."""
    torch.manual_seed(0)
    net = GPT(from_hf_config(settings)).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim == 1:
                p.normal_(0.0 if name.endswith("bias") else 1.0, 0.2)
            else:
                p.normal_(0.0, 1.0 if "embed" in name else 2 * p.shape[-1] ** -0.5)
    net.start_id = 0 if net.config.is_seq2seq else None
    return net


@torch.no_grad()
def our_logits(net, ids, source):
    options = {}
    if source is not None:
        options["encoder_ids"] = torch.tensor([source])
    return net(torch.tensor([ids]), **options)[0].numpy()


def continued(net, ids, source):
    """ids and N_NEW more, each the likeliest."""
    ids = list(ids)
    for _ in range(N_NEW):
        ids.append(int(our_logits(net, ids, source)[-1].argmax()))
    return ids


def compare(net, tok, model):
    """(how many ids were equal, of how many, RMS of the logits' differences over their RMS). Of two
    of ours that are nearer than rounding, each counts: in float32 alone do such occur."""
    n_equal = 0
    n = 0
    errors = []
    for prompt in PROMPTS:
        source = tok.source(prompt) if net.config.is_seq2seq else None
        begin = [net.start_id] if net.config.is_seq2seq else tok.prompt(prompt)
        ids = continued(net, begin, source)
        ours = our_logits(net, ids[:-1], source)
        theirs = model.logits(ids[:-1], source)
        n_equal += int((theirs.argmax(1)[len(begin) - 1 :] == ids[len(begin) :]).sum())
        n += N_NEW
        errors.append(np.sqrt(((ours - theirs) ** 2).mean() / (ours**2).mean()))
    return n_equal, n, max(errors)


@torch.no_grad()
def compare_states(net, tok, model):
    """(rows of states of which the nearest of llama.cpp's is their own, of how many, RMS)."""
    n_equal = 0
    n = 0
    errors = []
    for prompt in PROMPTS:
        ids = tok.source(prompt)
        ours = net.hidden(torch.tensor([ids]))[0].numpy()
        theirs = model.states(ids)
        nearest = ((ours[:, None] - theirs[None]) ** 2).sum(2).argmin(1)
        n_equal += int((nearest == np.arange(len(ids))).sum())
        n += len(ids)
        errors.append(np.sqrt(((ours - theirs) ** 2).mean() / (ours**2).mean()))
    return n_equal, n, max(errors)


def alike(tok, model):
    """(how many texts have the same ids in llama.cpp, of how many)."""
    texts = [*trial_texts(tok), *PROMPTS]
    equal = [model.tokenize(text) == tok.encode(text) for text in texts]
    return sum(equal), len(equal)


def show_family(llama, folder, name):
    kind, settings = MODELS[name]
    tok = named_tokenizer(kind)
    net = random_model(settings)
    cells = []
    for gguf_type in ("F32", "F16", "Q8_0", "Q4_K_M"):
        path = folder / f"{gguf_type}.gguf"
        write_gguf(net, tok, path, gguf_type)
        model = Model(llama, path, 96, states=not net.config.causal)
        measure = compare if net.config.causal else compare_states
        n_equal, n, error = measure(net, tok, model)
        cells.append(f"{n_equal:>3}/{n} {error:7.1e}")
        if gguf_type == "F32":
            same, n_texts = alike(tok, model)
            architecture = gguf.GGUFReader(path).fields["general.architecture"].contents()
        model.close()
    vocab = check_gguf(net.config, tok)
    what = f"{vocab.model}, {vocab.pre}" if vocab.model == "gpt2" else vocab.model
    print(
        f"{name:<16} {architecture:<12} {what:<16} {same}/{n_texts}  {'  '.join(cells)}", flush=True
    )


def show_pattern(llama, folder, name):
    """One of llama.cpp's names: found for a tokenizer that cuts so, and its ids the same."""
    tok = with_pattern(name)
    settings = dict(model_type="llama") | WIDE | dict(vocab_size=tok.n_vocab, num_hidden_layers=1)
    path = folder / "pattern.gguf"
    write_gguf(random_model(settings), tok, path, "F16")
    model = Model(llama, path)
    same, n_texts = alike(tok, model)
    model.close()
    print(
        f"{name:<16} found as {llama_vocab(tok, tok.n_vocab).pre:<16} {same}/{n_texts}", flush=True
    )


# --------------------------------------------------------------------------------------------------
# Real weights


def show_real(llama, folder, real):
    """Greedy ids of three prompts, the text's bits, and our quantizer beside llama.cpp's."""
    net, tok = load(real, torch.device("cpu"), torch.float32)
    template = tok.config.get("chat_template")
    for gguf_type in FILE_TYPES:
        path = folder / f"{gguf_type}.gguf"
        write_gguf(net, tok, path, gguf_type)
        model = Model(llama, path, 512)
        n_free = 0
        for prompt in PROMPTS:
            [ours] = generate(net, tok, [prompt], max_new_tokens=N_NEW, temperature=0)
            theirs = model.greedy(tok.prompt(prompt), N_NEW)
            n_free += sum(a == b for a, b in zip(ours.ids, theirs))
        n_equal, n, error = compare(net, tok, model)
        text = (ROOT / "README.md").read_text()[:1800]
        ids = tok.prompt(text)[:500]
        bits = []
        for logits in (our_logits(net, ids, None), model.logits(ids)):
            logp = torch.from_numpy(logits[:-1]).log_softmax(1)
            nats = -logp[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].sum().item()
            bits.append(nats / np.log(2) / len(tok.decode(ids[1:]).encode()))
        same, n_texts = alike(tok, model)
        shown = "shown" if model.template() == template else "OTHER"
        model.close()
        size = path.stat().st_size / 1e6
        print(f"{gguf_type:<8} {size:7.1f} MB  free {n_free}/{n}  forced {n_equal}/{n}  "
              f"rms {error:.1e}  bits/byte {bits[0]:.4f} {bits[1]:.4f}  texts {same}/{n_texts}  "
              f"template {shown}", flush=True)  # fmt: skip


def show_quantizer(llama, folder):
    """Our files of quantized weights beside those that llama.cpp makes of our F32."""
    for gguf_type in ("Q8_0", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K"):
        path = folder / "theirs.gguf"
        llama.quantize_file(folder / "F32.gguf", path, FILE_TYPES[gguf_type])
        tensors = [gguf.GGUFReader(p).tensors for p in (folder / f"{gguf_type}.gguf", path)]
        ours, theirs = ({t.name: t for t in part} for part in tensors)
        other = [name for name in ours if ours[name].tensor_type != theirs[name].tensor_type]
        n_bytes = 0
        n_same = 0
        for name in ours.keys() - set(other):
            a, b = (t[name].data.view(np.uint8).ravel() for t in (ours, theirs))
            n_bytes += a.size
            n_same += int((a == b).sum())
        share = n_same / n_bytes
        print(f"{gguf_type:<8} types differ: {other[:3]}  bytes equal: {share:.6f}", flush=True)


def show_k_quants(llama):
    """The root of the mean square error, ours and llama.cpp's, of weights of three kinds."""
    draw = np.random.default_rng(0)
    kinds = {"normal": draw.normal(0, 0.02, (256, 1024)), "heavy": draw.standard_t(3, (256, 1024))}
    kinds["sparse"] = draw.normal(size=(256, 1024)) * (draw.random((256, 1024)) < 0.1)
    for name, values in kinds.items():
        values = values.astype(np.float32)
        for type_name in K_QUANTS:
            kind = gguf.GGMLQuantizationType[type_name]
            ours = quantize(values, type_name)
            theirs = llama.quantize(values, int(kind), ours.shape[1])
            errors = []
            for codes in (ours, theirs):
                back = gguf.quants.dequantize(codes, kind)
                errors.append(np.sqrt(((back - values) ** 2).mean()))
            same = (ours == theirs).mean()
            rms = "  ".join(f"{error:.6f}" for error in errors)
            print(f"{name:<8} {type_name}  rms {rms}  bytes equal {same:.5f}", flush=True)


def main():
    llama = Llama(sys.argv[1])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        print("family, architecture, tokenizer, texts with equal ids; then of each type the ids")
        print("that are the likeliest of llama.cpp's too, and the logits' relative RMS difference")
        wanted = os.environ.get("ONLY", "")  # of a name: those that have it in theirs
        for name in [name for name in MODELS if wanted in name]:
            try:
                show_family(llama, folder, name)
            except (UserError, RuntimeError) as error:
                print(f"{name:<16} REFUSED: {error}", flush=True)
        for name in [name for name in PATTERNS if wanted in name]:
            try:
                show_pattern(llama, folder, name)
            except (UserError, RuntimeError) as error:
                print(f"{name:<16} REFUSED: {error}", flush=True)
        if not wanted:
            show_k_quants(llama)
        for real in sys.argv[2:]:
            print(real)
            show_real(llama, folder, real)
            show_quantizer(llama, folder)


if __name__ == "__main__":
    main()
