# Classification: which of 29 packages of the standard library a function comes from.
#   python prepare.py && python train.py           # data/python and out/python
#   python finetune.py config/classify.py
#   python finetune.py config/classify.py --train_last=2 --out_dir=out/classify-last
# A minute on two CPU cores. On 207 functions of held-out modules: accuracy 0.58, macro F1 0.49.
# Always their most frequent package would be 0.23; always that of the training set, 0.00.
# The mean is read, so the folder is model_type barelm: --pooling=last makes one for transformers.

# finetune.py
method = "classify"
model = "out/python"
dataset = "python"
out_dir = "out/classify"
pooling = "mean"
max_epochs = 3.0
learning_rate = 1e-3
eval_every = 80
eval_examples = 0
