# A mix of sources by share of the tokens: {"name": (share, source)}. A small source is repeated:
# meta.json says how many epochs that makes. train.py reports the validation loss of each source.
#   python prepare.py config/mix.py
#   python train.py config/mix.py

# prepare.py
sources = {"prose": (0.3, "shakespeare"), "code": (0.7, "python")}
dataset = "mix"
mix_tokens = 4_000_000

# train.py
out_dir = "out/mix"

# sample.py
model = "out/mix"
