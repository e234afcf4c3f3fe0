"""Rows made for the tests of benchmarks, in the form in which the Hub has them, and the same tasks
of lm-evaluation-harness on them, with nothing downloaded."""

import importlib.util
import sys
from pathlib import Path

WINOGRANDE = [
    (
        "The trophy does not fit into the suitcase because the _ is too large.",
        "trophy",
        "suitcase",
        1,
    ),
    ("Ann asked Beth for help because _ knew the way.", "Ann", "Beth", 2),
    ("The ball broke the table because the _ was made of paper.", "ball", "table", 2),
    ("Sam paid Tom after _ had mended the roof.", "Sam", "Tom", 2),
    ("The dog chased the cat until the _ climbed a tree.", "dog", "cat", 2),
    ("Kim lent Lee a coat because _ was cold _ and wet.", "Kim", "Lee", 2),
    ("The rain fell on the roof and the _ became wet.", "rain", "roof", 2),
    ("The man could not lift his son because the _ was so weak.", "man", "son", 1),
]
PIQA = [
    (
        "How do you boil an egg?",
        "Put it into hot water for eight minutes.",
        "Put it into the freezer.",
        0,
    ),
    ("To dry wet shoes,", "fill them with water", "fill them with newspaper", 1),
    ("open a jar", "Turn its lid. ", "Turn the table.", 0),
    ("How do I cut bread", "with a spoon", "with a knife", 1),
    ("Keep milk fresh.", "Keep it in the fridge.", "Keep it in the sun.", 0),
    ("clean a window", "Use mud and 'sand'.", 'Use water and "soap".', 1),
    ("To write on a blackboard, use", "chalk", "cheese", 0),
    ("Stop a bicycle", "Pull the brakes", "Ring the bell", 0),
]
BOOLQ = [
    ("Water boils at 100 degrees Celsius at sea level.", "does water boil at 100 degrees", 1),
    ("The Sahara is a desert in Africa.\nIt is dry.", "is the sahara in asia", 0),
    ("Cats are mammals.", "are cats mammals", 1),
    ("Penguins are birds that cannot fly.", "can penguins fly", 0),
    ("The Rhine flows through Germany.", "does the rhine flow through germany", 1),
    ("Gold is a metal.", "is gold a gas", 0),
    ("Snow is frozen water.", "is snow made of water", 1),
    ("The Moon goes around the Earth.", "does the earth go around the moon", 0),
]
OPENBOOK = [
    ("The sun is", ["a star", "a planet", "a moon", "a stone"], "A"),
    ("Plants need light to", ["walk", "grow", "sing", "sleep"], " B"),
    ("Ice melts when it gets", ["cold", "dark", "warm", "old"], "C"),
    ("A magnet attracts", ["wood", "glass", "paper", "iron"], "D"),
    ("Which of these is an animal?", ["a horse", "a rose", "a rock", "a lamp"], "A"),
    ("Rain falls from", ["the sea", "clouds", "trees", "the moon"], "B"),
    ("A fish breathes with", ["fins", "scales", "gills", "its tail"], "C"),
    ("Wind can turn", ["a mill", "a wall", "a hill", "night into day"], "A"),
]
COPA = [
    (
        "The man broke his toe.",
        "He got a hole in his sock.",
        "He dropped a hammer on his foot.",
        "cause",
        1,
    ),
    ("It began to rain.", "She opened her umbrella.", "She lit a candle.", "effect", 0),
    ("The glass fell to the floor. ", "It broke.", "It grew.", "effect", 0),
    ("The boy was tired.", "He had slept well.", "He had run all day.", "cause", 1),
    ("The soup was too hot.", "I waited for a while.", "I ate it at once.", "effect", 0),
    ("The plant died.", "Nobody watered it.", "Somebody watered it.", "cause", 0),
    ("The road was icy.", "The car slid.", "The car flew.", "effect", 0),
    ("The baby cried.", "It was happy.", "It was hungry.", "cause", 1),
]
COMMONSENSE = [
    (" Where do you keep milk?", ["fridge", "oven", "shoe", "garden", "lamp"], "A"),
    ("What do you use to write?", ["fork", "pen", "bed", "car", "rain"], "B"),
    ("Where do fish live?", ["tree", "desert", "water", "sky", "book"], "C"),
    ("What is hot?", ["snow", "ice", "frost", "fire", "hail"], "D"),
    ("Who teaches children?", ["cook", "driver", "sailor", "baker", "teacher"], "E"),
    ("What do cows give? ", ["milk", "wool", "eggs", "honey", "silk"], "A"),
    ("When do stars shine?", ["noon", "night", "morning", "lunch", "never"], "B"),
    ("Where can you borrow books?", ["bank", "bakery", "library", "stable", "pool"], "C"),
]
LAMBADA = [
    "She opened the door, and the dog ran out of the door",
    "He had a red hat and a blue hat , and he wore the red hat",
    '"Where is the key?" he asked. She had lost the key',
    "The cat sat on the mat because it was warm on the mat",
    "One, two, three, four, five, six, seven, eight, nine, ten",
    "Paris is the capital of France and Berlin is the capital of Germany",
    "first line\nsecond line, and then the third line",
    "We went to the sea to swim in the sea",
]
TRIVIA = [
    ("What is the capital of France", ["Paris", "City of Light"]),
    ("Who wrote Hamlet", ["William Shakespeare", "Shakespeare", "Will Shakespeare"]),
    ("How many days has a week", ["seven", "7"]),
    ("What is the largest ocean", ["Pacific", "the Pacific", "Pacific Ocean", "The Pacific Ocean"]),
    ("What gas do we breathe", ["oxygen", "O2"]),
    ("Which planet is red", ["Mars", "planet Mars"]),
    ("What is H2O", ["water", "Water!"]),
    ("Who painted the Mona Lisa", ["Leonardo da Vinci", "Da Vinci", "Leonardo"]),
]  # fmt: skip

