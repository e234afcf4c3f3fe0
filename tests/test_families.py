"""Formats of others open here, and ours there: small random models of transformers, their logits,
greedy ids and tensors, each key of their config.json; and fixtures of the same, without it."""

import io
import json
import shutil
import zlib
from pathlib import Path

import pytest
import torch

from barelm.adapters import AdaptConfig, LoRA, add_lora, save_adapter
from barelm.bpe import char_tokenizer
from barelm.checkpoint import load, save
from barelm.families import FAMILIES, from_hf_config
from barelm.family_table import REFUSED
from barelm.files import write_json
from barelm.optim import n_params
from barelm.run import UserError
from barelm.safetensors import read_safetensors, write_safetensors
from barelm.tokenizer import Tokenizer
from model import GPT, GPTConfig, generate

FIXTURES = Path(__file__).parent / "fixtures" / "families"
TOK = char_tokenizer("abcdefghijklmnopqrstuvwxyz \n")
SMALL = dict(vocab_size=TOK.n_vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=3)
SMALL |= dict(num_attention_heads=4, max_position_embeddings=60)
GROUPED = SMALL | dict(num_key_value_heads=2)
IDS = dict(pad_token_id=0, eos_token_id=1, bos_token_id=2)
ENDS = IDS | dict(cls_token_id=2, sep_token_id=1)
T5 = dict(vocab_size=TOK.n_vocab, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_decoder_layers=3)
T5 |= dict(num_heads=4, decoder_start_token_id=0)
BLOOM = dict(vocab_size=TOK.n_vocab, hidden_size=24, n_layer=2, n_head=6) | IDS
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, rope_theta=1000.0)
MSCALE = dict(beta_fast=8, beta_slow=2, mscale=0.7, mscale_all_dim=0.3, truncate=False)
USED = dict(use_sliding_window=True, sliding_window=5)

# {name: (its class, its config's class without Config, its keys)}
MODELS = {
    "mistral": ("MistralForCausalLM", GROUPED | IDS | dict(sliding_window=7)),
    "ministral": (
        "MinistralForCausalLM",
        GROUPED | IDS | dict(head_dim=4, sliding_window=7, layer_types=MIXED),
    ),
    "qwen2": ("Qwen2ForCausalLM", GROUPED | USED | dict(max_window_layers=1)),
    "qwen3": ("Qwen3ForCausalLM", GROUPED | USED | dict(head_dim=8, layer_types=MIXED)),
    "qwen3-yarn": ("Qwen3ForCausalLM", GROUPED | dict(head_dim=8, rope_parameters=YARN)),
    "llama-yarn": ("LlamaForCausalLM", GROUPED | IDS | dict(rope_parameters=YARN | MSCALE)),
    "stablelm": (
        "StableLmForCausalLM",
        GROUPED | IDS | dict(partial_rotary_factor=0.5, use_qkv_bias=True),
    ),
    "bloom": ("BloomForCausalLM", BLOOM),
    "bert": ("BertForMaskedLM", SMALL),
    "roberta": ("RobertaForMaskedLM", SMALL),
    "modernbert": ("ModernBertForMaskedLM", SMALL | ENDS | dict(local_attention=6)),
    "modernbert-bias": (
        "ModernBertForMaskedLM",
        SMALL | ENDS | dict(local_attention=6, norm_bias=True, tie_word_embeddings=False),
    ),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5-1.1": (
        "T5ForConditionalGeneration",
        T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
}


def make(transformers, name, ending=None, **change):
    """A random model whose every tensor counts."""
    class_name, keys = MODELS[name]
    base, _, _ = class_name.partition("For")
    config = getattr(transformers, f"{base}Config")(**keys | change)
    torch.manual_seed(0)
    net = getattr(transformers, f"{base}For{ending}" if ending else class_name)(config).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0 if p.ndim > 1 else 0.5, 0.3)
    net.tie_weights()
    return net


