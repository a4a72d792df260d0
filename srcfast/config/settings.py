"""Every setting of srcfast in one frozen tree: type, default, bounds, and a docstring that gives meaning and unit.

`srcfast config --schema` shows the docstrings as descriptions. The defaults suit a 7B LVLM on one GPU of 80 GB. Paths are
relative to the working directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from srcfast.config.datasets import YOUNGER_OF_DATASETS, DataConfig, DatasetConfig
from srcfast.config.section import MOST, MOST_NEW_TOKENS, MOST_TOKENS, Section, Seeded
from srcfast.data.file_names import check_file_name
from srcfast.data.records import ReferenceQuality
from srcfast.units import parse_bytes

Preset = Literal["12GiB", "16GiB", "24GiB", "48GiB", "80GiB"]
OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]


# Settings that are younger than version 0.1, whose runs and checkpoints still continue.
YOUNGER = {
    "model": ("backbone",),
    "scorer": (
        "finalists",
        "reference",
        "adaptive_confidence",
        "likelihood_weight",
        "prompt",
        "endpoint_model",
        "endpoint_max_tokens",
    ),
    "lora": ("projector", "tower_layers"),
    "rationale": ("updates",),
    "candidates": ("plain_samples",),
    "curation": ("left_out_negatives", "likelihood_weight", "rationale_pairs", "right_answer"),
    "dpo": ("updates", "preference_weight", "credit", "quality_weight"),
    "scorer_training": ("updates", "qualities", "verdicts", "verdict_share"),
    "evaluation": ("judge_model", "judge_max_tokens"),
}
# Settings on which no result depends: where a server is, and how much it is asked.
NO_RESULT: dict[str, tuple[str, ...]] = {
    "scorer": ("endpoint", "endpoint_concurrency", "endpoint_tokens"),
    "evaluation": ("judge_endpoint", "judge_concurrency", "judge_token_limit"),
}


class ModelConfig(Section):
    """The LVLM that is calibrated."""

    path: str = "embedded"
    """Checkpoint directory of an LVLM, or `embedded` for the small one that srcfast ships"""
    backbone: Literal["auto", "handwritten", "transformers"] = "auto"
    """Who computes the language model: `handwritten` is srcfast's decoder, for LLaVA-1.5 and LLaVA-NeXT; `transformers` is
    transformers' own code, for any family; `auto` takes the first where it fits"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the frozen weights and of activations; the adapter's weights are trained in float32"""
    quantize: Literal["none", "nf4"] = "none"
    """`nf4`: store the weights of the decoder's linear layers in 4 bits (NormalFloat, in blocks with scales). Takes a little more
    than a quarter of the memory of 16 bits; rounds the weights, and costs time to dequantise them"""
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d{1,3})?)$")] = "cpu"
    """`cpu`, `cuda` or `cuda:N`; under torchrun `cuda` is the GPU of the rank"""
    vision_offload: bool = False
    """Hold the vision tower in host memory while no image is encoded. Saves its weights on the GPU; costs a copy to the GPU each
    time images are encoded"""


class ScorerConfig(Section):
    """Stage 3: the R-Scorer, and which candidates it compares."""

    path: str = "embedded"
    """R-Scorer: checkpoint directory of a text LLM, or `embedded`"""
    verdict: Literal["choice", "graded"] = "choice"
    """What the R-Scorer answers: `choice`: first, tie or second; `graded`: a grade from 1 to 5"""
    prompt: Literal["auto", "trained", "instructions"] = "auto"
    """What the R-Scorer reads around references and candidates: `trained`: the prompt of R-Scorers that were trained here;
    `instructions`: for an instruct model that was not; `auto`: instructions for a model with a chat template and without the
    files that are written beside a trained R-Scorer"""
    reference: ReferenceQuality = "complete"
    """What the prompt states of the references: they are `complete`, `noisy` (a detail may be wrong), `partial` (details are
    missing), or the `answer` alone. For an R-Scorer that was trained with `scorer_training.qualities`; a calibration that stands
    beside the R-Scorer is applied by it"""
    mode: Literal["pairwise", "independent"] = "pairwise"
    """`pairwise`: compare all ordered pairs of a sample's candidates; `independent`: rate each candidate alone, cheaper, a
    baseline"""
    token_budget: int = Field(16384, ge=64, le=MOST_TOKENS)
    """Maximum number of tokens in one forward pass. Bounds the memory; scores don't depend on it. A sample whose comparisons
    don't fit is an error"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the R-Scorer's weights and activations. On a GPU prefer float16 to bfloat16, whose scores are eight times as
    coarse"""
    pairs: Literal["all", "adaptive"] = "all"
    """Pairs of a sample's candidates to compare; `adaptive`: rate each candidate alone first, then compare only those that may be
    best or worst. Cheaper, a heuristic"""
    adaptive_margin: float = Field(0.1, ge=0, le=1)
    """With pairs `adaptive`: a candidate whose rating is within this of the highest (lowest) may be the best (worst)"""
    adaptive_contenders: int = Field(2, ge=1, le=128)
    """With pairs `adaptive`: maximum number of candidates that may be best, and of those that may be worst"""
    adaptive_confidence: float = Field(0.0, ge=0, le=1)
    """With pairs `adaptive` or finalists: where the confidence u between the two that score best is below this, twice as many
    contenders are compared, whatever the margin; 0 = never"""
    adaptive_audit: float = Field(0.02, ge=0, le=1)
    """With pairs `adaptive` or finalists: share of samples whose pairs are all compared as well, to report how often both agree;
    0 = none. Costs the full comparison of these samples"""
    finalists: int = Field(0, ge=0, le=128)
    """Rate each candidate alone first, then compare only so many that are rated highest, and as many that are rated lowest; 0 =
    no selection. For samples of many candidates; the measurement of headroom selects likewise"""
    endpoint: str | None = None
    """Address of an OpenAI-compatible server whose model judges instead of an R-Scorer, as http://HOST:PORT/v1; the key is that
    of OPENAI_API_KEY"""
    endpoint_model: str | None = None
    """Name that the server has for the model"""
    endpoint_max_tokens: int = Field(8, ge=1, le=MOST_NEW_TOKENS)
    """Maximum number of tokens of an answer; more for a model that thinks before it replies"""
    endpoint_concurrency: int = Field(8, ge=1, le=1024)
    """Requests at the same time"""
    endpoint_tokens: int = Field(0, ge=0, le=10**15)
    """Tokens of all prompts and answers at most, those of earlier processes of the run included; 0 = no limit"""
    likelihood_weight: float = Field(0.0, ge=0, le=100)
    """With finalists: the highest are those by log rating + this times the log-probability, as in `curation.likelihood_weight`"""

    @model_validator(mode="after")
    def _check_finalists(self) -> Self:
        if self.likelihood_weight and not self.finalists:
            raise ValueError(f"likelihood_weight: expected 0 without finalists, found {self.likelihood_weight}")
        if self.finalists and (self.pairs == "adaptive" or self.mode == "independent"):
            other = "pairs adaptive" if self.pairs == "adaptive" else "mode independent"
            raise ValueError(f"finalists: expected 0 with {other}, found {self.finalists}")
        return self

    @model_validator(mode="after")
    def _check_endpoint(self) -> Self:
        if (self.endpoint is None) != (self.endpoint_model is None):
            raise ValueError("endpoint_model: expected it together with endpoint, found one without the other")
        if self.endpoint is not None and (self.mode, self.verdict, self.pairs, self.finalists) != (
            "pairwise",
            "choice",
            "all",
            0,
        ):
            raise ValueError(
                "endpoint: expected mode pairwise, verdict choice, pairs all and no finalists beside it, found others"
            )
        return self


class LoRAConfig(Seeded):
    """A new LoRA adapter (Hu et al., 2021) on the decoder's linear layers, and on the projector's and tower's if so set."""

    r: int = Field(64, ge=1, le=4096)
    """Rank. The adapter's memory grows in proportion"""
    alpha: float = Field(128.0, gt=0, le=1e12)
    """The adapter's output is scaled by alpha / r"""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability with which a value of the adapter's input is dropped in training; 0 = none"""
    target_modules: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), min_length=1
    )
    """Names of the decoder's linear layers that get an adapter. The default means all of them, also in a model that names them
    otherwise"""
    projector: bool = False
    """Adapt the projector of images, too, which each step then computes. For LLaVA-1.5 and LLaVA-NeXT"""
    tower_layers: int = Field(0, ge=0, le=1000)
    """Adapt so many of the vision tower's last layers, of those that are used, too. Costs time and memory in each step"""


