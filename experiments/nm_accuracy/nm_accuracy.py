"""What do N:M weights cost in accuracy while the network trains? Each arm beside the dense one, paired by seed.

python experiments/run.py nm_accuracy/digits      # LeNet-300-100 on scikit-learn's digits
python experiments/run.py nm_accuracy/small       # ResNet-20 of half the width on CIFAR-10 at 8x8
python experiments/run.py nm_accuracy/resnet20    # ResNet-20 on CIFAR-10 at 16x16
python experiments/run.py nm_accuracy/long        # the same, twice as long
python experiments/run.py nm_accuracy/steps       # as resnet20, the learning rate in steps
python experiments/run.py nm_accuracy/full --device gpu
"""

from evidence import SMALL_TITLE, Above, Study, full, small

BDWP, STRAIGHT = "method=bdwp", "method=straight_through"
DENSE, BARRED, DECAYED = "dense", "BDWP 2:4", "BDWP 2:4, decay 0.002"
DECAYS = (2e-3, 1e-2, 5e-2)
QUESTION = "What do N:M weights cost in accuracy?"
PUBLISHED = "BDWP at 2:8 loses 0.56 points on average (Fang et al. 2023)"


def at_16(epochs: int, *policy: str) -> tuple[str, ...]:
    """Overrides of a recipe on images of 16x16."""
    size = ("+experiment=resnet20_dense", "dataset.size=16", "dataset.shift=2", f"trainer.max_epochs={epochs}")
    return (*size, *policy, "module.channels_last=true")


STUDIES = (
    Study(
        name="nm_accuracy/digits",
        title="LeNet-300-100, digits",
        question=QUESTION,
        published=PUBLISHED,
        recipe=("+experiment=digits_dense",),
        arms={
            DENSE: (),
            BARRED: (BDWP,),
            "BDWP 1:4": (BDWP, "method.n=1"),
            "STE 2:4": (STRAIGHT, "method.decay=0.0"),
            "SR-STE 2:4": (STRAIGHT,),
            "SR-STE 1:4": (STRAIGHT, "method.n=1"),
            "transposable 2:4": (STRAIGHT, "method.transposable=true", "method.decay=0.0"),
        },
        control=DENSE,
        headline="nm",
        claims=(Above(BARRED, DENSE, -1.0, of="mean"),),
    ),
    Study(
        name="nm_accuracy/small",
        title=f"{SMALL_TITLE}, 10 epochs",
        question=QUESTION,
        published=PUBLISHED,
        recipe=small(10),
        arms={
            DENSE: (),
            BARRED: (BDWP,),
            **{f"BDWP 2:4, decay {decay:g}": (BDWP, f"method.decay={decay}") for decay in DECAYS},
            "STE 2:4": (STRAIGHT, "method.decay=0.0"),
            **{f"SR-STE 2:4, decay {decay:g}": (STRAIGHT, f"method.decay={decay}") for decay in DECAYS},
            "transposable 2:4": (STRAIGHT, "method.transposable=true", "method.decay=0.0"),
            "BDWP 2:8": (BDWP, "method.m=8"),
            "BDWP 1:4": (BDWP, "method.n=1"),
        },
        control=DENSE,
        claims=(*(Above(f"BDWP 2:4, decay {decay:g}", BARRED) for decay in DECAYS), Above("STE 2:4", BARRED)),
        stages=(
            (DENSE, BARRED, *(f"BDWP 2:4, decay {decay:g}" for decay in DECAYS), "STE 2:4"),
            (*(f"SR-STE 2:4, decay {decay:g}" for decay in DECAYS), "transposable 2:4", "BDWP 2:8", "BDWP 1:4"),
        ),
    ),
    Study(
        name="nm_accuracy/resnet20",
        title="ResNet-20, CIFAR-10 at 16x16, 30 epochs",
        question=QUESTION,
        published=PUBLISHED,
        recipe=at_16(30, "lr_policy=cosine"),
        arms={
            DENSE: (),
            BARRED: (BDWP,),
            DECAYED: (BDWP, "method.decay=0.002"),
            "SR-STE 2:4": (STRAIGHT,),
            "STE 2:4": (STRAIGHT, "method.decay=0.0"),
            "BDWP 2:8": (BDWP, "method.m=8"),
        },
        control=DENSE,
        headline="nm",
        claims=(Above(BARRED, DENSE, -1.5), Above(DECAYED, DENSE, -1.5)),
        stages=((DENSE, DECAYED), ("SR-STE 2:4", "STE 2:4", BARRED, "BDWP 2:8")),
        seeds_of=dict.fromkeys((DENSE, DECAYED), range(1, 11)),
    ),
    Study(
        name="nm_accuracy/long",
        title="ResNet-20, CIFAR-10 at 16x16, 60 epochs",
        question=QUESTION,
        published=PUBLISHED,
        recipe=at_16(60, "lr_policy=cosine"),
        arms={DENSE: (), DECAYED: (BDWP, "method.decay=0.002")},
        control=DENSE,
        headline="nm",
        claims=(Above(DECAYED, DENSE, -1.5),),
    ),
    Study(
        name="nm_accuracy/steps",
        title="ResNet-20, CIFAR-10 at 16x16, 30 epochs, learning rate in steps",
        question=QUESTION,
        published=PUBLISHED,
        recipe=at_16(30, "lr_policy.milestones=[15ep,23ep]"),
        arms={DENSE: (), "BDWP 2:4, decay 0.001": (BDWP, "method.decay=0.001")},
        control=DENSE,
        claims=(Above("BDWP 2:4, decay 0.001", DENSE, -1.5),),
    ),
    Study(
        name="nm_accuracy/full",
        title="ResNet-20, CIFAR-10, 182 epochs",
        question=QUESTION,
        published=PUBLISHED,
        headline="nm",
        recipe=full(182),
        arms={
            DENSE: (),
            BARRED: (BDWP,),
            "BDWP 2:8": (BDWP, "method.m=8"),
            "BDWP 1:4": (BDWP, "method.n=1"),
            "SR-STE 2:4": (STRAIGHT,),
            "SR-STE 2:8": (STRAIGHT, "method.m=8"),
            "SR-STE 1:4": (STRAIGHT, "method.n=1"),
            "STE 2:4": (STRAIGHT, "method.decay=0.0"),
            "transposable 2:4": (STRAIGHT, "method.transposable=true", "method.decay=0.0"),
        },
        control=DENSE,
        claims=(Above(BARRED, DENSE, -1.0), Above("SR-STE 2:4", DENSE, -0.5)),
        stages=(
            (DENSE, BARRED),
            ("BDWP 2:8", "BDWP 1:4", "SR-STE 2:4", "SR-STE 2:8", "SR-STE 1:4", "STE 2:4", "transposable 2:4"),
        ),
    ),
)