def write(folder, theirs):
    """A folder of theirs with our tokenizer."""
    theirs.save_pretrained(folder)
    write_json(folder / "tokenizer.json", TOK.spec)
    write_json(folder / "tokenizer_config.json", TOK.config)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def is_seq2seq(theirs):
    return getattr(theirs.config, "is_encoder_decoder", False)


def pairs(theirs, net):
    """Ids of two rows of other lengths, and (their logits, ours) where there is a token."""
    ids = torch.randint(3, 30, (2, 24))
    lengths = torch.tensor([24, 15])
    real = torch.arange(24) < lengths[:, None]  # (2, 24)
    if is_seq2seq(theirs):
        source = ids.where(real, theirs.config.pad_token_id)
        target = torch.randint(3, 30, (2, 12))
        given = theirs(source, attention_mask=real, decoder_input_ids=target).logits
        return given, net(target, encoder_ids=source, encoder_lengths=lengths)
    if net.config.causal:
        return theirs(ids).logits, net(ids)
    ids = ids.where(real, theirs.config.pad_token_id)
    return theirs(ids, attention_mask=real).logits[real], net(ids, lengths=lengths)[real]


def tensors(folder):
    return read_safetensors(folder / "model.safetensors")[0]


def close(a, b):
    torch.testing.assert_close(a, b, atol=3e-5, rtol=1e-4)


@pytest.fixture
def transformers():
    library = pytest.importorskip("transformers")
    library.utils.logging.disable_progress_bar()
    return library


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_a_model_opens_here_and_ours_there(name, transformers, tmp_path):
    theirs = make(transformers, name)
    folder = write(tmp_path / "theirs", theirs)
    net, tok = load(folder)
    close(*pairs(theirs, net)[::-1])
    save(tmp_path / "ours", net, tok)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["architectures"] == [type(theirs).__name__]
    back, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    close(*pairs(back.eval(), net)[::-1])
    ours = tensors(tmp_path / "ours")
    for key, t in tensors(folder).items():
        assert torch.equal(ours.pop(key), t), key
    assert not ours
    assert load(tmp_path / "ours")[0].config == net.config


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_greedy_ids_are_theirs(name, transformers, tmp_path):
    theirs = make(transformers, name)
    net, tok = load(write(tmp_path, theirs))
    if not net.config.causal:
        return
    tok.eos_ids = []
    ids = torch.randint(3, 30, (1, 18))  # beyond the windows
    how = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    given = theirs.generate(ids, use_cache=not is_seq2seq(theirs), **how)
    if is_seq2seq(theirs):
        made = [net.start_id]
        for _ in range(12):
            logits = net(torch.tensor([made]), encoder_ids=ids)
            made.append(logits[0, -1].argmax().item())
        assert made == given[0].tolist()
        return
    [answer] = generate(net, tok, ids.tolist(), max_new_tokens=12, temperature=0)
    assert answer.ids == given[0, 18:].tolist()


# Heads

HEADS = {"mistral": "STQ", "qwen3": "STQ", "stablelm": "ST", "bloom": "STQ", "bert": "STQ"}
HEADS |= {"roberta": "STQ", "modernbert": "STQ", "modernbert-mean": "S"}
ENDINGS = {"S": "SequenceClassification", "T": "TokenClassification", "Q": "QuestionAnswering"}
CASES = [(name, letter) for name, letters in HEADS.items() for letter in letters]


