"""`serval keygen` and `serval id`: keys, and the serviceIDs that certify themselves with them."""

from __future__ import annotations

from pathlib import Path

import rich_click as click

from serval_core.commands.options import json_option, prefix_argument
from serval_core.config_file import Misconfigured
from serval_core.errors import OurMistake
from serval_core.names import SERVICE_ID_BITS
from serval_core.tables import new_console, print_json

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument("file", type=_FILE)
@json_option
def keygen(file: Path, as_json: bool) -> None:
    """Make a private key (Ed25519) in a new FILE that only you can read, and print its public key."""
    from serval_core.identity import create_identity

    try:
        public_key = create_identity(file).public_key.hex()
    except OurMistake as mistake:
        raise Misconfigured("keygen", str(mistake)) from None
    if as_json:
        print_json(new_console(), {"file": str(file), "public_key": public_key})
    else:
        click.echo(public_key)


@click.command("id")
@click.argument("prefix", metavar="PREFIX")
@click.argument("key", metavar="FILE|PUBLIC_KEY")
@json_option
def service_id(prefix: str, key: str, as_json: bool) -> None:
    """Print the self-certifying serviceID of a key within a provider's PREFIX (at most 96 bits).

    Given a whole serviceID for PREFIX, say whether it belongs to the key.
    """
    from serval_core.identity import (
        PROVIDER_BITS,
        certifies,
        load_identity,
        parse_public_key,
        self_certifying_id,
    )

    provider = prefix_argument(prefix)
    try:
        public_key = load_identity(Path(key)).public_key if Path(key).exists() else parse_public_key(key)
    except OurMistake as mistake:
        raise Misconfigured("id", str(mistake)) from None
    if provider.bits == SERVICE_ID_BITS and any(provider.service_id[12:]):
        if not certifies(public_key, provider.service_id):
            raise OurMistake(f"{prefix} does not belong to this key")
        answer = provider.service_id
    elif provider.bits > PROVIDER_BITS and provider.bits != SERVICE_ID_BITS:
        sentence = f"has {provider.bits} bits, and the key's part begins behind {PROVIDER_BITS} (nearest: {PROVIDER_BITS})"
        raise Misconfigured(prefix, sentence)
    else:
        answer = self_certifying_id(provider, public_key)
    if as_json:
        print_json(new_console(), {"service_id": answer.hex_text, "text": answer.text, "public_key": public_key.hex()})
    else:
        click.echo(answer.text)