class TrainingConfig(Seeded):
    """The training loop, the same for every stage that trains."""

    _deterministic: bool = PrivateAttr(False)

    epochs: int = Field(1, ge=1, le=100_000)
    """Passes over the items, each in another random order"""
    updates: int = Field(0, ge=0, le=MOST)
    """Number of updates, however many passes that takes; 0 = as `epochs` says"""
    micro_batch_size: int = Field(8, ge=1, le=1 << 16)
    """Maximum number of items (trees) in one forest, that is, in one forward and backward pass. An update has micro_batch_size *
    gradient_accumulation_steps items over all ranks, packed into few forests"""
    gradient_accumulation_steps: int = Field(4, ge=1, le=1 << 16)
    """An update has this many times micro_batch_size items; memory doesn't depend on it"""
    token_budget: int = Field(16384, ge=16, le=MOST_TOKENS)
    """Maximum number of tokens in one forest. Bounds the memory of activations; an update's gradient depends on it by rounding
    alone. An item that doesn't fit is an error"""
    learning_rate: float = Field(1e-4, gt=0, le=1)
    """Peak learning rate"""
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    """Share of the steps for linear warm-up; a cosine follows. 0 = no warm-up"""
    weight_decay: float = Field(0.0, ge=0, le=1000)
    """AdamW's decoupled weight decay, of matrices alone; 0 = none"""
    max_grad_norm: float = Field(1.0, gt=0, le=1e12)
    """Global norm to which gradients are clipped"""
    min_learning_rate_ratio: float = Field(0.0, ge=0, le=1)
    """Learning rate at the end of the cosine, as a share of the peak"""
    optimizer: OptimizerName = "adamw"
    """`adamw`: PyTorch's; the others are bitsandbytes': with 8 bits a moment, and paged ones with moments in memory that the GPU
    shares with the host. They save memory; the host waits for the GPU at every update"""
    activation_checkpointing: Annotated[int, Field(ge=0, le=1024)] | Literal["auto"] = "auto"
    """Layers of a group whose activations are recomputed in the backward pass instead of stored; 0 = none; `auto`: recompute as
    few layers as fit into the device's memory. Saves memory; costs another forward pass of them"""
    loader_workers: int = Field(0, ge=0, le=64)
    """Processes that pack forests and prepare images ahead of the step; 0 = none, all is done in the training's process. Results
    don't depend on it"""

    @property
    def global_batch_size(self) -> int:
        """Items (trees) of one update, over all ranks."""
        return self.micro_batch_size * self.gradient_accumulation_steps

    @property
    def deterministic(self) -> bool:
        """Whether a GPU uses deterministic algorithms alone; `Config.deterministic` says what that costs."""
        return self._deterministic

    def seeded(self, seed: int, deterministic: bool = False) -> Self:
        """Return a copy with this seed, of the items' order and of dropout, and with `deterministic` set."""
        copy = super().seeded(seed)
        copy._deterministic = deterministic
        return copy

    def loop(self) -> dict[str, Any]:
        """Return the settings that the training loop reads, by name, without those of one stage."""
        values = {name: getattr(self, name) for name in TrainingConfig.model_fields}
        if not self.updates:  # younger than checkpoints that still continue
            del values["updates"]
        return values | {"seed": self.seed, "deterministic": self.deterministic}


