"""Tickets of LeNet-300-100 on MNIST beside the dense network, random masks and another initialisation.

python experiments/run.py tickets/mnist
"""

from evidence import Above, Study

DENSE, TICKET, RANDOM, REINIT = "dense", "ticket, 3.1%", "random mask, 3.1%", "other initialisation, 3.1%"
ROUNDS = (
    "method=lottery",
    "method.sparsity=null",
    "method.round_length=10ep",
    "method.rewind_to=0it",
    "trainer.max_epochs=-1",
)


def _control(name: str) -> tuple[str, ...]:
    ticket = "method.ticket='{runs}/ticket,-3.1%-{seed}/ticket.safetensors'"
    return (*ROUNDS, "method.rounds=0", ticket, f"method.control={name}", "init_seed=100{seed}")


STUDIES = (
    Study(
        name="tickets/mnist",
        title="LeNet-300-100, MNIST, 10 epochs a round, 5 rounds",
        question="Do tickets owe their accuracy to masks and initialisation?",
        published="tickets of a few per cent as good as dense, reinitialised ones not (Frankle & Carbin 2019)",
        recipe=(
            *("+experiment=digits_dense", "dataset=mnist", "dataset.batch_size=128"),
            *("trainer.max_epochs=10", "lr_policy.warmup=200it"),
        ),
        arms={
            DENSE: (),
            TICKET: (*ROUNDS, "method.rounds=5", "method.per_round=0.5"),
            RANDOM: _control("random_mask"),
            REINIT: _control("reinit"),
        },
        control=DENSE,
        claims=(Above(TICKET, DENSE, -0.3), Above(TICKET, REINIT), Above(TICKET, RANDOM)),
        stages=((DENSE, TICKET), (RANDOM, REINIT)),
    ),
)