HELLASWAG = [
    ("Baking", "A man mixes flour.", "he", ["eats the bowl.", "bakes [title] bread."], "1"),
    ("Running", "A woman ties her shoes.", "she", ["runs off.", "flies off."], "0"),
    ("Swimming", "The boy jumps. [step] He dives.", "the water", ["splashes.", "burns."], "0"),
    ("Sewing", "Two girls sew.  They talk.", "", ["The dress is done.", "The sea dries."], "0"),
    ("Fishing", "A boat is on a lake.", "an old man", ["catches a car.", "catches a fish."], "1"),
    ("Painting", "A wall is white.", "a painter", ["paints it.", "drinks it."], "0"),
    ("Skiing", "The hill is steep.", "the skier", ["goes up.", "goes down."], "1"),
    ("Cooking", "Water boils.", "the cook", ["adds salt.", "adds sand."], "0"),
]

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo",
    "Russia": "Moscow", "China": "Beijing", "Egypt": "Cairo", "Greece": "Athens",
    "Norway": "Oslo", "Poland": "Warsaw", "Austria": "Vienna", "Sweden": "Stockholm",
    "Portugal": "Lisbon",
}  # fmt: skip


def dicts(keys, rows):
    return [dict(zip(keys.split(), row)) for row in rows]


def lettered(keys, rows):
    labels = list("ABCDE")
    made = []
    for question, texts, answer in rows:
        choices = {"text": texts, "label": labels[: len(texts)]}
        made.append(dict(zip(keys.split(), (question, choices, answer))))
    return made


ROWS = {
    "hellaswag": dicts("activity_label ctx_a ctx_b endings label", HELLASWAG),
    "winogrande": [
        row | {"answer": str(row["answer"])}
        for row in dicts("sentence option1 option2 answer", WINOGRANDE)
    ],
    "piqa": dicts("goal sol1 sol2 label", PIQA),
    "boolq": dicts("passage question label", BOOLQ),
    "openbookqa": lettered("question_stem choices answerKey", OPENBOOK),
    "copa": dicts("premise choice1 choice2 question label", COPA),
    "commonsense_qa": lettered("question choices answerKey", COMMONSENSE),
    "lambada_openai": [{"text": text} for text in LAMBADA],
    "triviaqa": [{"question": q, "answer": {"aliases": a, "value": a[0]}} for q, a in TRIVIA],
}
N_EXAMPLES = 3  # of each task's rows: the shots are drawn from them
FILES = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "copa": "super_glue/copa/default.yaml",
    "commonsense_qa": "commonsense_qa/default.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "triviaqa": "triviaqa/default.yaml",
}


def core_rows_by_kind():
    """{kind: rows} of CORE that a language model knows something about."""
    choices = []
    for question, texts, answer in OPENBOOK + COMMONSENSE:
        gold = "ABCDE".index(answer.strip())
        choices.append({"query": question.strip(), "choices": texts, "gold": gold})
    schemas = []
    for sentence, first, second, right in WINOGRANDE * 2:
        before, _, behind = sentence.partition("_")
        row = {"context_options": [before + first, before + second], "gold": right - 1}
        schemas.append(row | {"continuation": behind.strip()})
    facts = []
    for country, city in CAPITALS.items():
        facts.append({"context": f"The capital of {country} is ", "continuation": city})
    return {"multiple_choice": choices, "schema": schemas, "language_modeling": facts}


def split_rows(name):
    """(examples, questions) of a task's rows; of LAMBADA, which has no examples, none."""
    if name == "lambada_openai":
        return [], ROWS[name]
    return ROWS[name][:N_EXAMPLES], ROWS[name][N_EXAMPLES:]


def harness_task(name, shots, **more):
    """lm_eval's task of its own file, on the rows above."""
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    folder = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
    config = load_yaml(folder / FILES[name], resolve_func=True)
    examples, questions = split_rows(name)

    def made(**_):
        splits = {"validation": questions, "test": questions}
        if examples:
            splits["train"] = examples
        return {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}

    config |= {"custom_dataset": made, "num_fewshot": shots} | more
    config.pop("tag", None)
    if config.get("test_split") is None:
        config.pop("test_split", None)
    task = ConfigurableTask(config=config)
    task.set_fewshot_seed(1234)
    return task


if __name__ == "__main__":
    sys.exit("helper of test_benchmarks.py and long_benchmarks.py")
