# Wikipedia, one article a document: the Hub's extract (parquet: needs pyarrow), or a dump of yours
# as JSONL with `url` and `text`:
#   python prepare.py config/wikipedia.py
#   python prepare.py config/wikipedia.py --source='dump/*.jsonl.gz'

# prepare.py
source = "hf:wikimedia/wikipedia/20231101.simple"
dataset = "wikipedia"
vocab_size = 16384
val_fraction = 0.01
steps = "unicode,length,url,exact,near"
min_chars = 500
