# The original Transformer (Vaswani et al. 2017) as published, but small: an encoder and a decoder,
# LayerNorm behind each sum, ReLU, sinusoids, embeddings times sqrt(n_embd) that are the head too,
# biases, Xavier's initialization, dropout and label smoothing of 0.1, Adam with its betas, and a
# learning rate that falls with the root of the step. It learns to say numbers in German.
#   python prepare.py config/vaswani.py
#   python train.py config/vaswani.py --max_steps=0 --out_dir=out/vaswani_start
#   python finetune.py config/vaswani.py
#   python eval.py --tasks=seq2seq --dataset=numbers --model=out/vaswani --num_beams=4 --samples
#   python sample.py --model=out/vaswani --temperature=0 --prompt="twenty-one thousand and one"
# train.py writes the untrained network; there is nothing to pre-train on. After 2,000 steps, four
# minutes of one core, 99.2 % of the 2,021 numbers held out are exactly right.

# prepare.py
source = "numbers"  # in English words and in German; those for validation are in no training row
dataset = "numbers"
steps = "exact"
vocab_size = 384  # pieces of words: a thousand, undzwan, ...

# the model
n_encoder_layer = 2
n_layer = 2
n_head = 4
n_kv_head = 4
n_embd = 128
n_hidden = 512
norm = "layer"
norm_place = "post"
norm_eps = 1e-5
qk_norm = False
bias = True
mlp = "relu"
pos = "sinusoidal"
embed_scale = True
tie = True
init = "xavier"
seq_len = 64
objective = "span"  # train.py's for an encoder and a decoder

# finetune.py
method = "seq2seq"
model = "out/vaswani_start"
out_dir = "out/vaswani"
batch_size = 64
max_epochs = None
max_steps = 2000
dropout = 0.1
label_smoothing = 0.1
optimizer = "adamw"
beta1 = 0.9
beta2 = 0.98
lr_schedule = "inverse_sqrt"
warmup_steps = 400
learning_rate = 128**-0.5 * 400**-0.5  # where n_embd ** -0.5 times the schedule has its peak
eval_every = 500
