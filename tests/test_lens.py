"""The logit lens, the shares of a logit and patched passes against naive passes in float64: block
by block, each sum written out, the scales of norms frozen by autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_model import make_net
from torch import nn

from barelm import lens
from barelm.adapters import AdaptConfig, add_adapters, add_lora
from barelm.patching import KINDS, Patching
from barelm.quantized import quantize_weights
from barelm.run import UserError
from model import Memory

IDS = [5, 17, 3, 9, 30, 3, 12]
SOURCE = [7, 2, 21, 4, 9]
NEAR = dict(atol=2e-4, rtol=2e-3)
QWEN3 = dict(n_head=4, n_kv_head=2, n_embd=32)
GPT2 = dict(n_head=4, n_embd=32, norm="layer", pos="learned", mlp="gelu", bias=True, qk_norm=False)
BERT = GPT2 | dict(causal=False, norm_place="post", n_types=2, embed_norm=True, tie=False)
T5 = dict(n_head=4, n_embd=32, qk_norm=False, pos="relative", scale_scores=False, mlp="relu")
GEMMA = QWEN3 | dict(norm_place="both", embed_scale=True, softcap=9.0, logit_softcap=7.0)
SHAPES = {
    "qwen3": QWEN3,
    "wide heads, untied": dict(n_head=4, n_kv_head=1, n_embd=24, head_dim=16, tie=False),
    "gpt2": GPT2,
    "gemma2": GEMMA | dict(mlp="geglu", window=3, layers="SL"),
    "post, sinusoids": QWEN3 | dict(norm_place="post", pos="sinusoidal", mlp="relu2", bias=True),
    "both, layer norm": GPT2 | dict(norm_place="both", pos="none"),
    "no first norm": GPT2 | dict(norm_place="post", first_norm=False, norm_bias=True),
    "bloom": GPT2 | dict(pos="alibi", embed_norm=True),
    "bert's stem": BERT,
    "experts": QWEN3 | dict(n_experts=4, n_shared_experts=1, expert_layers="DE"),
    "sinks": QWEN3 | dict(sinks=True, rope_fraction=0.5, logit_scale=0.25),
    "t5": T5 | dict(n_encoder_layer=2, logit_scale=32**-0.5),
    "vaswani": GPT2 | dict(n_encoder_layer=1, norm_place="post", pos="sinusoidal"),
    "both, seq2seq": QWEN3 | dict(n_encoder_layer=1, norm_place="both"),
}


def net_of(name, n_layer=3):
    return make_net(n_layer=n_layer, **SHAPES[name])


def source_of(net):
    return SOURCE if net.config.is_seq2seq else None


def close(a, b, **options):
    torch.testing.assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double(), **options)


# --------------------------------------------------------------------------------------------------
# A naive pass


class Naive:
    """A decoder's or encoder's pass over ids in float64. What is added to the residual stream is a
    leaf of autograd, and nothing else is: the scales of norms, and what attention and MLPs read,
    are frozen. So a leaf times the gradient of a logit by it is its share."""

    def __init__(self, net, ids, source=None):
        self.net = copy.deepcopy(net).double()
        self.net.fast = False
        self.leaves = []  # [((kind, layer, head), (T, C))]
        self.states = []
        rows = torch.tensor([ids])
        self.memory = None
        if source is not None:
            with torch.no_grad():
                self.memory = self.net.encode(torch.tensor([source])).h[0]
        model, c = self.net.model, self.net.config
        positions = torch.arange(len(ids))[None]
        with torch.no_grad():
            embedded = self.net.model.embed_tokens(rows)
            looks = self.net.looks(model, embedded, positions)
            scaled = embedded[0] * (c.n_embd**0.5 if c.embed_scale else 1)
            before = copy.copy(model.embed_norm) if c.embed_norm else nn.Identity()
            if c.embed_norm:
                model.embed_norm = nn.Identity()
            whole = self.net.embed(embedded, positions)[0]
        x = self.leaf(("token", None, None), scaled)
        if (whole - scaled).any():
            x = x + self.leaf(("position", None, None), whole - scaled)
        x = self.norm(before, x, None)
        self.states.append(x.detach())
        for i, block in enumerate(model.layers):
            x = self.block(i, block, x, *looks[block.pattern])
            self.states.append(x.detach())
        self.final = self.norm(model.norm, x, None)

    def leaf(self, name, value):
        leaf = value.detach().clone().requires_grad_(True)
        self.leaves.append((name, leaf))
        return leaf

    def norm(self, norm, x, layer):
        """A norm whose scale is frozen."""
        if isinstance(norm, nn.Identity):
            return x
        scale = x.detach()
        if isinstance(norm, nn.LayerNorm):
            x = x - x.mean(-1, keepdim=True)
            scale = scale - scale.mean(-1, keepdim=True)
        x = x / (scale.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.detach()
        if getattr(norm, "bias", None) is not None:
            x = x + self.leaf(("bias", layer, None), norm.bias.expand_as(x))
        return x

    def block(self, i, block, x, rope, mask):
        is_post = block.c.norm_place == "post"
        y = self.attention(i, block.self_attn, block.before(x, block.input_layernorm), rope, mask)
        x = self.after(i, x, y, block.input_layernorm, block.attn_out_norm)
        if self.memory is not None:
            y = self.attention(i, block.cross_attn, block.before(x, block.cross_layernorm))
            x = self.after(i, x, y, block.cross_layernorm, block.cross_out_norm)
        with torch.no_grad():
            y = block.mlp(block.before(x, block.post_attention_layernorm)[None])
            y = block.mlp_out_norm((y[0] if block.has_experts else y)[0])
        x = x + self.leaf(("mlp", i, None), y)
        return self.norm(block.post_attention_layernorm, x, i) if is_post else x

    def after(self, i, x, y, norm, out_norm):
        x = x + self.norm(out_norm, y, i)
        return self.norm(norm, x, i) if self.net.config.norm_place == "post" else x

    def attention(self, i, attention, x, rope=None, mask=None):
        """The sum (T, C) of what each head writes, a leaf each, and of the bias."""
        c = attention.c
        is_cross = attention is not self.net.model.layers[i].self_attn
        kind = "cross_head" if is_cross else "head"
        with torch.no_grad():
            if is_cross:
                q = attention.q_proj(x).unflatten(1, (c.n_head, -1)).transpose(0, 1)
                if c.qk_norm:
                    q = attention.q_norm(q)
                k, v = [t[0] for t in attention.source(self.memory[None])]
            else:
                q, k, v = [t[0] for t in attention.qkv(x.detach()[None], rope)]
        total = 0
        for h in range(c.n_head):
            g = h * c.n_kv_head // c.n_head
            with torch.no_grad():
                scores = q[h] @ k[g].T * (c.head_dim**-0.5 if c.scale_scores else 1)
                if c.softcap:
                    scores = c.softcap * (scores / c.softcap).tanh()
                if mask is not None and mask.dtype != torch.bool:
                    scores = scores + mask[0, h % mask.shape[1]]
                elif mask is not None:
                    scores = scores.masked_fill(~mask[0, 0], -torch.inf)
                elif c.causal and not is_cross:
                    scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
                weights = scores.exp()
                rest = attention.sinks[h].exp() if c.sinks and not is_cross else 0
                weights = weights / (weights.sum(-1, keepdim=True) + rest)
                columns = slice(h * c.head_dim, (h + 1) * c.head_dim)
                written = weights @ v[g] @ attention.o_proj.weight[:, columns].T  # (T, C)
            total = total + self.leaf((kind, i, h), written)
        if attention.o_proj.bias is not None:
            total = total + self.leaf(("bias", i, None), attention.o_proj.bias.expand_as(total))
        return total

    def shares(self, position, token, against=None):
        """{(kind, layer, head): share}, biases of a layer together; and the logit."""
        row = self.net.lm_head.weight[token].detach()
        if against is not None:
            row = row - self.net.lm_head.weight[against].detach()
        logit = self.final[position] @ row * self.net.config.logit_scale
        gradients = torch.autograd.grad(logit, [leaf for _, leaf in self.leaves], retain_graph=True)
        shares = {}
        for (name, leaf), gradient in zip(self.leaves, gradients):
            share = (leaf[position] * gradient[position]).sum().item()
            shares[name] = shares.get(name, 0.0) + share
        return shares, logit.item()


def together(attribution):
    """{(kind, layer, head): share} without the rounding."""
    shares = {}
    for share in attribution.shares:
        if share.kind != "rounding":
            name = (share.kind, share.layer, share.head)
            shares[name] = shares.get(name, 0.0) + share.value
    return shares


# --------------------------------------------------------------------------------------------------
# Direct logit attribution


@pytest.mark.parametrize("name", SHAPES)
def test_shares_are_those_of_a_naive_pass_and_add_up(name):
    net = net_of(name)
    naive = Naive(net, IDS, source_of(net))
    trace = lens.run(net, IDS, source_of(net))
    for position, against in ((0, None), (4, 8), (6, None)):
        result = lens.attribute(net, trace, position, 11, against)
        expected, logit = naive.shares(position, 11, against)
        shares = together(result)
        assert shares.keys() == expected.keys()
        for key, value in expected.items():
            close(shares[key], value, atol=2e-4, rtol=1e-3, msg=lambda m, key=key: f"{key}: {m}")
        close(result.logit, logit, atol=2e-4, rtol=1e-4)
        # To the bit, with the rounding that is said; and that is as small as float32's.
        total = sum(share.value for share in result.shares)
        assert total == pytest.approx(result.logit, abs=1e-12)
        rounding = [share.value for share in result.shares if share.kind == "rounding"]
        size = sum(abs(value) for value in shares.values())
        assert len(rounding) == 1 and abs(rounding[0]) < 2e-6 * size


def test_a_capped_logit_is_shared_before_its_cap():
    net = net_of("gemma2")
    with torch.no_grad():
        logits = net(torch.tensor([IDS]))[0, -1]
    result = lens.attribute(net, lens.run(net, IDS), len(IDS) - 1, 11)
    close(result.capped, logits[11], atol=1e-5, rtol=1e-5)
    close(7 * torch.tensor(result.logit / 7).tanh(), logits[11], atol=1e-5, rtol=1e-5)
    plain = net_of("qwen3")
    assert lens.attribute(plain, lens.run(plain, IDS), 0, 1).capped is None


@pytest.mark.parametrize("kind", ["int8", "int4", "lora", "bottlenecks", "bfloat16"])
def test_shares_of_changed_layers_add_up(kind):
    net = net_of("qwen3")
    if kind == "lora":
        add_lora(net, AdaptConfig(adapt="lora", lora_targets="o_proj,down_proj"))
    elif kind == "bottlenecks":
        add_adapters(net, 8)
    elif kind == "bfloat16":
        net = net.bfloat16()
    else:
        quantize_weights(net, kind)
    with torch.no_grad():
        for key, p in net.named_parameters():
            if "lora_B" in key or ".up.weight" in key:
                p.normal_(0, 0.3)
        net.fast = False
        logits = net(torch.tensor([IDS]))[0].float()
        net.fast = True
    result = lens.attribute(net, lens.run(net, IDS), 6, 11)
    close(result.logit, logits[6, 11], atol=1e-5, rtol=1e-5)
    assert sum(share.value for share in result.shares) == pytest.approx(result.logit, abs=1e-9)
    size = sum(abs(share.value) for share in result.shares)
    [rounding] = [share.value for share in result.shares if share.kind == "rounding"]
    assert abs(rounding) < (0.03 if kind == "bfloat16" else 1e-5) * size
    kinds = {share.kind for share in result.shares}
    assert ("attention" if kind == "bottlenecks" else "head") in kinds


def test_what_is_no_sum_is_refused_in_words():
    net = make_net(**BERT | dict(mlm_head=True))
    with pytest.raises(UserError, match="activation"):
        lens.attribute(net, lens.run(net, IDS), 3, 11)

    net = net_of("qwen3")
    block = net.model.layers[1]
    forward = block.forward
    block.forward = lambda x, *rest: 0.5 * forward(x, *rest)  # a fork's
    with pytest.raises(UserError, match="do more than add"):
        lens.attribute(net, lens.run(net, IDS), 3, 11)


# --------------------------------------------------------------------------------------------------
# The logit lens


@pytest.mark.parametrize("name", [*SHAPES, "bert"])
def test_the_lens_is_norm_and_head_on_each_state(name):
    net = make_net(n_layer=3, **BERT | dict(mlm_head=True)) if name == "bert" else net_of(name)
    naive = Naive(net, IDS, source_of(net))
    trace = lens.run(net, IDS, source_of(net))
    states = lens.states(trace)
    assert len(states) == 4
    wanted = [11] * len(IDS)
    for x, right in zip(states, naive.states):
        close(x, right, atol=1e-4, rtol=1e-4)
        guesses = lens.logit_lens(net, x, 60, 5, wanted)
        logits = naive_head(naive.net, right)[:, :60]
        p = logits.softmax(-1)
        for t, row in enumerate(p):
            best = row.argsort(descending=True)[:5]
            assert guesses.tokens[t] == best.tolist()
            close(guesses.probabilities[t], row[best], atol=1e-4, rtol=1e-3)
            close(guesses.wanted[t], row[11], atol=1e-4, rtol=1e-3)
            assert guesses.ranks[t] == (row > row[11]).sum()
            entropy = -sum(value * value.log2() for value in row if value > 0)
            close(guesses.entropies[t], entropy, atol=1e-3, rtol=1e-3)
    # The last row is what the network says.
    options = {} if source_of(net) is None else {"encoder_ids": torch.tensor([SOURCE])}
    with torch.no_grad():
        p = net(torch.tensor([IDS]), **options)[0, :, :60].softmax(-1)
    close(guesses.probabilities, p.topk(5).values, atol=1e-5, rtol=1e-4)


def naive_head(net, x):
    """The logits of states x (T, C): the final norm, an encoder's head, the matrix, the cap."""
    c, model = net.config, net.model

    def norm(module, x):
        if isinstance(module, nn.Identity):
            return x
        if isinstance(module, nn.LayerNorm):
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight
        return x if getattr(module, "bias", None) is None else x + module.bias

    with torch.no_grad():
        x = norm(model.norm, x)
        if c.mlm_head:
            x = norm(net.head_norm, F.gelu(x @ net.head_dense.weight.T + net.head_dense.bias))
        logits = x @ net.lm_head.weight.T * c.logit_scale
        if net.lm_head.bias is not None:
            logits = logits + net.lm_head.bias
        return c.logit_softcap * (logits / c.logit_softcap).tanh() if c.logit_softcap else logits


