"""Train a multi-layer perceptron. `python train.py --help` explains itself; `manual-mlp` is the same, installed."""

from manual_mlp.training.command_line import main

if __name__ == "__main__":
    main()
