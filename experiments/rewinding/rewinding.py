"""Retraining after each round of pruning: with the learning rate rewound, with the weights, or with neither.

python experiments/run.py rewinding/resnet20
"""

from evidence import SMALL_TITLE, Above, Alike, Study, small

DENSE, RATES, WEIGHTS, TUNED, START = "dense", "LR rewinding", "weight rewinding", "fine-tuning", "rewinding to init"
ROUNDS = (
    *("method=imp", "method.rounds=3", "method.sparsity=null", "method.per_round=0.525", "method.round_length=20ep"),
    "trainer.max_epochs=-1",
)

STUDIES = (
    Study(
        name="rewinding/resnet20",
        title=f"{SMALL_TITLE}, 20 epochs a round, 3 rounds to 10.7 % of the weights",
        question="Which way of retraining is best after pruning?",
        published="ResNet-20 at 10.74 %: LR 91.01, weights 91.00, fine-tuning 89.33, init 86.67 (Renda et al. 2020)",
        recipe=(*(one for one in small(20) if not one.startswith("lr_policy")), "lr_policy.milestones=[10ep,15ep]"),
        arms={
            DENSE: (),
            RATES: ROUNDS,
            WEIGHTS: (*ROUNDS, "method.weights=rewind", "method.rewind_to=2ep", "method.optimizer_state=snapshot"),
            TUNED: (*ROUNDS, "retrain=last"),
            START: (*ROUNDS, "method.weights=rewind", "method.rewind_to=0it", "method.optimizer_state=reset"),
        },
        control=DENSE,
        claims=(Alike(RATES, WEIGHTS, 0.5), Above(RATES, TUNED), Above(WEIGHTS, TUNED), Above(TUNED, START)),
    ),
)
