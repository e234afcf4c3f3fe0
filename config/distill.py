# Distillation: a network of a quarter of the parameters learns to write docstrings from the one
# that config/sft.py made.
#   python finetune.py config/sft.py               # out/sft, the teacher
#   python train.py --n_layer=2 --n_embd=96 --out_dir=out/pupil
#   python finetune.py config/distill.py
#   python sample.py config/distill.py --model=out/distill
# 138 seconds of one CPU core (sft: 80). The loss of the responses in held-out modules falls from
# 6.44 to 4.48, where config/sft.py makes it 4.56 (--model=out/pupil) and the teacher has 4.33; the
# divergence from the teacher falls from 2.80 to 0.39.

# finetune.py
method = "distill"
teacher = "out/sft"
model = "out/pupil"
dataset = "python"
out_dir = "out/distill"
max_epochs = 2.0
learning_rate = 2e-3

# sample.py
chat = True
