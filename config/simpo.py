# SimPO: the pairs of config/dpo.py, by the mean log-probability of a token, without a reference.
#   python finetune.py config/sft.py               # out/sft
#   python finetune.py config/simpo.py
#   python sample.py config/simpo.py --model=out/simpo

# finetune.py
method = "simpo"
model = "out/sft"
dataset = "python"
out_dir = "out/simpo"
max_steps = 150
learning_rate = 3e-4
eval_every = 50
eval_examples = 0

# sample.py
chat = True
