"""isotach verify: the laws every family and mixer obeys, checked on this machine."""

from typing import Annotated

import typer

from isotach.errors import UserError


def verify(
    name: Annotated[str | None, typer.Argument(help="A family or mixer; all of them when left out.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Check whole = chunked = step = packed = sharded = restored, gradients and precision; exit with 1 if one fails."""
    import json
    import logging

    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from isotach.config import nearest
    from isotach.testing import laws, subjects

    known = subjects.find()
    chosen = [subject for subject in known if name in (None, subject.name)]
    if not chosen:
        raise UserError(
            f"verify: {name!r} is neither a family nor a mixer; {nearest(name or '', {s.name for s in known})}"
        )
    logging.getLogger("torch").setLevel(logging.ERROR)
    work = [(subject, law) for subject in chosen for law in laws.LAWS]
    console = Console(stderr=True)
    verdicts = [laws.judge(law, subject) for subject, law in track(work, "checking", console=console, transient=True)]
    verdicts = [verdict for verdict in verdicts if verdict.cases]

    if as_json:
        print(json.dumps([verdict._asdict() for verdict in verdicts], indent=1))
    else:
        table = Table("", "law", "", "backends", "cases", "largest error", "limit", "")
        for verdict in verdicts:
            table.add_row(
                verdict.subject,
                str(verdict.number),
                verdict.title,
                " ".join(verdict.backends),
                str(verdict.cases),
                f"{verdict.error:.1e}",
                f"{verdict.limit:.0e}",
                "[green]holds[/]" if verdict.holds else f"[red]BROKEN[/] {verdict.worst}",
            )
        Console(width=max(console.width, 110)).print(table)
    if not all(verdict.holds for verdict in verdicts):
        raise typer.Exit(1)
