# TinyStories: two million short stories that a small model can learn to tell.
#   python prepare.py config/tinystories.py
#   python train.py config/tinystories.py
#   python sample.py config/tinystories.py

# prepare.py
source = "tinystories"
dataset = "tinystories"

# the model
n_layer = 6
n_head = 6
n_kv_head = 6
n_embd = 384

# train.py
out_dir = "out/tinystories"
batch_tokens = 32768
max_steps = None
max_minutes = 60
learning_rate = 3e-3

# sample.py
model = "out/tinystories"
prompt = "Once upon a time"