def test_the_lens_reads_what_transformers_calls_hidden_states():
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    config = transformers.Qwen3Config(vocab_size=64, num_key_value_heads=2, head_dim=8, **sizes)
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0 if p.ndim > 1 else 1, 0.3)
    net = make_net(n_layer=3, **QWEN3 | dict(n_hidden=48, tie=False, norm_eps=config.rms_norm_eps))
    net.load_state_dict(theirs.state_dict())
    ids = [3, 9, 4, 11, 20]
    with torch.no_grad():
        hidden = theirs(torch.tensor([ids]), output_hidden_states=True).hidden_states
        for x, right in zip(lens.states(lens.run(net, ids)), hidden[:-1]):  # the last is normed
            guesses = lens.logit_lens(net, x, net.config.vocab_size, 3)
            p = theirs.lm_head(theirs.model.norm(right[0])).softmax(-1)
            close(guesses.probabilities, p.topk(3).values, atol=1e-5, rtol=1e-4)


def test_looking_changes_nothing():
    net = net_of("experts")
    before = [net.fast, net.ops.deterministic, net.training]
    with torch.no_grad():
        expected = net(torch.tensor([IDS]))
        trace = lens.run(net, IDS)
        lens.attribute(net, trace, 2, 4)
        patching = Patching(net, CLEAN, CORRUPTED, 2)
        patching.compare(11, 8)
        for kind in KINDS:
            patching.restored(kind, 1)
        assert torch.equal(net(torch.tensor([IDS])), expected)
    assert [net.fast, net.ops.deterministic, net.training] == before
    for module in net.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


