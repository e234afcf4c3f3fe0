# KTO: the docstrings of config/dpo.py, each of them alone with a thumb up or down.
#   python finetune.py config/sft.py               # out/sft
#   python finetune.py config/kto.py
#   python sample.py config/kto.py --model=out/kto

# finetune.py
method = "kto"
model = "out/sft"
dataset = "python"
out_dir = "out/kto"
max_steps = 300
learning_rate = 3e-4
eval_every = 100
eval_examples = 0

# sample.py
chat = True
