# An encoder and a decoder by span corruption, as T5 1.1 (Raffel et al. 2020; Shazeer 2020): what it
# trains opens in transformers as T5ForConditionalGeneration. A few minutes on two cores.
#   python prepare.py
#   python train.py config/t5.py
#   python sample.py config/t5.py
#   python eval.py config/t5.py

# the model
n_encoder_layer = 4
n_layer = 4
n_head = 3
n_kv_head = 3
n_embd = 192
n_hidden = 512
norm = "rms"
qk_norm = False
pos = "relative"
scale_scores = False
mlp = "geglu"
tie = False

# train.py
out_dir = "out/t5"
objective = "span"
seq_len = 256
batch_tokens = 4096
max_steps = 400
warmup_steps = 40
eval_every = 100
save_every = 100

# sample.py, eval.py
model = "out/t5"
prompt = "def main(<extra_id_0>):\n    for i in <extra_id_1>(10):\n        print(<extra_id_2>)\n"
