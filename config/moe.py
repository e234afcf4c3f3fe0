# A mixture of experts: 8 in each layer, of which a token is given to 2. It computes as much for a
# token as the default network, whose MLP is as wide as two experts, and has 2.5 times its weights.
#   python prepare.py
#   python train.py config/moe.py
#   python sample.py config/moe.py

# the model
n_experts = 8
n_experts_per_token = 2
expert_hidden = 256

# train.py
out_dir = "out/moe"

# sample.py
model = "out/moe"
