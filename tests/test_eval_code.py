"""eval.py: programs in their sandbox, code tasks, verifiable instructions, a judge."""

import itertools
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from conftest import run as run_script

import eval as ev
from barelm.run import UserError

ROOT = Path(__file__).resolve().parent.parent
HUMANEVAL = ROOT.parent / "shared/data/humaneval/HumanEval.jsonl"


@pytest.fixture(scope="module")
def holes():
    return ev.check_sandbox()


@pytest.fixture
def run(holes):
    """run_program where the sandbox is complete; elsewhere a test that it is refused."""

    def run(source, timeout=100, **settings):  # no honest program waits for it, however busy
        if holes:
            with pytest.raises(UserError, match="allow_weak_sandbox"):
                ev.run_program(source, timeout, **settings)
            pytest.skip(f"refused here: {holes}")
        return ev.run_program(source, timeout, **settings)

    return run


# ----------------------------------------------------------------------------------------- sandbox


def test_honest_programs(run):
    """Those that come to their end pass, whatever they print, import or leave behind in threads."""
    assert run("import dataclasses, json, decimal, sqlite3, hashlib\nassert 1") == "passed"
    assert run("from threading import Thread\nt = Thread(target=print)\nt.start(); t.join()") == (
        "passed"
    )
    source = "import typing\nclass A:\n    x: 'A'\nassert typing.get_type_hints(A)['x'] is A"
    assert run(source + "\nassert __name__ == '__main__' and 'é' == chr(233)") == "passed"
    assert run("assert 1 == 2, 'no\\nway'") == "failed: AssertionError: no way"
    assert run("x = nope") == "failed: NameError: name 'nope' is not defined"
    assert run("def f(:").startswith("failed: SyntaxError")
    assert run("x = '\ud800'") == "passed"  # what a model may write and no file can hold


def test_verdict_is_not_forged(run):
    for source in (
        "print('passed'); raise ValueError",
        "import sys; print('passed'); sys.exit(0)",
        "import os; os._exit(0)",
        "import os\nfor fd in range(3, 64):\n  try: os.write(fd, b'passed')\n  except OSError: 0",
        "import os; os.closerange(0, 64)",
        "raise SystemExit",
        "import atexit, os; atexit.register(os._exit, 0); quit()",
    ):
        assert run(source).startswith("failed: "), source


def test_endless(run):
    for source in (
        "while True: pass",
        "import time; time.sleep(99)",
        "import os; os.closerange(0, 64)\nwhile True: pass",
        "import signal\nfor s in (2, 15, 24): signal.signal(s, print)\nwhile True: pass",
    ):
        assert run(source, timeout=0.5) == "timed out", source


def test_memory(run):
    assert run("x = []\nwhile True: x.append(bytes(1 << 20))", memory_mb=200) == (
        "failed: MemoryError:"
    )
    assert run("x = ['']\nwhile True: x.append(x * 9)", memory_mb=200) == "failed: MemoryError:"
    source = "import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 1 << 24))"
    assert run(source, memory_mb=200).startswith("failed: OSError: [Errno 12]")


def test_floods(run):
    assert run("import os\nx = 'x' * (1 << 20)\nfor i in range(2000): print(x)") == "passed"
    flood = "import os\nfor fd in range(3, 9):\n  try:\n    while True: os.write(fd, b'x' * 4096)\n"
    verdict = run(flood + "  except OSError: 0", timeout=2)
    assert verdict.startswith(("failed: ", "timed out")) and len(verdict) < 1100


def test_no_processes(run):
    """None by any road: no fork bomb, no background process, no escape by setsid."""
    call = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nassert libc.{} >= 0"
    for source in (
        "import os\nwhile True: os.fork()",
        "import subprocess, sys; subprocess.Popen([sys.executable], start_new_session=True)",
        "import os; os.posix_spawn('/bin/sh', ['sh'], {})",
        "import os; os.system('true') == 0 or 1 / 0",
        "import os; os.execv('/bin/true', ['true'])",
        "import multiprocessing as m; m.Process(target=print).start()",
        call.format("fork()"),
        call.format("vfork()"),
        call.format("syscall(435, bytes(64), 64)"),  # clone3
        call.format("unshare(0x10000000)"),
    ):
        assert run(source).startswith("failed: "), source


