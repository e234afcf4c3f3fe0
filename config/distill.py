# Distillation: a network of a seventh of the parameters learns to write docstrings from the one
# that config/sft.py made.
#   python finetune.py config/sft.py               # out/sft, the teacher
#   python train.py --n_layer=2 --n_embd=96 --out_dir=out/pupil
#   python finetune.py config/distill.py
#   python sample.py config/distill.py --model=out/distill

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
