"""The command lines of the tool verbs; what they do is elsewhere."""

from collections.abc import Sequence

from slimconv_lit.analysis.report import models_table, profile_table
from slimconv_lit.errors import Parser, UsageError, explain
from slimconv_lit.ops import OperatorFactory
from slimconv_lit.tables import TableStyle


def profile(
    backbone: str,
    operator: OperatorFactory | None = None,
    num_classes: int | None = None,
    input_size: int | None = None,
    depth: int | None = 2,
    style: TableStyle = "table",
) -> str:
    """Counts the parameters and multiply-accumulates of a network, part by part.

    Args:
        backbone: A name from `models`.
        operator: The operator in it: --operator=SlimConv2d --operator.k=8/3. It is compared with the plain network.
        num_classes: Width of the classifier; null for the data that the network was made for.
        input_size: Side of the image in pixels; null for the data that the network was made for.
        depth: How deep to look; 0 shows the total alone, null each layer.
        style: table, csv, json or md.
    """
    return profile_table(backbone, operator, num_classes, input_size, depth, style)


def models(pattern: str | None = None, style: TableStyle = "table") -> str:
    """Lists the networks that a config can name, with what they cost.

    Args:
        pattern: Such as 'cifar_*' or 'timm:resnet*'.
        style: table, csv, json or md.
    """
    return models_table(pattern, style)


def run_tool(verb: str, argv: Sequence[str]) -> None:
    """Runs `models` or `profile` and prints the table.

    Raises:
        UsageError: If the command line is wrong.
    """
    function = {"models": models, "profile": profile}[verb]
    parser = Parser(prog=f"python -m slimconv_lit {verb}", description=(function.__doc__ or "").partition("\n")[0])
    positional = {"models": "pattern", "profile": "backbone"}[verb]
    parser.add_argument(positional, type=str, nargs="?" if verb == "models" else None)
    parser.add_function_arguments(function, skip={positional})
    try:
        given = parser.instantiate_classes(parser.parse_args(list(argv)))
        print(function(**given.as_dict()))
    except (UsageError, ValueError) as error:
        raise UsageError(explain(str(error), list(parser.get_defaults().keys()), argv)) from error
