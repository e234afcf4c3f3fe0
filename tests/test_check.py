"""bench.py --check: each check passes what is right, and fails what is broken, with a figure; none
stops the others."""

import copy
import json
import math
import re
import subprocess
import sys

import pytest
import torch
from conftest import run
from test_bench import TINY

from barelm import check, check_attention, check_network, check_runs, check_tokens, fast
from barelm.check_kinds import check_kinds
from barelm.check_rows import SHAPE, Finding, Place, Skip, Worst, error, small_network
from barelm.fast import QuantizedLinear, cross_entropy_sum
from barelm.operations import Operations
from model import GPT, GPTConfig, KVCache

CPU = Place(torch.device("cpu"), torch.float32)
NARROW = Place(torch.device("cpu"), torch.bfloat16)


def verdicts(findings):
    """{name: verdict}; what fails has a figure."""
    found = {}
    for finding in findings:
        found[finding.name] = finding.verdict
        if finding.verdict == "FAIL":
            assert not finding.figure <= finding.allowed
    return found


def test_errors_are_those_of_the_worst_element():
    truth = torch.ones(3, 4, dtype=torch.float64)
    ours = truth.clone()
    assert error(ours, truth) == 0
    ours[1, 2] += 0.5
    assert error(ours, truth) == pytest.approx(0.25)  # of 1 in its row and 1 everywhere
    assert error(ours.float(), truth) == pytest.approx(0.25)
    assert error(truth[:2], truth) == math.inf
    ours[0, 0] = math.nan
    assert error(ours, truth) == math.inf
    worst = Worst()
    for figure, where in ((1.0, "a"), (math.nan, "b"), (3.0, "c")):
        worst.add(figure, where)
    assert worst.finding("name", 9.0).verdict == "FAIL" and worst.where == "b"
    assert Finding("rate", 0.0).verdict == "FAIL" and Finding("rate", 2.0).verdict == "PASS"


# Attention

EVERY_MASK = {"causal", "a mask of holes", "a sliding window", "packed documents", "biases added"}


def test_a_wrong_scale_of_attention_fails_every_mask():
    attend = Operations(fast=True).attend
    ways = {"fast": lambda q, k, v, mask: attend(1.3 * q, k, v, mask)}
    found = verdicts(check_attention.check_attention(NARROW, ways))
    assert {name for name, verdict in found.items() if verdict == "FAIL"} == EVERY_MASK | {
        "grouped heads",
        "one token over many",
    }
    assert set(found.values()) == {"PASS", "FAIL"}  # whole networks were not broken


def test_a_mask_that_is_not_looked_at_fails():
    attend = Operations(fast=True).attend
    ways = {"fast": lambda q, k, v, mask: attend(q, k, v, None if q.shape[2] > 1 else mask)}
    found = verdicts(check_attention.check_attention(CPU, ways))
    assert found["causal"] == "PASS" and found["one token over many"] == "PASS"
    assert all(found[name] == "FAIL" for name in EVERY_MASK - {"causal"})


def test_a_network_that_mixes_documents_fails():
    net = small_network()
    hidden = net.hidden
    net.hidden = lambda ids, docs=None: hidden(ids)
    assert check_attention.packed_documents(CPU, net).verdict == "FAIL"


class Stale(KVCache):
    """Forgets what comes token by token: the place keeps what it had."""

    def write(self, i, k, v):
        if not self.fresh and k.shape[2] == 1:
            k = torch.zeros_like(k)
        return super().write(i, k, v)


def test_a_stale_row_of_a_cache_fails():
    assert check_attention.cached(CPU, cache_class=Stale).verdict == "FAIL"


# Gradients, the head, float16, waiting


def test_gradients_of_zero_fail():
    net = small_network(tie=False, n_layer=1)
    net.model.layers[0].mlp.up_proj.weight.register_hook(torch.zeros_like)
    *_, finding = check_network.check_gradients(CPU, net)
    assert finding.verdict == "FAIL" and finding.figure > 0.01
    assert "layers.0.mlp.up_proj" in finding.words