@torch.no_grad()
@pytest.mark.parametrize("name, letter", CASES)
def test_heads_open_here_and_ours_there(name, letter, transformers, tmp_path):
    change = {"id2label": {0: "a", 1: "b", 2: "c"}} if letter != "Q" else {}
    if name == "modernbert-mean":
        name, change["classifier_pooling"] = "modernbert", "mean"
    change |= {} if name in ("roberta", "modernbert") else {"pad_token_id": 0}
    theirs = make(transformers, name, ENDINGS[letter], **change)
    ids = torch.randint(3, 30, (2, 20))
    lengths = torch.tensor([20, 13])
    real = torch.arange(20) < lengths[:, None]  # (2, 20)
    ids = ids.where(real, theirs.config.pad_token_id)

    def scores_there(model):
        out = model(ids, attention_mask=real.long())
        if letter == "S":
            return out.logits
        if letter == "T":
            return out.logits[real]
        return torch.stack((out.start_logits, out.end_logits), -1)[real]

    def scores_here(net):
        if letter == "S":
            return net.scores_of(ids, lengths)
        return net.score_states(net.states(ids, lengths))[real]

    folder = write(tmp_path / "theirs", theirs)
    net, tok = load(folder)
    close(scores_here(net), scores_there(theirs))
    assert net.labels == (["start", "end"] if letter == "Q" else ["a", "b", "c"])
    save(tmp_path / "ours", net, tok)
    back, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    close(scores_here(net), scores_there(back.eval()))
    assert [*back.config.id2label.values()] == net.labels
    ours = tensors(tmp_path / "ours")
    assert ours.keys() == tensors(folder).keys()
    again, _ = load(tmp_path / "ours")
    assert (again.task, again.pooling, again.pooler) == (net.task, net.pooling, net.pooler)
    assert scores_here(again).equal(scores_here(net))


# Forms that files have


def rewrite(folder, change):
    """Write a folder's safetensors anew, {name: tensor} as `change` makes it."""
    with_changes = change(tensors(folder))
    with open(folder / "model.safetensors", "wb") as file:
        write_safetensors(file, with_changes, {"format": "pt"})


@torch.no_grad()
def test_old_files_of_bert_and_t5(transformers, tmp_path):
    theirs = make(transformers, "bert")
    folder = write(tmp_path / "bert", theirs)
    state = theirs.state_dict()

    def old(given):
        """As bert-base-uncased: names of TensorFlow's day, copies, the other task's head."""
        given |= {"cls.predictions.decoder.bias": given["cls.predictions.bias"].clone()}
        given |= {"cls.predictions.decoder.weight": state["cls.predictions.decoder.weight"]}
        given |= {"bert.pooler.dense.weight": torch.zeros(16, 16)}
        given |= {"cls.seq_relationship.bias": torch.zeros(2)}
        given |= {"bert.embeddings.position_ids": torch.arange(60)[None]}
        names = {name: name.replace("Norm.weight", "Norm.gamma") for name in given}
        return {name.replace("Norm.bias", "Norm.beta"): given[n] for n, name in names.items()}

    rewrite(folder, old)
    net, _ = load(folder)
    close(*pairs(theirs, net)[::-1])
    rewrite(folder, lambda given: given | {"cls.predictions.decoder.bias": torch.ones(TOK.n_vocab)})
    with pytest.raises(UserError, match="decoder.bias is not the cls.predictions.bias"):
        load(folder)

    theirs = make(transformers, "t5")
    folder = write(tmp_path / "t5", theirs)
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    rewrite(folder, lambda given: given | {n: given["shared.weight"].clone() for n in copies})
    net, _ = load(folder)
    assert net.config.tie
    close(*pairs(theirs, net)[::-1])
    # T5 1.1 has a head of its own, whatever transformers 5 writes of it.
    head = torch.randn(TOK.n_vocab, 16)
    rewrite(folder, lambda given: given | {"lm_head.weight": head})
    net, tok = load(folder)
    assert not net.config.tie
    save(tmp_path / "ours", net, tok)
    for place in (folder, tmp_path / "ours"):
        back = type(theirs).from_pretrained(place).eval()
        assert back.lm_head.weight.equal(head)
        close(*pairs(back, net)[::-1])


@torch.no_grad()
def test_ntk_scaling_is_another_base_there(transformers, tmp_path):
    scaling = {"rope_type": "ntk", "factor": 4.0}
    net = GPT(GPTConfig(TOK.n_vocab, 64, 2, 4, 32, rope_scaling=scaling, qk_norm=False)).eval()
    save(tmp_path, net, TOK)
    ids = torch.randint(3, 30, (1, 40))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == "LlamaForCausalLM"
    close(net(ids), theirs(ids).logits)
    back, _ = load(tmp_path)
    assert back.config == net.config and back(ids).equal(net(ids))


