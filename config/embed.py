# Vectors of texts: a docstring and its function are to be near each other, other functions of the
# batch far (InfoNCE, van den Oord et al. 2018).
#   python prepare.py && python train.py           # data/python and out/python
#   python eval.py config/embed.py --model=out/python    # before: the docstring's nearest function
#   python finetune.py config/embed.py
#   python eval.py config/embed.py --model=out/embed     # after
#   python serve.py --model=out/embed                    # POST /v1/embeddings

# finetune.py
method = "embed"
model = "out/python"
dataset = "python"
out_dir = "out/embed"
pooling = "mean"
batch_size = 64
max_epochs = 3.0
learning_rate = 1e-3
eval_every = 50
eval_examples = 0

# eval.py
tasks = "neighbours"
