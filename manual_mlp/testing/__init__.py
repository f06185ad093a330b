"""The gradient battery: what torch's own layers can do, asked of any differentiable function, one row a question.

    report = check_gradients(function, inputs)      # a function, an autograd.Function or a module
    print(report)
    report.raise_if_failed()

`gradient_tests` makes a pytest test of each check, `assert_manual_backward` looks into a model's graph, and
`python -m manual_mlp.testing` runs the battery on this package, or on a function of yours.
"""

from manual_mlp.testing.battery import GradientError, Report, Row, check_gradients, gradient_tests
from manual_mlp.testing.graph import assert_manual_backward

__all__ = ["GradientError", "Report", "Row", "assert_manual_backward", "check_gradients", "gradient_tests"]
