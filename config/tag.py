# Token classification: which of a function's words are its name, its parameters, what it calls,
# strings, imports; each as spans of words, BIO.
#   python prepare.py && python train.py           # data/python and out/python
#   python finetune.py config/tag.py
#   python sample.py config/tag.py --model=out/tag
#   python eval.py config/tag.py --model=out/tag
# An encoder sees what follows a word, too (a call has a bracket behind it): after
# `python train.py config/bert.py`, config/tag.py --model=out/bert --out_dir=out/tag-bert.

# finetune.py
method = "tag"
model = "out/python"
dataset = "python"
out_dir = "out/tag"
max_epochs = 2.0
learning_rate = 1e-3
eval_every = 100
eval_examples = 0

# sample.py, eval.py
prompt = "def area(width, height):\n    import math\n    return math.floor(width * height), 'm2'\n"
tasks = "tag"
