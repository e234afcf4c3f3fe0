# Supervised fine-tuning: the default model learns to write a function's docstring, and to stop.
#   python prepare.py && python train.py           # data/python and out/python
#   python finetune.py config/sft.py
#   python sample.py config/sft.py --model=out/sft
# 80 seconds on two CPU cores. The loss of the responses in held-out modules falls from 6.18 to
# 4.31. The answers are short docstrings that end by themselves, but say little of the function.

# finetune.py
method = "sft"
model = "out/python"
dataset = "python"
out_dir = "out/sft"
max_epochs = 2.0
learning_rate = 2e-3

# sample.py
chat = True
