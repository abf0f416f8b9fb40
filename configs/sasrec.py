"""SASRec: which item a user takes next (Kang & McAuley 2018); BERT4Rec's objective.

    python train.py --config=configs/sasrec.py --workdir=runs/sasrec
    python evaluate.py --workdir=runs/sasrec --split=test
    python generate.py --workdir=runs/sasrec --input="6393 13504 14087" --top_k=5

Published: HR@10 .7410, NDCG@10 .5360 on this corpus ("Games"). A second implementation,
pmixer/SASRec.pytorch (Result_Norm.md), reports .7318 and .5308 with the authors' blocks
and .7442 and .5376 with pre-norm blocks, after up to 1,000 epochs, with the same
protocol. Measured here with that protocol, 200 epochs, and the checkpoint that
validation chose (epoch 200): test .7444 and .5447, which is .003 and .009 above the
paper (over all users, not 10,000: .7440 and .5430); among all items .0638 and .0295.
Popularity reaches .4806 and .2805 (.0189 and .0097 among all items), a first-order
Markov chain .5048 and .3298 (.0729 and .0438 among all items, more than the model).
Validation by epoch, HR@10 and NDCG@10: 20 .7437 .5213, 40 .7695 .5542, 60 .7769 .5630,
80 .7755 .5652, 100 .7775 .5688, 120 .7778 .5724, 160 .7788 .5730, 200 .7794 .5758.

Choices made on validation, over all users, after 60 epochs: standard pre-norm blocks
.7575 and .5395; these without dropout after attention and with dropout inside the
feed-forward network .7590 and .5450; the authors' blocks .7673 and .5538; these with
the moving average of the parameters .7712 and .5621. Standard blocks without the
average: .7296 and .5242 on the test (epoch 140 of 200).

One shared core of an AMD EPYC with AVX-512: 14 minutes of CPU time, including
evaluations, 26 minutes from start to end. Epochs 1 to 100 ran with the same block as a
plugin; a second run continued from there.

`softmax`, 16 epochs: test .6606 and .4914; among all items .0852 and .0434, more hits
than the chain (.0729) and almost its NDCG (.0438); 12 minutes of CPU time. Validation
among all items was still rising: epoch 4 .0517 .0268, 8 .0799 .0412, 12 .0923 .0471, 16
.0983 .0502 (the chain: .0858 .0515). `bert4rec`, 14 epochs: test .7107 and .4985; among
all items .0646 and .0324; 15 minutes of CPU time; validation with the protocol .7326
and .5179, still rising.

Protocol (as in the authors' code): the target is ranked among 100 items that are drawn
uniformly and exclude only training items, for a random 10,000 of 31,013 users. The
input of the test ends with the validation item. The target is also ranked among all
items.

Differences from the authors' code: evaluation uses a moving average of the parameters.
Rows hold several users (16 rows of 50: 135 users on average, each once an epoch); a row
of theirs holds one user, and a batch 128, drawn with repetition. Tables are initialised
from a normal distribution, theirs with Glorot's. Items with equal scores are in random
order. The checkpoint is the best on validation by NDCG@10; theirs prints test results
every 20 epochs. Neither has weight decay. Padding needs no item id here.
"""

from triform.configs.schema import (
    CheckpointConfig,
    EvaluationConfig,
    ExperimentConfig,
    OptimConfig,
    TransformerConfig,
    smoke,
    vary,
)
from triform.data.datasets import InteractionsConfig, MaskedInteractionsConfig
from triform.models import RecommenderConfig
from triform.tasks import ItemPredictionConfig, SampledItemsConfig

EPOCH = 228  # steps: 30,711 users in 3,647 rows
SHORT = {  # a step costs 5 times as much an example: 16 epochs, bert4rec 14
    "data.batch_size": 4,
    "steps": 16 * 4 * EPOCH,
    "evaluation.every": 2 * 4 * EPOCH,
    "checkpoint": {"every": 2 * 4 * EPOCH, "metric": "eval/ndcg_10"},
}

VARIANTS = {
    "": {},
    "softmax": {"task": ItemPredictionConfig(), "data.negatives": 0, **SHORT},
    # Sun et al. 2019 and their code's settings for Amazon's reviews (beauty), but for
    # the learning rate, which is 1e-4 over 400,000 steps there.
    "bert4rec": {
        "model": {"causal": False, "scale": False, "output_layer": True},
        "model.trunk": {
            "d_model": 64,
            "num_heads": 2,
            "d_ff": 256,
            "block": "standard",
            "norm_position": "post",
            "norm_eps": 1e-12,
            "ffn": "gelu",
            "init": "normal",
            "attention_dropout": 0.2,
        },
        "task": ItemPredictionConfig(),
        "data": MaskedInteractionsConfig(mask_rate=0.6),
        "optim": {
            "name": "adamw",
            "schedule": "linear",
            "warmup_steps": 100,
            "b2": 0.999,
            "eps": 1e-6,
            "weight_decay": 0.01,
            "clip_norm": 5.0,
            "ema_decay": 0.0,
        },
        **SHORT,
    },
    "smoke": smoke,
}


def get_config(variant: str = "") -> ExperimentConfig:
    """Variants: '' (the paper), 'softmax', 'bert4rec', 'smoke'."""
    trunk = TransformerConfig(
        num_layers=2,
        d_model=50,
        num_heads=1,
        d_ff=50,
        max_len=0,
        block="query_norm",
        positions="learned",
        norm_position="pre",
        norm_eps=1e-8,
        dropout=0.5,
        attention_dropout=0.5,
    )
    config = ExperimentConfig(
        model=RecommenderConfig(trunk),
        task=SampledItemsConfig(),
        data=InteractionsConfig(),
        optim=OptimConfig(
            name="adam",
            learning_rate=1e-3,
            schedule="constant",
            warmup_steps=0,
            b2=0.98,
            eps=1e-8,
            ema_decay=0.999,  # 4.4 epochs
        ),
        evaluation=EvaluationConfig(every=20 * EPOCH, metrics=()),
        checkpoint=CheckpointConfig(
            every=10 * EPOCH, metric="eval/sampled_ndcg_10", mode="max"
        ),
        steps=200 * EPOCH,
    )
    return vary(config, VARIANTS, variant)
