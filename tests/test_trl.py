"""KTO, ORPO, SimPO, distillation and RLOO beside TRL: the numbers of its trainers for batches that
they make, and ours for the same tokens and weights. `pytest -s` prints both."""

import contextlib
import copy

import pytest
import torch
from conftest import alone

pytest.importorskip("trl")
pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

import finetune
import rl
from barelm.adapters import AdaptConfig
from barelm.checkpoint import load, save
from barelm.examples import IGNORED, pack_rows
from barelm.tuning import Learner

CAST = contextlib.nullcontext()
WORDS = ["def add one", "return the sum of both", "import os", "no", "a b c d e", "x", "it is what"]


@pytest.fixture(scope="module")
def both(tiny, tmp_path_factory):
    """The tiny model and the same a little moved, each as our network and transformers': (net,
    reference, TRL's model, TRL's reference, transformers' tokenizer)."""
    folder = tmp_path_factory.mktemp("trl")
    reference, tok = load(tiny / "out/tiny")
    torch.manual_seed(0)
    net, _ = load(tiny / "out/tiny")
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.03 * torch.randn_like(p))
    save(folder / "moved", net, tok)
    opened = []
    for path in (folder / "moved", tiny / "out/tiny"):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        opened.append(model.eval())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny / "out/tiny")
    tokenizer.pad_token = "<|pad|>"
    return net, reference, *opened, tokenizer


def options(config, folder, **more):
    """A trainer's configuration for the CPU, in float32, with all of a data set in a batch."""
    quiet = dict(report_to="none", use_cpu=True, bf16=False, per_device_train_batch_size=4)
    quiet |= dict(gradient_checkpointing=False, logging_steps=1, disable_tqdm=True)
    return config(output_dir=str(folder), **(quiet | more))


def says(name, theirs, ours):
    theirs, ours = (float(torch.as_tensor(x).detach()) for x in (theirs, ours))
    print(f"{name:34} TRL {theirs:.6f}  ours {ours:.6f}")
    assert ours == pytest.approx(theirs, rel=5e-5, abs=5e-6)


def example_of(ids, mask, attention):
    """An example of a row of TRL's: its tokens, which of them are the answer's."""
    ids = ids[attention.bool()].tolist()
    mask = mask[attention.bool()].tolist()
    targets = [token if learned else IGNORED for token, learned in zip(ids, mask)]
    return {"ids": ids[:-1], "targets": targets[1:]}


