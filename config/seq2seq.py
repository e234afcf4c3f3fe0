# An encoder-decoder reads a function and writes its docstring.
#   python prepare.py && python train.py config/t5.py    # data/python and out/t5
#   python finetune.py config/seq2seq.py
#   python eval.py --tasks=seq2seq --model=out/seq2seq --num_beams=4
# The decoder of config/sft.py answers the same functions, to compare with:
#   python eval.py --tasks=seq2seq --model=out/sft \
#       --source_template="Write the docstring of this function.\n\n{source}"

# finetune.py
method = "seq2seq"
model = "out/t5"
dataset = "python"
out_dir = "out/seq2seq"
max_epochs = 2.0
learning_rate = 2e-3
