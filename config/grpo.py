# GRPO: sums of two digits. The reward is 1 for the right number, else 0; a sample is compared with
# the other samples of its prompt. A short SFT comes first.
#   python finetune.py --dataset=arithmetic --out_dir=out/sums --max_epochs=10 --learning_rate=1e-3
#   python rl.py config/grpo.py
#   echo "3 + 4 =" | python sample.py config/grpo.py --model=out/grpo --temperature=0
# A minute on two CPU cores. The mean reward of the samples rises from 0.25 (the first 10 steps) to
# 0.74 (the last 10); of one sample of each of the 15 held-out sums, from 0.13 to 0.53 at best.

# rl.py
method = "grpo"
model = "out/sums"
dataset = "arithmetic"
reward = "arithmetic"
out_dir = "out/grpo"
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
