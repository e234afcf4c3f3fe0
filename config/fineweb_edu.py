# FineWeb-Edu as text (parquet: needs pyarrow), cleaned by its makers already; one file is 0.7 GB.
#   python prepare.py config/fineweb_edu.py --shards=1
# Under torchrun the processes take disjoint files.

# prepare.py
source = "hf:HuggingFaceFW/fineweb-edu/sample/10BT"
dataset = "fineweb_edu"
vocab_size = 32768
val_fraction = 0.005
steps = "url,exact,near"
