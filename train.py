"""Train a network: `python train.py +experiment=digits_gmp`. The console script `sparsetrain-train` is the same."""

from sparsetrain.cli.train import main

if __name__ == "__main__":
    main()
