# LoRA: the SFT of config/sft.py with added matrices alone, 9 % of the parameters.
#   python prepare.py && python train.py           # data/python and out/python
#   python finetune.py config/lora.py
#   python sample.py config/lora.py --model=out/lora
# and with the frozen weights in 4 bits:
#   python finetune.py config/lora.py --method=qlora --out_dir=out/qlora
# A minute on two CPU cores. The loss of the responses in held-out modules falls from 6.18 to 4.71;
# config/sft.py reaches 4.41 in as many steps. out/lora is a PEFT adapter of out/python.

# finetune.py
method = "lora"
model = "out/python"
dataset = "python"
out_dir = "out/lora"
lora_rank = 16
lora_alpha = 32.0
lora_targets = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
learning_rate = 5e-3
check_memorized = 0

# sample.py
chat = True
