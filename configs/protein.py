"""Secondary structure of proteins, residue by residue, from the sequence alone.

    python train.py --config=configs/protein.py --workdir=runs/protein
    python train.py --config=configs/protein.py:pretrain --workdir=runs/protein_pretrain
    python train.py --config=configs/protein.py:finetune --workdir=runs/protein_finetune
    python train.py --config=configs/protein.py:regression --workdir=DIR \
        --config.data.source=TABLE

The chains are those of NetSurfP-2.0 (Klausen et al. 2019) in FLIP's version (Dallago et
al. 2021): 9,712 for training, 1,080 for validation, and NEW364 for the test. Accuracy
is Q3 over the resolved residues of all chains, 75,402 in the test
(benchmarks/protein.py windows):

    most frequent state of training    38.4 %
    window of 9 residues               55.9 %
    log-odds of 15 residues            61.7 %
    this recipe                        71.65 %

3,200 steps of 3,328 residues (three epochs) on one shared core of an AMD EPYC with
AVX-512 took 28 min 48 s of CPU time, including compilation and evaluations, 39 min 38 s
from start to end, and 2.2 GB of memory; validation: 72.06 %. 1,600 steps with attention
`dot` gave 70.84 %, in 44 min of CPU time with 7 GB.

Published single-sequence models reach 72.57 (SPIDER3-Single, ProteinUnet) and 74.28
(SPOT-1D-Single) on TEST2018, and 71.31, 72.20 and 73.80 on TEST2020 (Singh et al. 2022,
tables 2 and 3). Their test and training sets differ, so these numbers are only a rough
guide.

`pretrain` masks residues of the training chains only; `finetune` starts from it with
the same recipe. After 1,400 steps of pre-training (2.645 nats per masked residue on
validation; 13 min of CPU time), test results for seeds 0, 1 and 2 with
--config.steps=300:

    from scratch     64.36  64.32  64.38 %
    pre-trained      67.56  67.30  67.52 %

With all 3,200 steps, pre-training gains nothing more: 71.69 % (72.16 % on validation),
one seed.

    python train.py --config=configs/protein.py:pretrain --config.steps=1400 \
        --workdir=runs/protein_pretrain
    python sweep.py --config=configs/protein.py --workdir=runs/protein_gain \
        --config.steps=300 --sweep=init_from=runs/protein_pretrain, \
        --sweep=seed=0,1,2

`regression` reads the columns sequence and target of a table, or a FASTA file and its
labels (docs/data.md), and reports Spearman's correlation. On the share of helix of a
chain (benchmarks/protein.py helices), test: .890 after 200 steps from the weights of
'', .766 after 400 steps from scratch, .749 for least squares on the residue counts. To
fine-tune imported ESM-2 weights: --config.model=from:WEIGHTS --config.init_from=WEIGHTS
--config.data.max_len=1026.
"""

from triform.configs.schema import (
    CheckpointConfig,
    EvaluationConfig,
    ExperimentConfig,
    MaskedLMConfig,
    OptimConfig,
    RegressionConfig,
    SequenceClassificationConfig,
    TokenClassificationConfig,
    TokenizerConfig,
    TokenPredictionConfig,
    TransformerConfig,
    smoke,
    vary,
)
from triform.models import ProteinConfig

# Of the longest chain 1,632 residues; most have fewer than 350.
ROWS = {"max_len": 1664, "batch_size": 2, "buckets": (160, 256, 384, 640)}


def _pretrain(config: ExperimentConfig) -> None:
    """Masked residues of the training chains (Rives et al. 2021)."""
    config.model.masked_head, config.model.num_tags = True, 0
    config.data = MaskedLMConfig(
        source="flip_ss3",
        text="sequence",
        next_sentence=False,
        short_rate=0.0,
        tokenizer=TokenizerConfig(kind="residues"),
        **ROWS,
    )
    config.checkpoint.metric, config.checkpoint.mode = "eval/loss", "min"


def _regression(config: ExperimentConfig) -> None:
    """A number for a sequence, from the mean over residues (Dallago et al. 2021)."""
    config.model.num_tags, config.model.num_labels = 0, 1
    config.model.pool, config.model.trunk.max_len = "mean", 0
    config.task = RegressionConfig()
    config.data = SequenceClassificationConfig(
        source="my_proteins.csv",
        first="sequence",
        label="target",
        target="number",
        max_len=512,
        batch_size=16,
        buckets=(128, 256),
        truncate=True,
        tokenizer=TokenizerConfig(kind="residues"),
    )
    config.checkpoint.metric = "eval/spearman"


VARIANTS = {
    "": {},
    "pretrain": _pretrain,
    "finetune": {"init_from": "runs/protein_pretrain"},
    "regression": _regression,
    "smoke": smoke,
}


def get_config(variant: str = "") -> ExperimentConfig:
    """Variants: '' (from scratch), 'pretrain', 'finetune', 'regression', 'smoke'."""
    trunk = TransformerConfig(
        num_layers=4,
        d_model=128,
        num_heads=8,
        d_ff=512,
        max_len=0,
        attention="flash",
        windows=(8, 16, 64, 0),
        positions="relative",
        norm_position="pre",
        norm_eps=1e-5,
        ffn="gelu",
        init="normal",
        dropout=0.1,
    )
    config = ExperimentConfig(
        model=ProteinConfig(trunk, masked_head=False, num_tags=-1, num_labels=0),
        task=TokenPredictionConfig(label_smoothing=0.0),
        data=TokenClassificationConfig(
            source="flip_ss3",
            tokens="sequence",
            tags="ss3",
            mask="mask",
            tokenizer=TokenizerConfig(kind="residues"),
            **ROWS,
        ),
        optim=OptimConfig(
            name="muon",
            learning_rate=3e-3,
            schedule="cosine",
            warmup_steps=100,
            b2=0.98,
            eps=1e-8,
            weight_decay=0.01,
            clip_norm=1.0,
        ),
        evaluation=EvaluationConfig(every=1600, metrics=()),
        checkpoint=CheckpointConfig(
            every=500, keep_newest=1, metric="eval/accuracy", mode="max"
        ),
        steps=3200,
    )
    return vary(config, VARIANTS, variant)
