# GPT-2 (124M) as nanoGPT trains it: LayerNorm, learned positions, GELU, biases, AdamW. What it
# trains opens in transformers as GPT2LMHeadModel.
#   python prepare.py config/gpt2.py
#   torchrun --nproc_per_node=8 train.py config/gpt2.py

# prepare.py
source = "fineweb10B"
dataset = "fineweb10B"

# the model
n_layer = 12
n_head = 12
n_kv_head = 12
n_embd = 768
norm = "layer"
norm_eps = 1e-5
qk_norm = False
bias = True
pos = "learned"
mlp = "gelu"
seq_len = 1024

# train.py
out_dir = "out/gpt2"
batch_tokens = 491520  # 12 x 1024 x 5 x 8
max_steps = 600_000
optimizer = "adamw"
learning_rate = 6e-4
min_lr = 0.1
warmup_steps = 2000
eval_every = 1000
eval_tokens = 10_485_760
save_every = 1000

# sample.py
model = "out/gpt2"
prompt = "The meaning of life is"
