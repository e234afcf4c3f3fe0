"""The benchmarks that eval.py knows by name: the table of them, and what is special to each.

One more of multiple choice is one entry in TASKS, at the end:

    "race": Task(prompt="{article}\n\nQuestion: {question}\nAnswer:", hub="ehovy/race/all"),

With rows of `choices` or `options` and an `answer`, that is all (choices_of says which forms); rows
of another form need a `read`, a function from a row to a Question. Prompts, answers and scores are
lm-evaluation-harness's (0.4.13), so that numbers compare; CORE's are in barelm/core_tasks.py.
"""

from __future__ import annotations

import re
import string
from typing import TYPE_CHECKING

from barelm.ifeval import judge_ifeval
from barelm.tasks import (
    GSM8K_STOP,
    LETTERS,
    Question,
    Task,
    all_texts,
    choices_of,
    exact_match,
    extract,
    judge_gsm8k,
    subject_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

# --------------------------------------------------------------------------------------------------
# Multiple choice: MMLU (Hendrycks et al. 2021), HellaSwag (Zellers et al. 2019), Winogrande
# (Sakaguchi et al. 2019), PIQA (Bisk et al. 2019), BoolQ (Clark et al. 2019), OpenBookQA (Mihaylov
# et al. 2018), COPA (Roemmele et al. 2011), CommonsenseQA (Talmor et al. 2018); ARC needs nothing


def read_mmlu(row: dict) -> Question:
    """The question with its choices by letter; what is scored is the letter."""
    choices, right = choices_of(row)
    return by_letter(row["question"].strip(), choices, right)


def read_commonsense_qa(row: dict) -> Question:
    """The same of another wording."""
    choices, right = choices_of(row)
    return by_letter(f"Question: {row['question'].strip()}", choices, right)


def text_of(row: dict, key: str) -> str:
    """A field of a row that is a text: null would be asked about as None."""
    if not isinstance(row[key], str):
        raise ValueError(f"{key!r} is no text")
    return row[key]


def by_letter(question: str, choices: list[str], right: int) -> Question:
    """A question with its choices below it, of which the letters are scored."""
    if len(choices) > len(LETTERS):
        raise ValueError(f"{len(choices)} choices, but there are {len(LETTERS)} letters")
    letters = list(LETTERS[: len(choices)])
    prompt = question
    for letter, choice in zip(letters, choices):
        prompt += f"\n{letter}. {choice}"
    return Question(f"{prompt}\nAnswer:", right, letters)


def describe_mmlu(row: dict) -> str:
    subject = subject_of(row).replace("_", " ")
    about = f" about {subject}" if subject else ""
    return f"The following are multiple choice questions (with answers){about}.\n\n"


def read_hellaswag(row: dict) -> Question:
    # ctx_b is the beginning of the sentence that the endings complete.
    query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [clean_wikihow(ending) for ending in row["endings"]]
    choices, right = choices_of({"choices": endings, "answer": int(row["label"])})
    return Question(clean_wikihow(query), right, choices)


def clean_wikihow(text: str) -> str:
    """WikiHow's headings are in brackets."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def read_winogrande(row: dict) -> Question:
    """The sentence with either option in its gap: what is scored is the rest behind the gap, which
    is the same for both (partial evaluation: Trinh and Le 2018)."""
    before, gap, behind = row["sentence"].partition("_")
    if not gap:
        raise ValueError("no gap (_) in its sentence")
    beginnings = [before + row["option1"], before + row["option2"]]
    choices, right = choices_of({"choices": beginnings, "answer": int(row["answer"]) - 1})
    return Question("", right, choices, ending=behind.strip())


def read_piqa(row: dict) -> Question:
    choices, right = choices_of({"choices": [row["sol1"], row["sol2"]], "answer": row["label"]})
    return Question(f"Question: {text_of(row, 'goal')}\nAnswer:", right, choices)


def read_boolq(row: dict) -> Question:
    choices, right = choices_of({"choices": ["no", "yes"], "answer": int(row["label"])})
    passage = text_of(row, "passage")
    question = text_of(row, "question")
    return Question(f"{passage}\nQuestion: {question}?\nAnswer:", right, choices)


def read_openbookqa(row: dict) -> Question:
    choices, right = choices_of({"choices": row["choices"], "answer": row["answerKey"].lstrip()})
    return Question(row["question_stem"], right, choices)


COPA_WORDS = {"cause": "because", "effect": "therefore"}


def read_copa(row: dict) -> Question:
    """The premise without its full stop, and the sentence that goes on from it. A space too many
    stands between them, as in the harness."""
    choices = []
    for key in ("choice1", "choice2"):
        text = row[key]
        choices.append(f" {text[0].lower()}{text[1:]}")
    choices, right = choices_of({"choices": choices, "answer": row["label"]})
    return Question(f"{row['premise'].strip()[:-1]} {COPA_WORDS[row['question']]}", right, choices)


# --------------------------------------------------------------------------------------------------
# A word, a name: LAMBADA (Paperno et al. 2016), TriviaQA (Joshi et al. 2017)


def read_lambada(row: dict) -> Question:
    """The last word of a passage, with the space before it."""
    before, _, word = row["text"].rpartition(" ")
    return Question(before, f" {word}")


def read_triviaqa(row: dict) -> Question:
    aliases = row["answer"]["aliases"]
    if not isinstance(aliases, list) or not aliases or not all_texts(aliases):
        raise ValueError("no list of aliases in its answer")
    return Question(f"Question: {text_of(row, 'question')}?\nAnswer:", aliases[0])


NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def judge_triviaqa(row: dict, texts: list[str]) -> dict[str, float]:
    """Whether an answer is one of the names, but for capitals and punctuation."""
    text = texts[0].strip().lower().translate(NO_PUNCTUATION)
    names = [alias.lower().translate(NO_PUNCTUATION) for alias in row["answer"]["aliases"]]
    return {"exact_match": float(text in names)}


# --------------------------------------------------------------------------------------------------
# Mathematics: MATH (Hendrycks et al. 2021)

MATH_FORMS = [  # (what, becomes what), in this order
    (r"\n|\\!", ""), (r"\\\\", r"\\"), (r"[td]frac", "frac"), (r"\\left|\\right", ""),
    (r"\^\{\\circ\}|\^\\circ|\\\$", ""), (r"(?s)\\text\{ .*", ""), (r"\\%", ""),
    (r"(^|[ {])\.", r"\g<1>0."), (r"^[^=]{1,2}=([^=]*)$", r"\1"),
    (r"\\sqrt([^{])", r"\\sqrt{\1}"), (r" ", ""), (r"\\frac([^{])([^{])", r"\\frac{\1}{\2}"),
    (r"\\frac([^{])\{", r"\\frac{\1}{"), (r"^0\.5$", r"\\frac{1}{2}"),
    (r"^(0|-?[1-9]\d*)/(0|-?[1-9]\d*)$", r"\\frac{\1}{\2}"),
]  # fmt: skip


def boxed(text: str) -> str | None:
    r"""What the last \boxed{} (or \fbox{}) of a text holds, or None."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    body = text[start:].partition("box")[2].removeprefix("ed")
    if body[:1] == " ":  # \boxed 5$
        return body[1:].partition("$")[0]
    depth = 0
    for i, character in enumerate(body):
        if character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
        if depth == 0:
            return body[1:i] if character == "}" else None
    return None


def normal_math(text: str) -> str:
    """One spelling for the ways to write an answer (Hendrycks et al. 2021, their code's rules)."""
    for pattern, replacement in MATH_FORMS:
        if "=" in pattern:  # of x = 5 the 5 is left, whatever space is around
            text = text.strip()
        text = re.sub(pattern, replacement, text)
    return text


def judge_math(row: dict, texts: list[str]) -> dict[str, float]:
    answer = boxed(texts[0])
    if answer is None:  # Minerva's prompt asks for this sentence
        answer = extract(r"[Tt]he final answer is \$?(.*?)\$?\.(?:\s|$)", texts[0])
    right = boxed(row["solution"]) if "solution" in row else row["answer"]
    if right is None:
        raise ValueError("no \\boxed{} in its solution")
    return {"exact_match": exact_match(normal_math(answer), normal_math(right))}


# --------------------------------------------------------------------------------------------------
# Code: HumanEval (Chen et al. 2021) and MBPP (Austin et al. 2021), prompts as lm-eval's

HUMANEVAL_STOP = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]
MBPP_STOP = ["[DONE]"]


