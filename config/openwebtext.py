# OpenWebText, The Pile and their like: JSONL files with a `text` a line, cleaned as C4 was.
#   python prepare.py config/openwebtext.py --source='openwebtext/*.jsonl.gz'

# prepare.py
source = "openwebtext/*.jsonl.gz"
dataset = "openwebtext"
tokenizer = "gpt2"
val_fraction = 0.005
steps = "unicode,length,gopher_repetition,gopher_quality,c4,url,exact,near"