def test_a_compiler_that_computes_wrongly_fails_and_one_that_is_missing_does_not():
    def loud(net, run, batch, cast, documents):
        net.train_block = lambda block, x, *rest: 1.02 * block(x, *rest)
        return True, "on"

    def eager(net, run, batch, cast, documents):
        return True, "on"

    def slower(net, run, batch, cast, documents):
        return True, "on; without sparse, since it computes wrongly here"

    def off(words):
        return lambda *args: (False, words)

    assert set(verdicts(check_network.check_compiled(CPU, loud)).values()) == {"FAIL"}
    assert set(verdicts(check_network.check_compiled(CPU, eager)).values()) == {"PASS"}
    found = verdicts(check_network.check_compiled(CPU, slower))
    assert found["causal"] == "PASS" and found["causal, ways that are wrong"] == "FAIL"
    wrong = off("off; without a, since it computes wrongly here; without b, since it failed")
    assert set(verdicts(check_network.check_compiled(CPU, wrong)).values()) == {"FAIL"}
    with pytest.raises(Skip, match="no compiler"):
        list(check_network.check_compiled(CPU, off("off, since it failed: no compiler")))


@pytest.mark.parametrize("place", [CPU, NARROW], ids=["float32", "bfloat16"])
def test_a_head_that_is_off_by_one_target_fails(place):
    def off_by_one(h, weight, targets):
        return cross_entropy_sum(h, weight, targets.roll(1))

    def heedless(h, weight, targets):
        return cross_entropy_sum(h, weight, targets.clamp(min=0))

    for wrong in (off_by_one, heedless):
        found = verdicts(check_network.check_head(place, wrong))
        assert found["gradients"] == "FAIL"
    assert set(verdicts(check_network.check_head(place)).values()) == {"PASS"}


def test_a_scaler_that_finds_no_scale_fails():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)  # halved each step
    try:
        found = verdicts(check_network.check_float16(CPU, scaler=scaler))
    except Skip:
        pytest.skip("no float16 here")
    assert found["updates skipped after step 6"] == "FAIL"
    assert found["gradients, against float32"] == "PASS"


def test_a_step_that_waits_for_the_device_is_noticed():
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    def fetch(place):
        return torch.zeros(2, 129, dtype=torch.int64, device=place.device)

    with torch.device("meta"):
        net = GPT(GPTConfig(**SHAPE)).train()
    with FakeTensorMode(allow_non_fake_inputs=True):  # it tells the host nothing of its numbers
        net.to_empty(device="cpu")
        check_network.micro_batches(CPU, net, fetch)
        net.train_block = lambda block, x, *rest: block(x, *rest) if x.sum() > 0 else x
        with pytest.raises(DataDependentOutputException):
            check_network.micro_batches(CPU, net, fetch)
    with pytest.raises(Skip):
        list(check_network.check_waiting(CPU))


# Answers


def test_a_wrong_id_fails_and_a_tie_does_not():
    net = check_tokens.speaking_network(CPU)
    prompts = check_tokens.random_prompts((5, 9))
    how = dict(temperature=0, max_new_tokens=6)
    right = check_tokens.ids_of(check_tokens.plain_answers(net, prompts, **how))
    good = check_tokens.same_greedy("name", net, prompts, right, right)
    assert good.verdict == "PASS" and "12 ids equal" in good.words
    ours = copy.deepcopy(right)
    ours[1][3] = (ours[1][3] + 1) % 256
    wrong = check_tokens.same_greedy("name", net, prompts, ours, right)
    assert wrong.verdict == "FAIL" and "row 2 parts at token 4" in wrong.words
    with torch.no_grad():  # two tokens that no network can tell apart
        net.lm_head.weight[ours[1][3]] = net.lm_head.weight[right[1][3]]
    tie = check_tokens.same_greedy("name", net, prompts, ours, right)
    assert tie.verdict == "PASS" and tie.figure == 0 and "parts at token 4" in tie.words
    short = check_tokens.same_greedy("name", net, prompts, [right[0], right[1][:3]], right)
    assert short.verdict == "FAIL"
    assert check_tokens.same_drawn("name", ours, right).figure == 1


def test_generation_that_takes_other_tokens_fails():
    def second_prompt_wrong(net, prompts, **options):
        prompts = [prompt if i != 1 else [*prompt, 7] for i, prompt in enumerate(prompts)]
        return check_tokens.answers(net, prompts, **options)

    found = verdicts(check_tokens.check_decode(CPU, second_prompt_wrong))
    assert (
        found["greedy, float32, together"] == "FAIL" and found["greedy, float32, alone"] == "PASS"
    )
    assert found["drawn, float32, min_p"] == found["log-probabilities, float32"] == "FAIL"