@torch.no_grad()
@pytest.mark.parametrize("name", ["Bert", "ModernBert"])
def test_an_encoder_without_a_head_embeds_texts(name, transformers, tmp_path):
    """As models for embeddings are published: BertModel, whose pooler nothing reads."""
    _, keys = MODELS[name.lower()]
    base = getattr(transformers, f"{name}Model")
    theirs = base(getattr(transformers, f"{name}Config")(**keys)).eval()
    net, tok = load(write(tmp_path / "theirs", theirs))
    ids = torch.randint(3, 30, (2, 9))
    close(net.hidden(ids), theirs(ids).last_hidden_state)
    save(tmp_path / "ours", net, tok)
    back = base.from_pretrained(tmp_path / "ours").eval()
    close(back(ids).last_hidden_state, net.hidden(ids))
    assert load(tmp_path / "ours")[0].config == net.config


@torch.no_grad()
def test_roberta_is_written_where_its_padding_fits_alone(transformers, tmp_path):
    net, tok = load(write(tmp_path / "theirs", make(transformers, "roberta")))
    net.pad_id = 0
    save(tmp_path / "ours", net, tok)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["model_type"] == "barelm"
    ids = torch.randint(3, 30, (1, 9))
    assert load(tmp_path / "ours")[0](ids).equal(net(ids))


# Every key

LISTS = [["full_attention"] * 3, ["sliding_attention"] * 3, MIXED[1:] + MIXED[:1], ["chunked"] * 3]
FLIPS = {
    "hidden_act": ["gelu", "gelu_new", "relu", "silu", None],
    "hidden_activation": ["gelu_new", "silu", "relu"],
    "feed_forward_proj": ["gelu", "gated-silu", "gated-relu", "silu", "relu"],
    "position_embedding_type": ["relative_key", "absolute"],
    "layer_types": LISTS,
    "sliding_window": [3, None, 0],
    "use_sliding_window": [True, False],
    "max_window_layers": [0, 2, 9],
    "local_attention": [2, 5],
    "global_attn_every_n_layers": [1, 2],
    "rope_scaling": [
        {"type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "longrope", "factor": 2.0},
    ],
    "rope_parameters": [
        {"rope_type": "default", "rope_theta": 77.0, "partial_rotary_factor": 0.5},
        {k: {"rope_type": "default", "rope_theta": 77.0} for k in LISTS[0][:1] + LISTS[1][:1]},
        {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 9.0}},
    ],
    "rope_theta": [500.0],
    "partial_rotary_factor": [0.5, 1.0],
    "type_vocab_size": [1],
    "pad_token_id": [2],
    "attention_bias": [True],
    "mlp_bias": [True],
    "norm_bias": [True],
    "decoder_bias": [False],
    "classifier_bias": [True],
    "is_decoder": [True],
    "add_cross_attention": [True],
    "tie_word_embeddings": [False, True],
    "scale_decoder_outputs": [False, True, None],
    "num_decoder_layers": [2],
    "relative_attention_num_buckets": [16],
    "relative_attention_max_distance": [20],
    "use_qkv_bias": [False],
    "qk_layernorm": [True],
    "use_parallel_residual": [True],
    "apply_residual_connection_post_layernorm": [True],
    "norm_eps": [0.5],
    "layer_norm_eps": [0.5],
    "rms_norm_eps": [0.5],
    "layer_norm_epsilon": [0.5],
    "is_encoder_decoder": [False],
    "hidden_size": [16, 32],
    "num_hidden_layers": [2, 3],
    "num_attention_heads": [2, 6],
    "n_embed": [12, 24],
}


