# RLOO: sums of two digits, as config/grpo.py, with the mean of a prompt's other samples as baseline
# and whole answers as actions.
#   python finetune.py --dataset=arithmetic --out_dir=out/sums --max_epochs=10 --learning_rate=1e-3
#   python rl.py config/rloo.py
#   echo "3 + 4 =" | python sample.py config/rloo.py --model=out/rloo --temperature=0
# 65 seconds of one CPU core. The mean reward of the samples rises from 0.29 (the first 10 steps) to
# 0.91 (the last 10); of one sample of each of the 15 held-out sums, from 0.13 to 0.67, 0.73 at
# best. config/grpo.py on the same machine: from 0.30 to 0.85, and to 0.60, 0.67 at best.

# rl.py
method = "rloo"
model = "out/sums"
dataset = "arithmetic"
reward = "arithmetic"
out_dir = "out/rloo"
batch_size = 32
max_steps = 120
max_epochs = None
group_size = 8
max_new_tokens = 4
kl_weight = 0.02
learning_rate = 3e-4
eval_every = 20

# sample.py
chat = True
