# Tiny Shakespeare in two minutes on two CPU cores.
#   python prepare.py config/shakespeare.py
#   python train.py config/shakespeare.py
#   python sample.py config/shakespeare.py

# prepare.py
source = "shakespeare"
dataset = "shakespeare"
vocab_size = 1024

# the model
n_layer = 4
n_head = 4
n_kv_head = 4
n_embd = 128
seq_len = 128

# train.py
out_dir = "out/shakespeare"
batch_tokens = 2048
max_steps = 500
learning_rate = 5e-3
eval_every = 250
eval_tokens = 0  # every validation position, once
save_every = 250
sample_prompt = "ROMEO:\n"

# sample.py
model = "out/shakespeare"
prompt = "ROMEO:\n"
