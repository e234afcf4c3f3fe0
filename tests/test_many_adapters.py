"""barelm/many_adapters.py: several LoRA adapters of one base in one batch, and as the server's
models."""

import contextlib
import json
import shutil

import pytest
import requests
import torch
from test_serve import served

from barelm.adapters import AdaptConfig, LoRA, choose_weights, save_adapter
from barelm.checkpoint import load, save
from barelm.embeddings import vectors_of
from barelm.engine import Engine
from barelm.errors import UserError
from barelm.fast import generating
from barelm.jobs import Job, Sampling
from barelm.many_adapters import Adapters
from barelm.quantized import quantize_weights
from model import GPT, GPTConfig

KINDS = {  # of different ranks, alphas and layers
    "a": dict(lora_rank=4, lora_alpha=60.0, lora_targets="q_proj,k_proj,v_proj,o_proj"),
    "b": dict(lora_rank=9, lora_alpha=90.0, lora_targets="v_proj,down_proj,up_proj"),
    "c": dict(lora_rank=1, lora_alpha=20.0, lora_targets="gate_proj"),
}


def make_adapter(base, folder, seed, **config):
    """A folder of an adapter whose matrices are loud enough to change what is said."""
    net, tok = load(base)
    config = AdaptConfig(adapt="lora", **config)
    choose_weights(net, config)
    torch.manual_seed(seed)
    for layer in net.modules():
        if isinstance(layer, LoRA):
            torch.nn.init.normal_(layer.lora_B.weight, std=0.3)
    save_adapter(folder, net, tok, str(base), config)


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """{name: folder} of three adapters of out/tiny."""
    place = tmp_path_factory.mktemp("many_adapters")
    for seed, (name, config) in enumerate(KINDS.items()):
        make_adapter(tiny / "out/tiny", place / name, seed, **config)
    return {name: str(place / name) for name in KINDS}


@pytest.fixture(scope="module")
def base(tiny):
    return tiny / "out/tiny"


def ignore(update):
    pass


def answered(engine, jobs):
    engine.submit(jobs)
    with generating(engine.net), torch.inference_mode():
        for _ in range(500):
            engine.step()
            if all(job.row.done for job in jobs):
                return [job.row.out.ids for job in jobs]
    raise AssertionError("the jobs are not done")


def make_jobs(tok, numbers, limit=12, prompts=("import os", "def f(x):\n")):
    jobs = []
    for i, number in enumerate(numbers):
        sampling = Sampling(temperature=[0.0, 0.8][i % 2], seed=i)
        ids = tok.encode(prompts[i % len(prompts)])
        jobs.append(Job(tok, ids, limit, sampling, ignore, adapter=number))
    return jobs


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("one_behind", [False, True])
def test_a_batch_of_many_answers_as_each_adapter_alone(base, folders, quantize, one_behind):
    # Of quantized weights the fast products round by what else is in the batch: the plain ones.
    net, tok = load(base, quantize=quantize, fast=quantize is None)
    adapters = Adapters(net, tok, folders, base)
    engine = Engine(net, tok, max_batch=5, max_len=64, adapters=adapters)
    engine.on_gpu = one_behind
    numbers = [0, 1, 2, 3, 1, 0, 3, 2, 1, 0]
    together = answered(engine, make_jobs(tok, numbers))
    for i, number in enumerate(numbers):
        one = {name: folders[name] for name in list(folders)[number - 1 : number]}
        alone = Adapters(net, tok, one, base) if number else None
        engine = Engine(net, tok, max_batch=1, max_len=64, adapters=alone)
        job = make_jobs(tok, numbers)[i]
        job.adapter = int(number > 0)
        assert answered(engine, [job]) == [together[i]], (number, i)
    assert len({tuple(ids) for ids in together[:4:2]}) == 2  # they do say something else