def test_no_reach(run, tmp_path):
    """Files, modes, sockets and processes outside are as they were."""
    file, victim = tmp_path / "file", subprocess.Popen(["sleep", "60"])
    file.write_text("mine")
    for place, mode in ((file, 0o666), (tmp_path, 0o777)):
        place.chmod(mode)
    server = socket.create_server(("127.0.0.1", 0))
    local = socket.socket(socket.AF_UNIX)
    local.bind(str(tmp_path / "socket"))
    local.listen()
    libc = "import ctypes; libc = ctypes.CDLL(None)\nassert libc."
    for source in (
        f"open({str(file)!r}).read()",
        f"open({str(file)!r}, 'w')",
        f"open({str(tmp_path)!r} + '/new', 'x')",
        f"import os; os.remove({str(file)!r})",
        f"import os; os.rename({str(file)!r}, {str(tmp_path)!r} + '/b')",
        f"import os; os.chmod({str(file)!r}, 0)",
        f"import os; os.utime({str(file)!r}, (1, 1))",
        f"import os; os.truncate({str(file)!r}, 0)",
        f"import os; os.symlink('/', {str(tmp_path)!r} + '/link')",
        f"import os; os.listdir({str(tmp_path)!r})",
        "open('/etc/passwd').read()",
        "open('/proc/self/environ').read()",
        "open('/dev/shm/barelm', 'x')",
        "open('mine', 'x')",
        f"import socket; socket.create_connection({server.getsockname()})",
        f"import socket; socket.socket(socket.AF_UNIX).connect({str(tmp_path / 'socket')!r})",
        "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
        f"import os; os.kill({victim.pid}, 9)",
        "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
        "import os; os.killpg(0, 9)",
        f"import fcntl, os; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, {victim.pid})",
        f"import os; os.setpriority(os.PRIO_PROCESS, {victim.pid}, 19)",
        f"{libc}ptrace(16, {victim.pid}, 0, 0) == 0",
        f"{libc}syscall(434, {victim.pid}, 0) >= 0",  # pidfd_open
        f"{libc}shmget(0, 4096, 0o1600) >= 0",
        f"{libc}prctl(36, 1) == 0",  # PR_SET_CHILD_SUBREAPER
        f"{libc}prctl(4, 1) == 0",  # PR_SET_DUMPABLE
        f"{libc}prctl(1, 0) == 0",  # PR_SET_PDEATHSIG
        "import os; os.environ['HOME']",
        "import os; assert os.geteuid() == 0",
    ):
        assert run(source).startswith("failed: "), source
    assert victim.poll() is None and file.read_text() == "mine" and len([*tmp_path.iterdir()]) == 2
    assert file.stat().st_mode & 0o777 == 0o666 and file.stat().st_mtime > 2
    for listener in (server, local):
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
        listener.close()
    victim.kill()
    victim.wait()


def test_nothing_is_left(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    run("while True: pass", timeout=0.3), run("1"), run("import ctypes; ctypes.string_at(0)")
    assert not [*tmp_path.iterdir()]


def test_leave_is_needed(holes, monkeypatch):
    with pytest.raises(UserError, match="--allow_code_exec"):
        ev.require_sandbox()
    monkeypatch.setattr(ev, "allow_code_exec", True)
    if not holes:
        ev.require_sandbox()


OUTLIVE = {  # what a program does before it loops, so as to go on when eval.py is gone
    "nothing": "",
    "the signal": "libc.prctl(1, 0, 0, 0, 0)",
    "the signal, by x32's number": "libc.syscall(0x40000000 + 157, 1, 0, 0, 0, 0)",
    "another session": "libc.setsid(), libc.setpgid(0, 0)",
    "another user": "libc.setfsuid(1), libc.setfsgid(1), libc.setresuid(1, 1, 1)",
    "no first thread": "threading.Thread(target=loop).start(), libc.syscall(EXIT, 0)",
}


def test_no_life_after_eval(run, tmp_path):
    """A program dies with the process that started it, whatever it tries before."""
    run("1")
    loop = "import ctypes, threading\nlibc = ctypes.CDLL(None)\ndef loop():\n    while True: pass\n"
    loop += f"EXIT = {93 if os.uname().machine == 'aarch64' else 60}\n"
    sources = [f"{loop}{attempt}\nloop()" for attempt in OUTLIVE.values()]
    script = f"""
import sys
from concurrent.futures import ThreadPoolExecutor
sys.path.insert(0, sys.argv[1])
import eval as ev
with ThreadPoolExecutor({len(sources)}) as pool:
    list(pool.map(lambda source: ev.run_program(source, 60), {sources}))
"""
    env = os.environ | {"TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", script, str(ROOT)], env=env)
    tasks = Path(f"/proc/{parent.pid}/task")

    def children():
        return [pid for task in tasks.iterdir() for pid in (task / "children").read_text().split()]

    def busy(pid):  # one of its threads loops: all that comes before took less
        stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
        return max(int(stat.rpartition(")")[2].split()[11]) for stat in stats) > 20

    def lives(pid):
        tasks = Path(f"/proc/{pid}/task")
        try:
            return any(") Z " not in (task / "stat").read_text() for task in tasks.iterdir())
        except OSError:
            return False

    while len(children()) < len(sources) or not all(map(busy, children())):
        assert parent.poll() is None
        time.sleep(0.1)
    programs = children()
    parent.kill()
    parent.wait()
    for _ in range(600):  # long before the limit of their time would end them, which is no proof
        if not any(map(lives, programs)):
            return
        time.sleep(0.05)
    for pid in filter(lives, programs):
        os.kill(int(pid), 9)
    raise AssertionError(f"{programs} live on")