# --------------------------------------------------------------------------------------------------
# Activation patching

CLEAN = [5, 17, 3, 9, 30, 3, 12]
CORRUPTED = [5, 17, 8, 9, 22, 3, 12]


def naive_patched(net, clean, corrupted, kind, layer, at):
    """The last states (T, C) float64 of a pass over the corrupted ids in which one thing is the
    clean pass's: everything is computed anew, one patch at a time."""
    kept = {}

    def walk(ids, patching):
        positions = torch.arange(len(ids))[None]
        x = net.embed(net.model.embed_tokens(torch.tensor([ids])), positions)
        looks = net.looks(net.model, x, positions)
        for i, block in enumerate(net.model.layers):
            here = i == layer
            x = swap("residual", x, here, patching)
            rope, mask = looks[block.pattern]
            y = block.before(x, block.input_layernorm)
            q, k, v = block.self_attn.qkv(y, rope)
            y = block.self_attn.ops.attend(q, k, v, mask, **block.self_attn.scoring())
            y = swap("heads", y, here, patching)  # (1, H, T, D)
            y = block.self_attn.o_proj(y.transpose(1, 2).flatten(2))
            y = swap("attention", y, here, patching)
            x = block.after(x, y, block.input_layernorm, block.attn_out_norm)
            y = block.mlp(block.before(x, block.post_attention_layernorm))
            y = swap("mlp", y[0] if block.has_experts else y, here, patching)
            x = block.after(x, y, block.post_attention_layernorm, block.mlp_out_norm)
        return swap("residual", x, layer == len(net.model.layers), patching)[0]

    def swap(what, x, here, patching):
        if not here or what != kind:
            return x
        if not patching:
            kept[kind] = x
            return x
        x = x.clone()
        # A head is the second dimension's, a position too: (1, H, T, D), (1, T, C).
        x[:, at] = kept[kind][:, at]
        return x

    with torch.no_grad():
        walk(clean, False)
        return walk(corrupted, True)