def test_a_server_that_mixes_its_clients_up_fails():
    def mixed(net, prompts, options, at_once):
        answers = check_tokens.engine_answers(net, prompts, options, at_once)
        return answers[1:] + answers[:1] if at_once else answers

    found = verdicts(check_tokens.check_server(CPU, mixed, n_clients=6))
    assert found["greedy, float32, alone"] == "PASS"
    assert found["greedy, float32, among 6"] == found["drawn, float32, among 6"] == "FAIL"


@pytest.mark.parametrize("place", [CPU, NARROW], ids=["float32", "bfloat16"])
def test_a_wrong_scale_of_quantized_weights_fails(place):
    def wrong_scale(linear, kind):
        layer = QuantizedLinear(linear, kind)
        layer.scale *= 1.1
        return layer

    def forgets_a_step(x, *layers):
        y = torch.cat([layer(x) for layer in layers], -1)
        return 0.9 * y

    found = verdicts(check_tokens.check_quantized(place, wrong_scale))
    assert found["int8 codes, error in steps"] == found["int4 codes, error in steps"] == "FAIL"
    assert found["int8 products"] == "PASS"
    found = verdicts(check_tokens.check_quantized(place, product=forgets_a_step))
    assert found["int8 products"] == found["int4 products"] == "FAIL"
    assert found["int8 codes, error in steps"] == "PASS"


def test_bits_that_depend_on_the_batch_fail():
    def count(device, dtype, n_rows):
        return dict(answers=n_rows, alone=0, trainer=3, chunks=0)

    found = verdicts(check_tokens.check_invariance(CPU, count))
    assert found == {
        "other bits, alone": "PASS",
        "other bits, trainer": "FAIL",
        "other bits, chunks": "PASS",
    }


# Whole runs


def train(folder, place, out_dir, processes=1, **settings):
    flags = check_runs.flags(place, out_dir=f"out/{out_dir}", **settings)
    run(folder, "train.py", *flags, processes=processes)
    return check_runs.weights(folder, out_dir)


def test_a_run_that_goes_on_otherwise_fails():
    def begun_again(folder, place):
        train(folder, place, "whole")
        train(folder, place, "interrupted", max_steps=19)
        return torch.zeros_like(check_runs.weights(folder, "whole"))

    [finding] = check_runs.check_resume(CPU, begun_again)
    assert finding.verdict == "FAIL" and 0 < finding.figure < 1
    assert "steps 10 to 20" in finding.words


def test_two_processes_agree_with_one_and_else_fail():
    logs = []

    def one_and_two(folder, place):
        for name, n in (("one", 1), ("two", 2)):
            train(folder, place, name, n, **check_runs.WITHOUT_CHANCE)
            logs.append((folder / "out" / name / "log.jsonl").read_text())

    def other_norms(folder, place):
        for name, log in zip(("one", "two"), logs):
            (folder / "out" / name).mkdir(parents=True)
            log = log.replace('"grad_norm": ', '"grad_norm": 1') if name == "two" else log
            (folder / "out" / name / "log.jsonl").write_text(log)

    found = verdicts(check_runs.check_processes(CPU, one_and_two))
    assert found == {"losses": "PASS", "gradient norms": "PASS"}
    found = verdicts(check_runs.check_processes(CPU, other_norms))
    assert found == {"losses": "PASS", "gradient norms": "FAIL"}


def test_a_way_to_divide_a_network_that_has_other_losses_fails():
    def runs(folder, place):
        for way in ("one", *check_runs.WAYS):
            (folder / "out" / way).mkdir(parents=True)
            loss = 5.001 if way == "tensor" else 5.0
            row = {"step": 1, "loss": loss, "grad_norm": 2.0}
            (folder / "out" / way / "log.jsonl").write_text(json.dumps(row) + "\n")

    found = verdicts(check_runs.check_parts(CPU, runs))
    assert [title for title, verdict in found.items() if verdict == "FAIL"] == ["tensor: losses"]
    assert len(found) == 2 * len(check_runs.WAYS)


