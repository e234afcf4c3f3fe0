"""Heads in transformers' words: which class a folder with one is for, and how its file names the
tensors that the network has beside its trunk."""

CLASSES = {  # of a head's task: how the class is called, behind the family's name
    "classify": "ForSequenceClassification",
    "tag": "ForTokenClassification",
    "span": "ForQuestionAnswering",
}
# Where a class calls the head otherwise than `score`, by the family's model_type; "": the rest.
HEADS = {
    "classify": {},
    "tag": {"gpt2": "classifier", "bert": "classifier", "roberta": "classifier"},
    "span": {"": "qa_outputs"},
}
# Families whose trunk is `model` everywhere but in the class that answers questions.
TRANSFORMER = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")
# Families without such a class, or with one that computes something else: their folders are ours.
WITHOUT = {"tag": ("modernbert", "olmoe", "t5"), "span": ("modernbert", "olmoe", "t5")}


def task_of(settings):
    """The task of the head that a config.json, as a dict, says its folder has, or None."""
    named = str(settings.get("architectures"))
    for task, ending in CLASSES.items():
        if ending in named:
            return task
    return None


def has_class(kind, task):
    """Whether transformers has a class for this family's trunk with this head."""
    return kind not in WITHOUT.get(task, ())


def head_renames(kind, task):
    """[(beginning of a name as the family has it, as the class for this task has it)]."""
    pairs = []
    names = HEADS.get(task, {})
    name = names.get(kind, names.get("", "score"))
    if kind != "barelm" and name != "score":
        pairs.append(("score.", f"{name}."))
    if task == "span" and kind in TRANSFORMER:
        pairs.append(("model.", "transformer."))
    return pairs


def to_class(tensors, kind, task):
    """{name: tensor} as the class for this task names them."""
    return renamed(tensors, head_renames(kind, task))


def from_class(tensors, kind, task):
    """{name: tensor, or whatever} as the family names them elsewhere."""
    return renamed(tensors, [(theirs, ours) for ours, theirs in head_renames(kind, task)])


def renamed(tensors, pairs):
    out = {}
    for name, tensor in tensors.items():
        for old, new in pairs:
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        out[name] = tensor
    return out