# Keys that a family's config.json may have though transformers writes others, or none, today.
BESIDE = "position_embedding_type layer_types sliding_window use_sliding_window is_decoder"
BESIDE += " max_window_layers global_attn_every_n_layers rope_scaling partial_rotary_factor"
BESIDE += " hidden_size num_hidden_layers num_attention_heads"


@torch.no_grad()
@pytest.mark.parametrize("name", ["mistral", "qwen2", "stablelm", "roberta", "modernbert", "t5"])
def test_each_key_is_refused_by_name_or_gives_their_logits(name, transformers, tmp_path):
    theirs = make(transformers, name)
    write(tmp_path, theirs)
    config = json.loads((tmp_path / "config.json").read_text())
    counts = [0, 0]
    for key, values in FLIPS.items():
        if key not in config and key not in BESIDE.split():
            continue
        for value in values:
            changed = {key: value}
            if key == "feed_forward_proj":  # else two keys that follow from it count there
                changed |= {"dense_act_fn": value.split("-")[-1], "is_gated_act": "-" in value}
            write_json(tmp_path / "config.json", config | changed)
            try:
                net, _ = load(tmp_path)
            except UserError as error:
                assert "\n" not in str(error)
                counts[0] += 1
                continue
            try:
                transformers.AutoConfig.from_pretrained(tmp_path)
            except Exception:  # malformed to transformers, and not to us
                continue
            back, report = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
            assert not any(report.values()), (key, value)
            given, made = pairs(back.eval(), net)
            torch.testing.assert_close(made, given, atol=1e-4, rtol=1e-4, msg=f"{key}={value}")
            counts[1] += 1
    assert min(counts) > 4