def test_what_a_run_says_last_is_told():
    code = "import sys; print('first'); print('last', file=sys.stderr); sys.exit(3)"
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen([sys.executable, "-c", code], **streams) as process:
        with pytest.raises(RuntimeError, match="exit status 3: last"):
            check_runs.finish(process)


# All of them

WORKER = """
import json, os, signal, sys
tell = lambda **event: print(json.dumps(event), flush=True)
for name in json.load(sys.stdin)["names"]:
    tell(begins=name)
    row = dict(name="row", figure=0.5, allowed=1.0, words="", unit="", verdict="PASS")
    tell(row=row)
    if name == "head":
        print("bad instruction", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGILL)
    tell(ends=name)
    if name == "decode":
        break
"""


def test_a_check_that_ends_its_process_fails_and_the_others_go_on(capsys):
    table = check.Table()
    names = ["attention", "head", "decode", "speed"]
    check.run_checks(names, CPU, table.show, (sys.executable, "-c", WORKER))
    found = [(row["check"], row["verdict"]) for row in table.rows]
    assert found == [(name, "PASS") for name in names[:2]] + [("head", "FAIL")] + [
        (name, "PASS") for name in names[2:]
    ]
    assert "SIGILL: bad instruction" in table.rows[2]["words"]
    printed = capsys.readouterr().out
    assert printed.index("head: ") < printed.index("SIGILL") < printed.index("decode: ")
    table = check.Table()
    check.run_checks(names[:2], CPU, table.show, (sys.executable, "-c", "import nothing"))
    assert [row["verdict"] for row in table.rows] == ["FAIL", "FAIL"]
    assert "No module named" in table.rows[0]["words"]


def test_a_check_that_raises_fails_with_the_first_line_of_its_error():
    def raises(place):
        yield Finding("first", 0.0, 1.0)
        raise ValueError("wrong\nand more")

    events = []
    tell = lambda **event: events.append(event["row"])
    assert not check.run_check(check.Check(raises, "title"), CPU, tell)
    assert [row["verdict"] for row in events] == ["PASS", "FAIL"]
    assert re.fullmatch(r"ValueError: wrong \(test_check.py, line \d+\)", events[1]["words"])
    assert events[1]["name"] == "behind first"


def test_a_machine_is_checked(tmp_path):
    only = "--only=head,waiting,speed"
    done = run(tmp_path, "bench.py", *TINY, "--check", only, "--dtype=bfloat16")
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["dtype"] == "bfloat16" and record["machine"]["cpu"]
    assert record["versions"]["torch"] == torch.__version__ and record["capability"]
    verdicts = {row["verdict"] for row in record["rows"]}
    assert verdicts == {"PASS", "SKIP"} and "0 FAIL" in done.stdout
    for row in record["rows"]:
        assert row["verdict"] == "SKIP" or row["figure"] is not None
        assert row["allowed"] is None or row["figure"] <= row["allowed"]
    assert {row["check"] for row in record["rows"]} == {"head", "waiting", "speed"}
    assert "  PASS  loss, float32 " in done.stdout and "nothing to wait for" in done.stdout


def test_wrong_checks_are_refused_and_a_failure_is_the_exit_code(tmp_path, monkeypatch, capsys):
    done = run(tmp_path, "bench.py", *TINY, "--check", "--only=model", check=False)
    assert done.returncode == 1 and "attention, kinds, head" in done.stderr and not done.stdout

    def failing(names, place, show):
        show({"begins": "head"})
        show({"row": check.failure("all", "FAIL", "why")})
        show({"begins": "speed"})
        raise stop

    monkeypatch.setattr(check, "run_checks", failing)
    stop = KeyboardInterrupt
    rows, status = check.check_machine(["head"], CPU)
    assert status == 130 and len(rows) == 1 and "1 FAIL" in capsys.readouterr().out


def test_a_window_that_loses_keys_is_found(monkeypatch):
    kind = {"window": dict(window=24)}
    assert [finding.verdict for finding in check_kinds(CPU, kind)] == ["PASS", "PASS"]
    blocks = fast.query_blocks

    def too_narrow(T, S, causal, reach):
        return [(i, j, min(low + 9, i), high) for i, j, low, high in blocks(T, S, causal, reach)]

    monkeypatch.setattr(fast, "query_blocks", too_narrow)
    assert [finding.verdict for finding in check_kinds(CPU, kind)][0] == "FAIL"