def test_it_computes_what_the_merged_weights_do(base, folders):
    net, tok = load(base)
    adapters = Adapters(net, tok, folders, base)
    rows = [tok.encode("import os, sys\n"), tok.encode("class A:")]
    with torch.no_grad():
        plain = vectors_of(net, rows, "mean")
        for number, folder in enumerate(folders.values(), 1):
            merged = vectors_of(load(folder)[0], rows, "mean")
            with adapters.used(net, number, (number,)):
                ours = vectors_of(net, rows, "mean")
            assert (ours - merged).abs().max() < 1e-5 < (ours - plain).abs().max()
        each = torch.tensor([[2], [0]])
        with adapters.used(net, each):
            mixed = net.states(torch.tensor([rows[1], rows[1]]), None)
        second = load(folders["b"])[0].states(torch.tensor([rows[1]]), None)
        assert torch.allclose(mixed[0], second[0], atol=1e-4)
        base_state = net.states(torch.tensor([rows[1], rows[1]]), None)[1]
        assert torch.equal(mixed[1], base_state)  # a row without an adapter has the base's bits
    assert net.ops.adapted is None


def test_a_prompt_that_one_adapter_read_is_no_beginning_for_another(base, folders):
    net, tok = load(base)
    adapters = Adapters(net, tok, folders, base)
    engine = Engine(net, tok, max_batch=6, max_len=64, adapters=adapters)
    engine.pass_cost = 1
    ids = tok.encode("import os, sys, json\n" * 2)[:40]
    reused = []
    for number in (1, 2, 0, 1, 2, 0, 3):
        job = Job(tok, ids, 3, Sampling(), ignore, adapter=number)
        answered(engine, [job])
        reused.append(job.n_reused)
    n = len(ids) - 1
    assert reused == [0, 0, 0, n, n, n, 0]
    jobs = [Job(tok, ids, 3, Sampling(), ignore, adapter=number) for number in (1, 2, 2, 0)]
    together = answered(Engine(net, tok, max_batch=6, max_len=64, adapters=adapters), jobs)
    for job, ids_of in zip(jobs, together):
        again = Job(tok, job.ids, 3, Sampling(), ignore, adapter=job.adapter)
        assert answered(engine, [again]) == [ids_of]


def test_an_adapter_of_gpt2_whose_file_has_q_k_and_v_as_one(base, tmp_path):
    _, tok = load(base)
    torch.manual_seed(0)
    shape = dict(norm="layer", pos="learned", mlp="gelu", bias=True, qk_norm=False)
    shape |= dict(n_layer=2, n_head=2, n_embd=32, n_ctx=64, vocab_size=tok.n_vocab)
    save(tmp_path / "gpt2", GPT(GPTConfig(**shape)), tok)
    targets = "q_proj,k_proj,v_proj,up_proj"
    options = dict(lora_rank=3, lora_alpha=30.0, lora_targets=targets)
    make_adapter(tmp_path / "gpt2", tmp_path / "one", 0, **options)
    net, tok = load(tmp_path / "gpt2")
    adapters = Adapters(net, tok, {"one": str(tmp_path / "one")}, tmp_path / "gpt2")
    assert adapters.ranks == [9]  # three products of rank 3 are one of 9
    ids = torch.tensor([tok.encode("import os\n")])
    with torch.no_grad(), adapters.used(net, 1):
        ours = net(ids)
    with torch.no_grad():
        right = load(tmp_path / "one")[0](ids)
        plain = net(ids)
    assert (ours - right).abs().max() < 1e-4 < (ours - plain).abs().max()


def test_an_adapter_that_peft_wrote(base, folders, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=32,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 6},
        alpha_pattern={"layers.0.self_attn.q_proj": 3},
        init_lora_weights="gaussian",
    )
    model = peft.get_peft_model(theirs, config)
    torch.manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    model.save_pretrained(tmp_path / "theirs")
    net, tok = load(base)
    adapters = Adapters(net, tok, {"x": str(tmp_path / "theirs")}, base)
    assert adapters.ranks == [6]
    ids = torch.tensor([tok.encode("import os\n")])
    with torch.no_grad(), adapters.used(net, 1):
        ours = net(ids)[0, :, : tok.n_vocab]
    with torch.no_grad():
        right = model.eval()(ids).logits[0, :, : tok.n_vocab]
    assert torch.allclose(ours, right, atol=1e-3)


