# PPO: sums of two digits, as config/grpo.py, with a value head instead of groups.
#   python finetune.py --dataset=arithmetic --out_dir=out/sums --max_epochs=10 --learning_rate=1e-3
#   python rl.py config/ppo.py
#   echo "3 + 4 =" | python sample.py config/ppo.py --model=out/ppo --temperature=0
# 40 seconds on two CPU cores. The mean reward of the samples rises from 0.25 (the first 10 steps)
# to 0.77 (the last 10); of one sample of each of the 15 held-out sums, from 0.13 to 0.53 at best.

# rl.py
method = "ppo"
model = "out/sums"
dataset = "arithmetic"
reward = "arithmetic"
out_dir = "out/ppo"
batch_size = 64
max_steps = 100
max_epochs = None
max_new_tokens = 4
rl_epochs = 4
kl_weight = 0.05
learning_rate = 5e-4
eval_every = 20

# sample.py
chat = True
