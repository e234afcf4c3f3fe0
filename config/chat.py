# A chat to have at the end: a helper for Python's standard library, from scratch, in eleven minutes
# on two cores and without a network. docs/chat.md says what it can and what it cannot.
#   python prepare.py config/chat.py     # data/chat: conversations whose answers Python gives
#   python train.py config/chat.py       # out/chat_base: their text
#   python finetune.py config/chat.py    # out/chat: who says what, and when to stop
#   python sample.py config/chat.py      # or python serve.py config/chat.py
#   python eval.py config/chat.py        # how many of the answers to unseen questions are right

# prepare.py
source = "pychat"
dataset = "chat"
steps = ""  # a question may come twice
val_fraction = 0.02
vocab_size = 2048

# the model: 3.7M parameters
n_layer = 4
n_head = 4
n_kv_head = 4
n_embd = 256
seq_len = 256

# _script is the name of the script that reads this: two of them need other values.
if _script == "train.py":
    out_dir = "out/chat_base"
    max_steps = 900
    eval_every = 300
    eval_tokens = 16384
if _script == "finetune.py":
    model = "out/chat_base"
    out_dir = "out/chat"
    optimizer = "muon"
    learning_rate = 3e-3
    batch_size = 32
    eval_examples = 100
if _script in ("sample.py", "serve.py", "eval.py"):
    model = "out/chat"
    temperature = 0.0

# sample.py, eval.py
chat = True
tasks = "barelm/python_chat.py:held_out"