PATCHED = ["qwen3", "gpt2", "gemma2", "post, sinusoids", "bert's stem", "experts", "sinks", "bloom"]


@pytest.mark.parametrize("name", PATCHED)
@pytest.mark.parametrize("kind", KINDS)
def test_patched_logits_are_those_of_a_naive_pass(name, kind):
    net = net_of(name, n_layer=2)
    naive = copy.deepcopy(net).double()
    naive.fast = False
    patching = Patching(net, CLEAN, CORRUPTED, 5)
    patching.compare(11, 8)
    differences = []
    for ids in (CLEAN, CORRUPTED):
        x = naive_patched(naive, ids, ids, kind, 0, 0)
        differences.append(difference_of(naive, x[5]))
    close([patching.clean_difference, patching.corrupted_difference], differences, **NEAR)
    for layer in range(3 if kind == "residual" else 2):
        shares = patching.restored(kind, layer)
        assert len(shares) == (net.config.n_head if kind == "heads" else len(CLEAN))
        for at, share in enumerate(shares):
            x = naive_patched(naive, CLEAN, CORRUPTED, kind, layer, at)
            gain = difference_of(naive, x[5]) - differences[1]
            close(share, gain / (differences[0] - differences[1]), **NEAR)


def difference_of(net, x):
    logits = naive_head(net, x)
    return (logits[11] - logits[8]).item()


