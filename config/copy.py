# The copy task: 48 random letters, a bar, and the same letters. What is to be written stands 49
# tokens back, so that a kind of attention shows what it can look at (docs/positions.md).
#   python prepare.py config/copy.py
#   python train.py config/copy.py --out_dir=out/full
#   python train.py config/copy.py --out_dir=out/sliding --window=16
#   python train.py config/copy.py --out_dir=out/strided --window=16 --attention=strided
#   python eval.py config/copy.py --model=out/full

# prepare.py
source = "copy:48"
dataset = "copy"
steps = "exact"
tokenizer = "char"

# the network
n_layer = 2
n_head = 4
n_kv_head = 4
n_embd = 64

# train.py
seq_len = 98  # a document
batch_tokens = 3136
max_steps = 500
eval_every = 250
save_every = 500
sample_tokens = 0

# eval.py
tasks = "barelm/synthetic.py:copied"
