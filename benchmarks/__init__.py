"""The benchmark suite, imported as `srcfast_benchmarks`: one file a question, results beside them."""

# What `srcfast bench` runs; the studies are commands of their own.
BENCHMARKS = (
    "linear_logprob",
    "weighted_dpo",
    "pairwise_verdict",
    "nf4",
    "nf4_linear",
    "lora_linear",
    "lora_mlp",
    "rms_norm",
    "rope",
    "swiglu",
    "forest_attention",
    "packing",
)

# Whole stages, in the order of a calibration.
STAGES = ("rationale_step", "candidates", "judging", "dpo_step")

# Stages of a model on the general backbone; on a CPU alone.
GENERAL_STAGES = ("qwen3_vl_candidates", "qwen3_vl_dpo_step")

# What no device has a part in.
HOST = ("growth",)