def test_kto(both, tmp_path, monkeypatch):
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    # The other way round: the trained one is the likelier by its own, so that its KL is above 0.
    reference, net, ref_model, model, tokenizer = both
    rows = [
        {"prompt": WORDS[i], "completion": " " + WORDS[-i - 1], "label": i % 3 > 0}
        for i in range(4)
    ]
    args = options(
        KTOConfig, tmp_path, beta=0.3, desirable_weight=1.2, undesirable_weight=0.7, max_length=64
    )
    trainer = KTOTrainer(
        model=model, ref_model=ref_model, args=args, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer._compute_loss(model.eval(), batch, False)
    kl = trainer._metrics["eval"]["kl"][-1]
    margin = trainer._metrics["eval"]["rewards/margins"][-1]

    examples = []
    for i, label in enumerate(batch["label"].tolist()):
        columns = ("input_ids", "completion_mask", "attention_mask")
        example = example_of(*(batch[name][i] for name in columns)) | {"desirable": bool(label)}
        example["mismatched"] = example_of(*(batch[f"KL_{name}"][i] for name in columns))
        examples.append(example)
    names = dict(beta=0.3, desirable_weight=1.2, undesirable_weight=0.7)
    for name, value in names.items():
        monkeypatch.setattr(finetune, name, value)
    # The mismatched pairs are TRL's; the reference's log-probabilities are ours.
    monkeypatch.setattr(finetune, "add_mismatched", lambda examples, limit: None)
    learner = Learner(alone(), reference, None, "", AdaptConfig())
    finetune.add_rated_reference(learner, examples, CAST)
    learner.net = net
    task = finetune.METHODS["kto"]
    [group] = finetune.groups_of_step(learner, task, examples, 64, CAST, 0)
    loss, figures = finetune.kto(net, group)
    says("KTO: loss", theirs, loss / 4)
    assert kl > 0
    says("KTO: KL", kl, figures["kl"] / 4)
    says("KTO: rewards' margin", margin, figures["margin"] / 4)


def pairs_of_batch(batch):
    """Our pairs of a batch of ORPO's or CPO's trainer, whose labels are -100 on the prompt."""
    pairs = []
    for i in range(len(batch["chosen_input_ids"])):
        pair = {}
        for which in ("chosen", "rejected"):
            mask = batch[f"{which}_labels"][i] != IGNORED
            attention = batch[f"{which}_attention_mask"][i]
            pair[which] = example_of(batch[f"{which}_input_ids"][i], mask, attention)
        pairs.append(pair)
    return pairs


PAIRS = [
    {"prompt": WORDS[i], "chosen": " " + WORDS[i + 1], "rejected": " " + WORDS[-i - 1]}
    for i in range(4)
]


def test_simpo(both, tmp_path, monkeypatch):
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    net, _, model, _, tokenizer = both
    args = options(
        CPOConfig, tmp_path, loss_type="simpo", cpo_alpha=0.0, beta=2.5, simpo_gamma=0.8,
        max_length=64,
    )  # fmt: skip
    data = Dataset.from_list(PAIRS)
    trainer = CPOTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        theirs, metrics = trainer.get_batch_loss_metrics(model.eval(), batch)
    monkeypatch.setattr(finetune, "simpo_beta", 2.5)
    monkeypatch.setattr(finetune, "simpo_gamma", 0.8)
    loss, figures = finetune.simpo(net.eval(), pairs_of_batch(batch))
    says("SimPO: loss", theirs, loss / 4)
    says("SimPO: rewards' margin", metrics["rewards/margins"], figures["margin"] / 4)
    says("SimPO: accuracy", metrics["rewards/accuracies"], figures["accuracy"] / 4)


def test_orpo(both, tmp_path, monkeypatch):
    """The odds ratio, and the loss of pairs whose own losses are alike in both: TRL's L_SFT counts
    the prompt's tokens too, and is a mean over tokens where the paper's is one over answers."""
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    net, _, model, _, tokenizer = both
    args = options(ORPOConfig, tmp_path, beta=0.4, max_length=64)
    data = Dataset.from_list(PAIRS)
    trainer = ORPOTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        _, metrics = trainer.get_batch_loss_metrics(model.eval(), batch)
    monkeypatch.setattr(finetune, "orpo_weight", 0.4)
    pairs = pairs_of_batch(batch)
    with torch.no_grad():
        loss, figures = finetune.orpo(net.eval(), pairs)
    says("ORPO: log odds ratio", metrics["log_odds_chosen"], figures["margin"] / 4)
    says("ORPO: lambda L_OR", -0.4 * metrics["log_odds_ratio"], (loss - figures["nll"]) / 4)
    # One pair, and a prompt of one token, which nothing predicts.
    one = {name: value[:1] for name, value in batch.items() if isinstance(value, torch.Tensor)}
    begin = int((one["chosen_labels"] == IGNORED).sum() - (one["chosen_attention_mask"] == 0).sum())
    for which in ("chosen", "rejected"):
        for name in ("input_ids", "attention_mask", "labels"):
            one[f"{which}_{name}"] = one[f"{which}_{name}"][:, begin - 1 :]
    with torch.no_grad():
        theirs, _ = trainer.get_batch_loss_metrics(model, one)
        ours, _ = finetune.orpo(net, pairs_of_batch(one))
    says("ORPO: loss", theirs, ours)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_distillation(both, monkeypatch, beta):
    from trl.experimental.gkd import GKDTrainer

    net, reference, model, ref_model, tokenizer = both
    rows = []
    for i in range(4):
        ids = tokenizer.encode(WORDS[i] + " " + WORDS[-i - 1])
        rows.append({"ids": ids[:-1], "targets": [IGNORED, *ids[2:]]})
    longest = max(len(row["ids"]) for row in rows)
    fill = lambda values, pad: values + [pad] * (longest - len(values))
    ids = torch.tensor([fill(row["ids"], 0) for row in rows])
    targets = torch.tensor([fill(row["targets"], IGNORED) for row in rows])
    size = int((targets != IGNORED).sum())
    with torch.no_grad():
        logits = (model(ids).logits, ref_model(ids).logits)
        theirs = GKDTrainer.generalized_jsd_loss(
            *logits, labels=targets, beta=beta, temperature=1.7, num_items_in_batch=size
        )
    monkeypatch.setattr(finetune, "distill_beta", beta)
    monkeypatch.setattr(finetune, "distill_temperature", 1.7)
    with torch.no_grad():
        packed = pack_rows(rows, 64)
        loss, figures = finetune.distill_loss(reference, net.config.vocab_size, net.eval(), packed)
    says(f"distillation: JSD({beta:g})", theirs, figures["divergence"] / size)
    assert float(loss) == pytest.approx(1.7**2 * float(figures["divergence"]), rel=1e-5)


def move(net, model, seed):
    """Move the same weights of ours and of transformers' network by the same amounts."""
    torch.manual_seed(seed)
    params = dict(net.named_parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            change = 0.01 * torch.randn_like(p)
            p.add_(change)
            params[name].add_(change)


def test_rloo(both, tmp_path, monkeypatch):
    """TRL samples and asks for rewards: its advantages and loss, and ours of its samples."""
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    reference, _, model, _, tokenizer = both
    net, model = copy.deepcopy((reference, model))
    rewards = []

    def judge(completions, **_):
        rewards[:] = [len(text) % 5 / 2 for text in completions]
        return list(rewards)

    args = options(
        RLOOConfig, tmp_path, beta=0.2, num_generations=4, per_device_train_batch_size=8,
        max_completion_length=6, epsilon=0.2, normalize_advantages=False, num_iterations=2,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": WORDS[i]} for i in range(2)])
    trainer = RLOOTrainer(
        model=model, args=args, train_dataset=data, processing_class=tokenizer, reward_funcs=judge
    )
    move(net, model, 1)  # TRL's reference is the model as it was opened
    trainer.model.train()
    inputs = [{"prompt": WORDS[i // 4]} for i in range(8)]
    batch = trainer._generate_and_score_completions(inputs)
    samples = []
    for i in range(8):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist()
        answer = batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist()
        sample = {"ids": (prompt + answer)[:-1], "reward": rewards[i], "group": i // 4}
        samples.append(sample | {"targets": [IGNORED] * (len(prompt) - 1) + answer})
    monkeypatch.setattr(rl, "kl_weight", 0.2)
    rl.add_log_probs(alone(), net, reference, samples, net.config.vocab_size, CAST)
    rl.add_leave_one_out(alone(), samples)
    for i in (0, 5):
        says(f"RLOO: advantage of answer {i}", batch["advantages"][i], samples[i]["advantage"][0])
    ours = torch.cat([sample["advantage"] for sample in samples])
    torch.testing.assert_close(ours, batch["advantages"], rtol=1e-4, atol=1e-5)
    move(net, model, 2)  # as in a second update on the same answers: some are clipped
    with torch.no_grad():
        theirs = trainer._compute_loss(trainer.model, batch)
        loss, figures = rl.rloo_loss(net.eval(), samples, net.config.vocab_size)
    says("RLOO: loss", theirs, loss / 8)
    assert figures["clipfrac"] > 0
