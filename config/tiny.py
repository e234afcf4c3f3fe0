# Seconds instead of minutes, on any machine: what the tests use, and a quick check of a change.
#   python prepare.py config/tiny.py
#   python train.py config/tiny.py
#   python sample.py config/tiny.py

# prepare.py
dataset = "tiny"
max_documents = 150
vocab_size = 512

# the model
n_layer = 2
n_head = 4
n_kv_head = 2
n_embd = 64
n_hidden = 128

# train.py
out_dir = "out/tiny"
seq_len = 64
batch_tokens = 1024
max_steps = 60
eval_every = 30
eval_tokens = 8192
save_every = 30
warmup_steps = 5

# sample.py
model = "out/tiny"
