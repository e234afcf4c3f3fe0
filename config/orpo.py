# ORPO: demonstrations and preferences in one run, from the pre-trained model.
#   python prepare.py && python train.py           # data/python and out/python
#   python finetune.py config/orpo.py
#   python sample.py config/orpo.py --model=out/orpo

# finetune.py
method = "orpo"
model = "out/python"
dataset = "python"
out_dir = "out/orpo"
max_steps = 150
learning_rate = 2e-3
eval_every = 150
eval_examples = 0

# sample.py
chat = True