def cut(text: str, stops: Iterable[str]) -> str:
    """The text before the first of the stop strings."""
    places = [text.find(stop) for stop in stops if stop in text]
    return text[: min(places, default=None)]


def humaneval_program(row: dict, completion: str) -> str:
    for key in ("prompt", "test", "entry_point"):
        if not isinstance(row[key], str):
            raise ValueError(f"{key!r} is no text")
    function = row["prompt"] + cut(completion, HUMANEVAL_STOP)
    return f"{function}\n{row['test']}\ncheck({row['entry_point']})\n"


def mbpp_prompt(row: dict) -> str:
    task = row.get("text") or row["prompt"]  # the full set's name, the sanitized set's
    tests = "\n".join(row["test_list"][:3])
    return (
        f"You are an expert Python programmer, and here is your task: {task} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def read_mbpp(row: dict) -> Question:
    return Question(mbpp_prompt(row), f"{row['code']}\n[DONE]")


def mbpp_program(row: dict, completion: str) -> str:
    """lm-eval runs the first three tests and no test_setup_code; the sanitized set has imports."""
    imports = row.get("test_imports", [])
    return "\n".join([cut(completion, MBPP_STOP), *imports, *row["test_list"][:3], ""])


# --------------------------------------------------------------------------------------------------
# The table: BIG-Bench Hard (Suzgun et al. 2022) and IFEval beside those above


def describe_bbh(row: dict) -> str:
    return row.get("description", "")


def read_ifeval(row: dict) -> Question:
    return Question(row["prompt"], "")


TASKS = {
    # Multiple choice: shots, where any are usual, are the subject's own from its dev file.
    "mmlu": Task(
        read=read_mmlu, describe=describe_mmlu, shots=5, fixed_shots=True, hub="cais/mmlu/all"
    ),
    "arc_easy": Task(hub="allenai/ai2_arc/ARC-Easy"),
    "arc_challenge": Task(hub="allenai/ai2_arc/ARC-Challenge"),
    "hellaswag": Task(read=read_hellaswag, hub="Rowan/hellaswag", split="validation"),
    "winogrande": Task(
        read=read_winogrande,
        metrics=("acc",),
        hub="allenai/winogrande/winogrande_xl",
        split="validation",
    ),
    "piqa": Task(read=read_piqa, hub="baber/piqa", split="validation"),
    "boolq": Task(
        read=read_boolq, metrics=("acc",), hub="aps/super_glue/boolq", split="validation"
    ),
    "openbookqa": Task(read=read_openbookqa, hub="allenai/openbookqa/main"),
    "copa": Task(read=read_copa, metrics=("acc",), hub="aps/super_glue/copa", split="validation"),
    "commonsense_qa": Task(
        read=read_commonsense_qa, metrics=("acc",), hub="tau/commonsense_qa", split="validation"
    ),
    # A continuation: is it what the model would say, and how likely.
    "lambada_openai": Task(
        kind="continue",
        read=read_lambada,
        delimiter="",  # its answer begins with the space
        shot_delimiter=" ",  # in a solved example are two, as in the harness
        shots_of_questions=True,
        hub="EleutherAI/lambada_openai/default",
    ),
    # Generation: an answer goes on until a stop string, or max_new_tokens.
    "gsm8k": Task(
        kind="generate",
        judge=judge_gsm8k,
        stop=GSM8K_STOP,
        shots=5,
        max_new_tokens=256,
        hub="openai/gsm8k/main",
    ),
    "triviaqa": Task(
        kind="generate",
        read=read_triviaqa,
        judge=judge_triviaqa,
        stop=["\n", ".", ","],
        max_new_tokens=256,
        hub="mandarjoshi/trivia_qa/rc.nocontext",
        split="validation",
    ),
    "math": Task(
        kind="generate",
        prompt="Problem:\n{problem}\n\nSolution:",
        answer="solution",
        judge=judge_math,
        stop=["Problem:"],
        shots=4,
        fixed_shots=True,
        max_new_tokens=512,
        subject_field="type",
        hub="EleutherAI/hendrycks_math",
    ),
    "bbh": Task(
        kind="generate",
        prompt="Q: {input}\nA: Let's think step by step.\n",
        answer="target",
        delimiter="",  # its shots' answers begin a line of their own
        extract="(?<=the answer is )(.*)(?=.)",
        describe=describe_bbh,
        stop=["</s>", "Q", "\n\n"],
        shots=3,
        fixed_shots=True,
        max_new_tokens=1024,
        subject_by_file=True,
        hub="SaylorTwift/bbh",
    ),
    # Code
    "humaneval": Task(
        kind="generate",
        prompt="{prompt}",
        answer="canonical_solution",
        delimiter="",  # the answer goes on within the function
        stop=HUMANEVAL_STOP,
        program=humaneval_program,
        max_new_tokens=1024,
        hub="openai/openai_humaneval/openai_humaneval",
    ),
    "mbpp": Task(
        kind="generate",
        read=read_mbpp,
        delimiter="",
        program=mbpp_program,
        stop=MBPP_STOP,
        shots=3,
        fixed_shots=True,
        max_new_tokens=256,
        hub="google-research-datasets/mbpp/full",
    ),
    # Instructions
    "ifeval": Task(
        kind="generate",
        read=read_ifeval,
        judge=judge_ifeval,
        stop=[],  # an answer may have any form
        max_new_tokens=1280,
        hub="google/IFEval",
        split="ifeval",
    ),
}
