# KTO: the docstrings of config/dpo.py, each of them alone with a thumb up or down.
#   python finetune.py config/sft.py               # out/sft
#   python finetune.py config/kto.py
#   python sample.py config/kto.py --model=out/kto
# 150 seconds of one CPU core. On pairs of held-out modules the right docstring gains on the other
# one in 0.76 of them (config/dpo.py: 0.77), by 7 nats on average: both lose, by 8 and by 15. The
# loss falls from 0.50 to 0.45; z_0 stays 0.

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
