# An encoder by masked tokens, as ModernBERT (Warner et al. 2024): what it trains opens in
# transformers as ModernBertForMaskedLM. A few minutes on two cores.
#   python prepare.py
#   python train.py config/bert.py
#   python sample.py config/bert.py --prompt="import [MASK]"
#   python eval.py config/bert.py

# the model
causal = False
n_layer = 6
n_head = 3
n_kv_head = 3
n_embd = 192
n_hidden = 512
norm = "layer"
norm_eps = 1e-5
embed_norm = True
first_norm = False
qk_norm = False
mlp = "geglu_erf"
mlm_head = True
rope_theta = 160000.0
local_rope_theta = 10000.0
window = 128  # 64 tokens on each side
layers = "LSS"

# train.py
out_dir = "out/bert"
objective = "mlm"
mask_rate = 0.3  # more targets a step (Wettig et al. 2023)
seq_len = 256
batch_tokens = 4096
max_steps = 400
warmup_steps = 40
eval_every = 100
save_every = 100

# sample.py, eval.py
model = "out/bert"
prompt = "import os\n\n\ndef main([MASK]):\n    for i in [MASK](10):\n        print([MASK])\n"
top_k = 5