def test_patching_an_encoder_restores_what_its_decoder_says():
    net = net_of("t5", n_layer=2)
    start = [0, 4]
    patching = Patching(net, CLEAN, CORRUPTED, 1, start)
    patching.compare(11, 8)
    differences = []
    for ids in (CLEAN, CORRUPTED):
        row = net(torch.tensor([start]), encoder_ids=torch.tensor([ids]))[0, 1]
        differences.append((row[11] - row[8]).item())
    for layer in range(3):
        shares = patching.restored("residual", layer)
        for place, share in enumerate(shares):
            x = lens.states(patching.corrupted)[layer].clone()
            x[place] = lens.states(patching.clean)[layer][place]
            with torch.no_grad():
                looks = net.looks(net.model.encoder, x[None], torch.arange(len(x))[None])
                h = net.run_blocks(net.model.encoder.layers[layer:], x[None], looks)
                memory = Memory(net.model.encoder.norm(h))
                row = net.logits(net.hidden(torch.tensor([start]), memory=memory))[0, 1]
            gain = (row[11] - row[8]).item() - differences[1]
            close(share, gain / (differences[0] - differences[1]), **NEAR)


def test_the_last_state_restores_all():
    patching = Patching(net_of("qwen3"), CLEAN, CORRUPTED, 6)
    patching.compare(11, 8)
    close(patching.restored("residual", 3), [0, 0, 0, 0, 0, 0, 1], atol=1e-5, rtol=0)


def test_pairs_that_cannot_be_patched_are_refused_in_words():
    net = net_of("qwen3")
    with pytest.raises(UserError, match="7 tokens, the corrupted one 6: .* both have as many"):
        Patching(net, CLEAN, CORRUPTED[:-1], 5)
    with pytest.raises(UserError, match="the same: change"):
        Patching(net, CLEAN, CLEAN, 5)
    with pytest.raises(UserError, match="nothing to restore"):
        Patching(net, CLEAN, CORRUPTED, 1).compare(11, 8)  # before they differ
