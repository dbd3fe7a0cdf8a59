"""RECAP over any losses, in a plain PyTorch loop.

One small network learns three things from scikit-learn's handwritten digits: the class and the
amount of ink, by supervision, and, by reinforcement, a bet on whether the digit is odd. They have
nothing in common but that each has a mean a step, which is all that the reweighter asks for.

    pip install scikit-learn
    python examples/own_loop.py
"""

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy, mse_loss

from recap_fast import make_reweighter

NAMES = ("class", "ink", "odd")


def main(steps: int = 300) -> torch.Tensor:
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 13))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    # What each objective's value is: "loss" improves by falling, "reward" by rising.
    kinds = ["loss", "loss", "reward"]
    reweighter = make_reweighter("recap", 3, window=10, temperature=0.5, signals=kinds)
    for step in range(1, steps + 1):
        rows = torch.randint(len(images), (128,))
        by_class, ink, bets = model(images[rows]).split([10, 1, 2], dim=1)
        policy = torch.distributions.Categorical(logits=bets)
        bet = policy.sample()
        reward = (bet == labels[rows] % 2).float()
        losses = torch.stack([
            cross_entropy(by_class, labels[rows]),
            mse_loss(ink[:, 0], images[rows].mean(1)),
            -((reward - reward.mean()) * policy.log_prob(bet)).mean(),
        ])  # fmt: skip
        # The policy's loss says nothing of its progress; its reward does.
        values = torch.stack([losses[0], losses[1], reward.mean()])
        weights = reweighter.update(values)  # all 1 until each window is full, then mean 1
        (weights * losses).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % (steps // 10) == 0:
            shown = zip(NAMES, values.tolist(), weights.tolist(), strict=True)
            print(f"step {step:3}", *(f"  {n} {v:.2g} (weight {w:.2f})" for n, v, w in shown))
    return values


if __name__ == "__main__":
    main()