def test_no_life_where_eval_is_gone_before(run, tmp_path):
    """Killed before its child has asked for the signal: the child sees that it is an orphan."""
    run("1")
    (tmp_path / "program.py").write_text("while True: pass")
    code = f"{ev.HARNESS}\n\nchild(60, 1024, False, {os.getpid() + 1})"
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert done.returncode == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's rules are Linux's")
def test_weak_machine_is_refused(tmp_path):
    """A kernel without Landlock (its calls answered ENOSYS by a filter): said, and refused."""
    script = f"""
import ctypes, struct, sys
sys.path.insert(0, {str(ROOT)!r})
lines = [(0x20, 0, 0, 0), (0x15, 0, 1, 444), (6, 0, 0, 0x50000 | 38), (6, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in lines))
libc, long = ctypes.CDLL(None), ctypes.c_long
assert libc.prctl(38, long(1), long(0), long(0), long(0)) == 0
filter = struct.pack("@HP", 4, ctypes.addressof(code))
assert libc.prctl(22, long(2), filter, long(0), long(0)) == 0
import eval as ev
print(*[ev.run_program(source, 100, weak=True) for source in ("1", "import os; os.fork()")])
ev.allow_code_exec = True
try:
    ev.require_sandbox()
except SystemExit as error:
    print("refused:", error)
ev.run_program("1")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1 and "syscall is refused here" in done.stderr, done.stderr
    assert "--allow_weak_sandbox" in done.stderr and "Traceback" not in done.stderr
    assert "sandbox: a program can read your files" in done.stdout and "refused:" in done.stdout
    assert "passed failed: PermissionError" in done.stdout  # what the kernel has still holds


# -------------------------------------------------------------------------------------- code tasks


@pytest.mark.skipif(not HUMANEVAL.exists(), reason="no HumanEval here")
def test_humaneval(holes):
    rows = [json.loads(line) for line in HUMANEVAL.read_text(encoding="utf-8").splitlines()]
    right = [ev.humaneval_program(row, row["canonical_solution"]) for row in rows]
    assert ev.run_programs(right, timeout=100, weak=bool(holes)) == ["passed"] * 164
    wrong = [ev.humaneval_program(row, "    return None\n") for row in rows[::2]]
    wrong += [ev.humaneval_program(row, "    pass\n") for row in rows[1::2]]
    assert "passed" not in ev.run_programs(wrong, weak=bool(holes))


def test_humaneval_program_ends_at_a_stop():
    row = {"prompt": "def f():\n", "test": "def check(f):\n    assert f() == 1", "entry_point": "f"}
    answer = "    return 1\n\nprint(f())\nraise ValueError\n"
    assert ev.humaneval_program(row, answer) == (
        "def f():\n    return 1\n\ndef check(f):\n    assert f() == 1\ncheck(f)\n"
    )
    assert ev.run_program(ev.humaneval_program(row, answer), timeout=100, weak=True) == "passed"


def test_mbpp():
    shot = {"text": "Add.", "code": "def a(x, y):\n    return x + y", "test_list": ["assert 1"] * 3}
    row = {"text": "Double.", "test_list": [f"assert d({i}) == {2 * i}" for i in range(3)]}
    head = "You are an expert Python programmer, and here is your task: "
    middle = " Your code should pass these tests:\n\n"
    ask, solved = ev.TASKS["mbpp"].read(shot)
    assert f"{ask}{solved}\n\n{ev.mbpp_prompt(row)}" == (
        f"{head}Add.{middle}assert 1\nassert 1\nassert 1\n[BEGIN]\ndef a(x, y):\n    return x + y\n"
        f"[DONE]\n\n{head}Double.{middle}assert d(0) == 0\nassert d(1) == 2\nassert d(2) == 4\n"
        "[BEGIN]\n"
    )
    for body, verdict in (("2 * x", "passed"), ("x", "failed: AssertionError:")):
        program = ev.mbpp_program(row, f"def d(x):\n    return {body}\n[DONE]\nnonsense(")
        assert ev.run_program(program, timeout=100, weak=True) == verdict


def test_pass_at_k():
    """The share of all subsets of k samples that have a right one."""
    for n, c, k in ((5, 0, 2), (5, 2, 1), (6, 2, 3), (6, 5, 2), (4, 4, 4)):
        subsets = [any(i < c for i in s) for s in itertools.combinations(range(n), k)]
        assert ev.pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


# ------------------------------------------------------------------------------------------ IFEval

CASES = [  # instruction, arguments, a text that follows, one that does not
    ("keywords:existence", {"keywords": ["c++", "Cat"]}, "C++ cats", "C+ cat"),
    ("keywords:frequency", dict(keyword="no", frequency=2, relation="at least"), "No, no", "no"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "cats", "a CAT."),
    ("keywords:letter_frequency", dict(letter="a", let_frequency=2, let_relation="less than"),
     "Abc", "Aa"),
    ("language:response_language", {"language": "de"}, "Das ist nicht der Hund und die Katze.",
     "This is not the dog and the cat."),
    ("language:response_language", {"language": "ko"}, "안녕하세요 hi", "こんにちは"),
    ("language:response_language", {"language": "fa"}, "سلام دنیا", "שלום עולם"),
    ("length_constraints:number_sentences", dict(num_sentences=3, relation="at least"),
     "Mr. X. Y met e.g. me. Did he? “Yes!” I said", "One. Two"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb\n***", "a\n\nb"),
    ("length_constraints:number_words", dict(num_words=3, relation="less than"), "a b", "a-b c"),
    ("length_constraints:nth_paragraph_first_word",
     dict(num_paragraphs=2, nth_paragraph=2, first_word="Two"), 'One\n\n"two, x', "Two\n\nOne"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] [b]", "[a]"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "x\np. p.s: y", "P.S. y"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n - b", "* a\n**b**"),
    ("detectable_format:constrained_response", {}, "So: My answer is no.", "My answer is no"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* *b*", "*a* **"),
    ("detectable_format:multiple_sections", dict(section_spliter="SECTION", num_sections=2),
     "SECTION 1 a\nSECTION 2 b", "SECTION 1\nSection 2"),
    ("detectable_format:json_format", {}, '```JSON\n{"a": [1]}\n```', "{'a': 1}"),
    ("detectable_format:title", {}, "<<A>>\ntext", "<<>>"),
    ("combination:two_responses", {}, "a ****** b", "a ****** a"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it"}, " say IT: x", "It: say it"),
    ("startend:end_checker", {"end_phrase": "The End."}, 'x the end."', "The end. x"),
    ("startend:quotation", {}, ' "a\nb" ', '"'),
    ("change_case:capital_word_frequency", dict(capital_frequency=2, capital_relation="at least"),
     "NO WAY-OUT", "NO Way WAY-out"),
    ("change_case:english_capital", {}, "THIS IS IT", "THIS IS It"),
    ("change_case:english_lowercase", {}, "this is it", "das ist der hund und die katze"),
    ("punctuation:no_comma", {}, "a b", "a, b"),
]  # fmt: skip


@pytest.mark.parametrize("name, arguments, yes, no", CASES)
def test_instruction(name, arguments, yes, no):
    arguments = arguments | {"an_argument_of_another": None}  # as the published rows have them
    assert ev.follows(name, arguments, yes) is True and ev.follows(name, arguments, no) is False
    assert ev.follows(name, arguments, " \n") is False


def test_instructions_are_all_there_or_refused():
    assert len(ev.INSTRUCTIONS) == 25 and set(ev.INSTRUCTIONS) == {case[0] for case in CASES}
    with pytest.raises(UserError, match="keywords:nothing: not one"):
        ev.follows("keywords:nothing", {}, "x")
    with pytest.raises(UserError, match="keyword"):
        ev.follows("keywords:existence", {"keywords": None}, "x")
    with pytest.raises(UserError, match="around"):
        arguments = {"num_words": 3, "relation": "around"}
        ev.follows("length_constraints:number_words", arguments, "x")


def test_strict_and_loose():
    rows = [
        {"instruction_id_list": ["startend:quotation", "punctuation:no_comma"], "kwargs": [{}, {}]},
        {"instruction_id_list": ["detectable_format:json_format"], "kwargs": [{}]},
    ]
    verdicts = [
        ev.judge_ifeval(row, [text])
        for row, text in zip(rows, ['Sure, here:\n*"yes"*', "Here it is:\n[1]\nEnjoy!"])
    ]
    assert [list(v.values()) for v in verdicts] == [
        [False, [False, False], True, [True, True]],
        [False, [False], True, [True]],
    ]


def test_instructions_as_lm_eval(monkeypatch):
    """Random texts: the same verdicts, strict and loose, for all that need no language library."""
    pytest.importorskip("langdetect")
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk, "download", lambda *_, **__: True)  # it would want the network
    pytest.importorskip("lm_eval")
    from lm_eval.tasks.ifeval.utils import process_results

    draw = random.Random(0)
    pieces = 'Yes no [x] <<T>> *a* **b** *** ****** P.S. , " {"a":1} SECTION 1 2 3'.split(" ")
    pieces += ["\n", "\n\n", "- a\n", "* b\n", "My answer is yes.", "The End.", "cat"]
    ours = [c for c in CASES if not c[0].startswith(("language", "change_case"))]
    ours = [c for c in ours if c[0] != "length_constraints:number_sentences"]
    for _ in range(150):
        text = "".join(draw.choice(pieces) + draw.choice(["", " ", "\n"]) for _ in range(9))
        texts = [text, draw.choice(ours)[2] + draw.choice(["", "\nbye"])]
        for text in texts:
            row = {"key": 0, "prompt": "", "instruction_id_list": [c[0] for c in ours]}
            row["kwargs"] = [c[1] for c in ours]
            row["kwargs"][0] = {"keywords": ["cat"]}  # lm-eval reads c++ as a pattern, and dies
            theirs = process_results(row, [text])
            strict, loose = ev.ifeval_verdicts(row, text)
            assert strict == theirs["inst_level_strict_acc"], text
            assert loose == theirs["inst_level_loose_acc"], text


# ------------------------------------------------------------------------------------------- judge


@pytest.fixture
def judge(monkeypatch):
    """A server that gives the replies (status, text) in turn, and keeps what it was asked."""
    replies, asked = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers["Authorization"], body))
            status, text = replies.pop(0)
            data = text if status != 200 else {"choices": [{"message": {"content": text}}]}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(data).encode())

        def log_message(self, *_):
            pass

    monkeypatch.setattr(ev, "JUDGE_WAIT", 0.01)
    monkeypatch.setitem(os.environ, "NO_PROXY", "127.0.0.1")
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", replies, asked
    server.shutdown()
    server.server_close()


def test_judge(judge, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "k")
    url, replies, asked = judge
    replies += [(503, "busy"), (429, "wait"), (200, "I saw [[1]]. Rating: [[10]]")]
    assert ev.ask_judge(url, "m", "why?", "because [[7]]", "Be strict.") == 10
    path, key, body = asked[-1]
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer k", "m") and not replies
    said = body["messages"][0]["content"]
    assert all(text in said for text in ("why?", "because [[7]]", "Be strict."))


@pytest.mark.parametrize(
    "given, why",
    [
        ([(401, "no key")], "status 401"),
        ([(500, "x")] * 4, "four attempts .status 500"),
        ([(200, "Rating: [[11]]")], "without Rating"),
        ([(200, None)], "not a chat completion"),
    ],
)
def test_judge_fails_clearly(judge, given, why):
    url, replies, _ = judge
    replies += given
    with pytest.raises(UserError, match=why):
        ev.ask_judge(url, "m", "q", "a", "r")
    assert not replies


def test_judge_is_away(judge):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(UserError, match="four attempts .ConnectionError"):
            ev.ask_judge(url, "m", "q", "a", "r")


# ------------------------------------------------------------------------------------- The command


def test_code_instructions_and_ratings_by_the_command(tiny, tmp_path, judge, holes):
    url, replies, asked = judge
    replies += [(200, "Rating: [[3]]"), (200, "Rating: [[6]]")]
    rows = {
        "humaneval": [{"prompt": "x = 1\n", "canonical_solution": "", "entry_point": "abs"}
                      | {"test": f"def check(f):\n    assert f(-1) == {i}"} for i in (1, 2)],
        "ifeval": [{"prompt": "Write.", "instruction_id_list": ids, "kwargs": [{}] * len(ids)}
                   for ids in (["punctuation:no_comma"], ["startend:quotation"] * 2)],
        "mine": [{"kind": "generate", "rubric": "Be kind."}] + [{"question": q} for q in "ab"],
    }  # fmt: skip
    for name, some in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in some)
        (tmp_path / f"{name}.jsonl").write_text(text)
    mine = str(tmp_path / "mine.jsonl")
    flags = [
        "--model=out/tiny",
        f"--data={tmp_path}",
        f"--out_dir={tmp_path}",
        "--max_new_tokens=8",
    ]
    flags += [f"--tasks=humaneval,ifeval,{mine}", f"--judge_url={url}", "--judge_model=m"]
    refused = run_script(tiny, "eval.py", *flags, check=False)
    assert refused.returncode == 1 and "--allow_code_exec allows it" in refused.stderr
    weak = ["--allow_weak_sandbox"] * bool(holes)
    run_script(tiny, "eval.py", *flags, "--allow_code_exec", "--samples", *weak)
    found = json.loads((tmp_path / "results.json").read_text())["results"]
    samples = lambda name: [json.loads(line) for line in open(tmp_path / f"samples_{name}.jsonl")]
    passed = [sample["verdicts"] == ["passed"] for sample in samples("humaneval")]
    for sample, row in zip(samples("humaneval"), rows["humaneval"]):
        program = ev.humaneval_program(row, sample["answers"][0])
        assert [ev.run_program(program, timeout=100, weak=True)] == sample["verdicts"]
    assert found["humaneval"]["pass@1"] == sum(passed) / 2
    strict = [ev.ifeval_verdicts(row, sample["answers"][0])[0]
              for row, sample in zip(rows["ifeval"], samples("ifeval"))]  # fmt: skip
    assert found["ifeval"]["prompt_level_strict_acc"] == sum(map(all, strict)) / 2
    assert found["ifeval"]["inst_level_strict_acc"] == pytest.approx(sum(sum(strict, [])) / 3)
    assert found[mine]["rating"] == 4.5 and "Be kind." in asked[0][2]["messages"][0]["content"]


def test_ratings_that_were_given_are_not_asked_again(tiny, tmp_path, judge):
    url, replies, asked = judge
    mine = tmp_path / "mine.jsonl"
    header = {"kind": "generate", "rubric": "Be kind."}
    mine.write_text(
        "".join(json.dumps(r) + "\n" for r in [header, {"question": "a"}, {"question": "b"}])
    )
    flags = ["--model=out/tiny", f"--out_dir={tmp_path}", "--max_new_tokens=4", f"--tasks={mine}"]
    flags += [f"--judge_url={url}", "--judge_model=m"]
    replies += [(200, "Rating: [[3]]"), (400, "")]
    assert run_script(tiny, "eval.py", *flags, check=False).returncode == 1
    replies += [(200, "Rating: [[6]]")]
    run_script(tiny, "eval.py", *flags)
    assert len(asked) == 3 and asked[1] == asked[2] != asked[0] and not replies
    found = json.loads((tmp_path / "results.json").read_text())["results"]
    assert found[str(mine)]["rating"] == 4.5
