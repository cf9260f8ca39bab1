"""What a GPU is wanted for, in order of value: each part a process of its own, its results kept at once.

    bash bench/gpu_check.sh                                 # everything, within $BUDGET seconds (575)
    PARTS="facts tests step" BUDGET=300 bash bench/gpu_check.sh
    TINY=--tiny bash bench/gpu_check.sh                     # rehearses every part on a CPU, with tiny shapes
    python -m bench.gpu_check step attention [--tiny]       # some parts, in this process

Every result is a line of $OUT/results.jsonl (runs/gpu-check). Random weights and rows: no pretrained model is needed,
and no network. `make gpu-site` collects beforehand what the machine may lack (bench.gpu_site).
"""
