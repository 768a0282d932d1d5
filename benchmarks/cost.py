"""What a prediction costs, next to the run it predicts.

    python -m benchmarks.cost

A network of 8,970 parameters on 1,000 digits, gradient descent at learning rate 0.2.
Both sides run in this process, compiled and warmed up, in turn; the ratio of their wall
times is the median over the repetitions.
"""

import argparse
import statistics

import centralflow as cf
from tests.problems import reference

from .report import heading, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--substeps", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    steps = arguments.steps

    _, config, objective, model = reference("gd_mlp_digits")
    optimizer = cf.GradientDescent(config["learning_rate"])
    measured = cf.train(
        objective, model, optimizer, steps, sharpness_every=10, sharpness_count=3
    )
    train = lambda: cf.train(objective, model, optimizer, steps)
    train()
    rows = []
    for substeps in arguments.substeps:
        flow = cf.CentralFlow(substeps=substeps)
        predict = lambda flow=flow: cf.predict(
            objective, model, optimizer, steps, flow=flow
        )
        compilation = predict().stats["compile_seconds"]
        ratios = []
        for _ in range(arguments.repeat):
            run, prediction = train(), predict()
            ratios.append(prediction.stats["seconds"] / run.stats["seconds"])
        report = cf.compare(measured, prediction)
        s = prediction.stats
        rows.append(
            [
                f"CentralFlow({substeps})",
                f"{statistics.median(ratios):.1f}",
                f"{prediction.gradient_equivalents / steps:.1f}",
                f"{s['gradients']}",
                f"{s['hvps']}",
                f"{s['third_derivatives']}",
                f"{100 * report.loss_error:.2f} %",
                f"{100 * report.sharpness_error:.2f} %",
                f"{100 * report.weight_distance:.2f} %",
                f"{compilation:.0f} s",
            ]
        )
    heading(f"Cost of predicting {steps} steps of gradient descent, lr 0.2")
    table(
        [
            "flow",
            "wall time / training",
            "gradient-equivalents per step",
            "gradients",
            "HVPs",
            "third derivatives",
            "loss error",
            "sharpness error",
            "weight distance",
            "compilation",
        ],
        rows,
    )


if __name__ == "__main__":
    main()