class RationaleConfig(TrainingConfig):
    """Stage 1: fine-tune the adapter on rationale-answer pairs."""

    format: Literal["tagged", "plain", "answer"] = "tagged"
    """`tagged`: mark visual perception in the response by tags; `plain`: no tags; `answer`: the answer alone, a baseline without
    rationales"""
    samples: int = Field(0, ge=0, le=MOST)
    """Number of samples to draw; 0 = all"""
    teacher: str | None = None
    """JSON lines {id, rationale, answer?} of a teacher model, used in place of the samples' rationales; default: none"""


class CandidatesConfig(Section):
    """Stage 2: sentence-level beam search for candidates."""

    samples: int = Field(0, ge=0, le=MOST)
    """Samples to draw in each iteration; 0 = all"""
    num_candidates: int = Field(8, ge=2, le=256)
    """Maximum number of candidates of a sample (N); they differ in their text"""
    num_beams: int = Field(8, ge=1, le=256)
    """Beams that go on after each sentence"""
    proposals: int = Field(3, ge=1, le=64)
    """Sentences that are sampled to continue each beam. A sample has num_beams * proposals rows in decoding; time and memory grow
    in proportion"""
    temperature: float = Field(1.0, gt=0, le=10)
    """Sampling temperature; log-probabilities are always the model's at temperature 1"""
    top_p: float = Field(0.95, gt=0, le=1)
    """Nucleus sampling: probability mass of the tokens sampled from; 1 = all tokens"""
    max_sentences: int = Field(16, ge=1, le=10_000)
    """Maximum number of sentences of a response"""
    max_sentence_tokens: int = Field(64, ge=1, le=MOST_NEW_TOKENS)
    """Maximum number of tokens of a sentence"""
    max_new_tokens: int = Field(384, ge=1, le=MOST_NEW_TOKENS)
    """Maximum number of tokens of a response. Memory for keys and values grows in proportion"""
    length_penalty: float = Field(1.0, ge=0, le=10)
    """A beam's score is its summed log-probability over tokens ** length_penalty: 1 = mean, 0 = sum"""
    diversity: float = Field(0.5, ge=0, le=1000)
    """What a full overlap of token bigrams with a better beam takes off a beam's score, in nats a token (with length_penalty 1);
    0 = nothing"""
    plain_samples: int = Field(0, ge=0, le=1024)
    """Responses of a sample that are sampled token by token beside the search, at its temperature and top_p; those of new texts
    are further candidates. Time grows in proportion, memory doesn't"""
    batch_size: int = Field(8, ge=1, le=1 << 16)
    """Samples searched at once. Memory for keys and values grows in proportion"""
    cuda_graphs: bool = True
    """Replay decoding steps as CUDA graphs, which takes memory for their workspace; no effect on a CPU"""

    @property
    def width(self) -> int:
        """Rows of a sample that are decoded at once."""
        return self.num_beams * self.proposals


