"""Small parts that are trained in a network's place."""

import torch.nn as nn
import torch.nn.functional as F


class Adapter(nn.Module):
    """A linear layer and a bottleneck behind it (Houlsby et al. 2019), which starts as nothing."""

    def __init__(self, base, size):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.out_features, size, device=base.weight.device)
        self.up = nn.Linear(size, base.out_features, device=base.weight.device)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        y = self.base(x)
        return y + self.up(F.gelu(self.down(y)))


def add_adapters(net, size):
    """Put a bottleneck of this size behind each attention and each MLP, in place."""
    net.adapter_size = size
    for block in net.model.layers:
        block.self_attn.o_proj = Adapter(block.self_attn.o_proj, size)
        block.mlp.down_proj = Adapter(block.mlp.down_proj, size)