PUBLISHED = json.loads((FIXTURES.parent / "published.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_have_their_number_of_parameters(name):
    """The config.json of models on the Hub, with the keys of their days."""
    config = from_hf_config(PUBLISHED[name]["config"])
    with torch.device("meta"):
        assert n_params(GPT(config)) == PUBLISHED[name]["parameters"]


def test_known_families_that_are_not_exact_are_refused_with_the_key():
    for kind, why in REFUSED.items():
        assert kind not in FAMILIES
        with pytest.raises(UserError) as error:
            from_hf_config({"model_type": kind})
        assert why in str(error.value) and "\n" not in str(error.value)


# Without transformers: what fixtures/make_families.py wrote


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(path.name for path in FIXTURES.glob("*")))
def test_fixtures_of_other_families(name, tmp_path):
    folder = shutil.copytree(FIXTURES / name, tmp_path / name)
    write_json(folder / "tokenizer.json", TOK.spec)
    write_json(folder / "tokenizer_config.json", TOK.config)
    facts = json.loads((folder / "expected.json").read_text())
    net, tok = load(folder)
    ids = torch.tensor([facts["ids"]])
    options = {}
    if net.config.is_seq2seq:
        options["encoder_ids"] = torch.tensor([facts["source"]])
    if net.score is None:
        made = net(ids, **options)
    elif net.task == "classify":
        made = net.scores_of(ids, torch.tensor([ids.shape[1]]))
    else:
        made = net.score_states(net.hidden(ids))
    torch.testing.assert_close(made.flatten(), torch.tensor(facts["logits"]), atol=3e-5, rtol=1e-4)
    save(tmp_path / "ours", net, tok)
    ours = tensors(tmp_path / "ours")
    theirs = tensors(folder)
    assert ours.keys() == theirs.keys()
    assert all(ours[key].equal(theirs[key]) for key in ours)
    if "greedy" not in facts or net.config.is_seq2seq:
        return
    tok.eos_ids = []
    n_new = len(facts["greedy"])
    [answer] = generate(net, tok, [facts["ids"]], max_new_tokens=n_new, temperature=0)
    assert answer.ids == facts["greedy"]


# Folders that are not what they say

VALUES = [None, -1, 0, 1.5, [], {}, "x", True, 2**70, float("nan")]


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert-classify", "modernbert", "roberta", "t5", "bloom"])
def test_a_changed_config_is_refused_in_a_line_or_computes(name, tmp_path):
    """Each key of a fixture's config.json with a few of VALUES, always the same ones."""
    folder = shutil.copytree(FIXTURES / name, tmp_path / name)
    write_json(folder / "tokenizer.json", TOK.spec)
    write_json(folder / "tokenizer_config.json", TOK.config)
    config = json.loads((folder / "config.json").read_text())
    ids = torch.tensor([[5, 7, 9]])
    counts = [0, 0]
    for key in config:
        for i, value in enumerate(VALUES):
            if zlib.crc32(f"{name} {key} {i}".encode()) % 8:
                continue
            (folder / "config.json").write_text(json.dumps(config | {key: value}))
            try:
                net, _ = load(folder)
            except UserError as error:
                assert "\n" not in str(error)
                counts[0] += 1
                continue
            options = {"encoder_ids": ids} if net.config.is_seq2seq else {}
            assert net(ids, **options).isfinite().all(), (key, value)
            counts[1] += 1
    assert min(counts) > 2
    torn = (folder / "model.safetensors").read_bytes()
    (folder / "config.json").write_text(json.dumps(config))
    for key in [*tensors(folder)][::7]:
        rewrite(folder, lambda given: {k: t for k, t in given.items() if k != key})
        with pytest.raises(UserError) as error:
            load(folder)
        assert "\n" not in str(error.value)
        (folder / "model.safetensors").write_bytes(torn)


# Their tokenizers

WORDS = "the cat sat on a mat, and naïve café owners saw Über-cats: (x + y) = 12.5; don't! " * 9
STRANGE = [
    "",
    " ",
    "The CAT  sat\n\ton",
    "naïve café ﬁ Å ½ é",
    "東京 a<mask>b [MASK] </s>x",
    "don't?!",
]


def word_piece(library):
    tok = library.Tokenizer(library.models.WordPiece(unk_token="[UNK]"))
    tok.normalizer = library.normalizers.BertNormalizer(lowercase=True)
    tok.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    tok.decoder = library.decoders.WordPiece()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = library.trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=names, show_progress=False
    )
    tok.train_from_iterator([WORDS], trainer)
    single = dict(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1")
    places = [("[CLS]", 2), ("[SEP]", 3)]
    tok.post_processor = library.processors.TemplateProcessing(**single, special_tokens=places)
    roles = dict(pad=0, unk=1, cls=2, sep=3, mask=4)
    return tok, {f"{role}_token": names[id] for role, id in roles.items()}, roles, ([2], [3])


def byte_level(library, names, normalizer=None):
    tok = library.Tokenizer(library.models.BPE())
    level = library.pre_tokenizers.ByteLevel
    tok.normalizer = normalizer
    tok.pre_tokenizer = level(add_prefix_space=False)
    tok.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=300, special_tokens=names, show_progress=False, initial_alphabet=level.alphabet()
    )
    tok.train_from_iterator([WORDS], trainer)
    return tok


def roberta(library):
    tok = byte_level(library, ["<s>", "<pad>", "</s>", "<unk>"])
    mask = library.AddedToken("<mask>", lstrip=True, special=True)
    tok.add_special_tokens([mask])
    ends = [("</s>", 2), ("<s>", 0)]
    tok.post_processor = library.processors.RobertaProcessing(*ends, add_prefix_space=False)
    roles = dict(bos=0, eos=2, pad=1, cls=0, sep=2, mask=tok.token_to_id("<mask>"))
    config = {f"{role}_token": tok.id_to_token(id) for role, id in roles.items()}
    config["mask_token"] = {"content": "<mask>", "lstrip": True, "__type": "AddedToken"}
    return tok, config, roles, ([0], [2])


