"""Find a lottery ticket in LeNet-300-100 on real digits, beside its dense network and its controls, and show them.

    python experiments/demo.py              # run folders, table and picture below runs/demo

Everything has the same seed, so differences are those of one draw; experiments/digits_lottery has five and intervals.
"""

import shutil
from pathlib import Path

from digits_lottery.digits_lottery import LABELS, run, run_control

from sparsetrain.report import draw_accuracy, markdown_table

FOLDER = Path("runs/demo")
PICTURE = FOLDER / "accuracy.png"
SEED = 1
CONTROLS = ("random_mask", "reinit")


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)  # an earlier demo's
    found = run("digits_imp", FOLDER / "imp", SEED)
    dense, *rounds = found["rounds"]
    controls = {name: run_control(FOLDER / "imp", len(rounds), name, FOLDER / name, SEED) for name in CONTROLS}

    ticket = (LABELS["ticket"], rounds[-1]["sparsity"], rounds[-1], "imp")
    rows = [(LABELS["dense"], 0.0, dense, "imp/rounds/0"), ticket] + [
        (LABELS[name], summary["sparsity"], summary["rounds"][-1], name) for name, summary in controls.items()
    ]
    lines = [
        (label, f"{sparsity:.2%}", f"{of['val/accuracy']:.2%}", f"{of['test/accuracy']:.2%}", str(FOLDER / folder))
        for label, sparsity, of, folder in rows
    ]
    draw_accuracy(
        PICTURE,
        {"ticket of each round": [(of["sparsity"], [of["test/accuracy"]]) for of in rounds]},
        dense=[dense["test/accuracy"]],
        controls={
            LABELS[name]: [(summary["sparsity"], [summary["test"]["accuracy"]])] for name, summary in controls.items()
        },
    )
    print()
    print(markdown_table(("network", "sparsity", "val accuracy", "test accuracy", "folder"), lines))
    print(f"\nAccuracy against sparsity: {PICTURE}")


if __name__ == "__main__":
    main()