class CurationConfig(Section):
    """Stage 4a: choose preference pairs among the scored candidates, and drop those below the thresholds."""

    pairs_per_sample: int = Field(1, ge=1, le=256 * 255 // 2)
    """Maximum number of pairs of a sample"""
    pair_choice: Literal["best_against_worst", "disjoint"] = "best_against_worst"
    """With several pairs a sample, by rank of the scores: `best_against_worst`: the best against the worst, then against the
    second worst, ...; `disjoint`: best against worst, second best against second worst, ..."""
    min_margin: float = Field(0.1, ge=0, le=1)
    """Minimum difference of the two scores, in [0, 1]"""
    min_confidence: float = Field(0.1, ge=0, le=1)
    """Minimum confidence u of a pair, in [0, 1]; a pair with u = 0 is always dropped"""
    min_rating: float = Field(0.0, ge=0, le=1)
    """Minimum rating that the R-Scorer gives the chosen candidate alone, in [0, 1]: the best of several bad candidates is bad;
    0 = no minimum"""
    max_length_ratio: float = Field(2.0, ge=1, le=MOST_NEW_TOKENS)
    """Maximum ratio of the longer to the shorter response, in tokens"""
    weighting: Literal["confidence", "none"] = "confidence"
    """Weight c of a pair in the loss: `confidence`: its confidence u; `none`: 1 for every pair"""
    pairing: Literal["score", "answer", "random", "gold", "true"] = "score"
    """How pairs are chosen: `score`: by the R-Scorer's scores, as in the paper. Baselines: `answer`: a right against a wrong
    answer; `random`: any two candidates; `gold`: the likeliest candidate with the right answer against the likeliest other one;
    `true`: the sample's rationale and answer against the likeliest candidate. Baselines ignore scores, margin, confidence and
    rating; c = 1"""
    likelihood_weight: float = Field(0.0, ge=0, le=100)
    """With pairing `score`: choose the best by log S + this times its log-probability, in nats, by the policy that wrote it: of
    candidates that the R-Scorer can't tell apart, the likelier one is right more often; 0 = by S alone"""
    right_answer: bool = False
    """With pairing `score`: choose the best among the candidates with the right answer, none where there is none"""
    left_out_negatives: int = Field(0, ge=0, le=64)
    """Further pairs of each chosen response, tagged and of several sentences of perception: it is preferred to itself without one
    of these, with the pair's confidence; at most so many, 0 = none"""
    rationale_pairs: bool = False
    """Of each pair with two answers a further one: the chosen answer after the chosen rationale is preferred to the same answer
    after the rejected one, and the answer alone is credited"""


class DPOConfig(TrainingConfig):
    """Stage 4b: confidence-weighted DPO on the preference pairs."""

    learning_rate: float = Field(1e-5, gt=0, le=1)
    """Peak learning rate"""
    beta: float = Field(0.1, gt=0, le=1e38)
    """Strength of the bond to the reference: the larger, the less the policy departs from it"""
    loss_type: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """Loss of a pair's reward margin Delta: `sigmoid`: -log sigmoid (DPO); `ipo`: squared distance from the target margin (IPO);
    `hinge`: max(0, 1 - Delta) (SLiC)"""
    credit: Literal["response", "sentence"] = "response"
    """Tokens that a pair's preference is credited to: `response`: all; `sentence`: the first sentence in which the two responses
    part, for which the reference is computed anew: reuse_generation_logprobs doesn't apply"""
    label_smoothing: float | Literal["confidence"] = 0.0
    """Probability that a pair's labels are swapped, in [0, 0.5), for loss_type sigmoid alone; `confidence`: (1 - c) / 2, c the
    pair's confidence; 0 = none"""
    preference_weight: float = Field(1.0, ge=0, le=1000)
    """Weight of the preference loss. 0 = none: with sft_weight above 0 the stage then fine-tunes on the chosen responses, each
    weighted by its pair's confidence"""
    sft_weight: float = Field(1.0, ge=0, le=1000)
    """Weight of the mean negative log-likelihood of the chosen response's tokens, added to the loss; 0 = none"""
    quality_weight: float = Field(0.0, ge=0, le=1000)
    """Weight of the quality loss, which pulls the chosen response's reward above 0 and the rejected one's below, each by itself
    (BCO, as in MPO); 0 = none"""
    rehearsal_weight: float = Field(0.0, ge=0, le=1000)
    """Weight of the mean negative log-likelihood of stage 1's rationale-answer pairs, which are then mixed with the preference
    pairs, so that a round takes longer; 0 = none. `srcfast calibrate` alone"""
    reuse_generation_logprobs: bool = True
    """Use the log-probabilities that generation gave the candidates as the reference's, if those of a random part of the pairs,
    computed again, agree within rounding. Saves a forward pass over the pairs. `srcfast calibrate` alone"""

    @model_validator(mode="after")
    def _check_smoothing(self) -> Self:
        smoothing = self.label_smoothing
        if not isinstance(smoothing, str) and not 0 <= smoothing < 0.5:
            raise ValueError(f"label_smoothing: expected confidence or a number in [0, 0.5), found {smoothing}")
        if smoothing and self.loss_type != "sigmoid":
            raise ValueError(f"label_smoothing: expected 0 with loss_type {self.loss_type}, found {smoothing}")
        return self

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if not (self.preference_weight or self.quality_weight or self.sft_weight):
            raise ValueError(
                "sft_weight: expected a number above 0 where preference_weight and quality_weight are 0, found 0: no loss is left"
            )
        return self


class ScorerTrainingConfig(TrainingConfig):
    """`srcfast scorer`: train an R-Scorer on rationales and their corruptions."""

    learning_rate: float = Field(1e-5, gt=0, le=1)
    """Peak learning rate"""
    variants: int = Field(4, ge=2, le=16)
    """Maximum number of candidates of an example: the true rationale and its corruptions"""
    held_out: float = Field(0.1, gt=0, lt=1)
    """Share of the samples that are not trained on, and on which accuracy is measured"""
    qualities: tuple[ReferenceQuality, ...] = Field(("complete",), min_length=1)
    """Qualities of the examples' references, which the prompt states: each example has one of them, drawn evenly"""
    vocabulary: str | None = None
    """YAML of interchangeable words, {class: [word, word, ...]}, from which corruptions are made; default: the words of a
    sample's data family (clips, digits, charts), of others the embedded world's"""
    verdicts: str | None = None
    """JSON lines of verdicts on real candidates, as `srcfast label read` and `srcfast verdicts` write them, to train on beside
    corruptions"""
    verdict_share: float | None = Field(None, gt=0, le=1)
    """Share of the examples that are of verdicts; what there is too much of is left out by lot. 1 = verdicts alone, without data;
    default: all examples of both"""

    @model_validator(mode="after")
    def _check_verdicts(self) -> Self:
        if self.verdict_share is not None and self.verdicts is None:
            raise ValueError(f"verdict_share: expected none without verdicts, found {self.verdict_share}")
        return self


class EvaluationConfig(Section):
    """Evaluation: greedy answers, their intervals, and the headroom that sampling shows."""

    max_new_tokens: int = Field(384, ge=1, le=MOST_NEW_TOKENS)
    """Maximum number of tokens of a response"""
    batch_size: int = Field(32, ge=1, le=1 << 16)
    """Samples decoded at once. Memory for keys and values grows in proportion"""
    cuda_graphs: bool = True
    """Replay decoding steps as CUDA graphs, which takes memory for their workspace; no effect on a CPU"""
    bootstrap_resamples: int = Field(1000, ge=100, le=100_000)
    """Bootstrap resamples behind each 95 % interval"""
    headroom_samples: int = Field(500, ge=0, le=MOST)
    """Maximum number of samples of each evaluation dataset for pass@N and best-of-N, which need candidates and scores; 0 = not
    measured. Only samples that the embedded world's oracle can verify count"""
    judge_endpoint: str | None = None
    """Address of an OpenAI-compatible server (http://HOST:PORT/v1) with a model that scores free answers; needed for evaluation
    sets of the rule `judge` alone. A key is read from the environment variable OPENAI_API_KEY"""
    judge_model: str | None = None
    """The server's name for this model"""
    judge_concurrency: int = Field(8, ge=1, le=256)
    """Requests to the judge at the same time"""
    judge_max_tokens: int = Field(1024, ge=16, le=MOST_NEW_TOKENS)
    """Maximum number of tokens of a reply of the judge"""
    judge_token_limit: int = Field(0, ge=0, le=MOST)
    """Maximum number of tokens, of requests and replies, for the answers of a model to an evaluation set; 0 = no limit"""


class CheckpointConfig(Section):
    """When to checkpoint a training stage; whichever limit is reached first. A stop signal always saves."""

    minutes: float = Field(10.0, ge=0, le=365 * 24 * 60)
    """Minutes between two checkpoints; 0 = no limit by time"""
    steps: int = Field(0, ge=0, le=MOST)
    """Steps between two checkpoints; 0 = no limit by steps"""


class DistributedConfig(Section):
    """Several processes, as torchrun starts them."""

    timeout_seconds: int = Field(600, ge=1, le=7 * 24 * 3600)
    """Maximum time, in seconds, that a rank waits for another; then the run ends with an error. Holds from the end of the first
    step or stage; before it, while models are read, half an hour"""
    shard: bool = False
    """Shard the matrices of the base's layers across the ranks of a node, for a base that doesn't fit on one GPU. Costs time:
    each layer is gathered before it runs"""
    ranks: int = Field(0, ge=0, le=4096)
    """Ranks of a node for `srcfast estimate` to plan with; 0 = one. A run has the ranks that torchrun starts"""


class Config(Section):
    """All settings of a run."""

    name: str = Field("srcfast", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its directory is output/name"""
    output: str = Field("runs", min_length=1)
    """Directory that holds the directories of runs"""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of everything random in the run, except `data`, which has seeds"""
    deterministic: bool = False
    """On a GPU use deterministic algorithms alone, so that a training comes out the same, bit for bit, in every run, interrupted
    or not. Costs time: attention's backward pass and sums by index are slower, and each step encodes its images again. No effect
    on a CPU, where this always holds"""
    iterations: int = Field(1, ge=0, le=100)
    """Rounds of candidates, scores, curation and DPO (K); 0 = stage 1 and evaluation alone"""
    max_rejected: int | float = Field(1000, ge=0, le=MOST)
    """Maximum number of bad records before the run stops, or, with a decimal point, their maximum share, in [0, 1]; 0 = the first
    bad record stops the run"""
    quiet: bool = False
    """Show no progress and no tables"""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    """Programs that draw curves, to which rank 0 logs each step and the results of stages, too. They write below the run's
    directory and send nothing, unless the user's environment names a server. `pip install 'srcfast[NAME]'` brings one"""
    threads: int = Field(0, ge=0, le=4096)
    """CPU threads of PyTorch; 0 = PyTorch's default"""
    preset: Preset | None = None
    """Settings for a 7B LVLM on a GPU of this memory (srcfast/config/presets). A setting in a file or on the command line wins
    over the preset's"""
    memory: str | None = None
    """Memory of the device that the run may use, such as 12GiB: plans count with it, and on a GPU no more can be allocated;
    default: all"""
    model: ModelConfig = ModelConfig()
    scorer: ScorerConfig = ScorerConfig()
    data: DataConfig = DataConfig()
    lora: LoRAConfig = LoRAConfig()
    rationale: RationaleConfig = RationaleConfig()
    candidates: CandidatesConfig = CandidatesConfig()
    curation: CurationConfig = CurationConfig()
    dpo: DPOConfig = DPOConfig()
    scorer_training: ScorerTrainingConfig = ScorerTrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    distributed: DistributedConfig = DistributedConfig()

    @model_validator(mode="after")
    def _check_max_rejected(self) -> Self:
        if isinstance(self.max_rejected, float) and self.max_rejected > 1:
            raise ValueError(
                f"max_rejected: expected a whole number or a share of at most 1, found {self.max_rejected}"
            )
        return self

    @field_validator("name", mode="before")
    @classmethod
    def _check_name(cls, value: Any) -> Any:
        folder, _, name = str(value).rpartition("/")
        if folder and name:
            fix = f"Fix: output=runs/{folder} name={name}, with what output is now in place of runs"
            raise ValueError(f"expected the name of a folder in output, no path, found {value!r}. {fix}")
        return check_file_name(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_true_rationales(self) -> Self:
        degraded = [dataset.name for dataset in self.data.train if dataset.reference != "complete"]
        if self.curation.pairing == "true" and degraded:
            raise ValueError(f"curation.pairing: expected no true with the reference of {degraded[0]!r}, found true")
        return self

    @field_validator("memory")
    @classmethod
    def _check_memory(cls, value: str | None) -> str | None:
        if value is not None:
            parse_bytes(value, "memory")
        return value

    def identity(self) -> dict[str, Any]:
        """Return the settings as JSON values by section, by which unfinished work is known again.

        A setting that is younger than work which may have to be continued is left out while it has its default. Where an endpoint
        is and how much it is asked decides nothing; its model does.
        """
        values = self.model_dump(mode="json")
        del values["trackers"]  # which change no result
        for section, names in NO_RESULT.items():
            for name in names:
                del values[section][name]
        for section, names in YOUNGER.items():
            settings = getattr(self, section)
            for name in names:
                if getattr(settings, name) == getattr(type(settings)(), name):
                    del values[section][name]
        for dataset in (*values["data"]["train"], *values["data"]["evaluation"]):
            for name in YOUNGER_OF_DATASETS:
                if dataset[name] == DatasetConfig.model_fields[name].default:
                    del dataset[name]
        return values

    @property
    def run_path(self) -> Path:
        """The run's directory, output/name."""
        return Path(self.output) / self.name