def modernbert(library):
    tok = byte_level(library, ["<|endoftext|>"], library.normalizers.NFC())
    spaces = [library.AddedToken(" " * n, normalized=True, special=False) for n in (4, 2)]
    tok.add_tokens(spaces)
    mask = library.AddedToken("[MASK]", lstrip=True, special=True)
    tok.add_special_tokens(["[CLS]", "[SEP]", "[PAD]", mask])
    names = {role: f"[{role.upper()}]" for role in ("cls", "sep", "pad", "mask")}
    roles = {role: tok.token_to_id(name) for role, name in names.items()}
    single = dict(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]")
    places = [("[CLS]", roles["cls"]), ("[SEP]", roles["sep"])]
    tok.post_processor = library.processors.TemplateProcessing(**single, special_tokens=places)
    config = {f"{role}_token": name for role, name in names.items()}
    return tok, config, roles, ([roles["cls"]], [roles["sep"]])


def t5(library):
    """A Unigram with SentencePiece's own table of normal forms."""
    pieces = pytest.importorskip("sentencepiece")
    model = pytest.importorskip("sentencepiece.sentencepiece_model_pb2").ModelProto()
    file = io.BytesIO()
    how = dict(vocab_size=40, model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    lines = iter(WORDS.split(", "))
    pieces.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=file, minloglevel=2, **how
    )
    model.ParseFromString(file.getvalue())
    vocab = [(piece.piece, piece.score) for piece in model.pieces]
    extra = ["<extra_id_1>", "<extra_id_0>"]
    tok = library.Tokenizer(library.models.Unigram([*vocab, *((x, 0.0) for x in extra)], unk_id=2))
    table = model.normalizer_spec.precompiled_charsmap
    tok.normalizer = library.normalizers.Precompiled(table)
    tok.pre_tokenizer = library.pre_tokenizers.Metaspace(prepend_scheme="always")
    tok.decoder = library.decoders.Metaspace(prepend_scheme="always")
    tok.add_special_tokens(["<pad>", "</s>", "<unk>", *extra])
    single = dict(single="$A </s>", pair="$A </s> $B </s>")
    tok.post_processor = library.processors.TemplateProcessing(
        **single, special_tokens=[("</s>", 1)]
    )
    config = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return tok, config, dict(pad=0, eos=1, unk=2), ([], [1])


@pytest.mark.parametrize("make_one", [word_piece, roberta, modernbert, t5])
def test_tokenizers_of_encoders_give_the_librarys_ids(make_one):
    library = pytest.importorskip("tokenizers")
    theirs, config, roles, (start, end) = make_one(library)
    tok = Tokenizer(json.loads(theirs.to_str()), config)
    assert tok.roles == roles
    assert (tok.start, tok.end) == (start, end) == tok.document_layout
    assert tok.prompt("cat")[: len(start)] == start
    for text in [*STRANGE, WORDS[:60]]:
        theirs.encode_special_tokens = True
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert tok.encode(text) == expected, text
        assert tok.decode(expected) == theirs.decode(expected, skip_special_tokens=False)
    theirs.encode_special_tokens = False
    assert tok.start + tok.encode("the cat") + tok.end == theirs.encode("the cat").ids


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "modernbert", "bloom", "t5"])
def test_adapters_have_the_names_of_their_base(name, transformers, tmp_path):
    """Joined layers too, whose parts' products stand as the file's rows do."""
    peft = pytest.importorskip("peft")
    theirs = make(transformers, name)
    net, tok = load(write(tmp_path / "base", theirs))
    config = AdaptConfig("lora", lora_rank=2)
    add_lora(net, config)
    for layer in net.modules():
        if isinstance(layer, LoRA):
            torch.nn.init.normal_(layer.lora_B.weight, std=0.3)
    save_adapter(tmp_path / "ours", net.eval(), tok, str(tmp_path / "base"), config)
    reopened, _ = load(tmp_path / "ours")
    with_adapter = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    ids = torch.randint(3, 30, (2, 9))
    options = {"encoder_ids": ids} if is_seq2seq(theirs) else {}
    there = {"decoder_input_ids": ids} if is_seq2seq(theirs) else {}
    close(net(ids, **options), with_adapter(input_ids=ids, **there).logits)
    close(net(ids, **options), reopened(ids, **options))