def test_what_is_no_adapter_of_the_base_is_refused_by_name(base, folders, tmp_path):
    net, tok = load(base)
    odd = {"use_rslora": True, "use_dora": True, "modules_to_save": ["lm_head"], "bias": "all"}
    for key, value in odd.items():
        shutil.copytree(folders["a"], tmp_path / key)
        path = tmp_path / key / "adapter_config.json"
        config = json.loads(path.read_text()) | {"base_model_name_or_path": str(base), key: value}
        path.write_text(json.dumps(config))
        with pytest.raises(UserError, match=key):
            Adapters(net, tok, {"x": str(tmp_path / key)}, base)
    shutil.copytree(base, tmp_path / "other")
    with pytest.raises(UserError, match="base"):
        Adapters(net, tok, folders, tmp_path / "other")
    with pytest.raises(UserError, match="no folder of a LoRA"):
        Adapters(net, tok, {"x": str(base)}, base)
    shutil.copytree(folders["a"], tmp_path / "vocabulary")
    path = tmp_path / "vocabulary/tokenizer.json"
    spec = json.loads(path.read_text())
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    spec["added_tokens"].append({"id": tok.n_vocab, "content": "<new>"} | flags)
    path.write_text(json.dumps(spec))
    path = tmp_path / "vocabulary/adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="tokens"):
        Adapters(net, tok, {"x": str(tmp_path / "vocabulary")}, base)


def test_quantized_weights_take_part_too(base, folders):
    net, tok = load(base)
    quantize_weights(net, "int8")
    assert Adapters(net, tok, folders, base).ranks == [4, 9, 1]


@pytest.fixture(scope="module")
def site(tiny, folders):
    words = ",".join(f"{name}={folder}" for name, folder in folders.items())
    with served(tiny, f"--adapters={words}", "--max_batch=4") as site:
        yield site


def test_each_request_names_its_adapter(site, base, folders):
    models = requests.get(f"{site.url}/v1/models").json()["data"]
    assert [(card["id"], card.get("parent")) for card in models] == [
        ("tiny", None),
        ("a", "tiny"),
        ("b", "tiny"),
        ("c", "tiny"),
    ]
    assert requests.get(f"{site.url}/v1/models/b").json()["parent"] == "tiny"

    def ask(path="completions", **body):
        body = {"prompt": "import os", "max_tokens": 9, "temperature": 0} | body
        answer = requests.post(f"{site.url}/v1/{path}", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    said = {}
    for name in ("tiny", *folders):
        answer = ask(model=name)
        assert answer["model"] == name
        said[name] = answer["choices"][0]["text"]
        net, tok = load(folders.get(name, base))
        job = Job(tok, tok.encode("import os"), 9, Sampling(temperature=0.0), ignore)
        answered(Engine(net, tok, max_batch=1, max_len=64), [job])
        assert said[name] == job.row.out.text  # as merged
    assert len(set(said.values())) > 1 and ask()["choices"][0]["text"] == said["tiny"]
    talk = {"messages": [{"role": "user", "content": "hi"}], "model": "b", "max_tokens": 4}
    assert requests.post(f"{site.url}/v1/chat/completions", json=talk).json()["model"] == "b"
    vectors = {}
    for name in ("tiny", "a"):
        body = {"input": "import os", "model": name}
        answer = requests.post(f"{site.url}/v1/embeddings", json=body).json()
        vectors[name] = answer["data"][0]["embedding"]
        assert answer["model"] == name
    assert vectors["tiny"] != vectors["a"]
    for path in ("/tokenize", "/detokenize"):
        body = {"prompt": "import"} if path == "/tokenize" else {"tokens": [5]}
        assert requests.post(site.url + path, json=body | {"model": "a"}).status_code == 200
    answer = requests.post(f"{site.url}/v1/completions", json={"prompt": "x", "model": "d"})
    assert answer.status_code == 404 and "'c'" in answer.json()["error"]["message"]


def test_what_the_flag_may_not_say_is_refused(tiny, folders):
    a = folders["a"]
    for words in ("a", "a=", f"a={a},a={a}", f"tiny={a}", "x=out/tiny"):
        with contextlib.suppress(RuntimeError), served(tiny, f"--adapters={words}"):
            raise AssertionError(words)
