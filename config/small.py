# 124M parameters on 10 billion tokens of FineWeb, for eight GPUs:
#   python prepare.py config/small.py
#   torchrun --nproc_per_node=8 train.py config/small.py

# prepare.py
source = "fineweb10B"
dataset = "fineweb10B"

# the model: 12 layers of width 768
n_layer = 12
n_head = 12
n_kv_head = 12
n_embd = 768
seq_len = 1024

# train.py
out_dir = "out/small"
batch_tokens = 524288
max_steps = None
max_tokens = 10_000_000_000
learning_rate = 2e-3
lr_schedule = "trapezoid"
warmup_steps = 200
eval_every = 250
eval_tokens = 10_485_760
save_every = 1000

# sample.py
model = "out/small"
prompt = "The meaning of life is"
